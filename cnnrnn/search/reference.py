"""The beam search in plain torch: the specification, to be read beside the paper.

One image after the other, every live path with a recurrent state of its own, nothing shared. The
compiled searches return what this returns; docs/search.md states the same rules in words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
) -> SearchResult:
    """Find the N best label paths of each image (section 3.2 of the paper).

    Args:
        head: scores the next label; its dtype and device are those of the search.
        image_embedding: of B images.
        config: the search options.
        max_labels: T, already resolved: at most L unless the order is free.
        marginals: also return the probability that a path holds each label, summed over every
            visited path that does not yet.

    Returns:
        Paths [B, N, T]; an image with a value that is not finite has log-probability NaN.
    """
    B, N, T, L = len(image_embedding), config.beam_size, max_labels, head.num_labels
    joint = image_embedding.joint
    result = SearchResult(
        labels=torch.full((B, N, T), PAD, dtype=torch.int64, device=joint.device),
        lengths=torch.zeros(B, N, dtype=torch.int64, device=joint.device),
        log_probs=torch.full((B, N), -torch.inf, dtype=joint.dtype, device=joint.device),
        num_labels=L,
        requested_marginals=joint.new_zeros(B, L) if marginals else None,
    )
    for b in range(B):
        logits = image_embedding.label_logits
        mass = None if result.requested_marginals is None else result.requested_marginals[b]
        try:
            done = _search_image(
                head, joint[b], None if logits is None else logits[b], config, T, mass
            )
        except NonFinite:
            result.log_probs[b] = torch.nan
            if mass is not None:
                mass.fill_(torch.nan)
            continue
        for n, path in enumerate(done):
            result.labels[b, n, : len(path.labels)] = torch.tensor(path.labels, dtype=torch.int64)
            result.lengths[b, n] = len(path.labels)
            result.log_probs[b, n] = path.score
    return result


def _search_image(
    head: Head,
    joint: Tensor,  # [D]
    label_logits: Tensor | None,  # [L+1]
    config: SearchConfig,
    max_labels: int,
    marginals: Tensor | None,  # [L], added to
) -> list[Path]:
    if not joint.isfinite().all() or not (label_logits is None or label_logits.isfinite().all()):
        raise NonFinite
    N, L = config.beam_size, head.num_labels
    start = torch.tensor([head.start], device=joint.device)
    live = [Path(joint.new_zeros(()), (), head.extend(start, head.initial_state(1)))]
    done: list[Path] = []
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
            rows.append(path.score + log_probs)
        extended = torch.stack(rows)  # [paths, L+1]
        if marginals is not None:
            new = extended[:, :L].exp()
            for row, path in zip(new, live, strict=True):
                row[list(path.labels)] = 0  # in order free they may follow again
            marginals += new.sum(0)

        finished: list[Path] = []
        if not config.end_takes_slot:
            finished = [
                p._replace(score=s) for p, s in zip(live, extended[:, L].clone(), strict=True)
            ]
            extended[:, L] = -torch.inf
        # Row-major order and a stable sort: at equal score the lower path, then the lower label.
        scores, order = extended.flatten().sort(descending=True, stable=True)
        best: list[Path] = []
        for score, index in zip(scores[:N], order[:N].tolist(), strict=True):
            parent, label = live[index // (L + 1)], index % (L + 1)
            if score == -torch.inf:
                break
            if label == head.end:
                finished.append(parent._replace(score=score))
            else:
                row = torch.tensor([label], device=joint.device)
                state = head.extend(row, parent.state)
                best.append(Path(score, (*parent.labels, label), state))
        live = best
        if accepting:
            done = _merge(done, finished, N)
        floor = torch.inf if not accepting else _floor(config, done)
        if any(score > floor_before and score >= floor for score in not_finite):
            raise NonFinite  # it could have changed the result

        if config.stop == "literal" and live and done and live[0].score < done[-1].score:
            accepting = False
        floor = torch.inf if not accepting else _floor(config, done)
        if marginals is None:
            live = [path for path in live if path.score > floor]
        elif live and live[0].score <= floor:
            if sum(float(p.score.exp()) for p in live) < LIVE_MASS_FLOOR:
                break
    return done


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


def _merge(done: list[Path], finished: list[Path], N: int) -> list[Path]:
    """Keep the N best; at equal score the path that finished earlier stays ahead."""
    offered = done + [path for path in finished if path.score > -torch.inf]
    return sorted(offered, key=lambda path: -float(path.score))[:N]
