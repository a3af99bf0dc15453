"""The build, the install and the import; nothing here reaches the network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cnnrnn
from cnnrnn import _build_check, _build_info

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "build_backend.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml",
           "README.md", "LICENSE", "csrc", "cnnrnn")  # fmt: skip
BUILD = ("setup.py", "-q", "build_ext")
UNSET = ("CXX", "PYTHONPATH", "CNNRNN_CUDA", "CUDACXX")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a folder, with changes to the environment."""
    unset = {k: v for k, v in os.environ.items() if k not in UNSET}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=unset | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree that was never built, in a folder with an awkward name."""
    copy = tmp_path / "söurce tree"
    copy.mkdir()
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_build_info.py")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=built)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    return copy


def put_torch(folder: Path, version: str) -> None:
    """Write a package that answers to the name of torch, and to nothing else."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")
    (package / "version.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")


def put_command(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (folder / name).chmod(0o755)


# Import


def test_import_is_fast_and_light(tmp_path: Path) -> None:
    program = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import cnnrnn
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""
    seconds = []
    for _ in range(5):
        result = python("-c", program, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        second, modules = json.loads(result.stdout)
        seconds.append(second)
    assert statistics.median(seconds) <= 0.15
    loaded = {name.partition(".")[0] for name in modules}
    extras = {"torchvision", "timm", "pycocotools", "defusedxml", "sklearn"}
    assert not loaded & (extras | {"rich", "jsonargparse", "PIL"})


def test_type_information_is_installed() -> None:
    assert Path(cnnrnn.__file__).with_name("py.typed").is_file()


# The torch built against


def test_build_record_names_the_torch_in_use() -> None:
    assert _build_info.TORCH == _build_check.release(torch.__version__)
    assert _build_check.problem() is None


def test_metadata_pins_the_torch_built_against() -> None:
    # A .egg-info beside the source is no installation.
    installed = [
        distribution
        for distribution in importlib.metadata.distributions(name="cnnrnn")
        if distribution.read_text("METADATA") is not None
    ]
    assert len(installed) == 1
    requirements = installed[0].requires or []
    assert [r for r in requirements if r.startswith("torch") and "extra" not in r] == [
        f"torch=={_build_info.TORCH}"
    ]


def test_another_torch_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build_info, "TORCH", "0.1.0")
    problem = _build_check.problem()
    assert problem is not None
    assert f"built against torch 0.1.0, but torch {torch.__version__} is installed" in problem
    assert "`pip install " in problem and "\n" not in problem


def test_another_torch_stops_the_import_before_the_module_loads(source: Path) -> None:
    put_torch(source, "2.99.0+cpu")
    (source / "cnnrnn" / "_build_info.py").write_text('TORCH = "2.13.0"\n', encoding="utf-8")
    (source / "cnnrnn" / "_C.py").write_text('print("loaded")\n', encoding="utf-8")
    result = python("-c", "import cnnrnn; import cnnrnn._C", cwd=source)
    assert result.returncode != 0 and result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: cnnrnn was built against torch 2.13.0, but torch 2.99.0+cpu is installed; "
        f'run `pip install -e "{source.resolve()}"`'
    )


@pytest.mark.parametrize("built", [[], ["_build_info.py"], ["_C.py"]])
def test_an_unbuilt_source_tree_says_so(built: list[str], source: Path) -> None:
    put_torch(source, "2.13.0")
    for name in built:
        (source / "cnnrnn" / name).write_text('TORCH = "2.13.0"\n', encoding="utf-8")
    result = python("-c", "import cnnrnn", cwd=source)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: cnnrnn's compiled module for this Python is missing")
    assert f'not installed: run `pip install -e "{source.resolve()}"`' in last


# What stops a build


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence that a failed build ends with."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_no_compiler(source: Path, tmp_path: Path) -> None:
    put_torch(source, "2.13.0+cpu")
    said = refusal(python(*BUILD, cwd=source, PATH=str(tmp_path)))
    assert said.startswith("cnnrnn: no C++ compiler was found") and "apt install g++" in said


def test_the_compiler_that_cxx_names_is_missing(source: Path) -> None:
    put_torch(source, "2.13.0+cpu")
    said = refusal(python(*BUILD, cwd=source, CXX="no-such-compiler -O2"))
    assert "CXX names, no-such-compiler, was not found" in said and "unset CXX" in said


def test_no_compiler_is_said_before_anything_is_downloaded(source: Path, tmp_path: Path) -> None:
    program = "import build_backend; build_backend.get_requires_for_build_wheel()"
    said = refusal(python("-c", program, cwd=source, PATH=str(tmp_path)))
    assert said.startswith("cnnrnn: no C++ compiler was found")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in compiler is a shell script")
def test_no_cmake(source: Path, tmp_path: Path) -> None:
    put_torch(source, "2.13.0+cpu")
    put_command(tmp_path / "bin", "c++")
    said = refusal(python(*BUILD, cwd=source, PATH=str(tmp_path / "bin")))
    assert said.startswith("cnnrnn: cmake was not found; run `pip install cmake ninja`")


