"""The compiled search against the specification, brute force and worked examples."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cnnrnn import _C
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding, chain_logits
from cnnrnn.search import NonFiniteError, beam_search, reference
from tests.search.replay import (
    assert_search_equal,
    make_cpu_head,
    random_case,
    random_embedding,
    random_head,
    run_compiled,
)

IMPLEMENTATIONS = ["native", "reference"]


def head_of_table(table: dict[tuple[int, ...], list[float]], num_labels: int) -> Head:
    """A head whose next-label distribution after each prefix of length <= 1 is as given.

    One-hot label embeddings score directly; the recurrence passes the last label's row through.
    """
    prefixes = [(), *[(label,) for label in range(num_labels)]]
    width = num_labels + 2
    head = Head(num_labels, 1, joint_dim=width, hidden_dim=width, cell="paper",
                activation="identity", score_bias=False, projection_bias=False)  # fmt: skip
    with torch.no_grad():
        head.label_embedding.copy_(torch.eye(width))
        # x = relu(w), i = g = relu(w): r = w * w, o = r * w = w for one-hot w; f = 0.
        head.recurrence.weight_hh.zero_()
        eye, zero = torch.eye(width), torch.zeros(width, width)
        head.recurrence.weight_ih.copy_(torch.cat([eye, eye, zero, eye]))
        head.output_projection.weight.fill_(0)
        for prefix in prefixes:
            row = num_labels + 1 if not prefix else prefix[0]
            probabilities = torch.tensor(table[prefix])
            head.output_projection.weight[: num_labels + 1, row] = probabilities.log()
    return head.eval()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [((0,), 0.30), ((), 0.20)]),
        ({"end_takes_slot": True}, [((0,), 0.30), ((0, 1), 0.20)]),
        ({"end_takes_slot": True, "stop": "literal"}, [((0,), 0.30)]),
    ],
)
def test_worked_example(implementation, options, expected):
    # Root: A .5, B .3, END .2; after A: B .4, END .6; after B: A .5, END .5. The empty path and
    # (A, B) tie at .2, which logarithms round apart: a nudge stands for the tie rule here.
    tiny = 1e-30
    head = head_of_table(
        {(): [0.5, 0.29999, 0.20001], (0,): [tiny, 0.4, 0.6], (1,): [0.5, tiny, 0.5]}, num_labels=2
    )
    config = SearchConfig(beam_size=2, max_labels=2, order="unique", **options)
    result = beam_search(head, ImageEmbedding(torch.zeros(1, 4)), config, implementation)
    found = [
        (tuple(result.labels[0, n, : result.lengths[0, n]].tolist()), log_prob)
        for n, log_prob in enumerate(result.log_probs[0].tolist())
        if log_prob > -math.inf
    ]
    assert [path for path, _ in found] == [path for path, _ in expected]
    assert [math.exp(p) for _, p in found] == pytest.approx([p for _, p in expected], rel=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_repeated_label_counts_once_in_marginals(implementation):
    # Label 0 comes first with .6, or second after label 1 with .3 * .5; again after itself with
    # .6 * .7, which would make 1.17. Label 1: .3 + .6 * .2.
    head = head_of_table(
        {(): [0.6, 0.3, 0.1], (0,): [0.7, 0.2, 0.1], (1,): [0.5, 0.4, 0.1]}, num_labels=2
    )
    config = SearchConfig(beam_size=8, max_labels=2, order="free")
    embedding = ImageEmbedding(torch.zeros(1, 4))
    result = beam_search(head, embedding, config, implementation, marginals=True)
    assert (0, 0) in [tuple(path) for path in result.labels[0].tolist()]
    torch.testing.assert_close(result.marginals()[0], torch.tensor([0.75, 0.42]))


def all_paths(num_labels: int, longest: int, order: str):
    for length in range(longest + 1):
        for path in itertools.product(range(num_labels), repeat=length):
            if order == "unique" and len(set(path)) < length:
                continue
            if order == "increasing" and any(a >= b for a, b in itertools.pairwise(path)):
                continue
            yield path


@torch.no_grad()
def exhaustive(head, embedding, config, longest):
    """Every path's log-probability, step by step from the definition, in float64."""
    head = head.double()
    embedding = embedding.to("cpu", torch.float64)
    logits = None if embedding.label_logits is None else embedding.label_logits[0]
    scored = []
    for path in all_paths(head.num_labels, longest, config.order):
        state = head.extend(torch.tensor([head.start]), head.initial_state(1))
        total = torch.zeros((), dtype=torch.float64)
        for position, label in enumerate([*path, head.end]):
            if position == longest:
                break  # the end follows for certain
            prefix = reference.Path(total, path[:position], state)
            total = (
                total
                + reference.step_log_probs(head, embedding.joint[0], logits, config, prefix)[label]
            )
            state = head.extend(torch.tensor([label]), state)
        if total > -math.inf:
            scored.append((path, float(total)))
    return sorted(scored, key=lambda item: -item[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("label_logits", [False, True])
@pytest.mark.parametrize(
    ("order", "num_labels", "longest", "min_labels"),
    [("increasing", 4, 4, 0), ("increasing", 4, 3, 2), ("unique", 3, 3, 0), ("unique", 3, 2, 1),
     ("free", 2, 3, 0), ("free", 2, 2, 2)],
)  # fmt: skip
def test_a_beam_that_holds_everything_finds_every_path(
    implementation, label_logits, order, num_labels, longest, min_labels
):
    generator = torch.Generator().manual_seed(num_labels * 10 + longest)
    head = random_head(generator, num_labels, joint_dim=5, hidden_dim=6)
    embedding = random_embedding(generator, head, 1, label_logits)
    config = SearchConfig(beam_size=16, max_labels=longest, min_labels=min_labels, order=order)
    result = beam_search(head, embedding, config, implementation, marginals=True)
    expected = exhaustive(head, embedding, config, longest)
    found = [
        tuple(result.labels[0, n, : result.lengths[0, n]].tolist())
        for n in range(16)
        if result.log_probs[0, n] > -math.inf
    ]
    assert found == [path for path, _ in expected]
    torch.testing.assert_close(
        result.log_probs[0, : len(expected)].double(),
        torch.tensor([p for _, p in expected], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )
    assert sum(math.exp(p) for _, p in expected) == pytest.approx(1.0)
    counts = torch.zeros(num_labels, dtype=torch.float64)
    for path, log_prob in expected:
        for label in set(path):
            counts[label] += math.exp(log_prob)
    torch.testing.assert_close(result.marginals()[0].double(), counts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_joint_scores_the_chain_term_is_the_independent_classifier(implementation):
    generator = torch.Generator().manual_seed(3)
    num_labels = 4
    head = Head(num_labels, 8, joint_dim=4, hidden_dim=4, chain_term=True).eval()
    with torch.no_grad():
        head.label_embedding.zero_()
        head.score_bias.zero_()
        head.label_classifier.weight.copy_(torch.randn(num_labels, 8, generator=generator) * 3)
    features = torch.randn(5, 8, generator=generator)
    embedding, scores = head.embed_with_label_scores(features)
    config = SearchConfig(beam_size=16, max_labels=num_labels)
    result = beam_search(head, embedding, config, implementation, marginals=True)
    p = scores.detach().double().sigmoid()
    for b in range(5):
        assert len(result.label_sets(b)) == 16
        for labels, probability in result.label_sets(b):
            chosen = torch.zeros(num_labels, dtype=torch.bool)
            chosen[list(labels)] = True
            independent = torch.where(chosen, p[b], 1 - p[b]).prod()
            assert probability == pytest.approx(float(independent), rel=1e-5)
    torch.testing.assert_close(result.marginals().double(), p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_random_searches_equal_the_float64_reference(instruction_set, request):
    searches = request.config.getoption("--searches")
    excused = Counter[str]()  # searches: a head that ties does so for every image of its batch
    for seed in range(searches):
        head, embedding, config = random_case(seed)
        excused[config.order] += 0 < assert_search_equal(
            head, embedding, config, pack=partial(make_cpu_head, instruction_set=instruction_set)
        )
    print(f"{searches} searches, with an excused image {dict(excused)}")
    # Literal ReLU cells forget: paths of one set tie exactly, and only `free` has several.
    assert excused.pop("free", 0) <= searches // 50
    assert sum(excused.values()) <= searches // 500


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_random_searches_with_marginals_equal_the_float64_reference(instruction_set, request):
    searches = request.config.getoption("--searches") // 3
    excused = 0  # searches: a head that ties does so for every image of its batch
    for seed in range(searches):
        head, embedding, config = random_case(seed)
        excused += 0 < assert_search_equal(
            head,
            embedding,
            config,
            marginals=True,
            pack=partial(make_cpu_head, instruction_set=instruction_set),
        )
    print(f"{searches} searches, {excused} with an excused image")
    assert excused <= searches // 50


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_marginals_of_random_searches_in_free_order(instruction_set, request):
    searches = request.config.getoption("--searches") // 3
    excused = 0
    for seed in range(searches):
        head, embedding, config = random_case(seed, order="free")
        pack = partial(make_cpu_head, instruction_set=instruction_set)
        excused += 0 < assert_search_equal(head, embedding, config, marginals=True, pack=pack)
    print(f"{searches} searches, {excused} with an excused image")
    assert excused <= searches // 10  # literal ReLU cells forget: their paths tie exactly


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_a_hundred_thousand_labels(order, instruction_set):
    generator = torch.Generator().manual_seed(2)
    head = random_head(generator, 100_000, joint_dim=5, hidden_dim=7)
    embedding = random_embedding(generator, head, 3, label_logits=True)
    config = SearchConfig(beam_size=5, max_labels=3, order=order)
    # So many scores lie close to one another: one image may be a tie.
    assert (
        assert_search_equal(
            head, embedding, config, pack=partial(make_cpu_head, instruction_set=instruction_set)
        )
        <= 1
    )


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
@pytest.mark.parametrize("marginals", [False, True])
def test_threads_change_no_bit(order, marginals):
    generator = torch.Generator().manual_seed(3)
    head = random_head(generator, 30, joint_dim=16, hidden_dim=40)
    embedding = random_embedding(generator, head, 500, label_logits=True)
    config = SearchConfig(beam_size=4, max_labels=5, order=order)
    alone = beam_search(head, embedding, config, marginals=marginals)
    try:
        torch.set_num_threads(4)
        head.clear_cache()
        shared = beam_search(head, embedding, config, marginals=marginals)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone.labels, shared.labels)
    assert torch.equal(alone.log_probs, shared.log_probs)
    assert alone.stats == shared.stats
    if marginals:
        assert torch.equal(alone.marginals(), shared.marginals())


def test_an_instruction_set_that_is_not_there_is_refused():
    head, embedding = small_case()
    with pytest.raises(ValueError, match="instruction_set must be auto or one of .* got 'mmx'"):
        run_compiled(
            head, embedding, SearchConfig(), 3, pack=partial(make_cpu_head, instruction_set="mmx")
        )
    assert "portable" in _C.instruction_sets()


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_marginals_do_not_change_the_paths(order):
    for seed in range(60):
        head, embedding, config = random_case(seed)
        config = SearchConfig(config.beam_size, 4, 0, order, config.end_takes_slot, config.stop)
        plain = beam_search(head, embedding, config, on_nonfinite="mark")
        summed = beam_search(head, embedding, config, marginals=True, on_nonfinite="mark")
        assert torch.equal(plain.labels, summed.labels)
        assert torch.equal(plain.lengths, summed.lengths)
        torch.testing.assert_close(
            plain.log_probs, summed.log_probs, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
@pytest.mark.parametrize("end_takes_slot", [False, True])
def test_ties_go_to_the_lower_parent_and_label(implementation, order, end_takes_slot):
    # Zero weights: every allowed continuation has the same score, exactly, in any arithmetic.
    head = Head(5, 4, joint_dim=2, hidden_dim=2).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    config = SearchConfig(3, 2, 1, order, end_takes_slot)
    result = beam_search(head, ImageEmbedding(torch.zeros(1, 2)), config, implementation)
    if order == "increasing":
        # After label 0 five continuations (p 1/5 * 1/5), after 1 four, after 2 three; the shorter
        # continuation list is the likelier: 2 then END is 1/5 * 1/3.
        expected = [[2, -1], [2, 3], [2, 4]]
    elif order == "unique":
        expected = [[0, -1], [1, -1], [2, -1]] if not end_takes_slot else [[0, 1], [0, 2], [0, 3]]
    else:
        expected = [[0, -1], [1, -1], [2, -1]] if not end_takes_slot else [[0, 0], [0, 1], [0, 2]]
    assert result.labels[0].tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [0, 1, 17])
@pytest.mark.parametrize("num_labels", [1, 2, 1000])
def test_shapes_and_padding(implementation, batch, num_labels):
    generator = torch.Generator().manual_seed(0)
    head = random_head(generator, num_labels, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(generator, head, batch, True)
    result = beam_search(head, embedding, SearchConfig(4, 3), implementation, marginals=True)
    longest = min(3, num_labels)
    assert result.labels.shape == (batch, 4, longest)
    assert result.labels.dtype == result.lengths.dtype == torch.int64
    assert result.lengths.shape == result.log_probs.shape == (batch, 4)
    assert result.marginals().shape == (batch, num_labels)
    position = torch.arange(longest)
    padded = position >= result.lengths[..., None]
    assert (result.labels[padded] == -1).all() and (result.labels[~padded] >= 0).all()
    absent = result.log_probs == -math.inf
    assert (result.lengths[absent] == 0).all()
    if num_labels == 1 and batch:
        assert absent[:, 2:].all()  # only the empty set and the one label exist


def test_native_reads_non_contiguous_inputs():
    generator = torch.Generator().manual_seed(5)
    head = random_head(generator, 9, joint_dim=6, hidden_dim=4)
    wide = torch.randn(8, 12, generator=generator)
    logits = torch.randn(10, 8, generator=generator)
    strided = ImageEmbedding(wide[::2, ::2], logits.t()[::2])
    dense = ImageEmbedding(wide[::2, ::2].contiguous(), logits.t()[::2].contiguous())
    first, second = beam_search(head, strided), beam_search(head, dense)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.log_probs, second.log_probs)


def test_large_label_logits_keep_their_precision():
    generator = torch.Generator().manual_seed(6)
    head = random_head(generator, 300, joint_dim=8, hidden_dim=8)
    logits = chain_logits(torch.randn(4, 300, generator=generator) * 3)
    assert logits.max() > 200
    embedding = ImageEmbedding(torch.randn(4, 8, generator=generator), logits)
    assert assert_search_equal(head, embedding, SearchConfig(8, 6)) == 0


def test_states_are_shared_and_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(7)
    head = random_head(generator, 12, joint_dim=8, hidden_dim=16)
    embedding = random_embedding(generator, head, 40, False)
    together = beam_search(head, embedding, SearchConfig(4, 5))
    assert together.stats.hit_rate > 0.5
    assert together.stats.prefix_bytes > 0
    for b in (0, 13, 39):
        alone = beam_search(head, ImageEmbedding(embedding.joint[b : b + 1]), SearchConfig(4, 5))
        assert torch.equal(alone.labels[0], together.labels[b])
        assert torch.equal(alone.log_probs[0], together.log_probs[b])


SEARCHED = [
    "label_embedding", "input_embedding", "score_bias", "output_projection.weight",
    "recurrence.weight_ih", "recurrence.weight_hh", "recurrence.bias_ih", "recurrence.bias_hh",
]  # fmt: skip


def small_case() -> tuple[Head, ImageEmbedding]:
    generator = torch.Generator().manual_seed(8)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=4, tied_embedding=False)
    return head, random_embedding(generator, head, 3, False)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("how", ["in place", "new parameter", "through .data"])
def test_changed_weights_are_seen(name, how):
    head, embedding = small_case()
    before = beam_search(head, embedding)
    owner = head.get_submodule(name.rpartition(".")[0])
    parameter = head.get_parameter(name)
    with torch.no_grad():
        if how == "in place":
            parameter.mul_(0.5).add_(0.1)
        elif how == "new parameter":
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(parameter * 0.5 + 0.1))
        else:
            parameter.data.mul_(0.5).add_(0.1)
            head.clear_cache()
    after = beam_search(head, embedding)
    assert not torch.equal(before.log_probs, after.log_probs)
    expected = beam_search(head, embedding, implementation="reference")
    torch.testing.assert_close(after.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_recurrence_reads_the_input_embedding_and_nothing_else_does(implementation):
    head, embedding = small_case()
    found = beam_search(head, embedding, implementation=implementation)
    with torch.no_grad():
        head.label_embedding[head.start] += 1.0
        head.input_embedding[head.end] += 1.0
    same = beam_search(head, embedding, implementation=implementation)
    assert torch.equal(same.log_probs, found.log_probs)
    for row in (0, head.start):
        with torch.no_grad():
            head.input_embedding[row] += 1.0
        changed = beam_search(head, embedding, implementation=implementation)
        assert not torch.equal(changed.log_probs, same.log_probs)
        same = changed


def test_an_input_embedding_is_given_and_taken_away():
    head, embedding = small_case()
    apart = beam_search(head, embedding)
    own, head.input_embedding = head.input_embedding, None
    assert_weights_are_read_anew(head, embedding)
    tied = beam_search(head, embedding)
    assert not torch.equal(tied.log_probs, apart.log_probs)
    head.input_embedding = torch.nn.Parameter(head.label_embedding.detach().clone())
    assert torch.equal(beam_search(head, embedding).log_probs, tied.log_probs)
    head.input_embedding = own
    assert torch.equal(beam_search(head, embedding).log_probs, apart.log_probs)


def assert_weights_are_read_anew(head, embedding):
    expected = beam_search(head, embedding, implementation="reference")
    found = beam_search(head, embedding)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


class EditAfterCopy(TorchDispatchMode):
    """Edits a weight from another thread once the packing has copied it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.edits = weight, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default
        if copied and args[0].data_ptr() == self.weight.data_ptr():
            thread = threading.Thread(target=self.edit)
            thread.start()
            thread.join()
        return result

    def edit(self) -> None:
        self.edits += 1
        with torch.no_grad():
            self.weight.mul_(-1.0)


def test_an_edit_while_the_head_is_packed_is_seen():
    head, embedding = small_case()
    head.double()  # so that packing copies
    with EditAfterCopy(head.recurrence.weight_hh) as mode:
        before = beam_search(head, embedding)
    assert mode.edits == 1
    after = beam_search(head, embedding)
    head.float()
    expected = beam_search(head, embedding, implementation="reference")
    assert not torch.equal(before.log_probs, after.log_probs)
    torch.testing.assert_close(after.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_weights_that_come_to_lie_where_searched_ones_were_are_not_taken_for_them():
    """A conversion swaps memory and counts no edit."""
    generator = torch.Generator().manual_seed(9)
    for joint_dim, hidden_dim in itertools.product([4, 16, 64], [24, 64, 200]):
        head = random_head(generator, 6, joint_dim=joint_dim, hidden_dim=hidden_dim)
        embedding = random_embedding(generator, head, 3, False)
        beam_search(head, embedding)
        head.output_projection.to(torch.bfloat16)
        head.output_projection.to(torch.float32)  # may take the freed memory
        assert_weights_are_read_anew(head, embedding)
        memory = head.output_projection.weight.detach().numpy().copy()
        for _ in range(2):
            head.output_projection.weight.data = torch.from_numpy(memory)
            assert_weights_are_read_anew(head, embedding)
            memory *= -2.0  # another tensor will lie here, with as many edits


def test_computed_weights_and_changed_attributes_are_seen():
    head, embedding = small_case()
    beam_search(head, embedding)
    head.activation = "tanh"
    assert_weights_are_read_anew(head, embedding)
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    weight_norm(head.output_projection)
    assert_weights_are_read_anew(head, embedding)
    with torch.no_grad():
        head.output_projection.parametrizations.weight.original0.mul_(-3.0)
    assert_weights_are_read_anew(head, embedding)


def test_a_search_under_autocast_leaves_no_trace():
    head, embedding = small_case()
    expected = beam_search(copy.deepcopy(head), embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = beam_search(head, embedding)
    after = beam_search(head, embedding)
    assert torch.equal(inside.log_probs, expected.log_probs)
    assert torch.equal(after.log_probs, expected.log_probs)


def test_inference_mode_works_and_leaves_no_trace():
    head, embedding = small_case()
    expected = beam_search(copy.deepcopy(head), embedding)
    with torch.inference_mode():
        assert torch.equal(beam_search(head, embedding).log_probs, expected.log_probs)
        made_inside = copy.deepcopy(head)
        assert torch.equal(beam_search(made_inside, embedding).log_probs, expected.log_probs)
    assert torch.equal(beam_search(head, embedding).log_probs, expected.log_probs)
    assert torch.equal(beam_search(made_inside, embedding).log_probs, expected.log_probs)


def test_a_head_in_training_mode_with_dropout_is_refused():
    head = Head(5, 4, joint_dim=3, hidden_dim=2, joint_dropout=0.5)
    with pytest.raises(ValueError, match="call head.eval"):
        beam_search(head, ImageEmbedding(torch.zeros(2, 3)))


def test_marginals_lose_no_image_whose_paths_are_finite():
    # Literal ReLU cells with large weights overflow on long, improbable paths.
    lost = finite = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        head = random_head(generator, 7, joint_dim=8, hidden_dim=16, cell="paper")
        with torch.no_grad():
            for parameter in head.recurrence.parameters():
                parameter.mul_(4)
        embedding = random_embedding(generator, head, 5, False)
        config = SearchConfig(4, 20, 0, "free")
        for implementation in IMPLEMENTATIONS[:1] if seed % 8 else IMPLEMENTATIONS:
            plain = beam_search(head, embedding, config, implementation, on_nonfinite="mark")
            summed = beam_search(
                head, embedding, config, implementation, marginals=True, on_nonfinite="mark"
            )
            torch.testing.assert_close(
                plain.log_probs, summed.log_probs, rtol=0, atol=0, equal_nan=True
            )
            assert torch.equal(plain.labels, summed.labels)
            finite += 5 - len(plain.nonfinite())
            lost += len(plain.nonfinite())
    assert finite > 50 and lost > 0  # both kinds were there


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["joint", "label_logits"])
def test_an_image_that_is_not_finite_is_named_and_touches_no_other(implementation, value, where):
    generator = torch.Generator().manual_seed(9)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(generator, head, 3, True)
    clean = beam_search(head, embedding, implementation=implementation)
    getattr(embedding, where)[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"1 of 3 images .* \(index 1\)") as caught:
        beam_search(head, embedding, implementation=implementation)
    assert caught.value.images == [1]
    marked = beam_search(
        head, embedding, implementation=implementation, on_nonfinite="mark", marginals=True
    )
    assert marked.nonfinite().tolist() == [1]
    assert marked.marginals()[1].isnan().all()
    for b in (0, 2):
        assert torch.equal(marked.labels[b], clean.labels[b])
        assert torch.equal(marked.log_probs[b], clean.log_probs[b])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_overflowing_recurrence_is_marked(implementation):
    head = Head(3, 4, joint_dim=4, hidden_dim=4, cell="paper").eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(1e12)
    embedding = ImageEmbedding(torch.ones(1, 4))
    result = beam_search(head, embedding, implementation=implementation, on_nonfinite="mark")
    assert result.log_probs.isnan().all()
    assert 0 <= result.stats.prefix_hits <= result.stats.prefix_lookups


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_recurrence_that_overflows_later_is_marked(implementation):
    head = Head(5, 4, joint_dim=4, hidden_dim=4, cell="paper").eval()
    with torch.no_grad():
        head.recurrence.weight_hh.fill_(1e20)
        head.recurrence.weight_ih.fill_(1.0)
        head.label_embedding.uniform_(0.5, 1.0, generator=torch.Generator().manual_seed(0))
        head.output_projection.weight.fill_(0.1)
        head.score_bias[-1] = -50.0
    embedding = ImageEmbedding(torch.zeros(3, 4))
    result = beam_search(head, embedding, SearchConfig(4, 4), implementation, on_nonfinite="mark")
    assert result.log_probs.isnan().all()
    assert 0 <= result.stats.prefix_hits <= result.stats.prefix_lookups


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", ["lstm", "paper"])
@pytest.mark.parametrize("name", ["weight_hh", "weight_ih", "output_projection", "score_bias"])
def test_weights_that_are_not_finite_mark_what_the_specification_marks(value, cell, name):
    generator = torch.Generator().manual_seed(3)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=20, cell=cell)
    embedding = random_embedding(generator, head, 4, True)
    weights = {
        "weight_hh": head.recurrence.weight_hh, "weight_ih": head.recurrence.weight_ih,
        "output_projection": head.output_projection.weight, "score_bias": head.score_bias,
    }[name]  # fmt: skip
    with torch.no_grad():
        weights.view(-1)[-3] = value
    native, expected = (
        beam_search(head, embedding, SearchConfig(3, 4), how, on_nonfinite="mark", marginals=True)
        for how in IMPLEMENTATIONS
    )
    assert native.nonfinite().tolist() == expected.nonfinite().tolist()
    assert native.log_probs.isnan().equal(expected.log_probs.isnan())
    assert native.marginals().isnan().equal(expected.marginals().isnan())
    if name == "weight_hh":  # nothing times infinity, at the first step already
        assert len(native.nonfinite()) == 4


def test_embeddings_that_are_no_floating_point_numbers_are_refused():
    head = Head(5, 4, joint_dim=3, hidden_dim=2).eval()
    for kind in (torch.complex64, torch.bool, torch.int64, torch.uint8):
        for implementation in IMPLEMENTATIONS:
            with pytest.raises(ValueError, match=rf"joint must be of a floating-point .*{kind}"):
                beam_search(
                    head, ImageEmbedding(torch.ones(2, 3, dtype=kind)),
                    implementation=implementation,
                )  # fmt: skip
            logits = torch.ones(2, 6, dtype=kind)
            with pytest.raises(ValueError, match="label_logits must be of a floating-point"):
                beam_search(
                    head, ImageEmbedding(torch.ones(2, 3), logits), implementation=implementation
                )
    half = ImageEmbedding(torch.ones(2, 3, dtype=torch.float16))
    whole = ImageEmbedding(torch.ones(2, 3))
    assert torch.equal(beam_search(head, half).labels, beam_search(head, whole).labels)


def test_views_that_negate_when_they_are_read():
    generator = torch.Generator().manual_seed(4)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=5)
    embedding = random_embedding(generator, head, 4, True)
    negated = ImageEmbedding(
        torch._neg_view(-embedding.joint), torch._neg_view(-embedding.label_logits)
    )
    expected = beam_search(head, embedding)
    assert torch.equal(beam_search(head, negated).log_probs, expected.log_probs)
    evidence = torch.zeros(4, 6, dtype=torch.int8)
    evidence[:, 2] = 1
    told = beam_search(head, embedding, evidence=evidence).log_probs
    assert not torch.equal(told, expected.log_probs)
    lazily = torch._neg_view(-evidence)
    assert torch.equal(beam_search(head, embedding, evidence=lazily).log_probs, told)


def test_a_weight_that_turns_into_its_negated_view_is_another_weight():
    head = random_head(torch.Generator().manual_seed(5), 6, joint_dim=4, hidden_dim=5)
    embedding = random_embedding(torch.Generator().manual_seed(6), head, 4, False)
    before = beam_search(head, embedding).log_probs
    weight = head.recurrence.weight_ih.detach()
    del head.recurrence.weight_ih
    head.recurrence.weight_ih = torch._neg_view(weight)  # the same memory, read as -weight
    after = beam_search(head, embedding).log_probs
    assert not torch.equal(after, before)
    reference_scores = beam_search(head, embedding, implementation="reference").log_probs
    torch.testing.assert_close(after, reference_scores, rtol=1e-4, atol=1e-4)


def test_arguments_are_checked_with_both_sides_named():
    head = Head(5, 4, joint_dim=3, hidden_dim=2).eval()
    with pytest.raises(ValueError, match=r"beam_size must be in 1..16, got 0"):
        SearchConfig(beam_size=0)
    with pytest.raises(ValueError, match=r"must be \[B, 3\], got \[2, 4\]"):
        beam_search(head, ImageEmbedding(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"label_logits must be \[2, 6\], got \[2, 5\]"):
        beam_search(head, ImageEmbedding(torch.zeros(2, 3), torch.zeros(2, 5)))
    with pytest.raises(ValueError, match=r"min_labels \(6\) must not exceed max_labels \(5\)"):
        beam_search(head, ImageEmbedding(torch.zeros(2, 3)), SearchConfig(min_labels=6))
    with pytest.raises(ValueError, match="implementation must be auto, native or reference"):
        beam_search(head, ImageEmbedding(torch.zeros(2, 3)), implementation="fast")
    with pytest.raises(ValueError, match="kept no marginals"):
        beam_search(head, ImageEmbedding(torch.zeros(2, 3))).marginals()


def test_top_k_and_label_sets():
    generator = torch.Generator().manual_seed(11)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(generator, head, 4, True)
    config = SearchConfig(16, 4, order="unique", min_labels=3)
    result = beam_search(head, embedding, config, marginals=True)
    sets = result.best_sets()
    for b in range(4):
        assert sets[b].nonzero()[:, 0].tolist() == sorted(
            result.labels[b, 0, : result.lengths[b, 0]].tolist()
        )
        kept = result.best_sets(top_k=2)[b]
        assert kept.sum() == 2 and (kept <= sets[b]).all()
        assert result.marginals()[b][kept].min() >= result.marginals()[b][sets[b] & ~kept].max()
        merged = result.label_sets(b)
        assert len({labels for labels, _ in merged}) == len(merged)
        total = sum(probability for _, probability in merged)
        assert total == pytest.approx(float(result.log_probs[b].exp().sum()), rel=1e-5)
