"""The calls with a model named: `load`, `predict` and what goes with it; `train` and `evaluate`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import (
    MAX_PIXELS,
    Backend,
    Decide,
    ModelConfig,
    OnBadImage,
    Precision,
    SearchConfig,
    SearchDevice,
    TrainConfig,
)
from cnnrnn.data import Dataset
from cnnrnn.data.splits import describe_splits
from cnnrnn.evaluation import Evaluation
from cnnrnn.evaluation import evaluate as measure
from cnnrnn.machine.devices import resolve_device
from cnnrnn.machine.distributed import join
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.model.ensemble import Ensemble, load_model
from cnnrnn.model.shipped import SHIPPED
from cnnrnn.prediction.known import Names
from cnnrnn.prediction.result import Prediction

_log = logging.getLogger(__name__)

DEMO_MODEL = SHIPPED["scenes"].folder


def predict(
    images: Any,
    model: CNNRNN | Ensemble | str | Path | None = None,
    *,
    known: Names = (),
    absent: Names = (),
    top_k: int | None = None,
    beam_size: int | None = None,
    min_labels: int | None = None,
    decide: Decide = "path",
    threshold: float | None = None,
    batch_size: int = 64,
    device: str | None = None,
    workers: int | None = None,
    precision: Precision = "fp32",
    compiled: bool = False,
    backend: Backend | None = None,
    search_device: SearchDevice = "auto",
    on_bad_image: OnBadImage = "error",
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Predict the label set of each image, in the order given.

    `model` is a model, an ensemble, a checkpoint folder, `animals` for the model of photographs
    that comes with the package, or None for the small demo model; what is loaded here goes to the
    `auto` device unless `device` names another. `Predictor.predict` has the other arguments and the
    errors.
    """
    return list(
        predict_iter(
            images,
            model,
            known=known,
            absent=absent,
            top_k=top_k,
            beam_size=beam_size,
            min_labels=min_labels,
            decide=decide,
            threshold=threshold,
            batch_size=batch_size,
            device=device,
            workers=workers,
            precision=precision,
            compiled=compiled,
            backend=backend,
            search_device=search_device,
            on_bad_image=on_bad_image,
            max_pixels=max_pixels,
        )
    )


