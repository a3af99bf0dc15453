"""Images: decoding, the one preprocessing, and batches of them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
import torch.utils.data
from PIL import ExifTags, Image, UnidentifiedImageError

from cnnrnn.config import MAX_PIXELS, OnBadImage, Preprocessing
from cnnrnn.data.budget import memory_for, require_few_texts
from cnnrnn.data.dataset import DataError, Dataset, ImageSource, StoredImage
from cnnrnn.machine.extras import from_extra

# Raster formats that Pillow decodes itself and refuses when truncated: EPS would start
# Ghostscript, and half a JPEG 2000 file gives an image.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".heic", ".heif",
)  # fmt: skip
"""Names of files that are taken for images end so, in any case."""

_HEIF_BRANDS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx",
                                              b"mif1", b"msf1")}  # fmt: skip

# EXIF's orientation to what turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_QUARTERS = {_UPRIGHT[value] for value in (5, 6, 7, 8)}
_REVERSED = {_UPRIGHT[value] for value in (3, 4, 6, 7)}  # the first row comes last

_STRIP = 1 << 18  # pixels of a large image that are converted at once

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


_lock = threading.Lock()  # Pillow loads lazily, and one image or open file may come twice


class BadImageError(DataError):
    """An image file that cannot be used.

    Attributes:
        path: the file.
        record: which record of which source it belongs to, or None.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str, record: str | None = None) -> None:
        """Compose the message from its parts."""
        self.path, self.reason, self.record = str(path), reason, record
        place = f" ({record})" if record else ""
        super().__init__(f"{self.path}{place} must be a readable image, found: {reason}")

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str, str | None]]:
        """Travel between processes as its parts."""
        return type(self), (self.path, self.reason, self.record)


@contextmanager
def decoded(
    image: str | BinaryIO | ImageSource,
    record: str | None = None,
    *,
    name: str = "the image",
    preprocessing: Preprocessing | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Image.Image]:
    """Read an image completely; it is closed, and its share of the memory free, at the end.

    Args:
        image: a file, its bytes, an open file, or a Pillow image.
        record: named in the error, beside the path.
        name: of what is in no file, for the error.
        preprocessing: what follows; see `Preprocessing.jpeg_draft`. None decodes at full size.
        max_pixels: the most that it may hold, see `cnnrnn.data.budget`.

    Yields:
        The first frame as RGB, upright by its EXIF orientation; see `to_rgb` for colours.

    Raises:
        BadImageError: the file is missing, not an image, truncated or too large.
    """
    place, record = (image, record) if isinstance(image, (str, Path)) else (name, None)
    side = 0 if preprocessing is None else preprocessing.image_size
    try:
        if isinstance(image, Image.Image):
            if 0 in image.size:
                raise ValueError(f"{image.width}x{image.height} pixels")
            with memory_for(image, image.size, side, max_pixels):
                with _lock:
                    image.load()
                    rgb = to_rgb(image)
                with closing(rgb):
                    yield rgb
            return
        with _opened(image, record) as handle:
            start = handle.read(32)
            require_few_texts(handle)
            handle.seek(0)
            with Image.open(handle, formats=_known_formats()) as opened:
                full, box = opened.size, None
                if preprocessing is not None and preprocessing.jpeg_draft:
                    box = _draft(opened, 2 * side)
                with memory_for(opened, full, side, max_pixels):
                    with closing(opened):
                        opened.load()
                        rgb = to_rgb(opened if box is None else opened.crop(box))
                    with closing(rgb):
                        yield rgb
    except BadImageError:
        raise
    except MemoryError as error:
        raise BadImageError(place, "one that needs more memory than there is", record) from error
    except FileNotFoundError as error:
        raise BadImageError(place, "no such file", record) from error
    except UnidentifiedImageError as error:
        reason = "no image in a known format"
        if start[4:12] in _HEIF_BRANDS and "HEIF" not in _known_formats():
            reason = "a HEIF image, which only pillow-heif reads: pip install pillow-heif"
        raise BadImageError(place, reason, record) from error
    except Image.DecompressionBombError as error:
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        reason = f"more than {most:,} pixels: max_pixels and PIL.Image.MAX_IMAGE_PIXELS allow more"
        raise BadImageError(place, reason, record) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadImageError(place, " ".join(text.split()), record) from error


