"""Measures against hand-worked examples, scikit-learn and brute force."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    hamming_loss,
    jaccard_score,
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)
from torch import Tensor

from cnnrnn import metrics

NAN, INF = math.nan, math.inf
SIZES = [(1, 1), (1, 5), (13, 1), (7, 3), (101, 17)]

# Three images, four labels; label 3 has no positives, label 2 is never predicted.
SETS = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
TARGETS = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)


def random_case(
    n: int, num_labels: int, seed: int, *, levels: int | None = None, rate: float = 0.4
) -> tuple[Tensor, Tensor]:
    """Scores, tied where there are few levels, and targets."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, num_labels, generator=generator, dtype=torch.float64)
    if levels is not None:
        scores = (scores * levels).floor() / levels
    return scores, torch.rand(n, num_labels, generator=generator) < rate


@st.composite
def tied_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, num_labels = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    values = st.sampled_from([-INF, -1.0, 0.0, 0.1, 0.25, 0.5, 1.0, INF])
    size = n * num_labels
    scores = draw(st.lists(values, min_size=size, max_size=size))
    targets = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return (
        torch.tensor(scores, dtype=dtype).view(n, num_labels),
        torch.tensor(targets).view(n, num_labels),
    )


def brute_o_f1(sets: Tensor, targets: Tensor) -> Fraction:
    total = int(sets.sum() + targets.sum())
    return Fraction(2 * int((sets & targets).sum()), total) if total else Fraction(0)


def brute_points(scores: list[float], targets: list[bool]) -> list[tuple[Fraction, Fraction]]:
    """(precision, recall) at every distinct score, the highest first."""
    points = []
    for cut in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, targets, strict=True) if s >= cut]
        points.append((Fraction(sum(chosen), len(chosen)), Fraction(sum(chosen), sum(targets))))
    return points


def brute_all_point(scores: list[float], targets: list[bool]) -> float:
    if not any(targets):
        return NAN
    area, before = Fraction(0), Fraction(0)
    for precision, recall in brute_points(scores, targets):
        area += precision * (recall - before)
        before = recall
    return float(area)


def brute_eleven_point(scores: list[float], targets: list[bool]) -> float:
    if not any(targets):
        return NAN
    points = brute_points(scores, targets)
    best = [max(p for p, r in points if r >= Fraction(t, 10)) for t in range(11)]
    return float(sum(best, Fraction(0)) / 11)


def brute_map(scores: Tensor, targets: Tensor, k: int) -> float:
    per_image = []
    for row, truth in zip(scores.tolist(), targets.tolist(), strict=True):
        if not any(truth):
            continue
        order = sorted(range(len(row)), key=lambda label: (-row[label], label))[:k]
        total = 0.0
        for i, label in enumerate(order, start=1):
            if truth[label]:
                total += sum(truth[other] for other in order[:i]) / i
        per_image.append(total / min(k, sum(truth)))
    return sum(per_image) / len(per_image) if per_image else NAN


# Sets from scores


def test_top_k_sets_breaks_ties_by_label_index(device: torch.device) -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.3, 0.9], [-INF, -INF, 1, -INF]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(metrics.top_k_sets(scores.to(device), 2).cpu(), expected)


@pytest.mark.parametrize("k", [3, 4, 100])
def test_top_k_sets_takes_all_from_num_labels_on(k: int) -> None:
    assert metrics.top_k_sets(torch.rand(5, 3), k).all()


def test_top_k_sets_of_no_images_is_empty() -> None:
    assert metrics.top_k_sets(torch.empty(0, 3), 2).shape == (0, 3)


def test_top_k_sets_long_tied_rows() -> None:
    # Long rows leave the small-sort path, where an unstable sort would show.
    scores, _ = random_case(3, 1009, seed=0, levels=4)
    got = metrics.top_k_sets(scores, 500)
    for row, chosen in zip(scores.tolist(), got, strict=True):
        order = [label for _, label in sorted(zip((-s for s in row), range(1009), strict=True))]
        assert chosen.nonzero().squeeze(1).tolist() == sorted(order[:500])


def test_threshold_sets_includes_the_threshold(device: torch.device) -> None:
    scores = torch.tensor([[0.7, 0.2], [0.69, 0.3]], device=device)
    # 0.7 is not a float32: a comparison in float64 would leave the score 0.7 out.
    expected = torch.tensor([[True, False], [False, False]])
    assert torch.equal(metrics.threshold_sets(scores, 0.7).cpu(), expected)
    per_label = torch.tensor([0.7, 0.3], dtype=torch.float64)
    expected = torch.tensor([[True, False], [False, True]])
    assert torch.equal(metrics.threshold_sets(scores, per_label).cpu(), expected)


