"""Options of the loop: schedules, averaged weights, accumulation, splits, TensorBoard."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cnnrnn import SearchConfig, TrainConfig, load_dataset
from cnnrnn.data import DataError
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.data.splits import training_splits
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.training.batches import Split
from cnnrnn.training.log import Log
from cnnrnn.training.loop import NonFiniteLossError, Stage, Validation, run_stage
from cnnrnn.training.optimizers import WeightAverage
from cnnrnn.training.run import train
from tests.training.test_training import MODEL, QUICK, SMALL, records, separable

SEARCH = SearchConfig(beam_size=2)


@pytest.fixture
def data(tmp_path):
    return separable(tmp_path / "data.npz")


def split_of(data, count=None):
    part = data.split("train")
    part = part.select(range(len(part) if count is None else count))
    return Split(part, part.label_matrix(), torch.from_numpy(part.features))


def linear_stage(epochs=1, **options):
    """A linear model with squared errors, the same weights each time."""
    torch.manual_seed(0)
    module = nn.Linear(5, 1)
    groups = [{"params": list(module.parameters()), "lr": 1e-2}]
    options = {"validate": lambda: Validation(0.0, {})} | options

    def loss(batch):
        return (module(batch.inputs)[:, 0] - batch.targets.sum(1)).square()

    return Stage("path", epochs, module, groups, loss, **options)


def run(stage, split, config):
    run_stage(stage, split, config, device=torch.device("cpu"),
              generator=torch.Generator().manual_seed(0), log=Log(None))  # fmt: skip
    return stage.module


def rates_of(stage, split, config):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        run(stage, split, config)
    finally:
        hook.remove()
    return rates


# Schedules


def test_cosine_goes_from_the_learning_rate_to_nothing(data):
    rates = rates_of(linear_stage(epochs=3), split_of(data), replace(QUICK, schedule="cosine"))
    expected = 1e-2 * (1 + np.cos(np.pi * np.arange(21) / 21)) / 2
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_multiplies_every_few_epochs(data, accumulate):
    config = replace(QUICK, schedule="step", step_epochs=2, step_factor=0.5, patience=9,
                     accumulate=accumulate)  # fmt: skip
    rates = rates_of(linear_stage(epochs=5), split_of(data), config)
    steps = [7, 4][accumulate - 1]
    expected = np.repeat(1e-2 * 0.5 ** np.array([0, 0, 1, 1, 2]), steps)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_schedule_ends_with_the_last_accumulated_step(data, schedule):
    config = replace(QUICK, schedule=schedule, accumulate=3)
    rates = rates_of(linear_stage(epochs=2), split_of(data), config)
    assert len(rates) == 6 and rates[-1] < 0.2 * max(rates)


# Averaged weights


def test_the_average_is_its_definition():
    values = torch.randn(9, 3, dtype=torch.float64)
    live, count = torch.zeros(3, dtype=torch.float64), torch.tensor(0)
    average = WeightAverage([live, count], 0.8)
    for step, value in enumerate(values, start=1):
        live.copy_(value)
        count.fill_(step)
        average.update()
        weights = 0.2 * 0.8 ** torch.arange(step - 1, -1, -1, dtype=torch.float64)
        expected = (weights[:, None] * values[:step]).sum(0) / weights.sum()
        torch.testing.assert_close(average.values[0], expected)
        assert int(average.values[1]) == step
    with average.in_place():
        torch.testing.assert_close(live, average.values[0], rtol=0, atol=0)
    torch.testing.assert_close(live, values[-1], rtol=0, atol=0)


def test_the_average_is_validated_and_kept_and_the_weights_go_on(data):
    """The optimiser's own path stays that of a run without; the result is an average of it."""
    split = split_of(data)
    trail, seen = [], []

    def look(optimizer, *_):
        trail.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    plain = linear_stage(epochs=3)
    hook = register_optimizer_step_pre_hook(look)
    run(plain, split, replace(QUICK, patience=9))
    own, trail = [*trail], []

    merits = iter([0.1, 0.9, 0.5])

    def validate():
        seen.append([p.detach().clone() for p in averaged.module.parameters()])
        return Validation(next(merits), {})

    averaged = linear_stage(epochs=3, validate=validate)
    try:
        run(averaged, split, replace(QUICK, ema_decay=0.9, patience=9))
    finally:
        hook.remove()
    for one, two in zip(own, trail, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    weights = 0.9 ** torch.arange(6, -1, -1)
    expected = sum(w * p[0] for w, p in zip(weights, own[1:8], strict=True)) / weights.sum()
    torch.testing.assert_close(seen[0][0], expected)
    torch.testing.assert_close(list(averaged.module.parameters()), seen[1], rtol=0, atol=0)


def test_a_short_run_with_a_long_average_is_sane(tmp_path, data):
    config = replace(QUICK, ema_decay=0.999, warm_epochs=4, epochs=10, learning_rate=2e-2)
    assert train(data, tmp_path / "run", MODEL, SEARCH, config).metrics["path"]["O-F1"] > 0.9


def test_running_figures_are_averaged_too(tmp_path):
    pytest.importorskip("pycocotools")
    write_scenes(tmp_path / "scenes", train=40, val=4, test=1, image_size=32)
    data = load_dataset(f"scenes:{tmp_path / 'scenes'}")
    config = replace(QUICK, warm_epochs=0, epochs=1, batch_size=8, augment=False, ema_decay=0.5)
    train(data, tmp_path / "run", SMALL, SEARCH, config)
    train(data, tmp_path / "plain", SMALL, SEARCH, replace(config, ema_decay=0.0))
    averaged, plain = (
        load_checkpoint(tmp_path / name / "last").backbone.state_dict() for name in ("run", "plain")
    )
    means = [name for name in plain if name.endswith("running_mean")]
    assert means
    assert not any(torch.equal(averaged[name], plain[name]) for name in means)
    counts = [name for name in plain if name.endswith("num_batches_tracked")]
    assert {int(averaged[name]) for name in counts} == {5}


# Accumulation


@pytest.mark.parametrize("count", [64, 70, 97])
def test_accumulated_batches_equal_a_big_one(data, count):
    """70 leaves a group of fewer images, 97 one with an incomplete batch: the mean is over all."""
    split = split_of(data, count)
    big = run(linear_stage(epochs=2), split, replace(QUICK, batch_size=32, clip_norm=0.3))
    small = run(linear_stage(epochs=2), split,
                replace(QUICK, batch_size=8, accumulate=4, clip_norm=0.3))  # fmt: skip
    torch.testing.assert_close(small.weight, big.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small.bias, big.bias, rtol=1e-5, atol=1e-6)
    other = run(linear_stage(epochs=2), split, replace(QUICK, batch_size=8, clip_norm=0.3))
    assert not torch.allclose(other.weight, big.weight, rtol=1e-3)


def test_accumulated_training_of_the_whole_model(tmp_path, data):
    config = replace(QUICK, epochs=2, warm_epochs=1)
    train(data, tmp_path / "big", MODEL, SEARCH, config)
    train(data, tmp_path / "small", MODEL, SEARCH, replace(config, batch_size=16, accumulate=2))
    big, small = (load_checkpoint(tmp_path / n / "last").state_dict() for n in ("big", "small"))
    for name, value in big.items():
        torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-5)
    assert [r["step"] for r in records(tmp_path / "small")[1:]] == [7, 7, 14]


