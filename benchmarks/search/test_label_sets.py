"""The sampled label sets share prefixes as COCO's do, and the figures are counted rightly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.search.label_sets import (
    COCO_2014,
    PrefixStatistics,
    prefix_statistics,
    sample_label_sets,
)


@pytest.fixture(scope="module", params=[0, 1])
def statistics(request) -> PrefixStatistics:
    return prefix_statistics(sample_label_sets(COCO_2014.images, seed=request.param))


def test_sizes_are_those_of_coco(statistics):
    assert statistics.mean_labels == pytest.approx(COCO_2014.mean_labels, rel=0.05)
    assert statistics.singletons == pytest.approx(COCO_2014.singletons, rel=0.1)
    assert statistics.path_steps == pytest.approx(COCO_2014.path_steps, rel=0.05)


def test_prefixes_are_shared_as_in_coco(statistics):
    assert statistics.distinct == pytest.approx(COCO_2014.distinct, rel=0.1)
    for count, share in COCO_2014.share_of_most_visited.items():
        assert statistics.share_of_most_visited(count) == pytest.approx(share, rel=0.1)


def test_prefixes_grow_as_in_coco(statistics):
    for images, distinct in COCO_2014.distinct_after.items():
        assert statistics.distinct_after(images) == pytest.approx(distinct, rel=0.1)
    assert statistics.distinct_after(COCO_2014.images) == statistics.distinct


def test_labels_are_long_tailed_and_correlated():
    sets = sample_label_sets(COCO_2014.images)
    frequency = sets.mean(0)
    assert (np.diff(frequency) <= 0).all() and frequency[-1] > 0
    assert frequency[0] == pytest.approx(0.54, abs=0.03)  # COCO's person
    assert frequency[1] < 0.2
    together = sets.astype(np.float32).T @ sets.astype(np.float32) / len(sets)
    lift = (together / np.outer(frequency, frequency))[np.triu_indices(len(frequency), 1)]
    assert np.quantile(lift, 0.99) > 5 and np.quantile(lift, 0.25) < 0.5


@pytest.mark.parametrize(
    ("images", "labels"), [(0, 80), (1, 80), (13, 2), (5000, 7), (20_000, 1000)]
)
def test_sizes_of_the_problem(images, labels):
    sets = sample_label_sets(images, labels)
    assert sets.shape == (images, labels) and sets.dtype == np.bool_
    assert (np.diff(sets.sum(0)) <= 0).all()
    if labels == 1000:
        assert 5 < sets.sum(1).mean() < 6


def test_seed_decides():
    first, again, other = (sample_label_sets(1000, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="num_images must be at least 0, got -1"):
        sample_label_sets(-1)
    with pytest.raises(ValueError, match="num_labels must be at least 2, got 1"):
        sample_label_sets(1, 1)


def test_statistics_equal_a_plain_count():
    sets = sample_label_sets(500, 20)
    visits: Counter[tuple[int, ...]] = Counter()
    distinct_after = []
    for row in sets:
        path = tuple(np.flatnonzero(row).tolist())
        visits.update(path[:length] for length in range(len(path) + 1))
        distinct_after.append(len(visits))
    statistics = prefix_statistics(sets)
    assert statistics.distinct == len(visits)
    assert statistics.visits.tolist() == sorted(visits.values(), reverse=True)
    assert statistics.path_steps == sum(visits.values())
    assert statistics.mean_labels == sets.sum() / 500
    assert [statistics.distinct_after(n + 1) for n in range(500)] == distinct_after
