"""What a report shows of a model on a dataset, as numbers; figures and page are made of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import SearchDevice
from cnnrnn.data import Dataset
from cnnrnn.data.thumbnails import thumbnail_uri
from cnnrnn.evaluation import (
    Evaluation,
    evaluate_features,
    measure_others,
    model_columns,
)
from cnnrnn.inspection.report.statistics import (
    Pairs,
    Reliability,
    in_two_dimensions,
    pairs,
    precision_recall,
    reliability,
)
from cnnrnn.inspection.suspects import Suspects, find_suspects
from cnnrnn.metrics import per_label_metrics
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.features import Features
from cnnrnn.network.joint_space import label_vectors, nearest
from cnnrnn.prediction.decisions import decided_sets

MISTAKES = 24
SUSPECTS = 24
SUSPECTS_AMONG = 5_000
KNOWN_AMONG = 2_000
"""Images of which labels are revealed, and of which labels are judged: a sample of larger data."""
POOLED = 20_000_000
"""Scores that are ranked together; of more, those of a sample of the images."""
MOST_KNOWN = 3
LABELS_ON_MAP = 80
LABELS_IN_TABLE = 2_000
NEAREST = 5
THUMBNAIL = 144  # pixels, of the longer side: 4 to 6 kB


class LabelRow(NamedTuple):
    """One label's figures; NaN where it has no positives.

    Attributes:
        name: of the label.
        positives: images that have it.
        predicted: images whose best path has it.
        precision: of the best paths.
        recall: of the best paths.
        f1: of the best paths.
        ap: average precision of the scores.
        curve: [p, 2] points of recall and precision of the scores.
        threshold: its own, or the common one.
        calibrated: it has one of its own.
        nearest: the labels next to it in the joint space.
    """

    name: str
    positives: int
    predicted: int
    precision: float
    recall: float
    f1: float
    ap: float
    curve: Tensor
    threshold: float
    calibrated: bool
    nearest: tuple[str, ...]


class Mistake(NamedTuple):
    """An image whose decided set the model finds much more probable than the true one.

    Attributes:
        name: of the image or row.
        thumbnail: data URI, or None.
        found: true labels in the decided set.
        missed: true labels that are not.
        wrong: labels of the decided set that are not true.
        p_decided: probability of the decided set; None where a set has several paths.
        p_true: probability of the true set; likewise.
    """

    name: str
    thumbnail: str | None
    found: tuple[str, ...]
    missed: tuple[str, ...]
    wrong: tuple[str, ...]
    p_decided: float | None
    p_true: float | None


class Suspicious(NamedTuple):
    """A label of a record that is probably wrong; see `Suspect`.

    Attributes:
        name: of the image or row.
        thumbnail: data URI, or None.
        label: its name.
        given: `present` or `absent`, what the data says.
        others: the record's other labels.
        probability: of the other answer, given all other labels.
    """

    name: str
    thumbnail: str | None
    label: str
    given: str
    others: tuple[str, ...]
    probability: float


class Known(NamedTuple):
    """How much better the other labels are found once some are known.

    Attributes:
        known: true labels told of each image.
        images: how many have more labels than that.
        before: `reveal.metrics_of_others` of the same labels, none told.
        after: with those labels told.
    """

    known: int
    images: int
    before: dict[str, float]
    after: dict[str, float]


class LabelMap(NamedTuple):
    """The labels in the plane, by the directions of their embeddings.

    Attributes:
        names: of the labels shown.
        places: [M, 2] float64.
        counts: [M] positives of each.
        share: of the variance that the plane holds.
    """

    names: tuple[str, ...]
    places: Tensor
    counts: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Findings:
    """What a report shows.

    Attributes:
        facts: the run in five lines, as pairs of title and text.
        epochs: records of the training log, in turn; empty without one.
        evaluation: every decision measured.
        labels: a row per label; of many, those with the most positives.
        pooled: [p, 2] recall and precision over all labels together.
        pooled_among: of how many images.
        decisions: recall and precision of each decision over all labels together.
        of_scores: scores against labels.
        of_sets: probabilities of the decided sets against whether they are right; None where a path
            has no probability of its own.
        pairs: of labels.
        sizes: how many sets have 0, 1, ... labels, [most + 1], by `true` and decision.
        mistakes: the worst.
        images_wrong: how many decided sets are wrong.
        images_known: among how many images, those without unknown labels.
        suspects: the most suspicious labels.
        suspects_found: how many labels look wrong.
        suspects_among: how many images were judged; 0 where the model cannot.
        known: gains by known labels.
        known_among: of how many images they were drawn.
        map: of the labels, or None for an ensemble.
        notes: what a reader must know, by section.
    """

    facts: list[tuple[str, str]]
    epochs: list[dict[str, Any]]
    evaluation: Evaluation
    labels: list[LabelRow]
    pooled: Tensor
    pooled_among: int
    decisions: dict[str, tuple[float, float]]
    of_scores: Reliability
    of_sets: Reliability | None
    pairs: Pairs
    sizes: dict[str, Tensor]
    mistakes: list[Mistake]
    images_wrong: int
    images_known: int
    suspects: list[Suspicious]
    suspects_found: int
    suspects_among: int
    known: list[Known]
    known_among: int
    map: LabelMap | None
    notes: dict[str, str] = field(default_factory=dict)


def find(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    features: Features,
    *,
    log: Path | None = None,
    search_device: SearchDevice = "auto",
) -> Findings:
    """Measure a model for a report.

    Args:
        model: where its weights are decides the device.
        dataset: as in `evaluate`.
        features: what `model_features` returns of it.
        log: the `log.jsonl` of the run, or None.
        search_device: as in `evaluate`.

    Raises:
        DataError: as in `evaluate`.
    """
    evaluation = evaluate_features(model, dataset, features, search_device=search_device)
    data = dataset if len(features.kept) == len(dataset) else dataset.select(features.kept)
    features = Features(features.values, np.arange(len(data)))
    targets, inference = evaluation.targets, evaluation.inference
    known = ~_unknown(evaluation)
    scores = inference.mixed(evaluation.calibration)
    some = torch.from_numpy(_sample(len(targets), max(1, POOLED // len(model.labels))))
    sets = decided_sets("path", inference, scores, evaluation.calibration)
    log_probs = None
    if model.search.order == "increasing":
        log_probs = -model.set_nll(features.values, sets)
    map_, near = _label_map(model, targets)
    suspects = _suspects(model, data, features)
    notes: dict[str, str] = {}
    if len(data) < len(dataset):
        notes["unread"] = (
            f"{len(dataset) - len(data):,} of {len(dataset):,} images could not be read and are "
            "left out."
        )
    lacking = len(model.labels) - len(dataset.label_names)
    if lacking:
        notes["lacking"] = (
            f"The data has {lacking} of the model's {len(model.labels)} labels not at all: they "
            "count as absent everywhere."
        )
    if suspects is None:
        notes["suspects"] = (
            "Suspected labels need a model whose paths go in the order increasing: "
            f"this one's is {model.search.order}."
        )
    return Findings(
        facts=_facts(model, data, evaluation),
        epochs=_epochs(log),
        evaluation=evaluation,
        labels=_label_rows(model, evaluation, scores, sets, near),
        pooled=precision_recall(scores[some][known[some]], targets[some][known[some]]),
        pooled_among=len(some),
        decisions={
            name: (values["O-R"], values["O-P"]) for name, values in evaluation.metrics.items()
        },
        of_scores=reliability(scores[known], targets[known]),
        of_sets=None if log_probs is None else _set_reliability(evaluation, sets, log_probs),
        pairs=pairs(targets, sets & known),
        sizes=_sizes(evaluation, scores, sets),
        mistakes=_mistakes(model, data, evaluation, sets, log_probs),
        images_wrong=int(((sets != targets).any(1) & known.all(1)).sum()),
        images_known=int(known.all(1).sum()),
        suspects=[] if suspects is None else _suspicious(suspects),
        suspects_found=0 if suspects is None else len(suspects),
        suspects_among=0 if suspects is None else len(suspects.dataset),
        known=_known(model, data, features, evaluation, scores, search_device),
        known_among=min(len(data), KNOWN_AMONG),
        map=map_,
        notes=notes,
    )


def _unknown(evaluation: Evaluation) -> Tensor:
    unknown = evaluation.unknown
    return torch.zeros_like(evaluation.targets) if unknown is None else unknown


def _facts(
    model: CNNRNN | Ensemble, data: Dataset, evaluation: Evaluation
) -> list[tuple[str, str]]:
    """Say in five lines what was measured."""
    one = model.models[0] if isinstance(model, Ensemble) else model
    name = "feature vectors" if model.backbone is None else model.backbone.name
    size = "" if model.backbone is None else f", {model.backbone.preprocessing.image_size} pixels"
    members = f"ensemble of {len(model.members)}, " if isinstance(model, Ensemble) else ""
    head, search = one.head, model.search
    weights = sum(p.numel() for p in head.parameters())
    best = evaluation.metrics["path"]
    bound = "at most " if evaluation.nll_is_bound else ""
    return [
        ("Model", f"{members}{name}{size}; {len(model.labels):,} labels"),
        ("Head", f"{head.cell} cell, H = {head.hidden_dim}, D = {head.joint_dim}, "
                 f"{'with' if head.label_classifier is not None else 'without'} the chain term; "
                 f"{weights:,} weights"),
        ("Search", f"{search.beam_size} paths of at most {one.longest_path(search)} labels, "
                   f"order {search.order}"),
        ("Data", f"{data.source}: {len(data):,} images, "
                 f"{best['mean-labels-true']:.2f} labels an image"),
        ("Result", f"mAP {fixed(100 * best['mAP'], 1)}, O-F1 {fixed(100 * best['O-F1'], 1)} and "
                   f"whole sets right {fixed(100 * best['exact-match'], 1)} per cent by the best "
                   f"path; NLL {bound}{fixed(evaluation.nll, 2)} nats"),
    ]  # fmt: skip


def fixed(value: float, digits: int) -> str:
    """Write a number, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _epochs(log: Path | None) -> list[dict[str, Any]]:
    """Return the epochs of a log; of one that is damaged, those before the damage."""
    if log is None or not log.is_file():
        return []
    epochs: list[dict[str, Any]] = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            epochs.append(record)
    return epochs


