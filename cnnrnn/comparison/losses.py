"""Losses of the methods that the model is compared with, one value per image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_cross_entropy(label_scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a softmax over labels against equal shares for the labels present.

    The paper's softmax baseline. An image without labels has no target and loss 0.

    Args:
        label_scores: [B, L].
        targets: [B, L] bool.

    Returns:
        [B].
    """
    shares = targets.float() / targets.sum(1, keepdim=True).clamp(min=1)
    return -(shares * label_scores.float().log_softmax(1)).sum(1)


def squared_error(label_scores: Tensor, targets: Tensor) -> Tensor:
    """Squared error sum_l (f_l - y_l)^2 against targets 0 and 1; the paper's I-FT is of this kind.

    Args:
        label_scores: [B, L] f, compared as they are.
        targets: [B, L] bool y.

    Returns:
        [B].
    """
    scores = _wide(label_scores)
    return (scores - targets.to(scores.dtype)).square().sum(1)


def asymmetric_loss(
    label_scores: Tensor,
    targets: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
) -> Tensor:
    """Asymmetric loss of Ridnik et al. (ICCV 2021, eq. 4 to 6), summed over labels.

    With p = sigmoid(f) and p_m = max(p - clip, 0), a label that is present costs
    -(1 - p)^gamma_positive log(p), one that is absent -p_m^gamma_negative log(1 - p_m). The
    defaults are the paper's for COCO; the gradient goes through the focusing factors too.

    Args:
        label_scores: [B, L] f.
        targets: [B, L] bool.
        gamma_negative: focusing of absent labels.
        gamma_positive: focusing of present labels.
        clip: probability up to which an absent label costs nothing.

    Returns:
        [B].
    """
    scores = _wide(label_scores)
    p = scores.sigmoid()
    shifted = (p - clip).clamp(min=0)
    present = (1 - p) ** gamma_positive * functional.logsigmoid(scores)
    # Without clip, log(1 - p) by the sigmoid of -f: 1 - p may round to 0.
    log_absent = torch.log1p(-shifted) if clip > 0 else functional.logsigmoid(-scores)
    return -torch.where(targets, present, shifted**gamma_negative * log_absent).sum(1)


def warp_loss(label_scores: Tensor, targets: Tensor) -> Tensor:
    """Weighted approximate-rank pairwise loss (Weston et al., IJCAI 2011; Gong et al., 2013).

    A present label j is violated by the absent labels k with 1 + f_k > f_j. With r of them it
    costs (1 + 1/2 + ... + 1/r) / r * sum_k (1 - f_j + f_k): WSABIE's error with the rank r counted.
    The papers sample: absent labels are drawn until one violates, that one's margin is taken, and
    floor((L - 1) / N) after N draws stands for r. That estimate is biased, so this loss is not the
    expectation of theirs. The factor before the sum has no gradient.

    Args:
        label_scores: [B, L] f, compared among the labels of an image.
        targets: [B, L] bool; an image with no label, or with all, costs 0.

    Returns:
        [B].
    """
    scores = _wide(label_scores)
    images, labels = targets.nonzero(as_tuple=True)  # M pairs
    margins = 1 - scores[images, labels][:, None] + scores[images]  # [M, L]
    violations = margins.clamp(min=0) * ~targets[images]
    ranks = (violations > 0).sum(1)
    counts = torch.arange(1, targets.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    weights = functional.pad(counts.reciprocal().cumsum(0) / counts, (1, 0))  # [L+1], 0 at rank 0
    losses = weights[ranks] * violations.sum(1)
    return losses.new_zeros(len(scores)).index_add(0, images, losses)


def _wide(scores: Tensor) -> Tensor:
    """Scores in float32, or as they are in float64."""
    return scores if scores.dtype == torch.float64 else scores.float()
