"""Measures of multi-label classification: tensors in, numbers out.

Sizes: n images, L labels. Unless a function says otherwise, `scores` are [n, L] floating point and
higher is better, infinities allowed, NaN not; `targets`, the true sets, are [n, L] bool or 0/1
integers; other sets and `unknown` labels are [n, L] bool. Equal scores rank by label index, lower
first. Arguments are checked: wrong shapes, types, values and options, and no image where something
is measured, are a `ValueError` that names them.

C-* averages over labels, O-* pools all (image, label) pairs (Wang et al., CVPR 2016, section 4).
The definitions that the paper leaves open:

- C-P averages over all L labels; a label that is never predicted has precision 0 and counts.
- C-R, macro-F1 and mAP average over the labels that have positives; the others are left out and
  counted.
- C-F1 is the harmonic mean of C-P and C-R, as in the paper's tables; macro-F1 is the mean of each
  label's own F1.
- MAP@k and LRAP average over the images that have labels; AP@k divides by min(k, labels of the
  image).
- O-P with nothing predicted, O-R and O-F1 without any positive are 0.
- A label that is unknown in an image, such as VOC's difficult ones, counts neither as present nor
  as absent: a prediction of it is neither right nor wrong, and its score is in no ranking.
- An average over nothing (C-R, C-F1, macro-F1, mAP, MAP@k and LRAP where no image has a label) is
  NaN.

Sums are in float64, on the device of the first argument; the others are moved there.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cnnrnn.labels import check_unknown

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def top_k_sets(scores: Tensor, k: int) -> Tensor:
    """Return the k best-scored labels of every image, all of them where k is more than L."""
    scores = _checked_scores(scores)
    _check_k(k)
    return _first_k_as_sets(_ranking(scores), k)


def cut_to_k(sets: Tensor, scores: Tensor, k: int) -> Tensor:
    """Keep at most the k best-scored members of each set; nothing is checked."""
    return _first_k_members(sets, _ranking(scores), k)


def at_least(sets: Tensor, scores: Tensor, count: int) -> Tensor:
    """Add to each set of fewer than `count` labels its best-scored others, or all there are."""
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    ranking = _ranking(_checked_scores(scores, like=sets))
    others = ~sets.gather(1, ranking)
    missing = (count - sets.sum(1, keepdim=True)).clamp(min=0)
    added = others & (others.cumsum(1) <= missing)
    return sets | torch.zeros_like(sets).scatter_(1, ranking, added)


def threshold_sets(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """Return the labels whose score is at least the threshold.

    Args:
        scores: of the labels.
        threshold: one number, or [L] one per label; rounded to the type of `scores`, so that
            a float32 score of 0.7 reaches the threshold 0.7.
    """
    scores = _checked_scores(scores)
    cut = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
    num_labels = scores.shape[1]
    if isinstance(threshold, Tensor) and threshold.shape != (num_labels,):
        raise ValueError(
            f"threshold must be a number or [L] = [{num_labels}] like scores "
            f"{list(scores.shape)}, got {list(threshold.shape)}"
        )
    if bool(cut.isnan().any()):
        raise ValueError("threshold must not be NaN")
    return scores >= cut


def best_threshold(
    scores: Tensor,
    targets: Tensor,
    metric: Literal["O-F1", "C-F1", "exact-match"] = "O-F1",
    min_labels: int = 0,
    unknown: Tensor | None = None,
) -> tuple[float, float]:
    """Find the one threshold for all labels that gives the best O-F1, C-F1 or exact match.

    Every distinct outcome of `threshold_sets` that names a label is tried: a cut lies midway
    between two adjacent distinct scores, the last one at the lowest score. Of equally good cuts the
    highest is taken. Without positives F1 is 0, and the highest score is returned. O(nL log nL).

    Args:
        scores: of the labels; one column calibrates one label.
        targets: the true sets.
        metric: what to maximise.
        min_labels: sets of fewer labels are filled up, see `at_least`.
        unknown: labels that are neither present nor absent; they fill sets up, and count nowhere.

    Returns:
        The threshold, exact in the type of `scores`, and the metric's value with it.
    """
    if metric not in ("O-F1", "C-F1", "exact-match"):
        raise ValueError(f"metric must be O-F1, C-F1 or exact-match, got {metric!r}")
    scores, targets = _checked(scores, targets)
    unknown = _checked_unknown(unknown, targets)
    if min_labels:
        # A label that is in the set under every cut counts as if it had the highest score of all.
        always = at_least(torch.zeros_like(targets), scores, min_labels)
        scores = torch.where(always, scores.max(), scores)

    known = scores.flatten() if unknown is None else scores[~unknown]
    if not len(known):
        raise ValueError("there is nothing to choose by: no label of any image is known")
    sorted_scores = known.sort().values
    if metric != "exact-match" and not bool(targets.any()):
        return float(sorted_scores[-1]), 0.0
    if metric == "O-F1":
        cuts, values = _o_f1_at_cuts(sorted_scores, scores[targets].sort().values)
    elif metric == "C-F1":
        cuts, values = _c_f1_at_cuts(scores, targets, unknown)
    else:
        cuts, values = _exact_match_at_cuts(scores, targets, unknown)
    best = int(values.argmax())  # the first, highest, of equally good cuts
    upper = float(cuts[best])
    below = int(torch.searchsorted(sorted_scores, cuts[best]))  # known scores under the cut
    if below == 0:
        return upper, float(values[best])
    lower = float(sorted_scores[below - 1])
    middle = torch.tensor(upper / 2 + lower / 2, dtype=scores.dtype).item()
    # Rounding (neighbouring floats) or infinities may put the middle on the wrong side.
    return (middle if lower < middle <= upper else upper), float(values[best])


def best_label_thresholds(
    scores: Tensor,
    targets: Tensor,
    otherwise: float,
    at_least: int = 1,
    unknown: Tensor | None = None,
) -> Tensor:
    """Return the threshold of each label that gives its best F1, [L] in the type of `scores`.

    Args:
        scores: of the labels.
        targets: the true sets.
        otherwise: the threshold of labels with fewer positives than `at_least`, for which there is
            nothing to choose by.
        at_least: positives that a threshold of its own takes.
        unknown: labels that are neither present nor absent; they count nowhere.
    """
    scores, targets = _checked(scores, targets)
    unknown = _checked_unknown(unknown, targets)
    thresholds = torch.full_like(scores[0], otherwise)
    for label in (targets.sum(0) >= max(at_least, 1)).nonzero()[:, 0].tolist():
        column = slice(label, label + 1)
        hidden = None if unknown is None else unknown[:, column]
        thresholds[label], _ = best_threshold(scores[:, column], targets[:, column], unknown=hidden)
    return thresholds


def best_k(
    scores: Tensor,
    targets: Tensor,
    metric: Literal["O-F1", "exact-match"] = "O-F1",
    unknown: Tensor | None = None,
) -> tuple[int, float]:
    """Find the number of labels per image, 1..L, that gives the best O-F1, or exact match.

    Args:
        scores: of the labels.
        targets: the true sets.
        metric: what to maximise.
        unknown: labels that are neither present nor absent; they are among the k, and count
            nowhere.

    Returns:
        The smallest of equally good k, and the metric that `top_k_sets` gives with it.
    """
    if metric not in ("O-F1", "exact-match"):
        raise ValueError(f"metric must be O-F1 or exact-match, got {metric!r}")
    scores, targets = _checked(scores, targets)
    unknown = _checked_unknown(unknown, targets)
    ranking = _ranking(scores)
    ranked = targets.gather(1, ranking)
    known = torch.ones_like(ranked) if unknown is None else ~unknown.gather(1, ranking)
    if metric == "O-F1":
        correct, predicted = ranked.sum(0).cumsum(0), known.sum(0).cumsum(0)  # [L] by k - 1
        values = _f1(correct, predicted, correct[-1])
    else:
        found, sizes = ranked.cumsum(1), targets.sum(1, keepdim=True)
        whole = (found == sizes) & (known.cumsum(1) == sizes)
        values = whole.sum(0).double() / len(scores)
    best = int(values.argmax())  # the first of equal maxima
    return best + 1, float(values[best])


def average_precision(
    scores: Tensor,
    targets: Tensor,
    method: Literal["all_point", "11_point"] = "all_point",
    unknown: Tensor | None = None,
) -> Tensor:
    """Return the average precision of every label: [L] float64, NaN for one without positives.

    Images of equal score enter together: precision and recall are taken at distinct scores only,
    so the order of the images does not matter. `all_point` is the sum over those points of
    precision times the rise in recall, as scikit-learn's `average_precision_score`. `11_point` is
    the measure of PASCAL VOC 2007 (Everingham et al., IJCV 2010, section 4.2): the mean over
    t = 0, 0.1 ... 1 of the highest precision at recall >= t, compared exactly. Images of which a
    label is unknown are left out of its ranking.
    """
    if method not in ("all_point", "11_point"):
        raise ValueError(f"method must be all_point or 11_point, got {method!r}")
    scores, targets = _checked(scores, targets)
    unknown = _checked_unknown(unknown, targets)
    all_point, eleven_point = _average_precisions(scores, targets, unknown)
    return all_point if method == "all_point" else eleven_point


def map_at_k(scores: Tensor, targets: Tensor, k: int = 10) -> float:
    """Return the mean over images of AP@k, the average precision of the k best-scored labels.

    AP@k of an image with g labels is the sum over ranks i <= k that hold a true label of the
    precision among the first i, divided by min(k, g). Images without labels are left out; without
    any other the mean is NaN.
    """
    scores, targets = _checked(scores, targets)
    _check_k(k)
    return _map_at_k(_ranking(scores), targets, k)


def label_ranking_precision(scores: Tensor, targets: Tensor) -> float:
    """Return the label ranking average precision (LRAP), NaN where no image has a label.

    The mean over images of the mean over their true labels j of (true labels that score at least
    as much as j) / (labels that score at least as much as j), j itself counted. Equal scores share
    the worst of their ranks, as in scikit-learn's `label_ranking_average_precision_score`, which
    counts an image without labels as 1 and does not leave it out.
    """
    scores, targets = _checked(scores, targets)
    return _label_ranking_precision(scores, targets, _ranking(scores))


def multilabel_metrics(
    predictions: Tensor,
    targets: Tensor,
    *,
    scores: Tensor | None = None,
    k: int | None = None,
    threshold: float | Tensor | None = None,
    unknown: Tensor | None = None,
) -> dict[str, float]:
    """Measure predicted label sets, or scores, against the true sets.

    Keys about sets: `C-P`, `C-R`, `C-F1`, `O-P`, `O-R`, `O-F1` (definitions at the head of this
    module; in particular C-P averages over all L labels, and one never predicted counts as 0),
    `macro-F1` (mean over labels of the label's F1), `exact-match` (share of images whose whole set
    is right), `example-F1` and `Jaccard` (mean over images of the F1 of the image's set A, and of
    |A and B| / |A or B| with the true set B; 1 where both are empty), `Hamming` (the loss: share of
    wrong pairs of image and label, those that are unknown left out), and the counts
    `labels-never-predicted` and `mean-labels-predicted`.
    Keys about the ranking: `MAP@10`, `mAP`, `mAP-11pt`, and `LRAP`, see `label_ranking_precision`.
    Keys about the data: `images`, `images-without-labels`, `labels-without-positives`,
    `mean-labels-true`, and with `unknown` also `labels-unknown`, the pairs of image and label.

    Args:
        predictions: [n, L], either bool, the sets as they are, or floating point, scores that
            become sets by exactly one of `k` and `threshold`; with neither, the keys about sets
            are absent.
        targets: the true sets.
        scores: with bool predictions only: the ranking. Without it the keys about the ranking are
            absent.
        k: at most this many labels per image, the best-scored ones; bool sets are cut down to
            it (they need `scores`), never filled up.
        threshold: one number or [L], with floating-point predictions only.
        unknown: labels that are neither present nor absent; none of them is in `targets`. Sets
            are cut to `k` before these are taken out.

    Returns:
        The measures as fractions of 1 (not percent), the counts as whole numbers.
    """
    targets = _checked_targets(targets, predictions, "predictions")
    unknown = _checked_unknown(unknown, targets)
    if k is not None:
        _check_k(k)
    sets: Tensor | None = None
    ranking: Tensor | None = None
    if predictions.dtype == torch.bool:
        if threshold is not None:
            raise ValueError("threshold needs floating-point predictions, got bool sets")
        if k is not None and scores is None:
            raise ValueError("k cuts bool sets down by score: pass scores as well")
        sets = predictions
        if scores is not None:
            scores = _checked_scores(scores, like=predictions)
            ranking = _ranking(scores)
            if k is not None:
                sets = _first_k_members(sets, ranking, k)
    else:
        if scores is not None:
            raise ValueError(
                "scores goes with bool predictions; floating-point predictions are the scores"
            )
        if k is not None and threshold is not None:
            raise ValueError(f"pass k or threshold, not both, got k={k} and threshold={threshold}")
        scores = _checked_scores(predictions, name="predictions")
        ranking = _ranking(scores)
        if k is not None:
            sets = _first_k_as_sets(ranking, k)
        elif threshold is not None:
            sets = threshold_sets(scores, threshold)

    measures: dict[str, float] = {}
    if sets is not None:
        if unknown is not None:
            sets = sets & ~unknown
        measures |= _set_measures(sets, targets, unknown)
    if scores is not None and ranking is not None:
        all_point, eleven_point = _average_precisions(scores, targets, unknown)
        measures |= {
            "MAP@10": _map_at_k(_behind(ranking, unknown), targets, 10),
            "mAP": float(all_point.nanmean()),
            "mAP-11pt": float(eleven_point.nanmean()),
            "LRAP": _label_ranking_precision(scores, targets, ranking, unknown),
        }
    measures["images"] = len(targets)
    measures["images-without-labels"] = int((~targets.any(1)).sum())
    measures["labels-without-positives"] = int((~targets.any(0)).sum())
    if sets is not None:
        measures["labels-never-predicted"] = int((~sets.any(0)).sum())
        measures["mean-labels-predicted"] = int(sets.sum()) / len(sets)
    measures["mean-labels-true"] = int(targets.sum()) / len(targets)
    if unknown is not None:
        measures["labels-unknown"] = int(unknown.sum())
    return measures


def per_label_metrics(
    predictions: Tensor,
    targets: Tensor,
    *,
    scores: Tensor | None = None,
    unknown: Tensor | None = None,
) -> dict[str, Tensor]:
    """Measure every label by itself.

    Args:
        predictions: the predicted sets.
        targets: the true sets.
        scores: the ranking for AP; without it there is none.
        unknown: labels that are neither present nor absent.

    Returns:
        [L] tensors. float64: `precision` (0 for a label never predicted), `recall`, `F1`, and
        with scores `AP` and `AP-11pt` (NaN for a label without positives, all but precision).
        int64: `positives`, `predicted`, `correct`.
    """
    targets = _checked_targets(targets, predictions, "predictions")
    if predictions.dtype != torch.bool:
        raise ValueError(f"predictions must be [n, L] bool sets, got {predictions.dtype}")
    unknown = _checked_unknown(unknown, targets)
    per_label = _per_label(predictions if unknown is None else predictions & ~unknown, targets)
    if scores is not None:
        per_label["AP"], per_label["AP-11pt"] = _average_precisions(
            _checked_scores(scores, like=predictions), targets, unknown
        )
    return per_label


def _checked(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Check both; the targets come as bool on the device of the scores."""
    scores = _checked_scores(scores)
    return scores, _checked_targets(targets, scores, "scores")


