"""Ensembles: what they compute, against their members; saving, loading, training, refusing."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import cnnrnn
from cnnrnn import Ensemble, Head, ModelConfig, SearchConfig, TrainConfig, beam_search
from cnnrnn.cli import main
from cnnrnn.config import Calibration
from cnnrnn.data import load_dataset
from cnnrnn.data.splits import training_splits
from cnnrnn.evaluation import evaluate
from cnnrnn.labels import LabelSpace, increasing_paths, path_sets
from cnnrnn.metrics import best_threshold
from cnnrnn.model.checkpoint import CheckpointError
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.model.ensemble import set_log_probs
from cnnrnn.network.backbones import make_backbone
from cnnrnn.network.losses import sequence_loss
from cnnrnn.training.ensemble import train_ensemble
from cnnrnn.training.run import train

NAMES = ("sky", "sea", "boat", "cow", "sun")
MODEL = ModelConfig(backbone="features", trunk_dim=8, joint_dim=6, hidden_dim=5)
SEARCH = SearchConfig(beam_size=4)


def make_model(seed, names=NAMES, config=MODEL, backbone=None, search=SEARCH):
    """A random model whose labels stand in an order of its own."""
    torch.manual_seed(seed)
    head = Head.from_config(config, len(names), 7 if backbone is None else backbone.feature_dim)
    head.max_labels = 4
    for parameter in head.parameters():
        parameter.data *= 2
    space = LabelSpace.random(names, torch.Generator().manual_seed(seed))
    calibration = Calibration(0.2 + 0.1 * seed, 0.25 * (seed % 4))
    return CNNRNN(config, space, head, backbone, search, calibration).eval()


@pytest.fixture
def ensemble():
    return Ensemble([make_model(seed) for seed in range(3)]).eval()


def features(count=17):
    return 2 * torch.randn(count, 7, generator=torch.Generator().manual_seed(0))


# The log-probability of a set


@pytest.mark.parametrize("options", [{}, {"max_labels": 2}, {"min_labels": 2},
                                     {"min_labels": 2, "max_labels": 3}])  # fmt: skip
@pytest.mark.parametrize("chain_term", [False, True])
def test_a_set_has_the_log_probability_that_the_search_reports(device, chain_term, options):
    torch.manual_seed(0)
    head = Head(6, 7, joint_dim=5, hidden_dim=4, chain_term=chain_term).to(device).eval()
    head.max_labels = 5
    search = SearchConfig(beam_size=16, **options)
    embedding = head.embed(features().to(device))
    result = beam_search(head, embedding, search)
    found = 0
    for rank in range(16):
        there = result.log_probs[:, rank] > -torch.inf
        sets = path_sets(result.labels[:, rank], 6)
        scores = set_log_probs(head, embedding, sets, search)
        torch.testing.assert_close(scores[there], result.log_probs[there, rank].to(scores))
        found += int(there.sum())
    assert found > 150


def test_a_set_has_minus_its_sequence_loss(monkeypatch):
    torch.manual_seed(0)
    head = Head(6, 7, joint_dim=5, hidden_dim=4).double().eval()
    head.max_labels = 6
    sets = torch.rand(17, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    images = features().double()
    expected = -sequence_loss(head(images, increasing_paths(sets))[0], increasing_paths(sets),
                              "increasing")  # fmt: skip
    short = torch.tensor([len(s.nonzero()) < 6 for s in sets])
    for size in (1 << 24, 100, 1):  # one slice or many
        monkeypatch.setattr("cnnrnn.model.ensemble.SCORES_AT_ONCE", size)
        found = set_log_probs(head, head.embed(images), sets)
        torch.testing.assert_close(found[short], expected[short])
    assert set_log_probs(head, head.embed(images[:0]), sets[:0]).shape == (0,)


def test_impossible_sets():
    head = Head(5, 7, joint_dim=5, hidden_dim=4).eval()
    sets = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0] * 5]) > 0
    search = SearchConfig(max_labels=3, min_labels=2)
    found = set_log_probs(head, head.embed(features(4)), sets, search)
    # Too long, too short, short with nothing left to follow, too short.
    assert (found == -torch.inf).tolist() == [True, True, False, True]
    assert -torch.inf < float(found[2]) < 0


def test_sets_that_do_not_fit():
    head = Head(5, 7, joint_dim=5, hidden_dim=4).eval()
    embedding = head.embed(features(4))
    with pytest.raises(ValueError, match=r"sets must be \[4, 5\], got \[4, 6\]"):
        set_log_probs(head, embedding, torch.zeros(4, 6) > 0)
    with pytest.raises(ValueError, match="must be increasing to score sets, got unique"):
        set_log_probs(head, embedding, torch.zeros(4, 5) > 0, SearchConfig(order="unique"))


# What an ensemble computes


def test_an_ensemble_of_one_is_its_model():
    model = make_model(1)
    alone = Ensemble([model]).eval()
    assert alone.labels == model.labels and alone.calibration.threshold == pytest.approx(0.3)
    for options in ({}, {"decide": "threshold"}, {"beam_size": 2, "min_labels": 2}, {"top_k": 1}):
        for ours, theirs in zip(
            alone.predict_features(features(), **options),
            model.predict_features(features(), **options),
            strict=True,
        ):
            assert ours.labels == theirs.labels
            assert ours.scores == pytest.approx(theirs.scores)
            assert [path for path, _ in ours.paths] == [path for path, _ in theirs.paths]
            assert [p for _, p in ours.paths] == pytest.approx([p for _, p in theirs.paths], 1e-4)


def test_the_best_path_is_the_best_candidate(ensemble):
    """Loops over names: every member's paths are candidates, scored by the mean over members."""
    found = ensemble.predict_features(features())
    by_member = [model.predict_features(features()) for model in ensemble.models]
    disagree = 0
    for image, prediction in enumerate(found):
        candidates = {frozenset(path) for ps in by_member for path, _ in ps[image].paths}
        scores = {}
        for candidate in candidates:
            sets = [torch.tensor([[name in candidate for name in model.labels]])
                    for model in ensemble.models]  # fmt: skip
            scores[candidate] = np.mean([
                float(set_log_probs(m.head, m.head.embed(features()[image : image + 1]), s, SEARCH))
                for m, s in zip(ensemble.models, sets, strict=True)
            ])  # fmt: skip
        ranked = sorted(scores, key=lambda c: -scores[c])
        assert frozenset(prediction.labels) == ranked[0]
        assert {frozenset(path) for path, _ in prediction.paths} == candidates
        assert [frozenset(path) for path, _ in prediction.paths] == ranked
        assert prediction.log_prob == pytest.approx(scores[ranked[0]], rel=1e-4)
        assert list(prediction.labels) == [x for x in ensemble.labels if x in ranked[0]]
        assert sum(p for _, p in prediction.sets) <= 1
        for name in NAMES:
            mean = np.mean([ps[image].scores[name] for ps in by_member])
            assert prediction.scores[name] == pytest.approx(mean, rel=1e-5)
        disagree += len({frozenset(ps[image].labels) for ps in by_member}) > 1
    assert disagree > 5


