"""The search as tensor operations, before it is written to a file, against the specification."""

from __future__ import annotations

import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.export import graph
from cnnrnn.export.graph import PathSearch
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.checks import resolve_max_labels
from tests.search.replay import MOST, random_case, random_embedding, random_head


@pytest.fixture(autouse=True)
def top_as_onnx_has_it(monkeypatch):
    def top(values, count):
        largest, places = values.sort(dim=1, descending=True, stable=True)
        return largest[:, :count], places[:, :count]

    monkeypatch.setattr(graph, "top", top)


@torch.no_grad()
def both(head, embedding, config, forbidden=None):
    """The graph's paths and the reference's, in float64."""
    head, embedding = head.double(), embedding.to("cpu", torch.float64)
    searching = PathSearch(head, config, loop=False).double()
    if forbidden is None:
        forbidden = torch.zeros(1, head.num_labels, dtype=torch.bool)
    found = searching(
        embedding.joint, embedding.label_logits, torch.tensor(config.min_labels), forbidden
    )
    T = resolve_max_labels(head, config)
    return found, reference.beam_search(head, embedding, config, max_labels=T, marginals=True)


def assert_same(found, expected):
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.lengths, expected.lengths)
    assert (found.marginals.nan_to_num() <= MOST).all()
    # A weight is rounded to float32 where the graph keeps it.
    for mine, theirs in (
        (found.log_probs, expected.log_probs),
        (found.marginals, expected.marginals()),
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


def test_a_forbidden_label_is_on_no_path(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=5)
    embedding = random_embedding(generator, head, 5, True)
    mask = torch.tensor([[True, False, False, True, False, False]])
    allowed = reference.allowed_labels

    def without_forbidden(num_labels, config, labels, device):
        found = allowed(num_labels, config, labels, device)
        found[:num_labels] &= ~mask[0]
        return found

    monkeypatch.setattr(reference, "allowed_labels", without_forbidden)
    for order in ("increasing", "unique", "free"):
        for least in (0, 3):
            config = SearchConfig(beam_size=4, max_labels=3, order=order, min_labels=least)
            found, expected = both(head, embedding, config, mask)
            assert_same(found, expected)
            assert not torch.isin(found.labels, torch.tensor([0, 3])).any()


def test_a_mask_of_its_own_for_every_image():
    generator = torch.Generator().manual_seed(3)
    head = random_head(generator, 6, joint_dim=4, hidden_dim=5)
    embedding = random_embedding(generator, head, 6, True)
    config = SearchConfig(beam_size=4, max_labels=3)
    masks = torch.eye(6, dtype=torch.bool)
    together, _ = both(head, embedding, config, masks)
    for image in range(6):
        one = ImageEmbedding(
            embedding.joint[image : image + 1], embedding.label_logits[image : image + 1]
        )
        alone, _ = both(head, one, config, masks[image : image + 1])
        assert torch.equal(together.labels[image], alone.labels[0])


def test_where_everything_is_forbidden_the_empty_path_is_left():
    head = Head(3, 4, joint_dim=4, hidden_dim=5).eval()
    config = SearchConfig(beam_size=2, max_labels=3, min_labels=2)
    embedding = head.embed(torch.randn(2, 4))
    found, _ = both(head, embedding, config, torch.ones(1, 3, dtype=torch.bool))
    assert found.lengths.tolist() == [[0, 0], [0, 0]]
    assert found.log_probs.tolist() == [[0.0, -torch.inf]] * 2
    assert not found.marginals.any()
