"""Training: what is learned, written, logged, restored, and refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.data.splits import training_splits
from cnnrnn.machine.devices import resolve_device
from cnnrnn.machine.files import weights_digest
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.network.backbones import make_backbone
from cnnrnn.network.head import Head
from cnnrnn.prediction.decisions import calibrate
from cnnrnn.search.inference import Inference, infer
from cnnrnn.training.batches import Split
from cnnrnn.training.log import Log
from cnnrnn.training.loop import NonFiniteLossError, Stage, Validation, run_stage
from cnnrnn.training.optimizers import make_optimizer
from cnnrnn.training.run import train

MODEL = ModelConfig(trunk_dim=0, joint_dim=16, hidden_dim=16, input_dropout=0.0,
                    hidden_dropout=0.0, joint_dropout=0.0)  # fmt: skip
QUICK = TrainConfig(
    feature_rms=0.0,
    warm_epochs=2,
    epochs=3,
    batch_size=32,
    learning_rate=1e-2,
    device="cpu",
    ema_decay=0.0,
    finish_epochs=0,
)
SEARCH = SearchConfig(beam_size=4)
SMALL = replace(MODEL, backbone="small", pretrained=False, image_size=16, freeze_backbone=False)


def separable(path, count=300, splits=True):
    """Label j is present where feature j is positive; one label in four images, seldom none."""
    random = np.random.default_rng(0)
    labels = random.random((count, 5)) < [0.5, 0.2, 0.4, 0.3, 0.1]
    features = np.where(labels, 1.0, -1.0) + 0.1 * random.standard_normal((count, 5))
    arrays = {"features": features.astype(np.float32), "labels": labels,
              "label_names": np.array(["ant", "bee", "cat", "dog", "eel"])}  # fmt: skip
    if splits:
        arrays["split"] = np.array(["train"] * 7 + ["val"] * 2 + ["test"])[np.arange(count) % 10]
    np.savez(path, **arrays)
    return load_dataset(f"features:{path}")


@pytest.fixture
def data(tmp_path):
    return separable(tmp_path / "data.npz")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    pytest.importorskip("pycocotools")
    write_scenes(root, train=40, val=20, test=5, image_size=32)
    return root


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("chain_term", [False, True])
def test_a_separable_problem_is_learned(tmp_path, data, optimizer, chain_term):
    config = replace(QUICK, optimizer=optimizer, warm_epochs=4, epochs=12, weight_decay=1e-4,
                     learning_rate=2e-2 if optimizer == "adamw" else 3e-3)  # fmt: skip
    result = train(data, tmp_path / "run", replace(MODEL, chain_term=chain_term), SEARCH, config)
    losses = [r["loss"] for r in records(tmp_path / "run") if r["stage"] == "path"]
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics["path"]["O-F1"] > 0.95
    assert result.metrics["threshold"]["O-F1"] > 0.95
    test = data.split("test")
    model = load_checkpoint(tmp_path / "run")
    found = infer(model.head, torch.from_numpy(test.features), model.search).sets
    truth = model.label_space.from_source(test.label_matrix(), test.label_names)
    assert (found == truth).float().mean() > 0.97
    val = data.split("val")
    inference = infer(model.head, torch.from_numpy(val.features), model.search)
    truth = model.label_space.from_source(val.label_matrix(), val.label_names)
    # With the shrinkage that is best; what holds where labels are known comes on top.
    known = {"known_mix_weight": model.calibration.known_mix_weight}
    known["set_nll"] = model.calibration.set_nll
    assert model.calibration == replace(calibrate(inference, truth), **known)
    assert len(model.calibration.set_nll) > 50


def test_training_on_a_device(tmp_path, data, device):
    result = train(data, tmp_path / "run", MODEL, SEARCH, replace(QUICK, device=str(device)))
    assert result.model.device.type == device.type
    assert result.metrics["path"]["O-F1"] > 0.5


def test_what_is_written(tmp_path, data):
    lines = []
    result = train(data, tmp_path / "run", MODEL, SEARCH, QUICK, say=lines.append)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "best", "last", "log.jsonl", "state.safetensors", ".lock"
    }  # fmt: skip
    first, *epochs = records(tmp_path / "run")
    assert first["stage"] == "data"
    assert first["train_images"] == 210 and first["val_images"] == 60
    assert first["labels"] == 5 and first["labels_without_training_images"] == 0
    empty = int((data.split("train").label_matrix().sum(1) == 0).sum())
    assert first["train_images_without_labels"] == empty > 0
    assert [(r["stage"], r["epoch"]) for r in epochs] == [
        ("warm", 1), ("warm", 2), ("path", 1), ("path", 2), ("path", 3)
    ]  # fmt: skip
    assert [r["step"] for r in epochs] == [7, 14, 7, 14, 21]
    for record in epochs:
        assert record["loss"] > 0 and record["images_per_second"] > 0
        assert 0 <= record["O-F1"] <= 1 and isinstance(record["best"], bool)
    assert epochs[2]["best"]
    assert len(lines) == 6 and "train images 210" in lines[0]
    # Frequency order, counted on the training split.
    counts = dict(zip(data.label_names, data.split("train").label_counts(), strict=True))
    in_order = [counts[name] for name in result.model.labels]
    assert in_order == sorted(in_order, reverse=True)
    longest = int(data.split("train").label_matrix().sum(1).max())
    assert result.model.head.max_labels == first["longest_path"] == longest


def test_the_given_order_is_kept(tmp_path, data):
    config = replace(QUICK, label_order="given", epochs=1)
    assert train(data, tmp_path / "run", MODEL, SEARCH, config).model.labels == data.label_names


def digest(folder):
    """Of the trained weights; what the end of training counts is only in the best checkpoint."""
    state = load_checkpoint(folder).state_dict()
    return weights_digest((name, t) for name, t in state.items() if "cooccurrence" not in name)


def test_the_same_seed_gives_the_same_bits(tmp_path, data):
    model = replace(MODEL, joint_dropout=0.3, input_dropout=0.1)
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.rand(7)  # what was drawn before does not matter
        train(data, tmp_path / name, model, SEARCH, replace(QUICK, seed=seed))
    for part in ("best", "last"):
        assert digest(tmp_path / "one" / part) == digest(tmp_path / "two" / part)
        assert digest(tmp_path / "one" / part) != digest(tmp_path / "three" / part)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_seed_gives_the_same_bits_on_pictures(tmp_path, scenes, workers):
    pytest.importorskip("torchvision")
    config = replace(QUICK, warm_epochs=0, epochs=1, batch_size=16, workers=workers)
    for name in ("one", "two"):
        train(load_dataset(f"scenes:{scenes}"), tmp_path / name, SMALL, SEARCH, config)
    assert digest(tmp_path / "one" / "last") == digest(tmp_path / "two" / "last")


def test_the_backbone_learns_unless_frozen(tmp_path, scenes):
    data = load_dataset(f"scenes:{scenes}")
    config = replace(QUICK, warm_epochs=1, epochs=1, batch_size=16, augment=False)
    weights = []
    for frozen in (True, False):
        out = tmp_path / str(frozen)
        train(data, out, replace(SMALL, freeze_backbone=frozen), SEARCH, config)
        weights.append(load_checkpoint(out / "last").backbone.state_dict())
        assert (out / "features").is_dir() == frozen
    torch.manual_seed(config.seed)
    from cnnrnn.network.backbones import make_backbone

    initial = make_backbone(SMALL).state_dict()
    assert all(torch.equal(initial[name], weights[0][name]) for name in initial)
    assert not any(
        torch.equal(initial[name], weights[1][name]) for name in initial if "weight" in name
    )


def test_images_without_labels_are_kept_or_dropped(tmp_path, data):
    empty = int((data.split("train").label_matrix().sum(1) == 0).sum())
    kept, kept_val = training_splits(data, QUICK)
    dropped, dropped_val = training_splits(data, replace(QUICK, empty="drop"))
    assert (len(kept), len(dropped)) == (210, 210 - empty)
    assert int(dropped.label_matrix().sum(1).min()) > 0
    assert len(kept_val) == len(dropped_val) == 60
    train(data, tmp_path / "run", MODEL, SEARCH, replace(QUICK, empty="drop", epochs=1))
    assert records(tmp_path / "run")[0]["train_images"] == 210 - empty
    assert records(tmp_path / "run")[0]["train_images_without_labels"] == 0


def test_hold_out_where_there_is_no_val_split(tmp_path):
    data = separable(tmp_path / "all.npz", count=53, splits=False)
    first, held = training_splits(data, replace(QUICK, val_fraction=0.2))
    assert (len(first), len(held)) == (42, 11)
    assert sorted([*first.rows, *held.rows]) == list(range(53))
    again, held_again = training_splits(data, replace(QUICK, val_fraction=0.2))
    assert held_again.rows.tolist() == held.rows.tolist()
    _, other = training_splits(data, replace(QUICK, val_fraction=0.2, seed=1))
    assert other.rows.tolist() != held.rows.tolist()
    for fraction in (0.0, 0.001, 0.995):
        with pytest.raises(DataError, match="has no val split, and val_fraction .* of 53 training"):
            training_splits(data, replace(QUICK, val_fraction=fraction))


def test_a_source_without_training_images(tmp_path, data):
    with pytest.raises(DataError, match="has no split named train, only test, val"):
        training_splits(
            data.with_changes(splits={k: data.splits[k] for k in ("val", "test")}), QUICK
        )


def test_nothing_to_train(tmp_path, data):
    with pytest.raises(ValueError, match="nothing to train: epochs is 0"):
        train(data, tmp_path / "run", replace(MODEL, chain_term=False), SEARCH,
              replace(QUICK, epochs=0))  # fmt: skip


def test_the_warm_stage_alone(tmp_path, data):
    result = train(
        data,
        tmp_path / "run",
        MODEL,
        SEARCH,
        replace(QUICK, warm_epochs=8, epochs=0, learning_rate=0.1),
    )
    assert {r["stage"] for r in records(tmp_path / "run")} == {"data", "warm"}
    assert records(tmp_path / "run")[-1]["O-F1"] > 0.9  # of the chain term by itself
    assert result.metrics.keys() >= {"path", "threshold"}
    assert digest(tmp_path / "run" / "best") == digest(tmp_path / "run" / "last")


@pytest.mark.parametrize("frozen", [True, False])
def test_skipped_pictures_shift_no_labels(tmp_path, frozen):
    """Each picture is one flat colour that names its label; every third file is broken."""
    from PIL import Image

    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    paths, labels = [], []
    for i in range(60):
        paths.append(tmp_path / f"{i:02d}.png")
        Image.new("RGB", (16, 16), colours[i * i % 7 % 3]).save(paths[-1])
        if i % 3 == 1:
            paths[-1].write_bytes(paths[-1].read_bytes()[:40])
        labels.append(i * i % 7 % 3)
    splits = {"train": np.arange(40), "val": np.arange(40, 60)}
    data = Dataset.from_arrays("colours", ("red", "green", "blue"), np.arange(61),
                   np.array(labels, dtype=np.int32), splits, tuple(paths))  # fmt: skip
    config = replace(QUICK, warm_epochs=15, epochs=6, batch_size=8, augment=False)
    model = replace(SMALL, freeze_backbone=frozen)
    with pytest.raises(
        DataError, match=r"\d\d.png \(record \d+ of colours\) must be a readable image"
    ):
        train(data, tmp_path / "stops", model, SEARCH, config)
    with pytest.warns(UserWarning, match=r"of (40|20) images were left out, the first: .*png"):
        result = train(data, tmp_path / "run", model, SEARCH, replace(config, on_bad_image="skip"))
    assert result.metrics["path"]["images"] == 14 - (1 if 40 % 3 == 1 else 0)
    assert result.metrics["path"]["exact-match"] == 1.0
    good = [path for i, path in enumerate(paths) if i % 3 != 1]
    found = [p.labels for p in result.model.predict(good)]
    truth = [[data.label_names[x]] for i, x in enumerate(labels) if i % 3 != 1]
    assert found == truth


# Losses that are not finite


def stage_of(module, loss, **options):
    options = {"epochs": 2, "validate": lambda: Validation(0.0, {})} | options
    groups = [{"params": list(module.parameters()), "lr": 1e-2}]
    return Stage(name="path", module=module, groups=groups, loss=loss, **options)


def run(stage, split, config, out=None):
    return run_stage(stage, split, config, device=torch.device("cpu"),
                     generator=torch.Generator().manual_seed(0), log=Log(out))  # fmt: skip


def features_split(data):
    part = data.split("train")
    return Split(part, part.label_matrix(), torch.from_numpy(part.features))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_leaves_the_weights(data, where):
    module = nn.Linear(5, 1)
    seen = []

    def loss(batch):
        seen.append(batch.records)
        losses = module(batch.inputs)[:, 0]
        if len(seen) < 4:
            return losses
        before[:] = [p.detach().clone() for p in module.parameters()]
        if where == "gradient":
            return (losses - losses.detach()).abs().sqrt() + losses  # finite, slope infinite
        spoil = torch.zeros(len(losses))
        spoil[[0, 5]] = math.inf
        return losses + spoil

    before = []
    with pytest.raises(NonFiniteLossError) as error:
        run(stage_of(module, loss), features_split(data), QUICK)
    for now, then in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert error.value.step == 3
    part = data.split("train")
    at_fault = seen[3][[0, 5]] if where == "loss" else seen[3]
    assert error.value.records == [part.record_name(int(i)) for i in at_fault]
    message = str(error.value)
    assert f"the {where} is not finite in stage path, epoch 1, step 3, on row " in message
    assert message.count(".npz") == min(len(at_fault), 8)
    assert ("and 24 more" in message) == (where == "gradient")


def test_an_overflow_in_training_names_step_and_pictures(tmp_path, scenes):
    """Such a learning rate takes the first step's weights beyond what float32 can multiply."""
    data = load_dataset(f"scenes:{scenes}")
    config = replace(QUICK, warm_epochs=0, learning_rate=1e30, batch_size=16, augment=False)
    with pytest.raises(NonFiniteLossError) as error:
        train(data, tmp_path / "run", SMALL, SEARCH, config)
    assert "in stage path, epoch 1, step 1, on" in str(error.value)
    assert error.value.records
    known = {str(path) for path in data.split("train").image_paths}
    assert set(error.value.records) <= known
    assert not (tmp_path / "run" / "best").exists()


