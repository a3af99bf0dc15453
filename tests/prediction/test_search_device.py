"""`search_device` of the calls with a model: what reaches the search, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrnn
from cnnrnn.cli import main
from cnnrnn.config import SearchConfig
from cnnrnn.data import Dataset
from cnnrnn.evaluation import evaluate
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.search import inference
from tests.prediction.test_decisions import NAMES, L, feature_model, features
from tests.prediction.test_predict import make_model


@pytest.fixture
def asked(monkeypatch):
    """Where each search was asked for; all run on the CPU."""
    found = []

    def beam_search(*arguments, search_device, **options):
        found.append(search_device)
        return right(*arguments, **options, search_device="cpu")

    right = inference.beam_search
    monkeypatch.setattr(inference, "beam_search", beam_search)
    for module in ("cnnrnn.prediction.predictor", "cnnrnn.evaluation"):
        monkeypatch.setattr(f"{module}.require_search_device", lambda _: None)
    return found


def pictures(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def dataset(n=20):
    generator = np.random.default_rng(0)
    rows, labels = np.nonzero(generator.random((n, L)) < 0.6)
    return Dataset.from_arrays(
        "features:here", NAMES, np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]),
        labels.astype(np.int32), features=generator.standard_normal((n, 5)).astype(np.float32),
    )  # fmt: skip


def ensemble():
    return Ensemble([feature_model(), feature_model(1, tuple(reversed(NAMES)))]).eval()


@pytest.mark.parametrize("choice", ["auto", "cpu", "cuda"])
def test_every_call_passes_it_on(asked, choice):
    on, model = {"search_device": choice}, make_model()
    model.predict(pictures(), **on)
    list(model.predict_iter(pictures(), known=[model.labels[1]], **on))
    cnnrnn.predict(pictures(), model, **on)
    list(cnnrnn.predict_iter(pictures(), model, **on))
    cnnrnn.predict_features(features(4), feature_model(), **on)
    assert asked == [choice] * 5
    ensemble().predict_features(features(4), **on)  # each member
    assert asked == [choice] * 7
    evaluate(feature_model(), dataset(), revealed=1, **on)
    cnnrnn.evaluate(dataset(), ensemble(), **on)
    assert asked == [choice] * 11


def test_known_labels_of_some_images_too(asked):
    known = [[NAMES[1]], [], []]
    feature_model().predict_features(features(3), known=known, search_device="cuda")
    assert asked == ["cuda", "cuda"]


def test_auto_is_the_default_and_the_cpu(asked):
    for model in (feature_model(), ensemble()):
        asked.clear()
        expected = model.predict_features(features(9))
        assert set(asked) == {"auto"}
        for choice in ("auto", "cpu"):
            found = model.predict_features(features(9), search_device=choice)
            assert [p.to_dict() for p in found] == [p.to_dict() for p in expected]


@pytest.mark.parametrize("model", [feature_model(), ensemble()], ids=["model", "ensemble"])
def test_what_cannot_be_had_is_said_before_anything_runs(monkeypatch, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="search_device cuda needs a GPU that torch can use, got"):
        model.predict_features(features(3), search_device="cuda")
    with pytest.raises(ValueError, match="search_device must be auto, cpu or cuda, got 'gpu'"):
        model.predict_features(features(3), search_device="gpu")
    with pytest.raises(ValueError, match="search_device cuda needs a GPU that torch can use, got"):
        evaluate(model, dataset(), search_device="cuda")
    with pytest.raises(ValueError, match="search_device must be auto, cpu or cuda, got 'gpu'"):
        make_model().predict_iter(iter([]), search_device="gpu")


def test_no_checkpoint_holds_it(tmp_path, asked):
    assert "search_device" not in {field.name for field in fields(SearchConfig)}
    for name, model in (("one", feature_model()), ("several", ensemble())):
        model.predict_features(features(3), search_device="cuda")
        model.save(tmp_path / name)
        for file in (tmp_path / name).rglob("*.json"):
            assert "search_device" not in file.read_text(encoding="utf-8")
        asked.clear()
        cnnrnn.load(tmp_path / name).predict_features(features(3))
        assert set(asked) == {"auto"}
    assert "search_device" not in inspect.signature(cnnrnn.load).parameters


@pytest.mark.parametrize("command", ["predict", "suggest", "evaluate"])
def test_the_command_line(tmp_path, asked, capsys, monkeypatch, command):
    feature_model().save(tmp_path / "model")
    make_model().save(tmp_path / "of_pictures")
    Image.fromarray(pictures()[0]).save(tmp_path / "a.png")
    data = dataset()
    np.savez(
        tmp_path / "data.npz", features=data.features, labels=data.label_matrix().numpy(),
        label_names=np.array(NAMES),
    )  # fmt: skip
    words = {
        "predict": [str(tmp_path / "a.png"), "--format=jsonl", "--model", tmp_path / "of_pictures"],
        "suggest": [str(tmp_path / "a.png"), "--format=jsonl", "--model", tmp_path / "of_pictures"],
        "evaluate": ["--split=all", f"--data=features:{tmp_path / 'data.npz'}",
                     "--model", tmp_path / "model"],
    }  # fmt: skip
    call = [command, *map(str, words[command]), "--device=cpu"]
    assert main(call) == 0
    expected = capsys.readouterr().out
    assert main([*call, "--search-device", "cuda"]) == 0
    assert capsys.readouterr().out == expected and asked == ["auto", "cuda"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*call, "--search-device", "cuda"]) == 1
    assert "error: search_device cuda needs a GPU that torch can use" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*call, "--search-device", "gpu"])
