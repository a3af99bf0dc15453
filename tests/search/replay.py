"""Holds a compiled search against the specification in float64.

Paths must be equal. Where they are not, the search is replayed in float64 along the compiled
search's own decisions: the image is excused only if the first decision that differs was between
scores closer than `TIE`. Everything else is a failure.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import Order, SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import SearchStats, reference
from cnnrnn.search.engine import make_cpu_head, resolve_max_labels

TIE = 1e-5
MOST = 1 + 1e-5  # of a marginal

# Makes what searches a head: `_C.CpuHead` or its like, with the same `beam_search`.
Pack = Callable[[Head], Any]

# NumPy's numbers are the same on every machine; torch's normal ones depend on its instruction set.
Numbers = torch.Generator | np.random.Generator


def random_head(generator: Numbers, num_labels: int, **options: object) -> Head:
    """A head whose distributions are neither flat nor one-hot.

    Literal ReLU cells square their input at every step: larger weights leave float32's range.
    """
    head = Head(num_labels, feature_dim=8, **options)  # type: ignore[arg-type]
    scale = 1.0 if head.cell == "paper" else 3.0
    with torch.no_grad():
        for parameter in head.parameters():
            bound = scale / max(parameter.shape[-1], 1) ** 0.5
            if isinstance(generator, torch.Generator):
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                drawn = generator.uniform(-bound, bound, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
    return head.eval()


def random_embedding(
    generator: Numbers, head: Head, batch: int, label_logits: bool
) -> ImageEmbedding:
    def normal(width: int, scale: float) -> Tensor:
        if isinstance(generator, torch.Generator):
            return torch.randn(batch, width, generator=generator) * scale
        return torch.from_numpy(generator.normal(0, scale, (batch, width))).float()

    joint = normal(head.joint_dim, 2)
    return ImageEmbedding(joint, normal(head.num_labels + 1, 3) if label_logits else None)


def random_case(
    seed: int,
    label_counts: Sequence[int] = (1, 2, 3, 5, 7, 17, 80, 81),
    joint_dims: Sequence[int] = (1, 3, 16),
    order: Order | None = None,
) -> tuple[Head, ImageEmbedding, SearchConfig]:
    """One random search: sizes, options, weights and images all drawn from the seed."""
    rng = random.Random(seed)
    generator = np.random.default_rng(seed)
    num_labels = rng.choice(label_counts)
    head = random_head(
        generator,
        num_labels,
        joint_dim=rng.choice(joint_dims),
        hidden_dim=rng.choice([1, 5, 16]),
        cell=rng.choice(["lstm", "lstm", "paper"]),
        activation=rng.choice(["relu", "tanh", "identity"]),
        score_bias=rng.random() < 0.7,
        projection_bias=False,
        tied_embedding=rng.random() < 0.5,
    )
    longest = rng.choice([0, 1, 2, 4, 6])
    drawn = rng.choice(["increasing", "unique", "free"])
    order = order or drawn
    most = longest if order == "free" else min(longest, num_labels)
    config = SearchConfig(
        beam_size=rng.randint(1, 16),
        max_labels=longest,
        min_labels=rng.choice([0, 0, 0, rng.randint(0, most)]),
        order=order,
        end_takes_slot=rng.random() < 0.3,
        stop=rng.choice(["n_best", "n_best", "literal"]),
    )
    batch = rng.choice([0, 1, 1, 2, 2, 2, 17])  # 17 need several blocks, and share states
    embedding = random_embedding(generator, head, batch, rng.random() < 0.5)
    return head, embedding, config


def run_compiled(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    max_labels: int,
    *,
    marginals: bool = False,
    trace: bool = False,
    pack: Pack = make_cpu_head,
) -> tuple[Any, ...]:
    """Search with a freshly packed head: labels, lengths, log_probs, marginals, trace, stats."""
    return search_with(pack(head), embedding, config, max_labels, marginals=marginals, trace=trace)


def search_with(
    compiled: Any,
    embedding: ImageEmbedding,
    config: SearchConfig,
    max_labels: int,
    *,
    marginals: bool = False,
    trace: bool = False,
    precision: str = "exact",
) -> tuple[Any, ...]:
    """Search with what `Pack` made; see `run_compiled`."""
    outputs: tuple[Any, ...] = compiled.beam_search(
        embedding.joint.detach(),
        None if embedding.label_logits is None else embedding.label_logits.detach(),
        config.beam_size, max_labels, config.min_labels, config.order, config.end_takes_slot,
        config.stop, marginals, trace, precision,
    )  # fmt: skip
    return (*outputs[:5], SearchStats(*outputs[5]))


def assert_search_equal(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    marginals: bool = False,
    pack: Pack = make_cpu_head,
) -> int:
    """Compare the compiled search with the float64 reference; return how many were excused."""
    T = resolve_max_labels(head, config)
    labels, lengths, log_probs, sums, _, _ = run_compiled(
        head, embedding, config, T, marginals=marginals, pack=pack
    )
    head64 = copy.deepcopy(head).double()
    embedding64 = embedding.to("cpu", torch.float64)
    expected = reference.beam_search(head64, embedding64, config, max_labels=T, marginals=marginals)
    excused = 0
    for b in range(len(embedding)):
        if torch.equal(labels[b], expected.labels[b]) and torch.equal(
            lengths[b], expected.lengths[b]
        ):
            torch.testing.assert_close(
                log_probs[b].double(), expected.log_probs[b], rtol=1e-5, atol=1e-5, equal_nan=True
            )
            if sums is not None:
                assert (sums[b].nan_to_num() <= MOST).all(), f"image {b} under {config}: {sums[b]}"
                torch.testing.assert_close(
                    sums[b].double(), expected.marginals()[b],
                    rtol=1e-5, atol=1e-5, equal_nan=True,
                )  # fmt: skip
            continue
        gap = first_differing_gap(head, head64, embedding, embedding64, config, T, b, pack)
        assert gap < TIE, (
            f"image {b}: paths differ by a decision of gap {gap:.2e} under {config}:\n"
            f"{labels[b].tolist()}\n{expected.labels[b].tolist()}"
        )
        excused += 1
    return excused


@torch.no_grad()
def first_differing_gap(
    head: Head,
    head64: Head,
    embedding: ImageEmbedding,
    embedding64: ImageEmbedding,
    config: SearchConfig,
    T: int,
    image: int,
    pack: Pack,
) -> float:
    """The float64 gap of the first decision in which the compiled search went another way."""
    labels, lengths, log_probs, _, trace, _ = run_compiled(
        head, embedding, config, T, trace=True, pack=pack
    )
    joint = embedding64.joint[image]
    logits = None if embedding64.label_logits is None else embedding64.label_logits[image]
    N, L = config.beam_size, head.num_labels
    start = torch.tensor([head.start])
    live = [reference.Path(joint.new_zeros(()), (), head64.extend(start, head64.initial_state(1)))]
    finished_scores: dict[tuple[int, ...], float] = {}
    done: list[reference.Path] = []
    for step in range(T + 1):
        extended = torch.stack([_extended(head64, joint, logits, config, T, p) for p in live])
        finished = []
        if not config.end_takes_slot:
            finished = [
                p._replace(score=s) for p, s in zip(live, extended[:, L].clone(), strict=True)
            ]
            extended[:, L] = -torch.inf
        scores, order = extended.flatten().sort(descending=True, stable=True)
        chosen: list[tuple[int, int]] = []
        for score, index in zip(scores[:N].tolist(), order[:N].tolist(), strict=True):
            if score == -torch.inf:
                break
            parent, label = index // (L + 1), index % (L + 1)
            if label == L:
                finished.append(live[parent]._replace(score=extended[parent, label]))
            else:
                chosen.append((parent, label))
        done = reference._merge(done, finished, N)
        finished_scores |= {p.labels: float(p.score) for p in finished}
        full = len(done) == N and config.stop == "n_best"
        floor = float(done[-1].score) if done else -torch.inf
        kept = [c for c in chosen if not full or float(extended[c]) > floor]
        if config.stop == "literal" and kept and done and float(extended[kept[0]]) < floor:
            kept = []
        taken = [(int(p), int(c)) for p, c in trace[image, step].tolist() if p >= 0]
        if taken != kept:
            return _list_gap(extended, kept, taken, [*scores[: N + 1].tolist(), floor])
        if not taken:
            break
        live = [
            reference.Path(
                extended[p, c], (*live[p].labels, c),
                head64.extend(torch.tensor([c]), live[p].state),
            )
            for p, c in taken
        ]  # fmt: skip
    for n in range(N):
        path = tuple(labels[image, n, : lengths[image, n]].tolist())
        present = log_probs[image, n] > -torch.inf
        if n >= len(done) or not present:
            return 0.0 if n >= len(done) and not present else torch.inf
        if path != done[n].labels:
            return abs(finished_scores.get(path, torch.inf) - float(done[n].score))
    return torch.inf


def _extended(
    head: Head, joint: Tensor, logits: Tensor | None, config: SearchConfig, T: int, path: object
) -> Tensor:
    assert isinstance(path, reference.Path)
    if len(path.labels) == T:
        end_only = joint.new_full((head.num_labels + 1,), -torch.inf)
        end_only[head.end] = path.score
        return end_only
    return path.score + reference.step_log_probs(head, joint, logits, config, path)


def _list_gap(
    extended: Tensor,
    kept: list[tuple[int, int]],
    taken: list[tuple[int, int]],
    boundaries: list[float],
) -> float:
    for mine, theirs in zip(kept, taken, strict=False):
        if mine != theirs:
            return abs(float(extended[mine]) - float(extended[theirs]))
    shorter = min(len(kept), len(taken))
    score = float(extended[(kept + taken[len(kept) :])[shorter]])
    return min(abs(score - b) for b in boundaries if b != score)