def _checked_scores(scores: Tensor, name: str = "scores", like: Tensor | None = None) -> Tensor:
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(
            f"{name} must be [n, L] floating point, got {list(scores.shape)} {scores.dtype}"
        )
    if like is not None:
        if scores.shape != like.shape:
            raise ValueError(
                f"{name} must be [n, L] like predictions {list(like.shape)}, "
                f"got {list(scores.shape)}"
            )
        scores = scores.to(like.device)
    scores = scores.detach()
    rows_with_nan = scores.isnan().any(1).nonzero()
    if len(rows_with_nan):
        raise ValueError(f"{name} must not be NaN, first found in row {int(rows_with_nan[0])}")
    return scores


def _checked_targets(targets: Tensor, like: Tensor, like_name: str) -> Tensor:
    """Check targets against predictions or scores; the result is [n, L] bool on their device."""
    if like.dim() != 2:
        raise ValueError(f"{like_name} must be [n, L], got {list(like.shape)}")
    if targets.shape != like.shape:
        raise ValueError(
            f"targets must be [n, L] bool like {like_name} {list(like.shape)}, "
            f"got {list(targets.shape)}"
        )
    if 0 in targets.shape:
        raise ValueError(
            f"there is nothing to measure: targets must be [n, L] with n, L >= 1, "
            f"got {list(targets.shape)}"
        )
    targets = targets.to(like.device)
    if targets.dtype == torch.bool:
        return targets
    if targets.dtype not in _INTEGERS:
        raise ValueError(f"targets must be bool or 0/1 integers, got {targets.dtype}")
    wrong = targets[(targets != 0) & (targets != 1)]
    if len(wrong):
        raise ValueError(f"targets must be bool or 0/1 integers, got the value {int(wrong[0])}")
    return targets.bool()


