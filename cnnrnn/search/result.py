"""What a beam search returns, whichever implementation ran it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnrnn.labels import PAD, path_sets
from cnnrnn.metrics import cut_to_k


class SearchStats(NamedTuple):
    """How much of the recurrence was shared.

    Attributes:
        prefix_lookups: live paths that needed a recurrent state.
        prefix_hits: of those, states that were already there.
        prefix_nodes: label prefixes held at the end of the call, those of earlier calls included.
        prefix_parents: of those, prefixes that were extended. Extending one for the first time is
            the costly part: 4 H^2 multiply-adds.
        prefix_bytes: memory of all that is held, in bytes.
    """

    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_nodes: int = 0
    prefix_parents: int = 0
    prefix_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of lookups that found their state; 0 where nothing was looked up."""
        return self.prefix_hits / self.prefix_lookups if self.prefix_lookups else 0.0


@dataclass(frozen=True)
class SearchResult:
    """The N best label paths of each image, best first.

    Attributes:
        labels: [B, N, T] int64 label indices in path order, padded with -1.
        lengths: [B, N] int64 labels on each path.
        log_probs: [B, N] log-probability; -inf where a path is absent, NaN for a marked image.
        num_labels: L.
        stats: how much of the recurrence was shared.
        log_evidence: [B] of a search with marginals: the logarithm of the probability of all
            complete paths found, those beyond the N best included. A lower bound of log P(evidence
            | image); without evidence it is near 0 where all were found. -inf where no path fits
            the evidence. Else None.
        certified: [B] bool of an exact search: whether the best set is proved to be the most
            probable one. Else None.
    """

    labels: Tensor
    lengths: Tensor
    log_probs: Tensor
    num_labels: int
    stats: SearchStats = SearchStats()
    requested_marginals: Tensor | None = None
    log_evidence: Tensor | None = None
    certified: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def cpu(self) -> SearchResult:
        """Return the same on the CPU."""
        return self._mapped(Tensor.cpu)

    def of(self, images: Tensor) -> SearchResult:
        """Return the results of some images: [M] int64 indices."""
        return self._mapped(lambda tensor: tensor[images.to(tensor.device)])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> SearchResult:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def marginals(self) -> Tensor:
        """Return the probability that a path holds each label: [B, L], at most 1 but for rounding.

        Summed over every visited path that does not yet hold the label. Given evidence, the share
        of the complete paths found, weighted by their probabilities, that hold the label: NaN
        where no path fits the evidence.

        Raises:
            ValueError: when the search was not asked for them.
        """
        if self.requested_marginals is None:
            raise ValueError("this search kept no marginals; call beam_search(..., marginals=True)")
        return self.requested_marginals

    def best_sets(self, top_k: int | None = None) -> Tensor:
        """Return the label set of each image's best path: [B, L] bool.

        Args:
            top_k: keep at most this many labels of it, those with the largest marginals, ties to
                the lower index; needs marginals.
        """
        sets = path_sets(self.labels[:, 0], self.num_labels)
        if top_k is None:
            return sets
        return cut_to_k(sets, self.marginals(), top_k)

    def label_sets(self, image: int) -> list[tuple[tuple[int, ...], float]]:
        """Merge one image's paths that are orders of one set, adding their probabilities.

        Returns:
            Pairs of ascending label indices and probability, most probable first; a path that
            repeats a label counts for its set.
        """
        merged: dict[tuple[int, ...], float] = {}
        for path, log_prob in zip(
            self.labels[image].tolist(), self.log_probs[image].tolist(), strict=True
        ):
            if log_prob == -torch.inf:
                continue
            key = tuple(sorted({label for label in path if label != PAD}))
            merged[key] = merged.get(key, 0.0) + float(torch.tensor(log_prob).exp())
        return sorted(merged.items(), key=lambda item: -item[1])

    def nonfinite(self) -> Tensor:
        """Return the indices of images that were marked because a value was not finite: [M]."""
        return self.log_probs[:, 0].isnan().nonzero()[:, 0]


def joined(parts: Sequence[SearchResult], order: Tensor) -> SearchResult:
    """Return searches of some images each as one.

    Args:
        parts: with the same N, T and L, in the order in which they were made.
        order: [B] int64, which of the parts' images, one after another, each image is.
    """
    index = order.to(parts[0].labels.device)

    def rows(tensors: list[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(there)[index] if len(there) == len(parts) else None

    return SearchResult(
        torch.cat([part.labels for part in parts])[index],
        torch.cat([part.lengths for part in parts])[index],
        torch.cat([part.log_probs for part in parts])[index],
        parts[0].num_labels,
        SearchStats(
            sum(part.stats.prefix_lookups for part in parts),
            sum(part.stats.prefix_hits for part in parts),
            *parts[-1].stats[2:],
        ),
        rows([part.requested_marginals for part in parts]),
        rows([part.log_evidence for part in parts]),
        rows([part.certified for part in parts]),
    )
