"""PLA and MLA against loops over every order of the labels, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.labels import increasing_paths, path_sets
from cnnrnn.network.head import Head
from cnnrnn.network.losses import sequence_loss
from cnnrnn.training.orders import aligned_paths, own_steps
from cnnrnn.training.run import train

pytest.importorskip("scipy")
LOSSES = ["pla", "mla"]


def loop_loss(scores, path, prefix):
    """One image's loss: scores [T+1][L+1] after each part of the prefix; no label of it repeats."""
    end = len(scores[0]) - 1
    total = 0.0
    for step, target in enumerate([*path, end]):
        allowed = [label for label in range(end + 1) if label not in prefix[:step]]
        if target not in allowed:
            return math.inf
        peak = max(scores[step][label] for label in allowed)
        mass = sum(math.exp(scores[step][label] - peak) for label in allowed)
        total -= scores[step][target] - peak - math.log(mass)
    return total


def best_order(scores, labels, prefix, loss):
    """The least loss over all orders that `loss` admits, and that order."""
    found = []
    for path in itertools.permutations(labels):
        kept = all(
            path[step] == label for step, label in enumerate(prefix) if label in labels
        )  # fmt: skip
        if kept or loss == "mla":
            found.append((loop_loss(scores, path, prefix), list(path)))
    return min(found)


def case(batch, num_labels, most=5, seed=0):
    """Random scores, sets of at most `most` labels, and as many labels predicted."""
    generator = torch.Generator().manual_seed(seed + 10 * batch + num_labels)
    targets = torch.rand(batch, num_labels, generator=generator) < 0.5
    targets &= targets.cumsum(1) <= most
    lengths = targets.sum(1)
    longest = int(lengths.max()) if batch else 0
    drawn = torch.rand(batch, num_labels, generator=generator).argsort(1)[:, :longest]
    prefixes = drawn.masked_fill(torch.arange(longest) >= lengths[:, None], -1)
    scores = 3 * torch.randn(
        batch, longest + 1, num_labels + 1, generator=generator, dtype=torch.float64
    )
    return scores, prefixes, targets


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_labels", [1, 2, 7])
@pytest.mark.parametrize("batch", [0, 1, 17])
def test_the_aligned_order_is_the_best_of_all(device, batch, num_labels, loss):
    scores, prefixes, targets = case(batch, num_labels)
    arguments = (scores.to(device), prefixes.to(device), targets.to(device))
    paths = aligned_paths(*arguments, loss)
    assert torch.equal(path_sets(paths.cpu(), num_labels), targets)
    losses = sequence_loss(arguments[0], paths, "unique", arguments[1]).tolist()
    for row in range(batch):
        labels = targets[row].nonzero()[:, 0].tolist()
        prefix = [label for label in prefixes[row].tolist() if label >= 0]
        least, order = best_order(scores[row].tolist(), labels, prefix, loss)
        assert [label for label in paths[row].tolist() if label >= 0] == order
        assert losses[row] == pytest.approx(least, abs=1e-12)


def test_labels_predicted_keep_their_steps_under_pla_alone():
    scores, prefixes, targets = case(200, 7, seed=1)
    paths = {loss: aligned_paths(scores, prefixes, targets, loss) for loss in LOSSES}
    hits = (prefixes >= 0) & targets.gather(1, prefixes.clamp(min=0))
    assert hits.any() and torch.equal(paths["pla"][hits], prefixes[hits])
    assert not torch.equal(paths["mla"][hits], prefixes[hits])
    pla, mla = (sequence_loss(scores, paths[loss], "unique", prefixes) for loss in LOSSES)
    assert (mla <= pla + 1e-12).all() and (mla < pla - 1e-3).any()


