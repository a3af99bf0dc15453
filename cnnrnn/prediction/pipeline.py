"""From pictures to predictions: decoding, backbone and search, each while the others run."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cnnrnn.config import Calibration, OnBadImage, Preprocessing
from cnnrnn.machine.devices import usable_cores, use_one_thread_if_forked
from cnnrnn.prediction.decisions import Options, decide
from cnnrnn.prediction.inputs import Item, are_images, read_image, single_images
from cnnrnn.prediction.result import Prediction
from cnnrnn.search import NonFiniteError
from cnnrnn.search.inference import Inference

MAX_WORKERS = 8


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

    def begin(self, images: list[Tensor]) -> Callable[[], Inference]:
        """Start on images, each uint8 or float in 0..1 of [3, S, S], on the CPU or a GPU.

        Returns:
            What ends it; raises NonFiniteError for images whose values are not finite.
        """


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
    if not are_images(images):
        raise TypeError(
            "images must be a path, a folder, a PIL image, an array, a tensor, or a list of "
            f"these, got {type(images).__name__}"
        )
    if workers is None:
        workers = 0 if isinstance(images, Iterator) else min(usable_cores(), MAX_WORKERS)
    elif workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    numbered = enumerate(single_images(images))

    def read(item: tuple[int, Any]) -> Item:
        return read_image(*item, model.preprocessing, on_bad_image)

    if not workers:
        return _stream(map(read, numbered), model.begin, model, options, batch_size, ahead=0)
    return _stream_in_threads(read, numbered, model, options, batch_size, workers)


def _stream_in_threads(
    read: Callable[[tuple[int, Any]], Item],
    numbered: Iterable[tuple[int, Any]],
    model: ImageModel,
    options: Options,
    batch_size: int,
    workers: int,
) -> Iterator[Prediction]:
    """Decode in threads, and on a CPU compute as many batches at once as torch has threads.

    A batch on one thread wastes nothing on waiting; one batch on all of them would. It is computed
    in the threads that decode: more threads than cores cost a tenth.
    """
    use_one_thread_if_forked()
    threads = model.torch_threads
    batches = min(workers, threads)
    share = partial(torch.set_num_threads, threads // max(batches, 1))
    with ThreadPoolExecutor(workers, "cnnrnn-predict", share if batches else None) as pool:
        items = mapped_in_order(read, numbered, pool, ahead=2 * batch_size)

        def begin(images: list[Tensor]) -> Callable[[], Inference]:
            return pool.submit(lambda: model.begin(images)()).result

        if not batches:
            ahead = 1
        elif workers == batches:
            ahead = batches  # the last one waits for a thread
        else:
            ahead = batches - 1
        try:
            yield from _stream(
                items, begin if batches else model.begin, model, options, batch_size, ahead
            )
        finally:
            items.close()
            if batches:
                torch.set_num_threads(threads)  # a part of it is common to all threads


In = TypeVar("In")
Out = TypeVar("Out")


def mapped_in_order(
    function: Callable[[In], Out], items: Iterable[In], pool: ThreadPoolExecutor, *, ahead: int
) -> Generator[Out, None, None]:
    """Yield function(item) of each item in order, computed in threads.

    Args:
        function: called in a thread.
        items: advanced in the caller's thread.
        pool: the threads.
        ahead: at most so many items are taken before their turn.
    """
    pending: deque[Future[Out]] = deque()
    source = iter(items)
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
    items: Iterator[Item],
    begin: Callable[[list[Tensor]], Callable[[], Inference]],
    model: ImageModel,
    options: Options,
    batch_size: int,
    ahead: int,
) -> Iterator[Prediction]:
    """Begin so many batches ahead of the one that is answered."""
    use_one_thread_if_forked()
    begun: deque[tuple[list[Item], Callable[[], Inference] | None]] = deque()
    failure: Exception | None = None
    while failure is None:
        group: list[Item] = []
        try:
            group.extend(itertools.islice(items, batch_size))
        except Exception as error:  # what came before it is answered first
            failure = error
        if group:
            images = [item.image for item in group if item.image is not None]
            begun.append((group, begin(images) if images else None))
        elif failure is None:
            break
        if len(begun) > ahead:
            yield from _decided_group(*begun.popleft(), model, options)
    while begun:
        yield from _decided_group(*begun.popleft(), model, options)
    if failure is not None:
        raise failure


def _decided_group(
    group: list[Item],
    finish: Callable[[], Inference] | None,
    model: ImageModel,
    options: Options,
) -> Iterator[Prediction]:
    decided = None
    if finish is not None:
        try:
            decided = decide(finish(), model.calibration, options)
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
