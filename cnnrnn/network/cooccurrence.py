"""What known labels say of the others by themselves: log-odds of co-occurrence, counted.

Letters: n images, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COUNTED_AT_ONCE = 8192  # images


def told(label_scores: Tensor, cooccurrence: Tensor, evidence: Tensor) -> Tensor:
    """Tell an independent classifier which labels are present.

    Args:
        label_scores: [n, L] its log-odds.
        cooccurrence: [L, L] what a label that is present (its row) adds to those of the others.
        evidence: [1 or n, L] integers, 1 where a label is known to be present.
    """
    return label_scores + (evidence == 1).to(label_scores.dtype) @ cooccurrence


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
    def counted(
        cls, targets: Tensor, smoothing: float, unknown: Tensor | None = None
    ) -> CoOccurrence:
        """Count pairs of labels in training images.

        P(l | k) is (c_kl + s P(l)) / (c_k + s) of c_k images with k, c_kl of which have l: a label
        that is never seen adds nothing. P(l) is (c_l + 1/2) / (n + 1). Images of which l or k is
        unknown are not among those that are counted for the pair, nor for P(l) where it is l.

        Args:
            targets: [n, L] bool.
            smoothing: s, images that P(l) is worth; above 0.
            unknown: [n, L] bool, labels that are neither present nor absent.
        """
        n, L = targets.shape
        counts, both = (torch.zeros(size, dtype=torch.float64, device=targets.device)
                        for size in ((L,), (L, L)))  # fmt: skip
        l_known, both_known = torch.zeros_like(both), torch.zeros_like(both)
        for start in range(0, n, COUNTED_AT_ONCE):
            rows = slice(start, start + COUNTED_AT_ONCE)
            has = targets[rows].double()
            counts += has.sum(0)
            both += has.T @ has
            if unknown is not None:
                known = (~unknown[rows]).double()
                l_known += has.T @ known
                both_known += known.T @ known
        if unknown is None:
            l_known += counts[:, None]
            both_known += n
        share = (counts + 0.5) / (both_known.diagonal() + 1)

        def added(together: Tensor, images: Tensor) -> Tensor:
            given = (together + smoothing * share) / (images + smoothing)
            return given.clamp(1e-12, 1 - 1e-12).logit() - share.logit()

        return cls(added(both, l_known), added(l_known.T - both, both_known - l_known))

    def added(self, evidence: Tensor) -> Tensor:
        """Return what is added to the log-odds of each label: [n, L] int8 to [n, L] float64."""
        told = evidence.to(self.present.device)
        return (told == 1).double() @ self.present + (told == -1).double() @ self.absent

    def scores(self, logits: Tensor, evidence: Tensor) -> Tensor:
        """Return the log-odds of each label given the known ones, +-infinity of these.

        Args:
            logits: [n, L] log-odds by an independent classifier.
            evidence: [n, L] int8, see `cnnrnn.reveal`.

        Returns:
            [n, L] float32.
        """
        known = torch.where(evidence > 0, torch.inf, -torch.inf)
        added = logits.double() + self.added(evidence)
        return torch.where(evidence == 0, added, known).float()
