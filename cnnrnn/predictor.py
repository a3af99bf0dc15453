"""Images in, label sets out: reading, batching, deciding, streaming."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.classifier import CNNRNN, load_checkpoint
from cnnrnn.config import DECISIONS, Calibration, Decide, OnBadImage, Preprocessing, SearchConfig
from cnnrnn.data import BadImageError, DataError
from cnnrnn.data.images import decode_image, normalize, to_rgb, to_tensor
from cnnrnn.decisions import Inference, decided_sets
from cnnrnn.ensemble import Ensemble, load_model
from cnnrnn.fit import resolve_device
from cnnrnn.labels import PAD
from cnnrnn.metrics import cut_to_k
from cnnrnn.search import NonFiniteError

DEMO_MODEL = Path(__file__).parent / "scenes_model"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_WORKERS = 8
Precision = Literal["fp32", "bf16", "auto"]
_pil_lock = threading.Lock()  # Pillow loads an image lazily, and one image may come twice
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def use_one_thread_if_forked() -> None:
    """Keep torch from waiting for its parent's threads, which are not in a forked process."""
    if _forked:
        torch.set_num_threads(1)


_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What the model says of one image; a view of its batch, nothing is copied until asked.

    Attributes:
        source: the image's path, or its position in what was passed.
        error: why the image could not be read, under `on_bad_image="skip"`; then there are no
            labels.
    """

    source: str
    error: str | None = None
    _names: tuple[str, ...] = ()
    _batch: _Batch | None = None
    _row: int = 0

    def __repr__(self) -> str:
        if self._batch is None:
            return f"Prediction({self.source!r}, error={self.error!r})"
        return f"Prediction({self.source!r}, labels={self.labels}, log_prob={self.log_prob:.4f})"

    @property
    def labels(self) -> list[str]:
        """Names of the decided label set, in path order."""
        if self._batch is None:
            return []
        return [self._names[i] for i in self._batch.sets[self._row].nonzero()[:, 0].tolist()]

    @property
    def log_prob(self) -> float:
        """Log-probability of the best path; NaN for an image that could not be read."""
        return float(self._paths()[1][0]) if self._batch is not None else float("nan")

    @property
    def scores(self) -> dict[str, float]:
        """Each label's score in 0..1: its marginal over paths, mixed as the model was calibrated.

        Thresholds apply to this score.
        """
        if self._batch is None:
            return {}
        return dict(zip(self._names, self._batch.scores[self._row].tolist(), strict=True))

    @property
    def paths(self) -> list[tuple[tuple[str, ...], float]]:
        """The N best label paths with their log-probabilities, best first."""
        if self._batch is None:
            return []
        labels, log_probs = self._paths()
        return [
            (tuple(self._names[i] for i in path if i != PAD), log_prob)
            for path, log_prob in zip(labels.tolist(), log_probs.tolist(), strict=True)
            if log_prob != -torch.inf
        ]

    @property
    def sets(self) -> list[tuple[frozenset[str], float]]:
        """Distinct label sets with their probabilities, best first; orders of one set add up."""
        if self._batch is None:
            return []
        result, row = self._batch.inference.result_of(self._row)
        return [
            (frozenset(self._names[i] for i in labels), probability)
            for labels, probability in result.label_sets(row)
        ]

    def _paths(self) -> tuple[Tensor, Tensor]:
        assert self._batch is not None
        result, row = self._batch.inference.result_of(self._row)
        return result.labels[row], result.log_probs[row]


@dataclass(frozen=True, eq=False)
class _Batch:
    inference: Inference
    sets: Tensor  # [m, L] bool
    scores: Tensor  # [m, L]


@dataclass(frozen=True)
class _Item:
    """One image on its way: a uint8 or float tensor [3, S, S], or why there is none."""

    source: str
    image: Tensor | None
    error: str | None = None


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
        min_labels: forbid shorter label paths.
        decide: `path` takes the best path's labels; `threshold` those whose score reaches the
            threshold chosen on validation data, `label_thresholds` each label's own; `k` the
            number of best-scored labels chosen there.
        threshold: overrides that threshold, and implies `decide="threshold"`.
        batch_size: images per step.
        device: `cpu`, `cuda`, `cuda:N` or `auto`; None leaves a model where it is, and puts a
            checkpoint on the `auto` device.
        workers: threads that decode; 0 decodes in the calling one. None has one per core, up to 8,
            and 0 for an iterator, so that a batch is answered before more is taken from it.
        precision: of the backbone. `bf16` is twice as fast where the hardware has it, and moves
            scores by about a hundredth; `auto` is bf16 there and fp32 elsewhere.
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
    `workers` up to four batches are taken ahead of the prediction that is returned.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be error or skip, got {on_bad_image!r}")
    options = Options(top_k, decide if threshold is None else "threshold", threshold)
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
    options = Options(top_k, decide if threshold is None else "threshold", threshold)
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


@dataclass(frozen=True)
class Options:
    """How label sets are decided; see `predict`."""

    top_k: int | None
    decide: Decide
    threshold: float | None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite number, got {self.threshold}")
        if self.decide not in DECISIONS:
            raise ValueError(f"decide must be one of {', '.join(DECISIONS)}, got {self.decide!r}")


def _search_of(
    model: CNNRNN | Ensemble, beam_size: int | None, min_labels: int | None
) -> SearchConfig:
    options = {"beam_size": beam_size, "min_labels": min_labels}
    changes: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    return replace(model.search, **changes)


class ImageModel(Protocol):
    """What `predict_images` needs of a model, whatever runs it."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in path order."""

    @property
    def calibration(self) -> Calibration:
        """Thresholds, k and mixing weight."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns a decoded picture into the model's input."""

    def begin(self, images: list[Tensor]) -> Callable[[], Inference]:
        """Start on images, each uint8 or float in 0..1 of [3, S, S], on the CPU or a GPU.

        Returns:
            What ends it; raises NonFiniteError for images whose values are not finite.
        """