def test_running_figures_of_batch_norm_are_kept_as_well(scenes):
    data = load_dataset(f"scenes:{scenes}").split("train")
    from cnnrnn.config import Preprocessing

    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    calls, before = [], {}

    def loss(batch):
        calls.append(1)
        if len(calls) == 2:
            before.update({k: v.clone() for k, v in module.state_dict().items()})
            return module(batch.inputs * math.inf).mean((1, 2, 3))
        return module(batch.inputs).square().mean((1, 2, 3))

    split = Split(data, data.label_matrix(), None, Preprocessing(image_size=8))
    with pytest.raises(NonFiniteLossError):
        run(stage_of(module, loss), split, replace(QUICK, batch_size=8, augment=False))
    after = module.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_checkpoints_on_disk_survive_a_later_overflow(tmp_path, data, monkeypatch):
    """After two whole epochs a weight turns infinite: the third stops, the second's stay."""
    from cnnrnn.training import loop as fit

    steps = []
    make = fit.make_optimizer

    def sabotaged(groups, config):
        optimizer = make(groups, config)

        def spoil(*arguments):
            steps.append(1)
            if len(steps) == 2 * 7 + 3:
                with torch.no_grad():
                    groups[0]["params"][0][0, 0] = math.inf

        optimizer.register_step_post_hook(spoil)
        return optimizer

    monkeypatch.setattr(fit, "make_optimizer", sabotaged)
    config = replace(QUICK, warm_epochs=0, epochs=5)
    with pytest.raises(NonFiniteLossError) as error:
        train(data, tmp_path / "run", MODEL, SEARCH, config)
    assert error.value.step == 2 * 7 + 3
    assert "epoch 3" in str(error.value)
    assert [r["epoch"] for r in records(tmp_path / "run")[1:]] == [1, 2]
    for part in ("best", "last"):
        model = load_checkpoint(tmp_path / "run" / part)
        assert all(p.isfinite().all() for p in model.parameters())


