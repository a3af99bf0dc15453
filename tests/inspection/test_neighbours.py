"""Nearest labels against cosines by numpy in float64; whose they are and whose not; the command."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pickle

import numpy as np
import pytest
import torch

from benchmarks.quality.neighbours import company, correlation, share
from cnnrnn import Ensemble, Head, ModelConfig
from cnnrnn.cli import main
from cnnrnn.config import Calibration
from cnnrnn.inspection.neighbours import nearest_labels
from cnnrnn.network import joint_space
from cnnrnn.network.joint_space import label_vectors, nearest
from tests.prediction.test_decisions import NAMES, L, feature_model, features
from tests.prediction.test_predict import make_model


def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def test_nearest_labels_are_those_of_the_largest_cosine():
    model = feature_model()
    rows = model.head.label_embedding.detach().numpy()
    found = nearest_labels(model, 3)
    assert list(found) == list(NAMES)
    for i, name in enumerate(NAMES):
        expected = sorted(
            ((cosine(rows[i], rows[j]), NAMES[j]) for j in range(L) if j != i), reverse=True
        )[:3]
        assert [other for other, _ in found[name]] == [other for _, other in expected]
        np.testing.assert_allclose([c for _, c in found[name]], [c for c, _ in expected], atol=1e-6)


def test_all_others_where_there_are_fewer_and_never_end_start_or_itself():
    model = feature_model()
    with torch.no_grad():  # END and START would be nearest
        model.head.label_embedding[L:] = model.head.label_embedding[0]
    for name, near in nearest_labels(model, 99).items():
        assert sorted(other for other, _ in near) == sorted(set(NAMES) - {name})
    assert len(model.predict_features(features(1))[0].neighbours(99)) == L


def test_the_embedding_that_scores_and_not_the_one_that_is_read():
    model = feature_model()
    before = nearest_labels(model)
    assert model.head.input_embedding is not None
    with torch.no_grad():
        model.head.input_embedding.normal_()
    assert nearest_labels(model) == before


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_nearest_labels_of_images(activation):
    model = feature_model()
    model.head.activation = activation
    x = features(50)
    h = {"relu": lambda v: np.maximum(v, 0), "tanh": np.tanh, "identity": lambda v: v}[activation]
    scaled = x.double().numpy() * float(model.head.trunk.feature_scale)
    weight, bias = (
        value.detach().double().numpy()
        for value in (model.head.image_projection.weight, model.head.image_projection.bias)
    )
    rows = model.head.label_embedding.detach().numpy()
    for known in ([], [NAMES[2]]):  # what is known changes nothing
        for image, prediction in zip(scaled, model.predict_features(x, known=known), strict=True):
            vector = h(weight @ image + bias)
            expected = sorted(((cosine(vector, rows[j]), NAMES[j]) for j in range(L)), reverse=True)
            found = prediction.neighbours(4)
            assert [name for name, _ in found] == [name for _, name in expected[:4]]
            np.testing.assert_allclose(
                [c for _, c in found], [c for c, _ in expected[:4]], atol=1e-5
            )


def test_vectors_of_zeros_and_ties():
    cosines, labels = nearest(torch.zeros(2, 3), torch.eye(3), 5)
    assert cosines.tolist() == [[0.0] * 3] * 2 and labels.tolist() == [[0, 1, 2]] * 2
    same = torch.ones(4, 3)
    _, labels = nearest(same, same, 2, are_labels=True)
    assert labels.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    cosines, labels = nearest(torch.zeros(0, 3), torch.eye(3), 2)
    assert cosines.shape == labels.shape == (0, 2)
    cosines, labels = nearest(torch.ones(1, 3), torch.ones(1, 3), 5, are_labels=True)
    assert cosines.shape == labels.shape == (1, 0)


def test_many_labels_go_by_parts(monkeypatch):
    vectors = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
    whole = nearest(vectors, vectors, 5, are_labels=True)
    monkeypatch.setattr(joint_space, "AT_ONCE", 70)  # three rows
    for one, other in zip(whole, nearest(vectors, vectors, 5, are_labels=True), strict=True):
        torch.testing.assert_close(one, other)


def test_the_papers_model_has_one_embedding():
    head = Head.from_config(ModelConfig.paper(), 5, 7)
    torch.testing.assert_close(label_vectors(head), head.label_embedding[:5])


def test_what_the_benchmark_compares_with():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(400, 7, generator=generator) < 0.3
    targets[:, 3] |= targets[:, 2]
    expected = np.corrcoef(targets.numpy().T)
    found = correlation(targets)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    alike = company(found)
    for i, j in itertools.permutations(range(7), 2):
        others = [k for k in range(7) if k not in (i, j)]
        assert alike[i, j] == pytest.approx(cosine(expected[i, others], expected[j, others]))
    strength = torch.rand(7, 7, generator=generator)
    hits = [
        len(set(_first(found[i], i, 3)) & set(_first(strength[i], i, 4))) / 3 for i in range(7)
    ]  # fmt: skip
    assert share(found, strength, 4) == pytest.approx(np.mean(hits))


def _first(values, own, count):
    return sorted((j for j in range(len(values)) if j != own), key=lambda j: -values[j])[:count]


def test_who_has_no_neighbours_says_so(tmp_path):
    model = feature_model()
    ensemble = Ensemble([model, feature_model(1)])
    with pytest.raises(ValueError, match="need a single model, got an ensemble: each of its membe"):
        nearest_labels(ensemble)
    assert nearest_labels(ensemble.models[1])
    (of_ensemble,) = ensemble.predict_features(features(1))
    (whole,) = model.predict_features(features(1))
    for prediction in (of_ensemble, pickle.loads(pickle.dumps(whole))):
        with pytest.raises(ValueError, match="neighbours need a single model that torch runs"):
            prediction.neighbours()
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        whole.neighbours(0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        nearest_labels(model, 0)
    (tmp_path / "a.png").write_bytes(b"no picture")
    (bad,) = make_model().predict([tmp_path / "a.png"], on_bad_image="skip")
    with pytest.raises(ValueError, match="could not be read"):
        bad.neighbours()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    model = feature_model(names=("a;b", 'c"d', "e,f", "é", "h i", "f"))
    model.calibration = Calibration(label_thresholds=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    model.save(folder)
    return folder, model


def test_the_command_in_every_form(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    expected = nearest_labels(model, 2)
    text = {}
    for form in ("table", "csv", "jsonl"):
        words = ["labels", str(folder), "--nearest=2", f"--format={form}"]
        assert main(words) == 0
        text[form] = capsys.readouterr().out
        assert main([*words, "--out", str(tmp_path / "file")]) == 0
        assert (tmp_path / "file").read_bytes().decode() == text[form]
    records = [json.loads(line) for line in text["jsonl"].splitlines()]
    rows = list(csv.DictReader(io.StringIO(text["csv"])))
    lines = text["table"].splitlines()[1:]
    for i, (name, near) in enumerate(expected.items()):
        cut = model.calibration.label_thresholds[i]
        assert records[i] == {
            "label": name, "threshold": cut,
            "nearest": [{"label": other, "cosine": round(c, 4)} for other, c in near],
        }  # fmt: skip
        for row, (other, c) in zip(rows[2 * i : 2 * i + 2], near, strict=True):
            assert (row["label"], row["nearest"]) == (name, other)
            assert (float(row["threshold"]), float(row["cosine"])) == (cut, round(c, 4))
        assert lines[i].startswith(name) and f"{cut:.2f}" in lines[i]
        assert all(f"{other} {c:.2f}" in lines[i] for other, c in near)
    assert len(rows) == 2 * L and len(lines) == len(records) == L


def test_the_command_for_labels_alone(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    assert main(["labels", str(folder), "--nearest=0", "--format=csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in rows] == list(model.labels)
    assert set(rows[0]) == {"label", "threshold"}
    Ensemble([model, model]).save(tmp_path / "both")
    assert main(["labels", str(tmp_path / "both"), "--nearest=0"]) == 0
    assert main(["labels", str(tmp_path / "both" / "members" / "1")]) == 0
    capsys.readouterr()
    for words, message in (
        ([str(tmp_path / "both")], "need a single model, got an ensemble"),
        ([str(folder), "--nearest=-1"], "--nearest must be at least 0, got -1"),
        (["model.onnx"], "labels needs a checkpoint folder, got the exported file model.onnx"),
        (["nothing"], "nothing"),
    ):
        assert main(["labels", *words]) == 1
        assert message in capsys.readouterr().err
