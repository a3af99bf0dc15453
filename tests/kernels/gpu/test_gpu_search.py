"""The CUDA search on a GPU: against the specification, the CPU search and itself."""

from __future__ import annotations

import copy
import gc
import threading
from functools import partial

import pytest
import torch
from torch import library

from cnnrnn.config import ModelConfig, SearchConfig
from cnnrnn.labels import LabelSpace
from cnnrnn.model.checkpoint import FEATURES_ONLY
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import NonFiniteError, SearchResult, agreement, device
from cnnrnn.search import beam_search as public_search
from cnnrnn.search.agreement import gpu_problem
from cnnrnn.search.packed import head_parameters
from tests.search.replay import (
    assert_search_equal,
    make_cuda_head,
    random_banked_case,
    random_case,
    random_embedding,
    random_evidence,
    random_head,
    run_compiled,
    search_with,
)

LABEL_COUNTS = (1, 2, 5, 31, 32, 33, 80, 81, 200)
JOINT_DIMS = (3, 16, 64, 64)
CONFIG = SearchConfig(beam_size=4, max_labels=5)
GPU = torch.device("cuda", 0)
beam_search = partial(public_search, implementation="native")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def head() -> Head:
    return random_head(seeded(0), 81, joint_dim=64, hidden_dim=48)


def images(head: Head, count: int, seed: int, logits: bool = False) -> ImageEmbedding:
    return random_embedding(seeded(seed), head, count, logits)


def same(first, second) -> bool:
    """Whether labels, lengths, log-probabilities, marginals and trace are the same bits."""
    return all(
        (a is None and b is None) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(first[:5], second[:5], strict=True)
    )


def test_random_searches_equal_the_float64_reference(on_gpu, request):
    excused = searched = 0
    for seed in range(request.config.getoption("--searches")):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        excused += assert_search_equal(head, embedding, config, pack=on_gpu)
        searched += len(embedding)
    print(f"{searched} images, {excused} excused")
    assert excused <= searched // 40


def test_random_searches_with_marginals_equal_the_float64_reference(on_gpu, request):
    searches = request.config.getoption("--searches") // 3
    excused = 0
    for seed in range(searches):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        excused += 0 < assert_search_equal(head, embedding, config, marginals=True, pack=on_gpu)
    print(f"{searches} searches, {excused} with an excused image")
    assert excused <= searches // 40


@pytest.mark.parametrize("marginals", [False, True])
def test_random_searches_with_evidence_equal_the_float64_reference(on_gpu, marginals, request):
    searches = request.config.getoption("--searches") // 3
    excused = 0
    for seed in range(searches):
        case = random_banked_case(seed, LABEL_COUNTS, JOINT_DIMS, marginals)
        head, embedding, config, evidence = case
        excused += 0 < assert_search_equal(
            head, embedding, config, marginals=marginals, pack=on_gpu, evidence=evidence
        )
    print(f"{searches} searches with evidence, {excused} with an excused image")
    assert excused <= searches // 30


@pytest.mark.parametrize("marginals", [False, True])
def test_known_labels_in_large_batches_equal_the_cpu_search(head, marginals):
    on_gpu = copy.deepcopy(head).to(GPU)
    embedding = images(head, 4096, 2)
    evidence = random_evidence(5, head, 4096, 5)
    found = beam_search(
        on_gpu, embedding.to(GPU, torch.float32), CONFIG, marginals=marginals, evidence=evidence
    ).cpu()
    expected = beam_search(head, embedding, CONFIG, marginals=marginals, evidence=evidence)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    if marginals:
        torch.testing.assert_close(
            found.marginals(), expected.marginals(), rtol=1e-3, atol=1e-3, equal_nan=True
        )
        torch.testing.assert_close(
            found.log_evidence, expected.log_evidence, rtol=1e-4, atol=1e-4, equal_nan=True
        )


def test_the_cpu_searches_where_a_gpu_has_no_room_for_the_banks(head):
    on_gpu = copy.deepcopy(head).to(GPU)
    embedding = images(head, 8, 2)
    evidence = random_evidence(5, head, 8, 5)
    config = SearchConfig(beam_size=4, max_labels=5, marginal_places=64)
    with pytest.warns(
        UserWarning, match="the CPU searches: [1-5] known labels need [2-6] banks of 64"
    ):
        found = beam_search(
            on_gpu, embedding.to(GPU, torch.float32), config, marginals=True, evidence=evidence
        )
    expected = beam_search(head, embedding, config, marginals=True, evidence=evidence)
    assert found.labels.device == GPU
    assert torch.equal(found.labels.cpu(), expected.labels)


