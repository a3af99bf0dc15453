"""What every search checks of its arguments, once, and the longest path that they allow."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cnnrnn.config import SearchConfig
from cnnrnn.machine.words import listed
from cnnrnn.network.head import Head, ImageEmbedding

OnNonFinite = Literal["raise", "mark"]


class NonFiniteError(ValueError):
    """Some images' embeddings or scores are not finite; `images` holds their indices."""

    def __init__(self, images: list[int], batch: int) -> None:
        self.images = images
        super().__init__(
            f"{len(images)} of {batch} images have values that are not finite "
            f"(index {listed(images)}); "
            'check their features and the weights, or pass on_nonfinite="mark" to keep the others'
        )


def resolve_max_labels(head: Head, config: SearchConfig) -> int:
    """Return T: the config's, else the head's; at most L unless the order is free."""
    longest = head.max_labels if config.max_labels is None else config.max_labels
    if config.order != "free":
        longest = min(longest, head.num_labels)
    if config.min_labels > longest:
        raise ValueError(f"min_labels ({config.min_labels}) must not exceed max_labels ({longest})")
    return longest


def check_embedding(head: Head, embedding: ImageEmbedding) -> None:
    """Raise a ValueError where an embedding does not fit the head."""
    joint, logits = embedding.joint, embedding.label_logits
    if joint.dim() != 2 or joint.shape[1] != head.joint_dim:
        raise ValueError(
            f"image_embedding.joint must be [B, {head.joint_dim}], got {list(joint.shape)}"
        )
    expected = (joint.shape[0], head.num_labels + 1)  # not len(): a traced batch has no number
    if logits is not None and logits.shape != expected:
        raise ValueError(
            f"image_embedding.label_logits must be {list(expected)}, got {list(logits.shape)}"
        )


def check_evidence(head: Head, evidence: Tensor, images: int, max_labels: int) -> None:
    """Check evidence of images as csrc/bindings.cpp does for the compiled search.

    Raises:
        ValueError: for another shape or type, other values than 1, 0 and -1, and more present
            labels than a path holds.
    """
    L = head.num_labels
    if evidence.dim() != 2 or evidence.shape[1] != L or evidence.shape[0] not in (1, images):
        raise ValueError(f"evidence must be [1 or {images}, {L}], got {list(evidence.shape)}")
    if evidence.dtype != torch.int8:
        raise ValueError(f"evidence must be int8, got {evidence.dtype}")
    for image, label in ((evidence < -1) | (evidence > 1)).nonzero()[:1].tolist():
        raise ValueError(
            "evidence must be 1 (present), -1 (absent) or 0 (unknown), got "
            f"{int(evidence[image, label])} for label {label} of image {image}"
        )
    present = (evidence == 1).sum(1)
    for image in (present > max_labels).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"image {image} has {present[image]} labels known to be present, "
            f"more than max_labels ({max_labels})"
        )
