"""What a head finds in feature vectors: paths, marginals, and how probable a true set is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrnn.config import Order, SearchConfig
from cnnrnn.labels import increasing_paths
from cnnrnn.network.head import Head
from cnnrnn.network.losses import sequence_loss
from cnnrnn.search import NonFiniteError, SearchResult, beam_search

SEARCH_BATCH = 4096


NLL_BATCH = 512


_SMALLEST = 1e-7


@dataclass(frozen=True, eq=False)
class Inference:
    """What the head finds in n images.

    Attributes:
        sets: [n, L] bool, the label set of each image's best path.
        marginals: [n, L] probability that a path holds each label, see `SearchResult.marginals`.
        label_scores: [n, L] the chain term's own scores v, or None without it.
        search: the searches' results, one per slice of the images.
    """

    sets: Tensor
    marginals: Tensor
    label_scores: Tensor | None
    search: tuple[SearchResult, ...]

    def result_of(self, image: int) -> tuple[SearchResult, int]:
        """Return the search result that holds an image, and the image's row in it."""
        return self.search[image // SEARCH_BATCH], image % SEARCH_BATCH

    def mixed(self, weight: float) -> Tensor:
        """Return marginals mixed with the chain term's own probabilities: [n, L] in 0..1."""
        return mixed_scores(self.marginals, self.label_scores, weight)


@torch.no_grad()
def infer(head: Head, features: Tensor, search: SearchConfig) -> Inference:
    """Search feature vectors, in slices that bound memory.

    Args:
        head: in eval mode.
        features: [n, F] on the head's device.
        search: the search options.

    Returns:
        Sets and scores on the CPU.

    Raises:
        NonFiniteError: for feature vectors that give values that are not finite.
    """
    results, scores = [], []
    for slice_, part in enumerate(features.split(SEARCH_BATCH) if len(features) else [features]):
        embedding, label_scores = head.embed_with_label_scores(part)
        try:
            results.append(beam_search(head, embedding, search, marginals=True))
        except NonFiniteError as error:
            first = slice_ * SEARCH_BATCH
            raise NonFiniteError([first + i for i in error.images], len(features)) from None
        if label_scores is not None:
            scores.append(label_scores.float().cpu())
    return Inference(
        sets=torch.cat([result.best_sets() for result in results]).cpu(),
        marginals=torch.cat([result.marginals() for result in results]).cpu(),
        label_scores=torch.cat(scores) if scores else None,
        search=tuple(results),
    )


@torch.no_grad()
def set_nll(head: Head, features: Tensor, targets: Tensor, order: Order) -> Tensor:
    """Return -log P(the whole true set | image), in nats, by teacher forcing.

    Along the path that training takes: labels ascending in index, then END, whatever `max_labels`
    and `min_labels` of a search are. In other orders than `increasing` a set has further paths, so
    this is an upper bound.

    Args:
        head: in eval mode.
        features: [n, F] on the head's device.
        targets: [n, L] bool, columns in path order.
        order: of the search; which labels may follow.

    Returns:
        [n] float64, on the CPU.
    """
    parts = []
    for some, present in zip(features.split(NLL_BATCH), targets.split(NLL_BATCH), strict=True):
        paths = increasing_paths(present.to(some.device))
        scores, _ = head(some, paths)
        parts.append(sequence_loss(scores, paths, order).double().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def mixed_scores(marginals: Tensor, label_scores: Tensor | None, weight: float) -> Tensor:
    """Mix path marginals with independent label scores, in logit space.

    Args:
        marginals: [n, L] probabilities.
        label_scores: [n, L] logits, or None for the marginals alone.
        weight: of the label scores, 0 to 1.

    Returns:
        [n, L] scores in 0..1.
    """
    if label_scores is None or weight == 0:
        return marginals
    if weight == 1:
        return label_scores.sigmoid()
    logits = marginals.clamp(_SMALLEST, 1 - _SMALLEST).logit()
    return ((1 - weight) * logits + weight * label_scores).sigmoid()