def test_at_least_adds_the_best_scored_labels(device: torch.device) -> None:
    sets = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    scores = torch.tensor([[0.1, 0.4, 0.4], [0.9, 0.2, 0.3], [0.5, 0.1, 0.2], [-INF, -INF, -2]])
    sets, scores = sets.to(device), scores.to(device)
    assert torch.equal(metrics.at_least(sets, scores, 0), sets)
    one = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(metrics.at_least(sets, scores, 1).cpu(), one)
    two = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    assert torch.equal(metrics.at_least(sets, scores, 2).cpu(), two)
    assert metrics.at_least(sets, scores, 7).all()
    assert metrics.at_least(sets[:0], scores[:0], 1).shape == (0, 3)


def test_at_least_checks_its_arguments() -> None:
    sets = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        metrics.at_least(sets, torch.rand(2, 3), -1)
    with pytest.raises(ValueError, match=r"scores must be \[n, L\] like predictions \[2, 3\]"):
        metrics.at_least(sets, torch.rand(2, 2), 1)


# Calibration


def test_best_threshold_by_hand(device: torch.device) -> None:
    # Cuts at scores 0.9, 0.6, 0.5, 0.1: F1 = 2/3, 2/4, 4/5, 4/6; the best lies between 0.5 and 0.1.
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.6]], dtype=torch.float64, device=device)
    targets = torch.tensor([[True, False], [True, False]], device=device)
    assert list(metrics.best_threshold(scores, targets)) == pytest.approx([0.3, 0.8])


@settings(max_examples=200, deadline=None)
@given(tied_cases())
def test_best_threshold_is_the_exact_maximum(case: tuple[Tensor, Tensor]) -> None:
    scores, targets = case
    threshold, value = metrics.best_threshold(scores, targets)
    cuts = sorted(set(scores.flatten().tolist()))
    every_cut = [brute_o_f1(scores >= cut, targets) for cut in cuts]
    assert value == pytest.approx(float(max(every_cut)), abs=1e-15)
    assert brute_o_f1(metrics.threshold_sets(scores, threshold), targets) == max(every_cut)
    # The highest of equally good cuts: the threshold lies above the score before it.
    last = max(i for i, value in enumerate(every_cut) if value == max(every_cut))
    assert threshold <= cuts[last]
    assert last == 0 or threshold > cuts[last - 1]


@settings(max_examples=100, deadline=None)
@given(tied_cases())
def test_label_thresholds_are_each_labels_exact_maximum(case: tuple[Tensor, Tensor]) -> None:
    scores, targets = case
    cuts = metrics.best_label_thresholds(scores, targets, otherwise=0.25)
    sets = metrics.threshold_sets(scores, cuts)
    for label in range(scores.shape[1]):
        column = slice(label, label + 1)
        if not targets[:, label].any():
            assert cuts[label] == 0.25
            continue
        every_cut = [
            brute_o_f1(scores[:, column] >= cut, targets[:, column])
            for cut in scores[:, label].tolist()
        ]
        assert brute_o_f1(sets[:, column], targets[:, column]) == max(every_cut)


def test_labels_with_few_positives_keep_the_other_threshold() -> None:
    scores = torch.tensor([[0.9, 0.9], [0.8, 0.2], [0.1, 0.1]])
    targets = torch.tensor([[True, True], [True, False], [False, False]])
    cuts = metrics.best_label_thresholds(scores, targets, otherwise=0.7, at_least=2)
    assert cuts.tolist() == pytest.approx([0.45, 0.7])


@settings(max_examples=200, deadline=None)
@given(tied_cases())
def test_best_threshold_for_c_f1_is_the_exact_maximum(case: tuple[Tensor, Tensor]) -> None:
    scores, targets = case
    threshold, value = metrics.best_threshold(scores, targets, "C-F1")
    cuts = sorted(set(scores.flatten().tolist()))
    every_cut = [
        metrics.multilabel_metrics(scores >= cut, targets)["C-F1"] if targets.any() else 0.0
        for cut in cuts
    ]
    assert value == pytest.approx(max(every_cut), abs=1e-12)
    if targets.any():
        measured = metrics.multilabel_metrics(scores, targets, threshold=threshold)
        assert measured["C-F1"] == pytest.approx(max(every_cut), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(tied_cases())
def test_best_threshold_for_exact_match_is_the_exact_maximum(case: tuple[Tensor, Tensor]) -> None:
    scores, targets = case
    threshold, value = metrics.best_threshold(scores, targets, "exact-match")
    every_cut = [
        float(((scores >= cut) == targets).all(1).double().mean()) for cut in scores.unique()
    ]
    assert value == pytest.approx(max(every_cut), abs=1e-12)
    right = (metrics.threshold_sets(scores, threshold) == targets).all(1)
    assert float(right.double().mean()) == pytest.approx(max(every_cut), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(tied_cases(), st.integers(1, 3))
def test_best_threshold_with_filled_sets_is_the_exact_maximum(
    case: tuple[Tensor, Tensor], min_labels: int
) -> None:
    scores, targets = case

    def filled(threshold: float) -> Tensor:
        return metrics.at_least(metrics.threshold_sets(scores, threshold), scores, min_labels)

    threshold, value = metrics.best_threshold(scores, targets, min_labels=min_labels)
    every_cut = [brute_o_f1(filled(float(cut)), targets) for cut in scores.unique()]
    assert value == pytest.approx(float(max(every_cut)), abs=1e-15)
    assert brute_o_f1(filled(threshold), targets) == max(every_cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_threshold_between_neighbouring_floats(dtype: torch.dtype) -> None:
    low = torch.tensor(1.0, dtype=dtype)
    high = torch.nextafter(low, torch.tensor(2.0, dtype=dtype))
    scores = torch.stack([high, low])[:, None]
    threshold, value = metrics.best_threshold(scores, torch.tensor([[True], [False]]))
    assert value == 1.0
    assert metrics.threshold_sets(scores, threshold).tolist() == [[True], [False]]


def test_best_threshold_without_positives() -> None:
    scores = torch.tensor([[0.25, 0.5]])
    assert metrics.best_threshold(scores, torch.zeros(1, 2, dtype=torch.bool)) == (0.5, 0.0)


def test_best_k_by_hand(device: torch.device) -> None:
    # Rankings 0 1 2 and 2 1 0. k=1: one of 2 correct, F1 = 2/5; k=2: 3 of 4, 6/7; k=3: 3 of 6, 6/9.
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]], device=device)
    targets = torch.tensor([[True, True, False], [False, True, False]], device=device)
    assert list(metrics.best_k(scores, targets)) == pytest.approx([2, 6 / 7])


