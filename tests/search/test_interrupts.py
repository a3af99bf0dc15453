"""Ctrl-C in the compiled search: soon, and the head is as good as new."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cnnrnn import Head, SearchConfig
from cnnrnn.network.head import ImageEmbedding
from cnnrnn.search import beam_search
from cnnrnn.search.exact import best_sets
from cnnrnn.search.packed import packed_head

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


def head_of(labels: int, width: int, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    head = Head(labels, 8, joint_dim=width, hidden_dim=width)
    head.max_labels = min(labels, 12)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.eval()


def seconds_to_stop(work: Callable[[], object], after: float) -> float:
    """Interrupt work after some seconds; return how long it took to raise."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
            timer.join()  # the work was too short: nothing was shown
            pytest.fail("the work had ended")
        return time.perf_counter() - sent[0]
    finally:
        timer.cancel()


@pytest.mark.parametrize("after", [0.3, 1.0])
def test_a_long_search(after: float) -> None:
    """Ten and more seconds of images end within a second, and their states may be used again."""
    head, images = head_of(80, 128), 400_000
    embedding = ImageEmbedding(torch.randn(images, 128), None)
    config = SearchConfig(beam_size=8)
    few = ImageEmbedding(embedding.joint[:300], None)
    assert seconds_to_stop(lambda: beam_search(head, embedding, config, marginals=True), after) < 1
    found = beam_search(head, few, config, marginals=True)
    fresh = beam_search(head_of(80, 128), few, config, marginals=True)
    assert torch.equal(found.labels, fresh.labels)
    assert torch.equal(found.log_probs, fresh.log_probs)
    assert torch.equal(found.marginals(), fresh.marginals())


def test_a_long_search_for_sets() -> None:
    head = head_of(80, 128)
    embedding = ImageEmbedding(torch.randn(20_000, 128), None)
    few = ImageEmbedding(embedding.joint[:50], None)

    def search(of: ImageEmbedding, by: Head) -> torch.Tensor:
        return best_sets(by, of, count=20, max_expansions=2000).log_probs

    assert seconds_to_stop(lambda: search(embedding, head), 0.5) < 1
    assert torch.equal(search(few, head), search(few, head_of(80, 128)))


def test_known_labels() -> None:
    head = head_of(80, 128)
    embedding = ImageEmbedding(torch.randn(60_000, 128), None)
    evidence = torch.zeros(1, 80, dtype=torch.int8)
    evidence[0, [40, 60]] = 1
    config = SearchConfig(beam_size=8, marginal_places=64)
    work = lambda: beam_search(head, embedding, config, marginals=True, evidence=evidence)  # noqa: E731
    assert seconds_to_stop(work, 0.5) < 1


def test_packing_a_large_head() -> None:
    head = head_of(30_000, 512)
    assert seconds_to_stop(lambda: packed_head(head), 0.4) < 1


def test_a_search_in_another_thread_goes_on() -> None:
    """Signals end the work of the main thread alone."""
    head = head_of(80, 128)
    embedding = ImageEmbedding(torch.randn(20_000, 128), None)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(beam_search, head, embedding)
        assert seconds_to_stop(future.result, 0.1) < 1
        found = future.result()
    assert torch.equal(found.log_probs, beam_search(head_of(80, 128), embedding).log_probs)
