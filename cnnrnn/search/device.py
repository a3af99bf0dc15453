"""Where a compiled search runs, and whether the one on a GPU can be relied on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from cnnrnn import _C
from cnnrnn.config import SearchDevice
from cnnrnn.search.agreement import gpu_problem
from cnnrnn.search.checks import Implementation
from cnnrnn.search.packed import CPU

MEASURED_GPUS: frozenset[str] = frozenset()
"""GPUs, as torch names them, on which `search_device="auto"` searches what lies there.

It follows the committed files of `make gpu-check`, benchmarks/results/<GPU>.json: the GPU of a file
is here if every test passed, no tool found an error, and the search was faster there than on the
CPU, copies included. A test compares the two.
"""


class Verdicts:
    """Whether the CUDA search of a GPU agrees with the CPU's, asked once a GPU in a process.

    Args:
        problem: says what is wrong with the search of a GPU, or None.
    """

    def __init__(self, problem: Callable[[torch.device], str | None]) -> None:
        self._problem = problem
        self._problems: dict[torch.device, str | None] = {}
        self._lock = threading.Lock()

    def agrees(self, device: torch.device) -> bool:
        """Whether a GPU's search can be relied on; a warning says once why it cannot."""
        with self._lock:  # others wait for the first one's verdict
            is_first = device not in self._problems
            if is_first:
                self._problems[device] = self._problem(device)
            problem = self._problems[device]
        if is_first and problem is not None:
            warnings.warn(
                f"the CPU searches in place of {device}, whose small search disagrees with the "
                f"CPU's: {problem}",
                stacklevel=4,
            )
        return problem is None


def _named_problem(device: torch.device) -> str | None:
    problem = gpu_problem(device)
    return None if problem is None else f"{problem} ({torch.cuda.get_device_name(device)})"


verdicts = Verdicts(_named_problem)
"""Those of this process."""


def require_search_device(search_device: SearchDevice) -> None:
    """Raise a ValueError where there is no such choice, or it cannot be had here."""
    if search_device not in get_args(SearchDevice):
        raise ValueError(f"search_device must be auto, cpu or cuda, got {search_device!r}")
    if search_device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError("search_device cuda needs a GPU that torch can use, got none")
    if not _C.WITH_CUDA:
        raise ValueError(
            "search_device cuda needs a build with the CUDA search, got one without: install "
            "cnnrnn again where nvcc is found, with CNNRNN_CUDA=1"
        )


def device_of_search(
    tensor: Tensor, implementation: Implementation, search_device: SearchDevice
) -> torch.device:
    """Return where the compiled search runs for a tensor, before the verdict on a GPU's search.

    Args:
        tensor: of the embedding.
        implementation: `auto`, or `native`, which takes the tensor's GPU, measured or not.
        search_device: as `require_search_device` lets it pass.
    """
    if search_device == "cpu":
        return CPU
    if search_device == "cuda":
        if tensor.is_cuda:
            return tensor.device
        return torch.device("cuda", torch.cuda.current_device())
    if not tensor.is_cuda or not _C.WITH_CUDA:
        return CPU
    return tensor.device if implementation == "native" or _is_measured(tensor) else CPU


def _is_measured(tensor: Tensor) -> bool:
    if not MEASURED_GPUS or torch.compiler.is_compiling():
        return False
    return torch.cuda.get_device_name(tensor.device) in MEASURED_GPUS


def can_be_relied_on(device: torch.device) -> bool:
    """Whether to search on a device: a GPU is asked at its first search.

    Not while a graph is made, of torch's compiler or of CUDA: nothing can be compared there.
    """
    if device == CPU or torch.compiler.is_compiling():
        return True
    return torch.cuda.is_current_stream_capturing() or verdicts.agrees(device)
