"""The beam search in plain torch: the specification, to be read beside the paper.

One image after the other, every live path with a recurrent state of its own, nothing shared. The
compiled searches return what this returns; docs/search.md states the same rules in words.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn.config import SearchConfig
from cnnrnn.labels import PAD
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search.result import SearchResult

LIVE_MASS_FLOOR = 1e-3


class Path(NamedTuple):
    """A label path with its score (the sum of its steps' log-probabilities)."""

    score: Tensor  # []
    labels: tuple[int, ...]
    state: tuple[Tensor, Tensor]  # output and cell [1, H] after the last label
    lacking: frozenset[int] = frozenset()  # labels known to be present that it does not hold yet

    @property
    def bank(self) -> int:
        """Paths compete with those that lack as many present labels."""
        return len(self.lacking)


class NonFinite(Exception):
    """A value of this image is not finite."""


@torch.no_grad()
def beam_search(
    head: Head,
    image_embedding: ImageEmbedding,
    config: SearchConfig,
    *,
    max_labels: int,
    marginals: bool = False,
    evidence: Tensor | None = None,
) -> SearchResult:
    """Find the N best label paths of each image (section 3.2 of the paper).

    Args:
        head: scores the next label; its dtype and device are those of the search.
        image_embedding: of B images.
        config: the search options.
        max_labels: T, already resolved: at most L unless the order is free.
        marginals: also return the probability that a path holds each label: summed over every
            visited path that does not yet; given evidence, over the complete paths found.
        evidence: [1 or B, L] of 1 for labels known to be present, -1 absent, 0 unknown.

    Returns:
        Paths [B, N, T]; an image with a value that is not finite has log-probability NaN.
    """
    B, N, T, L = len(image_embedding), config.beam_size, max_labels, head.num_labels
    joint = image_embedding.joint
    sums, log_masses = joint.new_zeros(B, L), joint.new_zeros(B)
    result = SearchResult(
        labels=torch.full((B, N, T), PAD, dtype=torch.int64, device=joint.device),
        lengths=torch.zeros(B, N, dtype=torch.int64, device=joint.device),
        log_probs=torch.full((B, N), -torch.inf, dtype=joint.dtype, device=joint.device),
        num_labels=L,
        requested_marginals=sums if marginals else None,
        log_evidence=log_masses if marginals else None,
    )
    for b in range(B):
        logits = image_embedding.label_logits
        known = None if evidence is None else evidence[b if len(evidence) > 1 else 0]
        try:
            done, found = _search_image(
                head, joint[b], None if logits is None else logits[b], config, T, marginals, known
            )
        except NonFinite:
            for values in (result.log_probs, sums, log_masses):
                values[b] = torch.nan
            continue
        for n, path in enumerate(done):
            result.labels[b, n, : len(path.labels)] = torch.tensor(path.labels, dtype=torch.int64)
            result.lengths[b, n] = len(path.labels)
            result.log_probs[b, n] = path.score
        sums[b], log_masses[b] = found
    return result


class Found(NamedTuple):
    """What all paths of an image say together."""

    marginals: Tensor  # [L]
    log_mass: Tensor  # [], of the complete paths


def _search_image(
    head: Head,
    joint: Tensor,  # [D]
    label_logits: Tensor | None,  # [L+1]
    config: SearchConfig,
    max_labels: int,
    marginals: bool,
    evidence: Tensor | None,  # [L]
) -> tuple[list[Path], Found]:
    if not joint.isfinite().all() or not (label_logits is None or label_logits.isfinite().all()):
        raise NonFinite
    N, L = config.beam_size, head.num_labels
    places = config.places(marginals)
    known = joint.new_zeros(L) if evidence is None else evidence
    given, absent = bool(known.any()), known == -1
    present = frozenset((known == 1).nonzero()[:, 0].tolist())
    live = [_empty_path(head, joint, present)]
    done: list[Path] = []
    complete: list[Path] = []  # all that ended, in or out of the N best
    visited = joint.new_zeros(L)  # probability that a live path is followed by each label
    accepting = True  # False once a literal stop has fixed the result
    while live:
        rows: list[Tensor] = []
        not_finite: list[Tensor] = []  # scores of paths that could not be extended
        # Only in marginal mode are paths live that can no longer change the result.
        floor_before = torch.inf if not accepting else _floor(config, done)
        for path in live:
            if len(path.labels) == max_labels:
                log_probs = joint.new_full((L + 1,), -torch.inf)
                log_probs[head.end] = 0.0
            else:
                try:
                    log_probs = step_log_probs(head, joint, label_logits, config, path)
                except NonFinite:
                    not_finite.append(path.score)
                    log_probs = joint.new_full((L + 1,), -torch.inf)
            # After the softmax: evidence chooses among paths, it makes none more probable.
            log_probs[~admissible_labels(path, absent, config, max_labels)] = -torch.inf
            rows.append(path.score + log_probs)
        extended = torch.stack(rows)  # [paths, L+1]
        new = extended[:, :L].exp()
        for row, path in zip(new, live, strict=True):
            row[list(path.labels)] = 0  # in order free they may follow again
        visited += new.sum(0)

        finished: list[Path] = []
        if not config.end_takes_slot:
            finished = [
                p._replace(score=s)
                for p, s in zip(live, extended[:, L].clone(), strict=True)
                if s > -torch.inf
            ]
            extended[:, L] = -torch.inf
        chosen = _best_of_each_bank(extended, live, places)
        finished += [live[j]._replace(score=extended[j, L]) for j, label in chosen if label == L]
        live = [
            _extended_by(head, live[j], label, extended[j, label])
            for j, label in chosen
            if label != L
        ]
        complete += finished
        if accepting:
            done = _merge(done, finished, N)
        floor = torch.inf if not accepting else _floor(config, done)
        if any(score > floor_before and score >= floor for score in not_finite):
            raise NonFinite  # it could have changed the result

        best = max((path.score for path in live), default=None)
        if config.stop == "literal" and best is not None and done and best < done[-1].score:
            accepting = False
        floor = torch.inf if not accepting else _floor(config, done)
        if not marginals:
            live = [path for path in live if path.score > floor]
        elif best is not None and best <= floor:
            most = _log_sum(complete, joint) if given else 0.0
            if _log_sum(live, joint) < most + math.log(LIVE_MASS_FLOOR):
                break
    log_mass = _log_sum(complete, joint)
    if not given:
        return done, Found(visited, log_mass)
    of_paths = joint.new_zeros(L)
    for path in complete:
        of_paths[list(set(path.labels))] += (path.score - log_mass).exp()
    return done, Found(of_paths if complete else of_paths.fill_(torch.nan), log_mass)


def _best_of_each_bank(
    extended: Tensor,  # [paths, L+1] scores
    live: list[Path],
    places: int,
) -> list[tuple[int, int]]:
    """Return the extensions that are kept as (rank of the path, label), in the order of live paths.

    Those are the best of each bank, banks ascending. Row-major order and a stable sort: at equal
    score the lower path comes first, then the lower label.
    """
    L = extended.shape[1] - 1
    banks: dict[int, list[tuple[int, int]]] = {bank: [] for bank in range(1 + live[-1].bank)}
    scores, order = extended.flatten().sort(descending=True, stable=True)
    for score, index in zip(scores, order.tolist(), strict=True):
        if score == -torch.inf or all(len(bank) == places for bank in banks.values()):
            break
        j, label = index // (L + 1), index % (L + 1)
        bank = banks[len(live[j].lacking - {label})]
        if len(bank) < places:
            bank.append((j, label))
    return [extension for bank in banks.values() for extension in bank]


def _log_sum(paths: list[Path], like: Tensor) -> Tensor:
    """Return the logarithm of the probability of paths together, -inf of none: []."""
    scores = [path.score for path in paths]
    return torch.stack(scores).logsumexp(0) if scores else like.new_full((), -torch.inf)


def _floor(config: SearchConfig, done: list[Path]) -> float:
    """Return the score at or below which a live path can no longer enter the result."""
    full = config.stop == "n_best" and len(done) == config.beam_size
    return float(done[-1].score) if full else -torch.inf


def step_log_probs(
    head: Head,
    joint: Tensor,  # [D]
    label_logits: Tensor | None,  # [L+1]
    config: SearchConfig,
    path: Path,
) -> Tensor:
    """Return log p(label or END | image, path), -inf for what may not follow: [L+1].

    Raises:
        NonFinite: when a score is NaN, or the largest is infinite.
    """
    allowed = allowed_labels(head.num_labels, config, path.labels, joint.device)
    if not allowed.any():  # then only the end may follow
        log_probs = joint.new_full((head.num_labels + 1,), -torch.inf)
        log_probs[head.end] = 0.0
        return log_probs
    scores = head.score(path.state[0], ImageEmbedding(joint[None]))[0]
    if label_logits is not None:
        # Only differences matter: taking off the largest first keeps the sum precise.
        scores = scores + (label_logits - label_logits[allowed].max())
    scores = scores.masked_fill(~allowed, -torch.inf)
    if scores[allowed].isnan().any() or not scores.max().isfinite():
        raise NonFinite
    return scores.log_softmax(0).clamp(max=0)


def allowed_labels(
    num_labels: int, config: SearchConfig, labels: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return which of the L labels and END may follow a path: [L+1] bool."""
    allowed = torch.ones(num_labels + 1, dtype=torch.bool, device=device)
    if labels and config.order == "increasing":
        allowed[: labels[-1] + 1] = False
    elif labels and config.order == "unique":
        allowed[list(labels)] = False
    allowed[num_labels] = len(labels) >= config.min_labels
    return allowed


@torch.no_grad()
def best_sets(
    head: Head,
    image_embedding: ImageEmbedding,
    *,
    count: int,
    max_labels: int,
    min_labels: int = 0,
    least: float = -torch.inf,
    evidence: Tensor | None = None,
) -> list[list[tuple[tuple[int, ...], float]] | None]:
    """Find the most probable label sets of each image by scoring every one: for a few labels.

    Args:
        head: scores the next label.
        image_embedding: of B images.
        count: how many sets.
        max_labels: T, a path of so many ends for certain.
        min_labels: END is forbidden on shorter paths, unless nothing else may follow.
        least: sets of a lower log-probability are left out.
        evidence: [1 or B, L], as in `beam_search`.

    Returns:
        Of each image at most `count` pairs of ascending labels and log-probability, best first;
        None where a value is not finite.
    """
    config = SearchConfig(max_labels=max_labels, min_labels=min_labels)
    logits = image_embedding.label_logits
    found: list[list[tuple[tuple[int, ...], float]] | None] = []
    for b, joint in enumerate(image_embedding.joint):
        known = None if evidence is None else evidence[b if len(evidence) > 1 else 0].tolist()
        try:
            scored = _scored_sets(head, joint, None if logits is None else logits[b], config)
        except NonFinite:
            found.append(None)
            continue
        fits = [
            (labels, score)
            for labels, score in scored
            if score >= least and score > -torch.inf and _agrees(labels, known)
        ]
        found.append(sorted(fits, key=lambda item: -item[1])[:count])
    return found


def _scored_sets(
    head: Head,
    joint: Tensor,  # [D]
    label_logits: Tensor | None,  # [L+1]
    config: SearchConfig,
) -> list[tuple[tuple[int, ...], float]]:
    """Score every label set of at most `config.max_labels` labels."""
    if not joint.isfinite().all() or not (label_logits is None or label_logits.isfinite().all()):
        raise NonFinite
    scored = []
    begun = [_empty_path(head, joint)]
    while begun:
        path = begun.pop()
        if len(path.labels) == config.max_labels:
            scored.append((path.labels, float(path.score)))
            continue
        log_probs = path.score + step_log_probs(head, joint, label_logits, config, path)
        scored.append((path.labels, float(log_probs[head.end])))
        for label in (log_probs[: head.end] > -torch.inf).nonzero()[:, 0].tolist():
            begun.append(_extended_by(head, path, label, log_probs[label]))
    return scored


def _agrees(labels: tuple[int, ...], known: list[int] | None) -> bool:
    """Whether a set of labels holds what is known to be present and nothing that is absent."""
    return known is None or all(
        value == 0 or (label in labels) == (value == 1) for label, value in enumerate(known)
    )


def _empty_path(head: Head, like: Tensor, lacking: frozenset[int] = frozenset()) -> Path:
    start = torch.tensor([head.start], device=like.device)
    return Path(like.new_zeros(()), (), head.extend(start, head.initial_state(1)), lacking)


def _extended_by(head: Head, path: Path, label: int, score: Tensor) -> Path:
    state = head.extend(torch.tensor([label], device=score.device), path.state)
    return Path(score, (*path.labels, label), state, path.lacking - {label})


def admissible_labels(
    path: Path,
    absent: Tensor,  # [L] bool
    config: SearchConfig,
    max_labels: int,
) -> Tensor:
    """Return which of the L labels and END evidence lets follow a path: [L+1] bool.

    What leads to no set that holds all present labels and no absent one is left out.
    """
    admitted = functional.pad(~absent, (0, 1), value=not path.lacking)
    if path.lacking and config.order == "increasing":
        admitted[min(path.lacking) + 1 :] = False
    if path.lacking and max_labels - len(path.labels) == len(path.lacking):
        lacked = torch.zeros_like(admitted)
        lacked[list(path.lacking)] = True
        admitted &= lacked
    return admitted


def _merge(done: list[Path], finished: list[Path], N: int) -> list[Path]:
    """Keep the N best; at equal score the path that finished earlier stays ahead."""
    return sorted(done + finished, key=lambda path: -float(path.score))[:N]
