"""PEP 517 backend: setuptools, building against the torch that the user already has.

pip builds in an isolated environment in which the user's torch is hidden. A binary compiled
against another torch would not load, so this backend looks for the user's torch from a fresh
interpreter, makes it importable for the build, and asks pip for one only when there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    import setuptools
    from setuptools import build_meta
except ModuleNotFoundError:
    sys.exit(
        'cnnrnn: setuptools is not installed; run `pip install "setuptools>=77" cmake ninja` '
        "first, or leave out --no-build-isolation"
    )
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"cnnrnn: setuptools {setuptools.__version__} is installed, 77 or later is needed; run "
        "`pip install --upgrade setuptools` first, or leave out --no-build-isolation"
    )

COMPILERS = ("c++", "g++", "clang++")
CUDA_HOME = "/usr/local/cuda"

# The path goes out last and as bytes: a .pth file may print, and a path may be in any encoding.
_FIND_TORCH = """
import importlib.util, os, sys
spec = importlib.util.find_spec("torch")
sys.stdout.flush()
if spec and spec.origin:
    sys.stdout.buffer.write(b"\\n" + os.fsencode(os.path.dirname(os.path.dirname(spec.origin))))
"""

# What pip sets to hide the user's packages from the build.
_ISOLATION = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")


def require_compiler() -> None:
    """Exit with a sentence where a compiler that is needed or Python's headers are missing."""
    find_nvcc()
    if os.name == "nt":
        return  # CMake finds Visual Studio's compiler by other means than PATH
    named = os.environ.get("CXX", "").split()
    if named and not shutil.which(named[0]):
        sys.exit(
            f"cnnrnn: the C++ compiler that CXX names, {named[0]}, was not found; install it or "
            "unset CXX, and install again"
        )
    if not named and not any(shutil.which(name) for name in COMPILERS):
        sys.exit(
            f"cnnrnn: no C++ compiler was found (looked for {', '.join(COMPILERS)}); install one, "
            "on Debian or Ubuntu with `sudo apt install g++`, and install again"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        sys.exit(
            f"cnnrnn: Python's C headers were not found ({header} is missing); install them, on "
            "Debian or Ubuntu with `sudo apt install python3-dev`, and install again"
        )


def find_nvcc() -> str | None:
    """Return CUDA's compiler, or None to build for the CPU alone; exit where it must be there.

    The environment's CNNRNN_CUDA decides: 0 builds for the CPU alone, 1 with CUDA or not at all;
    where it is not set, CUDA is built where nvcc is found.
    """
    wanted = os.environ.get("CNNRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(
            "cnnrnn: CNNRNN_CUDA must be 0 (build for the CPU alone) or 1 (with CUDA), or not be "
            f"set (with CUDA where nvcc is found), got {wanted!r}"
        )
    if wanted == "0":
        return None
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + [CUDA_HOME]
    places = [named or "nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    found = next((path for place in places if (path := shutil.which(place))), None)
    if found is None and wanted == "1":
        sys.exit(
            "cnnrnn: CNNRNN_CUDA=1 asks for the CUDA search, and nvcc was not found (looked for "
            f"{', '.join(places)}); install the CUDA toolkit, name its nvcc in CUDACXX, or unset "
            "CNNRNN_CUDA"
        )
    return found


def _users_torch() -> str | None:
    """Return the folder that holds the user's torch package, or None."""
    environment = {k: v for k, v in os.environ.items() if k not in _ISOLATION}
    # -P: a torch.py in the current folder is not the user's torch.
    command = [sys.executable, "-P", "-c", _FIND_TORCH]
    found = subprocess.run(command, env=environment, capture_output=True, check=True)
    return os.fsdecode(found.stdout.rpartition(b"\n")[2]) or None


def _build_requirements() -> list[str]:
    return [] if _users_torch() else ["torch>=2.11"]


def _make_torch_importable() -> None:
    folder = _users_torch()
    if folder and folder not in sys.path:
        sys.path.append(folder)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return the requirements of a wheel build beyond pyproject.toml's."""
    require_compiler()  # before pip downloads anything for the build
    return build_meta.get_requires_for_build_wheel(config_settings) + _build_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return the requirements of an editable build beyond pyproject.toml's."""
    require_compiler()  # before pip downloads anything for the build
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