@settings(max_examples=200, deadline=None)
@given(tied_cases(), st.integers(0, 2**32), st.integers(0, 2))
def test_cuts_and_k_leave_unknown_labels_out(
    case: tuple[Tensor, Tensor], seed: int, min_labels: int
) -> None:
    scores, targets = case
    unknown = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    targets = targets & ~unknown
    if unknown.all():
        with pytest.raises(ValueError, match="no label of any image is known"):
            metrics.best_threshold(scores, targets, unknown=unknown)
        return

    def value_of(sets: Tensor, name: str) -> float:
        return float(metrics.multilabel_metrics(sets, targets, unknown=unknown)[name])

    def filled(threshold: float) -> Tensor:
        return metrics.at_least(metrics.threshold_sets(scores, threshold), scores, min_labels)

    names: tuple[Literal["O-F1", "C-F1", "exact-match"], ...] = ("O-F1", "C-F1", "exact-match")
    for name in names if targets.any() else names[:1]:
        best = max(value_of(filled(float(cut)), name) for cut in scores.unique())
        threshold, value = metrics.best_threshold(scores, targets, name, min_labels, unknown)
        assert value == pytest.approx(best, abs=1e-12)
        assert value_of(filled(threshold), name) == pytest.approx(best, abs=1e-12)
    by_k: tuple[Literal["O-F1", "exact-match"], ...] = ("O-F1", "exact-match")
    for by in by_k:
        values = [value_of(metrics.top_k_sets(scores, k + 1), by) for k in range(scores.shape[1])]
        k, value = metrics.best_k(scores, targets, by, unknown)
        assert value == pytest.approx(max(values), abs=1e-12)
        assert values[k - 1] == pytest.approx(max(values), abs=1e-12)
    cuts = metrics.best_label_thresholds(scores, targets, otherwise=0.25, unknown=unknown)
    found = metrics.average_precision(scores, targets, unknown=unknown)
    for label in range(scores.shape[1]):
        known = ~unknown[:, label]
        if not targets[:, label].any():
            assert cuts[label] == 0.25 and found[label].isnan()
            continue
        alone = scores[known, label][:, None], targets[known, label][:, None]
        assert cuts[label] == metrics.best_threshold(*alone)[0]
        assert found[label] == metrics.average_precision(*alone)[0]


@settings(max_examples=100, deadline=None)
@given(tied_cases())
def test_best_k_against_brute_force(case: tuple[Tensor, Tensor]) -> None:
    scores, targets = case
    values = [
        brute_o_f1(metrics.top_k_sets(scores, k), targets) for k in range(1, scores.shape[1] + 1)
    ]
    k, value = metrics.best_k(scores, targets)
    assert k == 1 + values.index(max(values))
    assert value == pytest.approx(float(max(values)), abs=1e-15)
    exact = [
        float((metrics.top_k_sets(scores, k) == targets).all(1).double().mean())
        for k in range(1, scores.shape[1] + 1)
    ]
    k, value = metrics.best_k(scores, targets, "exact-match")
    assert k == 1 + exact.index(max(exact))
    assert value == pytest.approx(max(exact), abs=1e-12)


# Average precision


def test_average_precision_by_hand(device: torch.device) -> None:
    # Label 0, no ties: truth along the ranking is 1 0 1 0.
    #   Points (P, R): (1, 1/2), (1/2, 1/2), (2/3, 1), (1/2, 1).
    #   All points: 1 * 1/2 + 2/3 * 1/2 = 5/6. Eleven: t <= 0.5 six times 1, five times 2/3.
    # Label 1, all tied: one point, P = 1/4, R = 1. Label 2 has no positives.
    scores = torch.tensor(
        [[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.5, 0.3], [0.6, 0.5, 0.4]], device=device
    )
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]], device=device)
    got = metrics.average_precision(scores, targets).cpu()
    expected = torch.tensor([5 / 6, 1 / 4, NAN], dtype=torch.float64)
    torch.testing.assert_close(got, expected, equal_nan=True)
    got = metrics.average_precision(scores, targets, "11_point").cpu()
    expected = torch.tensor([(6 + 5 * 2 / 3) / 11, 1 / 4, NAN], dtype=torch.float64)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("levels", [None, 1, 2, 10])
