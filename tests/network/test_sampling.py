"""Label sets drawn from a head, against the probabilities of all sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.network.head import ImageEmbedding
from cnnrnn.search import beam_search
from tests.search.replay import random_embedding, random_head

DRAWS = 20_000


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
@pytest.mark.parametrize("given", [False, True])
def test_draws_have_the_probabilities_of_the_search(order, given):
    L, T = 4, 3
    head = random_head(np.random.default_rng(1), L, joint_dim=5, hidden_dim=6)
    embedding = random_embedding(np.random.default_rng(2), head, 2, True)
    evidence = torch.tensor([[0, 0, 1, 0], [-1, 0, 0, 0]], dtype=torch.int8) if given else None
    found = head.sample(embedding, DRAWS, evidence, seed=3, max_labels=T, order=order)
    search = SearchConfig(beam_size=16, max_labels=T, order=order, marginal_places=64)
    truth = beam_search(head, embedding, search, "reference", marginals=True, evidence=evidence)
    # Five standard errors of a mean of independent draws, whose weights are at most 1.
    weights = found.log_weights.exp()
    effective = weights.sum(1).square() / weights.square().sum(1)
    assert (effective > 100).all()
    error = (found.marginals() - truth.marginals()).abs()
    assert (error < 5 * 0.5 / effective.sqrt()[:, None] + 2e-3).all()
    mass = weights.mean(1)
    spread = weights.std(1) / math.sqrt(DRAWS)
    assert ((mass - truth.log_evidence.exp()).abs() < 5 * spread + 2e-3).all()
    if not given:
        assert (found.log_weights == 0).all()


def test_draws_respect_what_is_known():
    head = random_head(np.random.default_rng(1), 6, joint_dim=5, hidden_dim=6)
    embedding = random_embedding(np.random.default_rng(2), head, 1, False)
    evidence = torch.tensor([[1, -1, 0, 0, 1, 0]], dtype=torch.int8)
    for order in ("increasing", "unique", "free"):
        found = head.sample(embedding, 200, evidence, max_labels=2, order=order)
        counted = found.sets[0][found.log_weights[0] > -torch.inf]
        assert len(counted) and (counted == torch.tensor([1, 0, 0, 0, 1, 0]).bool()).all()


def test_the_seed_decides():
    head = random_head(np.random.default_rng(1), 6, joint_dim=5, hidden_dim=6)
    embedding = random_embedding(np.random.default_rng(2), head, 3, False)
    first, again = head.sample(embedding, 50, seed=1), head.sample(embedding, 50, seed=1)
    assert torch.equal(first.sets, again.sets)
    assert not torch.equal(first.sets, head.sample(embedding, 50, seed=2).sets)


def test_what_is_wrong_is_said():
    head = random_head(np.random.default_rng(1), 3, joint_dim=5, hidden_dim=6)
    embedding = ImageEmbedding(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        head.sample(embedding, 0)
    with pytest.raises(ValueError, match=r"evidence must be \[1 or 2, 3\], got \[2, 4\]"):
        head.sample(embedding, 1, torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"image 1 has 2 labels known to be present, more than"):
        head.sample(
            embedding, 1, torch.tensor([[0, 0, 0], [1, 0, 1]], dtype=torch.int8), max_labels=1
        )
