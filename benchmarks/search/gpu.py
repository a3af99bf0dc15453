"""The search on a GPU, in figures: `python -m benchmarks.search.gpu --out FILE.json`.

N = 4, T = 5, increasing paths, D = 64, H = 512. Every case proves first that it finds the CPU
search's paths. Needs torch, numpy, Pillow and safetensors; the trained heads of benchmarks/.cache
where they are there, else untrained ones, which the figures say.

- full hit: a CUDA graph of 100 searches over 8 batches whose states are all there, one launch each
  (batches of 65,536 hold the 32,768 images twice);
- warm: the public call, the table filled by 16,000 other images, misses included;
- cold: the public call, a packed head and an empty table, 16,384 images in batches of 4,096; both
  beside plain torch and the CPU search, which copies the images from the GPU;
- one known label: the public call on images that it has seen, the most probable label of each known
  to be present; with 16 places a bank also for marginals;
- one image: the public call, and replays of a graph, by wall clock with a synchronise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.search.heads import HELD_OUT_IMAGES, is_trained, trained_head
from benchmarks.search.opponents import PathStates, PrefixStates
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import beam_search as public_search
from cnnrnn.search.packed import packed_head

CONFIG = SearchConfig(beam_size=4, max_labels=5)
N, T = 4, 5
GPU = torch.device("cuda", 0)
CALLS, BATCHES = 100, 8
beam_search = partial(public_search, implementation="native")
FULL_HIT = [(80, 4096), (80, 65536), (1000, 4096)]


def head_and_images(num_labels: int) -> tuple[Head, torch.Tensor, bool]:
    """Return a head on the GPU, features of images [n, F], and whether it was trained."""
    if is_trained(num_labels, False):
        trained = trained_head(num_labels, False)
        return trained.head.to(GPU), trained.all_features.to(GPU), True
    torch.manual_seed(0)
    head = Head(num_labels, 128, hidden_dim=512).eval().to(GPU)
    return head, torch.randn(HELD_OUT_IMAGES, 128, device=GPU) * 3, False


def batch_of(head: Head, features: torch.Tensor, first: int, count: int) -> ImageEmbedding:
    """Embed `count` images from the first-th on, starting over after the last one."""
    with torch.no_grad():
        index = torch.arange(first, first + count, device=GPU) % len(features)
        return head.embed(features[index])


def prove_equal(head: Head, embedding: ImageEmbedding) -> None:
    """Hold 256 images against the CPU search; ties may round apart."""
    few = ImageEmbedding(embedding.joint[:256], None)
    found = beam_search(head, few, CONFIG)
    expected = beam_search(head, few.to("cpu", torch.float32), CONFIG)
    torch.testing.assert_close(found.log_probs.cpu(), expected.log_probs, rtol=1e-4, atol=1e-4)
    assert (found.labels.cpu() != expected.labels).flatten(1).any(1).float().mean() <= 0.01


def graph_of(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Capture a call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def gpu_seconds(run: Callable[[], Any], rounds: int = 20) -> float:
    """Return the median time of a run between two events."""
    times = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def wall_seconds(runs: list[Callable[[], Any]]) -> list[float]:
    """Return the time of each run until the GPU is idle."""
    times = []
    for run in runs:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times


def options(embedding: ImageEmbedding) -> tuple[Any, ...]:
    """Return what `_C.CudaHead.beam_search` takes."""
    return (embedding.joint, None, N, T, 0, "increasing", False, "n_best", False)


def full_hit(num_labels: int, batch: int, precision: str) -> dict[str, Any]:
    """A graph of many searches over batches that have been searched before."""
    head, features, trained = head_and_images(num_labels)
    batches = [batch_of(head, features, i * batch, batch) for i in range(BATCHES)]
    prove_equal(head, batches[0])
    packed = packed_head(head, GPU)
    for embedding in batches:
        packed.beam_search(*options(embedding), precision=precision)
    rotating = itertools.cycle(batches)

    def search_all() -> None:
        for _ in range(CALLS):
            packed.beam_search(*options(next(rotating)), precision=precision, rounds=0)

    results: list[Any] = []
    whole = graph_of(lambda: results.append(packed.beam_search(
        *options(batches[0]), precision=precision, rounds=0
    )))  # fmt: skip
    whole.replay()
    found = packed.beam_search(*options(batches[0]), precision=precision)
    assert torch.equal(results[0][0], found[0]) and int(results[0][1].min()) >= 0
    seconds = gpu_seconds(graph_of(search_all).replay) / CALLS
    return {
        "case": "full hit", "implementation": precision, "L": num_labels, "B": batch,
        "us": seconds * 1e6, "images_per_second": batch / seconds, "trained": trained,
        "mean_labels": float(found[1][:, 0].float().mean()),
    }  # fmt: skip


def _pack_anew(head: Head) -> None:
    head.clear_cache()
    packed_head(head, GPU)


def searchers(head: Head) -> dict[str, tuple[Callable[[ImageEmbedding], Any], Callable[[], None]]]:
    """Return each implementation's search and what empties its table."""
    found: dict[str, tuple[Callable[[ImageEmbedding], Any], Callable[[], None]]] = {}
    for precision in ("exact", "fast"):
        search = partial(beam_search, head, config=CONFIG, precision=precision)
        found[precision] = (search, lambda: _pack_anew(head))
    on_cpu = partial(public_search, head, config=CONFIG, search_device="cpu")
    found["CPU search"] = (on_cpu, head.clear_cache)
    with torch.device(GPU):  # the opponents make tensors where torch's default is
        for compiled in (False, True):
            kind = ", compiled" if compiled else ""
            sharing = PrefixStates(head, N, T, compiled)
            found[f"states per prefix{kind}"] = (sharing.search, sharing.clear)
            found[f"states per path{kind}"] = (
                PathStates(head, N, T, compiled).search, lambda: None,
            )  # fmt: skip
    return found