def test_slices_of_images_make_no_difference(ensemble, monkeypatch):
    whole = ensemble.infer(features())
    for size in (1, 5):
        monkeypatch.setattr("cnnrnn.model.ensemble.SEARCH_BATCH", size)
        monkeypatch.setattr("cnnrnn.search.inference.SEARCH_BATCH", size)
        sliced = ensemble.infer(features())
        assert torch.equal(sliced.sets, whole.sets)
        torch.testing.assert_close(sliced.marginals, whole.marginals)
        for image in range(17):
            result, row = sliced.result_of(image)
            expected = whole.search[0].label_sets(image)
            assert [s for s, _ in result.label_sets(row)] == [s for s, _ in expected]
    nothing = ensemble.infer(features(0))
    assert nothing.sets.shape == nothing.marginals.shape == (0, 5)
    assert ensemble.predict_features(features(0)) == []


def test_calibration_takes_the_threshold_of_best_of1(ensemble):
    targets = torch.rand(17, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    assert ensemble.calibration.threshold == pytest.approx((0.2 + 0.3 + 0.4) / 3)
    ensemble.calibrate(features(), targets)
    expected, _ = best_threshold(ensemble.infer(features()).marginals, targets)
    assert ensemble.calibration.threshold == expected


# What does not fit together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": SearchConfig(order="unique")}, "search.order of member 1 must be increasing.*"
                                                   "got unique"),
        ({"names": (*NAMES[:4], "moon")}, r"labels of member 1 .*\['moon', 'sun'\]"),
        ({"config": replace(MODEL, backbone="small")}, r"backbone of member 1 must match member 0 "
                                                       r"\(features\), got small"),
    ],
)  # fmt: skip
def test_members_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([make_model(0), make_model(1, **changes)])


