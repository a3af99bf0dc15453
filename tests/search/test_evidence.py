"""Searches in which labels are known: against the reference and against all label sets."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from cnnrnn import _C
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import beam_search
from cnnrnn.search.checks import resolve_max_labels
from tests.search.replay import (
    assert_search_equal,
    make_cpu_head,
    random_case,
    random_embedding,
    random_evidence,
    random_head,
)
from tests.search.test_search import exhaustive, head_of_table

IMPLEMENTATIONS = ["native", "reference"]


def evidence_of(num_labels: int, present=(), absent=()) -> Tensor:
    row = torch.zeros(1, num_labels, dtype=torch.int8)
    row[0, list(present)] = 1
    row[0, list(absent)] = -1
    return row


@pytest.mark.parametrize("marginals", [False, True])
@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_random_searches_with_evidence_equal_the_float64_reference(
    instruction_set, marginals, request
):
    searches = request.config.getoption("--searches") // 3
    excused = {"free": 0, "other": 0}
    for seed in range(searches):
        head, embedding, config = random_case(seed, label_counts=(1, 2, 3, 5, 7, 17, 80))
        if seed % 3 == 0:
            config = replace(config, marginal_places=1 + seed % 40)
        evidence = random_evidence(seed, head, len(embedding), resolve_max_labels(head, config))
        pack = partial(make_cpu_head, instruction_set=instruction_set)
        differing = assert_search_equal(
            head, embedding, config, marginals=marginals, pack=pack, evidence=evidence
        )
        excused["free" if config.order == "free" else "other"] += differing > 0
    print(f"{searches} searches, with an excused image {excused}")
    # Literal ReLU cells forget: paths of one set tie exactly, and only `free` has several.
    assert excused["free"] <= max(1, searches // 30)
    assert excused["other"] <= max(1, searches // 300)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("order", "num_labels", "longest", "min_labels"),
    [("increasing", 5, 5, 0), ("increasing", 6, 4, 2), ("unique", 4, 3, 1), ("free", 3, 3, 0)],
)
def test_evidence_against_all_label_paths(implementation, order, num_labels, longest, min_labels):
    generator = torch.Generator().manual_seed(num_labels)
    head = random_head(generator, num_labels, joint_dim=5, hidden_dim=6)
    embedding = random_embedding(generator, head, 1, True)
    config = SearchConfig(
        beam_size=16, max_labels=longest, min_labels=min_labels, order=order, marginal_places=64
    )
    every = exhaustive(head, embedding, config, longest)
    tried = 0
    all_known = itertools.product((0, 1, -1), repeat=num_labels)
    for known in itertools.islice(all_known, 0, None, max(1, 3**num_labels // 60)):
        if sum(k == 1 for k in known) > longest:
            continue
        tried += 1
        evidence = torch.tensor([known], dtype=torch.int8)
        result = beam_search(
            head.float(), embedding, config, implementation, marginals=True, evidence=evidence
        )
        fits = [
            (path, score) for path, score in every
            if all(k == 0 or (label in path) == (k == 1) for label, k in enumerate(known))
        ]  # fmt: skip
        found = [
            tuple(result.labels[0, n, : result.lengths[0, n]].tolist())
            for n in range(16)
            if result.log_probs[0, n] > -math.inf
        ]
        assert found == [path for path, _ in fits[:16]], known
        torch.testing.assert_close(
            result.log_probs[0, : len(found)].double(),
            torch.tensor([score for _, score in fits[:16]], dtype=torch.float64),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        mass = sum(math.exp(score) for _, score in fits)
        expected = torch.zeros(num_labels, dtype=torch.float64)
        for path, score in fits:
            expected[list(set(path))] += math.exp(score)
        if any(known):
            expected /= mass if mass else math.nan
        if fits:
            # The search ends when 0.001 of what was found is left.
            assert float(result.log_evidence[0]) == pytest.approx(math.log(mass), abs=2e-3)
        else:
            assert result.log_evidence[0] == -math.inf
        torch.testing.assert_close(
            result.marginals()[0].double(), expected, rtol=2e-3, atol=2e-3, equal_nan=True
        )
    assert tried > 10


def test_a_row_of_zeros_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    head = random_head(generator, 80, joint_dim=16, hidden_dim=16)
    embedding = random_embedding(generator, head, 30, True)
    for order, marginals in itertools.product(("increasing", "unique", "free"), (False, True)):
        config = SearchConfig(beam_size=5, max_labels=4, order=order)
        without = beam_search(head, embedding, config, marginals=marginals)
        evidence = torch.zeros(30, 80, dtype=torch.int8)
        evidence[7, 3], evidence[8, 5] = 1, -1
        found = beam_search(head, embedding, config, marginals=marginals, evidence=evidence)
        rows = [i for i in range(30) if i not in (7, 8)]
        for name in ("labels", "lengths", "log_probs", "requested_marginals", "log_evidence"):
            mine, theirs = getattr(found, name), getattr(without, name)
            if theirs is not None:
                assert torch.equal(mine[rows], theirs[rows]), name


def test_banks_of_one_search_are_the_beam_of_another():
    # Nothing known, and wider banks than the beam: the other search does the same.
    generator = torch.Generator().manual_seed(1)
    head = random_head(generator, 17, joint_dim=16, hidden_dim=16)
    embedding = random_embedding(generator, head, 20, True)
    wide = beam_search(head, embedding, SearchConfig(16, 5), marginals=True)
    narrow = beam_search(head, embedding, SearchConfig(2, 5, marginal_places=16), marginals=True)
    assert torch.equal(narrow.labels, wide.labels[:, :2])
    assert torch.equal(narrow.log_probs, wide.log_probs[:, :2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_known_labels_in_the_worked_example(implementation):
    # As in docs/search.md: root A .5, B .3, END .2; after A: B .4, END .6; after B: A .5, END .5.
    tiny = 1e-30
    head = head_of_table(
        {(): [0.5, 0.3, 0.2], (0,): [tiny, 0.4, 0.6], (1,): [0.5, tiny, 0.5]}, num_labels=2
    )
    embedding = ImageEmbedding(torch.zeros(1, 4))
    config = SearchConfig(beam_size=4, max_labels=2, order="unique")
    cases = [
        # B present: (A, B) .5 x .4, (B) .3 x .5, (B, A) .3 x .5; that is .5 together.
        (evidence_of(2, present=[1]), [((0, 1), 0.2), ((1,), 0.15), ((1, 0), 0.15)], [0.7, 1.0]),
        (evidence_of(2, absent=[0]), [((), 0.2), ((1,), 0.15)], [0.0, 0.15 / 0.35]),
        (evidence_of(2, [0], [1]), [((0,), 0.3)], [1.0, 0.0]),
        (evidence_of(2, absent=[0, 1]), [((), 0.2)], [0.0, 0.0]),
    ]
    for evidence, paths, marginals in cases:
        result = beam_search(
            head, embedding, config, implementation, marginals=True, evidence=evidence
        )
        found = {
            tuple(result.labels[0, n, : result.lengths[0, n]].tolist()): math.exp(score)
            for n, score in enumerate(result.log_probs[0].tolist())
            if score > -20
        }
        assert found == pytest.approx(dict(paths), rel=1e-4)
        assert result.marginals()[0].tolist() == pytest.approx(marginals, rel=1e-4)
        together = sum(probability for _, probability in paths)
        assert math.exp(result.log_evidence[0]) == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_label_that_looks_worse_than_others_is_still_found(implementation):
    # With one beam the N best prefixes would all be without label 0, which costs e^-30.
    head = Head(20, 4, joint_dim=4, hidden_dim=4).eval()
    with torch.no_grad():
        head.label_embedding.zero_()
        head.score_bias.zero_()
        head.score_bias[0] = -30
    config = SearchConfig(beam_size=2, max_labels=3)
    result = beam_search(
        head, ImageEmbedding(torch.zeros(1, 4)), config, implementation,
        marginals=True, evidence=evidence_of(20, present=[0]),
    )  # fmt: skip
    assert result.labels[0, :, 0].tolist() == [0, 0]
    assert result.marginals()[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert -40 < result.log_evidence[0] < -30


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_evidence_that_nothing_fits(implementation):
    # At least two labels, and all but one absent: END stays forbidden.
    head = random_head(np.random.default_rng(0), 3, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(np.random.default_rng(1), head, 2, False)
    config = SearchConfig(beam_size=4, max_labels=3, min_labels=2, order="unique")
    evidence = torch.tensor([[0, -1, -1], [0, 0, 0]], dtype=torch.int8)
    result = beam_search(head, embedding, config, implementation, marginals=True, evidence=evidence)
    assert result.log_probs[0].tolist() == [-math.inf] * 4
    assert result.lengths[0].tolist() == [0] * 4
    assert result.log_evidence[0] == -math.inf
    assert result.marginals()[0].isnan().all()
    assert result.log_probs[1, 0] > -math.inf
    assert 0 <= result.marginals()[1].min()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_evidence_that_is_wrong_names_the_image(implementation):
    head = random_head(np.random.default_rng(0), 3, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(np.random.default_rng(1), head, 2, False)

    def search(evidence: Tensor) -> None:
        beam_search(head, embedding, SearchConfig(2, 1), implementation, evidence=evidence)

    with pytest.raises(ValueError, match=r"evidence must be \[1 or 2, 3\], got \[2, 4\]"):
        search(torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"evidence must be \[1 or 2, 3\], got \[3, 3\]"):
        search(torch.zeros(3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="evidence must be int8, got"):
        search(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="got 2 for label 1 of image 1"):
        search(torch.tensor([[0, 1, 0], [0, 2, 0]], dtype=torch.int8))
    with pytest.raises(
        ValueError,
        match=r"image 1 has 2 labels known to be present, more than max_labels \(1\)",
    ):
        search(torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=torch.int8))


@pytest.mark.parametrize("marginals", [False, True])
def test_neither_threads_nor_kept_states_change_a_bit(marginals):
    generator = torch.Generator().manual_seed(4)
    head = random_head(generator, 40, joint_dim=16, hidden_dim=16)
    embedding = random_embedding(generator, head, 200, True)
    config = SearchConfig(beam_size=4, max_labels=4, marginal_places=20)
    evidence = random_evidence(4, head, 200, 4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count, prefix_bytes in ((1, 1 << 20), (3, 1 << 28)):
            torch.set_num_threads(count)
            head.prefix_bytes = prefix_bytes
            for _ in range(2):
                results.append(
                    beam_search(head, embedding, config, marginals=marginals, evidence=evidence)
                )
    finally:
        torch.set_num_threads(threads)
    first = results[0]
    for other in results[1:]:
        assert torch.equal(first.labels, other.labels)
        assert torch.equal(first.log_probs, other.log_probs)
        if marginals:
            assert torch.equal(first.marginals(), other.marginals())
            assert torch.equal(first.log_evidence, other.log_evidence)


def test_values_that_are_not_finite_mark_the_image():
    head = random_head(np.random.default_rng(0), 5, joint_dim=4, hidden_dim=4)
    embedding = random_embedding(np.random.default_rng(1), head, 3, False)
    embedding.joint[1, 0] = math.inf
    result = beam_search(
        head, embedding, SearchConfig(2, 3), marginals=True, on_nonfinite="mark",
        evidence=evidence_of(5, present=[2]),
    )  # fmt: skip
    assert result.nonfinite().tolist() == [1]
    assert result.marginals()[1].isnan().all()
    assert result.log_evidence[1].isnan()
