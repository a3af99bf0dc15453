"""What is decided: no empty sets where none is true, shrunk thresholds, the best expected F1."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cnnrnn import Ensemble, ModelConfig, SearchConfig
from cnnrnn.classifier import CNNRNN, FEATURES_ONLY
from cnnrnn.config import DECISIONS, Calibration
from cnnrnn.decisions import (
    FEW_POSITIVES,
    Inference,
    calibrate,
    decided_sets,
    decision_metrics,
)
from cnnrnn.labels import PAD, LabelSpace
from cnnrnn.metrics import best_label_thresholds, best_threshold, multilabel_metrics, threshold_sets
from cnnrnn.model import Head
from cnnrnn.prediction import Options, decide
from cnnrnn.search import SearchResult

L = 6
NAMES = tuple("abcdef")


def feature_model(seed: int = 0, names: tuple[str, ...] = NAMES) -> CNNRNN:
    """A random model of 5 features, some of whose best paths are empty."""
    torch.manual_seed(seed)
    config = ModelConfig(backbone=FEATURES_ONLY, trunk_dim=0, joint_dim=8, hidden_dim=8)
    head = Head.from_config(config, L, 5)
    head.max_labels = 3
    with torch.no_grad():
        head.image_projection.weight.mul_(4)
        head.label_embedding.mul_(3)
        head.label_classifier.weight.mul_(6)
        head.score_bias[L] += 2
    return CNNRNN(config, LabelSpace.given(names), head, None, SearchConfig(beam_size=6)).eval()


def features(n: int = 300) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1))


def noisy_targets(inference: Inference, empty: bool) -> torch.Tensor:
    """Label sets that follow the scores; without empty ones the best label is in each."""
    generator = torch.Generator().manual_seed(2)
    scores = inference.mixed(0.5)
    targets = torch.rand(scores.shape, generator=generator) < scores
    if not empty:
        targets[torch.arange(len(scores)), scores.argmax(1)] = True
    return targets


def made(paths: list[list[tuple[int, ...]]], probabilities: list[list[float]]) -> Inference:
    """An inference of paths; an image with fewer ones has absent paths."""
    N, T = max(map(len, paths)), max(len(path) for image in paths for path in image)
    labels = torch.full((len(paths), N, T), PAD)
    log_probs = torch.full((len(paths), N), -torch.inf)
    for i, image in enumerate(paths):
        for j, path in enumerate(image):
            labels[i, j, : len(path)] = torch.tensor(path, dtype=torch.int64)
            log_probs[i, j] = math.log(probabilities[i][j])
    result = SearchResult(labels, (labels != PAD).sum(2), log_probs, L)
    return Inference(result.best_sets(), torch.full((len(paths), L), 0.5), None, (result,))


def members(sets: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in sets]


# No empty sets where none is true


def test_no_empty_set_is_predicted_where_none_is_true():
    model = feature_model()
    inference = model.infer(features())
    assert (~inference.sets.any(1)).sum() > 10
    model.calibration = calibrate(inference, noisy_targets(inference, empty=False))
    assert model.calibration.min_labels == 1
    for decision in DECISIONS:
        assert all(p.labels for p in model.predict_features(features(), decide=decision))
    scores = inference.mixed(model.calibration.mix_weight)
    without = replace(model.calibration, min_labels=0)
    for decision in ("path", "threshold", "label_thresholds"):
        assert not decided_sets(decision, inference, scores, without).any(1).all()


def test_one_empty_set_in_validation_allows_them():
    model = feature_model()
    inference = model.infer(features())
    targets = noisy_targets(inference, empty=False)
    targets[17] = False
    assert calibrate(inference, targets).min_labels == 0


def test_sets_may_be_empty_where_the_best_label_is_mostly_wrong():
    # The best-scored label is never right but on image 0, where the others are.
    marginals = torch.tensor([[0.9, 0.8, 0.1, 0.1]] + 3 * [[0.6, 0.1, 0.1, 0.1]])
    targets = torch.tensor([[1, 1, 0, 0]] + 3 * [[0, 1, 0, 0]]) > 0
    found = calibrate(Inference(targets, marginals, None, ()), targets)
    assert found.min_labels == 0
    better = calibrate(Inference(targets, marginals, None, ()), targets[:, [1, 0, 2, 3]])
    assert better.min_labels == 1


@pytest.mark.parametrize("least", [0, 1, 2, 3])
def test_min_labels_that_are_asked_for_hold_for_every_decision(least):
    model = feature_model()
    model.calibration = Calibration(0.9, 0.5, (0.9,) * L, 1, min_labels=1)
    sizes = {
        decision: [
            len(p.labels)
            for p in model.predict_features(features(), decide=decision, min_labels=least)
        ]
        for decision in DECISIONS
    }
    for decision, found in sizes.items():
        assert min(found) == (max(least, 1) if decision == "k" else least), decision
    by_threshold = model.predict_features(features(), threshold=2.0, min_labels=least)
    assert {len(p.labels) for p in by_threshold} == {least}


def test_labels_are_added_by_score():
    model = feature_model()
    for p in model.predict_features(features(), threshold=2.0, min_labels=2):
        assert set(p.labels) == set(sorted(NAMES, key=lambda name: -p.scores[name])[:2])
    for p in model.predict_features(features(), min_labels=3, top_k=1):
        assert len(p.labels) == 1


def test_a_short_path_gives_way_to_the_best_long_enough_one():
    inference = made(
        [[(), (1,), (0, 2)], [(3, 4), (5,)], [()], [(), (0, 0), (2, 5)]],
        [[0.5, 0.3, 0.1], [0.6, 0.2], [0.9], [0.5, 0.3, 0.1]],
    )
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.6, 0.5]]).expand(4, L)
    expected = {
        0: [[], [3, 4], [], []],
        1: [[1], [3, 4], [4], [0]],
        2: [[0, 2], [3, 4], [4, 5], [2, 5]],
        3: [[3, 4, 5], [3, 4, 5], [3, 4, 5], [3, 4, 5]],
    }
    for least, sets in expected.items():
        calibration = Calibration(min_labels=least)
        assert members(decided_sets("path", inference, scores, calibration)) == sets


def test_every_decision_is_measured_as_it_is_predicted():
    model = feature_model()
    inference = model.infer(features())
    targets = noisy_targets(inference, empty=False)
    calibration = calibrate(inference, targets)
    rows = decision_metrics(inference, targets, calibration, k=1)
    assert list(rows) == [*DECISIONS, "path@1", "top@1"]
    for decision in DECISIONS:
        sets = decide(inference, calibration, Options(None, decision, None)).sets
        assert rows[decision]["example-F1"] == multilabel_metrics(sets, targets)["example-F1"]
    assert rows["path@1"]["mean-labels-predicted"] == 1


def test_an_ensemble_takes_the_smallest_of_its_members_least_numbers():
    models = [feature_model(0), feature_model(1, NAMES[::-1])]
    models[0].calibration = Calibration(0.5, 0.5, (0.5,) * L, 1, 1, (0, 2))
    models[1].calibration = Calibration(0.5, 0.5, (0.5,) * L, 1, 2, (0,))
    assert Ensemble(models).calibration.min_labels == 1
    assert Ensemble(models).calibration.uncalibrated == (0, 2, 5)
    models[1].calibration = Calibration(0.5, 0.5, (0.5,) * L, 1, 0)
    ensemble = Ensemble(models).eval()
    assert ensemble.calibration.min_labels == 0
    inference = ensemble.infer(features())
    ensemble.calibrate(features(), noisy_targets(inference, empty=False))
    assert ensemble.calibration.min_labels == 1
    for decision in DECISIONS:
        assert all(p.labels for p in ensemble.predict_features(features(), decide=decision))


# A threshold for each label


def scored(n: int, num_labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [n, L] in 0..1 and label sets of a long tail, down to labels that are never there."""
    generator = torch.Generator().manual_seed(seed)
    shares = 0.4 / torch.arange(1, num_labels + 1) ** 1.5
    shares[-3:] = 0
    targets = torch.rand(n, num_labels, generator=generator) < shares
    noise = torch.randn(n, num_labels, generator=generator)
    return (2.5 * targets + noise + shares.clamp(1e-3).logit()).sigmoid(), targets