@pytest.mark.parametrize(("n", "num_labels"), SIZES)
def test_average_precision_equals_scikit_learn(n: int, num_labels: int, levels: int | None) -> None:
    scores, targets = random_case(n, num_labels, seed=n + num_labels, levels=levels)
    expected = [
        average_precision_score(targets[:, label].numpy(), scores[:, label].numpy())
        if targets[:, label].any()
        else NAN
        for label in range(num_labels)
    ]
    torch.testing.assert_close(
        metrics.average_precision(scores, targets),
        torch.tensor(expected, dtype=torch.float64),
        equal_nan=True,
    )


@settings(max_examples=100, deadline=None)
@given(tied_cases())
def test_average_precision_against_brute_force(case: tuple[Tensor, Tensor]) -> None:
    scores, targets = case
    for method, brute in (("all_point", brute_all_point), ("11_point", brute_eleven_point)):
        columns = zip(scores.T.tolist(), targets.T.tolist(), strict=True)
        expected = torch.tensor([brute(s, t) for s, t in columns], dtype=torch.float64)
        got = metrics.average_precision(scores, targets, method)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("positives", [1, 3, 7, 10, 20, 30])
def test_eleven_point_meets_recall_levels_exactly(positives: int) -> None:
    # With 10 positives recall takes the values 0.1, 0.2, 0.3 ... that 3 * 0.1 in floats misses.
    scores, _ = random_case(200, 1, seed=positives)
    targets = torch.zeros(200, 1, dtype=torch.int64)
    targets[:positives] = 1
    expected = brute_eleven_point(scores[:, 0].tolist(), targets[:, 0].bool().tolist())
    assert float(metrics.average_precision(scores, targets, "11_point")) == pytest.approx(expected)


def test_average_precision_ignores_the_order_of_images() -> None:
    scores, targets = random_case(50, 4, seed=3, levels=5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for method in ("all_point", "11_point"):
        torch.testing.assert_close(
            metrics.average_precision(scores[order], targets[order], method),
            metrics.average_precision(scores, targets, method),
        )


def test_map_at_k_by_hand(device: torch.device) -> None:
    # Image 0 ranks 0 1 2 3 (ties by index), truth {0, 2, 3}: hits at ranks 1 and 3 of the first 3,
    #   AP@3 = (1 + 2/3) / min(3, 3) = 5/9; AP@2 = 1 / 2; AP@10 = (1 + 2/3 + 3/4) / 3 = 29/36.
    # Image 1 ranks 3 2 1 0, truth {1}: AP@3 = 1/3, AP@2 = 0. Image 2 has no labels: left out.
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    targets = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    scores, targets = scores.to(device), targets.to(device)
    assert metrics.map_at_k(scores, targets, 3) == pytest.approx((5 / 9 + 1 / 3) / 2)
    assert metrics.map_at_k(scores, targets, 2) == pytest.approx(1 / 4)
    assert metrics.map_at_k(scores, targets) == pytest.approx((29 / 36 + 1 / 3) / 2)


@settings(max_examples=100, deadline=None)
@given(tied_cases(), st.integers(1, 7))
def test_map_at_k_against_brute_force(case: tuple[Tensor, Tensor], k: int) -> None:
    assert metrics.map_at_k(*case, k) == pytest.approx(brute_map(*case, k), nan_ok=True)


def test_label_ranking_precision_by_hand(device: torch.device) -> None:
    # Image 0: label 0 ranks 1 (1 of 1 true); labels 1 and 2 tie at rank 3 (2 of 3 true): 5/6.
    # Image 1: all tie at rank 3, two true: 2/3. Image 2 has no labels: left out.
    scores = torch.tensor([[0.9, 0.5, 0.5], [-INF, -INF, -INF], [0.1, 0.2, 0.3]], device=device)
    targets = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]], device=device)
    got = metrics.label_ranking_precision(scores, targets)
    assert got == pytest.approx((5 / 6 + 2 / 3) / 2)


@pytest.mark.parametrize("levels", [None, 1, 2, 10])
@pytest.mark.parametrize(("n", "num_labels"), SIZES)
def test_label_ranking_precision_equals_scikit_learn(
    n: int, num_labels: int, levels: int | None
) -> None:
    scores, targets = random_case(n, num_labels, seed=n + num_labels, levels=levels)
    some = targets.any(1)
    if num_labels == 1:  # which scikit-learn refuses
        expected = 1.0 if some.any() else NAN
    else:
        expected = label_ranking_average_precision_score(
            targets[some].numpy(), scores[some].numpy()
        )
    assert metrics.label_ranking_precision(scores, targets) == pytest.approx(expected, nan_ok=True)