def _checked_unknown(unknown: Tensor | None, targets: Tensor) -> Tensor | None:
    """Check unknown labels against checked targets; None where there is none."""
    if unknown is None:
        return None
    unknown = unknown.to(targets.device)
    check_unknown(unknown, targets)
    return unknown


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _ranking(scores: Tensor) -> Tensor:
    """[n, L] label indices, best first; stable, so that ties go to the lower index."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def _behind(ranking: Tensor, unknown: Tensor | None) -> Tensor:
    """Put unknown labels behind all others of a ranking, also behind those of score -inf."""
    if unknown is None:
        return ranking
    last = unknown.gather(1, ranking).byte().sort(dim=1, stable=True).indices
    return ranking.gather(1, last)


def _first_k_as_sets(ranking: Tensor, k: int) -> Tensor:
    sets = torch.zeros_like(ranking, dtype=torch.bool)
    return sets.scatter_(1, ranking[:, :k], True)


def _first_k_members(sets: Tensor, ranking: Tensor, k: int) -> Tensor:
    """Keep at most the k best-ranked members of each set."""
    members = sets.gather(1, ranking)
    kept = members & (members.cumsum(1) <= k)
    return torch.zeros_like(sets).scatter_(1, ranking, kept)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide counts in float64, where a zero denominator comes with a zero numerator: 0."""
    return numerator.double() / denominator.clamp(min=1)