# One stage


@pytest.mark.parametrize("patience", [1, 2, 10])
def test_early_stopping_restores_the_best_epoch(tmp_path, data, patience):
    merits = [0.1, 0.5, 0.4, 0.5, 0.3, 0.2]
    module = nn.Linear(5, 1)
    states, told = [], []

    def validate():
        assert not module.training
        states.append({k: v.clone() for k, v in module.state_dict().items()})
        return Validation(merits[len(states) - 1], {"merit": merits[len(states) - 1]})

    stage = stage_of(
        module, lambda batch: module(batch.inputs)[:, 0].square() + 0 * batch.targets.sum(),
        epochs=6, validate=validate, on_epoch=lambda v, best: told.append(best),
    )  # fmt: skip
    best = run(stage, features_split(data), replace(QUICK, patience=patience), tmp_path / "log")
    assert best.merit == 0.5
    assert len(states) == min(2 + patience, 6)
    assert told == [True, True, False, False, False, False][: len(states)]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0)
    assert not torch.equal(states[1]["weight"], states[-1]["weight"])
    assert not module.training


def test_best_and_last_are_those_epochs(tmp_path, data, monkeypatch):
    from cnnrnn.training import recipe

    merits = iter([0.2, 0.9, 0.1])
    real = recipe.path_validation
    monkeypatch.setattr(recipe, "path_validation", lambda *a: real(*a)._replace(merit=next(merits)))
    digests = []
    save = CNNRNN.save

    def recording(model, path):
        save(model, path)
        digests.append((path.name, digest(path)))

    monkeypatch.setattr(CNNRNN, "save", recording)
    train(data, tmp_path / "run", MODEL, SEARCH, QUICK)
    assert [name for name, _ in digests] == ["best", "last", "best", "last", "last", "best"]
    assert digest(tmp_path / "run" / "best") == digests[2][1] == digests[3][1] == digests[5][1]
    assert digest(tmp_path / "run" / "last") == digests[4][1] != digests[2][1]
    best, last = (load_checkpoint(tmp_path / "run" / name).head for name in ("best", "last"))
    assert best.cooccurrence is not None and last.cooccurrence is None


