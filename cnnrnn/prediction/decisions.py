"""From image features to a decided label set: of the sets found, or a cut through mixed marginals.

Letters: n or B images, L labels, N paths of at most T labels, U distinct labels on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.config import DECISIONS, Calibration, Decide, SearchConfig
from cnnrnn.labels import PAD, path_sets
from cnnrnn.metrics import (
    at_least,
    average_precision,
    best_k,
    best_label_thresholds,
    best_threshold,
    cut_to_k,
    multilabel_metrics,
    threshold_sets,
    top_k_sets,
)
from cnnrnn.network.head import Head
from cnnrnn.reveal import metrics_of_others, reveal
from cnnrnn.search import SearchResult
from cnnrnn.search.inference import SMALLEST_PROBABILITY, Inference, infer, set_nll

MIX_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEW_POSITIVES = 5
"""A label with fewer positives in validation data has no threshold of its own."""
SHRINKAGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
USUAL_SHRINKAGE = 30.0
"""Taken while training goes on, where choosing one would take longer than the rest."""
FOLDS = 5
MOST_REVEALED = 2000
"""Validation images of which a label is revealed."""


F1_AT_ONCE = 1 << 21  # label weights held while sets of best F1 are found: 16 MB


def calibrate(
    inference: Inference,
    targets: Tensor,
    trained: Tensor | None = None,
    shrinkage: float | None = None,
    unknown: Tensor | None = None,
) -> Calibration:
    """Choose mixing weight, thresholds, k and the least number of labels on validation data.

    The weight has the best sum of O-F1 (at its own best threshold) and mAP; 0 where the model has
    no chain term to mix in. Sets have at least one label where every validation image has one, and
    the best O-F1 is not lower for it.

    Args:
        inference: of the validation images.
        targets: [n, L] bool.
        trained: [L] bool, labels that occur in training; all of them without. The others have no
            threshold of their own.
        shrinkage: positives with which a label's threshold lies halfway between its own best one
            and the common one; None chooses by what is best on images that are left out.
        unknown: [n, L] bool, labels that are neither present nor absent; nothing is chosen by them.
    """
    weights = MIX_WEIGHTS if inference.label_scores is not None else (0.0,)
    may_have = targets if unknown is None else targets | unknown
    most = int(may_have.any(1).all())

    def best_o_f1(scores: Tensor, least: int) -> float:
        return best_threshold(scores, targets, min_labels=least, unknown=unknown)[1]

    def merit(weight: float) -> float:
        scores = inference.mixed(weight)
        return best_o_f1(scores, most) + mean_average_precision(scores, targets, unknown)

    weight = max(weights, key=merit)
    scores = inference.mixed(weight)
    o_f1 = {least: best_o_f1(scores, least) for least in {0, most}}
    min_labels = max(o_f1, key=lambda least: (o_f1[least], least))
    fitted = _fitted_cuts(scores, targets, min_labels, trained, unknown)
    if shrinkage is None:
        shrinkage = _best_shrinkage(scores, targets, min_labels, trained, unknown)
    k, _ = best_k(scores, targets, unknown=unknown)
    return Calibration(
        fitted.common,
        weight,
        tuple(fitted.shrunk(shrinkage).tolist()),
        k,
        min_labels,
        tuple((~fitted.has_own).nonzero()[:, 0].tolist()),
    )


@torch.no_grad()
def calibrate_known(
    head: Head,
    features: Tensor,
    targets: Tensor,
    search: SearchConfig,
    calibration: Calibration,
    seed: int = 0,
    unknown: Tensor | None = None,
) -> Calibration:
    """Choose on validation data what holds where labels are known, and for `candidates`.

    One true label of each image with two or more is revealed, alone and with half of the labels
    that it does not have; the weight of the chain term is that with the best ranking of the others
    (example-AP + label-mAP of both).

    Args:
        head: in eval mode.
        features: [n, F] on the head's device.
        targets: [n, L] bool, columns in path order.
        search: the options of the search.
        calibration: what else was chosen.
        seed: of the labels that are revealed.
        unknown: [n, L] bool, labels that are neither present nor absent.

    Returns:
        The calibration with its `known_mix_weight` and, under the order `increasing`, `set_nll` of
        the images without unknown labels.
    """
    nll = torch.zeros(0, dtype=torch.float64)
    whole = slice(None) if unknown is None else ~unknown.any(1)
    if search.order == "increasing":
        nll = set_nll(head, features[whole], targets[whole], search.order)
    calibration = replace(calibration, set_nll=nll_levels(nll))
    images, evidence = reveal(targets, 1, seed)
    images, evidence = images[:MOST_REVEALED], evidence[:MOST_REVEALED]
    if head.label_classifier is None or not len(images):
        return calibration
    given, targets = features[images.to(features.device)], targets.cpu()[images]
    unknown = None if unknown is None else unknown.cpu()[images]
    absent = ~targets if unknown is None else ~(targets | unknown)
    half = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    both = [evidence, evidence.masked_fill(half & absent, -1)]
    inferences = [infer(head, given, search, told) for told in both]

    def merit(weight: float) -> float:
        total = 0.0
        for inference, told in zip(inferences, both, strict=True):
            scores = inference.mixed(weight).nan_to_num(0)
            found = metrics_of_others(scores, targets, told, unknown=unknown)
            total += found["example-AP"] + found["label-mAP"]
        return total

    return replace(calibration, known_mix_weight=max(MIX_WEIGHTS, key=merit))


def nll_levels(nll: Tensor) -> tuple[float, ...]:
    """Return what 1, 2, ... percent of further values do not exceed: at most 99 levels.

    Split-conformal: of n + 1 exchangeable values the last is at most the k-th smallest of the
    others with a probability of at least k / (n + 1). Levels that n values cannot give are left
    out.

    Args:
        nll: [n] of images that training did not see.
    """
    ascending = nll.double().sort().values
    ranks = (math.ceil((len(nll) + 1) * percent / 100) for percent in range(1, 100))
    return tuple(float(ascending[rank - 1]) for rank in ranks if rank <= len(nll))


class _Cuts(NamedTuple):
    """Thresholds with the best F1.

    Attributes:
        common: of all labels together.
        own: [L] of each label by itself; `common` where there is none.
        positives: [L] images that have the label.
        has_own: [L] bool.
    """

    common: float
    own: Tensor
    positives: Tensor
    has_own: Tensor

    def shrunk(self, strength: float) -> Tensor:
        """Draw each label's threshold towards the common one, in logit space: [L].

        A label with `strength` positives lies halfway.
        """
        own, common = (
            cut.double().clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY).logit()
            for cut in (self.own, self.own.new_tensor(self.common))
        )
        weight = self.positives / (self.positives + strength)
        between = (weight * own + (1 - weight) * common).sigmoid().to(self.own.dtype)
        return torch.where(self.has_own, between, self.own)


def _fitted_cuts(
    scores: Tensor,
    targets: Tensor,
    min_labels: int,
    trained: Tensor | None,
    unknown: Tensor | None,
) -> _Cuts:
    positives = targets.sum(0)
    has_own = positives >= FEW_POSITIVES
    if trained is not None:
        has_own &= trained.to(has_own.device)
    common, _ = best_threshold(scores, targets, min_labels=min_labels, unknown=unknown)
    own = best_label_thresholds(
        scores, targets, otherwise=common, at_least=FEW_POSITIVES, unknown=unknown
    )
    return _Cuts(common, own.masked_fill(~has_own, common), positives, has_own)


def _best_shrinkage(
    scores: Tensor,
    targets: Tensor,
    min_labels: int,
    trained: Tensor | None,
    unknown: Tensor | None,
) -> float:
    """Return the strength of `_Cuts.shrunk` with the best O-F1 on images that are left out."""
    fold = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)) % FOLDS
    sets = {strength: torch.zeros_like(targets) for strength in SHRINKAGES}
    for left_out in (fold == i for i in range(min(FOLDS, len(scores)))):
        nothing_known = unknown is not None and unknown[~left_out].all()
        if left_out.all() or nothing_known:
            return SHRINKAGES[-1]
        fitted = _fitted_cuts(
            scores[~left_out], targets[~left_out], min_labels, trained,
            None if unknown is None else unknown[~left_out],
        )  # fmt: skip
        for strength in SHRINKAGES:
            cut = threshold_sets(scores[left_out], fitted.shrunk(strength))
            sets[strength][left_out] = _filled(cut, scores[left_out], min_labels)

    def merit(strength: float) -> float:
        return multilabel_metrics(sets[strength], targets, unknown=unknown)["O-F1"]

    return max(SHRINKAGES, key=merit)


def _filled(sets: Tensor, scores: Tensor, min_labels: int) -> Tensor:
    """Give sets of fewer labels their best-scored ones: `at_least`, which ranks few images."""
    short = sets.sum(1) < min_labels
    if not short.any():
        return sets
    sets = sets.clone()
    sets[short] = at_least(sets[short], scores[short], min_labels)
    return sets


def decided_sets(
    decide: Decide, inference: Inference, scores: Tensor, calibration: Calibration
) -> Tensor:
    """Return the label sets of a decision: [n, L] bool.

    Each has at least `calibration.min_labels` labels. A path that is shorter gives way to the best
    one found that is not; what is too small still takes its best-scored labels. Every set holds the
    labels known to be present and none known to be absent.

    Args:
        decide: `path` takes the best path's set, `f1` the set with the best expected F1 over the
            sets found; the others cut through the scores as calibrated.
        inference: of n images.
        scores: [n, L] mixed marginals.
        calibration: thresholds, k and the least number of labels.
    """
    least = calibration.min_labels
    evidence = inference.evidence
    if evidence is not None:
        scores = _ranked_by_evidence(scores, evidence)
    if decide == "path":
        sets = _best_sets(inference, least)
    elif decide == "threshold":
        sets = threshold_sets(scores, calibration.threshold)
    elif decide == "k":
        sets = top_k_sets(scores, calibration.k)
    elif decide == "f1":
        found = [best_f1_sets(result, least).cpu() for result in inference.search]
        sets = torch.cat([inference.sets[:0], *found])
    elif decide == "label_thresholds":
        cuts = calibration.label_thresholds
        sets = threshold_sets(scores, torch.tensor(cuts) if cuts else calibration.threshold)
    else:
        raise ValueError(f"decide must be one of {', '.join(DECISIONS)}, got {decide!r}")
    return with_known(_filled(sets, scores, least), inference)


def _ranked_by_evidence(scores: Tensor, evidence: Tensor) -> Tensor:
    """Put labels known to be present before all others, and absent ones behind: [n, L]."""
    ranked = scores.nan_to_num(0).masked_fill(evidence == 1, 2.0)
    return ranked.masked_fill(evidence == -1, -1.0)


def with_known(sets: Tensor, inference: Inference) -> Tensor:
    """Give sets [n, L] all labels known to be present and none of the absent ones.

    Where no path fits what is known, a set holds the labels known to be present alone.
    """
    evidence = inference.evidence
    if evidence is None:
        return sets
    return (sets & (evidence == 0) & ~inference.found_none()[:, None]) | (evidence == 1)


def _best_sets(inference: Inference, min_labels: int) -> Tensor:
    """Return the best set found of at least so many labels, or the best one: [n, L] bool."""
    parts = [inference.sets[:0]]
    for best, result in zip(
        inference.sets.split([len(result) for result in inference.search]),
        inference.search,
        strict=True,
    ):
        short = (best.sum(1) < min_labels).nonzero()[:, 0]
        if len(short):
            found = path_sets(result.labels.cpu()[short], result.num_labels)
            fits = found.sum(2) >= min_labels
            best = best.clone()
            best[short] = found[torch.arange(len(short)), fits.int().argmax(1)]
        parts.append(best)
    return torch.cat(parts)


def best_f1_sets(result: SearchResult, min_labels: int = 0) -> Tensor:
    """Return the set of each image with the best expected example-F1: [B, L] bool.

    The N sets found, S_i with their probabilities p_i renormalised, stand for all. The best set of
    k labels has the k largest weights `sum_i p_i [l in S_i] 2 / (k + |S_i|)`, and their sum is its
    expected F1; the empty set's is the probability of the empty set. So trying every k finds the
    best of all sets (Dembczynski et al., NIPS 2011). Ties go to fewer labels, then to lower ones.

    Args:
        result: of B images.
        min_labels: sets of fewer labels are left out, as far as there are labels on the paths.
    """
    B, N, T = result.labels.shape
    widest = min(N * T, result.num_labels)
    if not B * widest:
        return torch.zeros(B, result.num_labels, dtype=torch.bool, device=result.labels.device)
    size = max(1, F1_AT_ONCE // (widest * max(widest, N)))
    return torch.cat([
        _best_f1_sets(labels, log_probs, result.num_labels, min_labels)
        for labels, log_probs in zip(
            result.labels.split(size), result.log_probs.split(size), strict=True
        )
    ])  # fmt: skip


def _best_f1_sets(labels: Tensor, log_probs: Tensor, L: int, min_labels: int) -> Tensor:
    """Return `best_f1_sets` of paths [B, N, T] with log-probabilities [B, N]."""
    names, has = _membership(labels, L)
    U = names.shape[1]
    log_probs = log_probs.double()
    weights = (log_probs - log_probs[:, :1]).exp()
    weights = torch.where(log_probs[:, :1] > -torch.inf, weights, 0)
    weights[:, 0] = 1  # also where every path is impossible
    sizes = has.sum(2)
    k = torch.arange(1, U + 1, device=labels.device)
    shares = 2 * weights[:, None] / (k[:, None] + sizes[:, None])  # [B, U, N]
    ranked, order = (shares @ has.double()).sort(dim=2, descending=True, stable=True)
    expected = ranked.cumsum(2).diagonal(dim1=1, dim2=2)  # [B, U], of the best set of k labels
    of_empty = (weights * (sizes == 0)).sum(1, keepdim=True)
    expected = torch.cat([of_empty, expected], 1)
    distinct = (names < L).sum(1, keepdim=True)
    k = torch.arange(U + 1, device=labels.device)
    allowed = (k >= distinct.clamp(max=min_labels)) & (k <= distinct)
    best = expected.masked_fill(~allowed, -torch.inf).argmax(1)
    if not U:
        return torch.zeros(len(labels), L, dtype=torch.bool, device=labels.device)
    chosen = order[torch.arange(len(labels), device=labels.device), (best - 1).clamp(min=0)]
    chosen = names.gather(1, chosen).masked_fill(k[None, :-1] >= best[:, None], PAD)
    return path_sets(chosen, L)


def _membership(labels: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Return the distinct labels on an image's paths, and which of them each path has.

    Args:
        labels: [B, N, T] paths, padded with -1.
        L: number of labels.

    Returns:
        [B, U] label indices, ascending, L past the end; and [B, N, U] bool.
    """
    B, N, T = labels.shape
    flat = labels.reshape(B, N * T)
    ascending, position = flat.masked_fill(flat == PAD, L).sort(1)
    new = torch.cat([ascending[:, :1] < L, ascending.diff(dim=1) > 0], 1) & (ascending < L)
    U = int(new.sum(1).max())
    at = (new.cumsum(1) - 1).masked_fill(ascending == L, U)
    names = torch.full((B, U + 1), L, device=labels.device).scatter_(1, at, ascending)
    column = torch.empty_like(at).scatter_(1, position, at)
    has = torch.zeros(B, N, U + 1, dtype=torch.bool, device=labels.device)
    has.scatter_(2, column.view(B, N, T), True)
    return names[:, :U], has[:, :, :U]


