"""PEP 517 backend: setuptools, building against the torch that the user already has.

pip builds in an isolated environment in which the user's torch is hidden. A binary compiled
against another torch would not load, so this backend looks for the user's torch from a fresh
interpreter, makes it importable for the build, and asks pip for one only when there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

from setuptools import build_meta

_FIND_TORCH = """
import importlib.util, os
spec = importlib.util.find_spec("torch")
print(os.path.dirname(os.path.dirname(spec.origin)) if spec and spec.origin else "")
"""


def _users_torch() -> str | None:
    """Return the folder that holds the user's torch package, or None."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    found = subprocess.run(
        [sys.executable, "-c", _FIND_TORCH],
        env=environment,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None


def _build_requirements() -> list[str]:
    return [] if _users_torch() else ["torch>=2.11"]


def _make_torch_importable() -> None:
    folder = _users_torch()
    if folder and folder not in sys.path:
        sys.path.append(folder)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return the requirements of a wheel build beyond pyproject.toml's."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _build_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return the requirements of an editable build beyond pyproject.toml's."""
    return build_meta.get_requires_for_build_editable(config_settings) + _build_requirements()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """Return the requirements of a source distribution beyond pyproject.toml's: none."""
    return build_meta.get_requires_for_build_sdist(config_settings)


def prepare_metadata_for_build_wheel(directory: str, config_settings: Any = None) -> str:
    """Write the wheel's metadata, which names the torch built against."""
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Any = None) -> str:
    """Write the editable wheel's metadata, which names the torch built against."""
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(directory: str, config_settings: Any = None, metadata: Any = None) -> str:
    """Build a wheel."""
    _make_torch_importable()
    return build_meta.build_wheel(directory, config_settings, metadata)


def build_editable(directory: str, config_settings: Any = None, metadata: Any = None) -> str:
    """Build an editable wheel."""
    _make_torch_importable()
    return build_meta.build_editable(directory, config_settings, metadata)


def build_sdist(directory: str, config_settings: Any = None) -> str:
    """Build a source distribution."""
    return build_meta.build_sdist(directory, config_settings)
