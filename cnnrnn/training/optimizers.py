"""The optimiser that a config names, its schedule, and the average of what it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cnnrnn.config import TrainConfig


class WeightAverage:
    """An exponential moving average of changing tensors, not biased towards their first values.

    After step t the weight of step i's value is (1 - decay) decay^(t - i), divided by the sum of
    these weights over i = 1..t; so the first average is the first value.

    Args:
        tensors: read at each update. Integers are not averaged: their last value is kept.
        decay: of each step, below 1.

    Attributes:
        values: the averages, in the order of `tensors`.
        updates: how many there were.
    """

    def __init__(self, tensors: list[Tensor], decay: float) -> None:
        self.values = [tensor.detach().clone() for tensor in tensors]
        self.updates = 0
        self._tensors = [tensor.detach() for tensor in tensors]
        self._decay = decay

    def update(self) -> None:
        """Add the tensors' current values."""
        self.updates += 1
        weight = (1 - self._decay) / (1 - self._decay**self.updates)
        for average, tensor in zip(self.values, self._tensors, strict=True):
            if average.is_floating_point():
                average.lerp_(tensor, weight)
            else:
                average.copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Hold the averages in the tensors within a `with` block."""
        own = [tensor.clone() for tensor in self._tensors]
        copy_values(self._tensors, self.values)
        try:
            yield
        finally:
            copy_values(self._tensors, own)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, epochs: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the schedule of a stage, advanced at each step; None for a constant one."""
    steps = epochs * steps_per_epoch
    if config.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps + 1,
            cycle_momentum=config.optimizer == "adamw",  # RMSprop's momentum is an option
        )
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(
            optimizer, config.step_epochs * steps_per_epoch, config.step_factor
        )
    return None


def decoupled_rmsprop(
    groups: list[dict[str, Any]], decay: float, momentum: float
) -> torch.optim.RMSprop:
    """Return RMSprop with AdamW's weight decay: before a step w becomes (1 - rate * decay) w.

    As part of the gradient, decay is divided by the gradient's running size. The gradients of the
    paper's literal cell are products of three small gates: decay alone would move its weights, at
    the full learning rate, until they are 0.

    Args:
        groups: parameter groups with their learning rates.
        decay: of the weights that have a gradient.
        momentum: of the steps.
    """
    optimizer = torch.optim.RMSprop([{"decay": decay, **g} for g in groups], momentum=momentum)
    # Not a class with a step of its own: torch would call other hooks twice.
    optimizer.register_step_pre_hook(_decay_weights)
    return optimizer


@torch.no_grad()
def _decay_weights(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.mul_(1 - group["lr"] * group["decay"])


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser that the config names, over parameter groups."""
    if config.optimizer == "rmsprop":
        return decoupled_rmsprop(groups, config.weight_decay, config.momentum)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


@torch.no_grad()
def copy_values(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Put values into tensors of the same shapes."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
