"""Measures a model or an ensemble on a dataset: every decision, and each label by itself."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import Backend, Calibration, OnBadImage, SearchConfig, SearchDevice
from cnnrnn.data import DataError, Dataset
from cnnrnn.machine.files import write_whole
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.metrics import per_label_metrics
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.features import Features, cached_features, compute_features
from cnnrnn.prediction.decisions import decided_sets, decision_metrics
from cnnrnn.reveal import metrics_of_others, reveal
from cnnrnn.search.device import require_search_device
from cnnrnn.search.inference import Inference


@dataclass(frozen=True)
class Evaluation:
    """A model's figures on one dataset.

    Attributes:
        metrics: by decision (`DECISIONS`, and two at k), then by metric.
        inference: what the model found in each image.
        targets: [n, L] bool, columns in path order.
        calibration: what decided.
        set_nll: [n] float64 -log P(the whole true set | image), in nats; NaN for images with
            unknown labels.
        nll_is_bound: these are upper bounds, since a set has further paths in the search's order.
        unknown: [n, L] bool, labels that are neither present nor absent, or None.
        others: `reveal.metrics_of_others` of the images in which labels were revealed, by what the
            model was told: `none known`, and `K known`. Empty where none were.
    """

    metrics: dict[str, dict[str, float]]
    inference: Inference
    targets: Tensor
    calibration: Calibration
    set_nll: Tensor
    nll_is_bound: bool
    unknown: Tensor | None = None
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def nll(self) -> float:
        """Mean of `set_nll` over the images without unknown labels; NaN where there is none."""
        return float(self.set_nll.nanmean())


def evaluate(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    *,
    k: int | None = 3,
    search: SearchConfig | None = None,
    min_labels: int | None = None,
    revealed: int | None = None,
    backend: Backend | None = None,
    search_device: SearchDevice = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
) -> Evaluation:
    """Run a model over a dataset and measure it.

    Args:
        model: where its weights are decides the device.
        dataset: pictures, or feature vectors for a model without a backbone; its label names must
            be among the model's, in any order, and those that it lacks have no positives.
        k: also measure sets cut to k labels.
        search: the model's own by default.
        min_labels: every set and every path has at least so many labels; 0 allows empty sets. None
            for what validation data decided, and the search's own.
        revealed: also draw so many true labels of each image that has more, and measure the other
            labels, with the drawn ones known and without.
        backend: what runs the backbone, as in `predict`; the model's own by default.
        search_device: where to search, as in `predict`.
        batch_size: pictures per step.
        workers: threads that decode; one per core by default, up to 8.
        on_bad_image: `skip` leaves unreadable pictures out and warns with their count.
        progress: told how many pictures are done.

    Raises:
        DataError: the dataset is empty, or has features of another kind or number than the model
            reads, or labels that the model lacks, or no image has more labels than are revealed.
        ValueError: `revealed` is below 1, or it cannot search on `search_device`.
    """
    _require_options(revealed, search_device)
    _require_images(dataset)
    model_columns(model, dataset)  # fails before features are made
    features = model_features(
        model, dataset, backend=backend, batch_size=batch_size, workers=workers,
        on_bad_image=on_bad_image, progress=progress,
    )  # fmt: skip
    return evaluate_features(
        model, dataset, features, k=k, search=search, min_labels=min_labels, revealed=revealed,
        search_device=search_device,
    )  # fmt: skip


def evaluate_features(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    features: Features,
    *,
    k: int | None = 3,
    search: SearchConfig | None = None,
    min_labels: int | None = None,
    revealed: int | None = None,
    search_device: SearchDevice = "auto",
) -> Evaluation:
    """Measure a model on features of a dataset's records, as `model_features` returns them.

    Other arguments, and errors, are those of `evaluate`.
    """
    _require_options(revealed, search_device)
    _require_images(dataset)
    columns = model_columns(model, dataset)
    targets = in_columns(dataset.label_matrix(), columns, len(model.labels))[features.kept]
    unknown = None
    if dataset.unknown_indices is not None:
        unknown = in_columns(dataset.unknown_matrix(), columns, len(model.labels))[features.kept]
    model.eval()
    calibration = model.calibration
    if min_labels is not None:
        calibration = replace(calibration, min_labels=min_labels)
        search = replace(search or model.search, min_labels=min_labels)
    values = features.values
    inference = model.infer(values.to(model.device), search, search_device=search_device)
    metrics = decision_metrics(inference, targets, calibration, k, unknown)
    known = torch.ones(len(targets), dtype=torch.bool) if unknown is None else ~unknown.any(1)
    set_nll = torch.full((len(targets),), math.nan, dtype=torch.float64)
    set_nll[known] = model.set_nll(values[known], targets[known])
    is_bound = model.search.order != "increasing"
    others = {}
    if revealed is not None:
        if int(targets.sum(1).max()) <= revealed:
            raise DataError(
                f"{dataset.source} must have images with more than {revealed} labels to reveal "
                f"{revealed}, got {int(targets.sum(1).max())} at most"
            )
        others = measure_others(
            model, values, targets, inference.mixed(calibration), revealed, columns,
            calibration=calibration, search=search, search_device=search_device, unknown=unknown,
        )  # fmt: skip
    return Evaluation(metrics, inference, targets, calibration, set_nll, is_bound, unknown, others)


def measure_others(
    model: CNNRNN | Ensemble,
    features: Tensor,
    targets: Tensor,
    scores: Tensor,
    revealed: int,
    columns: Sequence[int],
    *,
    calibration: Calibration,
    search: SearchConfig | None = None,
    search_device: SearchDevice = "auto",
    unknown: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Draw true labels of each image that has more, and measure the other labels.

    Args:
        model: in eval mode.
        features: [n, F].
        targets: [n, L] bool; at least one image has more than `revealed` labels.
        scores: [n, L] of the images with nothing known.
        revealed: labels that are drawn of each image.
        columns: the labels in an order that does not depend on the model; the same ones are drawn
            whatever order it has.
        calibration: mixes the scores.
        search: the model's own by default.
        search_device: where to search.
        unknown: [n, L] bool, labels that are neither present nor absent.

    Returns:
        `reveal.metrics_of_others` by what the model was told: `none known`, and `K known`.
    """
    draw = reveal(targets[:, columns], revealed)
    images = draw.images
    evidence = in_columns(draw.evidence, columns, targets.shape[1])
    scores = scores[images]
    given = model.infer(features[images].to(model.device), search, evidence, search_device)
    told = given.mixed(calibration)
    told = torch.where(told.isnan(), scores, told)  # where no path was found
    return {
        name: metrics_of_others(
            found, targets[images], evidence, unknown=None if unknown is None else unknown[images]
        )
        for name, found in (("none known", scores), (f"{revealed} known", told))
    }