def _label_rows(
    model: CNNRNN | Ensemble,
    evaluation: Evaluation,
    scores: Tensor,
    sets: Tensor,
    near: list[tuple[str, ...]],
) -> list[LabelRow]:
    targets, unknown, calibration = evaluation.targets, evaluation.unknown, evaluation.calibration
    figures = per_label_metrics(sets, targets, scores=scores, unknown=unknown)
    uncalibrated = set(calibration.uncalibrated)
    cuts = calibration.label_thresholds
    shown = figures["positives"].sort(descending=True, stable=True).indices[:LABELS_IN_TABLE]
    rows = []
    for label in shown.tolist():
        known = slice(None) if unknown is None else ~unknown[:, label]
        rows.append(
            LabelRow(
                model.labels[label],
                int(figures["positives"][label]),
                int(figures["predicted"][label]),
                float(figures["precision"][label]),
                float(figures["recall"][label]),
                float(figures["F1"][label]),
                float(figures["AP"][label]),
                precision_recall(scores[known, label], targets[known, label]),
                cuts[label] if cuts else calibration.threshold,
                bool(cuts) and label not in uncalibrated,
                near[label] if near else (),
            )
        )
    return rows


def _set_reliability(evaluation: Evaluation, sets: Tensor, log_probs: Tensor) -> Reliability:
    """Compare the probabilities of decided sets with whether they are the true ones."""
    whole = ~_unknown(evaluation).any(1)
    right = (sets == evaluation.targets).all(1)
    return reliability(log_probs[whole].exp(), right[whole])