# Measures together


def test_multilabel_metrics_of_sets_by_hand(device: torch.device) -> None:
    # Per label: correct 2 0 0 0, predicted 2 1 0 1, positives 2 1 1 0.
    # C-P = (1 + 0 + 0 + 0) / 4; C-R = (1 + 0 + 0) / 3, label 3 left out; C-F1 = 2/12 / (7/12).
    # O-P = 2/4, O-R = 2/4. Image F1: 2/3, 2/4, 0; Jaccard: 1/2, 1/3, 0.
    # macro-F1 = (1 + 0 + 0) / 3, label 3 left out. Wrong pairs: 1 + 2 + 1 of 12.
    got = metrics.multilabel_metrics(SETS.to(device), TARGETS.to(device))
    assert got == pytest.approx(
        {
            "C-P": 1 / 4,
            "C-R": 1 / 3,
            "C-F1": 2 / 7,
            "O-P": 1 / 2,
            "O-R": 1 / 2,
            "O-F1": 1 / 2,
            "macro-F1": 1 / 3,
            "exact-match": 0.0,
            "example-F1": (2 / 3 + 1 / 2) / 3,
            "Jaccard": (1 / 2 + 1 / 3) / 3,
            "Hamming": 4 / 12,
            "images": 3,
            "images-without-labels": 1,
            "labels-without-positives": 1,
            "labels-never-predicted": 1,
            "mean-labels-predicted": 4 / 3,
            "mean-labels-true": 4 / 3,
        }
    )


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.9])
@pytest.mark.parametrize(("n", "num_labels"), [*SIZES, (211, 40)])
def test_multilabel_metrics_equal_scikit_learn(n: int, num_labels: int, rate: float) -> None:
    scores, targets = random_case(n, num_labels, seed=n, rate=rate)
    sets = (scores < 0.3) | (targets & (scores < 0.7))
    got = metrics.multilabel_metrics(sets, targets, scores=1 - scores)
    truth, predicted = targets.numpy().astype(int), sets.numpy().astype(int)

    # Column by column: scikit-learn reads a matrix of one column as a vector of two classes.
    columns = [
        precision_recall_fscore_support(
            truth[:, i], predicted[:, i], average="binary", zero_division=0
        )
        for i in range(num_labels)
    ]
    has_positives = truth.any(0)
    assert got["C-P"] == pytest.approx(np.mean([precision for precision, *_ in columns]))
    recalls = np.array([recall for _, recall, *_ in columns])[has_positives]
    assert got["C-R"] == pytest.approx(recalls.mean() if len(recalls) else NAN, nan_ok=True)
    overall = precision_recall_fscore_support(
        truth.ravel(), predicted.ravel(), average="binary", zero_division=0
    )
    assert [got["O-P"], got["O-R"], got["O-F1"]] == pytest.approx(list(overall[:3]))
    if num_labels > 1:
        micro = precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
        assert [got["O-P"], got["O-R"], got["O-F1"]] == pytest.approx(list(micro[:3]))
        if has_positives.all():
            macro = precision_recall_fscore_support(
                truth, predicted, average="macro", zero_division=0
            )
            assert [got["C-P"], got["C-R"]] == pytest.approx(list(macro[:2]))
    if num_labels > 1:
        samples = f1_score(truth, predicted, average="samples", zero_division=1)
        assert got["example-F1"] == pytest.approx(samples)
        jaccard = jaccard_score(truth, predicted, average="samples", zero_division=1)
        assert got["Jaccard"] == pytest.approx(jaccard)
    f1 = [f1_score(truth[:, i], predicted[:, i]) for i in np.flatnonzero(has_positives)]
    assert got["macro-F1"] == pytest.approx(np.mean(f1) if f1 else NAN, nan_ok=True)
    assert got["Hamming"] == pytest.approx(hamming_loss(truth, predicted))
    assert got["exact-match"] == pytest.approx(accuracy_score(truth, predicted))
    if has_positives.any():
        ap = [
            average_precision_score(truth[:, i], 1 - scores[:, i].numpy())
            for i in np.flatnonzero(has_positives)
        ]
        assert got["mAP"] == pytest.approx(np.mean(ap))


def test_scores_become_sets_by_k_or_threshold() -> None:
    scores, targets = random_case(31, 7, seed=1, levels=6)
    for sets, options in (
        (metrics.top_k_sets(scores, 3), {"k": 3}),
        (metrics.threshold_sets(scores, 0.5), {"threshold": 0.5}),
        (metrics.threshold_sets(scores, torch.arange(7) / 7), {"threshold": torch.arange(7) / 7}),
    ):
        got = metrics.multilabel_metrics(scores, targets, **options)
        assert got == metrics.multilabel_metrics(sets, targets, scores=scores)
        assert got["MAP@10"] == metrics.map_at_k(scores, targets)
        assert got["mAP"] == float(metrics.average_precision(scores, targets).mean())
        eleven = metrics.average_precision(scores, targets, "11_point")
        assert got["mAP-11pt"] == float(eleven.mean())
        assert got["LRAP"] == metrics.label_ranking_precision(scores, targets)


