"""Known labels for independent classifiers: log-odds of co-occurrence, counted and not learned.

Letters: n images, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrnn.known import metrics_of_others, reveal

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SMOOTHINGS = (0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, eq=False)
class CoOccurrence:
    """What a known label adds to the log-odds of the others.

    By Bayes' rule logit P(l | x, k) = logit P(l | x) + log P(k | l) - log P(k | not l) where image
    and label k are independent given label l, and the difference is logit P(l | k) - logit P(l).
    Several known labels add up, as if independent given l.

    Attributes:
        present: [L, L] float64, row k what it adds that label k is there.
        absent: [L, L] float64, that it is not.
    """

    present: Tensor
    absent: Tensor

    @classmethod
    def counted(cls, targets: Tensor, smoothing: float) -> CoOccurrence:
        """Count pairs of labels in training images.

        P(l | k) is (c_kl + s P(l)) / (c_k + s) of c_k images with k, c_kl of which have l: a label
        that is never seen adds nothing. P(l) is (c_l + 1/2) / (n + 1).

        Args:
            targets: [n, L] bool.
            smoothing: s, images that P(l) is worth; above 0.
        """
        has = targets.double()
        share = (has.sum(0) + 0.5) / (len(has) + 1)
        both = has.T @ has

        def added(together: Tensor, count: Tensor) -> Tensor:
            given = (together + smoothing * share) / (count[:, None] + smoothing)
            return given.clamp(1e-12, 1 - 1e-12).logit() - share.logit()

        counts = has.sum(0)
        return cls(added(both, counts), added(counts - both, len(has) - counts))

    def added(self, evidence: Tensor) -> Tensor:
        """Return what is added to the log-odds of each label: [n, L] int8 to [n, L] float64."""
        told = evidence.to(self.present.device)
        return (told == 1).double() @ self.present + (told == -1).double() @ self.absent

    def scores(self, logits: Tensor, evidence: Tensor) -> Tensor:
        """Return the log-odds of each label given the known ones, +-infinity of these.

        Args:
            logits: [n, L] log-odds by an independent classifier.
            evidence: [n, L] int8, see `cnnrnn.known`.

        Returns:
            [n, L] float32.
        """
        known = torch.where(evidence > 0, torch.inf, -torch.inf)
        added = logits.double() + self.added(evidence)
        return torch.where(evidence == 0, added, known).float()


def fit_cooccurrence(
    train_targets: Tensor, val_logits: Tensor, val_targets: Tensor, seed: int = 0
) -> CoOccurrence:
    """Choose smoothing and a weight of what is added, by example-AP with one label revealed.

    Args:
        train_targets: [n, L] bool, counted.
        val_logits: [m, L] log-odds of the validation images by an independent classifier.
        val_targets: [m, L] bool; where no image has two labels, weight and smoothing are 1.
        seed: of the labels that are revealed.
    """
    images, evidence = reveal(val_targets, 1, seed)
    logits, targets = val_logits[images], val_targets[images]
    best, found = -1.0, CoOccurrence.counted(train_targets, 1.0)
    for smoothing in SMOOTHINGS if len(images) else ():
        counted = CoOccurrence.counted(train_targets, smoothing)
        for weight in WEIGHTS:
            weighted = CoOccurrence(weight * counted.present, weight * counted.absent)
            scores = weighted.scores(logits, evidence)
            value = metrics_of_others(scores, targets, evidence, threshold=0.0)["example-AP"]
            if value > best:
                best, found = value, weighted
    return found