def _sizes(evaluation: Evaluation, scores: Tensor, sets: Tensor) -> dict[str, Tensor]:
    cut = decided_sets("threshold", evaluation.inference, scores, evaluation.calibration)
    counts = {
        name: found.sum(1)
        for name, found in (("true", evaluation.targets), ("path", sets), ("threshold", cut))
    }
    most = max(int(found.max()) for found in counts.values())
    return {name: torch.bincount(found, minlength=most + 1) for name, found in counts.items()}


def _mistakes(
    model: CNNRNN | Ensemble,
    data: Dataset,
    evaluation: Evaluation,
    sets: Tensor,
    log_probs: Tensor | None,
) -> list[Mistake]:
    """Return the images of which the model is surest, and wrong.

    Without probabilities of sets, those with the most wrong labels.
    """
    targets, unknown = evaluation.targets, _unknown(evaluation)
    differing = (sets != targets).sum(1).masked_fill(unknown.any(1), 0)
    gaps = differing.double() if log_probs is None else log_probs + evaluation.set_nll
    gaps = gaps.masked_fill(differing == 0, -math.inf).nan_to_num(-math.inf)
    found = []
    for image in gaps.topk(min(MISTAKES, int((differing > 0).sum()))).indices.tolist():
        true, decided = targets[image], sets[image]
        found.append(
            Mistake(
                data.record_name(image),
                _thumbnail(data, image),
                _names(model.labels, true & decided),
                _names(model.labels, true & ~decided),
                _names(model.labels, decided & ~true),
                None if log_probs is None else math.exp(float(log_probs[image])),
                None if log_probs is None else math.exp(-float(evaluation.set_nll[image])),
            )
        )
    return found