def warm_and_cold(num_labels: int, batch: int) -> list[dict[str, Any]]:
    """Each implementation with an empty table, then on images it has not seen."""
    head, features, trained = head_and_images(num_labels)
    half = HELD_OUT_IMAGES // 2
    filling = [batch_of(head, features, i, batch) for i in range(0, half, batch)]
    unseen = [batch_of(head, features, half + i, batch) for i in range(0, half, batch)]
    prove_equal(head, filling[0])
    rows = []
    for name, (search, clear) in searchers(head).items():
        with torch.device(GPU):
            for embedding in filling[:2]:
                search(embedding)  # compiles, and lets allocators grow
            times = []
            for _ in range(3):
                clear()
                times.append(sum(wall_seconds([partial(search, e) for e in filling])))
            cold = statistics.median(times)
            warm = statistics.median(wall_seconds([partial(search, e) for e in unseen]))
        shared = {"implementation": name, "L": num_labels, "B": batch, "trained": trained}
        rows.append({"case": "cold", **shared, "images_per_second": half / cold})
        rows.append({"case": "warm", **shared, "us": warm * 1e6,
                     "images_per_second": batch / warm})  # fmt: skip
    return rows


def one_known_label(num_labels: int, batch: int) -> list[dict[str, Any]]:
    """The public call with the best label of each image revealed, beside the one without."""
    head, features, trained = head_and_images(num_labels)
    embedding = batch_of(head, features, 0, batch)
    best = beam_search(head, embedding, SearchConfig(beam_size=N, max_labels=T, min_labels=1))
    evidence = torch.zeros(batch, num_labels, dtype=torch.int8)
    evidence[torch.arange(batch), best.labels[:, 0, 0].cpu()] = 1
    few = ImageEmbedding(embedding.joint[:256], None)
    found = beam_search(head, few, CONFIG, evidence=evidence[:256]).cpu()
    on_cpu = few.to("cpu", torch.float32)
    expected = beam_search(head, on_cpu, CONFIG, evidence=evidence[:256])
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    rows = []
    wide = SearchConfig(beam_size=N, max_labels=T, marginal_places=16)
    for name, config, known in (
        ("none known", CONFIG, None), ("one known", CONFIG, evidence),
        ("none known, marginals", replace(wide, marginal_places=None), None),
        ("one known, marginals of 16 places", wide, evidence),
    ):  # fmt: skip
        search = partial(beam_search, head, embedding, config,
                         marginals="marginals" in name, evidence=known)  # fmt: skip
        search()
        seconds = statistics.median(wall_seconds([search] * 10))
        rows.append({"case": "one known label", "implementation": name, "L": num_labels,
                     "B": batch, "us": seconds * 1e6, "images_per_second": batch / seconds,
                     "trained": trained})  # fmt: skip
    return rows


def one_image(num_labels: int) -> list[dict[str, Any]]:
    """The public call, and a graph with and without rounds for missing states."""
    head, features, trained = head_and_images(num_labels)
    singles = [batch_of(head, features, i, 1) for i in range(1000)]
    for embedding in singles:
        beam_search(head, embedding, CONFIG)
    packed, static = packed_head(head, GPU), singles[0]
    graphs = {
        "graph, one launch": graph_of(lambda: packed.beam_search(*options(static), rounds=0)),
        "graph, all rounds": graph_of(lambda: packed.beam_search(*options(static))),
    }
    runs: dict[str, list[Callable[[], Any]]] = {
        "public call": [partial(beam_search, head, e, CONFIG) for e in singles],
        **{name: [graph.replay] * 1000 for name, graph in graphs.items()},
    }
    rows = []
    for name, calls in runs.items():
        times = sorted(wall_seconds(calls))
        rows.append({"case": "one image", "implementation": name, "L": num_labels, "B": 1,
                     "us": statistics.median(times) * 1e6, "p99_us": times[990] * 1e6,
                     "trained": trained})  # fmt: skip
    return rows


def changed_by_fast(num_labels: int) -> dict[str, Any]:
    """How many best paths the fast precision changes, and by how much."""
    head, features, trained = head_and_images(num_labels)
    embedding = batch_of(head, features, 0, 16384)
    exact = beam_search(head, embedding, CONFIG)
    fast = beam_search(head, embedding, CONFIG, precision="fast")
    changed = (exact.labels[:, 0] != fast.labels[:, 0]).any(1)
    apart = (exact.log_probs[:, 0] - fast.log_probs[:, 0]).abs()
    return {"case": "changed by fast", "L": num_labels, "B": 16384, "trained": trained,
            "best_paths_changed": float(changed.float().mean()),
            "largest_difference": float(apart.max())}  # fmt: skip


def main() -> int:
    """Run every case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows: list[dict[str, Any]] = []
    steps: list[Callable[[], Any]] = [
        *(partial(full_hit, *case, precision)
          for case in FULL_HIT for precision in ("exact", "fast")),
        partial(one_known_label, 80, 4096), partial(one_known_label, 1000, 4096),
        partial(one_image, 80), partial(changed_by_fast, 80), partial(changed_by_fast, 1000),
        partial(warm_and_cold, 80, 4096),
    ]  # fmt: skip
    for step in steps:
        made = step()
        for row in made if isinstance(made, list) else [made]:
            print(json.dumps(row), flush=True)
            rows.append(row)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
