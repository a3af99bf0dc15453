"""Atomic writing of files, and digests of weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `write` makes it in a temporary folder, from where it is moved.

    A folder, because safetensors writes a temporary file of its own beside its target.
    """
    folder = file.with_name(f".{file.name}.partial-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    try:
        write(folder / file.name)
        (folder / "mode").touch()  # safetensors' file is for the owner alone; the umask decides
        shutil.copymode(folder / "mode", folder / file.name)
        with open(folder / file.name, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(folder / file.name, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over names, types, shapes and values of weights, on any device."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
