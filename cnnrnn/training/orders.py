"""Label orders of training: fixed ones, the learned one, and losses without an order.

Letters: B images, T the most labels of an image, L labels (END not counted).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import PathLoss, SearchConfig, TrainConfig
from cnnrnn.labels import PAD, forbidden_labels, increasing_paths
from cnnrnn.machine.extras import from_extra
from cnnrnn.network.head import Head

_SMALLEST = 1e-7


def require_search_order(config: TrainConfig, search: SearchConfig) -> None:
    """Refuse a search order that does not allow the training paths.

    Raises:
        ValueError: the paths do not increase in label index, as the search requires.
    """
    if config.loss != "sequence" and search.order != "unique":
        raise ValueError(
            f"search.order must be unique for loss {config.loss}, got {search.order}; pass "
            "--search.order unique"
        )
    if config.label_order == "shuffled" and search.order == "increasing":
        raise ValueError(
            "search.order must be unique or free for label_order shuffled, got increasing; pass "
            "--search.order unique"
        )


def label_ease(marginals: Tensor, targets: Tensor) -> Tensor:
    """Return how easily a model finds each label: its mean log marginal where it is present.

    Args:
        marginals: [n, L] probability of each label, summed over paths.
        targets: [n, L] bool.

    Returns:
        [L] at most 0; -inf for a label that no image has.
    """
    logs = marginals.double().clamp(min=_SMALLEST).log() * targets
    counts = targets.sum(0)
    return (logs.sum(0) / counts).masked_fill(counts == 0, -torch.inf)


@torch.no_grad()
def permute_labels(
    head: Head, order: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Renumber a head's labels in place: label i becomes what label `order[i]` was.

    The rows of both embeddings, the score bias and the independent classifier move, and with them
    the optimiser's state of each. Scores of a label after given labels stay the same, except for
    the chain term, whose formula depends on the order.

    Args:
        head: END and START keep their rows.
        order: [L] int64, a permutation.
        optimizer: of the head's parameters.
    """
    per_label: list[Tensor | None] = [head.label_embedding, head.input_embedding, head.score_bias]
    if head.label_classifier is not None:
        per_label += [head.label_classifier.weight, head.label_classifier.bias]
    for parameter in per_label:
        if parameter is None:
            continue
        kept = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        same_shape = [
            value
            for value in kept.values()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        ]
        for tensor in (parameter, *same_shape):
            tensor[: head.num_labels] = tensor[order.to(tensor.device)]


class OwnSteps(NamedTuple):
    """A head's scores along the labels that it predicts itself.

    Attributes:
        scores: [B, T+1, L+1] of the label after each prefix, chain term included, 0 past the end.
        prefixes: [B, T] int64 the labels predicted, padded with -1.
        label_scores: [B, L] the independent classifier's scores, or None without a chain term.
    """

    scores: Tensor
    prefixes: Tensor
    label_scores: Tensor | None


def own_steps(head: Head, features: Tensor, lengths: Tensor) -> OwnSteps:
    """Run a head greedily on its own predictions, a given number of labels long.

    Each step's input is the label that the previous step scored best, in the same pass with the
    same dropout, among those not yet predicted; END is left out. Images that have predicted the
    same labels so far share one recurrent state.

    Args:
        head: in train or eval mode.
        features: [B, F].
        lengths: [B] labels to predict, at most L.

    Returns:
        The scores after each prefix, the empty and the whole one included.
    """
    embedding, label_scores = head.embed_with_label_scores(features)
    B, L, T = len(features), head.num_labels, int(lengths.max()) if len(lengths) else 0
    device = embedding.joint.device
    prefixes = torch.full((B, T), PAD, device=device)
    taken = torch.zeros(B, L + 1, dtype=torch.bool, device=device)
    taken[:, head.end] = True
    at = torch.zeros(B, dtype=torch.int64, device=device)  # each image's state among the distinct
    state = head.extend(torch.tensor([head.start], device=device), head.initial_state(1))
    steps = []
    for step in range(T + 1):
        images = (lengths >= step).nonzero()[:, 0]
        rows = head.score(state[0][at[images]], embedding.of(images))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if embedding.label_logits is not None:
            rows = rows + embedding.label_logits[images]
        steps.append(rows.new_zeros(B, L + 1).index_put((images,), rows))
        if step == T:
            break
        images = (lengths > step).nonzero()[:, 0]
        labels = steps[step].detach()[images].masked_fill(taken[images], -torch.inf).argmax(1)
        prefixes[images, step] = labels
        taken[images, labels] = True
        distinct, at[images] = (at[images] * L + labels).unique(return_inverse=True)
        output, cell = state
        state = head.extend(distinct % L, (output[distinct // L], cell[distinct // L]))
    return OwnSteps(torch.stack(steps, 1), prefixes, label_scores)


@torch.no_grad()
def aligned_paths(scores: Tensor, prefixes: Tensor, targets: Tensor, loss: PathLoss) -> Tensor:
    """Order each image's labels by the steps that predict them best.

    Yazici et al., "Orderless Recurrent Models for Multi-label Classification", CVPR 2020. Of all
    orders `mla` takes the one of least cross-entropy; `pla` first keeps every label that was
    predicted and is present at the step that predicted it, and orders the others likewise.

    From the paper: the recurrence reads the model's own predictions, there are as many steps as the
    image has labels, and END comes after them. Ours: a label that was predicted may not be
    predicted again, nor END before its step, and the softmax runs over what is not yet predicted,
    as in a search of order `unique`; so no label is aligned with a step after it was predicted.

    Args:
        scores: [B, T+1, L+1] after each prefix, END last.
        prefixes: [B, T] int64 the labels predicted, padded with -1, as many as the image has.
        targets: [B, L] bool.
        loss: `pla` or `mla`.

    Returns:
        [B, T] int64 the labels present in aligned order, padded with -1.
    """
    with from_extra("scipy", f"loss {loss}"):
        from scipy.optimize import linear_sum_assignment

    paths = increasing_paths(targets)
    B, T = paths.shape
    steps = prefixes != PAD  # [B, T]
    forbidden = forbidden_labels(prefixes, targets.shape[1], "unique")[:, :T]
    rows = scores[:, :T][steps].masked_fill(forbidden[steps], -torch.inf)
    masses = scores.new_zeros(B, T).masked_scatter(steps, rows.logsumexp(1))
    columns = paths.clamp(min=0)[:, None].expand(B, T, T)
    costs = masses[:, :, None] - scores[:, :T].gather(2, columns)  # [B, step, label]
    costs = costs.masked_fill(forbidden.gather(2, columns), torch.inf)
    if loss == "pla":
        present = targets.gather(1, prefixes.clamp(min=0)) & steps
        other = paths[:, None] != prefixes[:, :, None]
        costs = costs.masked_fill(present[:, :, None] & other, torch.inf)
    matrices = costs.cpu().numpy()
    order = np.tile(np.arange(T), (B, 1))
    # The loss reports scores that are not finite.
    broken = (~scores.isfinite()).flatten(1).any(1).tolist()
    for image, length in enumerate(steps.sum(1).tolist()):
        if length > 1 and not broken[image]:
            order[image, :length] = linear_sum_assignment(matrices[image, :length, :length])[1]
    return paths.gather(1, torch.from_numpy(order).to(paths.device))
