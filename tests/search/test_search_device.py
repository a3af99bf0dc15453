"""`search_device`: where a search runs, and what happens where a GPU cannot be relied on.

No GPU is needed: where one is wanted, a stand-in runs what would go there on the CPU.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from cnnrnn import _C
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import ImageEmbedding
from cnnrnn.search import agreement, beam_search, device, engine
from cnnrnn.search.agreement import gpu_problem, native_on
from cnnrnn.search.device import MEASURED_GPUS, Verdicts, device_of_search
from cnnrnn.search.packed import CPU
from tests.kernels.gpu.check import ROOT, is_earned
from tests.search.replay import random_embedding, random_head

CONFIG = SearchConfig(beam_size=3, max_labels=4)
GPU = torch.device("cuda", 0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def head():
    return random_head(seeded(0), 20, joint_dim=8, hidden_dim=12)


@pytest.fixture
def embedding(head):
    return random_embedding(seeded(1), head, 30, False)


@pytest.fixture
def gpu(monkeypatch):
    """Make torch and the build seem to have a GPU; return where each search was sent."""
    sent = []

    def native_search(head, embedding, options, place):
        sent.append(place)
        return right(head, embedding, options, CPU)

    right = engine.native_search
    for module in (engine, agreement):
        monkeypatch.setattr(module, "native_search", native_search)
    monkeypatch.setattr(_C, "WITH_CUDA", True)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "H0"),
                        ("is_current_stream_capturing", False)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(device, "verdicts", Verdicts(device._named_problem))
    return sent


class OnGpu:
    """As much of a tensor on a GPU as decides where its search runs."""

    is_cuda, device = True, torch.device("cuda", 1)


def assert_same(found, expected):
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.log_probs, expected.log_probs)
    if expected.requested_marginals is not None:
        assert torch.equal(found.marginals(), expected.marginals())


@pytest.mark.parametrize("algorithm", ["beam", "exact"])
@pytest.mark.parametrize("implementation", ["auto", "native"])
def test_on_the_cpu_all_choices_are_the_cpu_search(head, embedding, implementation, algorithm):
    config = SearchConfig(beam_size=3, max_labels=4, algorithm=algorithm)
    expected = beam_search(head, embedding, config, marginals=True)
    for choice in ("auto", "cpu"):
        found = beam_search(
            head, embedding, config, implementation, marginals=True, search_device=choice
        )
        assert_same(found, expected)


@pytest.mark.parametrize("algorithm", ["beam", "exact"])
def test_what_cannot_be_had_is_one_sentence(head, embedding, monkeypatch, algorithm):
    config = SearchConfig(algorithm=algorithm)
    with pytest.raises(ValueError, match="search_device must be auto, cpu or cuda, got 'gpu'"):
        beam_search(head, embedding, config, search_device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda needs a GPU that torch can use, got none"):
        beam_search(head, embedding, config, search_device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_C, "WITH_CUDA", False)
    with pytest.raises(ValueError, match="needs a build with the CUDA search, got one without"):
        beam_search(head, embedding, config, search_device="cuda")


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_the_reference_runs_where_it_is(head, embedding, gpu, choice):
    with pytest.raises(ValueError, match=f"auto for the reference, .* got {choice}"):
        beam_search(head, embedding, CONFIG, "reference", search_device=choice)


def test_where_each_choice_searches(gpu, monkeypatch):
    on_gpu, on_cpu = OnGpu(), torch.zeros(1)
    for implementation in ("auto", "native"):
        assert device_of_search(on_gpu, implementation, "cpu") == CPU
        assert device_of_search(on_gpu, implementation, "cuda") == OnGpu.device
        assert device_of_search(on_cpu, implementation, "cuda") == GPU
        assert device_of_search(on_cpu, implementation, "auto") == CPU
    assert device_of_search(on_gpu, "native", "auto") == OnGpu.device
    assert device_of_search(on_gpu, "auto", "auto") == CPU
    monkeypatch.setattr(device, "MEASURED_GPUS", frozenset({"H1"}))
    assert device_of_search(on_gpu, "auto", "auto") == CPU
    monkeypatch.setattr(device, "MEASURED_GPUS", frozenset({"H0", "H1"}))
    assert device_of_search(on_gpu, "auto", "auto") == OnGpu.device
    monkeypatch.setattr(_C, "WITH_CUDA", False)
    assert device_of_search(on_gpu, "auto", "auto") == device_of_search(on_gpu, "native", "auto")
    assert device_of_search(on_gpu, "native", "auto") == CPU


def test_a_gpu_that_agrees_is_compared_once(head, embedding, gpu):
    expected = beam_search(head, embedding, CONFIG)
    gpu.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(beam_search(head, embedding, CONFIG, search_device="cuda"), expected)
        small = agreement.small_searches()
        assert gpu == [GPU, CPU] * len(small) + [GPU]
        beam_search(head, embedding, CONFIG, search_device="cuda")
    assert gpu[-2:] == [GPU, GPU] and len(gpu) == 2 * len(small) + 2


@pytest.mark.parametrize("planted", ["a label", "an error"])
def test_a_gpu_that_differs_is_replaced_by_the_cpu(head, embedding, gpu, monkeypatch, planted):
    right = agreement.native_search

    def wrong(head, embedding, options, place):
        result, nonfinite = right(head, embedding, options, place)
        if place == GPU:
            if planted == "an error":
                raise RuntimeError("CUDA error: no kernel image\nCompile with ...")
            result.labels[2, 0, 0] += 1
        return result, nonfinite

    monkeypatch.setattr(agreement, "native_search", wrong)
    expected = beam_search(head, embedding, CONFIG, search_device="cpu")
    gpu.clear()
    said = {"a label": r"labels\[2, 0, 0\] is 17, not 16", "an error": "it fails: CUDA error: no k"}
    message = rf"^the CPU searches in place of cuda:0, .*: {said[planted]}.* \(H0\)$"
    with pytest.warns(UserWarning, match=message) as warned:
        assert_same(beam_search(head, embedding, CONFIG, search_device="cuda"), expected)
    assert [Path(w.filename).name for w in warned] == [Path(__file__).name]
    compared = len(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(beam_search(head, embedding, CONFIG, search_device="cuda"), expected)
    assert gpu[compared - 1 :] == [CPU, CPU]


def test_too_little_memory_is_no_verdict(gpu, monkeypatch):
    def none_left(*arguments):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(agreement, "native_search", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            device.verdicts.agrees(GPU)
    assert device.verdicts.agrees(GPU)


def test_nothing_is_compared_while_a_cuda_graph_is_captured(head, embedding, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    beam_search(head, embedding, CONFIG, search_device="cuda")
    assert gpu == [GPU]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    beam_search(head, embedding, CONFIG, search_device="cuda")
    assert len(gpu) > 2


def test_a_gpu_without_room_is_not_even_compared(head, embedding, gpu):
    evidence = torch.zeros(1, 20, dtype=torch.int8)
    evidence[0, 3] = 1
    config = SearchConfig(beam_size=3, max_labels=4, marginal_places=64)
    engine._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="1 known labels need 2 banks of 64"):
        beam_search(
            head, embedding, config, marginals=True, evidence=evidence, search_device="cuda"
        )
    assert gpu == [CPU]


def test_threads_wait_for_one_verdict_on_each_gpu():
    asked = []

    def problem(place):
        asked.append(place)
        time.sleep(0.02)
        return None if place.index else "planted"

    verdicts, found = Verdicts(problem), []

    def ask(index):
        found.append((index, verdicts.agrees(torch.device("cuda", index))))

    threads = [threading.Thread(target=ask, args=(i % 2,)) for i in range(16)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(asked, key=str) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert sorted(found) == [(0, False)] * 8 + [(1, True)] * 8
    assert [str(w.message).startswith("the CPU searches in place of cuda:0") for w in warned] == [
        True
    ]


def test_the_problem_of_a_right_search_is_none():
    assert gpu_problem(CPU) is None and native_on(CPU)(agreement.small_searches()[0]) is not None


def test_a_compiled_call_takes_the_choice(head, embedding):
    @torch.compile(fullgraph=True, backend="eager")
    def search(joint):
        return beam_search(head, ImageEmbedding(joint), CONFIG, search_device="cpu").labels

    assert torch.equal(search(embedding.joint), beam_search(head, embedding, CONFIG).labels)


RESULTS = {
    "gpu": "H0",
    "tests": {"passed": True},
    "compute-sanitizer": {"alone": {"outcome": "nothing found"}, "x": {"outcome": "not done"}},
    "benchmarks": {
        "ended": True,
        "figures": [
            {"case": "one image", "implementation": "public call"},
            {"case": "cold", "implementation": "exact", "images_per_second": 1.0},
            {"case": "warm", "implementation": "exact", "images_per_second": 3.0},
            {"case": "warm", "implementation": "CPU search", "images_per_second": 2.0},
        ],
    },
}


def test_what_earns_a_gpu_its_place():
    assert is_earned(RESULTS)
    figures = RESULTS["benchmarks"]["figures"]
    slower = [{**figures[2], "images_per_second": 1.0}, figures[3]]
    for spoilt in (
        {"tests": {"passed": False}},
        {"compute-sanitizer": {"alone": {"outcome": "errors"}}},
        {"benchmarks": {"ended": False, "figures": figures}},
        {"benchmarks": {"ended": True, "figures": slower}},
        {"benchmarks": {"ended": True, "figures": figures[:3]}},
    ):
        assert not is_earned(RESULTS | spoilt), spoilt
    for step in ("tests", "compute-sanitizer", "benchmarks"):
        assert not is_earned({name: value for name, value in RESULTS.items() if name != step})


def test_auto_follows_the_results_that_are_committed():
    files = [json.loads(file.read_text(encoding="utf-8"))
             for file in (ROOT / "benchmarks" / "results").glob("*.json")]  # fmt: skip
    of_gpus = [results for results in files if isinstance(results, dict) and "gpu" in results]
    assert {results["gpu"] for results in of_gpus if is_earned(results)} == MEASURED_GPUS