def test_scores_alone_give_the_ranking_only() -> None:
    got = metrics.multilabel_metrics(*random_case(5, 3, seed=0))
    assert set(got) == {
        "MAP@10",
        "mAP",
        "mAP-11pt",
        "LRAP",
        "images",
        "images-without-labels",
        "labels-without-positives",
        "mean-labels-true",
    }


def test_k_cuts_sets_down_and_never_fills_up() -> None:
    # Members by score: image 0 has 3 1 0 (tie of 0 and 1 by index: 3 0 1), image 1 has 2 only,
    # image 2 none; label 2 of image 0 scores highest but is no member.
    sets = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    scores = torch.tensor([[0.2, 0.2, 0.9, 0.3], [0.9, 0.8, 0.1, 0.7], [0.1, 0.2, 0.3, 0.4]])
    expected = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    got = metrics.multilabel_metrics(sets, expected, scores=scores, k=2)
    assert got["exact-match"] == 1.0
    assert got["mean-labels-predicted"] == 1.0


def test_k_keeps_members_that_score_minus_infinity() -> None:
    sets = torch.tensor([[False, True, True]])
    expected = torch.tensor([[False, True, False]])
    got = metrics.multilabel_metrics(sets, expected, scores=torch.full((1, 3), -INF), k=1)
    assert got["exact-match"] == 1.0


def test_nothing_predicted() -> None:
    got = metrics.multilabel_metrics(torch.zeros_like(TARGETS), TARGETS)
    for key in ("C-P", "C-R", "C-F1", "O-P", "O-R", "O-F1"):
        assert got[key] == 0.0, key
    # Image 2 has no labels: rightly empty.
    assert got["exact-match"] == got["example-F1"] == pytest.approx(1 / 3)
    assert got["labels-never-predicted"] == 4


def test_nothing_true() -> None:
    nothing = torch.zeros_like(SETS)
    got = metrics.multilabel_metrics(SETS, nothing, scores=SETS.double())
    for key in ("C-P", "O-P", "O-R", "O-F1", "exact-match", "example-F1"):
        assert got[key] == 0.0, key
    for key in ("C-R", "C-F1", "MAP@10", "mAP", "mAP-11pt"):
        assert math.isnan(got[key]), key
    assert (got["images-without-labels"], got["labels-without-positives"]) == (3, 4)


@pytest.mark.parametrize(("n", "num_labels"), SIZES)
def test_perfect_predictions(n: int, num_labels: int) -> None:
    _, targets = random_case(n, num_labels, seed=4)
    targets[:, 0] = True
    targets[0] = True
    got = metrics.multilabel_metrics(targets, targets, scores=targets.float())
    for key in ("C-P", "C-R", "C-F1", "O-P", "O-R", "O-F1", "exact-match", "example-F1"):
        assert got[key] == 1.0, key
    for key in ("MAP@10", "mAP", "mAP-11pt"):
        assert got[key] == pytest.approx(1.0), key


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_targets_count_as_bool(dtype: torch.dtype) -> None:
    assert metrics.multilabel_metrics(SETS, TARGETS.to(dtype)) == metrics.multilabel_metrics(
        SETS, TARGETS
    )


def test_sums_do_not_overflow_small_types() -> None:
    # 300 images: a count in uint8 would wrap.
    targets = torch.ones(300, 1, dtype=torch.uint8)
    got = metrics.multilabel_metrics(targets.bool(), targets, scores=targets.half())
    assert got["O-F1"] == got["mAP"] == 1.0


# Per label


def test_per_label_metrics_by_hand(device: torch.device) -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.1], [0.8, 0.2, 0.3, 0.1], [0.1, 0.1, 0.2, 0.9]])
    got = metrics.per_label_metrics(SETS.to(device), TARGETS.to(device), scores=scores)
    expected = {
        "precision": [1.0, 0.0, 0.0, 0.0],
        "recall": [1.0, 0.0, 0.0, NAN],
        "F1": [1.0, 0.0, 0.0, NAN],
        "positives": [2, 1, 1, 0],
        "predicted": [2, 1, 0, 1],
        "correct": [2, 0, 0, 0],
        "AP": [1.0, 0.5, 1.0, NAN],
        "AP-11pt": [1.0, 0.5, 1.0, NAN],
    }
    assert list(got) == list(expected)
    for key, column in expected.items():
        dtype = torch.int64 if key in ("positives", "predicted", "correct") else torch.float64
        torch.testing.assert_close(
            got[key].cpu(), torch.tensor(column, dtype=dtype), equal_nan=True
        )