def test_a_bad_loss_in_a_later_batch_of_a_step_leaves_the_weights(data):
    stage = linear_stage()
    calls = []

    def loss(batch):
        calls.append(batch.records)
        return stage.loss(batch) * (torch.inf if len(calls) == 6 else 1.0)

    spoiled = replace(stage, loss=loss)
    before = []
    hook = register_optimizer_step_pre_hook(lambda *_: before.append(1))
    try:
        with pytest.raises(NonFiniteLossError, match="step 1, on row") as error:
            run(spoiled, split_of(data), replace(QUICK, batch_size=8, accumulate=4))
    finally:
        hook.remove()
    assert len(before) == 1 and error.value.step == 1
    part = data.split("train")
    assert error.value.records == [part.record_name(int(i)) for i in calls[5]]


# Splits


def with_splits(data, **splits):
    return data.with_changes(splits={name: np.array(rows) for name, rows in splits.items()})


def test_named_splits(data):
    some = with_splits(data, train=range(50), more=range(40, 90), dev=range(90, 100), val=[100])
    training, val = training_splits(some, replace(QUICK, train_split="more", val_split="dev"))
    assert training.rows.tolist() == list(range(40, 90))
    assert val.rows.tolist() == list(range(90, 100))
    training, val = training_splits(some, replace(QUICK, val_split="dev"))
    assert (training.rows.tolist(), val.rows.tolist()) == (list(range(50)), list(range(90, 100)))
    training, val = training_splits(some, replace(QUICK, train_split="more"))
    assert (training.rows.tolist(), val.rows.tolist()) == (list(range(40, 90)), [100])


