from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrnn import Ensemble, set_log_probs
from cnnrnn.config import ModelConfig, SearchConfig
from cnnrnn.data import Boxes, DataError, Dataset, load_dataset
from cnnrnn.evaluation import evaluate, object_recall, write_per_label, write_per_label_csv
from cnnrnn.labels import LabelSpace
from cnnrnn.metrics import multilabel_metrics
from cnnrnn.model.checkpoint import FEATURES_ONLY
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.head import Head
from cnnrnn.network.losses import sequence_loss
from cnnrnn.reveal import metrics_of_others, reveal

NAMES = ("a", "b", "c")


def feature_model(
    seed: int = 0, order: tuple[int, ...] = (2, 0, 1), search: SearchConfig | None = None
) -> CNNRNN:
    """Of 4 features and the labels c, a, b, or in another order."""
    torch.manual_seed(seed)
    config = ModelConfig(backbone=FEATURES_ONLY, trunk_dim=0, joint_dim=4, hidden_dim=4)
    space = LabelSpace(tuple(NAMES[i] for i in order), order)
    head = Head.from_config(config, 3, 4)
    return CNNRNN(config, space, head, None, search or SearchConfig(max_labels=3)).eval()


def test_unknown_labels_reach_the_measures_in_path_order(tmp_path: Path) -> None:
    """The model's order of labels is not the data's, and record 0 has none that is unknown."""
    generator = np.random.default_rng(0)
    states = generator.integers(-1, 2, (40, 3))  # -1 unknown, 0 absent, 1 present
    states[0] = [1, 0, 1]
    parts = []
    for value in (1, -1):
        rows, labels = np.nonzero(states == value)
        parts += [np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=40))]), labels]
    dataset = Dataset.from_arrays(
        "features:here",
        NAMES,
        parts[0],
        parts[1].astype(np.int32),
        features=generator.standard_normal((40, 4)).astype(np.float32),
        unknown_indptr=parts[2],
        unknown_indices=parts[3].astype(np.int32),
    )
    model = feature_model()
    evaluation = evaluate(model, dataset, k=None)

    targets, unknown = (torch.from_numpy(states[:, [2, 0, 1]] == value) for value in (1, -1))
    scores = evaluation.inference.mixed(model.calibration.mix_weight)
    expected = multilabel_metrics(
        evaluation.inference.sets, targets, scores=scores, unknown=unknown
    )
    assert evaluation.metrics["path"] == expected
    assert expected["labels-unknown"] == int((states == -1).sum())
    write_per_label(tmp_path / "labels.csv", model, evaluation)
    known = ~unknown.any(1)
    nll = model.set_nll(torch.from_numpy(dataset.features)[known], targets[known]).mean()
    assert evaluation.nll == float(nll) and not evaluation.nll_is_bound
    rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
    predicted = (evaluation.inference.sets & ~unknown).sum(0).tolist()
    assert [int(row["predicted"]) for row in rows] == predicted


def test_a_source_with_some_of_the_labels() -> None:
    def dataset(names: tuple[str, ...]) -> Dataset:
        return Dataset.from_arrays(
            "csv:x.csv", names, np.array([0, 2, 3]), np.array([0, 1, 1], np.int32),
            features=np.ones((2, 4), np.float32),
        )  # fmt: skip

    evaluation = evaluate(feature_model(), dataset(("b", "c")), k=None)
    assert evaluation.targets.int().tolist() == [[1, 0, 1], [1, 0, 0]]
    assert evaluation.metrics["path"]["labels-without-positives"] == 1
    message = "csv:x.csv must .* among the model's 3, got 1 of 2 .* such as 'd': .*vocabulary=FILE"
    with pytest.raises(DataError, match=message):
        evaluate(feature_model(), dataset(("b", "d")))


def test_a_file_of_another_width(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    file = tmp_path / "test.svm"
    file.write_text("0,2 1:0.5 3:2\n1 2:1\n")
    source = f"features:{file},vocabulary={tmp_path / 'names.txt'}"
    message = f"features:{file} must hold vectors of 4 features .*, got 3: .* features=4, and first"
    with pytest.raises(DataError, match=message):
        evaluate(feature_model(), load_dataset(source))
    evaluation = evaluate(feature_model(), load_dataset(f"{source},features=4,first=1"))
    assert evaluation.targets.int().tolist() == [[1, 1, 0], [0, 0, 1]]


def test_recall_of_objects_takes_the_largest_box_of_a_label_in_an_image() -> None:
    indptr = np.array([0, 3, 3, 4])
    xywh = np.array([[0, 0, 2, 3], [5, 5, 4, 4], [0, 0, 1, 1], [0, 0, 10, 2]], np.float32)
    boxes = Boxes(indptr, np.array([2, 2, 0, 1], np.int32), xywh)
    dataset = Dataset.from_arrays(
        "coco:here", NAMES, np.array([0, 2, 2, 3]), np.array([0, 2, 1], np.int32),
        images=tuple(Path(f"{i}.png") for i in range(3)), boxes=boxes,
    )  # fmt: skip
    sets = torch.tensor([[False, True, True], [True, True, True], [True, False, True]])
    recall = object_recall(sets, dataset)
    assert recall.images.tolist() == [0, 0, 2] and recall.labels.tolist() == [0, 2, 1]
    assert recall.areas.tolist() == [1, 16, 20] and recall.found.tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"sets must be \[3, 3\], got \[3, 2\]"):
        object_recall(sets[:, :2], dataset)
    with pytest.raises(DataError, match="must have boxes"):
        object_recall(sets[:1], dataset.select([0]).with_changes(boxes=None))