def test_clipping(data):
    for clip, expected in ((1e-3, 1e-3), (0.0, None), (1e6, None)):
        torch.manual_seed(0)
        module = nn.Linear(5, 1)
        norms = []

        def loss(batch, module=module):
            return 100 * module(batch.inputs)[:, 0].square()

        def look(parameters, norms=norms):
            norms.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))

        stage = stage_of(module, loss, epochs=1)
        parameters = list(module.parameters())
        hook = register_optimizer_step_pre_hook(
            lambda *_, parameters=parameters, look=look: look(parameters)
        )
        try:
            run(stage, features_split(data), replace(QUICK, clip_norm=clip))
        finally:
            hook.remove()
        assert len(norms) == 7
        if expected is None:
            assert max(norms) > 1
        else:
            assert max(norms) == pytest.approx(expected, rel=1e-3)


def test_optimisers():
    parameter = nn.Parameter(torch.zeros(1))
    groups = [{"params": [parameter], "lr": 0.3}]
    rmsprop = make_optimizer(groups, replace(QUICK, optimizer="rmsprop", momentum=0.7))
    assert isinstance(rmsprop, torch.optim.RMSprop)
    assert rmsprop.param_groups[0]["momentum"] == 0.7 and rmsprop.param_groups[0]["lr"] == 0.3
    adamw = make_optimizer([{"params": [parameter], "lr": 0.3}], replace(QUICK, weight_decay=0.25))
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_one_cycle_goes_up_and_down_to_nothing(data, optimizer):
    module = nn.Linear(5, 1)
    rates, momenta = [], []
    stage = stage_of(module, lambda batch: module(batch.inputs)[:, 0].square(), epochs=3)

    def look(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0].get("momentum"))

    hook = register_optimizer_step_pre_hook(look)
    try:
        run(stage, features_split(data),
            replace(QUICK, schedule="one_cycle", optimizer=optimizer, momentum=0.6))  # fmt: skip
    finally:
        hook.remove()
    assert len(rates) == 21
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(1e-2, rel=0.05) and rates[-1] < 1e-3 and rates[0] < 1e-3
    if optimizer == "rmsprop":
        assert set(momenta) == {0.6}