def _names(labels: tuple[str, ...], chosen: Tensor) -> tuple[str, ...]:
    return tuple(labels[i] for i in chosen.nonzero()[:, 0].tolist())


def _thumbnail(data: Dataset, image: int) -> str | None:
    if data.images is None:
        return None
    return thumbnail_uri(data.images[image], THUMBNAIL, data.max_pixels)


def _sample(count: int, most: int) -> np.ndarray[Any, Any]:
    """Return the numbers of all of `count` images, or of `most` of them, drawn evenly."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _suspects(model: CNNRNN | Ensemble, data: Dataset, features: Features) -> Suspects | None:
    if model.search.order != "increasing":
        return None
    chosen = _sample(len(data), SUSPECTS_AMONG)
    part = Features(features.values[torch.from_numpy(chosen)], np.arange(len(chosen)))
    return find_suspects(model, data.select(chosen), features=part)


def _suspicious(suspects: Suspects) -> list[Suspicious]:
    data, rows = suspects.dataset, []
    first = zip(suspects, suspects.records.tolist(), range(SUSPECTS), strict=False)
    for suspect, record, _ in first:
        others = (data.label_names[label] for label in data.labels(record).tolist())
        odds = suspect.log_odds if suspect.given == "absent" else -suspect.log_odds
        rows.append(
            Suspicious(
                suspect.image,
                _thumbnail(data, record),
                suspect.label,
                suspect.given,
                tuple(name for name in others if name != suspect.label),
                1 / (1 + math.exp(-odds)),
            )
        )
    return rows


def _known(
    model: CNNRNN | Ensemble,
    data: Dataset,
    features: Features,
    evaluation: Evaluation,
    scores: Tensor,
    search_device: SearchDevice,
) -> list[Known]:
    """Reveal 1, 2, ... labels of a sample, as far as there are images with more."""
    chosen = torch.from_numpy(_sample(len(data), KNOWN_AMONG))
    targets, unknown = evaluation.targets[chosen], evaluation.unknown
    largest = int(targets.sum(1).max())
    rows = []
    for count in range(1, min(MOST_KNOWN, largest - 1) + 1):
        before, after = measure_others(
            model, features.values[chosen], targets, scores[chosen], count,
            model_columns(model, data), calibration=evaluation.calibration,
            search_device=search_device, unknown=None if unknown is None else unknown[chosen],
        ).values()  # fmt: skip
        rows.append(Known(count, int(after["images"]), before, after))
    return rows


def _label_map(
    model: CNNRNN | Ensemble, targets: Tensor
) -> tuple[LabelMap | None, list[tuple[str, ...]]]:
    """Lay the labels out in the plane; return also the nearest labels of each."""
    if isinstance(model, Ensemble):
        return None, []
    rows = label_vectors(model.head).cpu()
    counts = targets.sum(0)
    shown = counts.sort(descending=True, stable=True).indices[:LABELS_ON_MAP]
    places, share = in_two_dimensions(rows[shown])
    _, near = nearest(rows, rows, NEAREST, are_labels=True)
    names = [tuple(model.labels[i] for i in row) for row in (shown.tolist(), *near.tolist())]
    return LabelMap(names[0], places, counts[shown], share), names[1:]
