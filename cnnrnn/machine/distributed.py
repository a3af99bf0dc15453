"""All communication between processes that train one model.

`torchrun` starts them and numbers them through the environment; only this module reads it.
Every process calls the same functions in the same order. If one ends in an error, torchrun stops
the others, and those that wait for it raise `LostProcessError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")

LONGEST_WAIT = timedelta(minutes=30)
"""A process that waits longer for the others gives up."""


class LostProcessError(RuntimeError):
    """Another process of the run ended, or did not answer."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as seen from one of them; by default it is the only one.

    Attributes:
        rank: number of this process; only number 0 writes and prints.
        size: how many there are.
        device: where this process computes, and where tensors are when they are sent.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch; parts differ by at most one image."""
        return batch.tensor_split(self.size)[self.rank]

    def deal(self, batches: Sequence[T]) -> Sequence[T]:
        """Return the whole batches that this process takes."""
        return batches[self.rank :: self.size]

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Add each number up over processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with _while_all_are_there():
            distributed.all_reduce(total)
        return [float(value) for value in total]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up gradients over processes; a gradient that no process has stays None."""
        if self.size == 1:
            return
        users = self.add([float(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, count in zip(parameters, users, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self._add_in_place(gradients)

    @torch.no_grad()
    def average_running_figures(self, module: nn.Module, weight: float) -> None:
        """Synchronise batch norm's running statistics: their mean, weighted by images.

        Args:
            module: whose batch norms ran in train mode.
            weight: this process's share of the step's images.
        """
        if self.size == 1:
            return
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        figures = [
            figure
            for norm in norms
            for figure in (norm.running_mean, norm.running_var)
            if figure is not None
        ]
        for figure in figures:
            figure.mul_(weight)
        self._add_in_place(figures)
        counts = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        if counts:
            most = torch.stack(counts)
            with _while_all_are_there():
                distributed.all_reduce(most, distributed.ReduceOp.MAX)
            for count, value in zip(counts, most, strict=True):
                count.copy_(value)

    def gather(self, rows: Tensor) -> Tensor:
        """Join the rows of all processes, in their order.

        Args:
            rows: [m, ...], with a different m in each process; without rows, any width will do.

        Returns:
            [M, ...] on the device of `rows`.
        """
        if self.size == 1:
            return rows
        shapes = torch.zeros(self.size, 4, dtype=torch.int64, device=self.device)
        shapes[self.rank, : rows.dim()] = torch.tensor(rows.shape)
        with _while_all_are_there():
            distributed.all_reduce(shapes)
        counts = shapes[:, 0].tolist()
        if not max(counts):
            return rows
        width = shapes[:, 1 : rows.dim()].amax(0).tolist()
        padded = torch.zeros(max(counts), *width, dtype=rows.dtype, device=self.device)
        if len(rows):
            padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with _while_all_are_there():
            distributed.all_gather(parts, padded)
        joined = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return joined.to(rows.device)

    def from_first(self, tensor: Tensor | None) -> Tensor:
        """Return process 0's tensor, on its device there and on the CPU elsewhere."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        kind, shape = self._object_from_first(
            (tensor.dtype, tuple(tensor.shape)) if self.first and tensor is not None else None
        )
        if tensor is not None and self.first:
            travelling = tensor.to(self.device).contiguous()
        else:
            travelling = torch.empty(shape, dtype=kind, device=self.device)
        with _while_all_are_there():
            distributed.broadcast(travelling, 0)
        return tensor if tensor is not None and self.first else travelling.cpu()

    def bytes_from_first(self, data: bytes) -> bytes:
        """Return process 0's bytes."""
        return data if self.size == 1 else bytes(self._object_from_first(data))

    def numbers_from_first(self, numbers: Sequence[float]) -> list[float]:
        """Return process 0's numbers, as many as every process has."""
        return list(map(float, numbers if self.size == 1 else self._object_from_first(numbers)))

    def first_says(self, condition: bool) -> bool:
        """Return whether a condition holds in process 0."""
        return self.numbers_from_first([condition]) == [1]

    def _object_from_first(self, value: Any) -> Any:
        box = [value]
        with _while_all_are_there():
            distributed.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    @torch.no_grad()
    def start_alike(self, module: nn.Module) -> None:
        """Give every process the weights and buffers of process 0."""
        if self.size == 1:
            return
        for tensor in module.state_dict().values():
            with _while_all_are_there():
                distributed.broadcast(tensor, 0)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Let process 0 run the block, such as a download, before the others do."""
        if not self.first:
            self._wait()
        yield
        if self.first:
            self._wait()

    def _wait(self) -> None:
        self.add([0.0])

    def _add_in_place(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _while_all_are_there():
            distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


ALONE = Ranks()


@contextmanager
def _while_all_are_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise LostProcessError(
            f"another process of this run ended or did not answer; see its own message ({reason})"
        ) from error


def started_by_torchrun() -> bool:
    """Tell whether torchrun started this process as one of several."""
    return distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def process_prefix() -> str:
    """Return a prefix for messages of this process; empty for the first, or a single one."""
    if not started_by_torchrun() or os.environ["RANK"] == "0":
        return ""
    return f"process {os.environ['RANK']}: "


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that torchrun started, if any, and leave it at the end.

    Args:
        device: `cpu` communicates through gloo; `cuda`, without a number, takes the GPU with this
            process's number on its machine and communicates through NCCL.

    Raises:
        ValueError: the device names one GPU for several processes, or the machine has too few.
    """
    if not started_by_torchrun():
        yield Ranks(device=device)
        return
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        if device.index is not None and here > 1:
            raise ValueError(
                f"device must be cuda without a number for {here} processes on a machine, got "
                f"{device}"
            )
        if device.index is None:
            if here > torch.cuda.device_count():
                raise ValueError(
                    f"nproc_per_node must be at most the {torch.cuda.device_count()} GPUs of this "
                    f"machine, got {here}"
                )
            device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT
    )
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    # Not after an error: leaving the group would wait for the others.
    distributed.destroy_process_group()