def test_one_cycle_of_a_single_step(tmp_path):
    data = separable(tmp_path / "few.npz", count=20)
    config = replace(QUICK, schedule="one_cycle", epochs=1, warm_epochs=1)
    train(data, tmp_path / "run", MODEL, SEARCH, config)


def test_no_images_left(data):
    nothing = data.select([])
    split = Split(nothing, nothing.label_matrix(), torch.zeros(0, 5))
    with pytest.raises(DataError, match="has no training images left"):
        run(stage_of(nn.Linear(5, 1), lambda batch: batch.inputs.sum(1)), split, QUICK)


def test_mixed_precision_trains(tmp_path, data):
    config = replace(QUICK, precision="bf16", epochs=10, warm_epochs=6)
    assert train(data, tmp_path / "run", MODEL, SEARCH, config).metrics["path"]["O-F1"] > 0.9
    model = load_checkpoint(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_log_has_no_nan(tmp_path):
    log = Log(tmp_path / "deep" / "log.jsonl")
    log.write({"a": math.nan, "b": math.inf, "c": 1, "d": "x"})
    log.write({"a": 0.5})
    assert [json.loads(line) for line in (tmp_path / "deep" / "log.jsonl").open()] == [
        {"a": None, "b": None, "c": 1, "d": "x"}, {"a": 0.5}
    ]  # fmt: skip
    Log(None).write({"a": 1})


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    for name in ("gpu", "", "meta", "mps", "cuda:", "cuda:-1", "cpu:7"):
        with pytest.raises(ValueError) as error:
            resolve_device(name)
        assert str(error.value) == f"device must be auto, cpu, cuda or cuda:N, got {name!r}"
    with pytest.raises(ValueError, match=r"device must exist, got 'cuda:99', torch sees \d+ CUDA"):
        resolve_device("cuda:99")


def counted(path, train_counts, test_counts):
    """A features file whose labels occur as often as asked in each split; val is like train."""
    rows = []
    for split, counts in (("train", train_counts), ("val", train_counts), ("test", test_counts)):
        labels = np.arange(max(counts))[:, None] < np.array(counts)
        rows.append((labels, np.array([split] * len(labels))))
    labels = np.concatenate([labels for labels, _ in rows])
    np.savez(
        path,
        features=np.where(labels, 1.0, -1.0).astype(np.float32),
        labels=labels,
        label_names=np.array(["a", "b", "c"]),
        split=np.concatenate([split for _, split in rows]),
    )
    return load_dataset(f"features:{path}")


def test_label_order_and_path_length_come_from_the_training_split_alone(tmp_path):
    data = counted(tmp_path / "f.npz", train_counts=[5, 20, 10], test_counts=[400, 100, 200])
    model = train(data, tmp_path / "run", MODEL, SEARCH, QUICK).model
    assert model.labels == ("b", "c", "a")
    assert model.label_space.source_index == (1, 2, 0)


def test_each_part_learns_at_its_own_rate(tmp_path):
    """Groups of every step, as (learning rate, parameters), in the order of the stages."""
    write_scenes(tmp_path / "scenes", train=8, val=4, test=1, image_size=32)
    data = load_dataset(f"scenes:{tmp_path / 'scenes'}")
    seen = []

    def record(optimizer, arguments, options):
        seen.append([(group["lr"], len(group["params"])) for group in optimizer.param_groups])

    hook = register_optimizer_step_pre_hook(record)
    config = replace(
        QUICK, warm_epochs=1, epochs=1, learning_rate=1e-3, warm_scale=0.5, backbone_scale=0.25,
        recurrent_scale=2.0,
    )  # fmt: skip
    try:
        train(data, tmp_path / "run", replace(SMALL, trunk_dim=8), SEARCH, config)
    finally:
        hook.remove()
    backbone = len(list(make_backbone(SMALL).parameters()))
    head = Head.from_config(replace(SMALL, trunk_dim=8), 26, 256)
    shared = 4  # weight and bias of trunk and label classifier
    assert seen[0] == [(1e-3, shared), (1e-3, backbone)]
    rest = len(list(head.parameters())) - shared - 1
    assert seen[-1] == [(1e-3, rest), (2e-3, 1), (0.5e-3, shared), (0.25e-3, backbone)]


def test_the_auxiliary_loss_has_its_weight(tmp_path):
    data = separable(tmp_path / "f.npz")
    losses = []
    for weight in (0.0, 1.0, 3.0):
        out = tmp_path / f"run-{weight}"
        config = replace(QUICK, warm_epochs=0, epochs=1, learning_rate=1e-12, aux_weight=weight)
        train(data, out, MODEL, SEARCH, config)
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append(records[-1]["loss"])
    auxiliary = losses[1] - losses[0]
    assert auxiliary > 0.5  # five labels of an untrained classifier, about log 2 each
    assert losses[2] - losses[0] == pytest.approx(3 * auxiliary, rel=1e-4)


def test_calibration_looks_at_every_validation_image():
    # The first image alone would cut at .9; all together cut between .3 and .2.
    marginals = torch.tensor([[0.9, 0.3], [0.3, 0.2], [0.2, 0.3], [0.3, 0.3]])
    targets = torch.tensor([[True, False], [True, False], [False, True], [True, True]])
    found = calibrate(Inference(targets, marginals, None, ()), targets)
    assert 0.2 < found.threshold <= 0.3
    assert found.mix_weight == 0.0


def test_options_that_cannot_work_are_refused_before_training(tmp_path):
    data = separable(tmp_path / "f.npz")
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="min_labels \\(100\\) must not exceed max_labels \\(5\\)"):
        train(data, out, MODEL, replace(SEARCH, min_labels=100), QUICK)
    with pytest.raises(ValueError, match="nothing to train"):
        train(data, out, replace(MODEL, chain_term=False), SEARCH, replace(QUICK, epochs=0))
    assert not (out / "log.jsonl").exists()


