"""The most probable label sets with a proof, of the compiled search or by enumeration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.labels import PAD, check_evidence
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.checks import (
    Implementation,
    NonFiniteError,
    OnNonFinite,
    check_embedding,
    require_implementation,
)
from cnnrnn.search.packed import CPU, packed_cpu_head
from cnnrnn.search.result import SearchStats


class BestSets(NamedTuple):
    """The most probable label sets of images, best first.

    Attributes:
        labels: [B, K, T] int64 label indices in path order, padded with -1.
        lengths: [B, K] int64.
        log_probs: [B, K] log P(set | image); -inf past the last set, NaN for a marked image.
        proved: [B] int64: the first so many are proved to be the most probable ones.
        ended: [B] bool: fewer than K, and no other set is left that is wanted.
        expansions: [B] int64, prefixes that were scored.
        stats: how much of the recurrence was shared.
    """

    labels: Tensor
    lengths: Tensor
    log_probs: Tensor
    proved: Tensor
    ended: Tensor
    expansions: Tensor
    stats: SearchStats


def best_sets(
    head: Head,
    image_embedding: ImageEmbedding,
    *,
    count: int,
    max_labels: int | None = None,
    min_labels: int = 0,
    least: float = -math.inf,
    max_expansions: int = 200,
    evidence: Tensor | None = None,
    implementation: Implementation = "auto",
    on_nonfinite: OnNonFinite = "raise",
) -> BestSets:
    """Find the K most probable label sets of each image, along increasing paths, with a proof.

    Best first over label prefixes, on the CPU: a prefix's score bounds that of all sets it begins.

    Args:
        head: the trained head.
        image_embedding: of B images.
        count: K.
        max_labels: T; all sets by default.
        min_labels: of a set, unless its last label is the last of all.
        least: sets of a lower log-probability are not wanted.
        max_expansions: prefixes of an image that are scored at most.
        evidence: what is known of labels, as in `beam_search`.
        implementation: as in `beam_search`; the reference scores every set.
        on_nonfinite: as in `beam_search`.

    Raises:
        ValueError: as `beam_search` does.
        NonFiniteError: for images whose embedding or scores are not finite.
    """
    check_embedding(head, image_embedding)
    require_implementation(implementation)
    for name, value in (("count", count), ("max_expansions", max_expansions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if math.isnan(least):
        raise ValueError("least must be a number, got nan")
    T = head.num_labels if max_labels is None else min(max_labels, head.num_labels)
    B, device = len(image_embedding), image_embedding.joint.device
    if implementation == "reference":
        if evidence is not None:
            check_evidence(evidence, B, head.num_labels, T)
        found = reference.best_sets(
            head, image_embedding, count=count, max_labels=T, min_labels=min_labels,
            least=least, evidence=evidence,
        )  # fmt: skip
        sets = _as_best_sets(found, count, T, image_embedding.joint)
        nonfinite = sum(image is None for image in found)
        if nonfinite and on_nonfinite == "raise":
            raise NonFiniteError([b for b, image in enumerate(found) if image is None], B)
        return sets
    on_cpu = image_embedding.to(CPU, torch.float32)
    labels, lengths, log_probs, proved, ended, expansions, stats, nonfinite = packed_cpu_head(
        head
    ).best_sets(
        on_cpu.joint, on_cpu.label_logits, count, T, min_labels, least, max_expansions, evidence
    )
    sets = BestSets(
        labels.to(device), lengths.to(device), log_probs.to(device), proved.to(device),
        ended.to(device), expansions.to(device), SearchStats(*stats),
    )  # fmt: skip
    if nonfinite and on_nonfinite == "raise":
        raise NonFiniteError(sets.log_probs[:, 0].isnan().nonzero()[:, 0].tolist(), B)
    return sets


def _as_best_sets(
    found: list[list[tuple[tuple[int, ...], float]] | None], count: int, T: int, like: Tensor
) -> BestSets:
    B = len(found)
    labels = torch.full((B, count, T), PAD, device=like.device)
    lengths = torch.zeros(B, count, dtype=torch.int64, device=like.device)
    log_probs = like.new_full((B, count), -torch.inf)
    for b, sets in enumerate(found):
        if sets is None:
            log_probs[b] = torch.nan
        for i, (chosen, score) in enumerate(sets or []):
            labels[b, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
            lengths[b, i], log_probs[b, i] = len(chosen), score
    proved = torch.tensor(
        [len(sets or []) for sets in found], dtype=torch.int64, device=like.device
    )
    none = torch.zeros_like(proved)
    return BestSets(labels, lengths, log_probs, proved, proved < count, none, SearchStats())
