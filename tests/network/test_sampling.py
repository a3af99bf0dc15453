"""Label sets drawn from a head, against the probabilities of all sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.network.head import ImageEmbedding, chain_logits
from cnnrnn.network.sampling import _drawn, given_logits
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


def test_an_independent_classifier_given_evidence_is_drawn_as_it_is():
    """Where the recurrence says nothing every draw has the same weight: P(evidence)."""
    generator = torch.Generator().manual_seed(0)
    head = random_head(np.random.default_rng(1), 6, joint_dim=5, hidden_dim=6)
    with torch.no_grad():
        head.label_embedding.zero_()
        if head.score_bias is not None:
            head.score_bias.zero_()
    own = torch.randn(3, 6, generator=generator) * 3
    embedding = ImageEmbedding(torch.zeros(3, 5), chain_logits(own))
    evidence = torch.tensor([[1, -1, 0, 0, 1, 0], [-1, -1, 0, 0, -1, -1], [0] * 6]).to(torch.int8)
    found = head.sample(embedding, 5000, evidence, max_labels=6)
    p = own.sigmoid()
    of_known = torch.where(evidence == 1, p, torch.where(evidence == -1, 1 - p, 1.0))
    expected = of_known.log().sum(1, keepdim=True).expand(-1, 5000)
    torch.testing.assert_close(found.log_weights, expected, atol=1e-4, rtol=0)
    shares = found.sets.float().mean(1)
    torch.testing.assert_close(shares[evidence == 0], p[evidence == 0], atol=0.03, rtol=0)
    absent = given_logits(chain_logits(own), torch.full((3, 6), -1, dtype=torch.int8))
    assert (absent == 0).all()  # nothing can come any more


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


def test_nothing_impossible_is_drawn():
    probabilities = torch.tensor([[0, 0.2, 0, 0.3, 0], [0, 0, 0, 0, 0], [1e-30, 0, 0, 0, 1e30],
                                  [torch.nan] * 5, [0, 0, 0, 0, 1e-38]])  # fmt: skip
    rows = torch.tensor([0, 2, 4]).repeat_interleave(20_000)
    drawn = _drawn(probabilities, rows, torch.Generator().manual_seed(0)).view(3, -1)
    assert drawn[0].unique().tolist() == [1, 3]
    assert float((drawn[0] == 1).double().mean()) == pytest.approx(0.4, abs=0.02)
    assert (drawn[1:] == 4).all()


def test_a_number_just_below_1_stays_in_its_row(monkeypatch):
    largest = torch.full((3,), 1 - 2**-53, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: largest)
    drawn = _drawn(torch.tensor([[0.5, 0.5, 0.0]] * 3), torch.arange(3), torch.Generator())
    assert drawn.tolist() == [1, 1, 1]


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