def test_a_backbone_frozen_with_random_weights_is_warned_about(tmp_path):
    write_scenes(tmp_path / "scenes", train=8, val=4, test=1, image_size=32)
    data = load_dataset(f"scenes:{tmp_path / 'scenes'}")
    frozen = replace(SMALL, freeze_backbone=True)
    with pytest.warns(UserWarning, match="backbone small is frozen with random weights"):
        train(data, tmp_path / "run", frozen, SEARCH, replace(QUICK, warm_epochs=0, epochs=1))


def test_the_last_stage_goes_on_from_the_best_epoch_at_a_lower_rate(tmp_path, data):
    rates = []

    def look(optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])

    hook = register_optimizer_step_pre_hook(look)
    config = replace(QUICK, warm_epochs=0, epochs=3, finish_epochs=2, finish_scale=0.25)
    try:
        train(data, tmp_path / "run", MODEL, SEARCH, config)
    finally:
        hook.remove()
    assert rates == [[1e-2] * 3] * 21 + [[2.5e-3] * 3] * 14
    stages = [r["stage"] for r in records(tmp_path / "run")[1:]]
    assert stages == ["path"] * 3 + ["finish"] * 2
    # Its first epoch has the best one of the stage before to beat.
    merits = [
        r["O-F1"] + r["mAP"] + r["path exact"] - 0.1 * r["NLL"]
        for r in records(tmp_path / "run")[1:]
    ]
    best = [r["best"] for r in records(tmp_path / "run")[1:]]
    assert best[3] == (merits[3] > max(merits[:3]))