@pytest.mark.parametrize("num_labels", [81, 1000, 5000])
@pytest.mark.parametrize("logits", [False, True])
def test_large_batches_equal_the_cpu_search(on_gpu, num_labels, logits):
    head = random_head(seeded(1), num_labels, joint_dim=64, hidden_dim=512)
    embedding = images(head, 4096, 2, logits)
    found = run_compiled(head, embedding, CONFIG, 5, pack=on_gpu)
    expected = run_compiled(head, embedding, CONFIG, 5)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    differ = (found[0] != expected[0]).flatten(1).any(1)
    assert differ.float().mean() <= 0.01  # ties


@pytest.mark.parametrize("num_labels", [81, 1000])
def test_fast_scores_are_near_the_exact_ones(on_gpu, num_labels):
    head = random_head(seeded(1), num_labels, joint_dim=64, hidden_dim=512)
    embedding = images(head, 4096, 2)
    packed = on_gpu(head)
    exact = search_with(packed, embedding, CONFIG, 5)
    fast = search_with(packed, embedding, CONFIG, 5, precision="fast")
    assert not torch.equal(exact[2], fast[2])
    same_path = (exact[0][:, 0] == fast[0][:, 0]).all(1)
    print(f"L = {num_labels}: {int((~same_path).sum())} of 4096 best paths changed")
    assert (~same_path).float().mean() <= 0.02
    torch.testing.assert_close(fast[2][same_path, 0], exact[2][same_path, 0], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_a_hundred_thousand_labels(on_gpu, order):
    head = random_head(seeded(2), 100_000, joint_dim=5, hidden_dim=7)
    config = SearchConfig(beam_size=5, max_labels=3, order=order)
    assert assert_search_equal(head, images(head, 3, 3, True), config, pack=on_gpu) <= 1


@pytest.mark.parametrize("order", ["unique", "free"])
def test_sixty_four_labels_on_sixteen_paths(on_gpu, order):
    head = random_head(seeded(3), 90, joint_dim=256, hidden_dim=2048)
    config = SearchConfig(beam_size=16, max_labels=64, min_labels=64, order=order)
    assert assert_search_equal(head, images(head, 2, 3), config, pack=on_gpu) <= 1


def test_results_depend_on_neither_batch_nor_history_nor_budget(on_gpu, head):
    embedding = images(head, 70, 1)
    expected = search_with(on_gpu(head), embedding, CONFIG, 5)
    used = on_gpu(head)
    search_with(used, images(head, 3000, 2), CONFIG, 5)
    assert same(search_with(used, embedding, CONFIG, 5), expected)
    small = on_gpu(head, 0)
    many = images(head, 3000, 2)
    assert same(search_with(small, many, CONFIG, 5), search_with(used, many, CONFIG, 5))
    for at in (0, 33, 69):
        one = ImageEmbedding(embedding.joint[at : at + 1], None)
        assert torch.equal(search_with(on_gpu(head), one, CONFIG, 5)[0][0], expected[0][at])


def test_kept_states_are_found_again_until_the_weights_change(head):
    head = head.to(GPU)
    embedding = images(head, 20, 1).to(GPU, torch.float32)
    first = beam_search(head, embedding, CONFIG)
    assert first.labels.device == GPU and 0.0 < first.stats.hit_rate < 1.0
    assert beam_search(head, embedding, CONFIG).stats.hit_rate == 1.0
    with torch.no_grad():
        head.recurrence.weight_hh.mul_(1.25)
    changed = beam_search(head, embedding, CONFIG)
    assert changed.stats.hit_rate < 1.0
    on_cpu = beam_search(head, embedding.to("cpu", torch.float32), CONFIG)
    torch.testing.assert_close(changed.log_probs.cpu(), on_cpu.log_probs, rtol=1e-4, atol=1e-4)


def test_inputs_that_are_strided_or_begin_anywhere(head):
    head = head.to(GPU)
    embedding = images(head, 33, 1, logits=True).to(GPU, torch.float32)
    expected = beam_search(head, embedding, CONFIG)
    wide = torch.zeros(33, 130, device=GPU)
    wide[:, 1:65] = embedding.joint
    flat = torch.zeros(33 * 82 + 3, device=GPU)
    flat[3:] = embedding.label_logits.flatten()
    other = ImageEmbedding(wide[:, 1:65], flat[3:].view(33, 82))
    assert torch.equal(beam_search(head, other, CONFIG).log_probs, expected.log_probs)


@pytest.mark.parametrize("batch", [0, 1, 17])
def test_small_batches(head, batch):
    head = head.to(GPU)
    embedding = images(head, batch, 1).to(GPU, torch.float32)
    result = beam_search(head, embedding, CONFIG, marginals=True)
    assert result.labels.shape == (batch, 4, 5) and result.marginals().shape == (batch, 81)
    assert result.labels.device == GPU


def test_images_that_are_not_finite_are_named(head):
    head = head.to(GPU)
    embedding = images(head, 9, 1).to(GPU, torch.float32)
    embedding.joint[4, 7] = torch.inf
    with pytest.raises(NonFiniteError) as raised:
        beam_search(head, embedding, CONFIG)
    assert raised.value.images == [4]
    marked = beam_search(head, embedding, CONFIG, on_nonfinite="mark")
    assert marked.nonfinite().tolist() == [4]


def test_streams_and_threads_share_one_table(head):
    head = head.to(GPU)
    batches = [images(head, 200, seed).to(GPU, torch.float32) for seed in range(8)]
    expected = [beam_search(head, batch, CONFIG) for batch in batches]
    head.clear_cache()
    failures: list[object] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for round_ in range(20):
                at = (index + round_) % len(batches)
                found = beam_search(head, batches[at], CONFIG)
                if not torch.equal(found.log_probs, expected[at].log_probs):
                    failures.append((index, round_))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def arguments(embedding: ImageEmbedding) -> tuple[object, ...]:
    return (embedding.joint, embedding.label_logits, 4, 5, 0, "increasing", False, "n_best", False)


def test_a_captured_search_replays_with_other_images(head):
    packed = make_cuda_head(head, GPU)
    batches = [images(head, 64, seed).to(GPU, torch.float32) for seed in range(3)]
    expected = [make_cuda_head(head, GPU).beam_search(*arguments(batch)) for batch in batches]
    static = ImageEmbedding(batches[0].joint.clone(), None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed.beam_search(*arguments(static))
    for _ in range(2):  # with an empty table, then a full one
        for batch, wanted in zip(batches, expected, strict=True):
            static.joint.copy_(batch.joint)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])


