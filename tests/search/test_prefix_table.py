"""Prefix states kept across calls: exact, bounded, and safe under threads and forks."""

from __future__ import annotations

import copy
import gc
import os
import threading

import pytest
import torch
from torch.nn.utils import prune

from cnnrnn import _C
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import SearchResult, beam_search, packed
from tests.search.replay import (
    assert_search_equal,
    make_cpu_head,
    random_embedding,
    random_head,
    run_compiled,
    search_with,
)

CONFIG = SearchConfig(beam_size=4, max_labels=5)


@pytest.fixture
def head() -> Head:
    return random_head(torch.Generator().manual_seed(0), 40, joint_dim=16, hidden_dim=24)


def images(head: Head, count: int, seed: int) -> ImageEmbedding:
    return random_embedding(torch.Generator().manual_seed(seed), head, count, False)


def same(first: SearchResult, second: SearchResult) -> bool:
    return torch.equal(first.labels, second.labels) and torch.equal(
        first.log_probs, second.log_probs
    )


def test_a_second_search_finds_every_state(head):
    embedding = images(head, 30, seed=1)
    first, second = beam_search(head, embedding, CONFIG), beam_search(head, embedding, CONFIG)
    assert first.stats.hit_rate < 1.0
    assert second.stats.hit_rate == 1.0
    assert second.stats.prefix_nodes == first.stats.prefix_nodes
    made = first.stats.prefix_lookups - first.stats.prefix_hits
    assert 1 < first.stats.prefix_parents < made  # siblings share a product
    assert second.stats.prefix_parents == first.stats.prefix_parents
    assert same(first, second)


@pytest.mark.parametrize("cell", ["lstm", "paper"])
def test_kept_states_are_fresh_states_bit_for_bit(cell):
    head = random_head(torch.Generator().manual_seed(1), 40, joint_dim=16, hidden_dim=23, cell=cell)
    wanted = images(head, 20, seed=2)
    fresh = beam_search(head, wanted, CONFIG)
    for history in ([3], [4, 5, 6], [2], [7, 2]):
        head.clear_cache()
        for seed in history:
            beam_search(head, images(head, 50, seed), SearchConfig(8, 5, order="unique"))
        assert same(fresh, beam_search(head, wanted, CONFIG))
    for b in range(20):
        alone = beam_search(head, ImageEmbedding(wanted.joint[b : b + 1]), CONFIG)
        assert torch.equal(alone.log_probs[0], fresh.log_probs[b])


@pytest.mark.parametrize("budget", [0, 30_000, 120_000, 1 << 30])
def test_a_byte_budget_bounds_memory_and_changes_nothing(head, budget):
    bounded = make_cpu_head(head, prefix_bytes=budget)
    # State, name, share of the index, and the recurrent half of its children's gates.
    node = 4 * (2 * 32 + 16) + 12 + 4 * 16 + 4 * 4 * 32
    one_image = 4 * 4 * node + 1024 * 16 + 64 * node  # its states, the smallest index and segment
    for seed in range(5):
        embedding = images(head, 40, seed)
        found = search_with(bounded, embedding, CONFIG, 5)
        expected = run_compiled(head, embedding, CONFIG, 5)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
        if budget < 1 << 30:
            assert found[5].prefix_bytes <= max(budget, one_image)
    assert found[5].prefix_nodes > 1


def test_a_head_names_its_budget(head):
    embedding = images(head, 40, seed=1)
    free = beam_search(head, embedding, CONFIG)
    head.prefix_bytes = 0
    bounded = beam_search(head, embedding, CONFIG)
    assert bounded.stats.prefix_bytes < free.stats.prefix_bytes
    assert same(free, bounded)


def test_what_was_used_last_stays(head):
    often, rare = images(head, 4, seed=1), [images(head, 4, seed) for seed in range(2, 120)]
    bounded = make_cpu_head(head, prefix_bytes=250_000)
    search_with(bounded, often, CONFIG, 5)
    made = 0
    for embedding in rare:
        stats = search_with(bounded, embedding, CONFIG, 5)[5]
        made += stats.prefix_lookups - stats.prefix_hits
        assert search_with(bounded, often, CONFIG, 5)[5].hit_rate == 1.0
    assert made * 300 > 2 * 250_000  # so old states had to go


def test_the_index_grows_with_many_prefixes():
    head = random_head(torch.Generator().manual_seed(3), 1000, joint_dim=8, hidden_dim=8)
    with torch.no_grad():
        head.label_embedding.mul_(0.1)  # flat distributions: nothing is shared
    embedding = images(head, 150, seed=0)
    config = SearchConfig(16, 4, order="unique", min_labels=3)
    result = beam_search(head, embedding, config)
    assert result.stats.prefix_nodes > 3000
    few = ImageEmbedding(embedding.joint[:3])
    assert same(
        beam_search(head, few, config),
        SearchResult(result.labels[:3], result.lengths[:3], result.log_probs[:3], 1000),
    )
    assert assert_search_equal(head, few, config) <= 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_an_optimisers_step_is_seen(head, optimizer, options):
    """A fused one leaves torch's count of edits as it is."""
    embedding = images(head, 9, seed=1)
    before = beam_search(head, embedding, CONFIG)
    for parameter in head.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer(head.parameters(), lr=0.1, **options).step()
    after = beam_search(head, embedding, CONFIG)
    expected = beam_search(head, embedding, CONFIG, implementation="reference")
    torch.testing.assert_close(after.log_probs, expected.log_probs)
    assert not same(before, after)