def pictures_model(seed, same=True, frozen=True):
    config = replace(MODEL, backbone="small", pretrained=False, image_size=16,
                     freeze_backbone=frozen)  # fmt: skip
    torch.manual_seed(0 if same else seed)
    return make_model(seed, config=config, backbone=make_backbone(config))


def test_members_share_one_frozen_backbone():
    with pytest.raises(ValueError, match="an ensemble must have at least 1 model, got 0"):
        Ensemble([])
    with pytest.raises(ValueError, match="must share one backbone, got 2 different ones"):
        Ensemble([pictures_model(0), pictures_model(1, same=False)])
    with pytest.raises(ValueError, match="backbone of member 1 must be frozen to be shared, got t"):
        Ensemble([pictures_model(0), pictures_model(1, frozen=False)])
    full = pictures_model(1)
    full.backbone.preprocessing = replace(full.backbone.preprocessing, jpeg_draft=False)
    with pytest.raises(ValueError, match="one preprocessing, got .*jpeg_draft=False.*draft=True"):
        Ensemble([pictures_model(0), full])
    together = Ensemble([pictures_model(0), pictures_model(1)])
    kept = sum(name.startswith("backbone.") for name in together.state_dict())
    assert kept == len(together.backbone.state_dict())
    assert not any("backbone" in name for name in together.members.state_dict())
    picture = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    assert len(together.predict(picture)) == len(cnnrnn.predict(picture, together)) == 3
    with pytest.raises(ValueError, match="predict_features"):
        Ensemble([make_model(0)]).predict(picture)


# Saving and loading


def same_predictions(first, second):
    for one, other in zip(
        first.predict_features(features()), second.predict_features(features()), strict=True
    ):
        assert (one.labels, one.paths, one.scores) == (other.labels, other.paths, other.scores)


def test_round_trip(tmp_path, ensemble):
    ensemble.calibration = Calibration(0.4, 0.0)
    ensemble.save(tmp_path / "runs" / "best")
    assert os.listdir(tmp_path / "runs") == ["best"]
    for path in (tmp_path / "runs", tmp_path / "runs" / "best"):
        loaded = cnnrnn.load(path)
        assert isinstance(loaded, Ensemble) and not loaded.training
        assert loaded.labels == ensemble.labels and loaded.calibration == ensemble.calibration
        same_predictions(loaded, ensemble)
    member = load_checkpoint(tmp_path / "runs" / "best" / "members" / "1")
    same_predictions(member, ensemble.models[1])
    with pytest.raises(CheckpointError, match="holds an ensemble; cnnrnn.load reads it"):
        load_checkpoint(tmp_path / "runs")