def test_a_captured_search_of_one_launch_marks_images_that_miss_a_state(head):
    packed = make_cuda_head(head, GPU)
    known = images(head, 40, 1).to(GPU, torch.float32)
    packed.beam_search(*arguments(known))
    joint = torch.cat([images(head, 15, 2).joint.to(GPU), known.joint])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed.beam_search(*arguments(ImageEmbedding(joint)), rounds=0)
    graph.replay()
    torch.cuda.synchronize()
    marked = found[1][:, 0] == -1
    assert marked[:15].any() and not marked[15:].any()
    expected = packed.beam_search(*arguments(ImageEmbedding(joint)))
    assert torch.equal(found[0][~marked], expected[0][~marked])


def test_a_head_made_while_a_stream_is_captured_is_refused(head):
    head = head.to(GPU)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="search once before"), torch.cuda.graph(graph):
        make_cuda_head(head, GPU)


def test_the_op_passes_opcheck_and_compiles(head):
    head = head.to(GPU)
    embedding = images(head, 5, 1).to(GPU, torch.float32)
    tensors = [None if t is None else t.detach() for t in head_parameters(head)]
    library.opcheck(
        torch.ops.cnnrnn.beam_search,
        (embedding.joint, None, *tensors, "lstm", "relu", 4, 5, 0, "increasing", False, "n_best",
         True),
    )  # fmt: skip
    compiled = torch.compile(lambda joint: beam_search(head, ImageEmbedding(joint), CONFIG).labels)
    assert torch.equal(compiled(embedding.joint), beam_search(head, embedding, CONFIG).labels)


def test_too_little_memory_names_batch_and_bytes(head):
    head = head.to(GPU)
    beam_search(head, images(head, 4, 1).to(GPU, torch.float32), CONFIG)
    joint = torch.zeros(1 << 20, 64, device=GPU)
    gc.collect()
    torch.cuda.empty_cache()  # or free blocks would serve the search
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (32 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"1048576 images at once .* bytes"):
            beam_search(head, ImageEmbedding(joint), CONFIG)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_reference_runs_on_the_gpu_too(head):
    head = head.to(GPU)
    embedding = images(head, 3, 1).to(GPU, torch.float32)
    expected = public_search(head, embedding, CONFIG, "reference")
    found = beam_search(head, embedding, CONFIG)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)


