"""Known labels in a measurement: which are revealed, and measures of the labels that are not.

Evidence is [n, L] int8: 1 where a label is known to be present, -1 known to be absent, 0 not known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.metrics import best_threshold, multilabel_metrics, threshold_sets


class Revealed(NamedTuple):
    """What is told of some of the images.

    Attributes:
        images: [m] int64, ascending; the images that something is told of.
        evidence: [m, L] int8.
    """

    images: Tensor
    evidence: Tensor


def reveal(targets: Tensor, count: int, seed: int = 0) -> Revealed:
    """Draw true labels to be known, `count` of each image that has more than that.

    The other images are left out: nothing would be left to find in them.

    Args:
        targets: [n, L] bool.
        count: labels per image, at least 0.
        seed: of the draws; the same labels for the same targets and count.

    Raises:
        ValueError: `targets` is no bool matrix, or count is below 0.
    """
    if targets.dim() != 2 or targets.dtype != torch.bool:
        raise ValueError(f"targets must be [n, L] bool, got {list(targets.shape)} {targets.dtype}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    targets = targets.cpu()
    keys = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed))
    images = (targets.sum(1) > count).nonzero()[:, 0]
    evidence = torch.zeros(len(images), targets.shape[1], dtype=torch.int8)
    if len(images):
        drawn = keys[images].masked_fill(~targets[images], -1).topk(count, dim=1).indices
        evidence.scatter_(1, drawn, 1)
    return Revealed(images, evidence)


def best_threshold_of_others(scores: Tensor, targets: Tensor, evidence: Tensor) -> float:
    """Return the threshold on the labels that are not known with their best O-F1.

    Args:
        scores: [n, L] floating point.
        targets: [n, L] bool.
        evidence: [n, L] int8.

    Raises:
        ValueError: as of `metrics_of_others`.
    """
    others = _others(targets, evidence)
    return best_threshold(scores[others][:, None], targets[others][:, None])[0]


def metrics_of_others(
    scores: Tensor,
    targets: Tensor,
    evidence: Tensor,
    *,
    threshold: float | None = None,
    unknown: Tensor | None = None,
) -> dict[str, float]:
    """Measure how well the labels that are not known are found.

    `example-AP` is the mean over images of the average precision of the image's true labels among
    those that are not known; images without such a true label are left out, and counted as
    `images-without-others`. `label-mAP` is the mean over labels of the label's average precision
    over the images where it is not known; labels without such a true image are left out, and
    counted as `labels-without-positives`. Equal scores enter together in both. `O-F1` is of the
    labels from `threshold` on, which is returned as well.

    Args:
        scores: [n, L] floating point; what they say of known labels counts nowhere.
        targets: [n, L] bool.
        evidence: [n, L] int8.
        threshold: chosen on validation data, see `best_threshold_of_others`; None takes the one
            that is best on these very scores, so that O-F1 is an upper bound.
        unknown: [n, L] bool, labels of which the data does not say whether they are true.

    Returns:
        The measures as fractions of 1, the counts as whole numbers, and the threshold.

    Raises:
        ValueError: shapes, types or values are wrong, or there is no image or nothing left to find.
    """
    others = _others(targets, evidence)
    if unknown is not None:
        others &= ~unknown
    left = targets & others
    if not left.any():
        raise ValueError(
            f"there is nothing to measure: none of the {len(targets)} images has a true label that "
            "is not known"
        )
    if threshold is None:
        threshold = best_threshold_of_others(scores, left, (~others).to(torch.int8))
    found = multilabel_metrics(
        threshold_sets(scores, threshold), left, scores=scores, unknown=~others
    )
    return {
        "example-AP": found["LRAP"],
        "label-mAP": found["mAP"],
        "O-F1": found["O-F1"],
        "threshold": threshold,
        "images": found["images"],
        "images-without-others": found["images-without-labels"],
        "labels-without-positives": found["labels-without-positives"],
    }


def _others(targets: Tensor, evidence: Tensor) -> Tensor:
    """Return the pairs of image and label that are not known: [n, L] bool."""
    if evidence.shape != targets.shape or evidence.dtype != torch.int8:
        raise ValueError(
            f"evidence must be [n, L] int8 like targets {list(targets.shape)}, got "
            f"{list(evidence.shape)} {evidence.dtype}"
        )
    wrong = evidence[evidence.abs() > 1]
    if len(wrong):
        raise ValueError(f"evidence must be -1, 0 or 1, got the value {int(wrong[0])}")
    return evidence == 0