def _require_images(dataset: Dataset) -> None:
    if not len(dataset):
        raise DataError(f"{dataset.source} has no images to evaluate on")


def _require_options(revealed: int | None, search_device: SearchDevice) -> None:
    if revealed is not None and revealed < 1:
        raise ValueError(f"revealed must be at least 1, got {revealed}")
    require_search_device(search_device)


def model_features(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    *,
    cache: Path | None = None,
    backend: Backend | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
) -> Features:
    """Return what a model's head reads of the records of a dataset.

    Args:
        model: where its weights are decides the device.
        dataset: pictures, or feature vectors for a model without a backbone.
        cache: folder that keeps features of pictures; None for none.
        backend: what runs the backbone, as in `predict`; the model's own by default.
        batch_size: pictures per step.
        workers: threads that decode; one per core by default, up to 8.
        on_bad_image: `skip` leaves unreadable pictures out and warns with their count.
        progress: told how many pictures are done.

    Raises:
        DataError: the dataset has features of another kind or number than the model reads.
    """
    if dataset.features is not None:
        if model.backbone is not None:
            raise DataError(f"{dataset.source} holds feature vectors, but the model reads pictures")
        features = torch.from_numpy(dataset.features)
        if features.shape[1] != model.feature_dim:
            raise DataError(
                f"{dataset.source} must hold vectors of {model.feature_dim} features like "
                f"those that the model was trained on, got {features.shape[1]}: for svmlight text "
                f"say features={model.feature_dim}, and first=0 or first=1"
            )
        return Features(features, np.arange(len(dataset)))
    if model.backbone is None:
        raise DataError(f"{dataset.source} holds pictures, but the model reads feature vectors")
    compute = compute_features if cache is None else partial(cached_features, folder=cache)
    return compute(
        model.backbone, dataset, device=model.device, backend=backend or model.backend,
        batch_size=batch_size, workers=workers, on_bad_image=on_bad_image, progress=progress,
    )  # fmt: skip


