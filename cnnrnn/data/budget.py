"""The memory that images take to decode: how much of it each may take, and all at once.

It is counted in pixels of 8 bytes: Pillow takes 4 where an image is decoded, and 4 more in RGB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, TiffImagePlugin

from cnnrnn.machine.memory import Budget, return_freed_memory
from cnnrnn.machine.threads import MAX_WORKERS

PIXELS_AT_ONCE = Budget(100_000_000)
"""What the threads of a process hold at once: eight photographs of 12 megapixels fit.

A larger image waits until it is alone.
"""

MAX_TEXTS = 16
"""Compressed texts of a PNG: Pillow unpacks up to 1 MiB of each as it opens the file."""

# What decoders hold at most beside the image, in bytes a pixel.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 12, "HEIF": 12}


@contextmanager
def memory_for(
    image: Image.Image, full: tuple[int, int], side: int, max_pixels: int
) -> Iterator[None]:
    """Hold what an image takes to be decoded and resized, as soon as so much is left.

    Args:
        image: what is going to be decoded.
        full: its size without a draft.
        side: of the square that it is resized to; 0 for none.
        max_pixels: the most that it may take.

    Raises:
        ValueError: it takes more.
    """
    width, height = image.size
    pixels = pixels_held(image, full, side)
    if pixels > max_pixels:
        counted = "" if pixels == width * height else f" with the memory of {pixels:,}"
        raise ValueError(
            f"{width}x{height} pixels{counted}, more than {max_pixels:,}: max_pixels allows more"
        )
    with PIXELS_AT_ONCE.share(pixels):
        # Each thread would keep what it frees for itself; of smaller images that is no more than
        # all of them take.
        large = pixels > PIXELS_AT_ONCE.total // MAX_WORKERS
        if large:
            return_freed_memory()
        try:
            yield
        finally:
            if large:
                return_freed_memory()


def pixels_held(image: Image.Image, full: tuple[int, int], side: int) -> int:
    """Return how many pixels an image counts as; arguments as in `memory_for`.

    These are more than its own where its decoder holds more than 4 bytes a pixel beside it, and
    where resizing widens it before it is made less high. A JPEG draft counts by its own size.
    """
    width, height = image.size
    pixels = width * height
    decoding = 4 * pixels + _decoder_bytes(image, full)
    resizing = 4 * pixels + 4 * side * max(width, height)
    return max(pixels, decoding // 8, resizing // 8)


def _decoder_bytes(image: Image.Image, full: tuple[int, int]) -> int:
    """Return what an image's decoder holds at most beside the image itself."""
    pixels = full[0] * full[1]
    if image.format == "JPEG" and "progressive" in image.info:  # all coefficients
        return 2 * len(image.getbands()) * pixels
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _block_bytes(image)
    return pixels * _DECODER_BYTES.get(image.format or "", 0)


def _block_bytes(image: TiffImagePlugin.TiffImageFile) -> int:
    """Return how large a strip or tile of a TIFF is, which libtiff decodes as a whole."""
    tags, names = image.tag_v2, TiffImagePlugin
    bits = tags.get(names.BITSPERSAMPLE, (1,))
    samples = max(tags.get(names.SAMPLESPERPIXEL, 1), len(bits))
    rows = min(tags.get(names.ROWSPERSTRIP, image.height), image.height)
    width, height = tags.get(names.TILEWIDTH, image.width), tags.get(names.TILELENGTH, rows)
    return int(width * height * samples * max(bits) // 8)


def require_few_texts(file: BinaryIO) -> None:
    """Fail where a PNG has more than `MAX_TEXTS` compressed texts; other files pass.

    Raises:
        ValueError: it has more.
    """
    file.seek(0)
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return
    texts = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        texts += kind in (b"iTXt", b"zTXt", b"iCCP")
        if texts > MAX_TEXTS:
            raise ValueError(f"a PNG with more than {MAX_TEXTS} compressed texts")
        file.seek(length + 4, io.SEEK_CUR)
