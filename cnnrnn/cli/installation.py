"""What an installation has, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from cnnrnn import __version__
from cnnrnn.export.session import distribution_problem

EXTRAS = {
    "vision": ("timm", "torchvision", "defusedxml", "pycocotools", "scikit-learn", "scipy"),
    "onnx": ("onnx", "onnxscript"),
}


def installed() -> tuple[list[str], list[str]]:
    """Return lines on what is installed, and the problems found, each with its remedy."""
    from cnnrnn._build_info import TORCH

    lines = [
        f"cnnrnn {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}; search built against torch {TORCH}",
        f"instruction sets of the CPU search: {_instruction_sets()}",
        f"CPU threads {torch.get_num_threads()} of {os.cpu_count()}",
        f"GPU: {_gpus()}",
        f"CUDA search: {_cuda_search()}",
        f"ONNX Runtime: {_onnx_runtime()}; OpenVINO: {_version('openvino') or 'missing'}",
        f"exported backbones: {_exported_backbones()}",
    ]
    problems = []
    for extra, packages in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        shown = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
        lines.append(f"extra [{extra}]: {shown}")
        if any(versions.values()) and not all(versions.values()):
            missing = ", ".join(name for name, version in versions.items() if version is None)
            problems.append(
                f"extra [{extra}] is incomplete, without {missing}: run "
                f'`pip install "cnnrnn[{extra}]"`'
            )
    others = ("matplotlib", "jinja2", "captum", "pyarrow", "datasets", "tensorboard")
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in others)
    lines.append(f"for reports, explanations, Parquet and others: {shown}")
    problems += _import_problems() + _search_problems()
    if (problem := distribution_problem()) is not None:
        problems.append(problem)
    return lines, problems


def _instruction_sets() -> str:
    from cnnrnn import _C

    return ", ".join(_C.instruction_sets())


def _cuda_search() -> str:
    from cnnrnn import _C
    from cnnrnn.search.device import MEASURED_GPUS

    if not _C.WITH_CUDA:
        return "not in this build; with a GPU the backbone runs there, the search on the CPU"
    if not MEASURED_GPUS:
        return "in this build; not measured on hardware yet, so only search_device='cuda' uses it"
    measured = ", ".join(sorted(MEASURED_GPUS))
    return f"in this build; used on {measured}, on other GPUs with search_device='cuda'"


def _onnx_runtime() -> str:
    try:
        import onnxruntime
    except ImportError:
        return "missing"
    if not hasattr(onnxruntime, "get_available_providers"):
        return "broken"
    return (
        f"{onnxruntime.__version__}, built with {', '.join(onnxruntime.get_available_providers())}"
    )


def _exported_backbones() -> str:
    from cnnrnn.machine.cache import Cache, cache_bound
    from cnnrnn.network.engines import CACHE_KIND

    cache = Cache(CACHE_KIND)
    entries, size = cache.use()
    return (
        f"{entries}, {size / 2**30:.2f} of at most {cache_bound() / 2**30:g} GB in {cache.folder}"
    )


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_problems() -> list[str]:
    if _version("torchvision") is None:
        return []
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return [
            f"torchvision {_version('torchvision')} cannot be imported with torch "
            f"{torch.__version__} ({error}): install the torchvision built for this torch, from "
            "the same source"
        ]
    return []


def _search_problems() -> list[str]:
    """Compare small searches on the CPU with the reference, and on each GPU with the CPU."""
    from cnnrnn import _C
    from cnnrnn.search.agreement import by_reference, first_difference, gpu_problem, native_on
    from cnnrnn.search.packed import CPU

    problems = []
    if (difference := first_difference(native_on(CPU), by_reference)) is not None:
        problems.append(
            f"the CPU search disagrees with the reference ({difference}): build cnnrnn again"
        )
    gpus = torch.cuda.device_count() if _C.WITH_CUDA and torch.cuda.is_available() else 0
    for index in range(gpus):
        if (difference := gpu_problem(torch.device("cuda", index))) is not None:
            problems.append(
                f"the CUDA search on cuda:{index} disagrees with the CPU's ({difference}), which "
                "is used in its place: build cnnrnn again"
            )
    return problems