def test_a_fused_step_is_seen_by_the_op(head):
    embedding = images(head, 9, seed=1)

    def searched():
        return torch.ops.cnnrnn.beam_search(
            embedding.joint, None, *packed.head_parameters(head), head.cell, head.activation,
            4, 5, 0, "increasing", False, "n_best", False, 0, head.prefix_bytes, "exact",
        )[2]  # fmt: skip

    with torch.no_grad():
        before = searched()
    for parameter in head.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(head.parameters(), lr=0.1, fused=True).step()
    expected = beam_search(head, embedding, CONFIG, implementation="reference")
    with torch.no_grad():
        torch.testing.assert_close(searched(), expected.log_probs)
    assert not torch.equal(before, expected.log_probs)


def test_the_end_of_training_forgets(head):
    embedding = images(head, 9, seed=1)
    before = beam_search(head, embedding, CONFIG)
    head.train()
    head.label_embedding.data += torch.rand_like(head.label_embedding)  # in no count
    head.eval()
    after = beam_search(head, embedding, CONFIG)
    expected = beam_search(head, embedding, CONFIG, implementation="reference")
    torch.testing.assert_close(after.log_probs, expected.log_probs)
    assert not same(before, after)
    head.eval()  # it is in that mode already: what is kept stays
    assert beam_search(head, embedding, CONFIG).stats.hit_rate == 1.0


def test_clear_cache_forgets(head):
    embedding = images(head, 10, seed=1)
    beam_search(head, embedding, CONFIG)
    head.clear_cache()
    assert beam_search(head, embedding, CONFIG).stats.hit_rate < 1.0


def test_states_go_with_their_head(head):
    dropped = []
    for kept in (True, False):
        other = random_head(torch.Generator().manual_seed(5), 4, joint_dim=4, hidden_dim=4)
        beam_search(other, images(other, 5, seed=1), CONFIG)
        weights = packed.head_parameters(other)  # which live on
        owner = id(other)
        if not kept:
            del other
            gc.collect()
        dropped.append(_C.forget_head(owner))
        assert weights[0] is not None
    assert dropped == [1, 0]


def test_every_head_keeps_its_states():
    heads = [
        random_head(torch.Generator().manual_seed(seed), 20, joint_dim=8, hidden_dim=8)
        for seed in range(7)
    ]
    heads.append(copy.copy(heads[0]))  # of the same weights
    embedding = images(heads[0], 5, seed=1)
    for head in heads:
        assert beam_search(head, embedding, CONFIG).stats.hit_rate < 1.0
    for _ in range(2):
        for head in heads:
            assert beam_search(head, embedding, CONFIG).stats.hit_rate == 1.0


def test_a_head_keeps_what_was_packed_of_it_last(head):
    embedding = images(head, 5, seed=1)
    for _ in range(3):
        beam_search(head, embedding, CONFIG)
        head.label_embedding = torch.nn.Parameter(head.label_embedding.detach().clone())
        head.clear_cache()
        beam_search(head, embedding, CONFIG)
    assert _C.forget_head(id(head)) == 1


def test_a_pruned_heads_states_are_kept_until_it_is_pruned_again(head):
    embedding = images(head, 9, seed=1)
    before = beam_search(head, embedding, CONFIG)
    for module, name in ((head.output_projection, "weight"), (head.recurrence, "weight_hh"),
                         (head, "label_embedding")):  # fmt: skip
        prune.l1_unstructured(module, name, 0.5)
        pruned = beam_search(head, embedding, CONFIG)
        assert pruned.stats.hit_rate < 1.0
        assert not same(before, pruned)
        again = beam_search(head, embedding, CONFIG)
        assert again.stats.hit_rate == 1.0 and same(pruned, again)
        expected = beam_search(head, embedding, CONFIG, implementation="reference")
        torch.testing.assert_close(pruned.log_probs, expected.log_probs)
        before = pruned


def test_threads_share_a_head(head):
    batches = [images(head, 25, seed) for seed in range(8)]
    expected = [beam_search(head, batch, CONFIG) for batch in batches]
    head.clear_cache()
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(40):
            which = (start + i) % len(batches)
            if not same(beam_search(head, batches[which], CONFIG), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_large_batches_of_two_threads_share_a_bounded_table(head):
    """Room that one search sets aside must not make the other forget everything."""
    head.prefix_bytes = 4 << 20
    batch = images(head, 2000, seed=1)
    beam_search(head, batch, CONFIG)
    made: list[int] = []

    def work() -> None:
        for _ in range(5):
            stats = beam_search(head, batch, CONFIG).stats
            made.append(stats.prefix_lookups - stats.prefix_hits)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_with_an_empty_table(head):
    embedding = images(head, 20, seed=1)
    expected = beam_search(head, embedding, CONFIG)
    child = os.fork()
    if child == 0:
        result = beam_search(head, embedding, CONFIG)
        ok = same(result, expected) and result.stats == expected.stats
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
