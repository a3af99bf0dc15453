"""Small searches by which the searches of an installation are held against one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.native import NativeOptions, native_search
from cnnrnn.search.packed import CPU
from cnnrnn.search.result import SearchResult

TOLERANCE = 1e-3
"""Between log-probabilities, and between marginals, of two searches that agree."""


class SmallSearch(NamedTuple):
    """A search of a few images, of numbers that are the same on every machine.

    No two paths that it decides between are so close that rounding could swap them.
    """

    head: Head
    embedding: ImageEmbedding
    config: SearchConfig
    marginals: bool
    evidence: Tensor | None

    @property
    def max_labels(self) -> int:
        """T, the longest path."""
        assert self.config.max_labels is not None
        return self.config.max_labels


Search: TypeAlias = Callable[[SmallSearch], SearchResult]


def small_searches() -> list[SmallSearch]:
    """Return searches without marginals, with them, and with known labels."""
    generator = np.random.default_rng(0)  # NumPy's numbers are the same on every machine

    def drawn(bound: float, *shape: int) -> Tensor:
        return torch.from_numpy(generator.uniform(-bound, bound, shape)).float()

    L, D, B = 40, 64, 5
    with torch.random.fork_rng(devices=[]):  # the head's first weights are not used
        head = Head(L, 1, D, 16).to(CPU, torch.float32).eval()
    head.prefix_bytes = 1 << 20
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(drawn(3 / math.sqrt(parameter.shape[-1]), *parameter.shape))
    embedding = ImageEmbedding(drawn(3, B, D), drawn(3, B, L + 1))
    config = SearchConfig(beam_size=4, max_labels=4)
    evidence = torch.zeros(B, L, dtype=torch.int8)
    for image, (present, absent) in enumerate([((3,), ()), ((7, 30), (8,)), ((), (0, 1, 20))]):
        evidence[image, list(present)] = 1
        evidence[image, list(absent)] = -1
    return [
        SmallSearch(head, embedding, config, marginals, known)
        for marginals, known in ((False, None), (True, None), (True, evidence))
    ]


def by_reference(small: SmallSearch) -> SearchResult:
    """Search in plain torch, on the CPU."""
    return reference.beam_search(
        small.head, small.embedding, small.config, max_labels=small.max_labels,
        marginals=small.marginals, evidence=small.evidence,
    )  # fmt: skip


def native_on(device: torch.device) -> Search:
    """Return the compiled search of a device."""

    def search(small: SmallSearch) -> SearchResult:
        options = NativeOptions(
            small.config, small.max_labels, small.marginals, "exact", small.evidence
        )
        return native_search(small.head, small.embedding, options, device)[0]

    return search


def first_difference(search: Search, expected: Search) -> str | None:
    """Say where a search first differs from another in the small searches, or return None."""
    for small in small_searches():
        found, wanted = values(search(small)), values(expected(small))
        for name, theirs in wanted.items():
            same = found[name].isclose(theirs, rtol=0, atol=TOLERANCE, equal_nan=True)
            if not same.all():
                at = tuple((~same).nonzero()[0].tolist())
                return f"{name}{list(at)} is {found[name][at]:.4g}, not {theirs[at]:.4g}"
    return None


def gpu_problem(device: torch.device) -> str | None:
    """Say what is wrong with the CUDA search of a GPU, held against the CPU's, or return None."""
    try:
        return first_difference(native_on(device), native_on(CPU))
    except torch.OutOfMemoryError:  # nothing is wrong with the search
        raise
    except RuntimeError as error:
        return f"it fails: {str(error).splitlines()[0]}"


def values(result: SearchResult) -> dict[str, Tensor]:
    """Return a result's tensors by name, as float64 on the CPU."""
    found = {
        "labels": result.labels, "lengths": result.lengths, "log_probs": result.log_probs,
        "marginals": result.requested_marginals, "log_evidence": result.log_evidence,
    }  # fmt: skip
    return {name: value.cpu().double() for name, value in found.items() if value is not None}
