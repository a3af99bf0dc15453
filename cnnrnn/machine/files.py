"""Atomic writing of files, errors that name them, and digests of weights."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def write_whole(file: Path, write: Callable[[Path], object], *, mode: int | None = None) -> None:
    """Write a file atomically: `write` makes it in a temporary folder, from where it is moved.

    A folder, because safetensors writes a temporary file of its own beside its target.

    Args:
        file: where it is in the end.
        write: is called with the file to make.
        mode: the file's permission bits; None takes those of any new file.

    Raises:
        OSError: with the file's name; what was there before still is.
    """
    folder = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with writing(file):
            folder.mkdir(exist_ok=True)
            write(folder / file.name)
            (folder / "mode").touch()  # safetensors' file is for the owner alone; the umask decides
            shutil.copymode(folder / "mode", folder / file.name)
            if mode is not None:
                os.chmod(folder / file.name, mode)
            with open(folder / file.name, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(folder / file.name, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Name what is written in the errors that the system has with it.

    Python's name a file that cannot be opened, but not one whose disk is full; safetensors' are of
    a type of its own.

    Raises:
        OSError: with its name as `filename`.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(what)) from error
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(what)) from error


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content."""
    import hashlib

    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over names, types, shapes and values of weights, on any device."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        if value.numel():
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
