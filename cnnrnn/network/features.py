"""Features of a frozen backbone, computed once and cached on disk.

A cache file is named after everything its values depend on: the backbone's weights, the
preprocessing, and each image's path, size and modification time. A changed image or weight gives
another name; a damaged file fails its checksum and is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnrnn.config import MAX_PIXELS, Backend, OnBadImage
from cnnrnn.data import BadImageError, DataError, Dataset
from cnnrnn.data.images import (
    ImageRecords,
    Record,
    image_identity,
    report_bad_images,
)
from cnnrnn.machine.distributed import ALONE, Ranks
from cnnrnn.machine.files import weights_digest, write_whole
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.machine.threads import batches_in_order, default_workers
from cnnrnn.network.backbones import Backbone
from cnnrnn.network.engines import BackboneRunner

_log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of the images that could be read.

    Attributes:
        values: [m, F] float32 on the CPU.
        kept: [m] int64, the records they belong to.
    """

    values: Tensor
    kept: npt.NDArray[np.int64]


def compute_features(
    backbone: Backbone,
    dataset: Dataset,
    *,
    device: torch.device,
    backend: Backend = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Features:
    """Run a backbone, in eval mode, over every image of a dataset, as `predict` does.

    Args:
        backbone: moved to `device`.
        dataset: must have image paths.
        device: where the backbone runs.
        backend: what runs it, see `BackboneRunner`.
        batch_size: images per step.
        workers: threads that decode, while on a CPU as many batches are computed at once; 0 does
            everything in the calling thread. None takes one per core, up to 8.
        on_bad_image: `error` stops at an unreadable image, `skip` leaves it out, and warns at the
            end with the count.
        progress: told how many images are done.
        ranks: the processes that divide the batches; each returns all features.

    Raises:
        BadImageError: an image cannot be read and `on_bad_image` is `error`.
        DataError: the dataset has no image paths, or no image at all can be read.
    """
    backbone = backbone.to(device).eval()
    reader = ImageRecords(dataset, backbone.preprocessing, on_bad_image=on_bad_image)
    numbers = torch.arange(len(reader))
    own = ranks.deal(numbers.split(batch_size) if len(reader) else ())
    run = BackboneRunner(backbone, device, backend=backend)
    run.prepare(sum(map(len, own)))

    def begin(items: list[Record]) -> Callable[[], Tensor]:
        images = [image for _, image in items if isinstance(image, Tensor)]
        if not images:
            return lambda: torch.empty(0, backbone.feature_dim)
        return run(images).cpu

    values, kept, bad = [torch.empty(0, backbone.feature_dim)], [], []
    with progress("features", len(dataset) // ranks.size) as advance:
        for items, finish in batches_in_order(
            (record for batch in own for record in batch.tolist()),
            reader.__getitem__,
            begin,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            torch_threads=torch.get_num_threads if device.type == "cpu" else lambda: 0,
        ):
            values.append(finish())
            kept += [record for record, image in items if isinstance(image, Tensor)]
            bad += [error for _, error in items if isinstance(error, BadImageError)]
            advance(len(items))
    report_bad_images(bad, sum(map(len, own)), len(dataset))
    features, records = torch.cat(values), np.array(kept, dtype=np.int64)
    if ranks.size > 1:
        features, records = (
            ranks.gather(features),
            ranks.gather(torch.from_numpy(records)).numpy(),
        )
        if len(dataset) and not len(records):
            raise DataError(f"none of the {len(dataset)} images of {dataset.source} can be read")
        order = np.argsort(records)
        features, records = features[torch.from_numpy(order)], records[order]
    return Features(features, records)


def cached_features(
    backbone: Backbone,
    dataset: Dataset,
    folder: Path,
    *,
    device: torch.device,
    backend: Backend = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Features:
    """Return `compute_features`, from `folder` if they are there already.

    Args, besides those of `compute_features`:
        folder: holds the cache; created if missing. Only the first process reads and writes it.
    """
    cached: Features | None = None
    if ranks.first:
        key = _cache_key(backbone, dataset)
        file = folder / f"{backbone.name.replace('/', '_')}-{key[:20]}.npz"
        cached = _read(file, key, backbone.feature_dim, len(dataset))
        if cached is not None and on_bad_image == "error" and len(cached.kept) < len(dataset):
            cached = None
    if ranks.first_says(cached is not None):
        if ranks.size > 1:
            stored = ranks.from_first(None if cached is None else cached.values)
            kept = ranks.from_first(None if cached is None else torch.from_numpy(cached.kept))
            cached = Features(stored, kept.numpy())
        assert cached is not None
        if ranks.first:
            _log.info("features of %d images read from %s", len(cached.kept), file)
        if ranks.first and len(cached.kept) < len(dataset):
            missing = sorted(set(range(len(dataset))) - set(cached.kept.tolist()))
            warnings.warn(
                f"{len(missing)} of {len(dataset)} images were left out when {file} was made, "
                f"the first: {dataset.record_name(missing[0])}",
                stacklevel=2,
            )
        return cached
    computed = compute_features(
        backbone, dataset, device=device, backend=backend, batch_size=batch_size, workers=workers,
        on_bad_image=on_bad_image, progress=progress, ranks=ranks,
    )  # fmt: skip
    if ranks.first:
        _write(file, key, computed)
    return computed


def _cache_key(backbone: Backbone, dataset: Dataset) -> str:
    digest = hashlib.sha256()
    digest.update(backbone.name.encode())
    digest.update(weights_digest(backbone.state_dict().items()).encode())
    # As before there were drafts, so that caches of earlier releases are found.
    form = {k: v for k, v in asdict(backbone.preprocessing).items() if k != "jpeg_draft" or v}
    digest.update(json.dumps(form).encode())
    if dataset.max_pixels != MAX_PIXELS:  # others may have been left out
        digest.update(f"{dataset.max_pixels}\n".encode())
    for image in dataset.images or ():
        digest.update(image_identity(image))
    return digest.hexdigest()


def _checksum(features: Features) -> int:
    return zlib.crc32(features.kept.tobytes(), zlib.crc32(features.values.numpy().tobytes()))


def _write(file: Path, key: str, features: Features) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "values": features.values.numpy(),
        "kept": features.kept,
        "key": np.array(key),
        "checksum": np.array(_checksum(features), dtype=np.int64),
    }
    write_whole(file, lambda partial: np.savez(partial, **arrays))  # type: ignore[arg-type]


def _read(file: Path, key: str, feature_dim: int, records: int) -> Features | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            features = Features(torch.from_numpy(stored["values"]), stored["kept"])
            sound = (
                str(stored["key"]) == key
                and features.values.dtype == torch.float32
                and features.kept.dtype == np.int64
                and features.values.shape == (len(features.kept), feature_dim)
                and len(features.kept) <= records
                and int(stored["checksum"]) == _checksum(features)
            )
    except Exception as error:  # numpy and zipfile raise nearly anything on broken files
        warnings.warn(f"{file} is damaged ({error}); its features are computed again", stacklevel=3)
        return None
    if not sound:
        warnings.warn(
            f"{file} does not match its checksum or key; its features are computed again",
            stacklevel=3,
        )
        return None
    return features