def test_the_backbone_is_stored_once(tmp_path):
    together = Ensemble([pictures_model(0), pictures_model(1)]).eval()
    together.save(tmp_path / "model")
    sizes = [(tmp_path / "model" / "members" / str(i) / "model.safetensors").stat().st_size
             for i in range(2)]  # fmt: skip
    backbone = sum(p.numel() * 4 for p in together.backbone.parameters())
    assert sizes[0] - sizes[1] > 0.9 * backbone
    loaded = cnnrnn.load(tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    for one, other in zip(loaded.predict(picture), together.predict(picture), strict=True):
        assert (one.labels, one.paths) == (other.labels, other.paths)


def test_saving_replaces_whole_or_not_at_all(tmp_path, ensemble, monkeypatch):
    make_model(0).save(tmp_path / "model")
    ensemble.save(tmp_path / "model")  # in place of a single model
    Ensemble([make_model(5)]).save(tmp_path / "model")  # and of more members
    assert sorted(os.listdir(tmp_path / "model" / "members")) == ["0"]

    import safetensors.torch

    write, calls = safetensors.torch.save_file, []

    def full_disk(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(safetensors.torch, "save_file", full_disk)
        ensemble.save(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    same_predictions(cnnrnn.load(tmp_path / "model"), Ensemble([make_model(5)]).eval())
    make_model(3).save(tmp_path / "model")
    assert isinstance(cnnrnn.load(tmp_path / "model"), CNNRNN)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


def test_an_ensemble_of_format_1_has_tied_embeddings(tmp_path):
    tied = replace(MODEL, tied_embedding=True)
    ensemble = Ensemble([make_model(seed, config=tied) for seed in range(2)]).eval()
    ensemble.save(tmp_path / "model")
    for file in tmp_path.rglob("config.json"):
        description = json.loads(file.read_text())
        description["format"] = 1
        if "model" in description:
            del description["model"]["tied_embedding"]
        file.write_text(json.dumps(description))
    loaded = cnnrnn.load(tmp_path / "model")
    assert [model.head.input_embedding for model in loaded.models] == [None, None]
    same_predictions(loaded, ensemble)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("members", "members/0", "does not describe an ensemble: members must be list"),
        ("members", [], "at least 1 model, got 0"),
        ("members", ["members/../../elsewhere"], "must be folders below this one, got 'members/.."),
        ("members", ["/members/0"], "must be folders below this one, got '/members/0'"),
        ("members", ["members/7"], "is not a checkpoint"),
        ("format", 7, "has format 7, this release reads 1 to 6; upgrade cnnrnn"),
        ("calibration", None, "does not describe an ensemble: calibration must be dict"),
        (
            "calibration",
            {"threshold": 0.5},
            "fields missing or unknown: k, known_mix_weight, label_thresholds",
        ),
    ],
)
def test_folders_that_hold_no_ensemble(tmp_path, ensemble, key, value, message):
    ensemble.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError) as error:
        cnnrnn.load(tmp_path / "model")
    assert message in str(error.value)


def test_an_ensemble_of_format_1_allows_empty_sets(tmp_path, ensemble):
    ensemble.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    description = json.loads(file.read_text()) | {"format": 1}
    for name in ("min_labels", "uncalibrated"):
        del description["calibration"][name]
    file.write_text(json.dumps(description))
    assert cnnrnn.load(tmp_path / "model").calibration.min_labels == 0


def test_members_of_another_ensemble_are_refused(tmp_path, ensemble):
    ensemble.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "members" / "1")
    make_model(1, names=NAMES[:3]).save(tmp_path / "model" / "members" / "1")
    with pytest.raises(CheckpointError, match="members that do not fit together: labels of mem"):
        cnnrnn.load(tmp_path / "model")


# Training


