"""Log-odds of co-occurrence: by hand, and against Bayes' rule on a model where it is exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from cnnrnn.comparison.cooccurrence import fit_cooccurrence
from cnnrnn.data import Dataset
from cnnrnn.network.cooccurrence import CoOccurrence
from cnnrnn.reveal import metrics_of_others, reveal
from cnnrnn.training.batches import Split


def logit(p):
    return math.log(p / (1 - p))


def test_counts_by_hand():
    targets = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]) > 0
    counted = CoOccurrence.counted(targets, smoothing=2.0)
    share = 3.5 / 6  # of the labels 0 and 1
    together = (2 + 2 * share) / (3 + 2)
    assert float(counted.present[0, 1]) == pytest.approx(logit(together) - logit(share))
    apart = (1 + 2 * share) / (2 + 2)  # of the two images without label 0 one has label 1
    assert float(counted.absent[0, 1]) == pytest.approx(logit(apart) - logit(share))
    assert float(counted.present[2, 0]) == pytest.approx(0, abs=1e-12)  # never seen
    evidence = torch.tensor([[1, 0, 0], [-1, 0, 1], [0, 0, 0]], dtype=torch.int8)
    logits = torch.tensor([[0.1, 0.2, 0.3]]).expand(3, -1)
    scores = counted.scores(logits, evidence)
    assert scores[0, 0] == math.inf and scores[1, 0] == -math.inf and scores[1, 2] == math.inf
    assert float(scores[0, 1]) == pytest.approx(0.2 + float(counted.present[0, 1]))
    expected = 0.2 + float(counted.absent[0, 1] + counted.present[2, 1])
    assert float(scores[1, 1]) == pytest.approx(expected)
    assert torch.equal(scores[2], logits[2])


def test_pairs_are_counted_where_both_labels_are_known():
    generator = torch.Generator().manual_seed(1)
    unknown = torch.rand(60, 4, generator=generator) < 0.3
    targets = (torch.rand(60, 4, generator=generator) < 0.5) & ~unknown
    counted = CoOccurrence.counted(targets, smoothing=2.0, unknown=unknown)
    for k, label in itertools.permutations(range(4), 2):
        with_l = targets[~unknown[:, label], label]
        share = (int(with_l.sum()) + 0.5) / (len(with_l) + 1)
        both = ~unknown[:, k] & ~unknown[:, label]
        for found, with_k in ((counted.present, targets[:, k]), (counted.absent, ~targets[:, k])):
            rows = targets[both & with_k, label]
            given = (int(rows.sum()) + 2 * share) / (len(rows) + 2)
            assert float(found[k, label]) == pytest.approx(logit(given) - logit(share))
    everything = CoOccurrence.counted(targets, 2.0, unknown & False)
    assert torch.equal(everything.present, CoOccurrence.counted(targets, 2.0).present)
    torch.testing.assert_close(everything.absent, CoOccurrence.counted(targets, 2.0).absent)


def test_it_is_bayes_rule_where_known_labels_depend_on_the_other_alone():
    """Label 2 draws labels 0 and 1, and an image; all three are independent given it."""
    p_label, p_known, likelihood = 0.2, {1: (0.7, 0.4), 0: (0.1, 0.2)}, {1: 0.9, 0: 0.3}
    rows, counts = [], []
    for label, a, b in itertools.product((0, 1), repeat=3):
        p = p_label if label else 1 - p_label
        for value, chance in zip((a, b), p_known[label], strict=True):
            p *= chance if value else 1 - chance
        rows.append([a, b, label])
        counts.append(round(p * 1_000_000))
    targets = torch.tensor(rows).repeat_interleave(torch.tensor(counts), 0) > 0
    counted = CoOccurrence.counted(targets, smoothing=1e-3)
    for a, b in itertools.product((-1, 0, 1), repeat=2):
        joint = {}
        for label in (0, 1):
            joint[label] = (p_label if label else 1 - p_label) * likelihood[label]
            for told, chance in zip((a, b), p_known[label], strict=True):
                joint[label] *= {1: chance, 0: 1.0, -1: 1 - chance}[told]
        image_alone = p_label * likelihood[1], (1 - p_label) * likelihood[0]
        logits = torch.tensor([[0.0, 0.0, math.log(image_alone[0] / image_alone[1])]])
        evidence = torch.tensor([[a, b, 0]], dtype=torch.int8)
        found = float(counted.scores(logits, evidence)[0, 2])
        assert found == pytest.approx(math.log(joint[1] / joint[0]), abs=1e-3)


def test_weight_and_smoothing_are_chosen_on_validation_data():
    nothing = np.zeros(0, np.int32)
    source = Dataset.from_arrays("made", ("a", "b", "c", "d"), np.zeros(1, np.int64), nothing)
    generator = torch.Generator().manual_seed(0)
    coin = torch.rand(300, 1, generator=generator) < 0.5
    noise = torch.rand(300, 2, generator=generator) < 0.5
    targets = torch.cat([coin, coin, noise], 1)
    logits = torch.randn(300, 4, generator=generator) * 0.3
    train, val = (Split(source, part, None) for part in (targets[:150], targets[150:]))
    found = fit_cooccurrence(train, logits[150:], val)
    images, evidence = reveal(targets[150:], 1)

    def example_ap(scores):
        return metrics_of_others(scores, targets[150:][images], evidence)["example-AP"]

    none = example_ap(logits[150:][images])
    best = example_ap(found.scores(logits[150:][images], evidence))
    assert best > none + 0.1
    for smoothing in (0.3, 10.0):
        counted = CoOccurrence.counted(targets[:150], smoothing)
        assert best >= example_ap(counted.scores(logits[150:][images], evidence))
    lone = torch.eye(4, dtype=torch.bool)
    alone = fit_cooccurrence(train, logits[:4], Split(source, lone, None))  # nothing to choose by
    assert torch.equal(alone.present, CoOccurrence.counted(targets[:150], 1.0).present)