@pytest.mark.parametrize(("n", "num_labels"), SIZES)
def test_per_label_metrics_equal_scikit_learn(n: int, num_labels: int) -> None:
    scores, targets = random_case(n, num_labels, seed=n)
    targets[0] = True
    got = metrics.per_label_metrics(scores > 0.5, targets)
    assert "AP" not in got
    truth, predicted = targets.numpy().astype(int), (scores > 0.5).numpy().astype(int)
    for label in range(num_labels):
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth[:, label], predicted[:, label], average="binary", zero_division=0
        )
        mine = [float(got[key][label]) for key in ("precision", "recall", "F1")]
        assert mine == pytest.approx([precision, recall, f1])
        assert int(got["positives"][label]) == truth[:, label].sum()


# Arguments


def test_shapes_must_agree() -> None:
    sets = torch.zeros(3, 5, dtype=torch.bool)
    message = r"targets must be \[n, L\] bool like predictions \[3, 5\], got \[3, 4\]"
    with pytest.raises(ValueError, match=message):
        metrics.multilabel_metrics(sets, sets[:, :4])
    with pytest.raises(ValueError, match=message):
        metrics.per_label_metrics(sets, sets[:, :4])
    message = r"targets must be \[n, L\] bool like scores \[3, 5\], got \[2, 5\]"
    for function in (
        metrics.best_threshold,
        metrics.best_k,
        metrics.average_precision,
        metrics.map_at_k,
    ):
        with pytest.raises(ValueError, match=message):
            function(sets.float(), sets[:2])
    message = r"scores must be \[n, L\] like predictions \[3, 5\], got \[3, 4\]"
    for both in (metrics.multilabel_metrics, metrics.per_label_metrics):
        with pytest.raises(ValueError, match=message):
            both(sets, sets, scores=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"predictions must be \[n, L\], got \[5\]"):
        metrics.multilabel_metrics(sets[0], sets[0])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_to_measure(shape: tuple[int, int]) -> None:
    scores, targets = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for function in (
        metrics.best_threshold,
        metrics.best_k,
        metrics.average_precision,
        metrics.map_at_k,
        metrics.multilabel_metrics,
    ):
        with pytest.raises(ValueError, match="there is nothing to measure"):
            function(scores, targets)
    with pytest.raises(ValueError, match="there is nothing to measure"):
        metrics.per_label_metrics(targets, targets)


def test_scores_must_be_numbers() -> None:
    scores = torch.zeros(4, 3)
    scores[2, 1] = scores[3, 0] = NAN
    targets = torch.zeros(4, 3, dtype=torch.bool)
    for function in (
        metrics.best_threshold,
        metrics.best_k,
        metrics.average_precision,
        metrics.map_at_k,
    ):
        with pytest.raises(ValueError, match="scores must not be NaN, first found in row 2"):
            function(scores, targets)
    with pytest.raises(ValueError, match="predictions must not be NaN, first found in row 2"):
        metrics.multilabel_metrics(scores, targets, k=1)
    with pytest.raises(ValueError, match="scores must not be NaN, first found in row 2"):
        metrics.multilabel_metrics(targets, targets, scores=scores)
    with pytest.raises(ValueError, match="row 2"):
        metrics.top_k_sets(scores, 1)
    with pytest.raises(ValueError, match="row 2"):
        metrics.threshold_sets(scores, 0.5)
    with pytest.raises(ValueError, match=r"floating point, got \[4, 3\] torch.int64"):
        metrics.top_k_sets(targets.long(), 1)
    with pytest.raises(ValueError, match="predictions must be .* floating point.*torch.int64"):
        metrics.multilabel_metrics(targets.long(), targets)
    with pytest.raises(ValueError, match="bool sets, got torch.float32"):
        metrics.per_label_metrics(scores, targets)


def test_targets_must_be_zero_or_one() -> None:
    with pytest.raises(ValueError, match="bool or 0/1 integers, got torch.float32"):
        metrics.multilabel_metrics(SETS, TARGETS.float())
    with pytest.raises(ValueError, match="bool or 0/1 integers, got the value -1"):
        metrics.multilabel_metrics(SETS, TARGETS.long() - 1)


def test_options_must_go_together() -> None:
    scores = torch.rand(3, 4)
    with pytest.raises(ValueError, match="k or threshold, not both"):
        metrics.multilabel_metrics(scores, TARGETS, k=1, threshold=0.5)
    with pytest.raises(ValueError, match="pass scores as well"):
        metrics.multilabel_metrics(SETS, TARGETS, k=1)
    with pytest.raises(ValueError, match="threshold needs floating-point predictions"):
        metrics.multilabel_metrics(SETS, TARGETS, scores=scores, threshold=0.5)
    with pytest.raises(ValueError, match="scores goes with bool predictions"):
        metrics.multilabel_metrics(scores, TARGETS, scores=scores, k=1)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            metrics.top_k_sets(scores, k)
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            metrics.map_at_k(scores, TARGETS, k)
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            metrics.multilabel_metrics(SETS, TARGETS, scores=scores, k=k)
    with pytest.raises(ValueError, match=r"threshold must be .* \[4\] like scores \[3, 4\].*\[3\]"):
        metrics.threshold_sets(scores, torch.zeros(3))
    with pytest.raises(ValueError, match="threshold must not be NaN"):
        metrics.threshold_sets(scores, NAN)
    with pytest.raises(ValueError, match="method must be all_point or 11_point, got 'voc'"):
        metrics.average_precision(scores, TARGETS, "voc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric must be O-F1, C-F1 or exact-match, got 'mAP'"):
        metrics.best_threshold(scores, TARGETS, "mAP")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric must be O-F1 or exact-match, got 'C-F1'"):
        metrics.best_k(scores, TARGETS, "C-F1")  # type: ignore[arg-type]


