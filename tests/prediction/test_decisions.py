"""What is decided: no empty sets where none is true, shrunk thresholds, the best expected F1."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from cnnrnn import Ensemble, ModelConfig, SearchConfig
from cnnrnn.config import DECISIONS, Calibration
from cnnrnn.labels import PAD, LabelSpace
from cnnrnn.metrics import best_label_thresholds, best_threshold, multilabel_metrics, threshold_sets
from cnnrnn.model.checkpoint import FEATURES_ONLY
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.head import Head
from cnnrnn.prediction.decisions import (
    FEW_POSITIVES,
    SHRINKAGES,
    DecisionOptions,
    best_f1_sets,
    calibrate,
    decide,
    decided_sets,
    decision_metrics,
)
from cnnrnn.search import SearchResult
from cnnrnn.search.inference import Inference

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
        sets = decide(inference, calibration, DecisionOptions(None, decision, None)).sets
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
    from cnnrnn.prediction.decisions import _Cuts

    own = torch.tensor([0.9, 0.2, 0.3])
    cuts = _Cuts(0.3, own, torch.tensor([10, 30, 2]), torch.tensor([True, True, False]))
    odds = [(0.9 / 0.1 * 0.3 / 0.7) ** 0.5, (0.2 / 0.8) ** 0.75 * (0.3 / 0.7) ** 0.25]
    torch.testing.assert_close(
        cuts.shrunk(10.0), torch.tensor([odds[0] / (1 + odds[0]), odds[1] / (1 + odds[1]), 0.3])
    )


def test_a_shrinkage_that_is_given_is_taken():
    scores, targets = scored(400, 30, 0)
    inference = Inference(targets, scores, None, ())
    common, _ = best_threshold(scores, targets)
    own = best_label_thresholds(scores, targets, otherwise=common, at_least=FEW_POSITIVES)
    for shrinkage, cuts in ((0.0, own), (1e12, torch.full_like(own, common))):
        found = calibrate(inference, targets, shrinkage=shrinkage)
        torch.testing.assert_close(torch.tensor(found.label_thresholds), cuts)
    # The one that is chosen is one of those tried, and all else is the same.
    chosen = calibrate(inference, targets)
    tried = [calibrate(inference, targets, shrinkage=s) for s in SHRINKAGES]
    assert chosen in tried
    assert len({replace(found, label_thresholds=()) for found in tried}) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_validation_images_are_enough(count):
    marginals = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(count, 3, dtype=torch.bool)
    targets[0, 1] = True
    found = calibrate(Inference(targets, marginals, None, ()), targets)
    assert found.label_thresholds == (found.threshold,) * 3


# The best expected F1


def random_result(labels: int, paths: int, longest: int, seed: int) -> SearchResult:
    """Paths of 40 images that may repeat a label or a set, some of them absent."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-1, labels, (40, paths, longest), generator=generator)
    found = found.sort(2, descending=True).values
    log_probs = (2 * torch.randn(40, paths, generator=generator) - 3).sort(1, descending=True)[0]
    absent = torch.rand(40, paths, generator=generator) < 0.2
    absent[:, 0] = False
    log_probs = log_probs.masked_fill(absent, -torch.inf)
    found = found.masked_fill(absent[:, :, None], PAD)
    return SearchResult(found, (found != PAD).sum(2), log_probs, labels)


def expected_f1(guess: frozenset, sets: list[frozenset], probabilities: list[float]) -> float:
    return sum(
        p * (2 * len(guess & s) / (len(guess) + len(s)) if guess or s else 1.0)
        for s, p in zip(sets, probabilities, strict=True)
    )


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize(("labels", "paths", "longest"), [(4, 5, 3), (5, 8, 4), (1, 1, 1)])
def test_no_set_has_a_better_expected_f1(labels, paths, longest, least):
    result = random_result(labels, paths, longest, seed=least)
    subsets = [frozenset(s) for k in range(labels + 1)
               for s in itertools.combinations(range(labels), k)]  # fmt: skip
    for image, chosen in enumerate(members(best_f1_sets(result, least))):
        sets = [frozenset(p) - {PAD} for p in result.labels[image].tolist()]
        probabilities = result.log_probs[image].double().softmax(0).tolist()
        most = len(frozenset().union(*sets))
        best = max(
            expected_f1(s, sets, probabilities) for s in subsets if len(s) >= min(least, most)
        )
        assert len(chosen) >= min(least, most)
        assert expected_f1(frozenset(chosen), sets, probabilities) == pytest.approx(best, abs=1e-9)


