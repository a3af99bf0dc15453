"""What may be predicted: paths, folders, bytes, open files, PIL images, arrays and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cnnrnn.config import OnBadImage, Preprocessing
from cnnrnn.data import BadImageError, DataError
from cnnrnn.data.files import is_dropping
from cnnrnn.data.images import IMAGE_SUFFIXES, decode_image, from_pil, to_tensor


@dataclass(frozen=True)
class Item:
    """One image on its way: a uint8 or float tensor [3, S, S], or why there is none."""

    position: int  # among all images
    source: str
    image: Tensor | None
    error: str | None = None


def read_image(
    position: int, image: Any, preprocessing: Preprocessing, on_bad_image: OnBadImage
) -> Item:
    """Decode, resize and check one image."""
    source = str(image) if isinstance(image, (str, Path)) else str(position)
    if isinstance(image, (str, Path, bytes, Image.Image)) or _is_open_file(image):
        name = f"image {position}"
        try:
            rgb = (
                from_pil(image, name)
                if isinstance(image, Image.Image)
                else decode_image(image, name=name, preprocessing=preprocessing)
            )
            return Item(position, source, to_tensor(rgb, preprocessing))
        except BadImageError as error:
            if on_bad_image == "error":
                raise
            return Item(position, source, None, str(error))
    if isinstance(image, np.ndarray):
        return Item(position, source, to_tensor(_from_array(image, position), preprocessing))
    if isinstance(image, Tensor):
        return Item(position, source, _from_tensor(image, position, preprocessing))
    raise TypeError(
        f"image {position} must be a path, bytes or an open file, a PIL image, an array or a "
        f"tensor, got {type(image).__name__}"
    )


def single_images(images: Any) -> Iterator[Any]:
    """Take folders, batches and lists apart into single images, in order."""
    if isinstance(images, (str, Path)):
        path = Path(images)
        yield from folder_images(path) if path.is_dir() else (path,)
    elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (bytes, Image.Image, np.ndarray, Tensor)) or _is_open_file(images):
        yield images
    elif _is_list(images):
        for image in images:
            yield from single_images(image) if are_images(image) else (image,)


def with_folders_listed(images: Any) -> Any:
    """Put the pictures of a folder, or of each in a list, in its place."""
    if isinstance(images, (str, Path)):
        path = Path(images)
        return folder_images(path) if path.is_dir() else images
    if isinstance(images, (list, tuple)):
        return [with_folders_listed(i) if isinstance(i, (str, Path)) else i for i in images]
    return images


def count_of(images: Any) -> int | None:
    """Return how many images there are; None where that shows only as they come."""
    if isinstance(images, (list, tuple)):
        counts = [count_of(image) for image in images]
        return None if None in counts else sum(count for count in counts if count is not None)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return len(images)
    return 1 if _is_one(images) else None


def are_images(images: Any) -> bool:
    """Whether something is an image, names some, or may hold some."""
    return _is_one(images) or _is_list(images)


def _is_one(image: Any) -> bool:
    one = (str, Path, bytes, Image.Image, np.ndarray, Tensor)
    return isinstance(image, one) or _is_open_file(image)


def _is_open_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


def _is_list(images: Any) -> bool:
    """Whether something is iterated over; the keys of a mapping are a mistake."""
    return isinstance(images, Iterable) and not isinstance(images, (bytearray, Mapping, Set))


def folder_images(folder: Path) -> list[Path]:
    """Return the pictures in a folder and below, by their suffix, sorted by path.

    Raises:
        DataError: there is none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not is_dropping(str(path.relative_to(folder)))
        and path.is_file()
    )
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