QUICK = TrainConfig(feature_rms=0.0, warm_epochs=2, epochs=3, batch_size=32, learning_rate=1e-2, 
                    device="cpu", ema_decay=0.0, finish_epochs=0)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Features without splits: what is held out must be the same for every member."""
    random = np.random.default_rng(0)
    labels = random.random((240, 5)) < [0.5, 0.2, 0.4, 0.3, 0.1]
    values = np.where(labels, 1.0, -1.0) + 0.5 * random.standard_normal((240, 5))
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, features=values.astype(np.float32), labels=labels, label_names=np.array(NAMES))
    return path


SIZES = ["--model.trunk_dim=0", "--model.joint_dim=8", "--model.hidden_dim=8", "--device=cpu",
         "--model.input_dropout=0", "--model.joint_dropout=0", "--warm_epochs=3", "--epochs=4",
         "--batch_size=32", "--learning_rate=3e-2"]  # fmt: skip


def test_the_command_line_trains_measures_and_predicts(tmp_path, file, capsys):
    out = tmp_path / "run"
    words = ["--data", f"features:{file}", "--out", str(out), "--members=3",
             "--member_orders=frequency,rare,random", *SIZES]  # fmt: skip
    assert main(["train", *words]) == 0
    printed = capsys.readouterr()
    assert "validation, 5 labels" in printed.out and str(out / "best") in printed.out
    assert "member 2 of 3: label order rare, seed 1" in printed.err
    assert {p.name for p in out.iterdir()} == {"best", "members", "config.yaml", ".lock"}
    ensemble = cnnrnn.load(out)
    counts = load_dataset(f"features:{file}").label_counts()
    frequent = sorted(range(5), key=lambda i: -counts[i])
    assert isinstance(ensemble, Ensemble) and len(ensemble.members) == 3
    assert ensemble.labels[0] == NAMES[frequent[0]]
    assert ensemble.models[1].labels[-1] == NAMES[frequent[0]]
    words = ["--data", f"features:{file}", "--model", str(out), "--split=all"]
    report = tmp_path / "metrics.json"
    per_label = tmp_path / "labels.csv"
    assert main(["evaluate", *words, f"--json={report}", f"--per_label={per_label}"]) == 0
    figures = json.loads(report.read_text())
    assert figures["path"]["O-F1"] > 0.8 and figures["threshold"]["O-F1"] > 0.8
    assert len(per_label.read_text().splitlines()) == 6
    saved = (out / "config.yaml").read_text()
    assert "members: 3" in saved and "member_orders: frequency,rare,random" in saved


def test_members_of_every_seed_hold_out_the_same_images(tmp_path, file, monkeypatch):
    data = load_dataset(f"features:{file}")
    held_out = []

    def watched(dataset, out, model, search, config, **options):
        held_out.append([part.rows.tolist() for part in training_splits(dataset, config)])
        return train(dataset, out, model, search, config, **options)

    monkeypatch.setattr("cnnrnn.training.ensemble.train", watched)
    result = train_ensemble(data, tmp_path, MODEL, SEARCH, QUICK, ["frequency"] * 2)
    assert held_out[0] == held_out[1]
    assert held_out[0] == [part.rows.tolist() for part in training_splits(data, QUICK)]
    weights = [model.head.label_embedding for model in result.model.models]
    assert not torch.equal(*weights)
    validation = data.select(held_out[0][1])
    measured = evaluate(cnnrnn.load(tmp_path), validation)
    assert measured.metrics["path"] == pytest.approx(result.metrics["path"])
    assert measured.metrics["threshold"] == pytest.approx(result.metrics["threshold"])


def test_an_ensemble_on_pictures_shares_one_feature_cache(tmp_path):
    pytest.importorskip("pycocotools")
    from cnnrnn.data.sources.scenes import write_scenes

    write_scenes(tmp_path / "scenes", train=24, val=12, test=6, image_size=32)
    config = ModelConfig(backbone="small", pretrained=False, image_size=16, trunk_dim=0,
                         joint_dim=8, hidden_dim=8)  # fmt: skip
    data = load_dataset(f"scenes:{tmp_path / 'scenes'}")
    with pytest.warns(UserWarning, match="frozen with random weights"):
        result = train_ensemble(data, tmp_path / "run", config, SEARCH, replace(QUICK, epochs=1),
                                ["frequency", "rare"])  # fmt: skip
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2  # train and val, once each
    assert not (tmp_path / "run" / "members" / "1" / "features").exists()
    measured = evaluate(cnnrnn.load(tmp_path / "run"), data.split("val"))
    assert measured.metrics["path"] == pytest.approx(result.metrics["path"])
    assert main(["predict", str(tmp_path / "scenes"), "--model", str(tmp_path / "run"),
                 "--device=cpu"]) == 0  # fmt: skip


def test_options_that_make_no_ensemble(tmp_path, file, capsys):
    words = ["train", "--data", f"features:{file}", "--out", str(tmp_path / "run"), *SIZES]
    for more, message in (
        (["--members=0"], "--members must be at least 1, got 0"),
        (["--members=3", "--member_orders=rare,random"], "must name 3 label orders for --members "
                                                         "3, got 2: rare,random"),
        (["--members=1", "--member_orders=sideways"], "label_order must be one of"),
        (["--members=2", "--search.order=unique"], "needs increasing paths: search.order must be "
                                                   "increasing and no label order shuffled, got "
                                                   "unique and frequency, frequency"),
        (["--members=2", "--member_orders=rare,shuffled"], "got increasing and rare, shuffled"),
    ):  # fmt: skip
        assert main([*words, *more]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    pictures = load_dataset(f"features:{file}").with_changes(
        features=None, images=tuple(file for _ in range(240))
    )
    with pytest.raises(ValueError, match="model.freeze_backbone must be true, got false"):
        train_ensemble(pictures, tmp_path, replace(MODEL, freeze_backbone=False), SEARCH, QUICK,
                       ["rare"])  # fmt: skip
