"""The CUDA search without a GPU: its kernels executed on the CPU, against the specification."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import platform
import subprocess
from functools import partial

import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding, chain_logits
from cnnrnn.search import SearchResult, reference
from cnnrnn.search.agreement import SmallSearch, first_difference, native_on
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.packed import CPU
from tests.kernels.emulation import emulated
from tests.search.replay import (
    assert_search_equal,
    random_banked_case,
    random_case,
    random_embedding,
    random_evidence,
    random_head,
    run_compiled,
    search_with,
)

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or emulated.compiler() is None,
    reason="needs a C++ compiler and x86-64",
)

# Panels are of 32 labels, END among them, and four are streamed at once; at a joint width of 64
# all of them stay in shared memory.
LABEL_COUNTS = (1, 2, 5, 31, 32, 33, 80, 81, 200)
JOINT_DIMS = (3, 16, 64, 64)
CONFIG = SearchConfig(beam_size=4, max_labels=5)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build(tmp_path_factory.mktemp("emulated"))


def set_defaults(library: ctypes.CDLL) -> None:
    library.set_lane_order(0, 0)
    library.set_max_shared_memory(227 * 1024)


@pytest.fixture(autouse=True)
def _defaults(library: ctypes.CDLL) -> None:
    set_defaults(library)


@pytest.fixture
def head() -> Head:
    return random_head(torch.Generator().manual_seed(0), 40, joint_dim=64, hidden_dim=24)


def images(head: Head, count: int, seed: int) -> ImageEmbedding:
    return random_embedding(torch.Generator().manual_seed(seed), head, count, False)


def same(first: tuple, second: tuple) -> bool:
    """Whether labels, lengths, log-probabilities, marginals and trace are the same bits."""
    return all(
        (a is None and b is None) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(first[:5], second[:5], strict=True)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_recurrent_weights_that_are_not_finite_mark_every_image(library, head, value):
    with torch.no_grad():
        head.recurrence.weight_hh[5, 3] = value
    found = search_with(emulated.EmulatedHead(library, head), images(head, 6, 1), CONFIG, 5)
    assert found[2].isnan().all()


def test_the_stand_in_for_a_gpu(tmp_path):
    program = tmp_path / "selfcheck"
    sources = [emulated.HERE / "selfcheck.cu", emulated.HERE / "cuda_on_cpu.cpp"]
    emulated.compile_and_link(sources, program)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for planted, said in [
        ("diverge", "lane 0 __syncwarp, lane 7 __ballot_sync"),
        ("leave", "lane 0 exits, lane 7 __syncwarp"),
        ("overrun", "wrote past its dynamic shared memory"),
    ]:
        result = subprocess.run([program, planted], capture_output=True, text=True)
        assert result.returncode < 0 and said in result.stderr, (planted, result.stderr)


def test_the_program_for_the_memory_checker_on_a_gpu_finds_no_difference(tmp_path):
    program = tmp_path / "sanitized"
    cpu = ["search", "row_scorer", "aligned_floats", "head", "prefix_table", "dispatch"]
    cpu.append("loops_portable")
    sources = [source for source in emulated.SOURCES if source.name != "search.cpp"]
    sources += [emulated.CSRC / "kernels" / "cpu" / f"{name}.cpp" for name in cpu]
    emulated.compile_and_link([*sources, emulated.HERE.parent / "gpu" / "sanitized.cpp"], program)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "all as on the CPU\n", result.stderr


def test_random_searches_equal_the_float64_reference(library, request):
    excused = searched = 0
    for seed in range(request.config.getoption("--searches") // 2):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        library.set_lane_order(seed % 3, seed)
        pack = partial(emulated.EmulatedHead, library)
        excused += assert_search_equal(head, embedding, config, pack=pack)
        searched += len(embedding)
    print(f"{searched} images, {excused} excused")
    assert excused <= searched // 40  # of small heads that tie; the CPU search excuses as many


def test_random_searches_with_marginals_equal_the_float64_reference(library, request):
    searches = request.config.getoption("--searches") // 6
    excused = 0
    for seed in range(searches):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        library.set_lane_order(seed % 3, seed)
        pack = partial(emulated.EmulatedHead, library)
        excused += 0 < assert_search_equal(head, embedding, config, marginals=True, pack=pack)
    print(f"{searches} searches, {excused} with an excused image")
    assert excused <= searches // 40


def test_marginals_of_random_searches_in_free_order(library, request):
    searches = request.config.getoption("--searches") // 6
    excused = 0
    for seed in range(searches):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS, "free")
        library.set_lane_order(seed % 3, seed)
        pack = partial(emulated.EmulatedHead, library)
        excused += 0 < assert_search_equal(head, embedding, config, marginals=True, pack=pack)
    print(f"{searches} searches, {excused} with an excused image")
    assert excused <= searches // 10  # literal ReLU cells forget: their paths tie exactly


@pytest.mark.parametrize("marginals", [False, True])
def test_random_searches_with_evidence_equal_the_float64_reference(library, marginals, request):
    searches = request.config.getoption("--searches") // 3
    excused = {"free": 0, "other": 0}
    for seed in range(searches):
        case = random_banked_case(seed, LABEL_COUNTS, JOINT_DIMS, marginals)
        head, embedding, config, evidence = case
        library.set_lane_order(seed % 3, seed)
        pack = partial(emulated.EmulatedHead, library)
        differing = assert_search_equal(
            head, embedding, config, marginals=marginals, pack=pack, evidence=evidence
        )
        excused["free" if config.order == "free" else "other"] += differing > 0
    print(f"{searches} searches, with an excused image {excused}")
    # Literal ReLU cells forget: paths of one set tie exactly, and only `free` has several.
    assert excused["free"] <= max(1, searches // 30)
    assert excused["other"] <= max(1, searches // 300)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_evidence_without_room_or_in_another_order_changes_no_bit(library, precision):
    for seed in range(40):
        case = random_banked_case(seed, LABEL_COUNTS, JOINT_DIMS, seed % 2 == 0)
        head, embedding, config, evidence = case
        T = resolve_max_labels(head, config)
        search = partial(
            search_with, embedding=embedding, config=config, max_labels=T,
            marginals=seed % 2 == 0, trace=True, precision=precision, evidence=evidence,
        )  # fmt: skip
        expected = search(emulated.EmulatedHead(library, head))
        library.set_lane_order(1 + seed % 2, seed)
        library.set_max_shared_memory(99 * 1024)
        small = emulated.EmulatedHead(library, head, prefix_bytes=0)
        search(small)
        found = search(small)
        set_defaults(library)
        assert same(found, expected)
        assert found[6] is None or torch.equal(found[6].nan_to_num(), expected[6].nan_to_num())


def test_images_of_which_nothing_is_known_are_searched_as_without_evidence(library, head):
    embedding = images(head, 40, 1)
    evidence = random_evidence(3, head, 40, 3)
    evidence[::3] = 0
    kept = emulated.EmulatedHead(library, head)
    for marginals in (False, True):
        found = search_with(kept, embedding, CONFIG, 5, marginals=marginals, evidence=evidence)
        plain = search_with(kept, embedding, CONFIG, 5, marginals=marginals)
        unknown = (evidence == 0).all(1)
        assert 10 < unknown.sum() < 30
        for with_, without in zip(found[:4] + found[6:], plain[:4] + plain[6:], strict=True):
            assert with_ is None or torch.equal(with_[unknown], without[unknown])
        assert not torch.equal(found[2][~unknown], plain[2][~unknown])


def test_more_banks_than_a_gpu_has_room_for_are_refused(library, head):
    evidence = torch.zeros(2, 40, dtype=torch.int8)
    evidence[1, :4] = 1
    config = SearchConfig(beam_size=8, max_labels=5)
    said = "4 known labels need 5 banks of 8 live paths an image, and a GPU has room for 32"
    with pytest.raises(RuntimeError, match=f"{said}; search on the CPU"):
        kept = emulated.EmulatedHead(library, head)
        search_with(kept, images(head, 2, 1), config, 5, evidence=evidence)


def test_a_search_in_which_labels_are_known_is_not_captured(library, head):
    kept = emulated.EmulatedHead(library, head)
    evidence = torch.zeros(1, 40, dtype=torch.int8)
    evidence[0, 3] = -1
    embedding = images(head, 2, 1)
    with pytest.raises(RuntimeError, match="in which labels are known cannot be captured"):
        kept.beam_search(
            embedding.joint, None, 4, 5, 0, "increasing", False, "n_best", False,
            evidence=evidence, captured=True,
        )  # fmt: skip


def test_the_order_in_which_lanes_run_changes_no_bit(library):
    for seed in range(60):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        pack = partial(emulated.EmulatedHead, library)
        results = []
        for order in range(len(emulated.LANE_ORDERS)):
            library.set_lane_order(order, seed)
            T = min(config.max_labels, head.num_labels) if config.order != "free" else 6
            results.append(
                run_compiled(head, embedding, config, T, pack=pack, marginals=seed % 2 == 0)
            )
        assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_a_hundred_thousand_labels(library, order):
    generator = torch.Generator().manual_seed(2)
    head = random_head(generator, 100_000, joint_dim=5, hidden_dim=7)
    embedding = random_embedding(generator, head, 3, label_logits=True)
    config = SearchConfig(beam_size=5, max_labels=3, order=order)
    pack = partial(emulated.EmulatedHead, library)
    assert assert_search_equal(head, embedding, config, pack=pack) <= 1


@pytest.mark.parametrize("order", ["unique", "free"])
def test_sixty_four_labels_on_sixteen_paths(library, order):
    generator = torch.Generator().manual_seed(3)
    head = random_head(generator, 90, joint_dim=256, hidden_dim=33)
    embedding = random_embedding(generator, head, 2, label_logits=False)
    config = SearchConfig(beam_size=16, max_labels=64, min_labels=64, order=order)
    pack = partial(emulated.EmulatedHead, library)
    assert run_compiled(head, embedding, config, 64, pack=pack)[1].min() == 64
    assert assert_search_equal(head, embedding, config, pack=pack) <= 1


def test_results_depend_on_neither_batch_nor_history(library, head):
    embedding = images(head, 70, 1)
    alone = emulated.EmulatedHead(library, head)
    expected = search_with(alone, embedding, CONFIG, 5)
    used = emulated.EmulatedHead(library, head)
    search_with(used, images(head, 300, 2), CONFIG, 5)
    assert same(search_with(used, embedding, CONFIG, 5), expected)
    for at in (0, 33, 69):
        one = ImageEmbedding(embedding.joint[at : at + 1], None)
        found = search_with(emulated.EmulatedHead(library, head), one, CONFIG, 5)
        assert torch.equal(found[0][0], expected[0][at])
        assert torch.equal(found[2][0], expected[2][at])


def test_kept_states_are_found_again_and_forgotten(library, head):
    kept = emulated.EmulatedHead(library, head)
    embedding = images(head, 20, 1)
    first = search_with(kept, embedding, CONFIG, 5)
    assert 0.0 < first[5].hit_rate < 1.0
    again = search_with(kept, embedding, CONFIG, 5)
    assert again[5].hit_rate == 1.0 and same(first, again)
    assert again[5].prefix_nodes == first[5].prefix_nodes > again[5].prefix_parents > 1
    kept.clear()
    cleared = search_with(kept, embedding, CONFIG, 5)
    assert cleared[5] == first[5] and same(first, cleared)


def test_a_table_that_is_too_small_changes_no_bit(library):
    # The least there is: 1,024 nodes, 512 of them extended.
    generator = torch.Generator().manual_seed(5)
    head = random_head(generator, 300, joint_dim=16, hidden_dim=8)
    embedding = random_embedding(generator, head, 60, label_logits=True)
    config = SearchConfig(beam_size=16, max_labels=6, order="free")
    small = emulated.EmulatedHead(library, head, prefix_bytes=0)
    large = emulated.EmulatedHead(library, head, prefix_bytes=1 << 27)
    expected = search_with(large, embedding, config, 6, marginals=True, trace=True)
    assert expected[5].prefix_nodes > 2 * 1024  # so it must have been emptied
    for _ in range(2):
        found = search_with(small, embedding, config, 6, marginals=True, trace=True)
        assert same(found, expected)
        assert found[5].prefix_nodes <= 1024


def test_a_table_that_cannot_hold_one_image_is_refused(library, head):
    small = emulated.EmulatedHead(library, head, prefix_bytes=0)
    config = SearchConfig(beam_size=16, max_labels=40, order="free")
    with pytest.raises(RuntimeError, match=r"one image may need 625 prefix states \(beam_size 16, "
                                           r"max_labels 40\), and the table holds 512; raise "
                                           r"head.prefix_bytes"):  # fmt: skip
        search_with(small, images(head, 1, 1), config, 40)
    # With a known label it is by its banks: one here.
    evidence = torch.zeros(1, 40, dtype=torch.int8)
    evidence[0, 3] = -1
    narrow = SearchConfig(beam_size=1, max_labels=20)
    found = search_with(small, images(head, 1, 1), narrow, 20, evidence=evidence)
    assert 3 not in found[0] and found[2].isfinite().all()


def test_generations_start_over(library, head):
    kept = emulated.EmulatedHead(library, head, prefix_bytes=0)
    embedding = images(head, 3, 1)
    expected = search_with(kept, embedding, CONFIG, 5)
    for _ in range(65_535):  # back to the generation of that search
        kept.clear()
    assert search_with(kept, embedding, CONFIG, 5)[5] == expected[5]


@pytest.mark.parametrize("marginals", [False, True])
def test_a_captured_search_equals_the_others(library, marginals):
    for seed in range(60):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        T = min(config.max_labels, head.num_labels) if config.order != "free" else 6
        arguments = (embedding.joint, embedding.label_logits, config.beam_size, T,
                     min(config.min_labels, T), config.order, config.end_takes_slot, config.stop,
                     marginals)  # fmt: skip
        waiting = emulated.EmulatedHead(library, head).beam_search(*arguments)
        captured = emulated.EmulatedHead(library, head)
        for _ in range(2):  # with an empty table and a full one
            assert same(captured.beam_search(*arguments, captured=True), waiting)


def test_a_captured_search_marks_images_that_find_no_room(library):
    generator = torch.Generator().manual_seed(5)
    head = random_head(generator, 300, joint_dim=16, hidden_dim=8)
    embedding = random_embedding(generator, head, 150, label_logits=True)
    arguments = (embedding.joint, embedding.label_logits, 4, 4, 0, "free", False, "n_best", False)
    whole = emulated.EmulatedHead(library, head, prefix_bytes=1 << 27).beam_search(*arguments)
    small = emulated.EmulatedHead(library, head, prefix_bytes=0)
    labels, lengths, log_probs, *_ = small.beam_search(*arguments, captured=True)
    marked = lengths[:, 0] == -1
    assert 0 < marked.sum() < 150
    assert torch.equal(log_probs.isnan().all(1), marked) and (labels[marked] == -1).all()
    assert torch.equal(labels[~marked], whole[0][~marked])
    assert torch.equal(log_probs[~marked], whole[2][~marked])
    # What it left in the table stops no later search.
    again = small.beam_search(*arguments)
    assert torch.equal(again[0], whole[0]) and torch.equal(again[2], whole[2])


def test_marginals_of_marked_images_are_marked(library, head):
    embedding = images(head, 30, 1)
    arguments = (embedding.joint, None, 4, 5, 0, "increasing", False, "n_best", True)
    found = emulated.EmulatedHead(library, head).beam_search(*arguments, rounds=0, captured=True)
    marked = found[1][:, 0] == -1
    assert marked.any() and torch.equal(found[3].isnan().all(1), marked)


@pytest.mark.parametrize("overflowing", [range(7), (3, 4, 6)])
def test_scores_that_overflow_mark_what_the_cpu_search_marks(library, overflowing):
    head = random_head(torch.Generator().manual_seed(0), 6, joint_dim=16, hidden_dim=8)
    head.activation = "relu"
    with torch.no_grad():
        head.output_projection.weight.zero_()
        head.label_embedding.fill_(0.1)
        head.label_embedding[list(overflowing)] = -1e38
    embedding = ImageEmbedding(torch.full((3, 16), 1e3))
    pack = partial(emulated.EmulatedHead, library)
    found = run_compiled(head, embedding, CONFIG, 5, pack=pack)
    expected = run_compiled(head, embedding, CONFIG, 5)
    assert expected[2].isnan().all()
    assert torch.equal(found[2].isnan(), expected[2].isnan())


def bare_head(num_labels: int, joint_dim: int) -> Head:
    """A head whose every score is 0 until a test sets some weights."""
    head = Head(num_labels, 4, joint_dim=joint_dim, hidden_dim=4, activation="identity").eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return head


def assert_as_on_the_cpu(library, head, embedding, config, T):
    found = run_compiled(head, embedding, config, T, pack=partial(emulated.EmulatedHead, library))
    expected = run_compiled(head, embedding, config, T)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("order", ["increasing", "unique"])
@pytest.mark.parametrize("joint_dim", [16, 64])
def test_labels_of_a_path_that_overflows_late_are_not_its_continuations(library, joint_dim, order):
    # Path (1) is worse than two finished ones once label 100, in the second chunk, overflows.
    head = bare_head(130, joint_dim)
    with torch.no_grad():
        head.label_embedding[1, 15] = head.label_embedding[0, 13] = 1.0
        head.recurrence.weight_ih[8, 15] = head.recurrence.weight_ih[9, 13] = 5.0
        head.output_projection.weight[14, 0] = 1e38
        head.label_embedding[100, 14] = 1e3
        head.output_projection.weight[12, 1] = 1e3
        head.label_embedding[130, 12] = 1.0  # END is nearly sure after label 0
        head.score_bias.fill_(10.0)
        head.score_bias[[0, 1, 130]] = 30 + torch.tensor([0.5, 0.1, 0.4]).log()
    config = SearchConfig(beam_size=2, order=order)
    found = assert_as_on_the_cpu(
        library, head, ImageEmbedding(torch.zeros(1, joint_dim)), config, 2
    )
    assert found[0][0, :, 0].tolist() == [0, -1]


@pytest.mark.parametrize("size", [1e6, 1e9, 3.1e9, 1e10, -1e10, 1e20, 2.3e38, -3e38])
@pytest.mark.parametrize("num_labels", [40, 130])
def test_scores_of_any_size_that_are_finite(library, num_labels, size):
    head = bare_head(num_labels, 16)
    with torch.no_grad():
        head.score_bias.fill_(size)
        head.score_bias[3] += abs(size) * 1e-6
    for N in (1, 4, 7):
        config = SearchConfig(beam_size=N)
        assert_as_on_the_cpu(library, head, ImageEmbedding(torch.zeros(2, 16)), config, 2)


@pytest.mark.parametrize("size", [3e5, 2e6, 1e7, 1e9])
@pytest.mark.parametrize("joint_dim", [16, 64])
def test_a_large_score_in_an_early_chunk_is_not_rounded_away(library, joint_dim, size):
    # Label 50 is sure after label 0, whose path is little better than the finished one.
    head = bare_head(130, joint_dim)
    with torch.no_grad():
        head.label_embedding[0, 15] = head.label_embedding[50, 14] = 1.0
        head.recurrence.weight_ih[8, 15] = 20.0
        head.output_projection.weight[14, 0] = size
        head.score_bias.fill_(-30.0)
        head.score_bias[[0, 130]] = torch.tensor([0.51, 0.49]).log()
    config = SearchConfig(beam_size=1)
    found = assert_as_on_the_cpu(
        library, head, ImageEmbedding(torch.zeros(1, joint_dim)), config, 2
    )
    assert found[0][0, 0].tolist() == [0, 50]


@pytest.mark.parametrize("num_labels", [81, 300, 5000])
def test_the_size_of_label_logits_costs_no_precision(library, num_labels):
    head = bare_head(num_labels, 16)
    logits = chain_logits(
        torch.randn(4, num_labels, generator=torch.Generator().manual_seed(1)) - 1
    )
    assert logits.abs().max() > num_labels / 4
    embedding = ImageEmbedding(torch.zeros(4, 16), logits)
    config = SearchConfig(beam_size=4, max_labels=6)
    pack = partial(emulated.EmulatedHead, library)
    found = run_compiled(head, embedding, config, 6, pack=pack)
    exact = reference.beam_search(
        head.double(), embedding.to("cpu", torch.float64), config, max_labels=6
    )
    assert torch.equal(found[0], exact.labels)
    torch.testing.assert_close(found[2].double(), exact.log_probs, rtol=2e-6, atol=2e-6)


def test_a_captured_search_of_one_launch_marks_images_that_miss_a_state(library, head):
    embedding = images(head, 40, 1)
    arguments = (embedding.joint, None, 4, 5, 0, "increasing", False, "n_best", False)
    kept = emulated.EmulatedHead(library, head)
    expected = kept.beam_search(*arguments)
    assert same(kept.beam_search(*arguments, rounds=0, captured=True), expected)
    joint = torch.cat([images(head, 15, 2).joint, embedding.joint])
    found = kept.beam_search(joint, *arguments[1:], rounds=0, captured=True)
    expected = kept.beam_search(joint, *arguments[1:])
    marked = found[1][:, 0] == -1
    assert marked[:15].any() and not marked[15:].any()
    assert torch.equal(found[2].isnan().all(1), marked)
    assert torch.equal(found[0][~marked], expected[0][~marked])
    assert torch.equal(found[2][~marked], expected[2][~marked])


def test_images_that_are_not_finite_are_marked_and_touch_no_other(library, head):
    embedding = images(head, 9, 1)
    logits = torch.randn(9, 41, generator=torch.Generator().manual_seed(2))
    expected = search_with(
        emulated.EmulatedHead(library, head), ImageEmbedding(embedding.joint, logits), CONFIG, 5
    )
    joint, bad_logits = embedding.joint.clone(), logits.clone()
    joint[2, 63] = math.nan
    joint[3, 0] = -math.inf  # which a ReLU would hide
    bad_logits[5, 40] = math.inf
    bad_logits[6, 7] = -math.inf
    bad = ImageEmbedding(joint, bad_logits)
    for T in (5, 0):
        kept = emulated.EmulatedHead(library, head)
        config = dataclasses.replace(CONFIG, max_labels=T)
        found = kept.beam_search(
            bad.joint, bad.label_logits, 4, T, 0, config.order, False, "n_best", True
        )
        assert found[6] == 4
        assert found[2].isnan().all(1).tolist() == [b in (2, 3, 5, 6) for b in range(9)]
        assert found[3].isnan().all(1).tolist() == [b in (2, 3, 5, 6) for b in range(9)]
        fine = torch.tensor([0, 1, 4, 7, 8])
        if T == 5:
            assert torch.equal(found[0][fine], expected[0][fine])
            assert torch.equal(found[2][fine], expected[2][fine])


@pytest.mark.parametrize("bytes_", [99 * 1024, 60 * 1024])
def test_less_shared_memory_changes_no_bit(library, bytes_):
    for seed in range(40):
        head, embedding, config = random_case(seed, (80, 200), (16, 64, 100))
        T = min(config.max_labels, head.num_labels) if config.order != "free" else 6
        pack = partial(emulated.EmulatedHead, library)
        expected = run_compiled(head, embedding, config, T, pack=pack, marginals=True)
        library.set_max_shared_memory(bytes_)
        assert same(run_compiled(head, embedding, config, T, pack=pack, marginals=True), expected)
        library.set_max_shared_memory(227 * 1024)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 4])
def test_two_blocks_fit_a_multiprocessor_of_90(library, precision, beam_size):
    head = random_head(torch.Generator().manual_seed(0), 81, joint_dim=64, hidden_dim=8)
    kept = emulated.EmulatedHead(library, head)
    config = SearchConfig(beam_size=beam_size, max_labels=1)  # its last kernel is the search
    search_with(kept, images(head, 24 * 16, 1), config, 1, precision=precision)
    assert 2 * (library.last_shared_memory() + 1024) <= 228 * 1024  # 1 KB a block is the system's


def test_too_wide_a_joint_space_is_refused(library):
    head = random_head(torch.Generator().manual_seed(0), 5, joint_dim=2048, hidden_dim=3)
    with pytest.raises(RuntimeError, match="joint_dim 2048 needs .* this GPU has 232448"):
        search_with(emulated.EmulatedHead(library, head), images(head, 1, 1), CONFIG, 5)


def test_fast_scores_of_numbers_that_halves_hold_are_the_exact_ones(library):
    searched = 0
    for seed in range(120):
        head, embedding, config = random_case(seed, LABEL_COUNTS, (3, 16, 64, 64, 100))
        generator = torch.Generator().manual_seed(seed)
        head.activation = "relu" if head.activation == "tanh" else head.activation
        with torch.no_grad():  # so that x is the joint embedding, and both it and U_l are short
            head.output_projection.weight.zero_()
            steps = torch.randint(-16, 17, head.label_embedding.shape, generator=generator)
            head.label_embedding.copy_(steps / 16)
        joint = torch.randint(-32, 33, embedding.joint.shape, generator=generator) / 8
        T = min(config.max_labels, head.num_labels) if config.order != "free" else 6
        arguments = (joint, embedding.label_logits, config.beam_size, T, min(config.min_labels, T),
                     config.order, config.end_takes_slot, config.stop, seed % 2 == 0)  # fmt: skip
        exact = emulated.EmulatedHead(library, head).beam_search(*arguments)
        fast = emulated.EmulatedHead(library, head).beam_search(*arguments, precision="fast")
        if config.order == "increasing":  # in other orders those of one set tie
            assert torch.equal(fast[0], exact[0]) and torch.equal(fast[1], exact[1])
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, equal_nan=True)
        close(fast[2], exact[2])
        if exact[3] is not None:
            close(fast[3], exact[3])
        searched += len(joint)
    assert searched > 200


def test_fast_scores_are_near_the_exact_ones(library):
    changed = searched = 0
    for seed in range(120):
        head, embedding, config = random_case(seed, (32, 81, 200), (16, 64, 64, 100))
        T = min(config.max_labels, head.num_labels) if config.order != "free" else 6
        config = dataclasses.replace(config, max_labels=T, min_labels=min(config.min_labels, T))
        pack = partial(emulated.EmulatedHead, library)
        exact = search_with(pack(head), embedding, config, T)
        fast = search_with(pack(head), embedding, config, T, precision="fast")
        same_path = (exact[0][:, 0] == fast[0][:, 0]).all(1)
        torch.testing.assert_close(
            fast[2][same_path, 0], exact[2][same_path, 0], rtol=1e-2, atol=2e-2, equal_nan=True
        )
        changed += int((~same_path).sum())
        searched += len(embedding)
    print(f"{changed} of {searched} best paths changed")
    assert changed <= searched // 50


def test_the_small_searches_that_a_gpu_must_pass(library):
    """A right CUDA search agrees with the CPU's in them, so that none is turned away."""

    def search(small: SmallSearch) -> SearchResult:
        labels, lengths, log_probs, sums, _, _, log_evidence = run_compiled(
            small.head, small.embedding, small.config, small.max_labels,
            marginals=small.marginals, evidence=small.evidence,
            pack=partial(emulated.EmulatedHead, library),
        )  # fmt: skip
        return SearchResult(
            labels, lengths, log_probs, small.head.num_labels,
            requested_marginals=sums, log_evidence=log_evidence,
        )  # fmt: skip

    assert first_difference(search, native_on(CPU)) is None
