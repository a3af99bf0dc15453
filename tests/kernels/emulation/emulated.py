"""The CUDA search, its sources compiled for the CPU and run there lane by lane.

`cuda_runtime.h` beside this stands in for CUDA's header; the kernels are those of `csrc/kernels`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrnn.network.head import Head
from cnnrnn.search.packed import head_parameters

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = [
    CSRC / "kernels" / "cuda" / "search.cu",
    CSRC / "kernels" / "cuda" / "states.cu",
    CSRC / "kernels" / "cuda" / "head.cpp",
    HERE / "search.cpp",
    HERE / "cuda_on_cpu.cpp",
    HERE / "tensor_cores.cpp",
]
OPTIONS = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing",
           "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # fmt: skip
CELLS = ["lstm", "paper"]
ACTIVATIONS = ["relu", "tanh", "identity"]
ORDERS = ["increasing", "unique", "free"]
STOPS = ["n_best", "literal"]
PRECISIONS = ["exact", "fast"]
LANE_ORDERS = ["ascending", "descending", "shuffled"]


def compiler() -> list[str] | None:
    """Return the C++ compiler's command, or None where there is none."""
    command = os.environ.get("CXX", "").split() or ["c++"]
    return command if shutil.which(command[0]) else None


def compile_and_link(sources: list[Path], target: Path, *link: str) -> None:
    """Compile CUDA sources as C++ into a program or library, objects beside it."""
    command = compiler()
    assert command is not None
    objects = []
    for source in sources:
        objects.append(target.with_name(f"{source.parent.name}-{source.name}.o"))
        compile_one = [*command, *OPTIONS, f"-I{HERE}", f"-I{CSRC}", "-x", "c++", "-c", source]
        subprocess.run([*compile_one, "-o", objects[-1]], check=True)
    subprocess.run([*command, *link, *objects, "-o", target], check=True)


def build(folder: Path) -> ctypes.CDLL:
    """Compile the library in `folder` and load it."""
    compile_and_link(SOURCES, folder / "emulated.so", "-shared")
    loaded = ctypes.CDLL(str(folder / "emulated.so"))
    loaded.new_head.restype = ctypes.c_void_p
    loaded.search.restype = ctypes.c_bool
    return loaded


class _HeadWeights(ctypes.Structure):
    _fields_ = [
        ("num_labels", ctypes.c_int64),
        ("joint_dim", ctypes.c_int64),
        ("hidden_dim", ctypes.c_int64),
        ("cell", ctypes.c_int),
        ("activation", ctypes.c_int),
        *[(f"weight{i}", ctypes.c_void_p) for i in range(8)],
    ]


class _SearchOptions(ctypes.Structure):
    _fields_ = [
        ("beam_size", ctypes.c_int),
        ("max_labels", ctypes.c_int64),
        ("min_labels", ctypes.c_int64),
        ("order", ctypes.c_int),
        ("end_takes_slot", ctypes.c_bool),
        ("stop", ctypes.c_int),
        ("precision", ctypes.c_int),
        ("places", ctypes.c_int),
    ]


class _ImageEmbeddings(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("joint", ctypes.c_void_p),
        ("label_logits", ctypes.c_void_p),
        ("evidence", ctypes.c_void_p),
        ("evidence_stride", ctypes.c_int64),
    ]


class _SearchOutput(ctypes.Structure):
    _fields_ = [
        ("labels", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
        ("marginals", ctypes.c_void_p),
        ("log_evidence", ctypes.c_void_p),
        ("trace", ctypes.c_void_p),
        ("trace_width", ctypes.c_int64),
    ]


class EmulatedHead:
    """What `_C.CudaHead` is, for tensors on the CPU."""

    def __init__(self, library: ctypes.CDLL, head: Head, prefix_bytes: int = 1 << 25) -> None:
        """Pack the head's weights; the library's own memory holds all that is kept."""
        self._library = library
        self._num_labels = head.num_labels
        tensors = [None if t is None else t.detach().contiguous() for t in head_parameters(head)]
        weights = _HeadWeights(
            head.num_labels, head.joint_dim, head.output_projection.in_features,
            CELLS.index(head.cell), ACTIVATIONS.index(head.activation), *map(_address, tensors),
        )  # fmt: skip
        self._head = self._checked(
            functools.partial(library.new_head, ctypes.byref(weights), ctypes.c_int64(prefix_bytes))
        )

    def __del__(self) -> None:
        """Free what the library holds."""
        if hasattr(self, "_head"):
            self._library.delete_head(ctypes.c_void_p(self._head))

    def clear(self) -> None:
        """Forget all prefix states."""
        self._library.clear_head(ctypes.c_void_p(self._head))

    def beam_search(
        self,
        joint: Tensor,
        label_logits: Tensor | None,
        beam_size: int,
        max_labels: int,
        min_labels: int,
        order: str,
        end_takes_slot: bool,
        stop: str,
        marginals: bool,
        trace: bool = False,
        precision: str = "exact",
        rounds: int = -1,
        evidence: Tensor | None = None,
        marginal_places: int = 0,
        *,
        captured: bool = False,
    ) -> tuple[Any, ...]:
        """Search as `_C.CudaHead.beam_search` does, or as it does in a captured stream."""
        B, N, T, L = len(joint), beam_size, max_labels, self._num_labels
        joint = joint.contiguous()
        logits = None if label_logits is None else label_logits.contiguous()
        labels = torch.full((B, N, T), -77)
        lengths = torch.full((B, N), -77)
        log_probs = torch.full((B, N), 77.0)
        sums = torch.full((B, L), 77.0) if marginals else None
        log_evidence = torch.full((B,), 77.0) if marginals else None
        places = max(N, marginal_places) if marginals else N
        present = 0 if evidence is None else int((evidence == 1).sum(1).amax()) if B else 0
        width = places * (present + 1)
        steps = torch.full((B, T + 1, width, 2), -77, dtype=torch.int32) if trace else None
        options = _SearchOptions(
            N,
            T,
            min_labels,
            ORDERS.index(order),
            end_takes_slot,
            STOPS.index(stop),
            PRECISIONS.index(precision),
            places,
        )
        known = None if evidence is None else evidence.contiguous()
        stride = L if known is not None and len(known) == B else 0
        images = _ImageEmbeddings(B, _address(joint), _address(logits), _address(known), stride)
        outputs = (labels, lengths, log_probs, sums, log_evidence, steps)
        output = _SearchOutput(*map(_address, outputs), width)
        stats = (ctypes.c_int64 * 6)()
        self._checked(
            functools.partial(
                self._library.search,
                ctypes.c_void_p(self._head),
                ctypes.byref(options),
                ctypes.byref(images),
                ctypes.byref(output),
                captured,
                ctypes.c_int64(rounds),
                stats,
            )  # fmt: skip
        )
        return labels, lengths, log_probs, sums, steps, tuple(stats[:5]), stats[5], log_evidence

    def _checked(self, call: Any) -> Any:
        """Run a function of the library whose last arguments take an error's message."""
        error = ctypes.create_string_buffer(500)
        result = call(error, ctypes.c_size_t(len(error)))
        if not result:
            raise RuntimeError(error.value.decode())
        return result


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
