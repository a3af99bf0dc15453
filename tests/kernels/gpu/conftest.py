"""Tests that need a GPU and a build with CUDA; without either they skip one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cnnrnn import _C
from cnnrnn.network.head import PREFIX_BYTES, Head
from tests.search.replay import make_cuda_head


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _C.WITH_CUDA:
        pytest.skip("this build has no CUDA search")


class OnGpu:
    """A head on the GPU that takes and returns tensors on the CPU, as `_C.CpuHead` does."""

    def __init__(self, head: Head, prefix_bytes: int = PREFIX_BYTES) -> None:
        self.packed = make_cuda_head(head, torch.device("cuda", 0), prefix_bytes=prefix_bytes)

    def beam_search(self, joint: Tensor, logits: Tensor | None, *options: Any) -> tuple[Any, ...]:
        moved = None if logits is None else logits.cuda()
        found = self.packed.beam_search(joint.cuda(), moved, *options)
        return (*(t.cpu() if isinstance(t, Tensor) else t for t in found[:5]), *found[5:])


@pytest.fixture
def on_gpu() -> type[OnGpu]:
    return OnGpu
