"""Data sources, each read into one `Dataset`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import Boxes, DataError, Dataset
from cnnrnn.data.images import BadImageError

__all__ = ["BadImageError", "Boxes", "DataError", "Dataset", "load_dataset"]

_KINDS = "coco:ROOT, coco:FILE.json (with images=FOLDER), scenes:ROOT, features:FILE.npz"
_log = logging.getLogger(__name__)


def load_dataset(
    spec: str, *, images: str | Path | None = None, on_bad_image: OnBadImage = "error"
) -> Dataset:
    """Read the dataset that a spec names.

    Args:
        spec: `coco:ROOT`, `coco:FILE.json`, `scenes:ROOT` or `features:FILE.npz`. A scenes
            folder that does not exist is generated first.
        images: image folder of a `coco:` source.
        on_bad_image: `error` stops at a missing image, `skip` leaves it out with a warning.

    Returns:
        The dataset with all its splits.

    Raises:
        DataError: the spec names no known kind of source, or its data is wrong.
        ModuleNotFoundError: the source needs an extra that is not installed.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be one of error, skip, got {on_bad_image!r}")
    kind, _, location = spec.partition(":")
    if kind not in ("coco", "scenes", "features") or not location:
        raise DataError(f"data must be one of {_KINDS}, got {spec!r}")
    if images is not None and kind != "coco":
        raise DataError(f"images is only for coco sources, got {spec!r} and images={str(images)!r}")
    path = Path(location).expanduser()
    if kind == "features":
        from cnnrnn.data.features import load_features

        return load_features(path)

    from cnnrnn.data.coco import load_coco

    if kind == "scenes":
        if not path.exists():
            _generate_scenes(path)
        return replace(load_coco(path, on_bad_image=on_bad_image), source=f"scenes:{path}")
    return load_coco(path, images, on_bad_image=on_bad_image)


def _generate_scenes(root: Path) -> None:
    from cnnrnn.data.scenes import write_scenes

    _log.info("generating the scenes data set in %s", root)
    try:
        write_scenes(root)
    except OSError:
        if not (root / "annotations").is_dir():  # else another process finished it first
            raise
