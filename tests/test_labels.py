"""Label spaces, and label sets as ordered paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnnrnn.labels import LabelSpace, increasing_paths, path_sets, prefix_trie, shuffled_paths

NAMES = ("sky", "sea", "boat", "buoy", "cow")


def test_frequency_order_breaks_ties_by_position_in_the_source():
    space = LabelSpace.by_frequency(NAMES, np.array([3, 7, 3, 0, 7]))
    assert space.names == ("sea", "cow", "sky", "boat", "buoy")
    assert space.source_index == (1, 4, 0, 2, 3)
    assert len(space) == 5


def test_equal_counts_keep_the_order_of_the_source():
    assert LabelSpace.by_frequency(NAMES, np.zeros(5)) == LabelSpace.given(NAMES)


def test_frequency_order_takes_unsigned_counts():
    space = LabelSpace.by_frequency(("a", "b"), np.array([1, 2], dtype=np.uint8))
    assert space.names == ("b", "a")


def test_rarest_first_breaks_ties_by_position_in_the_source():
    space = LabelSpace.rarest_first(NAMES, np.array([3, 7, 3, 0, 7], dtype=np.uint8))
    assert space.names == ("buoy", "sky", "boat", "sea", "cow")
    assert space.source_index == (3, 0, 2, 1, 4)


def test_a_random_order_is_drawn_from_the_generator():
    spaces = [LabelSpace.random(NAMES, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert spaces[3] == LabelSpace.random(NAMES, torch.Generator().manual_seed(3))
    assert len({space.names for space in spaces}) > 10
    for space in spaces:
        assert tuple(NAMES[i] for i in space.source_index) == space.names


def test_permuting_a_permuted_space():
    space = LabelSpace.given(NAMES).permuted([4, 2, 0, 1, 3]).permuted([1, 0, 2, 4, 3])
    assert space.names == ("boat", "cow", "sky", "buoy", "sea")
    assert space.source_index == (2, 4, 0, 3, 1)


def test_label_names_must_be_distinct():
    with pytest.raises(ValueError, match="label names must be distinct"):
        LabelSpace.given(("sky", "sea", "sky"))


@pytest.mark.parametrize("index", [(0, 0), (1, 2), (0,), (0, 1, 2)])
def test_source_index_must_be_a_permutation(index):
    with pytest.raises(ValueError, match="source_index must be a permutation of 2 positions"):
        LabelSpace(("a", "b"), index)


def test_from_source_moves_every_column_to_its_name():
    space = LabelSpace.by_frequency(NAMES, np.array([3, 7, 3, 0, 7]))
    other_order = ("cow", "buoy", "sky", "boat", "sea")
    targets = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    moved = space.from_source(targets, other_order)
    for row in range(7):
        present = {name for name, x in zip(other_order, targets[row].tolist(), strict=True) if x}
        found = {name for name, x in zip(space.names, moved[row].tolist(), strict=True) if x}
        assert found == present


def test_from_source_of_no_images():
    assert LabelSpace.given(NAMES).from_source(torch.zeros(0, 5) > 0, NAMES[::-1]).shape == (0, 5)


def test_from_source_names_what_is_missing_and_unknown():
    space = LabelSpace.given(NAMES)
    with pytest.raises(ValueError) as error:
        space.from_source(torch.zeros(1, 5) > 0, ("sky", "sea", "boat", "buoy", "horse"))
    assert "5 labels are not the model's 5: missing ['cow'], unknown ['horse']" in str(error.value)
    with pytest.raises(ValueError, match=r"missing \['cow'\], unknown \[\]"):
        space.from_source(torch.zeros(1, 4) > 0, NAMES[:4])
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['horse'\]"):
        space.from_source(torch.zeros(1, 6) > 0, (*NAMES, "horse"))


def test_increasing_paths_by_hand():
    targets = torch.tensor(
        [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool
    )
    expected = [[1, 3, 4, -1, -1], [-1] * 5, [0, 1, 2, 3, 4], [4, -1, -1, -1, -1]]
    paths = increasing_paths(targets)
    assert paths.dtype == torch.int64
    assert paths.tolist() == expected


@pytest.mark.parametrize(
    ("shape", "width"), [((0, 5), 0), ((1, 1), 0), ((17, 5), 0)], ids=["B=0", "B=1", "B=17"]
)
def test_increasing_paths_of_empty_sets(shape, width):
    assert increasing_paths(torch.zeros(shape, dtype=torch.bool)).shape == (shape[0], width)


@pytest.mark.parametrize("num_labels", [1, 2, 7, 81])
@pytest.mark.parametrize("batch", [0, 1, 17])
def test_paths_and_sets_round_trip(device, batch, num_labels):
    generator = torch.Generator().manual_seed(batch + num_labels)
    targets = (torch.rand(batch, num_labels, generator=generator) < 0.3).to(device)
    paths = increasing_paths(targets)
    assert torch.equal(path_sets(paths, num_labels), targets)
    for path, labels in zip(paths.tolist(), targets.tolist(), strict=True):
        expected = [label for label, present in enumerate(labels) if present]
        assert path == expected + [-1] * (paths.shape[1] - len(expected))


def test_path_sets_of_beams_repeats_and_any_order():
    labels = torch.tensor([[[2, 0, 2], [-1, -1, -1]], [[1, -1, -1], [0, 1, 2]]])
    expected = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]], dtype=torch.bool)
    assert torch.equal(path_sets(labels, 3), expected)
    assert path_sets(labels[:, :, :0], 3).sum() == 0


def test_shuffled_paths_keep_their_labels(device):
    generator = torch.Generator().manual_seed(0)
    paths = increasing_paths(torch.rand(17, 7, generator=generator) < 0.4).to(device)
    shuffled = shuffled_paths(paths, torch.Generator().manual_seed(1))
    assert torch.equal(path_sets(shuffled, 7), path_sets(paths, 7))
    assert torch.equal(shuffled == -1, paths == -1)
    assert not torch.equal(shuffled, paths)
    assert torch.equal(shuffled, shuffled_paths(paths, torch.Generator().manual_seed(1)))
    assert shuffled_paths(paths[:0], generator).shape == paths[:0].shape
    assert shuffled_paths(paths[:, :0], generator).shape == (17, 0)


def test_every_order_of_a_path_is_as_likely():
    paths = torch.tensor([[0, 2, 5, -1]]).expand(6000, 4)
    shuffled = shuffled_paths(paths, torch.Generator().manual_seed(0))
    orders, counts = shuffled.unique(dim=0, return_counts=True)
    assert len(orders) == 6 and (orders[:, 3] == -1).all()
    assert ((counts - 1000).abs() < 150).all()  # five standard deviations


def test_prefix_trie_by_hand():
    paths = torch.tensor([[0, 2, -1], [1, -1, -1], [0, 2, 3], [-1, -1, -1], [0, 1, -1]])
    trie = prefix_trie(paths)
    # (), (0), (1), (0, 1), (0, 2), (0, 2, 3)
    assert trie.nodes.tolist() == [
        [0, 1, 4, -1], [0, 2, -1, -1], [0, 1, 4, 5], [0, -1, -1, -1], [0, 1, 3, -1],
    ]  # fmt: skip
    assert [labels.tolist() for labels in trie.labels] == [[0, 1], [1, 2], [3]]
    assert [parents.tolist() for parents in trie.parents] == [[0, 0], [0, 0], [1]]


@pytest.mark.parametrize(("batch", "length"), [(0, 0), (0, 3), (1, 0), (3, 2)])
def test_prefix_trie_of_empty_paths(batch, length):
    trie = prefix_trie(torch.full((batch, length), -1))
    assert trie.nodes.tolist() == [[0] + [-1] * length] * batch
    assert trie.labels == () and trie.parents == ()


def test_prefix_trie_holds_each_prefix_once(device):
    generator = torch.Generator().manual_seed(0)
    paths = increasing_paths(torch.rand(200, 9, generator=generator) < 0.3).to(device)
    trie = prefix_trie(paths)
    prefixes = [()]
    first = 0
    for labels, parents in zip(trie.labels, trie.parents, strict=True):
        assert (parents.diff() >= 0).all()
        count = len(prefixes)
        longer = [
            (*prefixes[first + parent], label)
            for parent, label in zip(parents.tolist(), labels.tolist(), strict=True)
        ]
        prefixes += longer
        first = count
    assert len(set(prefixes)) == len(prefixes)
    for path, nodes in zip(paths.tolist(), trie.nodes.tolist(), strict=True):
        path = [label for label in path if label >= 0]
        found = [prefixes[node] for node in nodes if node >= 0]
        assert found == [tuple(path[:step]) for step in range(len(path) + 1)]
