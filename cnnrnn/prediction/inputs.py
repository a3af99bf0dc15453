"""What may be predicted: paths, folders, bytes, open files, PIL images, arrays and tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cnnrnn.config import MAX_PIXELS, OnBadImage, Preprocessing
from cnnrnn.data import BadImageError, DataError
from cnnrnn.data.files import is_dropping
from cnnrnn.data.images import IMAGE_SUFFIXES, BadImageWarning, read_tensor, to_tensor


@dataclass(frozen=True)
class Item:
    """One image on its way: a uint8 or float tensor [3, S, S], or why there is none."""

    position: int  # among all images
    source: str
    image: Tensor | None
    error: str | None = None


def read_image(
    position: int,
    image: Any,
    preprocessing: Preprocessing,
    on_bad_image: OnBadImage,
    max_pixels: int = MAX_PIXELS,
) -> Item:
    """Decode, resize and check one image."""
    if isinstance(image, BadImageError):  # of a folder in a list
        return Item(position, image.path, None, str(image))
    source = str(image) if isinstance(image, (str, Path)) else str(position)
    if isinstance(image, (str, Path, bytes, Image.Image)) or _is_open_file(image):
        try:
            tensor = read_tensor(
                image, preprocessing, name=f"image {position}", max_pixels=max_pixels
            )
        except BadImageError as error:
            if on_bad_image == "error":
                raise
            return Item(position, source, None, str(error))
        return Item(position, source, tensor)
    if isinstance(image, np.ndarray):
        return Item(position, source, to_tensor(_from_array(image, position), preprocessing))
    if isinstance(image, Tensor):
        return Item(position, source, _from_tensor(image, position, preprocessing))
    raise TypeError(
        f"image {position} must be a path, bytes or an open file, a PIL image, an array or a "
        f"tensor, got {type(image).__name__}"
    )


def single_images(images: Any, on_bad_image: OnBadImage = "error") -> Iterator[Any]:
    """Take folders, batches and lists apart into single images, in order.

    With `skip` a folder in a list that cannot be listed becomes the `BadImageError` that says so.
    """
    if isinstance(images, (str, Path)):
        path, is_folder = Path(images), os.path.isdir(images)  # not where it cannot be told
        yield from folder_images(path, on_bad_image) if is_folder else (path,)
    elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        yield from images
    elif _is_one(images):
        yield images
    elif _is_list(images):
        for image in images:
            if isinstance(image, (str, Path)):
                yield from _of_a_list(image, on_bad_image)
            else:
                yield from single_images(image, on_bad_image) if are_images(image) else (image,)


def _of_a_list(image: str | Path, on_bad_image: OnBadImage) -> list[Any]:
    """Return a path of a list, or the pictures of a folder; see `single_images`."""
    try:
        return list(single_images(image, on_bad_image))
    except BadImageError as error:
        if on_bad_image == "error":
            raise
        return [error]


def with_folders_listed(images: Any, on_bad_image: OnBadImage = "error") -> Any:
    """Put the pictures of a folder, or of each in a list, in its place; see `single_images`."""
    if isinstance(images, (str, Path)):
        return list(single_images(images, on_bad_image))
    if isinstance(images, (list, tuple)):
        listed: list[Any] = []
        for image in images:
            is_path = isinstance(image, (str, Path))
            listed += _of_a_list(image, on_bad_image) if is_path else [image]
        return listed
    return images


def count_of(images: Any) -> int | None:
    """Return how many images there are; None where that shows only as they come."""
    if isinstance(images, (list, tuple)):
        counts = [count_of(image) for image in images]
        return None if None in counts else sum(count for count in counts if count is not None)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return len(images)
    if _is_one(images):
        return 1
    return len(images) if isinstance(images, Sequence) else None  # of files, read as they come


def are_images(images: Any) -> bool:
    """Whether something is an image, names some, or may hold some."""
    return _is_one(images) or _is_list(images)


def _is_one(image: Any) -> bool:
    one = (str, Path, bytes, Image.Image, np.ndarray, Tensor, BadImageError)
    return isinstance(image, one) or _is_open_file(image)


def _is_open_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


def _is_list(images: Any) -> bool:
    """Whether something is iterated over; the keys of a mapping are a mistake."""
    return isinstance(images, Iterable) and not isinstance(images, (bytearray, Mapping, Set))


def folder_images(folder: Path, on_bad_image: OnBadImage = "error") -> list[Path]:
    """Return the pictures in a folder and below, by their suffix, sorted by path.

    Args:
        folder: links to folders in it are not followed.
        on_bad_image: `skip` warns of folders below that cannot be listed.

    Raises:
        BadImageError: it cannot be listed, or with `error` a folder below.
        DataError: there is no picture.
    """
    found: list[Path] = []
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not is_dropping(name)]
        found += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not is_dropping(name)
        ]
    found.sort()
    bad = [
        BadImageError(e.filename, f"a folder that cannot be listed: {e.strerror}") for e in errors
    ]
    if bad and (on_bad_image == "error" or bad[0].path == str(folder)):
        raise bad[0]
    if bad:
        warnings.warn(
            f"{len(bad)} folders in {folder} were left out, the first: {bad[0]}", BadImageWarning,
            stacklevel=2,
        )  # fmt: skip
    if not found:
        raise DataError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return found


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