def test_a_cuda_build_that_was_asked_for_needs_nvcc(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CNNRNN_CUDA", "1")
    monkeypatch.setenv("CUDACXX", "no-nvcc")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="CNNRNN_CUDA=1 asks for the CUDA search, and nvcc was "
                                         "not found .*no-nvcc.* unset CNNRNN_CUDA"):  # fmt: skip
        backend.get_requires_for_build_wheel()


def test_cnnrnn_cuda_is_0_or_1(source: Path) -> None:
    put_torch(source, "2.13.0+cpu")
    said = refusal(python(*BUILD, cwd=source, CNNRNN_CUDA="yes"))
    assert said.startswith("cnnrnn: CNNRNN_CUDA must be 0 ") and said.endswith("got 'yes'")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in compiler is a shell script")
@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, "nvcc"), ({"CNNRNN_CUDA": "1"}, "nvcc"), ({"CNNRNN_CUDA": "0"}, None),
     ({"CUDACXX": "other-nvcc"}, "other-nvcc"), ({"PATH": ""}, None)],
)  # fmt: skip
def test_cuda_is_built_where_nvcc_is_found(
    environment: dict[str, str], found: str | None, backend: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    put_command(tmp_path / "bin", "nvcc")
    put_command(tmp_path / "bin", "other-nvcc")
    monkeypatch.setattr(backend, "CUDA_HOME", str(tmp_path / "nothing"))
    for name in ("CNNRNN_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = backend.find_nvcc()
    assert path == (None if found is None else str(tmp_path / "bin" / found))


def test_no_torch(source: Path) -> None:
    program = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = {list(BUILD)!r}
runpy.run_path("setup.py", run_name="__main__")
"""
    said = refusal(python("-c", program, cwd=source))
    assert "needs torch>=2.11" in said and "`pip install torch`" in said


def test_old_torch(source: Path) -> None:
    put_torch(source, "2.10.1+cpu")
    said = refusal(python(*BUILD, cwd=source))
    assert said.startswith("cnnrnn: torch 2.10.1 is installed, 2.11 or later is needed")
    assert "`pip install --upgrade torch`" in said


# Metadata and source distribution


@pytest.mark.parametrize(
    ("version", "requirement"),
    [("2.13.0+cpu", "torch==2.13.0"), ("2.16.0.dev20990101+cu130", "torch==2.16.0.dev20990101")],
)
def test_requirement_drops_only_the_local_label(
    version: str, requirement: str, source: Path, tmp_path: Path
) -> None:
    put_torch(source, version)
    result = python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), cwd=source)
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "cnnrnn.egg-info" / "requires.txt").read_text(encoding="utf-8")
    assert requirement in written.splitlines()


def test_source_distribution_has_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    (source / "cnnrnn" / "_build_info.py").write_text('TORCH = "0.1.0"\n', encoding="utf-8")
    (source / "cnnrnn" / "_C.stale.so").write_bytes(b"")
    program = f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})"
    result = python("-c", program, cwd=source)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / f"cnnrnn-{cnnrnn.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*")}
    assert {"build_backend.py", "CMakeLists.txt", "cnnrnn/py.typed"} | kernels <= names
    assert not names & {"cnnrnn/_build_info.py", "cnnrnn/_C.stale.so"}


# The backend's search for torch


@pytest.fixture
def backend() -> ModuleType:
    """The build backend, imported from the source tree."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a new environment the one that is asked; returns its site-packages."""
    folder = tmp_path / "vénv with space"
    venv.create(folder, symlinks=os.name != "nt")
    names = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    monkeypatch.setattr(sys, "executable", str(folder.joinpath(*names)))
    return next(folder.rglob("site-packages"))


def test_no_torch_becomes_a_build_requirement(
    backend: ModuleType, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_torch(tmp_path, "2.13.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # pip's own, not the user's
    monkeypatch.chdir(tmp_path)
    assert backend._users_torch() is None
    assert backend._build_requirements() == ["torch>=2.11"]


def test_torch_in_the_environment_is_found(
    backend: ModuleType, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_torch(packages, "2.13.0")
    assert backend._users_torch() == str(packages)
    assert backend._build_requirements() == []
    monkeypatch.setattr(sys, "path", ["first"])
    backend._make_torch_importable()
    backend._make_torch_importable()
    assert sys.path == ["first", str(packages)]


def test_torch_behind_a_pth_file_is_found(
    backend: ModuleType, packages: Path, tmp_path: Path
) -> None:
    base = tmp_path / "báse"
    put_torch(base, "2.13.0")
    lines = f"{base}\nimport sys; print('a .pth file may print')\n"
    (packages / "base.pth").write_text(lines, encoding="utf-8")
    assert backend._users_torch() == str(base)
