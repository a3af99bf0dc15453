"""Losses against loops over the definition and sums over all label sets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cnnrnn.comparison.losses import (
    asymmetric_loss,
    softmax_cross_entropy,
    squared_error,
    warp_loss,
)
from cnnrnn.labels import forbidden_labels, increasing_paths
from cnnrnn.network.head import Head
from cnnrnn.network.losses import binary_cross_entropy, sequence_loss

ORDERS = ["increasing", "unique", "free"]


def allowed_after(prefix, num_labels, order):
    labels = range(num_labels)
    if order == "increasing" and prefix:
        labels = range(prefix[-1] + 1, num_labels)
    elif order == "unique":
        labels = [label for label in labels if label not in prefix]
    return [*labels, num_labels]


def loop_loss(scores, path, order):
    """One image's loss in plain Python: scores [T+1][L+1], path without padding."""
    end = len(scores[0]) - 1
    total = 0.0
    for step, target in enumerate([*path, end]):
        allowed = allowed_after(path[:step], end, order)
        peak = max(scores[step][label] for label in allowed)
        mass = sum(math.exp(scores[step][label] - peak) for label in allowed)
        total -= scores[step][target] - peak - math.log(mass)
    return total


def random_paths(batch, num_labels, order, generator):
    paths = []
    for _ in range(batch):
        length = int(torch.randint(0, num_labels + 1, (1,), generator=generator))
        if order == "free":
            path = torch.randint(0, num_labels, (length,), generator=generator).tolist()
        else:
            path = torch.randperm(num_labels, generator=generator)[:length].tolist()
        paths.append(sorted(path) if order == "increasing" else path)
    longest = max(map(len, paths), default=0)
    return torch.tensor(
        [path + [-1] * (longest - len(path)) for path in paths], dtype=torch.int64
    ).view(batch, longest)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_labels", [1, 2, 7])