def predict_iter(
    images: Any,
    model: CNNRNN | Ensemble | str | Path | None = None,
    *,
    known: Names = (),
    absent: Names = (),
    top_k: int | None = None,
    beam_size: int | None = None,
    min_labels: int | None = None,
    decide: Decide = "path",
    threshold: float | None = None,
    batch_size: int = 64,
    device: str | None = None,
    workers: int | None = None,
    precision: Precision = "fp32",
    compiled: bool = False,
    backend: Backend | None = None,
    search_device: SearchDevice = "auto",
    on_bad_image: OnBadImage = "error",
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """Predict image after image, holding a few batches at a time; see `Predictor.predict_iter`."""
    return resolve_model(model, device).predict_iter(
        images,
        known=known,
        absent=absent,
        top_k=top_k,
        beam_size=beam_size,
        min_labels=min_labels,
        decide=decide,
        threshold=threshold,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        compiled=compiled,
        backend=backend,
        search_device=search_device,
        on_bad_image=on_bad_image,
        max_pixels=max_pixels,
    )


def predict_features(
    features: Tensor | np.ndarray[Any, Any],
    model: CNNRNN | Ensemble | str | Path,
    *,
    known: Names = (),
    absent: Names = (),
    top_k: int | None = None,
    beam_size: int | None = None,
    min_labels: int | None = None,
    decide: Decide = "path",
    threshold: float | None = None,
    device: str | None = None,
    search_device: SearchDevice = "auto",
) -> list[Prediction]:
    """Predict label sets of feature vectors [B, F]; see `Predictor.predict_features`."""
    return resolve_model(model, device).predict_features(
        features,
        known=known,
        absent=absent,
        top_k=top_k,
        beam_size=beam_size,
        min_labels=min_labels,
        decide=decide,
        threshold=threshold,
        search_device=search_device,
    )


def train(
    dataset: Dataset,
    *,
    out: str | Path,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    search: SearchConfig | None = None,
    resume: bool = False,
    say: Callable[[str], None] = _log.info,
) -> CNNRNN:
    """Train a model, as `cnnrnn train` does one; under torchrun in several processes.

    Args:
        dataset: images with their labels, made by `Dataset`; these or features, of `load_dataset`.
        out: folder for the run; created if missing.
        model: the architecture; by default `ModelConfig()`.
        train: the recipe; by default `TrainConfig()`.
        search: the search; by default `SearchConfig()`.
        resume: resume after the last epoch that the run in `out` finished, or start it.
        say: gets what each split is used for, a line per epoch and notable facts; by default they
            are logged.

    Returns:
        The model of the best epoch, calibrated, in eval mode; it is also in `out/best`.

    Raises:
        DataError: the data lacks a usable training split.
        ValueError: the options leave nothing to train, or do not fit the data.
        ResumeError: the run in `out` cannot be resumed with these options and data.
        NonFiniteLossError: the loss is no longer finite.
        ModuleNotFoundError: an option needs an extra that is not installed.
    """
    from cnnrnn.training.run import train as train_run

    config = train or TrainConfig()
    with join(resolve_device(config.device)) as ranks:
        result = train_run(
            dataset,
            Path(out),
            model or ModelConfig(),
            search or SearchConfig(),
            config,
            resume=resume,
            on_start=lambda: say(describe_splits(dataset, config)),
            say=say,
            ranks=ranks,
        )
    return result.model


def evaluate(
    dataset: Dataset,
    model: CNNRNN | Ensemble | str | Path,
    *,
    split: str | None = None,
    device: str | None = None,
    k: int | None = 3,
    search: SearchConfig | None = None,
    min_labels: int | None = None,
    revealed: int | None = None,
    backend: Backend | None = None,
    search_device: SearchDevice = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
) -> Evaluation:
    """Measure a model on labelled images or features, as `cnnrnn evaluate` does.

    Args:
        dataset: of `load_dataset` or made by `Dataset`, which take `max_pixels`.
        model: a model, an ensemble or a checkpoint folder; what is loaded here goes to the `auto`
            device unless `device` names another.
        split: of the dataset; all of it by default.
        device: where to run.
        k: also measure sets cut to k labels.
        search: the model's own by default.
        min_labels: every set and every path has at least so many labels; None for what validation
            data decided, and the search's own.
        revealed: also draw so many true labels of each image that has more, and measure the other
            labels, with the drawn ones known and without.
        backend: what runs the backbone, as in `predict`; the model's own by default.
        search_device: where to search, as in `predict`.
        batch_size: images per step.
        workers: threads that decode; one per core by default, up to 8.
        on_bad_image: `skip` leaves unreadable images out and warns with their count.

    Returns:
        `metrics` by decision and metric, `nll` and more.

    Raises:
        DataError: the dataset is empty, or does not fit the model.
        ValueError: `revealed` is below 1, or it cannot search on `search_device`.
    """
    return measure(
        resolve_model(model, device),
        dataset if split is None else dataset.split(split),
        k=k, search=search, min_labels=min_labels, revealed=revealed, backend=backend,
        search_device=search_device, batch_size=batch_size, workers=workers,
        on_bad_image=on_bad_image,
    )  # fmt: skip


def load(
    path: str | Path | None = None, *, device: str = "cpu", backend: Backend = "auto"
) -> CNNRNN | Ensemble:
    """Load a checkpoint folder of a model or an ensemble, or the small demo model.

    Args:
        path: a folder written by `model.save`, `ensemble.save` or training; `animals` for the model
            of photographs that comes with the package; None for its demo model, which knows only
            the labels of the synthetic scenes.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        backend: what runs the backbone where `predict` and others are not told, see
            `Predictor.predict`.

    Returns:
        The model on that device, in eval mode.

    Raises:
        CheckpointError: the folder is missing or does not hold a checkpoint.
        ValueError: the device does not exist here, or the backend is none.
    """
    where = resolve_device(device)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if path is None:
        _say_once_what_the_demo_model_knows()
        model: CNNRNN | Ensemble = load_checkpoint(DEMO_MODEL)
    else:
        model = load_model(path)
    model.backend = backend
    return model.to(where)


@functools.cache
def _say_once_what_the_demo_model_knows() -> None:
    import sys

    print(
        "cnnrnn: no model named, so the demo model answers; it knows only the labels of the "
        "synthetic scenes (sky, sea, boat, ...). For photographs of animals name the model "
        '"animals"; train your own with `cnnrnn train`.',
        file=sys.stderr,
    )


@functools.cache
def _demo_model() -> CNNRNN | Ensemble:
    with torch.inference_mode(False):  # it outlives the caller's mode
        return load()


def resolve_model(
    model: CNNRNN | Ensemble | str | Path | None, device: str | None
) -> CNNRNN | Ensemble:
    """Return a model in eval mode from a model, a checkpoint folder or None."""
    if isinstance(model, (CNNRNN, Ensemble)):
        classifier = model
    else:
        classifier = _demo_model() if model is None else load(model)
        device = device or "auto"
    if device is not None:
        classifier = classifier.to(resolve_device(device))
    return classifier.eval()
