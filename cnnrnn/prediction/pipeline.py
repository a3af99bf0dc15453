"""From pictures to predictions: decoding, backbone and search, each while the others run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from cnnrnn.config import Calibration, OnBadImage, Preprocessing
from cnnrnn.machine.threads import batches_in_order, default_workers
from cnnrnn.machine.words import listed
from cnnrnn.prediction.decisions import DecisionOptions, decide
from cnnrnn.prediction.inputs import (
    Item,
    are_images,
    count_of,
    read_image,
    single_images,
    with_folders_listed,
)
from cnnrnn.prediction.known import Known
from cnnrnn.prediction.result import Prediction
from cnnrnn.search import NonFiniteError
from cnnrnn.search.inference import Inference


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

    @property
    def torch_threads(self) -> int:
        """Threads of torch that several batches may share; 0 to begin one after the other."""

    def prepare(self, count: int | None) -> None:
        """Hear how many images come, None for an unknown number, before the first of them."""

    def begin(self, images: list[Tensor], evidence: Tensor | None) -> Callable[[], Inference]:
        """Start on images, each uint8 or float in 0..1 of [3, S, S], on the CPU or a GPU.

        Args:
            images: n of them.
            evidence: what is known of their labels, [n, L] int8.

        Returns:
            What ends it; raises NonFiniteError for images whose values are not finite.
        """


def predict_images(
    images: Any,
    model: ImageModel,
    options: DecisionOptions,
    known: Known,
    *,
    batch_size: int,
    workers: int | None,
    on_bad_image: OnBadImage,
    max_pixels: int,
) -> Iterator[Prediction]:
    """Decode in threads, run the model, search and decide, one batch ahead of another."""
    if not are_images(images):
        raise TypeError(
            "images must be a path, a folder, bytes or an open file, a PIL image, an array, a "
            f"tensor, or a list of these, got {type(images).__name__}"
        )
    if workers is None:
        workers = 0 if isinstance(images, Iterator) else default_workers()
    elif workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")

    def read(item: tuple[int, Any]) -> Item:
        return read_image(*item, model.preprocessing, on_bad_image, max_pixels)

    def begin(group: list[Item]) -> Callable[[], Inference | None]:
        found = [item for item in group if item.image is not None]
        if not found:
            return lambda: None
        evidence = known.evidence(
            [item.position for item in found], [item.source for item in found]
        )
        return model.begin([item.image for item in found if item.image is not None], evidence)

    images = with_folders_listed(images, on_bad_image)
    model.prepare(count_of(images))
    batches = batches_in_order(
        _numbered(single_images(images, on_bad_image), known),
        read,
        begin,
        batch_size=batch_size,
        workers=workers,
        torch_threads=lambda: model.torch_threads,
    )
    return (
        prediction
        for group, finish in batches
        for prediction in _decided_group(group, finish, model, options)
    )


def _numbered(images: Iterator[Any], known: Known) -> Iterator[tuple[int, Any]]:
    count = 0
    for image in images:
        yield count, image
        count += 1
    known.require_all_used(count)


def _decided_group(
    group: list[Item],
    finish: Callable[[], Inference | None],
    model: ImageModel,
    options: DecisionOptions,
) -> Iterator[Prediction]:
    try:
        inference = finish()
    except NonFiniteError as error:
        names = [item.source for item in group if item.image is not None]
        named = listed(names[i] for i in error.images)
        raise ValueError(
            f"the model gives values that are not finite for {len(error.images)} images "
            f"({named}); check its weights"
        ) from error
    decided = None if inference is None else decide(inference, model.calibration, options)
    row = 0
    for item in group:
        if item.image is None:
            yield Prediction(item.source, item.error)
            continue
        yield Prediction(item.source, None, model.labels, decided, row)
        row += 1
