"""The probabilistic chain against all label sets, one by one."""

from __future__ import annotations

import pytest
import torch

from cnnrnn.comparison.baselines import (
    Training,
    network_outputs,
    product_log_probs,
    train_independent,
)
from cnnrnn.comparison.chains import ProbabilisticChain, train_chain
from tests.comparison.test_baselines import HEAD, QUICK, split_of

ORDER = torch.tensor([2, 0, 4, 1, 3])


def random_chain(labels=5, features=3):
    torch.manual_seed(0)
    order = ORDER[:labels] if labels == 5 else torch.arange(labels)
    chain = ProbabilisticChain(HEAD, order, features).eval()
    with torch.no_grad():
        chain.given.copy_(2 * torch.randn(labels, labels))
    return chain


def all_sets(labels):
    return torch.tensor([[bool(n >> i & 1) for i in range(labels)] for n in range(2**labels)])


def probabilities(chain, features):
    """Of every label set, for every image: [n, 2^L] float64."""
    sets = all_sets(len(chain.order))
    return torch.stack(
        [chain.set_log_probs(features, one.expand(len(features), -1)).exp() for one in sets], dim=1
    )


def test_a_label_is_given_those_before_it_in_the_chain():
    chain = random_chain()
    place = {label: i for i, label in enumerate(ORDER.tolist())}
    for label in range(5):
        for given in range(5):
            expected = chain.given[label, given] if place[given] < place[label] else 0.0
            assert chain.influence()[label, given] == expected


def test_probabilities_are_the_loop_and_sum_to_one():
    chain, features = random_chain(), torch.randn(4, 3)
    torch.testing.assert_close(
        probabilities(chain, features).sum(1), torch.ones(4, dtype=torch.float64)
    )
    targets = torch.rand(4, 5) < 0.5
    scores, A = chain.classifier(chain.trunk(features)), chain.influence()
    expected = torch.zeros(4)
    for image in range(4):
        for label in range(5):
            f = scores[image, label] + sum(A[label, j] for j in range(5) if targets[image, j])
            p = f.sigmoid()
            expected[image] += (p if targets[image, label] else 1 - p).log()
    torch.testing.assert_close(chain.set_log_probs(features, targets).float(), expected)


def test_a_wide_beam_finds_the_most_probable_set():
    chain, features = random_chain(), torch.randn(23, 3)
    p = probabilities(chain, features)
    assert torch.equal(chain.best_sets(features, beam=32), all_sets(5)[p.argmax(1)])
    greedy = chain.best_sets(features, beam=1)
    found = chain.set_log_probs(features, greedy).exp()
    assert (found <= p.max(1).values + 1e-9).all() and (found < p.max(1).values - 1e-9).any()
    assert chain.best_sets(features[:0]).shape == (0, 5)


def test_marginals_of_many_samples_are_those_of_all_sets(monkeypatch):
    chain, features = random_chain(), torch.randn(7, 3)
    expected = probabilities(chain, features) @ all_sets(5).double()
    found = chain.marginals(features, samples=4000)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    assert torch.equal(found, chain.marginals(features, samples=4000))
    assert not torch.equal(found, chain.marginals(features, samples=4000, seed=1))
    first = chain.classifier(chain.trunk(features))[:, 2].sigmoid()
    torch.testing.assert_close(found[:, 2], first)  # nothing is drawn before it


@pytest.mark.parametrize("at_once", [1, 100])
def test_slices_change_no_best_set(monkeypatch, at_once):
    chain, features = random_chain(), torch.randn(11, 3)
    whole = chain.best_sets(features)
    monkeypatch.setattr("cnnrnn.comparison.chains.SETS_AT_ONCE", at_once)
    assert torch.equal(chain.best_sets(features), whole)


def test_a_chain_learns_what_labels_tell_of_each_other():
    """Two labels are drawn together, whatever the features are: only the chain can know."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        coin = torch.rand(count, generator=generator) < 0.5
        other = torch.rand(count, generator=generator) < 0.3
        features = torch.randn(count, 6, generator=generator)
        return split_of(features, torch.stack([other, coin, coin], dim=1))

    train_split, val = split(400), split(200)
    said = []
    chain = train_chain(Training(train_split, val, HEAD, QUICK, said.append))
    assert chain.order.tolist() == [1, 2, 0] and not chain.training
    assert any(line.startswith("chain second") for line in said)
    own = -chain.set_log_probs(val.features, val.targets).mean()
    alone = train_independent(Training(train_split, val, HEAD, QUICK), "bce")
    independent = product_log_probs(network_outputs(alone, val.features), val.targets)
    assert own < -independent.mean() - 0.3
    sets = chain.best_sets(val.features)
    assert torch.equal(sets[:, 1], sets[:, 2])


def test_a_new_chain_takes_labels_for_independent():
    torch.manual_seed(0)
    chain, features = ProbabilisticChain(HEAD, ORDER, 3).eval(), torch.randn(4, 3)
    alone = chain.classifier(chain.trunk(features))
    assert torch.equal(chain(features, torch.rand(4, 5) < 0.5), alone)
    torch.testing.assert_close(chain.marginals(features), alone.sigmoid())
    assert torch.equal(chain.best_sets(features), alone > 0)


def all_evidence(labels):
    """Every evidence of -1, 0 and 1: [3^L, L] int8."""
    return torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * labels)


def conditional(p, evidence):
    """Marginals of label sets with probabilities p [n, 2^L], given evidence [n, L], by summing."""
    sets = all_sets(evidence.shape[1]).double()
    agrees = ((evidence[:, None] == 0) | (evidence[:, None] == 2 * sets - 1)).all(2)
    kept = p * agrees
    return kept @ sets / kept.sum(1, keepdim=True)


def test_marginals_given_known_labels_are_those_of_the_sets_that_agree():
    chain = random_chain()
    evidence = all_evidence(5)
    features = torch.randn(len(evidence), 3)
    expected = conditional(probabilities(chain, features), evidence)
    found = chain.marginals_given(features, evidence, samples=2000)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.06)
    assert (found.double() - expected).abs().mean() < 0.003
    assert torch.equal(found, chain.marginals_given(features, evidence, samples=2000))
    told = evidence != 0
    assert torch.equal(found[told], (evidence[told] > 0).float())
    # One label that is not known is summed out, whatever is drawn.
    one = (evidence == 0).sum(1) <= 1
    few = chain.marginals_given(features[one], evidence[one], samples=1, seed=1)
    torch.testing.assert_close(few.double(), expected[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 100])
def test_slices_keep_evidence_with_its_image(monkeypatch, at_once):
    chain, features = random_chain(), torch.randn(11, 3)
    evidence = all_evidence(5)[100:111]
    monkeypatch.setattr("cnnrnn.comparison.chains.SETS_AT_ONCE", at_once)
    found = chain.marginals_given(features, evidence, samples=4000)
    expected = conditional(probabilities(chain, features), evidence)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)
    assert chain.marginals_given(features[:0], evidence[:0]).shape == (0, 5)
