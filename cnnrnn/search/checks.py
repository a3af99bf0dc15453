"""What every search checks of its arguments, once, and the longest path that they allow."""

from __future__ import annotations

from typing import Literal, get_args

from cnnrnn.config import SearchConfig
from cnnrnn.machine.words import listed
from cnnrnn.network.head import Head, ImageEmbedding

Implementation = Literal["auto", "native", "reference"]
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


def require_implementation(implementation: Implementation) -> None:
    """Raise a ValueError where there is no such implementation."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be auto, native or reference, got {implementation!r}"
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
    """Raise a ValueError where an embedding does not fit the head, or that is not in eval mode."""
    if head.training and head.joint_dropout.p > 0:
        raise ValueError("head is in training mode, with dropout in its scores; call head.eval()")
    joint, logits = embedding.joint, embedding.label_logits
    for name, tensor in (("joint", joint), ("label_logits", logits)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"image_embedding.{name} must be of a floating-point type, got {tensor.dtype}"
            )
    if joint.dim() != 2 or joint.shape[1] != head.joint_dim:
        raise ValueError(
            f"image_embedding.joint must be [B, {head.joint_dim}], got {list(joint.shape)}"
        )
    expected = (joint.shape[0], head.num_labels + 1)  # not len(): a traced batch has no number
    if logits is not None and logits.shape != expected:
        raise ValueError(
            f"image_embedding.label_logits must be {list(expected)}, got {list(logits.shape)}"
        )
