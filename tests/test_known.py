"""Labels that are revealed, and the measures of the others, against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch

from cnnrnn.known import best_threshold_of_others, metrics_of_others, reveal

average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score


def drawn(n=60, labels=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(n, labels, generator=generator) < 0.4
    scores = (torch.rand(n, labels, generator=generator) * 8).round() / 8  # with ties
    return scores, targets


@pytest.mark.parametrize("count", [0, 1, 2, 6, 7])
def test_so_many_true_labels_are_revealed_where_one_is_left(count):
    _, targets = drawn()
    images, evidence = reveal(targets, count, seed=3)
    assert images.tolist() == [i for i in range(60) if targets[i].sum() > count]
    assert evidence.dtype == torch.int8 and evidence.shape == (len(images), 7)
    assert (evidence.sum(1) == count).all() and (evidence >= 0).all()
    assert targets[images][evidence == 1].all()
    again = reveal(targets.clone(), count, seed=3)
    assert torch.equal(again.images, images) and torch.equal(again.evidence, evidence)


def test_every_true_label_is_as_likely_to_be_revealed():
    targets = torch.tensor([[True, False, True, True]]).expand(3000, -1).contiguous()
    shares = reveal(targets, 1).evidence.double().mean(0)
    assert shares[1] == 0
    torch.testing.assert_close(shares[[0, 2, 3]], torch.full((3,), 1 / 3).double(), rtol=0,
                               atol=0.04)  # fmt: skip
    assert not torch.equal(reveal(targets, 1, seed=1).evidence, reveal(targets, 1).evidence)


def test_measures_are_scikit_learns_on_what_is_not_known():
    scores, targets = drawn()
    evidence = torch.zeros(60, 7, dtype=torch.int8)
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(60, 7, generator=generator) < 0.3
    evidence[known] = torch.where(targets[known], 1, -1).to(torch.int8)
    targets[:, 6] &= known[:, 6]  # a label without a true image that is left
    evidence[4] = torch.where(targets[4], 1, 0)  # and an image without such a label
    unknown = torch.zeros(60, 7, dtype=torch.bool)
    unknown[10:20, 2] = ~targets[10:20, 2]
    others = (evidence == 0) & ~unknown

    found = metrics_of_others(scores, targets, evidence, threshold=0.5, unknown=unknown)
    by_image = [
        average_precision_score(targets[i][others[i]], scores[i][others[i]])
        for i in range(60)
        if (targets[i] & others[i]).any()
    ]
    by_label = [
        average_precision_score(targets[:, j][others[:, j]], scores[:, j][others[:, j]])
        for j in range(6)
    ]
    assert found["example-AP"] == pytest.approx(sum(by_image) / len(by_image))
    assert found["label-mAP"] == pytest.approx(sum(by_label) / 6)
    sets = (scores >= 0.5) & others
    left = targets & others
    f1 = 2 * int((sets & left).sum()) / int(sets.sum() + left.sum())
    assert found["O-F1"] == pytest.approx(f1)
    assert found["images"] == 60 and found["images-without-others"] == 60 - len(by_image) > 0
    assert found["labels-without-positives"] == 1 and found["threshold"] == 0.5


def test_scores_of_known_labels_count_nowhere():
    scores, targets = drawn()
    images, evidence = reveal(targets, 1)
    scores, targets = scores[images], targets[images]
    expected = metrics_of_others(scores, targets, evidence)
    for value in (-math.inf, 0.3, math.inf):
        changed = scores.masked_fill(evidence == 1, value)
        assert metrics_of_others(changed, targets, evidence) == expected


def test_the_best_cut_is_the_best_of_all():
    scores, targets = drawn(seed=2)
    images, evidence = reveal(targets, 1)
    scores, targets = scores[images], targets[images]
    best = metrics_of_others(scores, targets, evidence)
    assert best["threshold"] == best_threshold_of_others(scores, targets, evidence)
    others = [
        metrics_of_others(scores, targets, evidence, threshold=float(cut))["O-F1"]
        for cut in scores.unique()
    ]
    assert best["O-F1"] == pytest.approx(max(others)) and min(others) < max(others)


def test_what_is_wrong_is_named():
    scores, targets = drawn()
    evidence = torch.zeros(60, 7, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"evidence must be \[n, L\] int8 like targets \[60, 7\]"):
        metrics_of_others(scores, targets, evidence[:, :6])
    with pytest.raises(ValueError, match="got .* torch.int64"):
        metrics_of_others(scores, targets, evidence.long())
    with pytest.raises(ValueError, match="evidence must be -1, 0 or 1, got the value 2"):
        metrics_of_others(scores, targets, evidence + 2)
    with pytest.raises(ValueError, match="none of the 60 images has a true label that"):
        metrics_of_others(scores, targets, targets.to(torch.int8))
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        reveal(targets, -1)
    with pytest.raises(ValueError, match=r"targets must be \[n, L\] bool, got \[60, 7\]"):
        reveal(targets.int(), 1)