def test_a_last_stage_that_finds_nothing_better_changes_nothing(tmp_path, data, monkeypatch):
    from cnnrnn.training import recipe

    real = recipe.path_validation
    merits = iter([0.1, 0.5, 0.4, 0.5, 0.2, 0.5])
    monkeypatch.setattr(recipe, "path_validation", lambda *a: real(*a)._replace(merit=next(merits)))
    config = replace(QUICK, warm_epochs=0, epochs=3, finish_epochs=3)
    train(data, tmp_path / "run", MODEL, SEARCH, config)
    assert [r["best"] for r in records(tmp_path / "run")[1:]] == [True, True] + [False] * 4
    merits = iter([0.1, 0.5])
    train(data, tmp_path / "two", MODEL, SEARCH, replace(config, epochs=2, finish_epochs=0))
    assert digest(tmp_path / "run" / "best") == digest(tmp_path / "two" / "best")


def test_the_chain_term_starts_at_the_labels_frequencies(tmp_path):
    data = counted(tmp_path / "f.npz", train_counts=[5, 20, 10], test_counts=[1, 1, 1])
    config = replace(QUICK, warm_epochs=0, epochs=1, learning_rate=1e-9)
    model = train(data, tmp_path / "run", MODEL, SEARCH, config).model
    shares = torch.tensor([20.5, 10.5, 5.5]) / 21  # of 20 images, in path order
    bias = model.head.label_classifier.bias.detach()
    torch.testing.assert_close(bias.sigmoid(), shares, rtol=1e-3, atol=1e-3)


def test_a_prepared_head_starts_as_it_was_prepared(tmp_path, data):
    def prepare(head):
        head.label_classifier.bias.data.fill_(3.0)
        head.label_classifier.bias.requires_grad_(False)

    config = replace(QUICK, warm_epochs=0, epochs=1)
    model = train(data, tmp_path / "run", MODEL, SEARCH, config, prepare_head=prepare).model
    assert model.head.label_classifier.bias.tolist() == [3.0] * 5


def test_what_a_run_without_epochs_lacks_is_said(tmp_path, data):
    with pytest.raises(ValueError, match="epochs is 0, and a warm stage needs .* got 0 and True"):
        train(data, tmp_path / "run", MODEL, SEARCH, replace(QUICK, warm_epochs=0, epochs=0))
