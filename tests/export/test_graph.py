"""The search as tensor operations, before it is written to a file, against the specification."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.export import graph
from cnnrnn.export.graph import PathSearch
from cnnrnn.network.head import ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.checks import resolve_max_labels
from tests.search.replay import (
    MOST,
    random_case,
    random_embedding,
    random_evidence,
    random_head,
)
from tests.search.test_search import exhaustive

TIED = 228
"""Of this seed orders of one set tie exactly in float64: a literal ReLU cell forgets labels."""


@pytest.fixture(autouse=True)
def top_as_onnx_has_it(monkeypatch):
    def top(values, count):
        largest, places = values.sort(dim=1, descending=True, stable=True)
        return largest[:, :count], places[:, :count]

    monkeypatch.setattr(graph, "top", top)


@torch.no_grad()
def both(head, embedding, config, evidence=None, max_known=99):
    """The graph's paths and the reference's, in float64."""
    head, embedding = head.double(), embedding.to("cpu", torch.float64)
    searching = PathSearch(head, config, loop=False, max_known=max_known).double()
    given = torch.zeros(1, head.num_labels, dtype=torch.int8) if evidence is None else evidence
    most = min(int((given == 1).sum(1).max()) if len(given) else 0, searching.most_known)
    found = searching(
        embedding.joint, embedding.label_logits, torch.tensor(config.min_labels), given,
        torch.arange(most + 1) if max_known else None,
    )  # fmt: skip
    T = resolve_max_labels(head, config)
    return found, reference.beam_search(
        head, embedding, config, max_labels=T, marginals=True, evidence=evidence
    )


def assert_same(found, expected, paths=True):
    if paths:
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.lengths, expected.lengths)
    assert (found.marginals.nan_to_num() <= MOST).all()
    # A weight is rounded to float32 where the graph keeps it.
    for mine, theirs in (
        (found.log_probs, expected.log_probs),
        (found.marginals, expected.marginals()),
        (found.log_evidence, expected.log_evidence),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("seeds", [range(i, i + 30) for i in range(0, 300, 30)], ids=str)
def test_random_searches(seeds):
    for seed in seeds:
        head, embedding, config = random_case(seed, label_counts=(1, 2, 3, 5, 7, 17))
        found, expected = both(head, embedding, config)
        try:
            assert_same(found, expected)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {config}") from error


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_an_image_that_is_not_finite_is_marked_and_touches_no_other(order):
    generator = torch.Generator().manual_seed(0)
    head = random_head(generator, 7, joint_dim=4, hidden_dim=5)
    config = SearchConfig(beam_size=3, max_labels=3, order=order)
    whole = random_embedding(generator, head, 4, True)
    expected, _ = both(head, whole, config)
    for value in (torch.nan, torch.inf, -torch.inf):
        for spoilt in ("joint", "label_logits"):
            joint, logits = whole.joint.clone(), whole.label_logits.clone()
            {"joint": joint, "label_logits": logits}[spoilt][2, 1] = value
            found, from_reference = both(head, ImageEmbedding(joint, logits), config)
            assert found.log_probs.isnan().any(1).tolist() == [False, False, True, False]
            assert found.log_probs[2].isnan().all() and found.marginals[2].isnan().all()
            others = [0, 1, 3]
            assert torch.equal(found.labels[others], expected.labels[others])
            assert torch.equal(found.log_probs[others], expected.log_probs[others])
            assert_same(found, from_reference)


def test_scores_that_leave_the_range_are_marked_as_the_reference_marks_them():
    generator = torch.Generator().manual_seed(1)
    marked = 0
    for label in range(5):
        head = random_head(generator, 5, joint_dim=4, hidden_dim=5)
        with torch.no_grad():
            head.label_embedding[label] = torch.nan  # reached by paths through this label alone
        embedding = random_embedding(generator, head, 6, False)
        for order in ("increasing", "unique"):
            config = SearchConfig(beam_size=3, max_labels=3, order=order)
            found, expected = both(head, embedding, config)
            assert_same(found, expected)
            marked += int(found.log_probs.isnan().any())
    assert marked


@pytest.mark.parametrize("seeds", [range(i, i + 30) for i in range(0, 300, 30)], ids=str)
def test_random_searches_with_evidence(seeds):
    for seed in seeds:
        head, embedding, config = random_case(seed, label_counts=(1, 2, 3, 5, 7, 17))
        if seed % 3 == 0:
            config = replace(config, marginal_places=1 + seed % 20)
        evidence = random_evidence(seed, head, len(embedding), resolve_max_labels(head, config))
        found, expected = both(head, embedding, config, evidence)
        try:
            assert_same(found, expected, paths=seed != TIED)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {config}") from error


@pytest.mark.parametrize(
    ("order", "num_labels", "longest", "min_labels"),
    [("increasing", 5, 5, 0), ("increasing", 6, 4, 2), ("unique", 4, 3, 1), ("free", 3, 3, 0)],
)
def test_evidence_against_all_label_paths(order, num_labels, longest, min_labels):
    generator = torch.Generator().manual_seed(num_labels)
    head = random_head(generator, num_labels, joint_dim=5, hidden_dim=6)
    embedding = random_embedding(generator, head, 1, True)
    config = SearchConfig(
        beam_size=16, max_labels=longest, min_labels=min_labels, order=order, marginal_places=64
    )
    every = exhaustive(head, embedding, config, longest)
    known = [row for row in itertools.product((-1, 0, 1), repeat=num_labels)
             if row.count(1) <= longest]  # fmt: skip
    for row in known[:: max(1, len(known) // 80)]:
        present = {label for label, value in enumerate(row) if value == 1}
        absent = {label for label, value in enumerate(row) if value == -1}
        fits = [(path, score) for path, score in every
                if present <= set(path) and not absent & set(path)]  # fmt: skip
        found, _ = both(head, embedding, config, torch.tensor([row], dtype=torch.int8))
        paths = [
            tuple(found.labels[0, n, : found.lengths[0, n]].tolist())
            for n in range(16)
            if found.log_probs[0, n] > -torch.inf
        ]
        assert paths == [path for path, _ in fits[:16]], row
        scores = torch.tensor([score for _, score in fits], dtype=torch.float64)
        torch.testing.assert_close(
            found.log_probs[0, : len(paths)], scores[:16], rtol=1e-5, atol=1e-5
        )
        # The search ends when 0.001 of what was found is left.
        torch.testing.assert_close(found.log_evidence[0], scores.logsumexp(0), rtol=2e-3, atol=2e-3)
        held = torch.zeros(len(fits), num_labels, dtype=torch.float64)
        for i, (path, _) in enumerate(fits):
            held[i, list(set(path))] = 1
        expected = scores.exp() @ held
        if any(row):
            expected = scores.softmax(0) @ held if fits else expected.fill_(torch.nan)
        torch.testing.assert_close(
            found.marginals[0], expected, rtol=2e-3, atol=2e-3, equal_nan=True
        )


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_a_row_of_zeros_changes_no_bit(order):
    generator = torch.Generator().manual_seed(4)
    head = random_head(generator, 17, joint_dim=8, hidden_dim=9)
    embedding = random_embedding(generator, head, 12, True)
    config = SearchConfig(beam_size=3, max_labels=4, order=order)
    without, expected = both(head, embedding, config, max_known=0)
    assert_same(without, expected)
    evidence = torch.zeros(12, 17, dtype=torch.int8)
    evidence[5, 3], evidence[6, [2, 8]], evidence[7, 4] = 1, 1, -1
    beside, expected = both(head, embedding, config, evidence)
    assert_same(beside, expected)
    rows = [row for row in range(12) if row not in (5, 6, 7)]
    for mine, theirs in zip(beside, without, strict=True):
        assert torch.equal(mine[rows], theirs[rows])


def test_evidence_that_the_graph_does_not_take_has_no_path():
    generator = torch.Generator().manual_seed(5)
    head = random_head(generator, 7, joint_dim=4, hidden_dim=5).double()
    embedding = random_embedding(generator, head, 5, True).to("cpu", torch.float64)
    config = SearchConfig(beam_size=2, max_labels=5)
    evidence = torch.zeros(5, 7, dtype=torch.int8)
    evidence[0, :3] = 1  # more than two
    evidence[1, 0], evidence[2, 0] = 2, -2
    evidence[3, :2] = 1
    with torch.no_grad():
        found = PathSearch(head, config, loop=False, max_known=2).double()(
            embedding.joint, embedding.label_logits, torch.tensor(0), evidence, torch.arange(3)
        )
    assert found.log_evidence.isinf().tolist() == [True, True, True, False, False]
    assert (found.log_probs[:3] == -torch.inf).all() and not found.lengths[:3].any()
    assert (found.labels[:3] == -1).all() and found.marginals[:3].isnan().all()
    alone, expected = both(head, embedding.of(torch.tensor([3])), config, evidence[3:4])
    assert_same(alone, expected)
    assert torch.equal(alone.labels[0], found.labels[3])


def test_all_labels_absent():
    """Where every label is absent the empty path is left, with its probability."""
    generator = torch.Generator().manual_seed(6)
    head = random_head(generator, 3, joint_dim=4, hidden_dim=5)
    embedding = random_embedding(generator, head, 2, False)
    absent = torch.full((1, 3), -1, dtype=torch.int8)
    found, expected = both(head, embedding, SearchConfig(2, 3), absent)
    assert_same(found, expected)
    assert found.lengths.tolist() == [[0, 0], [0, 0]] and not found.marginals.any()
    # With a least number of labels END is never admitted, so no path fits.
    found, expected = both(head, embedding, SearchConfig(2, 3, min_labels=2), absent)
    assert_same(found, expected)
    assert found.log_evidence.tolist() == [-torch.inf] * 2
