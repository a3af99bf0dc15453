"""Builds cnnrnn._C by running CMake with ninja, and pins the torch that it was built against."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

from build_backend import find_nvcc, require_compiler

ROOT = Path(__file__).resolve().parent

# What the extension is built against is also what it runs with: `_C` does not load beside another
# torch, so the requirement names the exact release and no other requirement can replace it.
DEPENDENCIES = ["numpy>=1.26", "pillow>=10.3", "filelock>=3.12", "platformdirs>=4",
                "safetensors>=0.4.3", "jsonargparse[signatures]>=4.40", "rich>=13"]  # fmt: skip


def torch_release() -> str | None:
    """Return the importable torch's release without a local label, such as 2.13.0."""
    if importlib.util.find_spec("torch") is None:
        return None
    from torch.version import __version__

    return str(__version__).split("+")[0]


def torch_requirement() -> str:
    """Return the torch requirement of the distribution."""
    release = torch_release()
    return f"torch=={release}" if release else "torch>=2.11"


def cuda_options() -> list[str]:
    """Return CMake's options for the CUDA search: built where nvcc is found."""
    nvcc = find_nvcc()
    if nvcc is None:
        return ["-DCNNRNN_CUDA=OFF"]
    options = ["-DCNNRNN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    architectures = os.environ.get("CNNRNN_CUDA_ARCHITECTURES")
    if architectures:
        options.append(f"-DCNNRNN_CUDA_ARCHITECTURES={architectures}")
    return options


class EmptyFolderBuild(build):
    """Builds in a folder of its own: a reused one brings deleted modules and a moved cache."""

    def initialize_options(self) -> None:
        """Make the folder; it goes when the process ends."""
        super().initialize_options()
        self._folder = tempfile.TemporaryDirectory(prefix="cnnrnn-build-")
        self.build_base = self._folder.name


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt for the one extension."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and put the module and its build record in the package."""
        release = torch_release()
        if release is None:
            sys.exit(
                "cnnrnn: building the extension needs torch>=2.11, and none is importable; "
                "run `pip install torch` first, or leave out --no-build-isolation"
            )
        if tuple(int(part) for part in release.split(".")[:2]) < (2, 11):
            sys.exit(
                f"cnnrnn: torch {release} is installed, 2.11 or later is needed; "
                "run `pip install --upgrade torch` and install again"
            )
        require_compiler()
        cmake, ninja = self._tool("cmake"), self._tool("ninja")
        from torch.utils.cpp_extension import include_paths, library_paths

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_folder = Path(self.build_temp).resolve() / "cmake"
        build_folder.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCNNRNN_TORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DCNNRNN_TORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            *cuda_options(),
        ]  # fmt: skip
        self._run(configure)
        self._run([cmake, "--build", str(build_folder)])
        about = '"""Written by the build: what cnnrnn._C was built against."""'
        record = f'{about}\n\nTORCH = "{release}"\n'
        (output.parent / "_build_info.py").write_text(record, encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """Put module and build record into the source tree, for an editable install."""
        super().copy_extensions_to_source()
        record = Path("cnnrnn", "_build_info.py")
        shutil.copy(self.build_lib / record, ROOT / record)

    def _tool(self, name: str) -> str:
        found = shutil.which(name)
        if found is None:
            sys.exit(
                f"cnnrnn: {name} was not found; run `pip install cmake ninja` and install again, "
                "or leave out --no-build-isolation"
            )
        return found

    def _run(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"cnnrnn: building the extension failed (exit status {error.returncode}); the "
                "compiler's own message stands above; where it is nvcc's, CNNRNN_CUDA=0 builds for "
                f"the CPU alone. Command: {' '.join(command)}"
            )


setup(
    ext_modules=[Extension("cnnrnn._C", sources=[])],
    cmdclass={"build": EmptyFolderBuild, "build_ext": CMakeBuild},
    install_requires=[torch_requirement(), *DEPENDENCIES],
)
