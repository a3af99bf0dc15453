"""The comparison: every method on the same data, each tuned on validation data alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cnnrnn import comparison
from cnnrnn.cli import main
from cnnrnn.comparison import (
    COLUMNS,
    METHODS,
    Row,
    chosen_methods,
    compare,
    compared_splits,
    frozen_features,
)
from cnnrnn.comparison.fitting import Fitted, Scored
from cnnrnn.comparison.results import Results, table_cells
from cnnrnn.comparison.run import _judge, _test_nll, ensemble_seeds
from cnnrnn.config import CompareConfig, ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import DataError, Dataset, load_dataset
from cnnrnn.metrics import best_threshold, multilabel_metrics
from cnnrnn.model.ensemble import mixture_log_probs
from cnnrnn.reveal import reveal
from cnnrnn.training.loop import NonFiniteLossError

HEAD = ModelConfig(trunk_dim=0, hidden_dim=16, joint_dim=16, input_dropout=0.0, joint_dropout=0.0)
SEARCH = SearchConfig(beam_size=4)
QUICK = TrainConfig(device="cpu", epochs=25, finish_epochs=15, batch_size=32,
                    learning_rate=1e-2)  # fmt: skip
HASTY = replace(QUICK, epochs=1, finish_epochs=0)


SET_PROBABILITIES = {"cnn-rnn", "cnn-rnn-plain", "no-rnn", "bce", "bce-linear", "pcc", "chains",
                     "cooccurrence", "ensemble-bce", "ensemble-cnn-rnn"}  # fmt: skip
KNOW_LABELS = {"cnn-rnn", "cnn-rnn-plain", "no-rnn", "pcc", "cooccurrence", "dependency-network",
               "crf", "combinations", "completion", "ensemble-cnn-rnn"}  # fmt: skip


def write_separable(file, splits=(("train", 400), ("val", 100), ("test", 100))):
    """Each label is the sign of one feature; the third goes with the first, the last is never."""
    rng = np.random.default_rng(0)
    split = np.concatenate([np.full(count, name) for name, count in splits])
    features = rng.normal(size=(len(split), 6)).astype(np.float32)
    features += np.sign(features) * 0.5
    labels = np.concatenate([features[:, :4] > 0, np.zeros((len(split), 1), bool)], axis=1)
    labels[:, 2] = labels[:, 0]
    np.savez(file, features=features, labels=labels, label_names=list("abcde"), split=split)
    return file


@pytest.fixture
def separable(tmp_path) -> Dataset:
    return load_dataset(f"features:{write_separable(tmp_path / 'features.npz')}")


def test_every_method_learns_a_separable_problem(separable, tmp_path):
    lines = []
    methods = ("cnn-rnn", "bce", "softmax", "pcc", "svm", "ensemble-bce")
    rows = compare(
        separable, tmp_path / "out", HEAD, SEARCH, QUICK,
        CompareConfig(seeds=(0,), methods=methods, settings=1, members=2), say=lines.append,
    )  # fmt: skip
    assert [row.title for row in rows] == [
        title for name in methods for title in METHODS[name].rows
    ]
    assert len(lines) == 6
    by_title = {row.title: row for row in rows}
    assert by_title["CNN-RNN, best path"].own["O-F1"] > 0.97
    assert by_title["CNN-RNN, best path"].own["exact-match"] > 0.9
    assert by_title["probabilistic chain, best set"].own["exact-match"] > 0.9
    for title in ("CNN-RNN, thresholded", "binary cross-entropy", "linear SVM",
                  "probabilistic chain, thresholded"):  # fmt: skip
        assert by_title[title].own["O-F1"] > 0.95
    assert by_title["softmax"].own["O-F1"] < by_title["binary cross-entropy"].own["O-F1"]
    assert by_title["binary cross-entropy"].setting == {"learning_rate": 1e-2}


def test_the_whole_table_once(separable, tmp_path):
    """Every method, with a hidden layer and a label that no image has."""
    model_config = replace(HEAD, trunk_dim=8)
    config = CompareConfig(seeds=(3, 1), settings=2, members=2)
    rows = compare(separable, tmp_path, model_config, SEARCH, HASTY, config)
    titles = [title for method in METHODS.values() for title in method.rows]
    assert list(dict.fromkeys(row.title for row in rows)) == titles
    for method in METHODS.values():
        seeds = [row.seed for row in rows if row.title == method.rows[0]]
        assert seeds == ([3, 1] if method.seeded and method.base is None else [3])
    for row in rows:
        path = row.title.endswith(("best path", "best set"))
        measures = dict(zip(COLUMNS, row.figures(), strict=True))
        probable = row.method in SET_PROBABILITIES
        assert 0 < measures.pop("NLL") < math.inf if probable else math.isnan(measures.pop("NLL"))
        assert math.isnan(measures["AP, 1 known"]) == (row.method not in KNOW_LABELS)
        assert not math.isnan(measures["AP, none known"])
        assert all(0 <= f <= 1 or math.isnan(f) for f in measures.values())
        assert math.isnan(row.own_c_f1) == math.isnan(row.own_exact) == path
        decisions = [["path"]] if path else [["k"], ["threshold", "min_labels"]]
        assert list(row.decision) in decisions
        assert row.own["images"] == 100 and row.at_3["mean-labels-predicted"] <= 3
    markdown = (tmp_path / "table.md").read_text().splitlines()
    assert len(markdown) == len(titles) + 2
    assert markdown[0].split("|")[2:-1] == [f" {name} " for name in COLUMNS]
    stored = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {(r["method"], r["seed"]) for r in stored} == {(r.method, r.seed) for r in rows}
    # The second seed keeps the setting that the first one chose.
    for name in ("bce", "cnn-rnn"):
        chosen = {tuple(row.setting.items()) for row in rows if row.method == name}
        assert len(chosen) == 1


def test_the_setting_with_the_best_validation_figures_is_kept(separable, tmp_path):
    config = CompareConfig(seeds=(0, 1), methods=("bce",), settings=2)
    slow = replace(QUICK, warm_epochs=3, epochs=0, learning_rate=1e-3)  # 3e-3 gets further
    rows = compare(separable, tmp_path, HEAD, SEARCH, slow, config)
    assert [row.setting for row in rows] == [{"learning_rate": 3e-3}] * 2
    trained = {folder.name for folder in (tmp_path / "weights").iterdir()}
    assert trained == {"bce-seed-0-0.001", "bce-seed-0-0.003", "bce-seed-1-0.003"}
    each = replace(config, tune_each_seed=True)
    compare(separable, tmp_path / "each", HEAD, SEARCH, slow, each)
    assert len(list((tmp_path / "each" / "weights").iterdir())) == 4


def test_k_and_threshold_are_chosen_on_validation_data(tmp_path):
    """One label in every training and validation image, three in every test image."""
    rng = np.random.default_rng(1)
    one = np.eye(4, dtype=bool)[rng.integers(4, size=300)]
    labels = np.concatenate([one, ~np.eye(4, dtype=bool)[rng.integers(4, size=60)]])
    features = np.where(labels, 1.0, -1.0) + 0.1 * rng.normal(size=labels.shape)
    split = np.array(["train"] * 200 + ["val"] * 100 + ["test"] * 60)
    file = tmp_path / "features.npz"
    np.savez(file, features=features.astype(np.float32), labels=labels,
             label_names=list("abcd"), split=split)  # fmt: skip
    (softmax,) = compare(
        load_dataset(f"features:{file}"), tmp_path / "out", HEAD, SEARCH, QUICK,
        CompareConfig(seeds=(0,), methods=("softmax",), settings=1),
    )  # fmt: skip
    assert softmax.decision == {"k": 1}
    assert softmax.own["mean-labels-predicted"] == 1.0
    assert softmax.at_3["mean-labels-predicted"] == 3.0


def test_a_second_call_goes_on_where_the_first_stopped(separable, tmp_path, monkeypatch):
    config = CompareConfig(seeds=(0,), methods=("bce", "knn"), settings=1)
    said = []

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "knn", replace(METHODS["knn"], fit=stopped))
    with pytest.raises(KeyboardInterrupt):
        compare(separable, tmp_path, HEAD, SEARCH, HASTY, config, say=said.append)
    assert len(said) == 1 and not (tmp_path / "table.md").exists()
    monkeypatch.undo()
    rows = compare(separable, tmp_path, HEAD, SEARCH, HASTY, config, say=said.append)
    assert len(said) == 2 and said[1].startswith("seed 0, knn")
    again = compare(separable, tmp_path, HEAD, SEARCH, HASTY, config, say=said.append)
    assert len(said) == 2 and again == rows
    # More seeds and methods belong to the same results.
    more = replace(config, seeds=(0, 1), methods=("bce", "knn", "warp"))
    compare(separable, tmp_path, HEAD, SEARCH, replace(HASTY, workers=1), more, say=said.append)
    assert len(said) == 5
    assert [file.name for file in tmp_path.glob(".*")] == [".lock"]


def test_the_nll_of_an_ensemble_is_that_of_the_mixture(separable, tmp_path):
    methods = ("cnn-rnn", "bce", "ensemble-bce", "ensemble-cnn-rnn")
    config = CompareConfig(seeds=(0, 1), methods=methods, settings=1, members=2)
    rows = compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)
    nll = {(row.method, row.seed): row.nll for row in rows}
    for base in ("bce", "cnn-rnn"):
        members = nll[base, 0], nll[base, 1]
        assert nll[f"ensemble-{base}", 0] < sum(members) / 2  # by Jensen's inequality
        assert nll[f"ensemble-{base}", 0] > sum(members) / 2 - math.log(2)
    assert not any(row.nll_is_bound for row in rows)
    log_probs = [torch.tensor([0.5, 0.2]).double().log(), torch.tensor([0.1, 0.4]).double().log()]
    torch.testing.assert_close(
        mixture_log_probs(log_probs).exp(), torch.tensor([0.3, 0.3]).double()
    )


def test_methods_are_told_of_one_label(tmp_path):
    """Labels 0 and 1 go together and so do 2 and 3, by coins that no feature knows."""
    rng = np.random.default_rng(0)
    coins = rng.random((500, 2)) < 0.4
    labels = np.concatenate([coins[:, [0, 0, 1, 1]], rng.random((500, 4)) < 0.3], axis=1)
    file = tmp_path / "features.npz"
    np.savez(file, features=rng.normal(size=(500, 5)).astype(np.float32), labels=labels,
             label_names=list("abcdefgh"),
             split=np.array(["train"] * 300 + ["val"] * 100 + ["test"] * 100))  # fmt: skip
    methods = ("bce", *sorted(KNOW_LABELS - {"cnn-rnn-plain", "no-rnn", "ensemble-cnn-rnn"}))
    config = CompareConfig(seeds=(0,), methods=methods, settings=1)
    rows = compare(load_dataset(f"features:{file}"), tmp_path / "out", HEAD, SEARCH,
                   replace(QUICK, learning_rate=3e-2), config)  # fmt: skip
    targets = torch.from_numpy(labels[400:])
    images, evidence = reveal(targets, 1)
    for row in rows:
        assert row.others["images"] == len(images) and row.others["images-without-others"] == 0
        if row.method == "bce":
            assert row.others_given == {}
        else:
            assert row.others_given["example-AP"] > row.others["example-AP"] + 0.05, row.method
    (independent,) = (row for row in rows if row.method == "bce")
    told = next(row for row in rows if row.method == "cooccurrence")
    assert told.own == independent.own and told.others == independent.others
    again = comparison.read_rows(tmp_path / "out" / "results.json")
    assert [row.others_given for row in again] == [row.others_given for row in rows]


def test_no_image_with_two_labels_leaves_the_columns_empty(tmp_path):
    labels = np.eye(3, dtype=bool)[np.arange(60) % 3]
    file = tmp_path / "features.npz"
    np.savez(file, features=labels.astype(np.float32), labels=labels, label_names=list("abc"),
             split=np.array(["train"] * 30 + ["val"] * 15 + ["test"] * 15))  # fmt: skip
    config = CompareConfig(seeds=(0,), methods=("completion", "cooccurrence"), settings=1)
    rows = compare(load_dataset(f"features:{file}"), tmp_path / "out", HEAD, SEARCH, HASTY, config)
    assert [(row.others, row.others_given) for row in rows] == [({}, {})] * 2
    assert "known" not in comparison.markdown_table(rows)


def test_another_order_gives_a_bound(separable, tmp_path):
    config = CompareConfig(seeds=(0,), methods=("cnn-rnn", "bce"), settings=1)
    rows = compare(separable, tmp_path, HEAD, replace(SEARCH, order="unique"), HASTY, config)
    assert [row.nll_is_bound for row in rows] == [True, True, False]
    assert comparison.markdown_table(rows).count("≤ ") == 2
    assert (
        compare(separable, tmp_path, HEAD, replace(SEARCH, order="unique"), HASTY, config) == rows
    )


def test_images_with_unknown_labels_have_no_true_set():
    unknown = torch.tensor([[False, True], [False, False], [False, False]])
    fitted = Fitted(0.0, lambda split: [], lambda split: torch.tensor([-9.0, -1.0, -2.0]))
    judging = SimpleNamespace(test=SimpleNamespace(unknown=None))
    assert _test_nll(judging, fitted) == 4.0
    judging.test.unknown = unknown
    assert _test_nll(judging, fitted) == 1.5
    assert math.isnan(_test_nll(judging, Fitted(0.0, lambda split: [])))


def test_an_ensemble_of_other_members_is_made_anew(separable, tmp_path):
    config = CompareConfig(seeds=(3, 0), methods=("bce", "ensemble-bce"), settings=1, members=3)
    before = compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)
    assert before[-1].setting == {"member 1": 3, "member 2": 0, "member 3": 4}
    said = []
    after = compare(
        separable, tmp_path, HEAD, SEARCH, HASTY, replace(config, seeds=(3, 0, 1)), say=said.append
    )
    assert after[-1].setting == {"member 1": 3, "member 2": 0, "member 3": 1}
    assert [line.split(":")[0].split(",")[1] for line in said] == [" bce", " ensemble-bce"]
    assert after[-1].own["mAP"] != before[-1].own["mAP"]


def test_a_setting_that_diverges_is_left_out(separable, tmp_path):
    huge = separable.with_changes(features=separable.features * np.float32(1e30))
    config = CompareConfig(seeds=(0,), methods=("squared",), settings=1)
    with pytest.raises(NonFiniteLossError):
        compare(huge, tmp_path / "all", HEAD, SEARCH, replace(HASTY, feature_rms=0.0), config)
    said = []
    fit = METHODS["squared"].fit

    def diverges_at_first(comparison, value, *others):
        if value == HASTY.learning_rate:
            raise NonFiniteLossError("the loss", "first", 1, 0, ["row 3"])
        return fit(comparison, value, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "squared", replace(METHODS["squared"], fit=diverges_at_first))
        (row,) = compare(separable, tmp_path / "one", HEAD, SEARCH, HASTY,
                         replace(config, settings=2), say=said.append)  # fmt: skip
    assert row.setting == {"learning_rate": 3e-2}
    assert "learning_rate 0.01 is left out: the loss is not finite" in said[0]


def test_weights_of_other_options_are_not_taken_for_these(separable, tmp_path):
    config = CompareConfig(seeds=(0,), methods=("bce",), settings=1)
    before = compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)
    (tmp_path / "results.json").unlink()
    after = compare(separable, tmp_path, HEAD, SEARCH, QUICK, config)
    assert after[0].own["mAP"] > before[0].own["mAP"]


def test_other_options_and_other_data_are_named(separable, tmp_path):
    config = CompareConfig(seeds=(0,), methods=("knn",), settings=1)
    compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)
    model = replace(HEAD, hidden_dim=32)
    with pytest.raises(ValueError, match="model.hidden_dim is 16 there and 32 here. Name another"):
        compare(separable, tmp_path, model, SEARCH, HASTY, config)
    with pytest.raises(ValueError, match="settings is 1 there and 2 here; first seed is 0 .* 5"):
        other = replace(config, settings=2, seeds=(5,))
        compare(separable, tmp_path, HEAD, SEARCH, HASTY, other)
    features = separable.features.copy()
    features[-1, -1] += 1
    with pytest.raises(ValueError, match="other options or data: data is '[0-9a-f]+' there"):
        compare(separable.with_changes(features=features), tmp_path, HEAD, SEARCH, HASTY, config)
    (tmp_path / "results.json").write_text('{"options": {}, "results": 3}')
    with pytest.raises(ValueError, match="must hold the results of a comparison, got KeyError"):
        compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)


def test_results_from_before_an_option_existed_go_on_with_its_default(separable, tmp_path):
    config = CompareConfig(seeds=(0,), methods=("knn",), settings=1)
    before = compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    del content["options"]["model.weights"], content["options"]["model.hidden_dim"]
    file.write_text(json.dumps(content))
    default = replace(HEAD, hidden_dim=ModelConfig().hidden_dim)
    assert compare(separable, tmp_path, default, SEARCH, HASTY, config) == before
    with pytest.raises(ValueError, match="model.hidden_dim is 128 there and 16 here"):
        compare(separable, tmp_path, HEAD, SEARCH, HASTY, config)


def test_results_survive_the_file(tmp_path):
    row = made_row("a", 0, 0.25)
    written = Results(tmp_path / "results.json", {"sizes": (1, 2)})
    written.add([row])
    read = Results(tmp_path / "results.json", {"sizes": [1, 2]})
    (again,) = read.rows("a", 0)
    assert math.isnan(again.own_c_f1)
    known = {"own_c_f1": 0.0, "own_exact": 0.0}
    assert replace(again, **known) == replace(row, **known)
    assert ("a", 1) not in read
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_held_out_images_are_the_same_for_all_seeds_and_methods(tmp_path):
    file = write_separable(tmp_path / "f.npz", (("train", 120), ("test", 40)))
    config = CompareConfig(seeds=(0, 1), methods=("knn", "cnn-rnn"), settings=1)
    compare(load_dataset(f"features:{file}"), tmp_path, HEAD, SEARCH, HASTY, config)
    options = json.loads((tmp_path / "results.json").read_text())["options"]
    assert options["images"] == [108, 12, 40]
    with pytest.raises(ValueError, match="data is"):
        again = replace(HASTY, seed=1)  # draws others
        compare(load_dataset(f"features:{file}"), tmp_path, HEAD, SEARCH, again, config)


@pytest.mark.parametrize(
    ("splits", "message"),
    [((("train", 9), ("val", 5)), "must have a test split .*, got train 9, val 5"),
     ((("val", 9), ("test", 5)), "has no split named train")],
)  # fmt: skip
def test_a_split_that_is_missing_is_named(tmp_path, splits, message):
    dataset = load_dataset(f"features:{write_separable(tmp_path / 'f.npz', splits)}")
    with pytest.raises(DataError, match=message):
        compare(dataset, tmp_path / "out", HEAD, SEARCH, HASTY)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"val_split": "test"}, "val_split must be another split than test_split, got 'test'"),
     ({"train_split": "test"}, "train_split must be another split"),
     ({"train_split": "all"}, "images must differ, got [45] in both, the first row")],
)  # fmt: skip
def test_what_is_tested_on_is_in_no_other_split(tmp_path, options, message):
    dataset = load_dataset(
        f"features:{write_separable(tmp_path / 'f.npz', (('train', 9), ('test', 5)))}"
    )
    dataset = dataset.with_changes(splits={**dataset.splits, "all": np.arange(14)})
    with pytest.raises(DataError, match=message):
        compare(dataset, tmp_path / "out", HEAD, SEARCH, replace(HASTY, **options))


def test_another_split_is_tested_on_and_validation_images_are_held_out(tmp_path):
    splits = (("train", 30), ("val", 10))
    dataset = load_dataset(f"features:{write_separable(tmp_path / 'f.npz', splits)}")
    fixed = compared_splits(dataset, replace(HASTY, val_fraction=0.2), "val")
    assert {name: len(records) for name, records in fixed.splits.items()} == {
        "train": 24, "val": 6, "test": 10
    }  # fmt: skip
    assert fixed.splits["test"].tolist() == list(range(30, 40))
    assert not set(fixed.splits["train"]) & set(fixed.splits["val"])


def test_which_methods_there_are():
    def names(**options):
        return [m.name for m in chosen_methods(CompareConfig(), ModelConfig(**options), SEARCH)]

    assert names() == list(METHODS)
    assert [n for n in METHODS if n not in names(trunk_dim=0)] == [
        "bce-linear", "softmax-linear", "warp-linear"
    ]  # fmt: skip
    assert "cnn-rnn-plain" not in names(chain_term=False)
    unordered = chosen_methods(CompareConfig(), ModelConfig(), SearchConfig(order="unique"))
    assert [n for n in METHODS if n not in [m.name for m in unordered]] == ["ensemble-cnn-rnn"]
    with pytest.raises(ValueError, match="methods must be among cnn-rnn, .* got 'lasso'"):
        chosen_methods(CompareConfig(methods=("bce", "lasso")), HEAD, SEARCH)
    with pytest.raises(ValueError, match="ensemble-bce is made of bce, .* got knn, ensemble-bce"):
        chosen_methods(CompareConfig(methods=("knn", "ensemble-bce")), HEAD, SEARCH)
    chosen = chosen_methods(CompareConfig(methods=("knn", "cnn-rnn")), HEAD, SEARCH)
    assert [method.name for method in chosen] == ["cnn-rnn", "knn"]


def test_what_scikit_learn_is_needed_for_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr("cnnrnn.comparison.methods.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^knn, cca, svm, chains come from .*cnnrnn\[vision\]"
    ):
        chosen_methods(CompareConfig(), HEAD, SEARCH)
    assert len(chosen_methods(CompareConfig(methods=("bce",)), HEAD, SEARCH)) == 1


@pytest.mark.parametrize(("found", "shown"), [("1.0.30", "1.0.30"), (None, "none")])
def test_an_old_timm_is_named_before_anything_runs(monkeypatch, found, shown):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("cnnrnn.comparison.methods.version", version)
    message = f"^poly, two-way, zlpr, db need timm 1.0.31 or newer, got {shown}: .*leave them out"
    with pytest.raises(ModuleNotFoundError, match=message):
        chosen_methods(CompareConfig(), HEAD, SEARCH)
    assert len(chosen_methods(CompareConfig(methods=("bce",)), HEAD, SEARCH)) == 1
    found = "1.1.0.dev0"
    assert len(chosen_methods(CompareConfig(methods=("zlpr",)), HEAD, SEARCH)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": ()}, "at least one seed"), ({"seeds": (1, 1)}, r"distinct, got \[1, 1\]"),
     ({"seeds": (-1,)}, "got -1"), ({"settings": 0}, "settings must be in 1..5, got 0"),
     ({"members": 1}, "members must be at least 2, got 1"),
     ({"methods": ("bce", "bce")}, "methods must be distinct")],
)  # fmt: skip
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**options)


def test_members_are_the_seeds_in_groups():
    def groups(seeds, members):
        return ensemble_seeds(CompareConfig(seeds=seeds, members=members))

    assert groups((0, 1, 2), 3) == [(0, 1, 2)]
    assert groups((4, 1), 3) == [(4, 1, 5)]
    assert groups((0, 1, 2, 3, 4), 2) == [(0, 1), (2, 3)]


def test_exact_match_by_a_cut_of_its_own():
    """A k of 2 suits the images of two labels, whatever the threshold for O-F1 says."""
    targets = torch.tensor([[True, True, False], [False, True, True]]).repeat(5, 1)
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.3, 0.2]]).repeat(5, 1)
    split = SimpleNamespace(targets=targets, unknown=None)
    judging = SimpleNamespace(val=split, test=split)
    found = _judge(judging, False, Scored(scores), Scored(scores))
    assert found.own_exact == 1.0
    threshold, _ = best_threshold(scores, targets)
    assert multilabel_metrics(scores, targets, threshold=threshold)["exact-match"] < 1.0


def test_no_image_is_left_without_labels_where_validation_images_all_have_some():
    targets = torch.eye(3, dtype=torch.bool)
    split = SimpleNamespace(targets=targets, unknown=None)
    judging = SimpleNamespace(val=split, test=split)
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.2], [0.2, 0.2, 0.7]])
    dim = scores * torch.tensor([[1.0], [1.0], [0.1]])
    found = _judge(judging, False, Scored(scores), Scored(dim))
    assert found.decision == {"threshold": pytest.approx(0.55), "min_labels": 1}
    assert found.own["exact-match"] == found.own_c_f1 == found.own_exact == 1.0
    split.targets = targets & torch.tensor([[True], [True], [False]])
    found = _judge(judging, False, Scored(scores), Scored(dim))
    assert found.decision == {"threshold": pytest.approx(0.75), "min_labels": 0}
    assert found.own["exact-match"] == 1.0


def made_row(title, seed, figure, method="a", nll=math.nan, is_bound=False):
    own = {"O-F1": figure, "C-F1": figure, "mAP": 0.5, "MAP@10": math.nan,
           "exact-match": 0.1 * seed, "example-F1": 1.0, "Hamming": figure}  # fmt: skip
    return Row(method, title, seed, {"C": 1.0}, {"k": 2}, own, own, math.nan, math.nan, nll,
               is_bound, 1.5)  # fmt: skip


def test_a_table_has_means_errors_and_the_best():
    rows = [made_row("one", 0, 0.5), made_row("one", 1, 0.7), made_row("two", 0, 0.65)]
    cells = table_cells(rows)
    one, two = cells["one"][0], cells["two"][0]
    assert (one.mean, one.error, one.is_best) == (pytest.approx(60), pytest.approx(10), False)
    assert (two.mean, two.error, two.is_best) == (pytest.approx(65), None, True)
    mean_ap = COLUMNS.index("mAP")
    assert cells["one"][mean_ap].is_best and cells["two"][mean_ap].is_best  # which is equal
    text = comparison.text_table(rows).splitlines()
    assert text[0].split()[0] == "O-F1"
    assert text[1].startswith("one") and "60.0 ± 10.0 " in text[1] and "50.0 ± 0.0*" in text[1]
    assert "65.0*" in text[2]
    markdown = comparison.markdown_table(rows).splitlines()
    assert markdown[3].startswith("| two | **65.0** | **65.0** | **50.0** |")
    assert "MAP@10" not in markdown[0]  # no figure in the column


def test_less_is_better_of_loss_and_nll():
    rows = [made_row("one", 0, 0.5, nll=12.5), made_row("two", 0, 0.25, nll=3.25, is_bound=True),
            made_row("three", 0, 0.75)]  # fmt: skip
    cells = table_cells(rows)
    nll, hamming = COLUMNS.index("NLL"), COLUMNS.index("Hamming")
    assert [cells[title][nll].is_best for title in cells] == [False, True, False]
    assert [cells[title][hamming].is_best for title in cells] == [False, True, False]
    markdown = comparison.markdown_table(rows).splitlines()
    assert "| 12.50 |" in markdown[2] and "| 50.00 |" in markdown[2]
    assert "| **≤ 3.25** |" in markdown[3] and "| **25.00** |" in markdown[3]
    assert "| – |" in markdown[4]


# The command.


def test_the_command_prints_the_table_and_goes_on(tmp_path, capsys):
    file = write_separable(tmp_path / "f.npz", (("train", 60), ("val", 20), ("test", 20)))
    words = ["compare", "--data", f"features:{file}", "--out", str(tmp_path / "out"),
             "--seeds=0,1", "--methods", "knn,bce,bce-linear", "--settings=1", "--device=cpu",
             "--epochs=1", "--finish-epochs=1", "--model.trunk-dim=8"]  # fmt: skip
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "test: 20 images, 5 labels, per cent, 2 seeds" in out
    assert all(f"\n{name} " in out for name in ("nearest neighbours", "binary cross-entropy"))
    assert err.count("\n") == 5
    assert main(words) == 0
    again, err = capsys.readouterr()
    assert (again, err) == (out, "")
    assert main([*words, "--epochs=2"]) == 1
    assert "epochs is 1 there and 2 here" in capsys.readouterr().err
    assert main([*words, "--methods=bcee"]) == 1
    assert "got 'bcee'" in capsys.readouterr().err
    assert main([*words, "--seeds=0;1"]) == 1
    assert "--seeds must be comma-separated whole numbers, got '0;1'" in capsys.readouterr().err


def test_the_command_on_pictures_caches_their_features(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    from cnnrnn.data.sources.scenes import write_scenes

    root = tmp_path / "scenes"
    write_scenes(root, train=12, val=6, test=5, image_size=32)
    words = ["compare", "--data", f"scenes:{root}", "--out", str(tmp_path / "out"),
             "--methods=knn,svm", "--settings=1", "--device=cpu", "--model.backbone=small",
             "--model.image-size=32"]  # fmt: skip
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "test: 5 images, 26 labels" in out and "frozen with random weights" in err
    (cache,) = (tmp_path / "out" / "features").iterdir()
    written = cache.stat().st_mtime_ns
    assert main([*words, "--model.freeze_backbone=false"]) == 1
    assert "--model.freeze_backbone must be true, got false" in capsys.readouterr().err
    assert cache.stat().st_mtime_ns == written


def test_unreadable_pictures_are_left_out_of_the_features(tmp_path):
    pytest.importorskip("pycocotools")
    from cnnrnn.data.sources.scenes import write_scenes
    from cnnrnn.network.backbones import make_backbone

    root = tmp_path / "scenes"
    write_scenes(root, train=4, val=3, test=3, image_size=32)
    dataset = load_dataset(f"scenes:{root}")
    bad = int(dataset.splits["val"][1])
    dataset.image_paths[bad].write_bytes(b"no picture")
    backbone = make_backbone(ModelConfig(backbone="small", image_size=32))
    with pytest.warns(UserWarning):
        features = frozen_features(dataset, backbone, tmp_path / "cache", on_bad_image="skip")
    assert {name: len(rows) for name, rows in features.splits.items()} == {
        name: len(rows) - (name == "val") for name, rows in dataset.splits.items()
    }
    kept = [i for i in range(len(dataset)) if i != bad]
    assert torch.equal(features.label_matrix(), dataset.select(kept).label_matrix())
    test = [features.record_name(i) for i in features.splits["test"]]
    assert len(test) == len(set(test)) == 3
    assert torch.equal(features.split("test").label_matrix(), dataset.split("test").label_matrix())
