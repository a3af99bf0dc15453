"""The losses of the path model, one value per image: of a path, and of independent labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn.config import Order
from cnnrnn.labels import PAD, forbidden_labels


def sequence_loss(
    scores: Tensor, paths: Tensor, order: Order, prefixes: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each step of a path, END included, summed over steps (section 3.3).

    The softmax runs over what `order` allows after each prefix: labels above the last one and END
    for `increasing`, labels not yet on the path and END for `unique`, everything for `free`.

    Args:
        scores: [B, T+1, L+1] of the label after each prefix, END last.
        paths: [B, T] int64 label indices padded with -1.
        order: which labels may follow.
        prefixes: [B, T] int64, the labels that each step's scores follow, as many as the path has;
            None for the path's own.

    Returns:
        [B] negative log-probability of each path.
    """
    B, T = paths.shape
    end = scores.shape[2] - 1
    padded = functional.pad(paths, (0, 1), value=PAD)
    targets = padded.masked_fill(padded == PAD, end)
    lengths = (paths != PAD).sum(1, keepdim=True)
    steps = torch.arange(T + 1, device=paths.device) <= lengths  # others hold whatever they do
    rows = scores[steps]
    if order != "free":
        forbidden = forbidden_labels(paths if prefixes is None else prefixes, end, order)
        rows = rows.masked_fill(forbidden[steps], -torch.inf)
    losses = functional.cross_entropy(rows, targets[steps], reduction="none")
    return losses.new_zeros(B, T + 1).masked_scatter(steps, losses).sum(1)


def binary_cross_entropy(
    label_scores: Tensor, targets: Tensor, unknown: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy summed over the labels that are known.

    Args:
        label_scores: [B, L] log-odds.
        targets: [B, L] bool.
        unknown: [B, L] bool, labels that are neither present nor absent.

    Returns:
        [B] float32.
    """
    losses = functional.binary_cross_entropy_with_logits(
        label_scores.float(), targets.float(), reduction="none"
    )
    return (losses if unknown is None else losses.masked_fill(unknown, 0.0)).sum(1)
