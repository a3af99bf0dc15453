"""One training stage of any model: batches, optimiser steps, validation, early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnrnn.config import TrainConfig
from cnnrnn.data import DataError
from cnnrnn.machine.devices import autocast
from cnnrnn.machine.distributed import Ranks
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.machine.words import listed
from cnnrnn.training.batches import Batch, Split
from cnnrnn.training.log import Log
from cnnrnn.training.optimizers import WeightAverage, copy_values, make_optimizer, make_scheduler
from cnnrnn.training.resume import STATE_FILE, ResumeError, TrainingState, require_int

SMALL_STEP = 1e9
"""Multiplications of a step on feature vectors, below which one thread on a CPU is the fastest.

The default head on vectors of 512 trains 1.4 times as fast as on two threads, which wait for each
other; beside other work, whose cores they want, up to four times.
"""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not finite; the weights are those before the step.

    Attributes:
        step: steps taken in the stage before it.
        records: names of the images at fault, or of the whole batch where none stands out.
    """

    def __init__(self, what: str, stage: str, epoch: int, step: int, records: list[str]) -> None:
        self.step = step
        self.records = records
        super().__init__(
            f"{what} is not finite in stage {stage}, epoch {epoch}, step {step}, on "
            f"{listed(records)}; the weights are those before this step. Lower learning_rate or "
            "clip_norm, or check these images"
        )


class Validation(NamedTuple):
    """Figures of one validation; the epoch with the largest merit is kept."""

    merit: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Stage:
    """What one stage trains, and on what.

    Attributes:
        name: for messages and the log.
        epochs: at most this many.
        module: trained, and restored to its best epoch.
        groups: parameter groups with their learning rates.
        loss: [B] losses of a batch.
        validate: measures the module, in eval mode.
        on_epoch: called after each epoch with its validation and whether it is the best so far.
        between_epochs: called between two epochs with the number done and the optimiser; may change
            the module. Returns True if the module changed: the best epoch, patience and the average
            of the weights are then reset.
    """

    name: str
    epochs: int
    module: nn.Module
    groups: list[dict[str, Any]]
    loss: Callable[[Batch], Tensor]
    validate: Callable[[], Validation]
    on_epoch: Callable[[Validation, bool], None] = lambda validation, best: None
    between_epochs: Callable[[int, torch.optim.Optimizer], bool] = lambda epoch, optimizer: False


@dataclass
class _Standing:
    """Where a stage stands between two epochs."""

    epoch: int = 0
    step: int = 0
    best: Validation | None = None
    best_epoch: int = 0
    best_values: list[Tensor] = field(default_factory=list)


def run_stage(
    stage: Stage,
    split: Split,
    config: TrainConfig,
    *,
    device: torch.device,
    generator: torch.Generator,
    log: Log,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    best: Validation | None = None,
    start: TrainingState | None = None,
    keep: Callable[[TrainingState], None] = lambda state: None,
) -> Validation:
    """Train until epochs or patience run out, then restore the best epoch.

    Args:
        stage: what to train.
        split: the training images.
        config: optimiser, batch size, patience, clipping, schedule and precision.
        device: where the module is.
        generator: draws the order of the images.
        log: gets one record per epoch.
        say: gets one line per epoch.
        progress: shows images/s and time left.
        best: validation of the module as it is, which an epoch must beat; None for no such bar.
        start: state of the same stage to resume from.
        keep: called after each epoch with the state to resume from, whose tensors will change.

    Returns:
        The best epoch's validation.

    Raises:
        NonFiniteLossError: before the step that would have spread it to the weights.
        DataError: the split is empty.
    """
    if not len(split):
        raise DataError(f"{split.dataset.source} has no training images left")
    parts = _Parts.of(stage, split, config)
    standing = _Standing(best=best)
    if best is not None:
        standing.best_values = parts.copied()
    if start is not None:
        try:
            standing = _restored(start, parts)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ResumeError(
                f"{STATE_FILE} does not fit its run: {type(error).__name__} {error}. Leave "
                "--resume out to start over"
            ) from error
    while standing.epoch < stage.epochs and (
        standing.epoch - standing.best_epoch < config.patience
    ):
        standing.epoch += 1
        loss, seen, seconds = _train_epoch(
            stage, split, config, parts, standing, device, generator, progress
        )
        stage.module.eval()
        with parts.averaged():
            validation = _agreed(stage.validate(), split.ranks)
            is_best = standing.best is None or validation.merit > standing.best.merit
            if is_best:
                standing.best, standing.best_epoch = validation, standing.epoch
                standing.best_values = parts.copied()
            log.write(
                {"stage": stage.name, "epoch": standing.epoch, "step": standing.step, "loss": loss,
                 "seconds": seconds, "images_per_second": seen / seconds,
                 "learning_rate": parts.optimizer.param_groups[0]["lr"], "best": is_best,
                 **validation.metrics}
            )  # fmt: skip
            say(_epoch_line(stage, standing.epoch, loss, seen / seconds, validation, is_best))
            stage.on_epoch(validation, is_best)
        if standing.epoch < stage.epochs and stage.between_epochs(standing.epoch, parts.optimizer):
            standing.best, standing.best_epoch, standing.best_values = None, standing.epoch, []
            if parts.average is not None:
                parts.average.updates = 0
        keep(_state(standing, parts))
    assert standing.best is not None
    copy_values(parts.changing, standing.best_values)
    stage.module.eval()
    return standing.best


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a stage works with.

    Attributes:
        changing: the tensors that it changes.
        optimizer: changes them.
        scheduler: of the learning rate, or None for a constant one.
        average: of those tensors, or None.
    """

    changing: list[Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    average: WeightAverage | None

    @classmethod
    def of(cls, stage: Stage, split: Split, config: TrainConfig) -> _Parts:
        """Make the parts of a new stage."""
        optimizer = make_optimizer(stage.groups, config)
        steps_per_epoch = math.ceil(math.ceil(len(split) / config.batch_size) / config.accumulate)
        scheduler = make_scheduler(optimizer, config, stage.epochs, steps_per_epoch)
        changing = _changing(stage, split)
        average = WeightAverage(changing, config.ema_decay) if config.ema_decay else None
        return cls(changing, optimizer, scheduler, average)

    def after_step(self) -> None:
        """Advance schedule and average after a step of the optimiser."""
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update()

    def averaged(self) -> AbstractContextManager[None]:
        """Hold the averages in the tensors within a `with` block."""
        return nullcontext() if self.average is None else self.average.in_place()

    def copied(self) -> list[Tensor]:
        """Return the tensors' values."""
        return [tensor.detach().clone() for tensor in self.changing]


