"""The learned metric: votes against a loop, and what it learns to look at."""

from __future__ import annotations

from dataclasses import replace

import torch

from cnnrnn.comparison.baselines import Training, choose_cut, network_outputs
from cnnrnn.comparison.classical import fit_nearest_neighbours
from cnnrnn.comparison.metric import NeighbourMetric, train_metric
from tests.comparison.test_baselines import HEAD, QUICK, correlated


def test_votes_are_the_loop_and_no_image_votes_on_itself():
    torch.manual_seed(0)
    training = correlated(12, 0, noise=2)
    model = NeighbourMetric(HEAD, training).eval()
    references = torch.tensor([7, 2, 3, 11, 0])
    records = torch.tensor([3, -1, 5, 0])
    asked = torch.randn(4, 4)
    found = model.votes(asked, records, references)
    M = model.projection.weight
    for image in range(4):
        weights = torch.zeros(5)
        for i, j in enumerate(references.tolist()):
            if records[image] != j:
                weights[i] = (-(M @ (asked[image] - training.features[j])).square().sum()).exp()
        expected = (weights / weights.sum()) @ training.targets[references].float()
        torch.testing.assert_close(found[image], expected)
    everything = model.votes(asked, torch.full((4,), -1), torch.arange(12))
    assert torch.equal(model(asked), everything)
    assert set(model.state_dict()) == {"projection.weight", "trunk.feature_scale"}


def test_it_learns_which_features_say_something():
    train_split, test = correlated(300, 0), correlated(200, 1)
    said = []
    config = replace(QUICK, learning_rate=5e-2, epochs=10, finish_epochs=1)
    model = train_metric(Training(train_split, test, HEAD, config, said.append))
    assert not model.training and any(line.startswith("metric second") for line in said)
    size = model.projection.weight.norm(dim=0)
    assert size[:2].min() > 2 * size[2:].max()
    found = choose_cut(network_outputs(model, test.features), test.targets).value
    plain = fit_nearest_neighbours(train_split, 30)(test.features)
    assert found > choose_cut(plain, test.targets).value + 0.1
