"""The joint space of labels and images: how near a label is to an image or another label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn.network.head import Head, activated

AT_ONCE = 1 << 24  # cosines held while the nearest are chosen: 128 MB


def label_vectors(head: Head) -> Tensor:
    """Return where labels are: the rows U_l that score them, [L, D], without END and START.

    An untied `input_embedding` is not of this space: it only feeds the recurrence.
    """
    return head.label_embedding[: head.num_labels].detach()


def image_vectors(head: Head, joint: Tensor) -> Tensor:
    """Return where images are: h(U_I I) of [B, D] U_I I, what U_l is multiplied with in equation 5.

    It is what an image brings to the score by itself, without the recurrent part.
    """
    return activated(joint, head.activation)


@torch.no_grad()
def nearest(
    vectors: Tensor, labels: Tensor, count: int, *, are_labels: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the labels with the largest cosine to each vector.

    Args:
        vectors: [n, D].
        labels: [L, D].
        count: at most so many.
        are_labels: row i of the vectors is label i, which is no neighbour of itself.

    Returns:
        Cosines [n, k] float64 and label indices [n, k] int64 on the CPU, nearest first, ties by
        index; k is `count`, or how many labels there are. A vector of zeros has cosine 0.
    """
    unit = functional.normalize(labels.double(), dim=1).T
    L = len(labels)
    k = min(count, L - are_labels) if L else 0
    cosines, indices = [], []
    rows = max(1, AT_ONCE // max(L, 1))
    for start in range(0, max(len(vectors), 1), rows):
        found = functional.normalize(vectors[start : start + rows].double(), dim=1) @ unit
        if are_labels:
            own = torch.arange(len(found), device=found.device)
            found[own, start + own] = -torch.inf
        ranked, order = found.sort(dim=1, descending=True, stable=True)
        cosines.append(ranked[:, :k].clamp(-1, 1).cpu())
        indices.append(order[:, :k].cpu())
    return torch.cat(cosines), torch.cat(indices)
