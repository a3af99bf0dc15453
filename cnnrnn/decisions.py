"""From image features to a decided label set: the best path, or a threshold on mixed marginals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrnn.config import Calibration, Order, SearchConfig
from cnnrnn.labels import increasing_paths, path_sets, prefix_trie
from cnnrnn.losses import sequence_loss
from cnnrnn.metrics import best_threshold, multilabel_metrics
from cnnrnn.model import Head, ImageEmbedding
from cnnrnn.search import NonFiniteError, SearchResult, beam_search

MIX_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEARCH_BATCH = 4096
SCORES_AT_ONCE = 1 << 24
"""Numbers that `best_common_sets` holds for one slice of images and one member."""
_SMALLEST = 1e-7


@dataclass(frozen=True, eq=False)
class Inference:
    """What the head finds in n images.

    Attributes:
        sets: [n, L] bool, the label set of each image's best path.
        marginals: [n, L] probability of each label, summed over every visited path.
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
    """Choose mixing weight and threshold on validation data.

    The weight has the best sum of O-F1 (at its own best threshold) and mAP; 0 where the model has
    no chain term to mix in.

    Args:
        inference: of the validation images.
        targets: [n, L] bool.
    """
    best: tuple[float, Calibration] | None = None
    for weight in MIX_WEIGHTS if inference.label_scores is not None else (0.0,):
        scores = inference.mixed(weight)
        threshold, of1 = best_threshold(scores, targets)
        merit = of1 + mean_average_precision(scores, targets)
        if best is None or merit > best[0]:
            best = (merit, Calibration(threshold, weight))
    assert best is not None
    return best[1]


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
    """Measure both decisions, ranked by the mixed marginals.

    Args:
        inference: of the images.
        targets: [n, L] bool.
        calibration: threshold and mixing weight.
        k: also report at most k labels of the best path (`path@k`) and exactly k labels by score
            (`top@k`).
        unknown: [n, L] bool, labels that are neither present nor absent.

    Returns:
        Metrics of `path` and `threshold`, and of the two at k.
    """
    scores = inference.mixed(calibration.mix_weight)
    rows = {
        "path": multilabel_metrics(inference.sets, targets, scores=scores, unknown=unknown),
        "threshold": multilabel_metrics(
            scores, targets, threshold=calibration.threshold, unknown=unknown
        ),
    }
    if k is not None:
        rows[f"path@{k}"] = multilabel_metrics(
            inference.sets, targets, scores=scores, k=k, unknown=unknown
        )
        rows[f"top@{k}"] = multilabel_metrics(scores, targets, k=k, unknown=unknown)
    return rows


@torch.no_grad()
def path_log_probs(
    head: Head, embedding: ImageEmbedding, paths: Tensor, order: Order = "increasing"
) -> Tensor:
    """Score given paths of each image by teacher forcing: log p(path, END | image).

    It is minus the sequence loss: limits of a search, `min_labels` and `max_labels`, are unknown
    here. The recurrence runs over the distinct prefixes of all paths.

    Args:
        head: in eval mode.
        embedding: `head.embed(features)` of B images.
        paths: [B, C, T] int64 label indices padded with -1, C paths for each image.
        order: which labels may follow.

    Returns:
        [B, C] log-probabilities.
    """
    B, C, T = paths.shape
    flat = paths.reshape(B * C, T)
    trie = prefix_trie(flat)
    steps = (trie.nodes >= 0).nonzero(as_tuple=True)
    images = steps[0] // max(C, 1)
    outputs = head.prefix_outputs(trie)[trie.nodes[steps]]
    rows = head.score(outputs, ImageEmbedding(embedding.joint[images]))
    if embedding.label_logits is not None:
        rows = rows + embedding.label_logits[images]
    scores = rows.new_zeros(B * C, T + 1, head.num_labels + 1).index_put(steps, rows)
    return -sequence_loss(scores, flat, order).view(B, C)


@torch.no_grad()
def best_common_sets(
    heads: Sequence[Head],
    features: Tensor,
    inferences: Sequence[Inference],
    order: Order = "increasing",
) -> Tensor:
    """Decide for an ensemble: of all sets that a member's search returned, the most probable.

    A set's probability is the geometric mean over members of that of its path in label order. The
    first of equally good sets wins, in the order of the members and of their paths.

    Args:
        heads: M members over the same labels, in eval mode.
        features: [n, F] on the heads' device.
        inferences: what each member found for these features.
        order: of the paths.

    Returns:
        [n, L] bool on the CPU.
    """
    num_labels = heads[0].num_labels
    chosen = []
    for part, *results in zip(
        features.split(SEARCH_BATCH) if len(features) else [features],
        *(inference.search for inference in inferences),
        strict=True,
    ):
        sets = torch.cat([path_sets(r.labels, num_labels) for r in results], dim=1)  # [B, C, L]
        is_found = torch.cat([r.log_probs.isfinite() for r in results], dim=1)
        longest = max(r.labels.shape[2] for r in results)
        at_once = max(1, SCORES_AT_ONCE // (sets.shape[1] * (longest + 1) * (num_labels + 1)))
        chosen += [
            _most_probable(heads, *tensors, order)
            for tensors in zip(
                part.split(at_once),
                sets.to(part.device).split(at_once),
                is_found.to(part.device).split(at_once),
                strict=True,
            )
            if len(tensors[0])
        ]
    return torch.cat(chosen) if chosen else torch.zeros(0, num_labels, dtype=torch.bool)


def _most_probable(
    heads: Sequence[Head], features: Tensor, sets: Tensor, is_found: Tensor, order: Order
) -> Tensor:
    """Return the most probable of each image's sets: [B, F], [B, C, L], [B, C] -> [B, L]."""
    B, C, L = sets.shape
    paths = increasing_paths(sets.view(B * C, L)).view(B, C, -1)
    log_probs = torch.stack(
        [path_log_probs(head, head.embed(features), paths, order) for head in heads]
    ).mean(0)
    best = log_probs.masked_fill(~is_found, -torch.inf).argmax(1)
    return sets[torch.arange(B, device=sets.device), best].cpu()
