"""Labels that the caller knows: what `predict` makes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import cnnrnn
from cnnrnn.config import DECISIONS, Calibration, SearchConfig
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.head import MOST_COUNTED_LABELS, Head
from cnnrnn.prediction.decisions import calibrate_known, nll_levels
from cnnrnn.prediction.known import Known
from cnnrnn.search.inference import set_nll
from tests.prediction.test_decisions import NAMES, L, feature_model, features


def test_known_labels_are_in_every_decision_and_absent_ones_in_none():
    model = feature_model()
    known, absent = [NAMES[L - 1]], [NAMES[0], NAMES[2]]
    for decide in DECISIONS:
        for least in (0, 1, L):
            found = model.predict_features(
                features(40), known=known, absent=absent, decide=decide, min_labels=min(least, 3)
            )
            for prediction in found:
                assert set(known) <= set(prediction.labels)
                assert not set(absent) & set(prediction.labels)
                assert prediction.scores[known[0]] == 1.0
                assert all(prediction.scores[name] == 0.0 for name in absent)
    for prediction in model.predict_features(features(40), known=known, decide="k", top_k=1):
        assert prediction.labels == known


def test_a_list_for_each_image():
    model = feature_model()
    known = [[NAMES[1]], [], [NAMES[0], NAMES[3]]]
    absent = [[], [NAMES[1]], [NAMES[2]]]
    together = model.predict_features(features(3), known=known, absent=absent)
    for i, prediction in enumerate(together):
        alone = model.predict_features(features(3)[i : i + 1], known=known[i], absent=absent[i])
        assert prediction.labels == alone[0].labels
        assert prediction.scores == pytest.approx(alone[0].scores, abs=1e-5)
        assert [path for path, _ in prediction.paths] == [path for path, _ in alone[0].paths]


def test_nothing_known_changes_nothing():
    model = feature_model()
    plain = model.predict_features(features(10))
    for known in ([], [[]] * 10):
        for before, after in zip(
            plain, model.predict_features(features(10), known=known), strict=True
        ):
            assert (before.labels, before.scores) == (after.labels, after.scores)
            assert before.mass == after.mass


def test_scores_are_conditional_probabilities():
    # Every set of at most two labels is found, so Bayes' rule can be applied to them by hand.
    model = feature_model()
    model.calibration = Calibration(mix_weight=0.0)
    model.search = SearchConfig(beam_size=16, max_labels=2)
    model.search = replace(model.search, marginal_places=64)
    inference = model.infer(features(5), replace(model.search, marginal_places=None))
    given = model.predict_features(features(5), known=[NAMES[2]], absent=[NAMES[4]])
    for row, prediction in enumerate(given):
        everything = model.infer(features(5)[row : row + 1]).search[0]
        assert float(everything.log_evidence[0]) == pytest.approx(0, abs=1e-4)
        fitting = {
            labels: math.exp(score) for labels, score in prediction.paths
        }  # all of them: {2} and {2, x}
        mass = sum(fitting.values())
        assert prediction.mass == pytest.approx(mass, rel=1e-3)
        for name in set(NAMES) - {NAMES[2], NAMES[4]}:
            expected = sum(p for labels, p in fitting.items() if name in labels) / mass
            assert prediction.scores[name] == pytest.approx(expected, abs=2e-3)
    assert len(inference.marginals) == 5


def test_what_no_set_fits_leaves_the_known_labels_alone():
    model = feature_model()
    absent = [name for name in NAMES if name != NAMES[1]]
    found = model.predict_features(
        features(4), known=[NAMES[1]], absent=absent, min_labels=2, decide="threshold"
    )
    for prediction in found:
        assert prediction.labels == [NAMES[1]]
        assert prediction.paths == []
        assert prediction.mass == 0.0
        assert prediction.log_prob == -math.inf


def test_an_ensemble_takes_known_labels():
    models = [feature_model(0), feature_model(1, tuple(reversed(NAMES)))]
    ensemble = Ensemble(models).eval()
    found = ensemble.predict_features(features(20), known=[NAMES[3]], absent=[NAMES[0]])
    alone = [m.predict_features(features(20), known=[NAMES[3]], absent=[NAMES[0]]) for m in models]
    for i, prediction in enumerate(found):
        assert NAMES[3] in prediction.labels and NAMES[0] not in prediction.labels
        for name in NAMES:
            mean = sum(member[i].scores[name] for member in alone) / 2
            assert prediction.scores[name] == pytest.approx(mean, abs=1e-6)


def test_images_take_known_labels(tmp_path):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(5)]
    model = cnnrnn.load()
    names = model.labels
    known = [[names[i]] for i in range(5)]
    found = cnnrnn.predict(images, model, known=known, batch_size=2)
    assert all(known[i][0] in prediction.labels for i, prediction in enumerate(found))
    streamed = list(model.predict_iter(iter(images), known=known, batch_size=2))
    assert [p.labels for p in streamed] == [p.labels for p in found]
    with pytest.raises(ValueError, match="known must have one list per image, got 5 lists for 4"):
        cnnrnn.predict(images[:4], model, known=known)
    with pytest.raises(ValueError, match="known must have one list per image, got 2 lists"):
        cnnrnn.predict(images, model, known=known[:2])


def test_what_is_wrong_names_label_and_image():
    model = feature_model()

    def predict(**known: object) -> None:
        model.predict_features(features(2), **known)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="known must be a list of label names, or such a list"):
        predict(known="sky")
    with pytest.raises(TypeError, match="absent mixes label names and lists of them"):
        predict(absent=[NAMES[0], [NAMES[1]]])
    with pytest.raises(ValueError, match="known must hold labels of the model, got 'yeti' for"):
        predict(known=[[NAMES[0]], ["yeti"]])
    with pytest.raises(
        ValueError, match=f"{NAMES[1]!r} is both known to be present and absent for image 1"
    ):
        predict(known=[[], [NAMES[1]]], absent=[NAMES[1]])
    with pytest.raises(ValueError, match="image 1 has 4 labels known to be present, more than"):
        predict(known=[[], list(NAMES[:4])])


def test_evidence_rows():
    known = Known(("a", "b", "c"), 2, [["a"], ["b", "c"]], ["c"])
    with pytest.raises(ValueError, match="'c' is both"):
        known.evidence([1], ["x.jpg"])
    rows = known.evidence([0], ["x.jpg"])
    assert rows is not None and rows.tolist() == [[1, 0, -1]]
    assert Known(("a",), 1).evidence([0], ["x"]) is None


def test_levels_of_set_nll_cover_as_they_say():
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        values = torch.from_numpy(generator.gamma(2.0, size=220))
        levels = nll_levels(values[:200])
        assert len(levels) == 99
        covered.append([(values[200:] <= levels[p - 1]).float().mean() for p in (50, 90, 95)])
    assert np.mean(covered, axis=0) == pytest.approx([0.5, 0.9, 0.95], abs=0.02)
    assert len(nll_levels(torch.arange(9.0))) == 90  # nine values say nothing of the last tenth
    assert nll_levels(torch.zeros(0)) == ()


def test_calibration_with_a_label_revealed():
    model = feature_model()
    with torch.no_grad():
        model.head.label_classifier.weight.mul_(-1)  # the chain term's own scores mislead
        inference = model.infer(features())
        targets = torch.rand(300, L, generator=torch.Generator().manual_seed(2))
        targets = targets < inference.marginals
    model.head.clear_cache()
    found = calibrate_known(model.head, features(), targets, model.search, Calibration())
    assert found.known_mix_weight < 1
    nll = set_nll(model.head, features(), targets, "increasing")
    assert sum(nll <= found.set_nll[89]) / 300 == pytest.approx(0.9, abs=0.02)
    free = calibrate_known(
        model.head, features(), targets, replace(model.search, order="free"), Calibration()
    )
    assert free.set_nll == ()


def calibrated_model():
    model = feature_model()
    inference = model.infer(features(1000))
    draws = model.head.sample(model.head.embed(features(1000)), 1, max_labels=L).sets[:, 0]
    model.calibration = calibrate_known(
        model.head, features(1000)[:500], draws[:500], model.search, Calibration()
    )
    assert len(inference.sets) == 1000
    return model, features(1000)[500:], draws[500:]


def test_candidates_cover_as_they_promise():
    # Sets drawn from the model itself are as improbable on new images as on validation images.
    model, unseen, truth = calibrated_model()
    for coverage in (0.5, 0.9, 0.95):
        held = []
        for prediction, true in zip(model.predict_features(unseen), truth, strict=True):
            found = prediction.candidates(coverage, limit=2**L)
            assert found.complete
            assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
            names = frozenset(NAMES[i] for i in true.nonzero()[:, 0].tolist())
            held.append(any(names == labels for labels, _ in found))
        assert np.mean(held) == pytest.approx(coverage, abs=0.06)


def test_candidates_up_to_a_limit():
    model, unseen, _ = calibrated_model()
    for prediction in model.predict_features(unseen[:20]):
        everything = prediction.candidates(0.95, limit=2**L)
        few = prediction.candidates(0.95, limit=2)
        assert list(few) == list(everything)[:2]
        assert few.complete == (len(everything) <= 2)
        given = model.predict_features(unseen[:1], known=[NAMES[3]])[0].candidates(0.95, 2**L)
        assert all(NAMES[3] in labels for labels, _ in given)


def test_candidates_that_cannot_be_promised():
    model, unseen, _ = calibrated_model()
    prediction = model.predict_features(unseen[:1])[0]
    for coverage in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="coverage must be above 0 and below 1, got"):
            prediction.candidates(coverage)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        prediction.candidates(limit=0)
    model.calibration = replace(model.calibration, set_nll=model.calibration.set_nll[:80])
    with pytest.raises(ValueError, match="coverage must be at most 0.8 for what was calibrated on"):
        model.predict_features(unseen[:1])[0].candidates(0.9)
    with pytest.raises(ValueError, match="candidates need a single model of order increasing"):
        feature_model().predict_features(unseen[:1])[0].candidates()


def test_an_exact_search_of_a_model():
    model = feature_model()
    beam = model.predict_features(features(30))
    model.search = replace(model.search, algorithm="exact")
    for mine, theirs in zip(model.predict_features(features(30)), beam, strict=True):
        assert mine.log_prob >= theirs.log_prob - 1e-5
        assert mine.scores == pytest.approx(theirs.scores)


def test_an_exact_search_that_ends_early_falls_back_on_a_beam():
    model = feature_model()
    model.search = replace(model.search, algorithm="exact", max_expansions=1)
    beam = replace(model.search, algorithm="beam")
    found = model.infer(features(30), replace(model.search, min_labels=2))
    expected = model.infer(features(30), replace(beam, min_labels=2))
    assert not found.found_none().any()
    assert torch.equal(found.sets, expected.sets)
    assert not any(result.certified.all() for result in found.search)


def test_no_set_fits_any_image_of_an_ensemble():
    ensemble = Ensemble([feature_model(0), feature_model(1)]).eval()
    found = ensemble.predict_features(features(3), absent=list(NAMES), min_labels=1)
    assert [p.labels for p in found] == [[], [], []]
    for wrong in (torch.zeros(3, L + 2, dtype=torch.int8), torch.zeros(L, dtype=torch.int8)):
        with pytest.raises(ValueError, match="evidence must be"):
            ensemble.infer(features(3), evidence=wrong)


def test_top_k_counts_known_labels_beside_others_as_certain():
    model = feature_model()
    with torch.no_grad():
        model.head.label_classifier.bias.copy_(torch.tensor([60.0, 60, -60, -60, -60, -60]))
        model.head.label_embedding.zero_()
        model.head.score_bias.zero_()
    for k in (1, 2, 3):
        found = model.predict_features(features(1), known=[NAMES[3]], top_k=k)[0]
        assert NAMES[3] in found.labels and len(found.labels) == min(k, 3)
    both = model.predict_features(features(1), known=[NAMES[3], NAMES[4]], top_k=1)[0]
    assert both.labels == [NAMES[3], NAMES[4]]


def test_values_that_are_not_finite_name_their_image():
    model = feature_model()
    vectors = features(6)
    vectors[4, 0] = math.nan
    with pytest.raises(ValueError, match="index 4"):
        model.predict_features(vectors, known=[[], [NAMES[1]], [], [], [], [NAMES[2]]])
    with pytest.raises(TypeError, match="known must hold lists of label names, got None among"):
        model.predict_features(features(2), known=[[NAMES[1]], None])
    with pytest.raises(ValueError, match="known must hold labels of the model, got 'yeti'"):
        model.predict_features(features(0), known=["yeti"])


def test_the_chain_term_is_told_which_labels_are_present(tmp_path):
    model = feature_model()
    x = features(40)
    targets = torch.rand(500, L, generator=torch.Generator().manual_seed(5)) < 0.3
    targets[:, 1] |= targets[:, 0]  # label 1 is wherever label 0 is
    evidence = torch.zeros(40, L, dtype=torch.int8)
    evidence[:20, 0] = 1
    evidence[20:, 0] = -1
    before = model.infer(x, None, evidence).label_scores
    assert model.head.cooccurrence is None
    model.head.count_cooccurrence(targets)
    told = model.infer(x, None, evidence).label_scores
    has = targets.double()
    both, count = (has.T @ has)[0], has.sum(0)[0]
    share = (has.sum(0) + 0.5) / 501
    expected = ((both + share) / (count + 1)).clamp(max=1 - 1e-12).logit() - share.logit()
    torch.testing.assert_close(told[:20] - before[:20], expected.float().expand(20, -1))
    assert expected[1] > 1 and torch.equal(told[20:], before[20:])
    assert torch.equal(model.infer(x).label_scores, model.infer(x, None, evidence * 0).label_scores)

    model.save(tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    assert torch.equal(loaded.head.cooccurrence, model.head.cooccurrence)
    assert torch.equal(loaded.infer(x, None, evidence).label_scores, told)


def test_pairs_of_too_many_labels_are_not_counted():
    head = Head(MOST_COUNTED_LABELS + 1, 2, 2, 2, chain_term=True)
    head.count_cooccurrence(torch.zeros(1, head.num_labels, dtype=torch.bool))
    assert head.cooccurrence is None


def test_heads_with_and_without_counts_take_each_others_weights():
    counted, plain = (Head(5, 2, 2, 2, chain_term=True) for _ in range(2))
    counted.count_cooccurrence(torch.rand(20_000, 5) < 0.4)
    other = Head(5, 2, 2, 2, chain_term=True)
    other.load_state_dict(counted.state_dict())
    assert torch.equal(other.cooccurrence, counted.cooccurrence)
    other.load_state_dict(plain.state_dict())
    assert other.cooccurrence is None
