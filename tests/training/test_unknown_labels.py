"""Labels that are unknown: what losses, draws and choices on validation data make of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrnn.search.inference
import cnnrnn.training.completion
from cnnrnn import TrainConfig
from cnnrnn.comparison import compare
from cnnrnn.config import Calibration, CompareConfig
from cnnrnn.data import DataError
from cnnrnn.data.dataset import csr
from cnnrnn.data.load import load_dataset
from cnnrnn.data.splits import training_splits
from cnnrnn.labels import as_evidence
from cnnrnn.metrics import best_threshold
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.head import Head
from cnnrnn.network.losses import binary_cross_entropy
from cnnrnn.prediction import decisions
from cnnrnn.prediction.decisions import calibrate, calibrate_known, decision_metrics
from cnnrnn.reveal import reveal
from cnnrnn.search.inference import Inference, infer, set_nll
from cnnrnn.training import recipe, run, start
from cnnrnn.training.batches import Split
from cnnrnn.training.completion import completed
from cnnrnn.training.ensemble import train_ensemble
from cnnrnn.training.recipe import label_shares
from cnnrnn.training.resume import STATE_FILE, data_digest
from cnnrnn.training.run import train
from cnnrnn.training.start import _most_labels
from tests.training.hidden import hide
from tests.training.test_resume import Stop, same, stop_after
from tests.training.test_training import MODEL, QUICK, SEARCH, records, separable

L = 5


def trained_looking_head(chain_term=True):
    torch.manual_seed(0)
    head = Head(L, 4, joint_dim=6, hidden_dim=6, chain_term=chain_term)
    head.max_labels = L
    return head.eval()


def all_sets():
    return torch.tensor(list(itertools.product([False, True], repeat=L)))


def posterior(head, image, target, unknown):
    """Return all sets that agree with what is known [m, L], and P(set | image) of each."""
    sets = all_sets()
    sets = sets[((sets == target) | unknown).all(1)]
    return sets, (-set_nll(head, image.expand(len(sets), -1), sets, "increasing")).exp()


def partly_known(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=generator) * 2
    unknown = torch.rand(count, L, generator=generator) < 0.5
    targets = (torch.rand(count, L, generator=generator) < 0.5) & ~unknown
    return features, targets, unknown


def test_evidence_of_label_sets():
    targets, unknown = torch.tensor([[1, 0, 0]]) > 0, torch.tensor([[0, 0, 1]]) > 0
    assert as_evidence(targets, unknown).tolist() == [[1, -1, 0]]
    assert as_evidence(targets, unknown).dtype == torch.int8


def test_unknown_labels_are_no_terms_of_the_independent_loss():
    scores = torch.randn(4, L, generator=torch.Generator().manual_seed(0), requires_grad=True)
    _, targets, unknown = partly_known(count=4)
    losses = binary_cross_entropy(scores, targets, unknown)
    p = scores.sigmoid()
    terms = -torch.where(targets, p, 1 - p).log() * ~unknown
    torch.testing.assert_close(losses, terms.sum(1))
    losses.sum().backward()
    assert (scores.grad[unknown] == 0).all() and (scores.grad[~unknown] != 0).all()


def test_shares_are_of_the_images_that_are_known():
    targets = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 1]]) > 0
    unknown = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 0]]) > 0
    assert label_shares(targets, unknown).tolist() == pytest.approx([2.5 / 5, 1.5 / 2])
    assert label_shares(targets).tolist() == pytest.approx([2.5 / 5, 1.5 / 5])


@pytest.mark.parametrize("chain_term", [False, True])
def test_the_likelihood_is_of_what_is_known(chain_term, monkeypatch):
    monkeypatch.setattr(cnnrnn.search.inference, "NLL_DRAWS", 20_000)
    head = trained_looking_head(chain_term)
    features, targets, unknown = partly_known()
    unknown[0], targets[0] = False, torch.tensor([1, 0, 0, 1, 1]) > 0  # all of one image is known
    found = set_nll(head, features, targets, "increasing", unknown)
    for image in range(len(features)):
        _, probabilities = posterior(head, features[image], targets[image], unknown[image])
        assert float(found[image]) == pytest.approx(-math.log(probabilities.sum()), abs=0.05)
    whole = set_nll(head, features, targets, "increasing")
    assert found[0] == whole[0] and (found[unknown.any(1)] < whole[unknown.any(1)]).all()


@pytest.mark.parametrize("chain_term", [False, True])
def test_completions_are_as_probable_as_the_model_holds_them(chain_term, monkeypatch):
    for name in ("DRAWS", "DRAWS_WITHOUT_CHAIN_TERM"):
        monkeypatch.setattr(cnnrnn.training.completion, name, 256)
    head = trained_looking_head(chain_term).train()
    features, targets, unknown = partly_known(count=2)
    unknown[1], targets[1] = torch.tensor([0, 1, 0, 1, 0]) > 0, torch.tensor([0, 0, 1, 0, 0]) > 0
    torch.manual_seed(1)
    rows = torch.arange(2).repeat_interleave(3000)
    drawn = completed(head, features[rows], targets[rows], unknown[rows], "increasing")
    assert head.training
    for image in range(2):
        found = drawn[rows == image]
        sets, probabilities = posterior(
            head.eval(), features[image], targets[image], unknown[image]
        )
        shares = (found[:, None] == sets).all(2).double().mean(0)
        assert shares.sum() == 1  # every one agrees with what is known
        torch.testing.assert_close(shares, probabilities / probabilities.sum(), atol=0.04, rtol=0)


def test_completions_leave_what_is_known_and_follow_the_seed():
    head = trained_looking_head().train()
    features, targets, unknown = partly_known(count=50)
    assert completed(head, features, targets, unknown & False, "increasing") is targets
    for order in ("increasing", "unique", "free"):
        torch.manual_seed(3)
        drawn = completed(head, features, targets, unknown, order)
        assert torch.equal(drawn & ~unknown, targets) and (drawn & unknown).any()
        torch.manual_seed(3)
        assert torch.equal(completed(head, features, targets, unknown, order), drawn)
        assert not torch.equal(completed(head, features, targets, unknown, order), drawn)


def test_where_nothing_fits_unknown_labels_are_left_out():
    head = trained_looking_head(chain_term=False)
    with torch.no_grad():
        head.score_bias[:L] = -torch.inf  # END alone is possible, and label 0 is known to be there
    targets, unknown = torch.eye(L)[:1] > 0, torch.tensor([[0, 1, 1, 1, 1]]) > 0
    drawn = completed(head, torch.zeros(1, 4), targets, unknown, "increasing")
    assert drawn.tolist() == targets.tolist()


def test_thresholds_and_weights_are_not_chosen_by_unknown_labels():
    head = trained_looking_head()
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(400, 4, generator=generator) * 2
    whole = head.sample(head.embed(features), 1, seed=1).sets[:, 0]
    unknown = torch.rand(whole.shape, generator=generator) < 0.4
    targets = whole & ~unknown
    inference = infer(head, features, replace(SEARCH, beam_size=8))
    taken, told = calibrate(inference, targets), calibrate(inference, targets, unknown=unknown)
    true = calibrate(inference, whole)
    assert taken.threshold > told.threshold and taken.k <= told.k == true.k
    assert told.threshold == pytest.approx(true.threshold, abs=0.1)
    scores = inference.mixed(told)
    assert told.threshold == best_threshold(scores, targets, "O-F1", told.min_labels, unknown)[0]
    known = calibrate_known(head, features, targets, SEARCH, Calibration(), unknown=unknown)
    fully = ~unknown.any(1)
    assert 0 < fully.sum() < 100  # levels of candidates come from images that are known whole
    levels = set_nll(head, features[fully], targets[fully], "increasing").sort().values
    assert known.set_nll[-1] == float(levels[len(known.set_nll) * (len(levels) + 1) // 100])


@pytest.fixture
def data(tmp_path):
    return separable(tmp_path / "data.npz", count=400)


@pytest.mark.parametrize(
    "options, search",
    [({}, {}), ({"loss": "pla"}, {"order": "unique"}), ({"label_order": "easiest"}, {})],
)
def test_half_of_the_labels_are_enough_where_they_are_known_to_be_missing(
    data, tmp_path, options, search
):
    exact = {}
    for taken_as in ("absent", "unknown"):
        hidden = hide(data, 0.5, taken_as, seed=7)
        result = train(hidden, tmp_path / taken_as, MODEL, replace(SEARCH, **search),
                       replace(QUICK, epochs=8, **options))  # fmt: skip
        model, test = result.model, data.split("test")
        targets = model.label_space.from_source(test.label_matrix(), test.label_names)
        found = model.infer(torch.from_numpy(test.features))
        metrics = decision_metrics(found, targets, model.calibration)
        exact[taken_as] = metrics["path"]["exact-match"]
    assert exact["unknown"] > 0.85 > exact["absent"] + 0.3
    assert result.metrics["path"]["labels-unknown"] > 0  # validation leaves them out too
    facts = records(tmp_path / "unknown")[0]
    assert facts["unknown"].endswith(" %") and 45 < float(facts["unknown"][:-2]) < 55
    assert "unknown" not in records(tmp_path / "absent")[0]


def test_a_path_can_be_as_long_as_is_expected(data, tmp_path):
    training = data.split("train")
    present = training.label_matrix()
    unknown = torch.zeros_like(present)
    unknown[:, :3] = torch.arange(len(present))[:, None] % 2 == 0  # half of them, in pairs
    present &= ~unknown
    shares = (present[1::2, :3].sum(0) + 0.5) / (len(present) // 2 + 1)
    most = max(int(present[1::2].sum(1).max()),
               round(float((present[::2].sum(1) + shares.sum()).max())))  # fmt: skip
    split = Split(training, present, torch.from_numpy(training.features), unknown=unknown)
    assert _most_labels(split) == most > int(present[::2].sum(1).max())
    assert _most_labels(replace(split, unknown=None)) == int(present.sum(1).max())


def test_nothing_is_chosen_by_an_unknown_label(data, tmp_path, monkeypatch):
    """Every loss, start, count, validation, calibration and measure of a training is told."""
    told = []

    def spy(place, name, find):
        original = getattr(place, name)

        def spied(*args, **kwargs):
            unknown = kwargs.get("unknown", find(args))
            assert unknown is not None and 0.2 < float(unknown.double().mean()) < 0.7, name
            told.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, spied)

    def last(args):
        return args[-1] if isinstance(args[-1], torch.Tensor) else None

    spy(recipe, "binary_cross_entropy", last)
    spy(recipe, "independent_validation", last)
    spy(recipe, "path_validation", last)
    spy(recipe, "completed", lambda args: args[3])
    spy(start, "start_at_frequencies", last)
    spy(run, "calibrate", last)
    spy(run, "calibrate_known", last)
    spy(run, "decision_metrics", last)
    spy(Head, "count_cooccurrence", last)
    spy(CNNRNN, "set_nll", last)
    spy(decisions, "metrics_of_others", last)
    spy(decisions, "mean_average_precision", last)
    spy(decisions, "best_threshold", last)
    train(hide(data, 0.5, "unknown", seed=7), tmp_path / "run", MODEL, SEARCH, QUICK)
    assert set(told) == {
        "binary_cross_entropy", "independent_validation", "path_validation", "completed",
        "start_at_frequencies", "calibrate", "calibrate_known", "decision_metrics",
        "count_cooccurrence", "set_nll", "metrics_of_others", "mean_average_precision",
        "best_threshold",
    }  # fmt: skip
    warm = told[: told.index("independent_validation")]
    assert "binary_cross_entropy" in warm and "completed" not in warm


def test_scores_of_unknown_labels_change_no_threshold():
    generator = torch.Generator().manual_seed(3)
    targets = torch.rand(300, L, generator=generator) < 0.3
    unknown = torch.rand(300, L, generator=generator) < 0.4
    targets &= ~unknown
    scores = (targets * 0.3 + torch.rand(300, L, generator=generator)) / 1.3

    def calibrated(of_unknown):
        marginals = torch.where(unknown, of_unknown, scores)
        found = calibrate(Inference(targets, marginals, None, ()), targets, unknown=unknown)
        return found.threshold, found.label_thresholds, found.min_labels, found.uncalibrated

    assert calibrated(torch.zeros(300, L)) == calibrated(torch.rand(300, L, generator=generator))


def test_known_labels_are_calibrated_without_what_is_unknown(monkeypatch):
    head = trained_looking_head()
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(5)) * 2
    whole = head.sample(head.embed(features), 1, seed=1).sets[:, 0]
    unknown = torch.rand(whole.shape, generator=torch.Generator().manual_seed(6)) < 0.4
    given = []
    monkeypatch.setattr(decisions, "infer", lambda *args: given.append(args[3]) or infer(*args))
    calibrate_known(head, features, whole & ~unknown, SEARCH, Calibration(), unknown=unknown)
    rows = reveal(whole & ~unknown, 1, 0).images
    absent = [evidence == -1 for evidence in given]
    assert absent[1].any() and not any((part & unknown[rows]).any() for part in absent)


def test_members_of_an_ensemble_are_calibrated_without_what_is_unknown(data, tmp_path, monkeypatch):
    given = []
    original = Ensemble.calibrate
    monkeypatch.setattr(
        Ensemble, "calibrate", lambda self, *args: given.append(args[3]) or original(self, *args)
    )
    hidden = hide(data, 0.5, "unknown", seed=7)
    train_ensemble(hidden, tmp_path / "run", MODEL, SEARCH, replace(QUICK, epochs=1),
                   ["frequency", "rare"])  # fmt: skip
    val = hidden.split("val")
    assert len(given) == 1 and int(given[0].sum()) == int(val.unknown_matrix().sum())


def test_a_comparison_trains_on_what_is_known(data, tmp_path):
    compared = CompareConfig(seeds=(0,), methods=("cnn-rnn", "bce"), settings=1)
    exact = {}
    for taken_as in ("absent", "unknown"):
        hidden = hide(data, 0.5, taken_as, seed=7)
        rows = compare(hidden, tmp_path / taken_as, MODEL, SEARCH, QUICK, compared)
        exact[taken_as] = {row.title: row.own["O-F1"] for row in rows}
    for title, value in exact["unknown"].items():
        assert value > exact["absent"][title], title


def test_data_that_says_nothing_is_absent_is_refused(data, tmp_path):
    present = data.label_matrix()
    positive = as_unknown(data, ~present)
    with pytest.raises(DataError, match="no training image that is known to lack a label; write 0"):
        train(positive, tmp_path / "run", MODEL, SEARCH, QUICK)
    one = torch.zeros_like(present)
    one[:, 2] = ~present[:, 2]
    with pytest.warns(UserWarning, match="known to lack cat: nothing says when such a label"):
        train(as_unknown(data, one), tmp_path / "one", MODEL, SEARCH, replace(QUICK, epochs=1))
    val = torch.zeros_like(present)
    val[data.splits["val"]] = True
    with pytest.raises(DataError, match="no validation image of which a label is known"):
        train(as_unknown(data, val), tmp_path / "val", MODEL, SEARCH, QUICK)
    val[data.splits["val"][0]] = False  # one image is enough, though its fold alone has any
    train(as_unknown(data, val), tmp_path / "fold", MODEL, SEARCH, replace(QUICK, epochs=1))


def as_unknown(dataset, unknown):
    """Return a dataset of which these labels are unknown."""
    present = (dataset.label_matrix() & ~unknown).numpy()
    (indptr, indices), (unknown_indptr, unknown_indices) = (
        csr(np.flatnonzero(row).tolist() for row in matrix) for matrix in (present, unknown.numpy())
    )
    changes = {"label_indptr": indptr, "label_indices": indices}
    changes |= {"unknown_indptr": unknown_indptr, "unknown_indices": unknown_indices}
    return dataset.with_changes(**changes)


def test_a_run_without_unknown_labels_is_the_same_run_as_ever(data):
    none = np.zeros(len(data) + 1, np.int64), np.zeros(0, np.int32)
    empty = data.with_changes(unknown_indptr=none[0], unknown_indices=none[1])
    assert data_digest(empty) == data_digest(data)
    assert data_digest(hide(data, 0.1, "unknown", seed=7)) != data_digest(data)


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_completions_may_be_longer_than_any_path_so_far(longest, monkeypatch):
    """A path that is cut off says nothing of END: neither draws nor likelihood end it early."""
    monkeypatch.setattr(cnnrnn.training.completion, "DRAWS", 256)
    monkeypatch.setattr(cnnrnn.search.inference, "NLL_DRAWS", 20_000)
    head = trained_looking_head()
    features = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)) * 2
    targets, unknown = torch.eye(L)[2:3] > 0, torch.tensor([[1, 0, 0, 0, 1]]) > 0
    sets, probabilities = posterior(head, features[0], targets[0], unknown[0])
    head.max_labels = longest
    torch.manual_seed(1)
    rows = torch.zeros(3000, dtype=torch.int64)
    drawn = completed(head, features[rows], targets[rows], unknown[rows], "increasing")
    shares = (drawn[:, None] == sets).all(2).double().mean(0)
    torch.testing.assert_close(shares, probabilities / probabilities.sum(), atol=0.04, rtol=0)
    nll = set_nll(head, features, targets, "increasing", unknown)
    assert float(nll) == pytest.approx(-math.log(probabilities.sum()), abs=0.05)


def test_weights_of_draws_are_as_fine_in_lower_precision():
    head = trained_looking_head()
    features, targets, unknown = partly_known()
    with torch.autocast("cpu", torch.bfloat16):
        found = head.sample(head.embed(features), 50, as_evidence(targets, unknown))
    assert found.log_weights.dtype == torch.float32


def test_what_is_unknown_is_checked():
    targets, unknown = torch.eye(3) > 0, torch.eye(3) > 0
    with pytest.raises(ValueError, match="must not be true and unknown, got label 0 in row 0"):
        as_evidence(targets, unknown)
    with pytest.raises(ValueError, match=r"unknown must be \[n, L\] bool like targets \[3, 3\]"):
        as_evidence(targets, unknown[:2])


def test_a_run_with_unknown_labels_resumes_bit_identically(data, tmp_path):
    hidden = hide(data, 0.3, "unknown", seed=7)
    config = replace(QUICK, epochs=4, label_order="easiest", reorder_epochs=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(hidden, whole, MODEL, SEARCH, config)
    for epoch in (3, 1):
        with pytest.raises(Stop):
            train(hidden, killed, MODEL, SEARCH, config, resume=epoch == 1, say=stop_after(epoch))
    assert (killed / STATE_FILE).exists()
    train(hidden, killed, MODEL, SEARCH, config, resume=True)
    same(whole, killed)


def test_other_unknown_labels_are_another_run(data, tmp_path):
    config = replace(QUICK, epochs=1)
    train(hide(data, 0.3, "unknown", seed=7), tmp_path / "run", MODEL, SEARCH, config)
    with pytest.raises(ValueError, match="can resume only as it was started: training data"):
        train(data, tmp_path / "run", MODEL, SEARCH, config, resume=True)


def test_images_that_may_have_labels_are_not_dropped(data):
    hidden = hide(data, 0.5, "unknown", seed=7)
    part = training_splits(hidden, TrainConfig(empty="drop"))[0]
    assert (part.label_matrix() | part.unknown_matrix()).any(1).all()
    assert not part.label_matrix().any(1).all()
    absent = training_splits(hide(data, 0.5, "absent", seed=7), TrainConfig(empty="drop"))[0]
    assert absent.label_matrix().any(1).all() and len(absent) < len(part)


def test_blank_cells_of_a_table_are_unknown_to_training(tmp_path):
    random = np.random.default_rng(0)
    features = random.standard_normal((60, 2))
    cells = np.where(features > 0, "1", "0").astype("<U2")
    cells[random.random(cells.shape) < 0.3] = "-1"
    lines = ["image,ant,bee"]
    for row, (ant, bee) in enumerate(cells):
        shade = tuple(int(128 + 60 * value) for value in features[row].clip(-2, 2))
        Image.new("RGB", (16, 16), (*shade, 0)).save(tmp_path / f"{row}.png")
        lines.append(f"{row}.png,{ant},{bee}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    dataset = load_dataset(f"csv:{tmp_path / 'labels.csv'}")
    assert 20 < len(dataset.unknown_indices) < 60
    small = replace(MODEL, backbone="small", pretrained=False, image_size=16, freeze_backbone=False)
    train(dataset, tmp_path / "run", small, SEARCH, replace(QUICK, warm_epochs=1, epochs=1))
    assert records(tmp_path / "run")[0]["unknown"].endswith(" %")
