"""The small searches that hold one search against another, and what they notice."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cnnrnn.network.head import ImageEmbedding
from cnnrnn.search import SearchResult
from cnnrnn.search.agreement import (
    SmallSearch,
    by_reference,
    first_difference,
    native_on,
    small_searches,
)
from cnnrnn.search.packed import CPU

by_cpu = native_on(CPU)


def in_float64(small: SmallSearch) -> SearchResult:
    head = copy.deepcopy(small.head).double()
    return by_reference(
        small._replace(head=head, embedding=small.embedding.to("cpu", torch.float64))
    )


@pytest.mark.parametrize("expected", [by_cpu, by_reference, in_float64])
def test_the_cpu_search_agrees_with_itself_and_with_the_reference(expected):
    assert first_difference(by_cpu, expected) is None


def test_rounding_cannot_swap_paths():
    """Noise a hundred times as large as float32's rounding changes no path."""

    def disturbed(small: SmallSearch) -> SearchResult:
        def noisy(tensor: Tensor) -> Tensor:
            return tensor + 1e-5 * torch.randn(tensor.shape, generator=noise) * tensor.abs()

        embedding = small.embedding
        assert embedding.label_logits is not None
        return by_cpu(small._replace(
            embedding=ImageEmbedding(noisy(embedding.joint), noisy(embedding.label_logits))
        ))  # fmt: skip

    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        assert first_difference(disturbed, by_cpu) is None


def test_paths_of_every_length_and_known_labels_occur():
    plain, wide, known = small_searches()
    lengths = by_cpu(plain).lengths
    assert lengths.min() == 0 and lengths.max() == plain.max_labels
    assert plain.marginals is False and wide.marginals and known.evidence is not None
    assert not torch.equal(by_cpu(known).labels, by_cpu(wide).labels)


def changed(name: str, change: Callable[[Tensor], None], known: bool = False):
    """The CPU search with a change to one of its tensors, where nothing is known or where it is."""

    def search(small: SmallSearch) -> SearchResult:
        found = by_cpu(small)
        tensor = getattr(found, name)
        if tensor is None or known != (small.evidence is not None):
            return found
        tensor = tensor.clone()
        change(tensor)
        return replace(found, **{name: tensor})

    return search


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (changed("labels", lambda t: t[3, 0, 1:2].add_(1)), r"labels\[3, 0, 1\] is "),
        (changed("lengths", lambda t: t[0, 1].zero_()), r"lengths\[0, 1\] is 0, not 2"),
        (changed("log_probs", lambda t: t[4, 3].add_(0.01)), r"log_probs\[4, 3\] is -3.318, not"),
        (changed("log_probs", lambda t: t[4, 3].fill_(torch.nan)), r"log_probs\[4, 3\] is nan, no"),
        (changed("requested_marginals", lambda t: t[1, 7].add_(0.01)), r"marginals\[1, 7\] is "),
        (changed("log_probs", lambda t: t[0, 0].sub_(0.1), known=True), r"log_probs\[0, 0\] is "),
        (changed("log_evidence", lambda t: t[1].add_(0.01), known=True), r"log_evidence\[1\] is "),
    ],
)
def test_a_planted_difference_is_found_and_named(search, said):
    difference = first_difference(search, by_cpu)
    assert difference is not None and re.match(said, difference), difference


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    small_searches()
    assert torch.equal(torch.get_rng_state(), before)


def test_other_default_types_change_nothing():
    expected = small_searches()[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert first_difference(by_cpu, by_reference) is None
        assert torch.equal(small_searches()[0].embedding.joint, expected.embedding.joint)
    finally:
        torch.set_default_dtype(torch.float32)
