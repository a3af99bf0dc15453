"""`predict`: images in, label sets out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnrnn.config import Decide, OnBadImage, SearchConfig
from cnnrnn.machine.devices import resolve_device, use_one_thread_if_forked
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.model.ensemble import Ensemble, load_model
from cnnrnn.prediction.decisions import Options
from cnnrnn.prediction.pipeline import Precision, TorchModel, predict_images
from cnnrnn.prediction.result import Prediction, decided_predictions

DEMO_MODEL = Path(__file__).parent / "scenes_model"


def predict(
    images: Any,
    model: CNNRNN | Ensemble | str | Path | None = None,
    *,
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
    on_bad_image: OnBadImage = "error",
) -> list[Prediction]:
    """Predict the label set of each image, in the order given.

    Args:
        images: a path, a folder, a PIL image, an array [H, W, 3] or [B, H, W, 3] of uint8 RGB, a
            tensor [3, H, W] or [B, 3, H, W] of uint8 or of float in 0..1, or a list of these. A
            folder stands for the pictures in it and below, sorted by path.
        model: a model, an ensemble, a checkpoint folder, or None for the small demo model.
        top_k: keep at most this many labels, those with the best scores.
        beam_size: N, 1 to 16; the model's own by default.
        min_labels: every set has at least so many labels, and shorter label paths are forbidden;
            0 allows empty sets. None for what validation data decided: 1 where no image there is
            without labels.
        decide: `path` takes the best path's labels; `threshold` those whose score reaches the
            threshold chosen on validation data, `label_thresholds` each label's own; `k` the
            number of best-scored labels chosen there; `f1` the set with the best expected F1 over
            the sets found.
        threshold: overrides that threshold, and implies `decide="threshold"`.
        batch_size: images per step.
        device: `cpu`, `cuda`, `cuda:N` or `auto`; None leaves a model where it is, and puts a
            checkpoint on the `auto` device.
        workers: threads that decode, while on a CPU as many batches are computed at once, as far as
            torch has threads; 0 does all in the calling thread. None has one per core, up to 8,
            and 0 for an iterator, so that a batch is answered before more is taken from it.
        precision: of the backbone. `bf16` is faster where the hardware has it, and moves scores
            by up to some hundredths; `auto` is bf16 there and fp32 elsewhere.
        compiled: run the backbone through torch.compile, which takes a minute at the first batch.
        on_bad_image: `error` stops at an unreadable image, `skip` gives it a prediction without
            labels and with `.error`.

    Returns:
        One `Prediction` per image.

    Raises:
        TypeError: `images` holds something else.
        ValueError: an array or tensor has another shape or type, or options do not fit.
        BadImageError: an image cannot be read.
    """
    return list(
        predict_iter(
            images,
            model,
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
            on_bad_image=on_bad_image,
        )
    )


def predict_iter(
    images: Any,
    model: CNNRNN | Ensemble | str | Path | None = None,
    *,
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
    on_bad_image: OnBadImage = "error",
) -> Iterator[Prediction]:
    """Predict image after image, holding a few batches at a time; arguments as in `predict`.

    `images` may also be any iterable of single images, such as a generator that never ends. With
    `workers` up to three batches, and on a CPU one for each thread of torch, are taken ahead of the
    prediction that is returned.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be error or skip, got {on_bad_image!r}")
    options = Options(top_k, decide if threshold is None else "threshold", threshold, min_labels)
    classifier = resolve_model(model, device)
    if classifier.backbone is None:
        raise ValueError(
            "this model was trained on feature vectors and reads no images; "
            "use model.predict_features(features)"
        )
    search = _search_of(classifier, beam_size, min_labels)
    running = TorchModel(classifier, search, precision, compiled)
    return predict_images(
        images, running, options, batch_size=batch_size, workers=workers, on_bad_image=on_bad_image
    )


def predict_features(
    features: Tensor | np.ndarray[Any, Any],
    model: CNNRNN | Ensemble | str | Path,
    *,
    top_k: int | None = None,
    beam_size: int | None = None,
    min_labels: int | None = None,
    decide: Decide = "path",
    threshold: float | None = None,
) -> list[Prediction]:
    """Predict label sets of feature vectors [B, F]; other arguments as in `predict`."""
    options = Options(top_k, decide if threshold is None else "threshold", threshold, min_labels)
    classifier = resolve_model(model, None)
    search = _search_of(classifier, beam_size, min_labels)
    batch = torch.as_tensor(features).to(classifier.device, torch.float32)
    use_one_thread_if_forked()
    inference = classifier.infer(batch, search)
    return decided_predictions(inference, tuple(classifier.labels), classifier.calibration, options)


def load(path: str | Path | None = None) -> CNNRNN | Ensemble:
    """Load a checkpoint folder of a model or an ensemble, or the small demo model.

    Args:
        path: a folder written by `model.save`, `ensemble.save` or training; None for the demo model
            that comes with the package, which knows only the labels of the synthetic scenes.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        CheckpointError: the folder is missing or does not hold a checkpoint.
    """
    if path is None:
        _say_once_what_the_demo_model_knows()
        return load_checkpoint(DEMO_MODEL)
    return load_model(path)


@functools.cache
def _say_once_what_the_demo_model_knows() -> None:
    import sys

    print(
        "cnnrnn: no model named, so the demo model answers; it knows only the labels of the "
        "synthetic scenes (sky, sea, boat, ...). Train your own with `cnnrnn train`.",
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


def _search_of(
    model: CNNRNN | Ensemble, beam_size: int | None, min_labels: int | None
) -> SearchConfig:
    options = {"beam_size": beam_size, "min_labels": min_labels}
    changes: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    return replace(model.search, **changes)