class ObjectRecall(NamedTuple):
    """Which objects were named, one entry for each image and label that has a box there.

    Attributes:
        images: [M] int64 records of the dataset.
        labels: [M] int64 indices of the dataset's labels.
        areas: [M] float32 area of the largest box of the label in the image, in square pixels.
        found: [M] bool, the label was predicted.
    """

    images: Tensor
    labels: Tensor
    areas: Tensor
    found: Tensor


def object_recall(sets: Tensor, dataset: Dataset) -> ObjectRecall:
    """Match predicted label sets with boxes, for recall against box area (section 4.5, figure 8).

    Args:
        sets: [n, L] bool, columns in the dataset's order.
        dataset: n pictures with boxes.

    Raises:
        DataError: the dataset has no boxes.
        ValueError: `sets` has another shape.
    """
    if dataset.boxes is None:
        raise DataError(f"{dataset.source} must have boxes to measure recall by their area")
    shape = (len(dataset), len(dataset.label_names))
    if sets.shape != shape:
        raise ValueError(f"sets must be {list(shape)}, got {list(sets.shape)}")
    boxes = dataset.boxes
    counts = torch.from_numpy(np.diff(boxes.indptr))
    images = torch.arange(len(dataset)).repeat_interleave(counts)
    labels = torch.from_numpy(boxes.label_indices.astype(np.int64))
    objects, of_box = (images * shape[1] + labels).unique(return_inverse=True)
    areas = torch.zeros(len(objects)).scatter_reduce(
        0, of_box, torch.from_numpy(boxes.xywh[:, 2] * boxes.xywh[:, 3]), "amax"
    )
    images, labels = objects // shape[1], objects % shape[1]
    return ObjectRecall(images, labels, areas, sets.cpu()[images, labels])


def model_columns(model: CNNRNN | Ensemble, dataset: Dataset) -> list[int]:
    """Return which of the model's labels each of the dataset's is."""
    position = {name: column for column, name in enumerate(model.labels)}
    others = [name for name in dataset.label_names if name not in position]
    if others:
        raise DataError(
            f"{dataset.source} must have labels that are among the model's {len(position)}, got "
            f"{len(others)} of {len(dataset.label_names)} that are not, such as {others[0]!a}: in "
            "svmlight text vocabulary=FILE names the labels"
        )
    return [position[name] for name in dataset.label_names]


def in_columns(matrix: Tensor, columns: Sequence[int], num_labels: int) -> Tensor:
    """Spread a matrix over the model's labels: [n, M] to [n, L], False or 0 in the others."""
    result = matrix.new_zeros(len(matrix), num_labels)
    result[:, list(columns)] = matrix
    return result


def write_per_label(path: Path, model: CNNRNN | Ensemble, evaluation: Evaluation) -> None:
    """Write precision, recall, F1 and AP of every label's best-path decisions as CSV.

    The last column, `calibrated`, is 0 for labels without a threshold of their own.
    """
    calibration = evaluation.calibration
    scores = evaluation.inference.mixed(calibration)
    sets = decided_sets("path", evaluation.inference, scores, calibration)
    rows = per_label_metrics(sets, evaluation.targets, scores=scores, unknown=evaluation.unknown)
    rows["calibrated"] = torch.ones(len(model.labels), dtype=torch.int64)
    rows["calibrated"][list(calibration.uncalibrated)] = 0
    write_per_label_csv(path, model.labels, rows)


def write_per_label_csv(
    path: str | os.PathLike[str], label_names: Sequence[str], per_label: dict[str, Tensor]
) -> None:
    """Write a table of per-label measures as CSV, one row per label.

    UTF-8, a header row `label,...` with the keys in their order, an empty cell for NaN. The file
    appears under its name only when it is complete.

    Args:
        path: the file to write; one that exists is replaced.
        label_names: [L] names for the first column.
        per_label: [L] tensors by column name, as `per_label_metrics` returns them.

    Raises:
        ValueError: when a column has not one value per label name.
    """
    for key, column in per_label.items():
        if column.shape != (len(label_names),):
            raise ValueError(
                f"per_label[{key!r}] must be [{len(label_names)}], one value per label name, "
                f"got {list(column.shape)}"
            )
    columns = [column.tolist() for column in per_label.values()]

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["label", *per_label])
            for name, *values in zip(label_names, *columns, strict=True):
                writer.writerow([name, *("" if math.isnan(value) else value for value in values)])

    write_whole(Path(path), write)
