"""Throughput of the search: N = 4, T = 8, increasing paths, H = 512, one thread.

Every benchmark proves first that what it times finds the same paths. `pytest benchmarks/` runs a
few on quickly trained heads and ends with a table; with `--full` all run, on well trained heads,
and `make bench` makes the tables of README and docs/performance.md of that. The first run trains
the heads, and keeps them in benchmarks/.cache.

- warm: the prefix table was filled by 16,000 images, the timed ones are unseen, misses included;
- full hit: the same images once more, every state is there;
- cold: an empty table, 16,000 images;
- adversarial: an empty table and images that hardly share a prefix.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from benchmarks.search import floor
from benchmarks.search.heads import trained_head
from benchmarks.search.opponents import FoundPaths, PathStates, PrefixStates
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import SearchStats, beam_search

CONFIG = SearchConfig(beam_size=4, max_labels=8)
N, T = 4, 8
BATCH = 256
FILLING_BATCHES = 63  # 16,128 images
TIMED_BATCHES = 64


@dataclass(frozen=True)
class Case:
    """A head and batches of embedded images: first those that fill, then those that are timed."""

    head: Head
    filling: list[ImageEmbedding]
    timed: list[ImageEmbedding]


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> Callable[[int, bool], Case]:
    """Make the case of a number of labels, with the chain term or without."""
    plugins = request.config.pluginmanager
    terminal, capture = map(plugins.get_plugin, ("terminalreporter", "capturemanager"))
    quick = not request.config.getoption("--full")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(line)
            terminal.flush()

    @cache
    def made(num_labels: int, chain_term: bool) -> Case:
        trained = trained_head(num_labels, chain_term, quick, say)
        trained.head.prefix_bytes = 2 << 30  # 1,000 labels with chain term want 0.8 GB

        def batches(first: int, count: int) -> list[ImageEmbedding]:
            with torch.no_grad():
                return [
                    trained.head.embed(trained.features(slice(at * BATCH, (at + 1) * BATCH)))
                    for at in range(first, first + count)
                ]

        return Case(
            trained.head, batches(0, FILLING_BATCHES), batches(FILLING_BATCHES, TIMED_BATCHES)
        )

    return made


@dataclass(frozen=True)
class Searcher:
    """An implementation under test."""

    search: Callable[[ImageEmbedding], FoundPaths]
    clear: Callable[[], None]
    shares_states: bool


def searcher(implementation: str, head: Head) -> Searcher:
    def public(embedding: ImageEmbedding) -> FoundPaths:
        result = beam_search(
            head, embedding, CONFIG, "native" if implementation == "native" else "reference"
        )
        return FoundPaths(result.labels, result.log_probs)

    if implementation in ("native", "reference"):
        return Searcher(public, head.clear_cache, implementation == "native")
    compiled = implementation.endswith("compiled")
    if implementation.startswith("states per prefix"):
        opponent = PrefixStates(head, N, T, compiled)
        return Searcher(opponent.search, opponent.clear, True)
    return Searcher(PathStates(head, N, T, compiled).search, lambda: None, False)


def few(embedding: ImageEmbedding, count: int) -> ImageEmbedding:
    logits = embedding.label_logits
    return ImageEmbedding(embedding.joint[:count], None if logits is None else logits[:count])


def prove_equal(under_test: Searcher, head: Head, embedding: ImageEmbedding) -> None:
    """Check the best paths; two implementations may round a tie in a thousand apart."""
    found, expected = under_test.search(embedding), beam_search(head, embedding, CONFIG, "native")
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    differ = (found.labels != expected.labels).flatten(1).any(1)
    assert differ.float().mean() <= 0.005


def record(benchmark, batch: int, **facts: object) -> None:
    benchmark.extra_info["images_per_second"] = batch / benchmark.stats.stats.median
    benchmark.extra_info.update(facts)


def record_floor(
    benchmark, head: Head, batches: list[ImageEmbedding], states: float, parents: float
) -> None:
    """Put operations, bytes and the floor beside the figure.

    `states` were made per image, and for `parents` per image the first child was among them.
    """
    works = [floor.work(head, embedding, CONFIG, T) for embedding in batches]
    work = floor.WorkPerImage(*(statistics.mean(values) for values in zip(*works, strict=True)))
    instructions = work.instructions + floor.state_instructions(head, states, parents)
    at_floor = floor.peak() / instructions
    benchmark.extra_info.update(
        rows=work.rows,
        vectors=work.vectors,
        hit_rate=1 - states / work.rows,
        states_made=states,
        parents_extended=parents,
        vector_instructions=instructions,
        bytes=work.bytes,
        peak_vector_instructions_per_second=floor.peak(),
        floor_images_per_second=at_floor,
        share_of_floor=benchmark.extra_info["images_per_second"] / at_floor,
    )


def stats_of(head: Head) -> SearchStats:
    """What the head's prefix table holds."""
    return beam_search(head, ImageEmbedding(torch.empty(0, head.joint_dim)), CONFIG).stats