def test_the_small_searches_agree_with_the_cpu():
    """Else every public call below and above would be answered by the CPU."""
    assert gpu_problem(GPU) is None


def test_a_gpu_that_differs_in_the_small_searches_is_replaced(head, monkeypatch):
    right = agreement.native_search

    def wrong(head, embedding, options, place):
        result, nonfinite = right(head, embedding, options, place)
        if place == GPU:
            result.log_probs[0, 0] += 1
        return result, nonfinite

    monkeypatch.setattr(agreement, "native_search", wrong)
    monkeypatch.setattr(device, "verdicts", device.Verdicts(device._named_problem))
    embedding = images(head, 20, 1)
    with pytest.warns(UserWarning, match=r"in place of cuda:0, .* log_probs\[0, 0\] is "):
        found = public_search(head, embedding, CONFIG, search_device="cuda")
    assert same_bits(found, public_search(head, embedding, CONFIG, search_device="cpu"))


def same_bits(first: SearchResult, second: SearchResult) -> bool:
    return torch.equal(first.labels, second.labels) and torch.equal(
        first.log_probs, second.log_probs
    )


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_search_device_wherever_the_embedding_is(head, where):
    head = head.to(where)
    embedding = images(head, 50, 1, logits=True).to(where, torch.float32)
    by_gpu = public_search(head, embedding, CONFIG, search_device="cuda")
    by_cpu = public_search(head, embedding, CONFIG, search_device="cpu")
    assert by_gpu.labels.device.type == by_cpu.labels.device.type == where
    torch.testing.assert_close(by_gpu.log_probs, by_cpu.log_probs, rtol=1e-4, atol=1e-4)
    on_gpu = head.to(GPU), embedding.to(GPU, torch.float32)
    assert same_bits(by_gpu.cpu(), beam_search(*on_gpu, CONFIG).cpu())
    on_cpu = copy.deepcopy(head).cpu(), embedding.to("cpu", torch.float32)
    assert same_bits(by_cpu.cpu(), public_search(*on_cpu, CONFIG))


def test_auto_follows_the_measured_gpus(head, monkeypatch):
    head = head.to(GPU)
    embedding = images(head, 50, 1).to(GPU, torch.float32)
    by = {name: public_search(head, embedding, CONFIG, search_device=name)
          for name in ("cpu", "cuda")}  # fmt: skip
    for measured, expected in ((set(), "cpu"), ({torch.cuda.get_device_name(0)}, "cuda")):
        monkeypatch.setattr(device, "MEASURED_GPUS", frozenset(measured))
        found = public_search(head, embedding, CONFIG)
        assert same_bits(found, by[expected])
        packed_on = {"cpu": torch.device("cpu"), "cuda": GPU}[expected]
        assert device.device_of_search(embedding.joint, "auto", "auto") == packed_on


def test_a_compiled_call_searches_where_it_is_told(head):
    embedding = images(head, 5, 1)
    for name in ("cpu", "cuda"):
        search = partial(public_search, head, config=CONFIG, search_device=name)
        compiled = torch.compile(lambda joint, search=search: search(ImageEmbedding(joint)).labels)
        assert torch.equal(compiled(embedding.joint), search(embedding).labels)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("members", [1, 2])
def test_predictions_by_the_cuda_search(where, members):
    models = [feature_model(seed) for seed in range(members)]
    model = models[0] if members == 1 else Ensemble(models)
    features = torch.randn(200, 8, generator=seeded(1))
    expected = model.predict_features(features, search_device="cpu")
    found = model.predict_features(features, device=where, search_device="cuda")
    agree = sum(mine.labels == theirs.labels for mine, theirs in zip(found, expected, strict=True))
    assert agree >= 198  # ties
    for mine, theirs in zip(found, expected, strict=True):
        for name, score in mine.scores.items():
            assert score == pytest.approx(theirs.scores[name], abs=1e-3)


def feature_model(seed: int) -> CNNRNN:
    head = random_head(seeded(seed), 40, joint_dim=64, hidden_dim=16)
    names = LabelSpace.given([f"label {i}" for i in range(40)])
    config = ModelConfig(backbone=FEATURES_ONLY, joint_dim=64, hidden_dim=16, chain_term=False)
    return CNNRNN(config, names, head, None, CONFIG).eval()
