"""Label combinations: the classes are label sets, and evidence keeps those that agree."""

from __future__ import annotations

import torch

from cnnrnn.comparison.baselines import Training
from cnnrnn.comparison.combinations import (
    LabelCombinations,
    common_combinations,
    train_combinations,
)
from tests.comparison.test_baselines import HEAD, QUICK, split_of
from tests.comparison.test_chains import all_evidence, all_sets, conditional

L = 4


def random_combinations(sets, features=3):
    torch.manual_seed(0)
    model = LabelCombinations(HEAD, sets, features).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(3)
    return model


def test_the_most_frequent_sets_are_the_classes():
    rows = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]]) > 0
    sets, counts = common_combinations(rows, 9)
    assert sets.int().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert counts.tolist() == [3, 2, 1]
    assert torch.equal(common_combinations(rows, 2)[0], sets[:2])
    model = random_combinations(sets[:2])
    assert model.classes_of(rows).tolist() == [0, 1, 0, -1, 1, 0]
    assert model.classes_of(rows[:0]).tolist() == []


def test_marginals_given_known_labels_are_those_of_the_sets_that_agree():
    model, evidence = random_combinations(all_sets(L).flip(0)), all_evidence(L)
    features = torch.randn(len(evidence), 3)
    p = model(features).softmax(1).flip(1).double().detach()
    found = model.marginals(features, evidence)
    torch.testing.assert_close(found.double(), conditional(p, evidence), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.marginals(features).double(), p @ all_sets(L).double(),
                               rtol=0, atol=1e-6)  # fmt: skip
    assert torch.equal(model.best_sets(features), all_sets(L)[p.argmax(1)])


def test_where_no_set_agrees_those_with_the_fewest_errors_stay():
    sets = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]) > 0
    model, features = random_combinations(sets), torch.randn(1, 3)
    p = model(features)[0].softmax(0)
    found = model.marginals(features, torch.tensor([[1, -1, 0, 0]], dtype=torch.int8))[0]
    expected = torch.stack([torch.ones(()), torch.zeros(()), p[1] + p[2], p[2]])
    torch.testing.assert_close(found, expected.detach())  # each of them has one wrong
    found = model.marginals(features, torch.tensor([[1, 0, 1, 1]], dtype=torch.int8))[0]
    assert found.tolist() == [1, 0, 1, 1]  # the last has one wrong, the others two or three


def test_improbable_sets_keep_their_shares():
    """Their probabilities are 0 in float32; what is left of them is not."""
    model, features = random_combinations(all_sets(2)), torch.randn(1, 3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, -500.0, -501.0]))
    found = model.marginals(features, torch.tensor([[0, 1]], dtype=torch.int8))
    torch.testing.assert_close(found, torch.tensor([[1 / (1 + torch.e), 1.0]]))


def test_combinations_are_learned_and_rare_ones_left_out(monkeypatch):
    monkeypatch.setattr("cnnrnn.comparison.combinations.MOST_COMBINATIONS", 3)
    generator = torch.Generator().manual_seed(0)

    def split(count):
        features = torch.randn(count, 6, generator=generator)
        targets = torch.stack([features[:, 0] > 0, features[:, 0] > 0, features[:, 1] > 1], 1)
        return split_of(features, targets)

    said = []
    train_split, val = split(600), split(200)
    model = train_combinations(Training(train_split, val, HEAD, QUICK, said.append))
    assert len(model.combinations) == 3  # of four
    assert any(line.startswith("combinations second") for line in said) and not model.training
    right = (model.best_sets(val.features) == val.targets).all(1).double().mean()
    known = (model.classes_of(val.targets) >= 0).double().mean()
    assert right > known - 0.1 > 0.7
