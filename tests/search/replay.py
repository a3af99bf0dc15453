"""Holds a compiled search against the specification in float64.

Paths must be equal. Where they are not, the search is replayed in float64 along the compiled
search's own decisions: the image is excused only if the first decision that differs was between
scores closer than `TIE`. Everything else is a failure.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnrnn import _C
from cnnrnn.config import Order, SearchConfig
from cnnrnn.network.head import PREFIX_BYTES, Head, ImageEmbedding
from cnnrnn.search import SearchStats, reference
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.packed import CPU, detached, head_parameters

TIE = 1e-5
MOST = 1 + 1e-5  # of a marginal

# Makes what searches a head: `_C.CpuHead` or its like, with the same `beam_search`.
Pack = Callable[[Head], Any]

# NumPy's numbers are the same on every machine; torch's normal ones depend on its instruction set.
Numbers = torch.Generator | np.random.Generator


def make_cpu_head(
    head: Head, *, prefix_bytes: int = PREFIX_BYTES, instruction_set: str = "auto"
) -> _C.CpuHead:
    """Pack a head's weights into a new `_C.CpuHead`, with its own budget and instruction set."""
    return _C.CpuHead(
        *detached(head_parameters(head), CPU),
        cell=head.cell,
        activation=head.activation,
        prefix_bytes=prefix_bytes,
        instruction_set=instruction_set,
    )


def make_cuda_head(
    head: Head, device: torch.device, *, prefix_bytes: int = PREFIX_BYTES
) -> _C.CudaHead:
    """Pack a head's weights into a new `_C.CudaHead` on a GPU, with a budget of its own."""
    return _C.CudaHead(
        *detached(head_parameters(head), device),
        cell=head.cell,
        activation=head.activation,
        prefix_bytes=prefix_bytes,
    )


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


def random_evidence(seed: int, head: Head, batch: int, T: int) -> Tensor:
    """What is known of each image, drawn from the seed: of some nothing, of some every label."""
    rng = np.random.default_rng(seed)
    L = head.num_labels
    evidence = torch.zeros(batch, L, dtype=torch.int8)
    for row in evidence:
        if rng.random() < 0.2:
            continue
        labels = rng.permutation(L)
        present = int(rng.integers(0, min(T, L) + 1))
        absent = int(rng.integers(0, L - present + 1))
        row[labels[:present]] = 1
        row[labels[present : present + absent]] = -1
    return evidence[:1] if batch and rng.random() < 0.2 else evidence


def random_banked_case(
    seed: int, label_counts: Sequence[int], joint_dims: Sequence[int], marginals: bool
) -> tuple[Head, ImageEmbedding, SearchConfig, Tensor]:
    """A random search in which labels are known, as far as a GPU has room for its banks."""
    head, embedding, config = random_case(seed, label_counts, joint_dims)
    if seed % 3 == 0:
        config = replace(config, marginal_places=1 + seed % _C.MAX_CUDA_PATHS)
    T = resolve_max_labels(head, config)
    most_present = _C.MAX_CUDA_PATHS // config.places(marginals) - 1
    evidence = random_evidence(seed, head, len(embedding), min(T, most_present))
    return head, embedding, config, evidence


def run_compiled(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    max_labels: int,
    *,
    marginals: bool = False,
    trace: bool = False,
    pack: Pack = make_cpu_head,
    evidence: Tensor | None = None,
) -> tuple[Any, ...]:
    """Search with a freshly packed head: labels, lengths, log_probs, marginals, trace, stats,
    log_evidence."""
    return search_with(
        pack(head), embedding, config, max_labels,
        marginals=marginals, trace=trace, evidence=evidence,
    )  # fmt: skip


def search_with(
    compiled: Any,
    embedding: ImageEmbedding,
    config: SearchConfig,
    max_labels: int,
    *,
    marginals: bool = False,
    trace: bool = False,
    precision: str = "exact",
    evidence: Tensor | None = None,
) -> tuple[Any, ...]:
    """Search with what `Pack` made; see `run_compiled`."""
    wide = config.places(marginals) > config.beam_size
    known = {"evidence": evidence} if evidence is not None else {}
    places = {"marginal_places": config.places(marginals)} if wide else {}
    outputs: tuple[Any, ...] = compiled.beam_search(
        embedding.joint.detach(),
        None if embedding.label_logits is None else embedding.label_logits.detach(),
        config.beam_size, max_labels, config.min_labels, config.order, config.end_takes_slot,
        config.stop, marginals, trace, precision, **known, **places,
    )  # fmt: skip
    return (*outputs[:5], SearchStats(*outputs[5]), outputs[7])