LABELS = pytest.mark.parametrize("num_labels", [80, 1000], ids=["L80", "L1000"])
FULL = pytest.mark.full
CHAIN = pytest.mark.parametrize(
    "chain_term", [True, pytest.param(False, marks=FULL)], ids=["chain", "plain"]
)
SHARING = ["native", "states per prefix", "states per prefix, compiled"]
PER_PATH = ["states per path", pytest.param("states per path, compiled", marks=FULL)]


@LABELS
@CHAIN
@pytest.mark.parametrize(
    "implementation", [*SHARING, *PER_PATH, pytest.param("reference", marks=FULL)]
)
def test_warm(benchmark, case, num_labels, chain_term, implementation):
    c = case(num_labels, chain_term)
    under_test = searcher(implementation, c.head)
    batch = 16 if implementation == "reference" else BATCH
    prove_equal(under_test, c.head, few(c.filling[0], batch))
    before = SearchStats()

    def unseen_batches() -> Iterator[ImageEmbedding]:
        nonlocal before
        while True:
            if under_test.shares_states:
                under_test.clear()
                for embedding in c.filling:
                    under_test.search(embedding)
            before = stats_of(c.head)
            yield from c.timed

    batches = unseen_batches()
    passes = 3 if implementation == "native" else 1  # short: one moment's noise is all of it
    rounds = passes * TIMED_BATCHES if under_test.shares_states else 5
    benchmark.pedantic(
        under_test.search, setup=lambda: ((few(next(batches), batch),), {}), rounds=rounds
    )
    record(benchmark, batch)
    if implementation == "native":
        after, images = stats_of(c.head), TIMED_BATCHES * BATCH
        record_floor(
            benchmark,
            c.head,
            c.timed,
            (after.prefix_nodes - before.prefix_nodes) / images,
            (after.prefix_parents - before.prefix_parents) / images,
        )
        record(benchmark, batch, prefix_nodes=after.prefix_nodes, prefix_bytes=after.prefix_bytes)


@LABELS
@CHAIN
@pytest.mark.parametrize("implementation", SHARING)
def test_full_hit(benchmark, case, num_labels, chain_term, implementation):
    c = case(num_labels, chain_term)
    under_test = searcher(implementation, c.head)
    prove_equal(under_test, c.head, c.timed[0])
    for embedding in c.timed:
        under_test.search(embedding)
    batches = itertools.cycle(c.timed)
    passes = 10 if implementation == "native" and num_labels == 80 else 1
    benchmark.pedantic(
        under_test.search, setup=lambda: ((next(batches),), {}), rounds=passes * TIMED_BATCHES
    )
    record(benchmark, BATCH)
    if implementation == "native":
        record_floor(benchmark, c.head, c.timed, 0.0, 0.0)


@LABELS
@CHAIN
@pytest.mark.parametrize("implementation", SHARING)
def test_cold(benchmark, case, num_labels, chain_term, implementation):
    c = case(num_labels, chain_term)
    under_test = searcher(implementation, c.head)
    prove_equal(under_test, c.head, c.filling[0])

    def search_all() -> None:
        for embedding in c.filling:
            under_test.search(embedding)

    rounds = 5 if implementation == "native" else 3
    benchmark.pedantic(search_all, setup=under_test.clear, rounds=rounds)
    record(benchmark, FILLING_BATCHES * BATCH)
    if implementation == "native":
        held, images = stats_of(c.head), FILLING_BATCHES * BATCH
        record_floor(
            benchmark, c.head, c.filling, held.prefix_nodes / images, held.prefix_parents / images
        )