# Labels that are neither present nor absent.


def with_unknown(seed: int, images: int = 23, labels: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (images, labels), generator=generator) / 8  # with ties
    draw = torch.rand(images, labels, generator=generator)
    return scores, draw < 0.3, draw > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_unknown_pairs_are_left_out(seed):
    scores, targets, unknown = with_unknown(seed)
    measures = metrics.multilabel_metrics(scores, targets, threshold=0.5, unknown=unknown)
    per_label = metrics.per_label_metrics(scores >= 0.5, targets, scores=scores, unknown=unknown)
    known = ~unknown
    sets = scores >= 0.5
    expected = [
        average_precision_score(targets[known[:, i], i], scores[known[:, i], i]) for i in range(7)
    ]
    assert per_label["AP"].tolist() == pytest.approx(expected)
    assert measures["mAP"] == pytest.approx(sum(expected) / 7)
    assert measures["O-P"] == pytest.approx(precision_score(targets[known], sets[known]))
    assert measures["O-R"] == pytest.approx(recall_score(targets[known], sets[known]))
    precisions = [precision_score(targets[k, i], sets[k, i], zero_division=0)
                  for i, k in enumerate(known.T)]  # fmt: skip
    assert measures["C-P"] == pytest.approx(sum(precisions) / 7)
    assert measures["labels-unknown"] == int(unknown.sum())
    same = ((sets == targets) | unknown).all(1)
    assert measures["exact-match"] == pytest.approx(same.double().mean().item())
    assert measures["Hamming"] == pytest.approx(hamming_loss(targets[known], sets[known]))
    f1 = [f1_score(targets[k, i], sets[k, i]) for i, k in enumerate(known.T)]
    assert measures["macro-F1"] == pytest.approx(sum(f1) / 7)
    jaccard = [jaccard_score(targets[i, k], sets[i, k], zero_division=1)
               for i, k in enumerate(known)]  # fmt: skip
    assert measures["Jaccard"] == pytest.approx(sum(jaccard) / len(jaccard))


@pytest.mark.parametrize("seed", range(3))
def test_unknown_labels_take_no_rank(seed):
    """MAP@10 is that of a data set whose unknown labels do not exist, image by image."""
    scores, targets, unknown = with_unknown(seed, labels=20)
    values = [
        metrics.map_at_k(scores[i : i + 1, ~unknown[i]], targets[i : i + 1, ~unknown[i]], 10)
        for i in range(len(scores))
        if targets[i].any()
    ]
    measures = metrics.multilabel_metrics(scores, targets, unknown=unknown)
    assert measures["MAP@10"] == pytest.approx(sum(values) / len(values))
    values = [
        metrics.label_ranking_precision(
            scores[i : i + 1, ~unknown[i]], targets[i : i + 1, ~unknown[i]]
        )
        for i in range(len(scores))
        if targets[i].any()
    ]
    assert measures["LRAP"] == pytest.approx(sum(values) / len(values))


def test_unknown_labels_rank_behind_scores_of_minus_infinity():
    scores = torch.tensor([[2.0, 1.0, -math.inf]])
    targets = torch.tensor([[False, False, True]])
    unknown = torch.tensor([[True, True, False]])
    measures = metrics.multilabel_metrics(scores, targets, unknown=unknown)
    assert measures["MAP@10"] == measures["LRAP"] == 1.0
    tied = metrics.multilabel_metrics(torch.full_like(scores, -INF), targets, unknown=unknown)
    assert tied["LRAP"] == 1.0


def test_nothing_unknown_changes_nothing():
    scores, targets, _ = with_unknown(0)
    expected = metrics.multilabel_metrics(scores, targets, k=3)
    measures = metrics.multilabel_metrics(scores, targets, k=3, unknown=torch.zeros_like(targets))
    assert measures == {**expected, "labels-unknown": 0}


def test_unknown_is_checked():
    scores, targets, unknown = with_unknown(0)
    with pytest.raises(ValueError, match=r"unknown must be \[n, L\] bool like targets \[23, 7\]"):
        metrics.multilabel_metrics(scores, targets, unknown=unknown[:, 1:])
    with pytest.raises(ValueError, match=r"unknown must be .* torch.int64"):
        metrics.per_label_metrics(targets, targets, unknown=unknown.long())
    row, label = targets.nonzero()[0].tolist()
    with pytest.raises(ValueError, match=f"true and unknown, got label {label} in row {row}"):
        metrics.multilabel_metrics(scores, targets, unknown=targets)