def assert_search_equal(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    marginals: bool = False,
    pack: Pack = make_cpu_head,
    evidence: Tensor | None = None,
) -> int:
    """Compare the compiled search with the float64 reference; return how many were excused."""
    T = resolve_max_labels(head, config)
    labels, lengths, log_probs, sums, _, _, log_evidence = run_compiled(
        head, embedding, config, T, marginals=marginals, pack=pack, evidence=evidence
    )
    head64 = copy.deepcopy(head).double()
    embedding64 = embedding.to("cpu", torch.float64)
    expected = reference.beam_search(
        head64, embedding64, config, max_labels=T, marginals=marginals, evidence=evidence
    )
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
            if log_evidence is not None:
                torch.testing.assert_close(
                    log_evidence[b].double(), expected.log_evidence[b],
                    rtol=1e-5, atol=1e-5, equal_nan=True,
                )  # fmt: skip
            continue
        gap = first_differing_gap(
            head, head64, embedding, embedding64, config, T, b, pack, marginals, evidence
        )
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
    marginals: bool = False,
    evidence: Tensor | None = None,
) -> float:
    """The float64 gap of the first decision in which the compiled search went another way."""
    labels, lengths, log_probs, _, trace, _, _ = run_compiled(
        head, embedding, config, T,
        marginals=marginals, trace=True, pack=pack, evidence=evidence,
    )  # fmt: skip
    joint = embedding64.joint[image]
    logits = None if embedding64.label_logits is None else embedding64.label_logits[image]
    N, L = config.beam_size, head.num_labels
    places = config.places(marginals)
    known = torch.zeros(L) if evidence is None else evidence[image if len(evidence) > 1 else 0]
    present = frozenset((known == 1).nonzero()[:, 0].tolist())
    start = torch.tensor([head.start])
    state = head64.extend(start, head64.initial_state(1))
    live = [reference.Path(joint.new_zeros(()), (), state, present)]
    finished_scores: dict[tuple[int, ...], float] = {}
    done: list[reference.Path] = []
    for step in range(T + 1):
        extended = torch.stack([
            _extended(head64, joint, logits, config, T, p, known == -1) for p in live
        ])  # fmt: skip
        finished = []
        if not config.end_takes_slot:
            finished = [
                p._replace(score=s) for p, s in zip(live, extended[:, L].clone(), strict=True)
            ]
            extended[:, L] = -torch.inf
        best = reference._best_of_each_bank(extended, live, places)
        finished += [live[j]._replace(score=extended[j, c]) for j, c in best if c == L]
        chosen = [(j, c) for j, c in best if c != L]
        done = reference._merge(done, finished, N)
        finished_scores |= {p.labels: float(p.score) for p in finished}
        full = len(done) == N and config.stop == "n_best"
        floor = float(done[-1].score) if done else -torch.inf
        scores = {c: float(extended[c]) for c in chosen}
        kept = [c for c in chosen if marginals or not full or scores[c] > floor]
        if config.stop == "literal" and kept and done and max(scores.values()) < floor:
            kept = kept if marginals else []
        taken = [(int(p), int(c)) for p, c in trace[image, step].tolist() if p >= 0]
        if taken != kept and not (marginals and not taken):
            banks = {c: len(live[c[0]].lacking - {c[1]}) for c in kept + taken}
            for bank in range(len(present) + 1):
                mine, theirs = ([c for c in some if banks[c] == bank] for some in (kept, taken))
                if mine != theirs:
                    limits = [
                        float(extended[j, c]) for j in range(len(live)) for c in range(L + 1)
                        if len(live[j].lacking - {c}) == bank
                    ]  # fmt: skip
                    limits = sorted(limits, reverse=True)[: places + 1]
                    return _list_gap(extended, mine, theirs, [*limits, floor])
        if not taken:
            break
        live = [
            reference.Path(
                extended[p, c], (*live[p].labels, c),
                head64.extend(torch.tensor([c]), live[p].state), live[p].lacking - {c},
            )
            for p, c in taken
        ]  # fmt: skip
    for n in range(N):
        path = tuple(labels[image, n, : lengths[image, n]].tolist())
        found = log_probs[image, n] > -torch.inf
        if n >= len(done) or not found:
            return 0.0 if n >= len(done) and not found else torch.inf
        if path != done[n].labels:
            return abs(finished_scores.get(path, torch.inf) - float(done[n].score))
    return torch.inf


def _extended(
    head: Head,
    joint: Tensor,
    logits: Tensor | None,
    config: SearchConfig,
    T: int,
    path: reference.Path,
    absent: Tensor,
) -> Tensor:
    if len(path.labels) == T:
        log_probs = joint.new_full((head.num_labels + 1,), -torch.inf)
        log_probs[head.end] = 0.0
    else:
        log_probs = reference.step_log_probs(head, joint, logits, config, path)
    log_probs[~reference.admissible_labels(path, absent, config, T)] = -torch.inf
    return path.score + log_probs


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
