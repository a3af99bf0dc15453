"""What a report measures besides `metrics`: reliability, pairs of labels, curves.

Letters: n images, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10
CURVE_POINTS = 40
PAIRED_LABELS = 2048
"""Pairs are counted among so many labels, the most frequent ones: 32 MB."""


@dataclass(frozen=True)
class Reliability:
    """How often what was given a probability happened, over `BINS` equal parts of 0..1.

    Attributes:
        predicted: [BINS] float64, mean probability; NaN in an empty part.
        observed: [BINS] float64, share that happened; NaN in an empty part.
        counts: [BINS] int64.
        error: mean of |observed - predicted| over all that was counted, the expected calibration
            error.
    """

    predicted: Tensor
    observed: Tensor
    counts: Tensor
    error: float


def reliability(probabilities: Tensor, happened: Tensor) -> Reliability:
    """Compare probabilities with what happened.

    Args:
        probabilities: [m] in 0..1.
        happened: [m] bool.
    """
    probabilities = probabilities.double().clamp(0, 1)
    part = (probabilities * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(part, minlength=BINS)
    sums = torch.bincount(part, probabilities, minlength=BINS)
    hits = torch.bincount(part, happened.double(), minlength=BINS)
    gaps = (hits - sums).abs().sum() / max(1, len(probabilities))
    return Reliability(sums / counts, hits / counts, counts, float(gaps))


def precision_recall(scores: Tensor, targets: Tensor) -> Tensor:
    """Return points of the precision-recall curve, of rising recall: [p, 2] recall, precision.

    Precision is taken at distinct scores, so equal ones enter together. Of a long curve
    `CURVE_POINTS` points are kept, about equally far apart in recall.

    Args:
        scores: [m] of images or of images and labels.
        targets: [m] bool; without positives there are no points.
    """
    positives = int(targets.sum())
    if not positives:
        return torch.zeros(0, 2, dtype=torch.float64)
    falling, order = scores.sort(descending=True)
    hits = targets[order].cumsum(0)
    last = torch.ones_like(targets)  # of each run of equal scores
    last[:-1] = falling[:-1] != falling[1:]
    rank = last.nonzero()[:, 0]
    correct = hits[rank]
    rises = torch.ones_like(correct, dtype=torch.bool)
    rises[1:] = correct[1:] > correct[:-1]
    rank, correct = rank[rises], correct[rises]
    if int(correct[0]) == 0:
        rank, correct = rank[1:], correct[1:]
    if len(correct) > CURVE_POINTS:
        wanted = torch.linspace(int(correct[0]), positives, CURVE_POINTS, dtype=torch.float64)
        kept = torch.searchsorted(correct, wanted.ceil().long().clamp(max=positives)).unique()
        rank, correct = rank[kept], correct[kept]
    return torch.stack([correct.double() / positives, correct.double() / (rank + 1)], 1)


@dataclass(frozen=True)
class Pairs:
    """How often two labels come together, in the true sets and in the decided ones.

    Attributes:
        first: [P] int64, the label of the lower index.
        second: [P] int64.
        true: [P] int64, images.
        decided: [P] int64, images.
        all_labels: pairs of all labels were counted.
    """

    first: Tensor
    second: Tensor
    true: Tensor
    decided: Tensor
    all_labels: bool

    @property
    def correlation(self) -> float:
        """Of log(1 + images) of the pairs that come together at all; NaN for fewer than two."""
        there = (self.true + self.decided) > 0
        if int(there.sum()) < 2:
            return float("nan")
        logs = torch.stack([self.true[there], self.decided[there]]).double().log1p()
        return float(torch.corrcoef(logs)[0, 1])


def pairs(targets: Tensor, sets: Tensor) -> Pairs:
    """Count pairs of labels.

    Args:
        targets: [n, L] bool.
        sets: [n, L] bool, the decided ones.
    """
    L = targets.shape[1]
    labels = torch.arange(L)
    if L > PAIRED_LABELS:
        labels = targets.sum(0).topk(PAIRED_LABELS).indices.sort().values
    first, second = torch.triu_indices(len(labels), len(labels), 1)

    def counted(matrix: Tensor) -> Tensor:
        found = matrix[:, labels].float()  # exact up to 16 million images
        return (found.T @ found)[first, second].round().long()

    return Pairs(labels[first], labels[second], counted(targets), counted(sets), len(labels) == L)


def in_two_dimensions(rows: Tensor) -> tuple[Tensor, float]:
    """Lay rows out in the plane by their directions: principal components of the unit vectors.

    Args:
        rows: [L, D], at least one.

    Returns:
        [L, 2] float64, and the share of the variance that they hold.
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    centred = unit - unit.mean(0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    flat = torch.zeros(len(rows), 2, dtype=torch.float64)
    width = min(2, len(sizes))
    flat[:, :width] = left[:, :width] * sizes[:width]
    total = float(sizes.square().sum())
    share = float(sizes[:2].square().sum()) / total if total > 0 else 1.0
    # Singular vectors have either sign: of each the largest entry is positive.
    largest = flat.gather(0, flat.abs().argmax(0, keepdim=True))
    return flat * torch.where(largest < 0, -1.0, 1.0), share