def test_own_thresholds_cost_no_o_f1_where_positives_are_few():
    scores, targets = scored(400, 30, 0)
    test_scores, test_targets = scored(4000, 30, 1)

    def o_f1(cut: float | torch.Tensor) -> float:
        return multilabel_metrics(threshold_sets(test_scores, cut), test_targets)["O-F1"]

    found = calibrate(Inference(targets, scores, None, ()), targets)
    assert found.min_labels == 0
    common, _ = best_threshold(scores, targets)
    assert found.threshold == common
    unshrunk = o_f1(best_label_thresholds(scores, targets, otherwise=common))
    assert o_f1(torch.tensor(found.label_thresholds)) > o_f1(common) - 0.01 > unshrunk + 0.03


def test_labels_of_few_positives_have_the_common_threshold():
    scores, targets = scored(400, 30, 0)
    trained = torch.ones(30, dtype=torch.bool)
    trained[0] = False
    found = calibrate(Inference(targets, scores, None, ()), targets, trained)
    few = {0} | set((targets.sum(0) < FEW_POSITIVES).nonzero()[:, 0].tolist())
    assert set(found.uncalibrated) == few and {27, 28, 29} < few and len(few) < 25
    for label, cut in enumerate(found.label_thresholds):
        assert (cut == found.threshold) == (label in few)


def test_shrinking_by_hand():
    from cnnrnn.decisions import _Cuts

    own = torch.tensor([0.9, 0.2, 0.3])
    cuts = _Cuts(0.3, own, torch.tensor([10, 30, 2]), torch.tensor([True, True, False]))
    odds = [(0.9 / 0.1 * 0.3 / 0.7) ** 0.5, (0.2 / 0.8) ** 0.75 * (0.3 / 0.7) ** 0.25]
    torch.testing.assert_close(
        cuts.shrunk(10.0), torch.tensor([odds[0] / (1 + odds[0]), odds[1] / (1 + odds[1]), 0.3])
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_validation_images_are_enough(count):
    marginals = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(count, 3, dtype=torch.bool)
    targets[0, 1] = True
    found = calibrate(Inference(targets, marginals, None, ()), targets)
    assert found.label_thresholds == (found.threshold,) * 3