def test_trainval_holds_a_share_out(data):
    """As of VOC: val is a part of trainval."""
    voc = with_splits(data, train=range(60), val=range(60, 100), trainval=range(100))
    config = replace(QUICK, train_split="trainval", val_fraction=0.2)
    training, val = training_splits(voc, config)
    assert (len(training), len(val)) == (80, 20)
    assert sorted([*training.rows, *val.rows]) == list(range(100))
    assert not set(val.rows.tolist()) <= set(range(60, 100))
    with pytest.raises(DataError, match="has no val split apart from trainval, and val_fraction 0"):
        training_splits(voc, replace(config, val_fraction=0.0))


def test_training_and_validation_may_not_share_records(data):
    voc = with_splits(data, train=range(60), val=range(60, 100), trainval=range(100))
    config = replace(QUICK, train_split="trainval", val_split="val")
    message = "must differ, got 40 in both trainval and val of features:.*the first row 60 of"
    with pytest.raises(DataError, match=message):
        training_splits(voc, config)
    with pytest.raises(DataError, match="got 1 in both train and val"):
        training_splits(with_splits(data, train=[0, 1], val=[1, 2]), QUICK)
    with pytest.raises(DataError, match="got 1 in both all and dev"):
        training_splits(with_splits(data, all=[0, 1], dev=[1]), replace(QUICK, val_split="dev"))


def test_missing_and_empty_splits(data):
    some = with_splits(data, train=[0, 1], val=[2], empty=np.zeros(0, dtype=np.int64))
    for options in ({"train_split": "odd"}, {"val_split": "odd"}):
        with pytest.raises(DataError, match="has no split 'odd', expected one of: train, val"):
            training_splits(some, replace(QUICK, **options))
    with pytest.raises(DataError, match="the empty split of .* is empty; nothing to validate on"):
        training_splits(some, replace(QUICK, val_split="empty"))
    with pytest.raises(DataError, match="has no training images"):
        training_splits(some, replace(QUICK, train_split="empty"))


# TensorBoard


def test_tensorboard_gets_the_figures_of_the_log(tmp_path, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second run takes the place of the first
        train(data, tmp_path / "run", MODEL, SEARCH, replace(QUICK, tensorboard=True))
    for stage, epochs in (("warm", 2), ("path", 3)):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload()
        for name in ("loss", "O-F1", "mAP", "learning_rate", "images_per_second"):
            scalars = events.Scalars(name)
            logged = [r[name] for r in records(tmp_path / "run") if r["stage"] == stage]
            assert [s.step for s in scalars] == list(range(1, epochs + 1))
            np.testing.assert_allclose([s.value for s in scalars], logged, rtol=1e-6)


def test_tensorboard_without_its_extra(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cnnrnn\[tensorboard\]"'):
        train(data, tmp_path / "run", MODEL, SEARCH, replace(QUICK, tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of constant, one_cycle, cosine, step, got"),
        ({"step_epochs": 0}, "step_epochs must be at least 1, got 0"),
        ({"step_factor": 0.0}, r"step_factor must be in \(0, 1\], got 0.0"),
        ({"step_factor": 1.5}, r"step_factor must be in \(0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"train_split": "a", "val_split": "a"}, "val_split must be another split than train_spli"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