def _train_epoch(
    stage: Stage,
    split: Split,
    config: TrainConfig,
    parts: _Parts,
    standing: _Standing,
    device: torch.device,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[float, int, float]:
    """Take the steps of an epoch; return the mean loss, how many images there were, and seconds."""
    began = time.perf_counter()
    stage.module.train()
    total, seen = 0.0, 0
    title = f"{stage.name} {standing.epoch}/{stage.epochs}"
    with progress(title, len(split)) as advance, _fitting_threads(stage, split, config, device):
        batches = split.batches(config, device, generator, config.augment)
        for group in _groups(batches, config.accumulate):
            loss_sum, images = _step(
                stage, group, parts.optimizer, split, config, standing.epoch, standing.step
            )
            if not images:
                continue
            parts.after_step()
            total += loss_sum
            seen += images
            standing.step += 1
            advance(images)
    if not seen:
        raise DataError(f"no training image of {split.dataset.source} can be read")
    return total / seen, seen, time.perf_counter() - began


@contextmanager
def _fitting_threads(
    stage: Stage, split: Split, config: TrainConfig, device: torch.device
) -> Iterator[None]:
    """Let torch compute the steps of a small head on one thread."""
    before = torch.get_num_threads()
    weights = sum(p.numel() for group in stage.groups for p in group["params"])
    steps = 1 + float(split.targets.sum(1).float().mean())  # of a path, END included
    small = weights * config.batch_size * steps < SMALL_STEP
    if device.type == "cpu" and split.features is not None and small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _state(standing: _Standing, parts: _Parts) -> TrainingState:
    average, scheduler = parts.average, parts.scheduler
    values: dict[str, Any] = {
        "epoch": standing.epoch,
        "step": standing.step,
        "best": standing.best,
        "best_epoch": standing.best_epoch,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "updates": None if average is None else average.updates,
    }
    lists = {"model": parts.changing, "best": standing.best_values}
    if average is not None:
        lists["average"] = average.values
    tensors = {f"{name}.{i}": t for name, kept in lists.items() for i, t in enumerate(kept)}
    kept = parts.optimizer.state_dict()
    values["groups"] = kept["param_groups"]
    values["optimizer"] = {}
    for number, entries in kept["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{number}.{name}"
            (tensors if isinstance(value, Tensor) else values["optimizer"])[key] = value
    return TrainingState(values, tensors)


def _restored(state: TrainingState, parts: _Parts) -> _Standing:
    """Restore what `_state` returned."""
    values, tensors = state
    for name in ("epoch", "step", "best_epoch"):
        require_int(values, name)
    changing, average = parts.changing, parts.average
    copy_values(changing, _of_shapes(tensors, "model", changing))
    if average is not None:
        copy_values(average.values, _of_shapes(tensors, "average", changing))
        average.updates = values["updates"]
    entries: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values["optimizer"]}.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            entries.setdefault(int(number), {})[name] = value
    parts.optimizer.load_state_dict({"state": entries, "param_groups": values["groups"]})
    for parameter, kept in parts.optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's {name} must be {list(parameter.shape)}, got "
                    f"{list(value.shape)}"
                )
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(values["scheduler"])
    best = values["best"]
    return _Standing(
        values["epoch"],
        values["step"],
        None if best is None else Validation(*best),
        values["best_epoch"],
        [t.to(changing[0].device) for t in _of_shapes(tensors, "best", changing)] if best else [],
    )


