"""The exact search against all label sets, and against the beam."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import NonFiniteError, beam_search, best_sets, packed
from tests.search.replay import random_embedding, random_evidence, random_head


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_set_is_ranked_as_by_enumeration(seed, given):
    rng = np.random.default_rng(seed)
    L, T = int(rng.integers(1, 10)), int(rng.integers(1, 10))
    head = random_head(rng, L, joint_dim=6, hidden_dim=5, tied_embedding=seed % 2 == 0)
    embedding = random_embedding(rng, head, 3, label_logits=seed % 3 > 0)
    T = min(T, L)
    least = -6.0 if seed % 2 else -math.inf
    evidence = random_evidence(seed, head, 3, T) if given else None
    options = {"count": 40, "max_labels": T, "min_labels": int(rng.integers(0, min(T, 2) + 1)),
               "least": least, "evidence": evidence}  # fmt: skip
    found = best_sets(head, embedding, max_expansions=2000, **options)
    expected = best_sets(head, embedding, implementation="reference", **options)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    same = (found.labels == expected.labels).all(2)
    close = (expected.log_probs.diff(dim=1).abs() < 1e-4).any(1)  # equals may change places
    assert (same.all(1) | close).all()
    assert torch.equal(found.proved, expected.proved)
    assert torch.equal(found.ended, expected.ended)


def test_the_certificate_says_what_a_narrow_beam_misses():
    generator = np.random.default_rng(3)
    head = random_head(generator, 30, joint_dim=8, hidden_dim=8)
    embedding = random_embedding(generator, head, 200, True)
    exact = beam_search(head, embedding, SearchConfig(4, 6, algorithm="exact"))
    narrow = beam_search(head, embedding, SearchConfig(1, 6))
    assert exact.certified.all()
    better = exact.log_probs[:, 0] > narrow.log_probs[:, 0] + 1e-5
    assert better.any()
    same = (exact.labels[:, 0] == narrow.labels[:, 0]).all(1)
    assert (same | better).all()
    # What a few expansions do not prove is not certified, and still the best that was seen.
    hasty = beam_search(head, embedding, SearchConfig(4, 6, algorithm="exact", max_expansions=2))
    assert not hasty.certified.all()
    assert (hasty.log_probs[:, 0] <= exact.log_probs[:, 0] + 1e-5).all()
    for row in hasty.certified.nonzero()[:, 0].tolist():
        assert torch.equal(hasty.labels[row, 0], exact.labels[row, 0])


def test_more_continuations_than_one_expansion_takes():
    # Every set of one label is equally probable, and there are 300.
    head = Head(300, 4, joint_dim=4, hidden_dim=4).eval()
    with torch.no_grad():
        head.label_embedding.zero_()
        head.score_bias.zero_()
    embedding = ImageEmbedding(torch.zeros(2, 4))
    found = best_sets(head, embedding, count=301, max_labels=1, max_expansions=400)
    assert found.proved.tolist() == [301, 301]
    assert sorted(found.labels[0, :, 0].tolist()) == list(range(-1, 300))
    torch.testing.assert_close(found.log_probs, torch.full((2, 301), -math.log(301)))


def test_marginals_are_those_of_the_beam():
    generator = np.random.default_rng(0)
    head = random_head(generator, 20, joint_dim=8, hidden_dim=8)
    embedding = random_embedding(generator, head, 10, True)
    beam = SearchConfig(8, 5)
    exact = replace(beam, algorithm="exact")
    first = beam_search(head, embedding, beam, marginals=True)
    second = beam_search(head, embedding, exact, marginals=True)
    assert torch.equal(first.marginals(), second.marginals())
    assert torch.equal(first.log_evidence, second.log_evidence)


def test_few_states_in_memory_change_nothing():
    generator = np.random.default_rng(5)
    head = random_head(generator, 40, joint_dim=8, hidden_dim=8)
    embedding = random_embedding(generator, head, 100, True)
    ample = best_sets(head, embedding, count=8)
    head.prefix_bytes = 1 << 14
    small = best_sets(head, embedding, count=8)
    for mine, theirs in zip(small[:5], ample[:5], strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_wrong_is_said():
    head = random_head(np.random.default_rng(0), 5, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(np.random.default_rng(1), head, 3, False)
    with pytest.raises(ValueError, match="algorithm exact needs order increasing, got unique"):
        SearchConfig(algorithm="exact", order="unique")
    with pytest.raises(ValueError, match="max_expansions must be at least 1, got 0"):
        SearchConfig(max_expansions=0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        best_sets(head, embedding, count=0)
    with pytest.raises(
        ValueError, match="implementation must be auto, native or reference, got 'x'"
    ):
        best_sets(head, embedding, count=2, implementation="x")
    with pytest.raises(ValueError, match="least must be a number, got nan"):
        best_sets(head, embedding, count=2, least=math.nan)
    embedding.joint[2, 1] = math.nan
    reference = best_sets(head, embedding, count=2, implementation="reference", on_nonfinite="mark")
    assert reference.log_probs.isnan().all(1).tolist() == [False, False, True]
    with pytest.raises(NonFiniteError, match="index 2"):
        best_sets(head, embedding, count=2)
    marked = best_sets(head, embedding, count=2, on_nonfinite="mark")
    assert marked.log_probs.isnan().all(1).tolist() == [False, False, True]


def test_best_sets_read_changed_weights():
    head = random_head(np.random.default_rng(0), 5, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(np.random.default_rng(1), head, 3, False)
    first = best_sets(head, embedding, count=3)
    with torch.no_grad():
        head.score_bias[0] += 3
    second = best_sets(head, embedding, count=3)
    assert not torch.equal(first.log_probs, second.log_probs)
    assert packed.packed_cpu_head(head) is packed.packed_cpu_head(head)


def test_mass_of_paths_below_the_range_of_floats():
    head = Head(2000, 4, joint_dim=4, hidden_dim=4).eval()
    with torch.no_grad():
        head.label_embedding.zero_()
    config = SearchConfig(3, 20, min_labels=20, order="unique")
    found = beam_search(head, ImageEmbedding(torch.zeros(1, 4)), config, marginals=True)
    # Twenty labels drawn one by one, and then the end for certain: three paths of 1 / (2000 ...).
    one = -sum(math.log(2000 - i) for i in range(20))
    assert float(found.log_evidence[0]) == pytest.approx(one + math.log(3), rel=1e-4)