def _f1(correct: Tensor, predicted: Tensor, positives: Tensor) -> Tensor:
    """The harmonic mean of correct / predicted and correct / positives."""
    return _ratio(2 * correct, predicted + positives)


def _per_label(sets: Tensor, targets: Tensor) -> dict[str, Tensor]:
    correct = (sets & targets).sum(0)
    predicted = sets.sum(0)
    positives = targets.sum(0)
    absent = positives == 0
    return {
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, positives).masked_fill(absent, math.nan),
        "F1": _f1(correct, predicted, positives).masked_fill(absent, math.nan),
        "positives": positives,
        "predicted": predicted,
        "correct": correct,
    }


def _set_measures(sets: Tensor, targets: Tensor, unknown: Tensor | None = None) -> dict[str, float]:
    """Measure sets; neither they nor the targets hold an unknown label."""
    per_label = _per_label(sets, targets)
    class_precision = float(per_label["precision"].mean())
    class_recall = float(per_label["recall"].nanmean())
    class_sum = class_precision + class_recall

    correct, predicted, positives = (
        per_label[key].sum() for key in ("correct", "predicted", "positives")
    )

    set_sizes, target_sizes, shared = sets.sum(1), targets.sum(1), (sets & targets).sum(1)
    either = set_sizes + target_sizes - shared
    image_f1 = _f1(shared, set_sizes, target_sizes).masked_fill(either == 0, 1.0)
    jaccard = _ratio(shared, either).masked_fill(either == 0, 1.0)
    wrong = (sets ^ targets).sum().double()
    pairs = targets.numel() - (0 if unknown is None else int(unknown.sum()))
    return {
        "C-P": class_precision,
        "C-R": class_recall,
        "C-F1": 2 * class_precision * class_recall / class_sum if class_sum != 0 else 0.0,
        "O-P": float(_ratio(correct, predicted)),
        "O-R": float(_ratio(correct, positives)),
        "O-F1": float(_f1(correct, predicted, positives)),
        "macro-F1": float(per_label["F1"].nanmean()),
        "exact-match": float((sets == targets).all(1).double().mean()),
        "example-F1": float(image_f1.mean()),
        "Jaccard": float(jaccard.mean()),
        "Hamming": float(wrong / pairs),
    }


