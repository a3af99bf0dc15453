"""Label orders of training: the fixed ones, the one that is learned, and losses without one.

Letters: B images, T the most labels of an image, L labels (END not counted).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import SearchConfig, TrainConfig
from cnnrnn.labels import LabelSpace
from cnnrnn.model import Head

_SMALLEST = 1e-7


def first_label_space(
    names: tuple[str, ...], counts: np.ndarray, config: TrainConfig
) -> LabelSpace:
    """Return the label space that training starts with.

    Args:
        names: [L] label names in the source's order.
        counts: [L] training images that carry each label.
        config: names the label order; its seed draws `random`.
    """
    if config.label_order == "given":
        return LabelSpace.given(names)
    if config.label_order == "rare":
        return LabelSpace.rarest_first(names, counts)
    if config.label_order == "random":
        return LabelSpace.random(names, torch.Generator().manual_seed(config.seed))
    return LabelSpace.by_frequency(names, counts)


def require_search_order(config: TrainConfig, search: SearchConfig) -> None:
    """Refuse a search order that cannot follow the training paths.

    Raises:
        ValueError: the paths go down in label index, and the search allows only those that go up.
    """
    if config.label_order == "shuffled" and search.order == "increasing":
        raise ValueError(
            "search.order must be unique or free for label_order shuffled, got increasing; pass "
            "--search.order unique"
        )


def label_ease(marginals: Tensor, targets: Tensor) -> Tensor:
    """Say how easily a model finds each label: the mean log marginal where it is present.

    Args:
        marginals: [n, L] probability of each label, summed over paths.
        targets: [n, L] bool.

    Returns:
        [L] at most 0; -inf for a label that no image carries.
    """
    logs = marginals.double().clamp(min=_SMALLEST).log() * targets
    counts = targets.sum(0)
    return (logs.sum(0) / counts).masked_fill(counts == 0, -torch.inf)


@torch.no_grad()
def permute_labels(
    head: Head, order: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Number a head's labels anew, in place: label i becomes what label `order[i]` was.

    The rows of label embedding, score bias and independent classifier move, and with them what the
    optimiser keeps of each. Scores of a named label after named labels stay the same, but for the
    chain term, whose formula knows the order.

    Args:
        head: END and START keep their rows.
        order: [L] int64, a permutation.
        optimizer: of the head's parameters.
    """
    per_label: list[Tensor | None] = [head.label_embedding, head.score_bias]
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
