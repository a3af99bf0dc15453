"""Refuses to go on where the compiled module is missing or was built against another torch.

A binary of another torch release fails with an undefined symbol, or worse; this module compares
releases before anything loads it, and says what to do.
"""

from __future__ import annotations

import importlib.util

import torch

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir ."


def release(version: str) -> str:
    """Return a torch version without its local label: 2.13.0+cpu -> 2.13.0."""
    return version.split("+")[0]


def problem() -> str | None:
    """Return what is wrong with the build, in one sentence with the cure, or None."""
    if importlib.util.find_spec("cnnrnn._build_info") is None:
        return (
            "cnnrnn's compiled module is missing: this is a source tree that was not installed; "
            "run `pip install .` (or `pip install -e .`) in it"
        )
    from cnnrnn._build_info import TORCH

    if TORCH != release(torch.__version__):
        return (
            f"cnnrnn was built against torch {TORCH}, but torch {torch.__version__} is installed; "
            f"build it again with `{REBUILD}` in its source folder, or install torch=={TORCH}"
        )
    return None


_problem = problem()
if _problem is not None:
    raise ImportError(_problem)