def _of_shapes(tensors: dict[str, Tensor], name: str, like: list[Tensor]) -> list[Tensor]:
    """Return the tensors of a list of `_state`, which must be of the shapes and types of others."""
    found = [tensors[f"{name}.{i}"] for i in range(len(like))]
    for i, (tensor, other) in enumerate(zip(found, like, strict=True)):
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise ValueError(
                f"{name}.{i} must be {list(other.shape)} of {other.dtype}, got "
                f"{list(tensor.shape)} of {tensor.dtype}"
            )
    return found


def _agreed(validation: Validation, ranks: Ranks) -> Validation:
    """Return process 0's figures, so that all processes decide alike."""
    numbers = ranks.numbers_from_first([validation.merit, *validation.metrics.values()])
    return Validation(numbers[0], dict(zip(validation.metrics, numbers[1:], strict=True)))


def _changing(stage: Stage, split: Split) -> list[Tensor]:
    """Return what a stage changes: its parameters, and buffers where it trains on images."""
    trained = {id(parameter) for group in stage.groups for parameter in group["params"]}
    tensors: list[Tensor] = [p for p in stage.module.parameters() if id(p) in trained]
    return tensors + (list(stage.module.buffers()) if split.features is None else [])


def _groups(batches: Iterator[Batch], size: int) -> Iterator[Iterator[Batch]]:
    """Group batches, each read when it is asked for; the last group may be smaller."""
    while (first := next(batches, None)) is not None:
        yield chain([first], islice(batches, size - 1))


def _step(
    stage: Stage,
    group: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    split: Split,
    config: TrainConfig,
    epoch: int,
    step: int,
) -> tuple[float, int]:
    """Take one optimiser step on a group of batches; return their summed loss and images.

    Processes add up what each finds in its share, and all take the same step, or none.
    """
    ranks = split.ranks
    # Batch norm's running figures change in the forward pass, before the loss is known.
    buffers = list(stage.module.buffers()) if split.features is None else []
    before = [buffer.clone() for buffer in buffers]
    optimizer.zero_grad(set_to_none=True)
    loss_sum, divisor = 0.0, 0
    records: list[Tensor] = []
    at_fault = torch.empty(0, dtype=torch.int64)
    for batch in group:
        divisor = divisor or batch.size
        records.append(batch.records)
        if not len(batch.records):
            continue
        with autocast(batch.inputs.device, config):
            losses = stage.loss(batch)
        if not losses.isfinite().all():
            at_fault = batch.records[(~losses.isfinite()).cpu()]
            break
        (losses.sum() / divisor).backward()
        loss_sum += float(losses.detach().sum())
    own = torch.cat(records)
    loss_sum, images, faults = ranks.add([loss_sum, len(own), len(at_fault)])
    if faults:
        copy_values(buffers, before)
        raise _non_finite("the loss", stage, epoch, step, ranks.gather(at_fault), split)
    if not images:
        return 0.0, 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.add_gradients(parameters)
    if images != divisor:  # the mean is over all images of the group
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= divisor / images
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    if not norm.isfinite():
        copy_values(buffers, before)
        raise _non_finite("the gradient", stage, epoch, step, ranks.gather(own), split)
    optimizer.step()
    if buffers:
        ranks.average_running_figures(stage.module, len(own) / images)
    return loss_sum, int(images)


def _non_finite(
    what: str, stage: Stage, epoch: int, step: int, records: Tensor, split: Split
) -> NonFiniteLossError:
    names = [split.dataset.record_name(int(record)) for record in records]
    return NonFiniteLossError(what, stage.name, epoch, step, names)


def _epoch_line(
    stage: Stage, epoch: int, loss: float, speed: float, validation: Validation, best: bool
) -> str:
    figures = "  ".join(f"{name} {value:.4f}" for name, value in validation.metrics.items())
    mark = "  *" if best else ""
    return f"{stage.name} {epoch:3d}  loss {loss:.4f}  {figures}  {speed:,.0f} images/s{mark}"
