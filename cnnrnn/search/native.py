"""The compiled search, of a device that is named; arguments were checked before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.config import SearchConfig, SearchPrecision
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search.packed import detached, head_parameters, packed_head
from cnnrnn.search.result import SearchResult, SearchStats


class NativeOptions(NamedTuple):
    """The options of a call of the compiled search."""

    config: SearchConfig
    max_labels: int
    marginals: bool
    precision: SearchPrecision
    evidence: Tensor | None

    def arguments(self) -> tuple[int, int, int, str, bool, str, bool]:
        """Return the options up to `marginals` in the order of the compiled search's arguments."""
        config = self.config
        return (
            config.beam_size,
            self.max_labels,
            config.min_labels,
            config.order,
            config.end_takes_slot,
            config.stop,
            self.marginals,
        )


def native_search(
    head: Head,
    embedding: ImageEmbedding,
    options: NativeOptions,
    device: torch.device,
) -> tuple[SearchResult, int]:
    """Run the compiled search; return the result and how many images are marked."""
    joint, logits = embedding.joint, embedding.label_logits
    given = joint.device
    if device != given or joint.dtype != torch.float32:
        embedding = embedding.to(device, torch.float32)
        joint, logits = embedding.joint, embedding.label_logits
    packed = packed_head(head, device)
    labels, lengths, log_probs, sums, _, stats, nonfinite, log_evidence = packed.beam_search(
        joint,
        logits,
        *options.arguments(),
        precision=options.precision,
        evidence=options.evidence,
        marginal_places=options.config.marginal_places or 0,
    )
    if device != given:
        labels, lengths, log_probs = labels.to(given), lengths.to(given), log_probs.to(given)
        sums = None if sums is None else sums.to(given)
        log_evidence = None if log_evidence is None else log_evidence.to(given)
    result = SearchResult(
        labels, lengths, log_probs, head.num_labels, SearchStats(*stats), sums, log_evidence
    )
    return result, nonfinite


def traced_search(
    head: Head,
    embedding: ImageEmbedding,
    options: NativeOptions,
    device: torch.device,
) -> SearchResult:
    """Put the registered op into the graph that torch.compile or torch.export is making."""
    given = embedding.joint.device
    tensors = (embedding.joint, embedding.label_logits, *head_parameters(head))
    evidence = None if options.evidence is None else options.evidence.to(device)
    labels, lengths, log_probs, sums, log_evidence = torch.ops.cnnrnn.beam_search(
        *detached(tensors, device),
        head.cell,
        head.activation,
        *options.arguments(),
        head.cache_generation,
        head.prefix_bytes,
        options.precision,
        evidence,
        options.config.marginal_places or 0,
    )
    return SearchResult(
        labels.to(given),
        lengths.to(given),
        log_probs.to(given),
        head.num_labels,
        requested_marginals=sums.to(given) if options.marginals else None,
        log_evidence=log_evidence.to(given) if options.marginals else None,
    )
