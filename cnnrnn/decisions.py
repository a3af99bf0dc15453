"""From image features to a decided label set: the best path, or a cut through mixed marginals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrnn.config import DECISIONS, Calibration, Decide, Order, SearchConfig
from cnnrnn.labels import increasing_paths
from cnnrnn.losses import sequence_loss
from cnnrnn.metrics import (
    best_k,
    best_label_thresholds,
    best_threshold,
    multilabel_metrics,
    threshold_sets,
    top_k_sets,
)
from cnnrnn.model import Head
from cnnrnn.search import NonFiniteError, SearchResult, beam_search

MIX_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
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


def calibrate(inference: Inference, targets: Tensor) -> Calibration:
    """Choose mixing weight, thresholds and k on validation data.

    The weight has the best sum of O-F1 (at its own best threshold) and mAP; 0 where the model has
    no chain term to mix in.

    Args:
        inference: of the validation images.
        targets: [n, L] bool.
    """
    weights = MIX_WEIGHTS if inference.label_scores is not None else (0.0,)

    def merit(weight: float) -> float:
        scores = inference.mixed(weight)
        return best_threshold(scores, targets)[1] + mean_average_precision(scores, targets)

    weight = max(weights, key=merit)
    scores = inference.mixed(weight)
    threshold, _ = best_threshold(scores, targets)
    label_thresholds = best_label_thresholds(scores, targets, otherwise=threshold)
    k, _ = best_k(scores, targets)
    return Calibration(threshold, weight, tuple(label_thresholds.tolist()), k)


def decided_sets(decide: Decide, sets: Tensor, scores: Tensor, calibration: Calibration) -> Tensor:
    """Return the label sets of a decision: [n, L] bool.

    Args:
        decide: `path` takes the best path's set, the others cut through the scores as calibrated.
        sets: [n, L] bool, the sets of the best paths.
        scores: [n, L] mixed marginals.
        calibration: thresholds and k.
    """
    if decide == "path":
        return sets
    if decide == "threshold":
        return threshold_sets(scores, calibration.threshold)
    if decide == "k":
        return top_k_sets(scores, calibration.k)
    if decide == "label_thresholds":
        cuts = calibration.label_thresholds
        return threshold_sets(scores, torch.tensor(cuts) if cuts else calibration.threshold)
    raise ValueError(f"decide must be one of {', '.join(DECISIONS)}, got {decide!r}")


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Return mAP, 0 where no label has a positive."""
    value = multilabel_metrics(scores, targets)["mAP"]
    return 0.0 if value != value else value


def decision_metrics(
    inference: Inference,
    targets: Tensor,
    calibration: Calibration,
    k: int | None = None,
    unknown: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Measure every decision, ranked by the mixed marginals.

    Args:
        inference: of the images.
        targets: [n, L] bool.
        calibration: thresholds, k and mixing weight.
        k: also report at most k labels of the best path (`path@k`) and exactly k labels by score
            (`top@k`).
        unknown: [n, L] bool, labels that are neither present nor absent.

    Returns:
        Metrics by decision (`DECISIONS`), and of the two at k.
    """
    scores = inference.mixed(calibration.mix_weight)
    decided = {
        decide: decided_sets(decide, inference.sets, scores, calibration) for decide in DECISIONS
    }
    rows: dict[str, dict[str, float]] = {
        decide: multilabel_metrics(sets, targets, scores=scores, unknown=unknown)
        for decide, sets in decided.items()
    }
    if k is not None:
        rows[f"path@{k}"] = multilabel_metrics(
            inference.sets, targets, scores=scores, k=k, unknown=unknown
        )
        rows[f"top@{k}"] = multilabel_metrics(scores, targets, k=k, unknown=unknown)
    return rows
