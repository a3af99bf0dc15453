"""Stratified hold-outs: sizes, seeds, label shares and coverage."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest

from cnnrnn.config import TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.splits import (
    describe_splits,
    stratified_folds,
    stratified_split,
    training_splits,
)


def dataset_of(targets: np.ndarray) -> Dataset:
    """A dataset with these label sets, [n, L] bool."""
    indptr = np.concatenate([[0], targets.sum(1).cumsum()])
    names = tuple(f"label {i}" for i in range(targets.shape[1]))
    return Dataset.from_arrays("made:up", names, indptr, targets.nonzero()[1].astype(np.int32))


def long_tailed(n: int = 3000, num_labels: int = 200, seed: int = 0) -> np.ndarray:
    """Label sets [n, L] whose labels occur in 1,000 down to a few images."""
    shares = 0.35 / np.arange(1, num_labels + 1) ** 1.1
    return np.random.default_rng(seed).random((n, num_labels)) < shares


def test_shares_of_labels_and_coverage_are_better_than_at_random():
    targets = long_tailed()
    counts = targets.sum(0)
    held = stratified_split(dataset_of(targets), 300, 0)[1]
    by_chance = np.random.default_rng(1).permutation(3000)[:300]
    several = counts > 1
    assert counts[several].min() < 10  # there are rare ones
    assert (targets[held].sum(0)[several] > 0).mean() > 0.99
    assert (targets[by_chance].sum(0)[several] > 0).mean() < 0.85
    frequent = counts >= 50
    off, off_by_chance = (
        np.abs(targets[part].sum(0) / counts - 0.1)[frequent] for part in (held, by_chance)
    )
    assert np.median(off) < 0.01 < np.median(off_by_chance)
    assert off.mean() < off_by_chance.mean() / 2
    assert targets[held].sum(1).mean() == pytest.approx(targets.sum(1).mean(), rel=0.15)


def test_images_without_labels_are_shared_out_too():
    targets = long_tailed(num_labels=5)
    bare = targets.sum(1) == 0
    held = stratified_split(dataset_of(targets), 300, 0)[1]
    assert abs(int(bare[held].sum()) - int(bare.sum()) / 10) <= 3


@pytest.mark.parametrize("held_out", [0, 1, 7, 150, 299, 300])
def test_sizes_are_exact_and_parts_disjoint(held_out):
    rest, held = stratified_split(dataset_of(long_tailed(300, 40)), held_out, 3)
    assert len(held) == held_out
    assert sorted([*rest, *held]) == list(range(300))
    assert list(rest) == sorted(rest) and list(held) == sorted(held)


def test_the_seed_decides():
    data = dataset_of(long_tailed(500, 30))
    first, again, other = (stratified_split(data, 50, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert len(set(first) & set(other)) < 25


def test_small_labels():
    # Label 0 once, 1 twice, 2 five times; 92 images without labels.
    targets = np.zeros((100, 3), bool)
    targets[0, 0] = targets[[1, 2], 1] = targets[3:8, 2] = True
    for seed in range(20):
        held = stratified_split(dataset_of(targets), 10, seed)[1]
        assert targets[held].sum(0).tolist() == [0, 1, 1]
    empty = stratified_split(dataset_of(np.zeros((0, 3), bool)), 0, 0)
    assert [len(part) for part in empty] == [0, 0]
    bare = stratified_split(dataset_of(np.zeros((9, 0), bool)), 4, 0)
    assert [len(part) for part in bare] == [5, 4]
    with pytest.raises(ValueError, match=r"held_out must be in 0..9, got 10"):
        stratified_split(dataset_of(np.zeros((9, 2), bool)), 10, 0)


def test_all_images_with_labels_may_be_held_out():
    targets = np.zeros((20, 2), bool)
    targets[:5] = True
    rest, held = stratified_split(dataset_of(targets), 18, 0)
    assert len(held) == 18 and 1 <= targets[rest, 0].sum() <= 2


def test_a_large_set_takes_seconds():
    data = dataset_of(long_tailed(100_000, 80))
    start = time.perf_counter()
    stratified_split(data, 10_000, 0)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_hold_each_record_once_and_every_label_alike(folds):
    targets = long_tailed(601, 40)
    parts = stratified_folds(dataset_of(targets), folds, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(601))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(list(part) == sorted(part) for part in parts)
    frequent = targets.sum(0) >= 40
    shares = np.array([targets[part].sum(0) for part in parts])[:, frequent]
    assert np.abs(shares / targets.sum(0)[frequent] - 1 / folds).max() < 0.3 / folds
    again = stratified_folds(dataset_of(targets), folds, 0)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


@pytest.mark.parametrize("folds", [1, 10])
def test_folds_that_are_too_few_or_too_many(folds):
    with pytest.raises(ValueError, match=rf"folds must be in 2..9 for 9 records, got {folds}"):
        stratified_folds(dataset_of(np.zeros((9, 2), bool)), folds, 0)


def with_splits(**splits: list[int]) -> Dataset:
    count = 1 + max(max(rows) for rows in splits.values())
    return dataset_of(np.ones((count, 1), bool)).with_changes(
        splits={name: np.array(rows) for name, rows in splits.items()}
    )


@pytest.mark.parametrize(
    ("splits", "options", "said", "unused"),
    [
        (
            {"train": [0, 1], "val": [2]}, {},
            "training on train (2 records), validating on val (1)", "",
        ),
        (
            {"all": [0, 1, 2]}, {},
            "training on all (3 records), validating on 10 % of its records", "",
        ),
        (
            {"train": [0], "val": [1], "trainval": [0, 1], "test": [2, 3]}, {},
            "training on train (1 records), validating on val (1); test (2) is left for "
            "`cnnrnn evaluate`", "",
        ),
        (
            {"train": [0], "spare": [1, 2], "val": [3], "odd": [4]}, {},
            "training on train (1 records), validating on val (1)", "splits spare (2), odd (1)",
        ),
        (
            {"train": [0, 1], "val": [2]}, {"train_split": "validation", "val_split": "TRAINING"},
            "training on val (1 records), validating on train (2)", "",
        ),
        (
            {"train": [0, 1], "val": [1]}, {"train_split": "train", "val_fraction": 0.5},
            "training on train (2 records), validating on 50 % of its records", "",
        ),
        (
            {"train": [0, 1], "val": [2]}, {"val_split": "dev"},
            "training on train (2 records), validating on val (1)", "",
        ),
    ],
)  # fmt: skip
def test_what_each_split_is_used_for(splits, options, said, unused):
    config = TrainConfig(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert describe_splits(with_splits(**splits), config) == said
    assert [unused in str(w.message) for w in caught] == ([True] if unused else [])


def test_splits_that_are_not_there():
    data = with_splits(one=[0], two=[1])
    for use in (describe_splits, training_splits):
        with pytest.raises(DataError, match="no split named train, only one, two; name another"):
            use(data, TrainConfig())
        with pytest.raises(DataError, match="no split 'dev', expected one of: one, two"):
            use(data, TrainConfig(train_split="one", val_split="dev"))
