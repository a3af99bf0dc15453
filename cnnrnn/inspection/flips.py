"""How probable a record's label set is with each of its labels turned: two set scores, no search.

Letters: n records, B of one slice, L labels, T the largest label set, M scored steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn.labels import PAD, forbidden_labels, increasing_paths
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble, mixture_log_probs
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import NonFiniteError

VALUES_AT_ONCE = 1 << 23
"""Scores and states held while sets are scored: 32 MB in float32."""


def require_increasing(order: str) -> None:
    """Raise a ValueError where a label set has several paths."""
    if order != "increasing":
        raise ValueError(
            "search.order must be increasing to judge labels, so that a label set has one path, "
            f"got {order}"
        )


@torch.no_grad()
def flip_log_odds(model: CNNRNN | Ensemble, features: Tensor, targets: Tensor) -> Tensor:
    """Return the log-odds of each label of each record, given the record's other labels.

    Args:
        model: in eval mode.
        features: [n, F].
        targets: [n, L] bool, columns in the order of `model.labels`.

    Returns:
        [n, L] float64 on the CPU, log P(set with the label | image) - log P(set without it |
        image), in nats; of an ensemble, of its members' mean probabilities.

    Raises:
        ValueError: the model's paths go in another order than `increasing`, so that a set has more
            than one.
        NonFiniteError: records whose scores are not finite.
    """
    members = model.models if isinstance(model, Ensemble) else [model]
    found = []
    for member in members:
        require_increasing(member.search.order)
        position = {name: column for column, name in enumerate(member.labels)}
        own = torch.tensor([position[name] for name in model.labels])  # each label's column there
        given, flipped = flipped_log_probs(
            member.head, features.to(member.device), targets[:, own.argsort()]
        )
        found.append(torch.cat([given[:, None], flipped[:, own]], 1))
    log_probs = mixture_log_probs(found)
    bad = (~log_probs.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        raise NonFiniteError(bad.tolist(), len(features))
    sign = torch.where(targets.cpu(), 1.0, -1.0)
    return sign * (log_probs[:, :1] - log_probs[:, 1:])


@torch.no_grad()
def flipped_log_probs(
    head: Head, features: Tensor, targets: Tensor, values_at_once: int = VALUES_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Return log P(set | image) of each record's label set, and of it with each label turned.

    Along the path that training takes, as `search.inference.set_nll`. A set that differs in label l
    shares the path up to l: a record of k labels takes its k+1 steps once, and for each label only
    those after it, 1 + k/2 on average. Records go in the order of their sets, so that many share
    prefixes, each of which is one recurrent state.

    Args:
        head: in eval mode, trained on increasing paths.
        features: [n, F] on the head's device.
        targets: [n, L] bool, columns in path order.
        values_at_once: bounds the memory; the result does not depend on it but for rounding.

    Returns:
        [n] of the sets as they are and [n, L] of those with the label taken out where it is
        present, put in where it is absent; float64 on the CPU.
    """
    if targets.shape != (len(features), head.num_labels):
        raise ValueError(
            f"targets must be [{len(features)}, {head.num_labels}], got {list(targets.shape)}"
        )
    n, L = targets.shape
    given = torch.zeros(n, dtype=torch.float64)
    flipped = torch.zeros(n, L, dtype=torch.float64)
    longest = int(targets.sum(1).max()) + 1 if n else 1
    images_at_once = max(1, values_at_once // (3 * (longest + 1) * (L + 1)))
    for part in _by_set(targets).split(images_at_once):
        embedding = head.embed(features[part.to(features.device)])
        own = targets[part].to(features.device)
        of_sets, of_flips = _flips_of(head, embedding, own, values_at_once)
        given[part], flipped[part] = of_sets.cpu(), of_flips.cpu()
    return given, flipped


def _by_set(targets: Tensor) -> Tensor:
    """Return the records [n] in an order in which equal and similar label sets stand together."""
    paths = increasing_paths(targets.cpu())
    order = torch.arange(len(paths))
    for step in reversed(range(paths.shape[1])):
        order = order[paths[order, step].argsort(stable=True)]
    return order


def _flips_of(
    head: Head, embedding: ImageEmbedding, targets: Tensor, values_at_once: int
) -> tuple[Tensor, Tensor]:
    """Score the sets of some images [B, L] and all that differ in one label: [B] and [B, L]."""
    B, L = targets.shape
    steps = _path_log_probs(head, embedding, targets)  # [B, T+1, L+1]
    sizes = targets.sum(1, keepdim=True)
    path = functional.pad(increasing_paths(targets), (0, 2), value=PAD)
    path = path.masked_fill(path == PAD, L)  # [B, T+2], END after the labels
    taken = steps.gather(2, path[:, :-1, None])[:, :, 0].double()
    positions = torch.arange(taken.shape[1], device=targets.device)
    taken = taken.masked_fill(positions > sizes, 0)
    before = functional.pad(taken.cumsum(1), (1, 0))  # [B, T+2] of the first 0, 1, ... steps
    below = targets.cumsum(1) - targets.long()  # [B, L] labels of the set below each label
    # Where the label is there, the label after it comes in its place; else it comes itself.
    follows = torch.where(
        targets, path.gather(1, below + 1), torch.arange(L, device=targets.device)
    )
    rows = torch.arange(B, device=targets.device)[:, None]
    flipped = before.gather(1, below) + steps[rows, below, follows].double()

    left = sizes - below + torch.where(targets, -1, 1)  # [B, L] steps after the flip, END's too
    width = L + 1 + 6 * head.hidden_dim  # scores of a step; gates, output and cell of a state
    at_once = max(1, values_at_once // width)
    image, label = (left > 0).nonzero(as_tuple=True)
    counts = left[image, label].cumsum(0)
    first = 0
    while first < len(image):
        held = counts[first - 1] if first else 0
        last = max(first + 1, int(torch.searchsorted(counts, held + at_once, right=True)))
        some = slice(first, last)
        flipped[image[some], label[some]] += _after_flip(
            head, embedding, targets, image[some], label[some], below
        )
        first = last
    return before[:, -1], flipped


def _path_log_probs(head: Head, embedding: ImageEmbedding, targets: Tensor) -> Tensor:
    """Return the log-probability of every label after each prefix of the sets: [B, T+1, L+1]."""
    paths = increasing_paths(targets)
    scores = head.score_paths(embedding, paths)
    forbidden = forbidden_labels(paths, head.num_labels, "increasing")
    return scores.masked_fill(forbidden, -torch.inf).log_softmax(2)


def _after_flip(
    head: Head,
    embedding: ImageEmbedding,
    targets: Tensor,
    image: Tensor,
    label: Tensor,
    below: Tensor,
) -> Tensor:
    """Return the log-probability [P] of what follows the label that is turned, END included.

    Args:
        head: scores steps.
        embedding: of B images.
        targets: [B, L] bool.
        image: [P] whose set is changed.
        label: [P] which label is turned.
        below: [B, L] how many labels of the set are below each label.
    """
    L = head.num_labels
    sets = targets[image]
    pairs = torch.arange(len(image), device=image.device)
    sets[pairs, label] = ~sets[pairs, label]
    paths = increasing_paths(sets)
    positions = torch.arange(paths.shape[1] + 1, device=paths.device)
    sizes = (paths != PAD).sum(1, keepdim=True)
    wanted = (positions > below[image, label][:, None]) & (positions <= sizes)
    rows = head.score_steps(embedding, paths, wanted, image)  # [M, L+1]
    last = functional.pad(paths, (1, 0), value=PAD)[wanted]  # [M]
    following = functional.pad(paths, (0, 1), value=PAD)
    following = following.masked_fill(following == PAD, L)[wanted]
    columns = torch.arange(L + 1, device=rows.device)
    rows.masked_fill_((columns <= last[:, None]) & (columns < L), -torch.inf)
    chosen = rows.gather(1, following[:, None])[:, 0].double() - rows.logsumexp(1).double()
    of_path = wanted.nonzero(as_tuple=True)[0]
    return chosen.new_zeros(len(image)).index_add_(0, of_path, chosen)
