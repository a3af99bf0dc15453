"""One training stage: batches, optimiser steps, validation, early stopping. Knows no model."""

from __future__ import annotations

import copy
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnrnn.config import Preprocessing, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.images import image_batches, normalize
from cnnrnn.progress import Progress, no_progress


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not finite; the weights are those before the step.

    Attributes:
        step: steps taken in the stage before it.
        records: names of the images at fault, or of the whole batch where none stands out.
    """

    def __init__(self, what: str, stage: str, epoch: int, step: int, records: list[str]) -> None:
        self.step = step
        self.records = records
        shown = ", ".join(records[:8]) + (
            f" and {len(records) - 8} more" if len(records) > 8 else ""
        )
        super().__init__(
            f"{what} is not finite in stage {stage}, epoch {epoch}, step {step}, on {shown}; "
            "the weights are those before this step. Lower learning_rate or clip_norm, or check "
            "these images"
        )


class Batch(NamedTuple):
    """Inputs [B, F] or normalised images [B, 3, S, S], targets [B, L] bool, records [B]."""

    inputs: Tensor
    targets: Tensor
    records: Tensor


@dataclass(frozen=True)
class Split:
    """The images or features of one split with their label sets in path order.

    Attributes:
        dataset: names records, and reads pictures where `features` is None.
        targets: [n, L] bool, columns in path order.
        features: [n, F] float32, or None to read pictures.
        preprocessing: of the pictures.
    """

    dataset: Dataset
    targets: Tensor
    features: Tensor | None
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self,
        config: TrainConfig,
        device: torch.device,
        generator: torch.Generator | None,
        augment: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the split once, shuffled by `generator` or in order without one."""
        if self.features is not None:
            order = torch.arange(len(self))
            if generator is not None:
                order = torch.randperm(len(self), generator=generator)
            for part in order.split(config.batch_size) if len(self) else ():
                yield Batch(self.features[part].to(device), self.targets[part].to(device), part)
            return
        assert self.preprocessing is not None
        for images in image_batches(
            self.dataset,
            self.preprocessing,
            batch_size=config.batch_size,
            workers=config.workers,
            augment=augment,
            shuffle_generator=generator,
            on_bad_image=config.on_bad_image,
        ):
            inputs = normalize(images.images.to(device), self.preprocessing)
            yield Batch(inputs, self.targets[images.indices].to(device), images.indices)


class Log:
    """A JSONL file, one record per line, flushed at every line; None writes nothing."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers that are not finite become null."""
        if self.file is None:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(clean) + "\n")


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
        between_epochs: called with the epochs done, where another follows, and the optimiser; may
            change the module, and says with True that it is another one now: the best epoch and
            patience begin anew.
    """

    name: str
    epochs: int
    module: nn.Module
    groups: list[dict[str, Any]]
    loss: Callable[[Batch], Tensor]
    validate: Callable[[], Validation]
    on_epoch: Callable[[Validation, bool], None] = lambda validation, best: None
    between_epochs: Callable[[int, torch.optim.Optimizer], bool] = lambda epoch, optimizer: False


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
) -> Validation:
    """Train until the epochs are over or patience is, and restore the best epoch.

    Args:
        stage: what to train.
        split: the training images.
        config: optimiser, batch size, patience, clipping, schedule and precision.
        device: where the module is.
        generator: draws the order of the images.
        log: gets one record per epoch.
        say: gets one line per epoch.
        progress: shows images/s and time left.

    Returns:
        The best epoch's validation.

    Raises:
        NonFiniteLossError: before the step that would have spread it to the weights.
        DataError: the split is empty.
    """
    if not len(split):
        raise DataError(f"{split.dataset.source} has no training images left")
    optimizer = make_optimizer(stage.groups, config)
    steps = stage.epochs * math.ceil(len(split) / config.batch_size)
    scheduler = None
    if config.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            peaks,
            total_steps=steps + 1,
            cycle_momentum=config.optimizer == "adamw",  # RMSprop's momentum is an option
        )
    best: Validation | None = None
    best_epoch, step = 0, 0
    best_state: dict[str, Any] = {}
    for epoch in range(1, stage.epochs + 1):
        began = time.perf_counter()
        stage.module.train()
        total, seen = 0.0, 0
        with progress(f"{stage.name} {epoch}/{stage.epochs}", len(split)) as advance:
            for batch in split.batches(config, device, generator, config.augment):
                total += _step(stage, batch, optimizer, split, config, epoch, step)
                if scheduler is not None:
                    scheduler.step()
                seen += len(batch.records)
                step += 1
                advance(len(batch.records))
        seconds = time.perf_counter() - began
        stage.module.eval()
        validation = stage.validate()
        is_best = best is None or validation.merit > best.merit
        if is_best:
            best, best_epoch = validation, epoch
            best_state = copy.deepcopy(stage.module.state_dict())
        loss = total / max(seen, 1)
        log.write(
            {"stage": stage.name, "epoch": epoch, "step": step, "loss": loss, "seconds": seconds,
             "images_per_second": seen / seconds, "learning_rate": optimizer.param_groups[0]["lr"],
             "best": is_best, **validation.metrics}
        )  # fmt: skip
        say(_epoch_line(stage, epoch, loss, seen / seconds, validation, is_best))
        stage.on_epoch(validation, is_best)
        if epoch < stage.epochs and stage.between_epochs(epoch, optimizer):
            best, best_epoch = None, epoch
        if epoch - best_epoch >= config.patience:
            break
    assert best is not None
    stage.module.load_state_dict(best_state)
    stage.module.eval()
    return best


def _step(
    stage: Stage,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    split: Split,
    config: TrainConfig,
    epoch: int,
    step: int,
) -> float:
    """Take one optimiser step; return the summed loss of the batch."""
    # Batch norm's running figures change in the forward pass, before the loss is known.
    buffers = list(stage.module.buffers()) if split.features is None else []
    before = [buffer.clone() for buffer in buffers]
    with autocast(batch.inputs.device, config):
        losses = stage.loss(batch)
    if not losses.isfinite().all():
        _restore(buffers, before)
        at_fault = batch.records[(~losses.isfinite()).cpu()]
        raise _non_finite("the loss", stage, epoch, step, at_fault, split)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    if not norm.isfinite():
        _restore(buffers, before)
        raise _non_finite("the gradient", stage, epoch, step, batch.records, split)
    optimizer.step()
    return float(losses.detach().sum())


def _restore(buffers: list[Tensor], before: list[Tensor]) -> None:
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _non_finite(
    what: str, stage: Stage, epoch: int, step: int, records: Tensor, split: Split
) -> NonFiniteLossError:
    names = [split.dataset.record_name(int(record)) for record in records]
    return NonFiniteLossError(what, stage.name, epoch, step, names)


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser that the config names, over parameter groups."""
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """Return the mixed-precision context: bf16 where asked for, or on a GPU that has it."""
    wanted = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` names; `auto` is a GPU where there is one.

    Raises:
        ValueError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} was asked for, torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _epoch_line(
    stage: Stage, epoch: int, loss: float, speed: float, validation: Validation, best: bool
) -> str:
    figures = "  ".join(f"{name} {value:.4f}" for name, value in validation.metrics.items())
    mark = "  *" if best else ""
    return f"{stage.name} {epoch:3d}  loss {loss:.4f}  {figures}  {speed:,.0f} images/s{mark}"
