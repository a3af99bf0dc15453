"""The kernels' shared inline maths, compiled alone: by the C++ compiler and by nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def run(command: list[str]) -> None:
    """Run a command that prints only where something is wrong."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{command[0]}:\n{result.stdout}{result.stderr}"


def test_maths_and_top_n_on_the_host(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "").split() or [shutil.which("c++") or ""]
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    program = str(tmp_path / "maths")
    source = str(HERE / "maths.cpp")
    run([*compiler, "-std=c++20", "-O2", "-pthread", f"-I{CSRC}", source, "-o", program])
    run([program])


def test_maths_and_top_n_under_nvcc(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    program = str(tmp_path / "maths")
    # sm_80 code, and its PTX for newer devices.
    options = ["-std=c++20", "-arch=sm_80", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    run([nvcc, *options, f"-I{CSRC}", str(HERE / "maths.cu"), "-o", program])
    if torch.cuda.is_available():
        run([program])
