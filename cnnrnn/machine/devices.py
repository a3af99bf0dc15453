"""Devices, cores and threads."""

from __future__ import annotations

import os
import re

import torch

from cnnrnn.config import TrainConfig

_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` names; `auto` is a GPU if there is one.

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
            f"device must exist, got {name!r}, torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def use_one_thread_if_forked() -> None:
    """Keep torch from waiting for its parent's threads, which a forked process does not have."""
    if _forked:
        torch.set_num_threads(1)


def has_bf16(device: torch.device) -> bool:
    """Whether a device has bfloat16 instructions."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """Return the mixed-precision context: bf16 if requested, or on a GPU that supports it."""
    wanted = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)
