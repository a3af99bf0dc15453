"""The conditional dependency network and the pairwise CRF against all label sets, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnrnn.comparison.baselines import Training
from cnnrnn.comparison.chains import given_log_probs
from cnnrnn.comparison.dependencies import DependencyNetwork, train_dependencies
from tests.comparison.test_baselines import HEAD, QUICK, split_of
from tests.comparison.test_chains import all_evidence, all_sets, conditional

L = 4


def random_network(symmetric, labels=L, features=3, strength=1.0):
    torch.manual_seed(0)
    network = DependencyNetwork(HEAD, labels, features, symmetric=symmetric).eval()
    with torch.no_grad():
        network.given.copy_(strength * torch.randn(labels, labels))
    return network


def crf_probabilities(network, features):
    """Of every label set by the CRF's energy: [n, 2^L] float64."""
    sets = all_sets(network.classifier.out_features).double()
    A = network.influence().double()
    alone = network.classifier(network.trunk(features)).double()
    energy = alone @ sets.T + torch.einsum("sl,lj,sj->s", sets, A, sets) / 2
    return energy.softmax(1).detach()


def stationary(network, features, evidence):
    """What the sampler's sweep, as a matrix over all sets, converges to: [n, 2^L] float64."""
    labels = network.classifier.out_features
    sets = all_sets(labels)
    found = []
    for x, told in zip(features, evidence, strict=True):
        p = network(x.expand(len(sets), -1), sets).sigmoid().double().detach()
        sweep = torch.eye(len(sets)).double()
        for label in range(labels):
            if told[label] != 0:
                continue
            step = torch.zeros(len(sets), len(sets)).double()
            for number in range(len(sets)):
                step[number, number | 1 << label] += p[number, label]
                step[number, number & ~(1 << label)] += 1 - p[number, label]
            sweep = sweep @ step
        start = sum(1 << i for i in range(labels) if told[i] == 1)
        found.append(torch.linalg.matrix_power(sweep, 1000)[start])
    return torch.stack(found)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_label_is_given_all_others(symmetric):
    network, features = random_network(symmetric), torch.randn(5, 3)
    A = network.influence()
    assert (A.diag() == 0).all() and torch.equal(A, A.T) == symmetric
    targets = torch.rand(5, L) < 0.5
    alone = network.classifier(network.trunk(features)).detach()
    A = A.detach()
    expected = torch.tensor(
        [
            [alone[i, j] + sum(A[j, k] for k in range(L) if targets[i, k]) for j in range(L)]
            for i in range(5)
        ]
    )
    torch.testing.assert_close(network(features, targets), expected)
    signed = torch.where(targets, expected, -expected).sigmoid().log().sum(1)
    torch.testing.assert_close(given_log_probs(network, features, targets).float(), signed)


def test_the_conditionals_of_the_crf_are_those_of_its_energy():
    network, features = random_network(True), torch.randn(1, 3)
    p, sets = crf_probabilities(network, features)[0], all_sets(L)
    logits = network(features.expand(len(sets), -1), sets)
    for number in range(len(sets)):
        for label in range(L):
            with_label, without = p[number | 1 << label], p[number & ~(1 << label)]
            expected = (with_label / without).log().float()
            torch.testing.assert_close(logits[number, label].detach(), expected)


def test_the_crf_given_known_labels_is_that_of_the_sets_that_agree():
    network, evidence = random_network(True), all_evidence(L)
    features = torch.randn(len(evidence), 3)
    expected = conditional(crf_probabilities(network, features), evidence)
    found = network.marginals(features, evidence, chains=200, sweeps=50)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)
    assert (found.double() - expected).abs().mean() < 0.003
    assert torch.equal(found, network.marginals(features, evidence, chains=200, sweeps=50))
    assert not torch.equal(
        found, network.marginals(features, evidence, chains=200, sweeps=50, seed=1)
    )
    told = evidence != 0
    assert torch.equal(found[told], (evidence[told] > 0).float())
    nothing = torch.zeros(9, L, dtype=torch.int8)
    assert torch.equal(network.marginals(features[:9], nothing), network.marginals(features[:9]))


def test_the_network_converges_to_what_its_sweeps_do():
    """Its conditionals belong to no distribution: the matrix of a sweep says what to expect."""
    network = random_network(False, strength=2.0)
    evidence = all_evidence(L)[::4].contiguous()
    features = torch.randn(len(evidence), 3)
    # What is counted is a label's probability given the others as they stand when its turn comes.
    sets = all_sets(L)
    expected = stationary(network, features, evidence) @ sets.double()
    found = network.marginals(features, evidence, chains=400, sweeps=50)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("at_once", [1, 100])
def test_slices_keep_evidence_with_its_image(monkeypatch, at_once):
    network, features = random_network(True), torch.randn(11, 3)
    evidence = all_evidence(L)[40:51]
    monkeypatch.setattr("cnnrnn.comparison.dependencies.SETS_AT_ONCE", at_once)
    found = network.marginals(features, evidence, chains=100, sweeps=30)
    expected = conditional(crf_probabilities(network, features), evidence)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.06)
    assert network.marginals(features[:0], evidence[:0]).shape == (0, L)


@pytest.mark.parametrize("kind", ["network", "crf"])
def test_a_known_label_tells_of_those_that_go_with_it(kind):
    """Two labels are drawn together, whatever the features are."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        coin = torch.rand(count, generator=generator) < 0.3
        features = torch.randn(count, 6, generator=generator)
        return split_of(features, torch.stack([features[:, 0] > 0, coin, coin], dim=1))

    train_split, val = split(400), split(200)
    said = []
    config = replace(QUICK, learning_rate=5e-2)
    model = train_dependencies(Training(train_split, val, HEAD, config, said.append), kind)
    assert not model.training and any("pseudo-NLL" in line for line in said)
    evidence = torch.zeros(200, 3, dtype=torch.int8)
    evidence[:100, 1], evidence[100:, 1] = 1, -1
    given = model.marginals(val.features, evidence)
    assert (given[:100, 2] > 0.8).all() and (given[100:, 2] < 0.1).all()
    alone = model.marginals(val.features)
    right = (alone[:, 0] > 0.5) == val.targets[:, 0]
    assert right.double().mean() > 0.9
    torch.testing.assert_close(alone[:, 1:].mean(0), torch.full((2,), 0.3), rtol=0, atol=0.15)
