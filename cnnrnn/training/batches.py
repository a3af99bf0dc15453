"""Training images in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.config import Preprocessing, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.images import image_batches, normalize
from cnnrnn.machine.devices import autocast
from cnnrnn.machine.distributed import ALONE, Ranks


class Batch(NamedTuple):
    """Inputs [B, F] or normalised images [B, 3, S, S], targets [B, L] bool, records [B].

    `size` is that of the whole batch; this may be one process's share of it. `unknown` is [B, L]
    bool, labels that are neither present nor absent, or None where the split has none.
    """

    inputs: Tensor
    targets: Tensor
    records: Tensor
    size: int
    unknown: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """The images or features of one split with their label sets in path order.

    Attributes:
        dataset: names records, and reads images where `features` is None.
        targets: [n, L] bool, columns in path order.
        features: [n, F] float32, or None to read images.
        preprocessing: of the images.
        ranks: the processes that divide it.
        unknown: [n, L] bool, labels that are neither present nor absent, or None without any.
    """

    dataset: Dataset
    targets: Tensor
    features: Tensor | None
    preprocessing: Preprocessing | None = None
    ranks: Ranks = ALONE
    unknown: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def truth(self, records: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return targets and unknown labels of some records."""
        unknown = None if self.unknown is None else self.unknown[records]
        return self.targets[records], unknown

    @property
    def vectors(self) -> Tensor:
        """The features, [n, F], of a split that has them."""
        assert self.features is not None
        return self.features

    def batches(
        self,
        config: TrainConfig,
        device: torch.device,
        generator: torch.Generator | None,
        augment: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the split once, shuffled by `generator`, or in order without one.

        A shuffled batch is divided among the processes, and a share may be empty. In order, each
        process takes whole batches, so they are the same with any number of processes.
        """
        if generator is not None and self.ranks.size > 1:  # they may have drawn differently before
            generator.set_state(self.ranks.from_first(generator.get_state()))
        if self.features is not None:
            order = torch.arange(len(self))
            if generator is not None:
                order = torch.randperm(len(self), generator=generator)
            batches = order.split(config.batch_size) if len(self) else ()
            for size, part in zip(map(len, batches), self._own(generator)(batches), strict=False):
                yield self._batch(self.features[part].to(device), part, size)
            return
        assert self.preprocessing is not None
        sizes = chain(repeat(config.batch_size, len(self) // config.batch_size),
                      [len(self) % config.batch_size])  # fmt: skip
        for images in image_batches(
            self.dataset,
            self.preprocessing,
            batch_size=config.batch_size,
            workers=config.workers,
            augment=augment,
            shuffle_generator=generator,
            on_bad_image=config.on_bad_image,
            keep_empty=generator is not None,
            pick=self._own(generator),
        ):
            inputs = normalize(images.images.to(device), self.preprocessing)
            yield self._batch(inputs, images.indices, next(sizes))

    def _batch(self, inputs: Tensor, records: Tensor, size: int) -> Batch:
        targets = self.targets[records].to(inputs.device)
        unknown = None if self.unknown is None else self.unknown[records].to(inputs.device)
        return Batch(inputs, targets, records, size, unknown)

    def _own(
        self, generator: torch.Generator | None
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        if generator is None:
            return self.ranks.deal
        return lambda batches: [self.ranks.share(batch) for batch in batches]

    def over_batches(
        self, compute: Callable[[Batch], Tensor], config: TrainConfig, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Compute rows [n, ...] for all readable images, divided among the processes.

        Returns:
            The rows and the records [n] that they belong to, ascending, in every process.
        """
        rows, records = [], []
        for batch in self.batches(config, device, None):
            with autocast(device, config):
                rows.append(compute(batch))
            records.append(batch.records)
        if self.ranks.size == 1:
            return torch.cat(rows), torch.cat(records)
        none = torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64)
        joined = self.ranks.gather(torch.cat(rows) if rows else none[0])
        numbers = self.ranks.gather(torch.cat(records) if records else none[1])
        if not len(numbers):
            raise DataError(f"none of the {len(self)} images of {self.dataset.source} can be read")
        order = numbers.argsort()
        return joined[order.to(device)], numbers[order]