def mean_average_precision(scores: Tensor, targets: Tensor, unknown: Tensor | None = None) -> float:
    """Return mAP, 0 where no label has a positive."""
    value = float(average_precision(scores, targets, unknown=unknown).nanmean())
    return 0.0 if value != value else value


def decision_metrics(
    inference: Inference,
    targets: Tensor,
    calibration: Calibration,
    k: int | None = None,
    unknown: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Measure every decision, ranked by the mixed marginals.

    Args:
        inference: of the images.
        targets: [n, L] bool.
        calibration: thresholds, k and mixing weight.
        k: also report at most k labels of the best path (`path@k`) and exactly k labels by score
            (`top@k`).
        unknown: [n, L] bool, labels that are neither present nor absent.

    Returns:
        Metrics by decision (`DECISIONS`), and of the two at k.
    """
    scores = inference.mixed(calibration)
    decided = {decide: decided_sets(decide, inference, scores, calibration) for decide in DECISIONS}
    rows: dict[str, dict[str, float]] = {
        decide: multilabel_metrics(sets, targets, scores=scores, unknown=unknown)
        for decide, sets in decided.items()
    }
    if k is not None:
        rows[f"path@{k}"] = multilabel_metrics(
            decided["path"], targets, scores=scores, k=k, unknown=unknown
        )
        rows[f"top@{k}"] = multilabel_metrics(scores, targets, k=k, unknown=unknown)
    return rows


@dataclass(frozen=True, eq=False)
class Decided:
    """What is said of m images.

    Attributes:
        inference: paths, marginals and label scores.
        sets: [m, L] bool, the decided label sets.
        scores: [m, L], each label's score in 0..1.
        set_nll: of the calibration.
    """

    inference: Inference
    sets: Tensor
    scores: Tensor
    set_nll: tuple[float, ...] = ()

    def alone(self, image: int) -> Decided:
        """Return what is said of one image, copied: see `Inference.alone`."""
        rows = slice(image, image + 1)
        sets, scores = self.sets[rows].clone(), self.scores[rows].clone()
        return Decided(self.inference.alone(image), sets, scores, self.set_nll)


@dataclass(frozen=True)
class DecisionOptions:
    """How label sets are decided; a threshold goes before `decide`, see `predict`."""

    top_k: int | None
    decide: Decide
    threshold: float | None
    min_labels: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite number, got {self.threshold}")
        if self.decide not in DECISIONS:
            raise ValueError(f"decide must be one of {', '.join(DECISIONS)}, got {self.decide!r}")


def decide(inference: Inference, calibration: Calibration, options: DecisionOptions) -> Decided:
    """Decide label sets as the options say."""
    scores = inference.mixed(calibration)
    if options.threshold is not None:
        calibration = replace(calibration, threshold=options.threshold)
    if options.min_labels is not None:
        calibration = replace(calibration, min_labels=options.min_labels)
    by = options.decide if options.threshold is None else "threshold"
    sets = decided_sets(by, inference, scores, calibration)
    if options.top_k is not None:
        ranked = scores
        if inference.evidence is not None:
            ranked = _ranked_by_evidence(scores, inference.evidence)
        sets = with_known(cut_to_k(sets, ranked, options.top_k), inference)
    return Decided(inference, sets, scores, calibration.set_nll)
