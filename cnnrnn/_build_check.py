"""Refuses to go on where the compiled module is missing or was built against another torch.

A binary of another torch release fails with an undefined symbol, or worse; this module compares
releases before anything loads it, and says what to do.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

import torch

BUILT = ("_build_info", "_C")


def release(version: str) -> str:
    """Return a torch version without its local label: 2.13.0+cpu -> 2.13.0."""
    return version.split("+")[0]


def problem() -> str | None:
    """Return what is wrong with the build, in one sentence with the cure, or None."""
    package = Path(__file__).resolve().parent
    source = package.parent
    in_source_tree = (source / "build_backend.py").is_file()
    rebuild = (
        f'`pip install -e "{source}"`'
        if in_source_tree
        else "`pip install --force-reinstall --no-deps --no-cache-dir .` in cnnrnn's source folder"
    )
    # Asked of this folder alone: an editable install of another source tree answers for its own.
    if any(PathFinder.find_spec(f"cnnrnn.{m}", [str(package)]) is None for m in BUILT):
        return (
            f"cnnrnn's compiled module for this Python is missing from {package}; "
            + ("this is a source tree that was not installed: " if in_source_tree else "")
            + f"run {rebuild}"
        )
    from cnnrnn._build_info import TORCH

    if TORCH != release(torch.__version__):
        return (
            f"cnnrnn was built against torch {TORCH}, but torch {torch.__version__} is installed; "
            f"run {rebuild} to build it again, or `pip install torch=={TORCH}`"
        )
    return None


_problem = problem()
if _problem is not None:
    raise ImportError(_problem)