def test_nll_of_an_ensemble_is_that_of_the_mixture() -> None:
    models = [feature_model(), feature_model(1, (1, 2, 0))]
    ensemble = Ensemble(models).eval()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, generator=generator)
    targets = torch.rand(7, 3, generator=generator) < 0.5  # columns c, a, b
    column = {name: i for i, name in enumerate(ensemble.labels)}
    mean = sum(
        set_log_probs(
            model.head, model.head.embed(features), targets[:, [column[n] for n in model.labels]]
        ).exp()
        for model in models
    ) / len(models)
    expected = -mean.log().double()
    torch.testing.assert_close(ensemble.set_nll(features, targets), expected, rtol=1e-5, atol=1e-5)


def test_nll_in_an_order_with_several_paths_is_a_bound() -> None:
    model = feature_model(search=SearchConfig(max_labels=3, order="unique"))
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 1, 1]] * 5) > 0
    paths = torch.tensor(list(itertools.permutations(range(3))))
    all_orders = torch.zeros(5, dtype=torch.float64)
    for path in paths:
        scores, _ = model.head(features, path.expand(5, 3))
        all_orders += (-sequence_loss(scores, path.expand(5, 3), "unique")).double().exp().detach()
    assert (model.set_nll(features, targets) > -all_orders.log()).all()
    dataset = Dataset.from_arrays(
        "features:here", NAMES, np.arange(0, 18, 3), np.tile(np.arange(3), 5),
        features=features.numpy(),
    )  # fmt: skip
    assert evaluate(model, dataset, k=None).nll_is_bound


def test_write_per_label_csv(tmp_path: Path) -> None:
    path = tmp_path / "per_label.csv"
    path.write_text("an older and much longer file\n" * 100)
    per_label = {
        "recall": torch.tensor([0.5, math.nan, 1 / 3], dtype=torch.float64),
        "positives": torch.tensor([2, 0, 3]),
    }
    names = ["naïve 猫", 'a "b", c', "two\nlines"]
    write_per_label_csv(path, names, per_label)
    expected = (
        'label,recall,positives\nnaïve 猫,0.5,2\n"a ""b"", c",,0\n'
        '"two\nlines",0.3333333333333333,3\n'
    )
    assert path.read_bytes() == expected.encode()
    with path.open(encoding="utf-8", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == names
    assert list(tmp_path.iterdir()) == [path]


def test_write_per_label_csv_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "per_label.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"per_label\['recall'\] must be \[3\].*got \[2\]"):
        write_per_label_csv(path, ["a", "b", "c"], {"recall": torch.zeros(2)})
    with pytest.raises(UnicodeEncodeError):
        write_per_label_csv(path, ["a", "\ud800"], {"recall": torch.zeros(2)})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_known_labels_are_told_and_the_others_measured() -> None:
    """The figures are those of the model's searches with evidence in the model's own columns."""
    generator = np.random.default_rng(0)
    labels = generator.random((60, 3)) < 0.6
    rows, columns = np.nonzero(labels)
    dataset = Dataset.from_arrays(
        "features:here", NAMES,
        np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=60))]),
        columns.astype(np.int32),
        features=generator.standard_normal((60, 4)).astype(np.float32),
    )  # fmt: skip
    models = feature_model(), Ensemble([feature_model(), feature_model(1, (1, 2, 0))]).eval()
    for model in models:
        evaluation = evaluate(model, dataset, revealed=1)
        order = [NAMES.index(name) for name in model.labels]
        targets = torch.from_numpy(labels[:, order])
        images, evidence = reveal(torch.from_numpy(labels), 1)  # drawn in the order of the data
        evidence = evidence[:, order]
        assert len(images) == (labels.sum(1) > 1).sum() > 0
        features = torch.from_numpy(dataset.features)[images]
        assert list(evaluation.others) == ["none known", "1 known"]
        found_given = {
            "none known": model.infer(features),
            "1 known": model.infer(features, None, evidence),
        }
        for name, found in found_given.items():
            scores = found.mixed(model.calibration)
            expected = metrics_of_others(scores, targets[images], evidence)
            assert evaluation.others[name] == expected
        assert evaluation.others["none known"] != evaluation.others["1 known"]
    with pytest.raises(DataError, match="more than 3 labels to reveal 3, got 3 at most"):
        evaluate(models[0], dataset, revealed=3)
    with pytest.raises(ValueError, match="revealed must be at least 1, got 0"):
        evaluate(models[0], dataset, revealed=0)
    assert evaluate(models[0], dataset).others == {}