def spread_head(num_labels: int) -> tuple[Head, Iterator[ImageEmbedding]]:
    """A head whose paths have eight labels, and images without end that hardly share a prefix.

    A bias that falls with the label makes each step a short one; which it is, is the image's.
    """
    torch.manual_seed(0)
    head = Head(num_labels, feature_dim=64, hidden_dim=512).eval()
    with torch.no_grad():
        assert head.score_bias is not None
        head.score_bias.copy_(torch.linspace(0, -12, num_labels + 1))
        head.score_bias[-1] = -30.0

    def images() -> Iterator[ImageEmbedding]:
        generator = torch.Generator().manual_seed(1)
        while True:
            yield ImageEmbedding(torch.randn(BATCH, head.joint_dim, generator=generator) * 3)

    return head, images()


@FULL
@pytest.mark.parametrize("implementation", [*SHARING, *PER_PATH])
def test_adversarial(benchmark, implementation):
    head, images = spread_head(1000)
    under_test = searcher(implementation, head)
    prove_equal(under_test, head, next(images))
    states, parents = [], []

    def setup() -> tuple[tuple[ImageEmbedding], dict[str, object]]:
        under_test.clear()
        embedding = next(images)
        if implementation == "native":
            stats = beam_search(head, embedding, CONFIG).stats
            states.append((stats.prefix_lookups - stats.prefix_hits) / BATCH)
            parents.append(stats.prefix_parents / BATCH)
            under_test.clear()
        return (embedding,), {}

    benchmark.pedantic(under_test.search, setup=setup, rounds=5)
    record(benchmark, BATCH)
    if implementation == "native":
        record_floor(
            benchmark, head, [next(images)], statistics.mean(states), statistics.mean(parents)
        )


@FULL
@LABELS
@CHAIN
@pytest.mark.parametrize("images", ["unseen", "seen"])
def test_one_image(benchmark, case, num_labels, chain_term, images):
    """The public call with one image after 16,000 others, and after that image itself."""
    c = case(num_labels, chain_term)
    c.head.clear_cache()
    for embedding in c.filling:
        beam_search(c.head, embedding, CONFIG)
    singles = [
        ImageEmbedding(
            e.joint[i : i + 1], None if e.label_logits is None else e.label_logits[i : i + 1]
        )
        for e in c.timed[:4]
        for i in range(250)
    ]
    if images == "seen":
        for embedding in singles:
            beam_search(c.head, embedding, CONFIG)
    one = iter(singles)
    benchmark.pedantic(
        beam_search, setup=lambda: ((c.head, next(one), CONFIG), {}), rounds=len(singles)
    )
    times = sorted(benchmark.stats.stats.data)
    benchmark.extra_info["p50_us"] = statistics.median(times) * 1e6
    benchmark.extra_info["p99_us"] = times[int(0.99 * len(times))] * 1e6


@FULL
@CHAIN
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("table", ["full hit", "cold"])
def test_threads(benchmark, case, chain_term, threads, table):
    """4,096 images in one call, by torch's number of threads."""
    c = case(80, chain_term)
    joint = torch.cat([e.joint for e in c.timed[:16]])
    logits = None
    if chain_term:
        logits = torch.cat([e.label_logits for e in c.timed[:16] if e.label_logits is not None])
    images = ImageEmbedding(joint, logits)
    torch.set_num_threads(1)
    alone = beam_search(c.head, images, CONFIG)
    torch.set_num_threads(threads)
    assert torch.equal(beam_search(c.head, images, CONFIG).log_probs, alone.log_probs)
    setup = c.head.clear_cache if table == "cold" else None
    benchmark.pedantic(
        beam_search, (c.head, images, CONFIG), setup=setup, rounds=9 if table == "cold" else 100
    )
    record(benchmark, len(images))


@FULL
@pytest.mark.parametrize("part", ["resnet50", "search"])
def test_share_of_the_search(benchmark, part):
    """A ResNet-50 on 16 images, and the head with its search on the same features."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
    images = torch.randn(16, 3, 224, 224)
    with torch.no_grad():
        features = backbone(images)
        head = Head(80, features.shape[1], hidden_dim=512, chain_term=True).eval()
        if part == "resnet50":
            benchmark.pedantic(backbone, args=(images,), rounds=5, warmup_rounds=1)
        else:
            benchmark(lambda: beam_search(head, head.embed(features), CONFIG))
    record(benchmark, 16)
