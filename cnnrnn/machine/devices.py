"""Devices, cores and threads."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath

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
    """Return how many cores this process may use, by its affinity and its container's limit."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    limit = cgroup_cores()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def use_usable_cores() -> None:
    """Let torch have no more threads than cores; it knows nothing of a container's limit."""
    if torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """Return how many cores Linux's control groups leave this process; None without a limit.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # version 1, or version 2
        inner = PurePosixPath(group.lstrip("/"))  # seen from outside of a container: not there
        limits += [_cores_of_group(mount / part) for part in (inner, *inner.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def _cores_of_group(folder: Path) -> float | None:
    """Return the limit of a control group of version 2 or 1: time allowed over a period."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return None


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """Return the mixed-precision context: bf16 if requested, or on a GPU that supports it."""
    wanted = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)