class TorchModel:
    """A model whose backbone torch runs.

    Args:
        model: has a backbone, in eval mode.
        search: the options of the search.
        precision: of the backbone.
        compiled: compile the backbone with torch.compile, once per model.
    """

    def __init__(
        self,
        model: CNNRNN | Ensemble,
        search: SearchConfig,
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        assert model.backbone is not None
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be fp32, bf16 or auto, got {precision!r}")
        self.labels = tuple(model.labels)
        self.calibration: Calibration = model.calibration
        self.preprocessing = model.backbone.preprocessing
        self._model = model
        self._search = search
        self._backbone = _compiled(model.backbone) if compiled else model.backbone
        self._half = precision == "bf16" or (precision == "auto" and _has_bf16(model.device))

    @torch.no_grad()
    def begin(self, images: list[Tensor]) -> Callable[[], Inference]:
        """Run the backbone, which a GPU does while the caller goes on."""
        features = self.features(images)
        return lambda: self._model.infer(features, self._search)

    @torch.no_grad()
    def features(self, images: list[Tensor]) -> Tensor:
        """Return the backbone's features [n, F] of images, as `ImageModel.begin` takes them."""
        device = self._model.device
        parts = [torch.stack(images)] if _alike(images) else [image[None] for image in images]
        batch = torch.cat([normalize(part.to(device), self.preprocessing) for part in parts])
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            features: Tensor = self._backbone(batch)
        return features.float()


def _alike(images: list[Tensor]) -> bool:
    return len({(image.dtype, image.device) for image in images}) == 1


def _has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_compiled_backbones: weakref.WeakKeyDictionary[nn.Module, Callable[[Tensor], Tensor]] = (
    weakref.WeakKeyDictionary()
)


def _compiled(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    if backbone not in _compiled_backbones:
        _compiled_backbones[backbone] = torch.compile(backbone)
    return _compiled_backbones[backbone]


def predict_images(
    images: Any,
    model: ImageModel,
    options: Options,
    *,
    batch_size: int,
    workers: int | None,
    on_bad_image: OnBadImage,
) -> Iterator[Prediction]:
    """Decode in threads, run the model, search and decide, one batch ahead of another."""
    if not _is_known(images):
        raise TypeError(
            "images must be a path, a folder, a PIL image, an array, a tensor, or a list of "
            f"these, got {type(images).__name__}"
        )
    if workers is None:
        workers = 0 if isinstance(images, Iterator) else min(usable_cores(), MAX_WORKERS)
    elif workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    items = mapped_in_order(
        lambda numbered: _item(*numbered, model.preprocessing, on_bad_image),
        enumerate(_singles(images)),
        workers=workers,
        ahead=2 * batch_size,
    )
    return _stream(items, model, options, batch_size, ahead=1 if workers else 0)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


In = TypeVar("In")
Out = TypeVar("Out")


def mapped_in_order(
    function: Callable[[In], Out], items: Iterable[In], *, workers: int, ahead: int
) -> Generator[Out, None, None]:
    """Yield function(item) of each item in order, computed in threads.

    Args:
        function: called in a thread, or with 0 workers in the caller's.
        items: advanced in the caller's thread.
        workers: threads.
        ahead: at most so many items are taken before their turn.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Out]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(workers, "cnnrnn-decode") as pool:
        try:
            failure = None
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except Exception as error:  # what came before it is answered first
                    failure = error
                    break
                pending.append(pool.submit(function, item))
                while pending and (len(pending) > ahead or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            if failure is not None:
                raise failure
        finally:
            for future in pending:
                future.cancel()


def _stream(
    items: Generator[_Item, None, None],
    model: ImageModel,
    options: Options,
    batch_size: int,
    ahead: int,
) -> Iterator[Prediction]:
    """Begin so many batches ahead of the one that is searched: on a GPU the two overlap."""
    use_one_thread_if_forked()
    begun: deque[tuple[list[_Item], Callable[[], Inference] | None]] = deque()
    failure: Exception | None = None
    try:
        while failure is None:
            group: list[_Item] = []
            try:
                group.extend(itertools.islice(items, batch_size))
            except Exception as error:  # what came before it is answered first
                failure = error
            if group:
                images = [item.image for item in group if item.image is not None]
                begun.append((group, model.begin(images) if images else None))
            elif failure is None:
                break
            if len(begun) > ahead:
                yield from _decided_group(*begun.popleft(), model, options)
        while begun:
            yield from _decided_group(*begun.popleft(), model, options)
        if failure is not None:
            raise failure
    finally:
        items.close()


def _decided_group(
    group: list[_Item],
    finish: Callable[[], Inference] | None,
    model: ImageModel,
    options: Options,
) -> Iterator[Prediction]:
    decided = None
    if finish is not None:
        try:
            decided = _decided(finish(), model.calibration, options)
        except NonFiniteError as error:
            names = [item.source for item in group if item.image is not None]
            named = ", ".join(names[i] for i in error.images[:8])
            raise ValueError(
                f"the model gives values that are not finite for {len(error.images)} images "
                f"({named}); check its weights"
            ) from error
    row = 0
    for item in group:
        if item.image is None:
            yield Prediction(item.source, item.error)
            continue
        yield Prediction(item.source, None, model.labels, decided, row)
        row += 1


def _decided(inference: Inference, calibration: Calibration, options: Options) -> _Batch:
    scores = inference.mixed(calibration.mix_weight)
    if options.threshold is not None:
        calibration = replace(calibration, threshold=options.threshold)
    sets = decided_sets(options.decide, inference.sets, scores, calibration)
    if options.top_k is not None:
        sets = cut_to_k(sets, scores, options.top_k)
    return _Batch(inference, sets, scores)


def decided_predictions(
    inference: Inference, labels: tuple[str, ...], calibration: Calibration, options: Options
) -> list[Prediction]:
    """Return the predictions of feature vectors, named by their rows."""
    decided = _decided(inference, calibration, options)
    return [Prediction(str(row), None, labels, decided, row) for row in range(len(decided.sets))]


def _item(
    position: int, image: Any, preprocessing: Preprocessing, on_bad_image: OnBadImage
) -> _Item:
    source = str(image) if isinstance(image, (str, Path)) else str(position)
    if isinstance(image, (str, Path, Image.Image)):
        try:
            rgb = (
                _from_pil(image, position)
                if isinstance(image, Image.Image)
                else decode_image(image)
            )
            return _Item(source, to_tensor(rgb, preprocessing))
        except BadImageError as error:
            if on_bad_image == "error":
                raise
            return _Item(source, None, str(error))
    if isinstance(image, np.ndarray):
        return _Item(source, to_tensor(_from_array(image, position), preprocessing))
    if isinstance(image, Tensor):
        return _Item(source, _from_tensor(image, position, preprocessing))
    raise TypeError(
        f"image {position} must be a path, PIL image, array or tensor, got {type(image).__name__}"
    )


def _singles(images: Any) -> Iterator[Any]:
    """Take folders, batches and lists apart into single images, in order."""
    if isinstance(images, (str, Path)):
        path = Path(images)
        yield from folder_images(path) if path.is_dir() else (path,)
    elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (Image.Image, np.ndarray, Tensor)):
        yield images
    elif _is_list(images):
        for image in images:
            yield from _singles(image) if _is_known(image) else (image,)


def _is_known(images: Any) -> bool:
    return isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)) or _is_list(images)


def _is_list(images: Any) -> bool:
    """Whether something is iterated over; the bytes of a file or a mapping's keys are a mistake."""
    return isinstance(images, Iterable) and not isinstance(images, (bytes, bytearray, Mapping, Set))


def folder_images(folder: Path) -> list[Path]:
    """Return the pictures in a folder and below, by their suffix, sorted by path.

    Raises:
        DataError: there is none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not found:
        raise DataError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _from_pil(image: Image.Image, position: int) -> Image.Image:
    try:
        if 0 in image.size:
            raise ValueError(f"{image.width}x{image.height} pixels")
        with _pil_lock:
            return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a file opened lazily is decoded here; see `decode_image`
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"image {position}", reason) from error


def _from_array(array: np.ndarray[Any, Any], position: int) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(
            f"image {position} must be an array [H, W, 3] of uint8 RGB, "
            f"got {list(array.shape)} of {array.dtype}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _from_tensor(image: Tensor, position: int, preprocessing: Preprocessing) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image {position} must be a tensor [3, H, W], got {list(image.shape)}")
    if image.dtype == torch.uint8:
        pixels = image.permute(1, 2, 0).cpu().numpy()
        return to_tensor(_from_array(pixels, position), preprocessing)
    if not image.is_floating_point():
        raise ValueError(f"image {position} must be uint8 or float in 0..1, got {image.dtype}")
    image = image.float()
    low, high = float(image.min()), float(image.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"image {position} must be float in 0..1, got values from {low:g} to {high:g}"
        )
    side = preprocessing.image_size
    if image.shape[1:] != (side, side):
        image = functional.interpolate(
            image[None], (side, side), mode=preprocessing.interpolation, antialias=True
        )[0].clamp(0, 1)
    return image