def test_slices_make_no_difference(monkeypatch):
    result = random_result(5, 8, 4, seed=3)
    whole = best_f1_sets(result)
    for at_once in (1, 200):
        monkeypatch.setattr("cnnrnn.prediction.decisions.F1_AT_ONCE", at_once)
        assert torch.equal(best_f1_sets(result), whole)


def test_paths_without_labels_or_probability():
    empty = SearchResult(
        torch.zeros(3, 2, 0).long(), torch.zeros(3, 2).long(), torch.zeros(3, 2), L
    )
    assert best_f1_sets(empty).shape == (3, L) and not best_f1_sets(empty).any()
    assert best_f1_sets(replace(empty, labels=torch.full((3, 2, 2), PAD))).sum() == 0
    none = SearchResult(torch.zeros(0, 2, 3).long(), torch.zeros(0, 2).long(), torch.zeros(0, 2), L)
    assert best_f1_sets(none).shape == (0, L)
    # Impossible for a member of an ensemble: the first set stands.
    paths = torch.tensor([[[1, 3], [0, PAD]]])
    impossible = SearchResult(paths, torch.tensor([[2, 1]]), torch.full((1, 2), -torch.inf), L)
    assert members(best_f1_sets(impossible)) == [[1, 3]]


def test_worked_example_of_the_best_f1():
    # () .4, (0) .3, (0, 1) .3: the empty set expects .4, {0} .3 + .3 * 2/3 = .5, {0, 1} .5.
    inference = made([[(), (0,), (0, 1)], [(), (0,), (1,)]], [[0.4, 0.3, 0.3], [0.5, 0.3, 0.2]])
    assert members(best_f1_sets(inference.search[0])) == [[0], []]
    scores = torch.full((2, L), 0.5)
    filled = decided_sets("f1", inference, scores, Calibration(min_labels=1))
    assert members(filled) == [[0], [0, 1]]  # 2/3 of .5 is more than .3


def test_models_and_ensembles_decide_by_f1():
    models = [feature_model(0), feature_model(1, NAMES[::-1])]
    for model in (models[0], Ensemble(models).eval()):
        inference = model.infer(features())
        expected = torch.cat([best_f1_sets(result) for result in inference.search])
        found = model.predict_features(features(), decide="f1", min_labels=0)
        assert [p.labels for p in found] == [
            [model.labels[i] for i in image] for image in members(expected)
        ]
        assert sum(p.labels != q.labels for p, q in zip(
            found, model.predict_features(features(), min_labels=0), strict=True
        )) > 5  # fmt: skip
        targets = noisy_targets(inference, empty=True)
        rows = decision_metrics(inference, targets, model.calibration)
        assert rows["f1"]["example-F1"] >= 0


# The mass of what was found


def test_mass_is_the_probability_of_all_sets_found():
    for order in ("increasing", "unique"):
        model = feature_model()
        model.search = replace(model.search, order=order)
        for p in model.predict_features(features(20)):
            assert sum(math.exp(x) for _, x in p.paths) - 1e-5 < p.mass < 1 + 1e-5
    few = replace(feature_model().search, max_labels=2, beam_size=16)  # holds every path
    inference = feature_model().infer(features(20), few)
    everything = inference.search[0].log_evidence
    torch.testing.assert_close(everything, torch.zeros(20), atol=1e-5, rtol=0)
    narrow, wide = (
        [p.mass for p in feature_model().predict_features(features(20), beam_size=N)]
        for N in (1, 16)
    )
    assert all(a <= b + 1e-6 for a, b in zip(narrow, wide, strict=True)) and min(wide) > 0.5


def test_scores_are_lower_bounds_of_marginals():
    model = feature_model()
    model.calibration = Calibration(mix_weight=0.0)
    model.search = replace(model.search, max_labels=L)
    exact = replace(model.search, beam_size=16)
    for few, many in zip(
        model.predict_features(features(50), beam_size=1),
        model.infer(features(50), exact).marginals.tolist(),
        strict=True,
    ):
        for score, marginal in zip(few.scores.values(), many, strict=True):
            assert score <= marginal + 1e-3