@pytest.mark.parametrize("batch", [0, 1, 17])
def test_sequence_loss_is_the_loop(device, batch, num_labels, order):
    generator = torch.Generator().manual_seed(batch * 10 + num_labels)
    paths = random_paths(batch, num_labels, order, generator)
    scores = 5 * torch.randn(
        batch, paths.shape[1] + 1, num_labels + 1, generator=generator, dtype=torch.float64
    )
    expected = [
        loop_loss(image, [label for label in path if label >= 0], order)
        for image, path in zip(scores.tolist(), paths.tolist(), strict=True)
    ]
    losses = sequence_loss(scores.to(device), paths.to(device), order)
    torch.testing.assert_close(losses.cpu(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("order", ORDERS)
def test_forbidden_labels_are_the_definition(order):
    paths = random_paths(17, 5, order, torch.Generator().manual_seed(3))
    forbidden = forbidden_labels(paths, 5, order)
    assert not forbidden[:, :, 5].any()
    for row, path in enumerate(paths.tolist()):
        path = [label for label in path if label >= 0]
        for step in range(len(path) + 1):
            allowed = [x for x in range(6) if not forbidden[row, step, x]]
            assert allowed == allowed_after(path[:step], 5, order)


@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
@pytest.mark.parametrize("order", ORDERS)
def test_steps_past_the_end_contribute_nothing(order, garbage):
    paths = torch.tensor([[1, -1, -1], [0, 1, 2], [-1, -1, -1]])
    scores = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    past_end = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    spoiled = scores.masked_fill(past_end[:, :, None], garbage).requires_grad_()
    losses = sequence_loss(spoiled, paths, order)
    torch.testing.assert_close(losses, sequence_loss(scores, paths, order))
    losses.sum().backward()
    assert (spoiled.grad[past_end] == 0).all()
    assert (spoiled.grad[~past_end].abs().sum(1) > 0).all()


def test_a_short_path_beside_a_long_one_stays_finite_in_a_growing_cell():
    # END feeds the literal cell a large value at every padded step; labels feed it none.
    head = Head(3, 2, joint_dim=4, hidden_dim=4, cell="paper").double()
    with torch.no_grad():
        head.recurrence.weight_ih.fill_(1.0)
        head.recurrence.weight_hh.fill_(1.0)
        head.label_embedding.fill_(-1.0)  # keeps every gate at 0
        head.label_embedding[head.end] = 1e3
    features = torch.ones(2, 2, dtype=torch.float64)
    long = [0, 1, 2] * 6
    losses = sequence_loss(*_scores(head, features, [[0] + [-1] * 17, long]), "free")
    alone = sequence_loss(*_scores(head, features[:1], [[0]]), "free")
    torch.testing.assert_close(losses[:1], alone)
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def _scores(head, features, paths):
    paths = torch.tensor(paths)
    return head(features, paths)[0], paths


@pytest.mark.parametrize("chain_term", [False, True])
@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_probabilities_of_all_sets_sum_to_one(num_labels, chain_term):
    torch.manual_seed(num_labels)
    head = Head(num_labels, 3, joint_dim=4, hidden_dim=5, chain_term=chain_term).double().eval()
    sets = torch.tensor(list(itertools.product([False, True], repeat=num_labels)))
    features = torch.randn(1, 3, dtype=torch.float64).expand(len(sets), 3)
    paths = increasing_paths(sets)
    with torch.no_grad():
        losses = sequence_loss(head(features, paths)[0], paths, "increasing")
    assert float((-losses).exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "paper"])
@pytest.mark.parametrize("order", ORDERS)
def test_gradient_of_head_and_loss(order, cell):
    torch.manual_seed(0)
    head = Head(
        4, 3, joint_dim=5, hidden_dim=4, cell=cell, activation="tanh", chain_term=True
    ).double()
    paths = {"increasing": [[0, 2], [0, 3], [-1, -1]], "unique": [[2, 0], [2, -1], [-1, -1]],
             "free": [[2, 2], [2, -1], [-1, -1]]}[order]  # fmt: skip
    names = [name for name, _ in head.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in head.parameters())
    features = torch.randn(3, 3, dtype=torch.float64)

    def loss(*parameters):
        scores, _ = torch.func.functional_call(
            head, dict(zip(names, parameters, strict=True)), (features, torch.tensor(paths))
        )
        return sequence_loss(scores, torch.tensor(paths), order)

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("batch", [0, 1, 17])
def test_binary_cross_entropy_by_hand(batch):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(batch, 7, generator=generator)
    targets = torch.rand(batch, 7, generator=generator) < 0.4
    p = scores.double().sigmoid()
    expected = -(torch.where(targets, p, 1 - p)).log().sum(1)
    torch.testing.assert_close(binary_cross_entropy(scores, targets), expected.float())


def test_softmax_cross_entropy_shares_the_target_among_the_labels_present():
    scores = torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    targets = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    p = scores.softmax(1)
    expected = torch.stack(
        [-0.5 * (p[0, 0].log() + p[0, 2].log()), torch.tensor(math.log(3)), torch.tensor(0.0)]
    )
    torch.testing.assert_close(softmax_cross_entropy(scores, targets), expected)


def loop_squared_error(scores, present):
    return sum((f - y) ** 2 for f, y in zip(scores, present, strict=True))


def loop_asymmetric_loss(scores, present, gamma_negative=4.0, gamma_positive=0.0, clip=0.05):
    total = 0.0
    for f, y in zip(scores, present, strict=True):
        p = 1 / (1 + math.exp(-f))
        shifted = max(p - clip, 0.0)
        if y:
            total -= (1 - p) ** gamma_positive * math.log(p)
        else:
            total -= shifted**gamma_negative * math.log(1 - shifted)
    return total


def loop_warp_loss(scores, present):
    total = 0.0
    absent = [f for f, y in zip(scores, present, strict=True) if not y]
    for j in (f for f, y in zip(scores, present, strict=True) if y):
        violations = [1 - j + k for k in absent if 1 + k > j]
        rank = len(violations)
        weight = sum(1 / i for i in range(1, rank + 1))  # L(r) of Weston et al., eq. 2
        total += sum(weight * violation / rank for violation in violations)
    return total


LOOPS = {
    squared_error: loop_squared_error,
    asymmetric_loss: loop_asymmetric_loss,
    warp_loss: loop_warp_loss,
}


@pytest.mark.parametrize("loss", LOOPS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("num_labels", [1, 2, 7])
@pytest.mark.parametrize("batch", [0, 1, 17])
def test_a_loss_is_the_loop(device, loss, num_labels, batch):
    generator = torch.Generator().manual_seed(batch * 10 + num_labels)
    scores = 3 * torch.randn(batch, num_labels, generator=generator, dtype=torch.float64)
    targets = torch.rand(batch, num_labels, generator=generator) < 0.4
    targets[-1:] = True
    targets[1:2] = False
    expected = [
        LOOPS[loss](*image) for image in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    losses = loss(scores.to(device), targets.to(device))
    torch.testing.assert_close(losses.cpu(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("gammas", "clip"), [((2.0, 1.0), 0.1), ((0.0, 0.0), 0.0)])
def test_asymmetric_loss_options(gammas, clip):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    targets = torch.rand(5, 7, generator=generator) < 0.4
    expected = [
        loop_asymmetric_loss(f, y, *gammas, clip)
        for f, y in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        asymmetric_loss(scores, targets, *gammas, clip), torch.tensor(expected).double()
    )


def test_asymmetric_loss_without_focus_and_clip_is_binary_cross_entropy():
    scores = torch.tensor([[-200.0, -1.0, 0.0, 3.0, 200.0]])
    targets = torch.tensor([[True, False, True, False, False]])
    torch.testing.assert_close(
        asymmetric_loss(scores, targets, 0.0, 0.0, 0.0), binary_cross_entropy(scores, targets)
    )


@pytest.mark.parametrize("loss", LOOPS, ids=lambda loss: loss.__name__)
def test_gradient_of_a_loss(loss):
    generator = torch.Generator().manual_seed(2)  # no score lies at a kink
    scores = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 7, generator=generator) < 0.4
    assert torch.autograd.gradcheck(lambda f: loss(f, targets), (scores,))


@pytest.mark.parametrize("loss", LOOPS, ids=lambda loss: loss.__name__)
def test_extreme_scores_have_finite_losses_and_gradients(loss):
    scores = torch.tensor([[-1e4, 1e4, -1e4, 1e4]], requires_grad=True)
    losses = loss(scores, torch.tensor([[True, True, False, False]]))
    losses.sum().backward()
    assert losses.isfinite().all() and scores.grad.isfinite().all()


def test_warp_gives_the_same_twice_and_0_once_every_margin_is_kept():
    targets = torch.tensor([[True, False, True]])
    assert float(warp_loss(torch.tensor([[2.0, 0.5, 1.5]]), targets)) == 0.0
    scores = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    many = torch.rand(9, 40, generator=torch.Generator().manual_seed(1)) < 0.2
    assert torch.equal(warp_loss(scores, many), warp_loss(scores, many))
