"""Small pictures for pages: JPEG in a data URI, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from cnnrnn.config import MAX_PIXELS, Preprocessing
from cnnrnn.data.dataset import ImageSource
from cnnrnn.data.images import BadImageError, decoded

QUALITY = 80


def thumbnail_uri(
    image: str | BinaryIO | ImageSource | np.ndarray[Any, Any] | torch.Tensor,
    side: int = 160,
    max_pixels: int = MAX_PIXELS,
) -> str | None:
    """Return a small copy of a picture as a `data:image/jpeg` URI, upright and in its proportions.

    It is read as every picture in this package is, and large JPEG files are decoded at a smaller
    size. The copy has none of the file's metadata.

    Args:
        image: a file, its bytes, an open file, a Pillow image, an array [H, W, 3] of uint8 RGB, or
            a tensor [3, H, W] of uint8 or of float in 0..1.
        side: of the square that the copy fits into, in pixels; smaller pictures keep their size.
        max_pixels: the most that it may hold, see `cnnrnn.data.budget`.

    Returns:
        The URI, of letters that need no escape in HTML; None where the picture cannot be read.

    Raises:
        ValueError: `side` is below 1, or an array or tensor is no picture.
    """
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    if isinstance(image, torch.Tensor):
        image = _array_of(image)
    if isinstance(image, np.ndarray):
        image = _picture_of(image)
    preprocessing = Preprocessing(image_size=side, jpeg_draft=True)
    buffer = io.BytesIO()
    try:
        with decoded(image, preprocessing=preprocessing, max_pixels=max_pixels) as rgb:
            rgb.thumbnail((side, side))
            # Pillow would copy the comment of a JPEG, which may be as large as the copy itself.
            rgb.save(buffer, "JPEG", quality=QUALITY, comment=b"")
    except BadImageError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _array_of(image: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor [3, H, W] as an array [H, W, 3] of uint8."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be a tensor [3, H, W], got {list(image.shape)}")
    if image.is_floating_point():
        image = (image.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    return image.detach().permute(1, 2, 0).cpu().numpy()


def _picture_of(pixels: np.ndarray[Any, Any]) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(
            f"image must be an array [H, W, 3] of uint8 RGB, got {list(pixels.shape)} of "
            f"{pixels.dtype}"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