def _map_at_k(ranking: Tensor, targets: Tensor, k: int) -> float:
    hits = targets.gather(1, ranking[:, :k])  # [n, min(k, L)]
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(1).double() / ranks
    sizes = targets.sum(1)
    image_ap = (precision * hits).sum(1) / sizes.clamp(max=k)
    return float(image_ap[sizes > 0].mean())


def _label_ranking_precision(
    scores: Tensor, targets: Tensor, ranking: Tensor, unknown: Tensor | None = None
) -> float:
    hits = targets.gather(1, ranking)
    ranked = torch.ones_like(hits) if unknown is None else ~unknown.gather(1, ranking)
    falling = -scores.gather(1, ranking)
    ends = torch.searchsorted(falling, falling, right=True) - 1  # of each run of equal scores
    precision = _ratio(hits.cumsum(1), ranked.cumsum(1)).gather(1, ends)
    sizes = targets.sum(1)
    return float(_ratio((precision * hits).sum(1), sizes)[sizes > 0].mean())


def _counts_at_positives(sorted_scores: Tensor, positive_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Count what scores at least as much as each positive, itself and ties included.

    Args:
        sorted_scores: [m] all scores, ascending.
        positive_scores: [p] the scores of the positives, ascending.

    Returns:
        [p] positives and [p] of all, that is `correct` and `predicted` of a cut there.
    """
    correct = len(positive_scores) - torch.searchsorted(positive_scores, positive_scores)
    predicted = len(sorted_scores) - torch.searchsorted(sorted_scores, positive_scores)
    return correct, predicted


def _o_f1_at_cuts(sorted_scores: Tensor, positive_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return cuts, falling, and the O-F1 of each: [p] and [p] float64.

    A cut that ends in a run without positives only adds errors: cuts at the positives will do.
    Arguments as of `_counts_at_positives`.
    """
    correct, predicted = _counts_at_positives(sorted_scores, positive_scores)
    return positive_scores.flip(0), _f1(correct, predicted, correct[0]).flip(0)


def _c_f1_at_cuts(scores: Tensor, targets: Tensor, unknown: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the distinct scores, falling, and the C-F1 of a cut at each: [m] and [m] float64.

    As the cut falls, each score that it passes changes the precision and recall of one label:
    sums over labels are running sums of those changes. An unknown label changes neither.
    """
    num_labels = scores.shape[1]
    columns, of_image = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, of_image)
    known = torch.ones_like(hits) if unknown is None else ~unknown.gather(0, of_image)
    precision = _ratio(hits.cumsum(0), known.cumsum(0))
    precision_change = precision.diff(dim=0, prepend=precision.new_zeros(1, num_labels))
    positives = targets.sum(0)
    recall_change = _ratio(hits, positives)

    cuts, order = columns.flatten().sort(descending=True)
    class_precision = precision_change.flatten()[order].cumsum(0) / num_labels
    class_recall = recall_change.flatten()[order].cumsum(0) / (positives > 0).sum()
    complete = torch.ones_like(cuts, dtype=torch.bool)  # equal scores enter together
    complete[:-1] = cuts[:-1] != cuts[1:]
    class_precision, class_recall = class_precision[complete], class_recall[complete]
    total = class_precision + class_recall
    f1 = torch.where(total > 0, 2 * class_precision * class_recall / total, 0.0)
    return cuts[complete], f1


def _exact_match_at_cuts(
    scores: Tensor, targets: Tensor, unknown: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the distinct scores, falling, and the exact match of a cut at each: [m] and [m].

    An image's set is right where the cut is above the scores of all its absent labels and not above
    that of any present one: the rest is counting.
    """
    not_absent = targets if unknown is None else targets | unknown
    absent = scores.masked_fill(not_absent, -torch.inf).amax(1)
    present = scores.masked_fill(~targets, torch.inf).amin(1)
    has_absent = ~not_absent.all(1)  # where not, the cut may be as low as it will
    possible = (absent < present) | ~has_absent
    lowest, highest = absent[possible & has_absent].sort().values, present[possible].sort().values
    cuts = scores.unique().flip(0)
    low_enough = len(highest) - torch.searchsorted(highest, cuts)
    too_low = len(lowest) - torch.searchsorted(lowest, cuts)
    return cuts, (low_enough - too_low).double() / len(scores)


def _average_precisions(
    scores: Tensor, targets: Tensor, unknown: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All-point and 11-point average precision, each [L] float64; unknown pairs are left out."""
    num_labels = scores.shape[1]
    all_point = scores.new_full((num_labels,), math.nan, dtype=torch.float64)
    eleven_point = all_point.clone()
    columns, truths = scores.T.contiguous(), targets.T.contiguous()
    sorted_columns = columns.sort(dim=1).values
    tenths = torch.arange(10, -1, -1, device=scores.device)
    for label in truths.any(1).nonzero().squeeze(1).tolist():
        positive_scores = columns[label][truths[label]].sort().values
        sorted_scores = sorted_columns[label]
        if unknown is not None and bool(unknown[:, label].any()):
            sorted_scores = columns[label][~unknown[:, label]].sort().values
        correct, predicted = _counts_at_positives(sorted_scores, positive_scores)
        precision = correct.double() / predicted
        # Recall rises by 1 / positives at each positive, so the area is the mean precision there.
        all_point[label] = precision.mean()
        # Ascending scores are falling recall: the running maximum is over all recalls >= this one,
        # and the last positive with recall >= t has it. Compared in whole numbers.
        reached = torch.searchsorted(-10 * correct, -tenths * len(correct), right=True) - 1
        eleven_point[label] = precision.cummax(0).values[reached].mean()
    return all_point, eleven_point