@pytest.mark.parametrize("cell", ["lstm", "paper"])
@pytest.mark.parametrize("chain_term", [False, True])
def test_own_steps_are_the_loop(device, cell, chain_term):
    torch.manual_seed(0)
    head = Head(6, 3, joint_dim=5, hidden_dim=4, cell=cell, chain_term=chain_term)
    head = head.double().to(device)
    features = 3 * torch.randn(17, 3, dtype=torch.float64, device=device)
    lengths = torch.arange(17, device=device) % 7
    steps = own_steps(head, features, lengths)
    assert steps.scores.shape == (17, 7, 7) and steps.prefixes.shape == (17, 6)
    for row, length in enumerate(lengths.tolist()):
        path = []
        for step in range(length + 1):
            scores, _ = head(features[row : row + 1], torch.tensor([path], device=device).long())
            torch.testing.assert_close(steps.scores[row, step], scores[0, -1])
            if step < length:
                left = [label for label in range(6) if label not in path]
                path.append(max(left, key=scores[0, -1].tolist().__getitem__))
        assert steps.prefixes[row].tolist() == path + [-1] * (6 - length)
        assert (steps.scores[row, length + 1 :] == 0).all()
    _, label_scores = head(features, steps.prefixes)
    assert (steps.label_scores is None) == (label_scores is None)
    if chain_term:
        torch.testing.assert_close(steps.label_scores, label_scores)


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
def test_own_steps_of_nothing(lengths):
    head = Head(4, 3, joint_dim=5, hidden_dim=4)
    steps = own_steps(head, torch.zeros(len(lengths), 3), torch.tensor(lengths, dtype=torch.int64))
    assert steps.scores.shape == (len(lengths), 1, 5)
    assert steps.prefixes.shape == (len(lengths), 0)
    targets = torch.zeros(len(lengths), 4) > 0
    assert aligned_paths(steps.scores, steps.prefixes, targets, "pla").shape == (len(lengths), 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_label_leaves_nothing_to_align(loss):
    torch.manual_seed(0)
    head = Head(3, 4, joint_dim=5, hidden_dim=4, chain_term=True).double()
    features = 3 * torch.randn(40, 4, dtype=torch.float64)
    targets = torch.eye(3, dtype=torch.bool)[torch.randint(0, 3, (40,))]
    steps = own_steps(head, features, targets.sum(1))
    paths = aligned_paths(steps.scores, steps.prefixes, targets, loss)
    assert torch.equal(paths, increasing_paths(targets))
    losses = sequence_loss(steps.scores, paths, "unique", steps.prefixes)
    forced = sequence_loss(head(features, paths)[0], paths, "unique")
    right = (steps.prefixes == paths)[:, 0]
    assert right.any() and not right.all()
    torch.testing.assert_close(losses[right], forced[right])
    assert (losses[~right] - forced[~right]).abs().min() > 1e-6  # END follows what was predicted


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_flow_through_every_step(loss):
    torch.manual_seed(0)
    head = Head(5, 3, joint_dim=4, hidden_dim=4, activation="tanh", chain_term=True).double()
    names = [name for name, _ in head.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in head.parameters())
    features = 3 * torch.randn(4, 3, dtype=torch.float64)
    targets = torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [0, 0, 1, 0, 0], [1] * 5]) > 0

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self):
            steps = own_steps(self.head, features, targets.sum(1))
            paths = aligned_paths(steps.scores, steps.prefixes, targets, loss)
            return sequence_loss(steps.scores, paths, "unique", steps.prefixes)

    def losses(*parameters):
        named = {f"head.{name}": p for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Loss(), named, ())

    assert torch.autograd.gradcheck(losses, values)


def test_scores_that_are_not_finite_are_left_for_the_loss_to_report():
    scores, prefixes, targets = case(17, 7)
    scores[3] = math.nan
    paths = aligned_paths(scores, prefixes, targets, "mla")
    assert sequence_loss(scores, paths, "unique", prefixes).isnan().nonzero().tolist() == [[3]]


QUICK = TrainConfig(feature_rms=0.0, warm_epochs=1, epochs=6, batch_size=32, learning_rate=2e-2, 
                    device="cpu", ema_decay=0.0, finish_epochs=0)  # fmt: skip
MODEL = ModelConfig(trunk_dim=0, joint_dim=16, hidden_dim=16, input_dropout=0.0,
                    hidden_dropout=0.0, joint_dropout=0.1)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    labels = random.random((240, 5)) < [0.5, 0.2, 0.4, 0.3, 0.1]
    features = np.where(labels, 1.0, -1.0) + 0.1 * random.standard_normal((240, 5))
    np.savez(tmp_path / "data.npz", features=features.astype(np.float32), labels=labels,
             label_names=np.array(list("abcde")))  # fmt: skip
    return load_dataset(f"features:{tmp_path / 'data.npz'}")


@pytest.mark.parametrize("loss", LOSSES)
def test_training_without_an_order(tmp_path, data, loss):
    search = SearchConfig(beam_size=4, order="unique")
    model = replace(MODEL, chain_term=False)
    runs = [
        train(data, tmp_path / name, model, search, replace(QUICK, loss=loss, seed=seed))
        for name, seed in (("one", 0), ("two", 0))
    ]
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].metrics["path"]["O-F1"] > 0.9


def test_losses_without_an_order_need_a_search_without_one(tmp_path, data):
    for order in ("increasing", "free"):
        with pytest.raises(ValueError, match=f"must be unique for loss pla, got {order}; pass "
                                             "--search.order unique"):  # fmt: skip
            train(data, tmp_path, MODEL, SearchConfig(order=order), replace(QUICK, loss="pla"))
    for order in ("easiest", "shuffled"):
        with pytest.raises(ValueError, match="label_order must be frequency, rare, given or random "
                                             f"for loss mla, .*, got {order}"):  # fmt: skip
            TrainConfig(loss="mla", label_order=order)
    with pytest.raises(ValueError, match="loss must be one of sequence, pla, mla, got 'ctc'"):
        TrainConfig(loss="ctc")