def decode_image(
    image: str | BinaryIO | ImageSource,
    record: str | None = None,
    *,
    name: str = "the image",
    preprocessing: Preprocessing | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Return an image as upright RGB; see `decoded`."""
    with decoded(
        image, record, name=name, preprocessing=preprocessing, max_pixels=max_pixels
    ) as rgb:
        return rgb.copy()


def read_tensor(
    image: str | BinaryIO | ImageSource,
    preprocessing: Preprocessing,
    record: str | None = None,
    *,
    name: str = "the image",
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """Return an image as the square input, uint8 [3, S, S]; see `decoded` and `to_tensor`."""
    with decoded(
        image, record, name=name, preprocessing=preprocessing, max_pixels=max_pixels
    ) as rgb:
        return to_tensor(rgb, preprocessing)


def _draft(image: Image.Image, side: int) -> tuple[int, int, int, int] | None:
    """Have a JPEG decoded at the smallest of 1, 1/2, 1/4 and 1/8 that covers a square of a side.

    The decoder rounds sizes up: what its last row and column cover by less than half is outside the
    box that is returned. None where there is nothing to cut off, and for other formats.
    """
    found = image.draft(None, (side, side))
    if found is None:
        return None
    width, height = (round(edge) for edge in found[1][2:])
    return None if (width, height) == image.size else (0, 0, width, height)


@contextmanager
def _opened(
    image: str | Path | bytes | BinaryIO | StoredImage, record: str | None
) -> Iterator[BinaryIO]:
    """Open what an image is read from; an open file is read from its start."""
    if isinstance(image, (str, Path)):
        if not stat.S_ISREG(os.stat(image).st_mode):  # opening a pipe would wait for ever
            kind = "a folder" if os.path.isdir(image) else "something that is not a file"
            raise BadImageError(image, kind, record)
        with open(image, "rb") as handle:
            yield handle
    elif isinstance(image, bytes):
        yield io.BytesIO(image)
    else:
        with _lock:
            if isinstance(image, io.IOBase) and image.seekable():
                image.seek(0)
            data = image.read()
        yield io.BytesIO(data)


def image_identity(image: ImageSource) -> bytes:
    """Return bytes that differ where an image may be another: of a file its path, size and time."""
    if isinstance(image, Path):
        try:
            status = os.stat(image)
        except OSError as error:
            return os.fsencode(image) + f" {error.strerror}\n".encode()
        return os.fsencode(image) + f" {status.st_size} {status.st_mtime_ns}\n".encode()
    if isinstance(image, StoredImage):
        return image.identity.encode()
    return image_digest(image)


def image_digest(image: ImageSource) -> bytes:
    """Return a digest of an image's content: of its file, or of its pixels where it has none.

    Raises:
        OSError: its file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, Path):
        with open(image, "rb") as handle:
            return hashlib.file_digest(handle, lambda: digest).digest()
    if isinstance(image, Image.Image):
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    else:
        digest.update(image if isinstance(image, bytes) else image.read())
    return digest.digest()


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ModuleNotFoundError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    known = (*_FORMATS, "HEIF")
    return tuple(name for name in known if name in Image.OPEN)  # an older Pillow has no AVIF


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of any Pillow image as upright RGB.

    Transparency is composited on white; 16-bit grey is scaled to 8 bits. Both and turning go by
    strips of a large image, which take little memory beside it.

    Args:
        image: a loaded image of any mode but floating point.

    Raises:
        ValueError: the mode has no conversion to RGB.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode == "I":
        low, high = cast("tuple[int, int]", image.getextrema())
        if low < 0 or high > 65535:
            raise ValueError(f"grey values {low}..{high}, expected 16 bits in 0..65535")
    turn = _UPRIGHT.get(_orientation(image))
    width, height = image.size
    rows = height
    if turn is not None or image.mode.startswith("I") or image.has_transparency_data:
        rows = max(1, _STRIP // width)
    if rows >= height:
        rgb = _opaque(image)
        return rgb if turn is None else rgb.transpose(turn)
    quarter = turn in _QUARTERS
    result = Image.new("RGB", (height, width) if quarter else (width, height))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = _opaque(image.crop((0, top, width, bottom)))
        if turn is not None:
            strip = strip.transpose(turn)
        start = height - bottom if turn in _REVERSED else top
        result.paste(strip, (start, 0) if quarter else (0, start))
    return result


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image, or a strip of one, as RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        white = Image.new("RGBA", upper.size, "white")
        return Image.alpha_composite(white, upper).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none or it cannot be read.

    `ImageOps.exif_transpose` would also rewrite the EXIF block, and fail on any odd tag although
    the pixels are good.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's EXIF parser raises nearly anything on broken blocks
        return 1
    return value if isinstance(value, int) else 1


def to_tensor(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize the whole image to the square input.

    Args:
        image: an RGB image.
        preprocessing: gives the side S and the filter, applied with antialiasing.

    Returns:
        uint8 [3, S, S].
    """
    if image.mode != "RGB":
        raise ValueError(f"image must be RGB, got mode {image.mode}")
    side = preprocessing.image_size
    square = image.resize((side, side), _FILTERS[preprocessing.interpolation])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def normalize(batch: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale to 0..1 and normalise each channel, on the batch's device.

    Args:
        batch: [B, 3, S, S], uint8 or floating point in 0..1.
        preprocessing: gives mean and std.

    Returns:
        float32 [B, 3, S, S], channels last in memory: convolutions are a third to a half faster.
    """
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"batch must be [B, 3, S, S], got {list(batch.shape)}")
    if batch.dtype != torch.uint8 and not batch.is_floating_point():
        raise ValueError(f"batch must be uint8 or floating point, got {batch.dtype}")
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    scale = 1 / (std * 255) if batch.dtype == torch.uint8 else 1 / std
    scale, shift = (
        values.to(batch.device, torch.float32).view(3, 1, 1) for values in (scale, -mean / std)
    )
    values = batch.to(torch.float32, memory_format=torch.channels_last)
    return torch.addcmul(shift, values, scale)


class BadImageWarning(UserWarning):
    """Images were left out because they cannot be read."""


class ImageBatch(NamedTuple):
    """Images of some records.

    Attributes:
        indices: [m] int64, the records that the images belong to.
        images: [m, 3, S, S] uint8.
        bad: the errors of records that were left out.
    """

    indices: torch.Tensor
    images: torch.Tensor
    bad: list[BadImageError]


Record = tuple[int, "torch.Tensor | BadImageError"]
"""A record's number with its image, uint8 [3, S, S], or with what is wrong with it."""


class ImageRecords(torch.utils.data.Dataset[tuple[int, "torch.Tensor | BadImageError"]]):
    """The images of a dataset, decoded and resized on access.

    Item i is (i, uint8 [3, S, S]), or (i, BadImageError) where `on_bad_image` is `skip`.

    Args:
        dataset: must have images, else `DataError`.
        preprocessing: side and filter of the square input.
        augment: flip at random and shift by up to 1/16 of the side, with torchvision.
        augment_seed: what is drawn for a record depends on this and its number alone; None draws
            from torch's generator.
        on_bad_image: `error` raises `BadImageError`, `skip` returns it as the item.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        *,
        augment: bool = False,
        augment_seed: int | None = None,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        """Keep the images; nothing is opened yet."""
        if dataset.images is None:
            raise DataError(f"{dataset.source} must have image files, got a source without any")
        self.dataset = dataset
        self.images = dataset.images
        self.preprocessing = preprocessing
        self.on_bad_image = on_bad_image
        self.augment = _augmentation(preprocessing.image_size) if augment else None
        self.augment_seed = augment_seed

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | BadImageError]:
        """Return the record index with its image, or with what is wrong with it."""
        record = f"record {self.dataset.rows[index]} of {self.dataset.source}"
        try:
            image = read_tensor(
                self.images[index], self.preprocessing, record, name=record,
                max_pixels=self.dataset.max_pixels,
            )  # fmt: skip
        except BadImageError as error:
            if self.on_bad_image == "error":
                raise
            # They hold the frames of the decoder, and with these the image.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return index, error
        return index, image if self.augment is None else self._augmented(self.augment, index, image)

    def _augmented(
        self, augment: Callable[[torch.Tensor], torch.Tensor], index: int, image: torch.Tensor
    ) -> torch.Tensor:
        if self.augment_seed is None:
            return augment(image)
        # torchvision draws from torch's generator only: it is seeded, and restored afterwards.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed((self.augment_seed + index) % 2**63)
        try:
            return augment(image)
        finally:
            generator.set_state(state)

    def collate(self, items: Sequence[tuple[int, torch.Tensor | BadImageError]]) -> ImageBatch:
        """Put items into a batch in their order, bad ones apart."""
        side = self.preprocessing.image_size
        good = [(index, image) for index, image in items if isinstance(image, torch.Tensor)]
        return ImageBatch(
            indices=torch.tensor([index for index, _ in good], dtype=torch.int64),
            images=torch.stack([image for _, image in good])
            if good
            else torch.empty(0, 3, side, side, dtype=torch.uint8),
            bad=[error for _, error in items if isinstance(error, BadImageError)],
        )


def _augmentation(side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    with from_extra("torchvision", "augmentation"):
        from torchvision.transforms import v2
    augment: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(side, padding=side // 16, padding_mode="reflect"),
        ]
    )
    return augment


def report_bad_images(bad: Sequence[BadImageError], count: int, total: int) -> None:
    """Warn of images that were left out.

    Args:
        bad: what is wrong with them.
        count: images that were read, including those.
        total: images of the dataset.

    Raises:
        DataError: all of them are bad.
    """
    if not bad:
        return
    said = f"{len(bad)} of {count} images"
    if len(bad) == total:
        raise DataError(f"{said} cannot be read, the first: {bad[0]}")
    warnings.warn(f"{said} were left out, the first: {bad[0]}", BadImageWarning, stacklevel=3)


def image_batches(
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    augment: bool = False,
    shuffle_generator: torch.Generator | None = None,
    on_bad_image: OnBadImage = "error",
    keep_empty: bool = False,
    pick: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = lambda batches: batches,
) -> Iterator[ImageBatch]:
    """Read the images of a dataset once, in batches.

    Args:
        dataset: must have images.
        preprocessing: side and filter of the square input.
        batch_size: images per batch; the last batch may be smaller, and so is one with images
            left out. A batch in which every image is bad is not returned.
        workers: processes that decode; 0 decodes in this one.
        augment: flip and shift at random, each image with its own seed, which does not depend on
            `workers` and is drawn from `shuffle_generator`, or torch's generator without one.
        shuffle_generator: draws the order; None keeps the order of the dataset.
        on_bad_image: `error` raises at the first unreadable image; `skip` leaves it out, and
            warns once at the end of the pass with the count.
        keep_empty: also return a batch in which every image is bad, or that `pick` left empty.
        pick: selects from the batches of record numbers what this process reads.

    Raises:
        DataError: the dataset has no images, or with `skip` no image at all can be read.
        BadImageError: an image cannot be read and `on_bad_image` is `error`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # Errors travel as items: raised in a worker, one would arrive as a traceback in a message.
    seed = _draw_seed(shuffle_generator) if augment else None
    records = ImageRecords(
        dataset, preprocessing, augment=augment, augment_seed=seed, on_bad_image="skip"
    )
    order = torch.arange(len(records))
    if shuffle_generator is not None:
        order = torch.randperm(len(records), generator=shuffle_generator)
    batches = pick(order.split(batch_size) if len(records) else ())
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        records,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        collate_fn=records.collate,
        generator=torch.Generator(),  # keeps the loader from drawing from torch's own
    )
    count = sum(map(len, batches))
    return _checked(iter(loader), on_bad_image, count, len(records), keep_empty)


def _checked(
    batches: Iterator[ImageBatch],
    on_bad_image: OnBadImage,
    count: int,
    total: int,
    keep_empty: bool,
) -> Iterator[ImageBatch]:
    """Yield the batches, and raise or warn of unreadable images; see `image_batches`."""
    bad: list[BadImageError] = []
    while (batch := next(batches, None)) is not None:
        if batch.bad and on_bad_image == "error":
            # End the workers now: left to the garbage collector, each would take 5 seconds.
            batches = iter(())
            raise batch.bad[0]
        bad += batch.bad
        if len(batch.indices) or keep_empty:
            yield batch
    report_bad_images(bad, count, total)


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**62, (), generator=generator))
