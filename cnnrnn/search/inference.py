"""What a head finds in feature vectors: paths, marginals, and how probable a true set is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cnnrnn.config import MAX_PLACES, Calibration, Order, SearchConfig, SearchDevice
from cnnrnn.labels import as_evidence, check_evidence, increasing_paths
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.network.losses import sequence_loss
from cnnrnn.search import NonFiniteError, OnNonFinite, SearchResult, beam_search
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.result import joined

SEARCH_BATCH = 4096


NLL_BATCH = 512


NLL_DRAWS = 16
"""Sets drawn for the probability of what is known of an image."""


SMALLEST_PROBABILITY = 1e-7
"""Before it becomes a logit."""


@dataclass(frozen=True, eq=False)
class Inference:
    """What the head finds in n images.

    Attributes:
        sets: [n, L] bool, the label set of each image's best path.
        marginals: [n, L] probability that a path holds each label, see `SearchResult.marginals`.
        label_scores: [n, L] the chain term's own scores v, told which labels are present (see
            `Head.told`), or None without it.
        search: the searches' results, one per slice of the images.
        evidence: [n, L] int8, what was known of labels: 1 present, -1 absent, 0 unknown; None where
            nothing was of any image.
        embedded: the head and the images' embeddings, from which further sets are found; None for
            an ensemble and in ONNX Runtime.
    """

    sets: Tensor
    marginals: Tensor
    label_scores: Tensor | None
    search: tuple[SearchResult, ...]
    evidence: Tensor | None = None
    embedded: tuple[Head, tuple[ImageEmbedding, ...]] | None = None

    def result_of(self, image: int) -> tuple[SearchResult, int]:
        """Return the search result that holds an image, and the image's row in it."""
        return self.search[image // SEARCH_BATCH], image % SEARCH_BATCH

    def alone(self, image: int) -> Inference:
        """Return what was found in one image, copied to the CPU, without its embedding."""
        result, row = self.result_of(image)
        rows = slice(image, image + 1)
        return Inference(
            self.sets[rows].clone(),
            self.marginals[rows].clone(),
            None if self.label_scores is None else self.label_scores[rows].clone(),
            (result.of(torch.tensor([row])).cpu(),),
            None if self.evidence is None else self.evidence[rows].clone(),
        )

    def embedding_of(self, image: int) -> tuple[Head, ImageEmbedding]:
        """Return the head and the embedding of one image, as a batch of one."""
        assert self.embedded is not None
        head, embeddings = self.embedded
        row = torch.tensor([image % SEARCH_BATCH], device=embeddings[0].joint.device)
        return head, embeddings[image // SEARCH_BATCH].of(row)

    def mixed(self, weights: float | Calibration) -> Tensor:
        """Return marginals mixed with the chain term's own probabilities: [n, L] in 0..1.

        Labels known to be present have 1, absent ones 0; NaN has what is unknown where no path fits
        what is known.

        Args:
            weights: of the chain term's probabilities; a calibration has another one for images of
                which something is known.
        """
        return mixed_given(self.marginals, self.label_scores, weights, self.evidence)

    def found_none(self) -> Tensor:
        """Return for which images no path was found, because none fits the evidence: [n] bool."""
        best = [result.log_probs[:, 0].cpu() for result in self.search]
        return torch.cat(best) == -torch.inf if best else torch.zeros(0, dtype=torch.bool)


def search_given(
    head: Head,
    embedding: ImageEmbedding,
    search: SearchConfig,
    evidence: Tensor | None,
    on_nonfinite: OnNonFinite = "raise",
    search_device: SearchDevice = "auto",
) -> SearchResult:
    """Search for marginals, with wide banks for images of which something is known.

    What fits the evidence is spread over more sets than the best few, so banks have the most places
    there can be where `search` names no `marginal_places`. Images of which nothing is known have
    the result that they have by themselves.
    """
    call = partial(beam_search, head, marginals=True, search_device=search_device)
    if evidence is None or search.marginal_places is not None or not evidence.any():
        return call(embedding, search, on_nonfinite=on_nonfinite, evidence=evidence)
    wide = replace(search, marginal_places=MAX_PLACES)
    given = evidence.any(1).expand(len(embedding))
    if given.all():
        return call(embedding, wide, on_nonfinite=on_nonfinite, evidence=evidence)
    known, others = given.nonzero()[:, 0], (~given).nonzero()[:, 0]
    device = embedding.joint.device
    parts = [
        call(embedding.of(known.to(device)), wide, on_nonfinite="mark", evidence=evidence[known]),
        call(embedding.of(others.to(device)), search, on_nonfinite="mark"),
    ]
    result = joined(parts, torch.cat([known, others]).argsort())
    if on_nonfinite == "raise" and len(result.nonfinite()):
        raise NonFiniteError(result.nonfinite().tolist(), len(result))
    return result


def of_all(evidence: Tensor | None, like: Tensor) -> Tensor | None:
    """Return evidence [1 or n, L] as one row for each of n images, on the CPU."""
    return None if evidence is None else evidence.cpu().expand(len(like), -1)


@torch.no_grad()
def infer(
    head: Head,
    features: Tensor,
    search: SearchConfig,
    evidence: Tensor | None = None,
    search_device: SearchDevice = "auto",
) -> Inference:
    """Search feature vectors, in slices that bound memory.

    Args:
        head: in eval mode.
        features: [n, F] on the head's device.
        search: the search options; see `search_given`.
        evidence: what is known of labels, [1 or n, L] int8; see `beam_search`.
        search_device: where to search, see `beam_search`.

    Returns:
        Sets and scores on the CPU.

    Raises:
        NonFiniteError: for feature vectors that give values that are not finite.
        ValueError: for evidence that does not fit.
    """
    results, scores, embeddings = [], [], []
    if evidence is not None:  # whole, so that errors name the image
        check_evidence(evidence, len(features), head.num_labels, resolve_max_labels(head, search))
    for slice_, part in enumerate(features.split(SEARCH_BATCH) if len(features) else [features]):
        embedding, label_scores = head.embed_with_label_scores(part)
        known = evidence
        if evidence is not None and len(evidence) > 1:
            known = evidence[slice_ * SEARCH_BATCH :][: len(part)]
        embeddings.append(embedding)
        try:
            found = search_given(head, embedding, search, known, search_device=search_device)
            results.append(found)
        except NonFiniteError as error:
            first = slice_ * SEARCH_BATCH
            raise NonFiniteError([first + i for i in error.images], len(features)) from None
        if label_scores is not None:
            told = label_scores if known is None else head.told(label_scores, known)
            scores.append(told.float().cpu())
    sets = torch.cat([result.best_sets() for result in results]).cpu()
    return Inference(
        sets=sets,
        marginals=torch.cat([result.marginals() for result in results]).cpu(),
        label_scores=torch.cat(scores) if scores else None,
        search=tuple(results),
        evidence=of_all(evidence, sets),
        embedded=(head, tuple(embeddings)),
    )


@torch.no_grad()
def set_nll(
    head: Head,
    features: Tensor,
    targets: Tensor,
    order: Order,
    unknown: Tensor | None = None,
) -> Tensor:
    """Return -log P(the whole true set | image), in nats, by teacher forcing.

    Along the path that training takes: labels ascending in index, then END, whatever `max_labels`
    and `min_labels` of a search are. In other orders than `increasing` a set has further paths, so
    this is an upper bound.

    Of an image with unknown labels it is -log P(all that is known | image), estimated from
    `NLL_DRAWS` sets: the estimate of P is unbiased, so that of -log P is too high in the mean.

    Args:
        head: in eval mode.
        features: [n, F] on the head's device.
        targets: [n, L] bool, columns in path order.
        order: of the search; which labels may follow.
        unknown: [n, L] bool, labels that are neither present nor absent.

    Returns:
        [n] float64, on the CPU.
    """
    evidence = None if unknown is None else as_evidence(targets, unknown.to(targets.device))
    parts = []
    for start in range(0, len(features), NLL_BATCH):
        rows = slice(start, start + NLL_BATCH)
        some = features[rows]
        paths = increasing_paths(targets[rows].to(some.device))
        scores, _ = head(some, paths)
        losses = sequence_loss(scores, paths, order).double().cpu()
        known = None if evidence is None else evidence[rows]
        if known is not None and (known == 0).any():
            partly = (known == 0).any(1).nonzero()[:, 0]
            known, of = known[partly].to(some.device), partly.to(some.device)
            draws = head.sample(
                head.embed(some[of]), NLL_DRAWS, known, seed=start, order=order,
                max_labels=int((known != -1).sum(1).max()) + 1,  # so that END is drawn too
            )  # fmt: skip
            log_weights = draws.log_weights.double()
            losses[partly.cpu()] = (math.log(NLL_DRAWS) - log_weights.logsumexp(1)).cpu()
        parts.append(losses)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def mixed_scores(marginals: Tensor, label_scores: Tensor | None, weight: float) -> Tensor:
    """Mix path marginals with independent label scores, in logit space.

    Args:
        marginals: [n, L] probabilities.
        label_scores: [n, L] logits, or None for the marginals alone.
        weight: of the label scores, 0 to 1.

    Returns:
        [n, L] scores in 0..1.
    """
    if label_scores is None or weight == 0:
        return marginals
    if weight == 1:
        return label_scores.sigmoid()
    logits = marginals.clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY).logit()
    return ((1 - weight) * logits + weight * label_scores).sigmoid()


def mixed_given(
    marginals: Tensor,
    label_scores: Tensor | None,
    weights: float | Calibration,
    evidence: Tensor | None,
) -> Tensor:
    """Mix marginals with independent label scores, given what is known: see `Inference.mixed`.

    Args:
        marginals: [n, L] probabilities.
        label_scores: [n, L] logits, or None for the marginals alone.
        weights: of the label scores, 0 to 1.
        evidence: [n, L] of 1 for labels known to be present, -1 absent, 0 unknown; or None.
    """
    weight, known_weight = (
        (weights.mix_weight, weights.known_mix_weight)
        if isinstance(weights, Calibration)
        else (weights, weights)
    )
    scores = mixed_scores(marginals, label_scores, weight)
    if evidence is None:
        return scores
    given = mixed_scores(marginals, label_scores, known_weight)
    scores = torch.where(evidence.any(1, keepdim=True), given, scores)
    scores = scores.masked_fill(marginals.isnan(), torch.nan)
    return scores.masked_fill(evidence == 1, 1.0).masked_fill(evidence == -1, 0.0)
