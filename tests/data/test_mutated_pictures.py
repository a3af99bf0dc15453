"""Valid pictures of every format, mutated: each is read as RGB or is a bad image, in its place."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from cnnrnn.config import Preprocessing
from cnnrnn.data.images import BadImageError, decode_image, read_tensor
from tests.data.hostile import chunk, peak, saved
from tests.prediction.test_predict import SIDE, make_model

PEAK = 1000  # MiB
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 9_999, 65_500, 100_000, 0x7FFF_FFFF, 0xFFFF_FFFF]


def small_pictures() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (21, 30, 3), dtype=np.uint8))
    alpha = Image.fromarray(random.integers(0, 256, (21, 30, 4), dtype=np.uint8))
    deep = Image.fromarray(random.integers(0, 65536, (21, 30), dtype=np.uint16))
    frames = [rgb.rotate(angle) for angle in (90, 180)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    palette = rgb.quantize(16)
    icc = b"icc" * 100
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (rgb, "JPEG", {}),
        "jpeg, turned": (rgb, "JPEG", {"exif": exif, "icc_profile": icc}),
        "jpeg, progressive": (rgb, "JPEG", {"progressive": True}),
        "jpeg, CMYK": (rgb.convert("CMYK"), "JPEG", {"subsampling": 0}),
        "jpeg, restarts": (rgb, "JPEG", {"restart_marker_blocks": 1}),
        "jpeg, grey": (rgb.convert("L"), "JPEG", {}),
        "png": (rgb, "PNG", {"exif": exif}),
        "png, palette": (palette, "PNG", {"transparency": 3}),
        "png, 16 bits": (deep, "PNG", {}),
        "png, grey and alpha": (alpha.convert("LA"), "PNG", {"icc_profile": icc}),
        "png, alpha": (alpha, "PNG", {}),
        "png, bilevel": (rgb.convert("1"), "PNG", {}),
        "png, animated": (rgb, "PNG", {"save_all": True, "append_images": frames}),
        "gif": (palette, "GIF", {"transparency": 3}),
        "gif, animated": (rgb, "GIF", {"save_all": True, "append_images": frames}),
        "webp": (rgb, "WEBP", {"exif": exif}),
        "webp, lossless": (alpha, "WEBP", {"lossless": True}),
        "webp, animated": (rgb, "WEBP", {"save_all": True, "append_images": frames}),
        "bmp": (rgb, "BMP", {}),
        "bmp, palette": (palette, "BMP", {}),
        "tiff": (rgb, "TIFF", {"exif": exif}),
        "tiff, deflate": (rgb, "TIFF", {"compression": "tiff_deflate"}),
        "tiff, lzw": (alpha, "TIFF", {"compression": "tiff_lzw"}),
        "tiff, packbits": (palette, "TIFF", {"compression": "packbits"}),
        "tiff, jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff, fax": (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        "tiff, 16 bits": (deep, "TIFF", {"compression": "tiff_deflate"}),
        "ppm": (rgb, "PPM", {}),
        "pgm, 16 bits": (deep, "PPM", {}),
        "pbm": (rgb.convert("1"), "PPM", {}),
    }
    if features.check("avif"):
        kinds["avif"] = rgb, "AVIF", {"exif": exif}
        kinds["avif, alpha"] = alpha, "AVIF", {}
        kinds["avif, animated"] = rgb, "AVIF", {"save_all": True, "append_images": frames}
    found = {name: saved(image, form, **options) for name, (image, form, options) in kinds.items()}
    found["png, interlaced"] = interlaced(found["png, alpha"])
    found["bmp, run lengths"] = run_lengths()
    found["ppm, plain"] = b"P3 3 2 255 # a picture\n" + b"1 2 3  4 5 6  7 8 9 \n" * 2
    return found


def interlaced(data: bytes) -> bytes:
    """A PNG whose header says Adam7; Pillow writes none, so its passes hold other pixels."""
    width, height = struct.unpack(">II", data[16:24])
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)]  # fmt: skip
    rows = b""
    for left, top, across, down in passes:
        columns = len(range(left, width, across))
        rows += (b"\0" + bytes(range(4)) * columns) * len(range(top, height, down))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 1)
    return (
        data[:8]
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def run_lengths() -> bytes:
    """A BMP of 8 bits in run lengths."""
    rows = b"\x10\x05\x0e\x07\0\0" * 20 + b"\0\x04abcd\x1a\x09\0\1"
    colours = b"".join(struct.pack("<BBBB", i, 255 - i, i, 0) for i in range(256))
    start = 14 + 40 + len(colours)
    return (
        b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start)
        + struct.pack("<IiiHHIIiiII", 40, 30, 21, 1, 8, 1, len(rows), 0, 0, 256, 0) + colours + rows
    )  # fmt: skip


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    for _ in range(int(random.integers(1, 4))):
        # Half of the places are in the first bytes, where the sizes are.
        near = len(data) if random.random() < 0.5 else min(len(data), 80)
        start = int(random.integers(0, max(near, 1)))
        end = min(len(data), start + int(random.integers(1, 64)))
        kind = random.integers(7)
        if kind == 0 and data:
            data = data[:start] + bytes([data[start] ^ 1 << random.integers(8)]) + data[start + 1 :]
        elif kind == 1:
            data = data[:start]
        elif kind == 2:
            data = data[:start] + random.bytes(int(random.integers(1, 9))) + data[start:]
        elif kind == 3:
            data = data[:start] + data[end:]
        elif kind == 4:
            data = data[:end] + data[start:end] * int(random.integers(1, 20)) + data[end:]
        else:
            number, order = int(random.choice(NUMBERS)), str(random.choice(["little", "big"]))
            size = int(random.choice([2, 4]))
            piece = (number % 256**size).to_bytes(size, order)  # type: ignore[arg-type]
            data = data[:start] + piece + data[start + size :]
    return data


def of_every_kind(count: int) -> Iterator[tuple[str, bytes]]:
    """About so many mutated pictures over all kinds."""
    whole = small_pictures()
    for seed, (name, data) in enumerate(whole.items()):
        assert decode_image(data).mode == "RGB", name
        random = np.random.default_rng(seed)
        for _ in range(-(-count // len(whole))):
            yield name, mutated(data, random)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF blocks and large pictures
        yield


def test_each_is_read_or_named(pytestconfig: pytest.Config) -> None:
    outcomes: Counter[str] = Counter()
    preprocessing = Preprocessing(image_size=32, jpeg_draft=True)
    with peak() as most:
        for kind, data in of_every_kind(pytestconfig.getoption("mutations")):
            try:
                image = decode_image(data, name=kind)
            except BadImageError as error:
                line = f"{kind} must be a readable image, found: .{{1,300}}"
                assert re.fullmatch(line, str(error)), str(error)
                outcomes["named"] += 1
            else:
                assert image.mode == "RGB" and 0 not in image.size
                assert read_tensor(data, preprocessing, name=kind).shape == (3, 32, 32)
                outcomes["read"] += 1
    print(f"\n{outcomes.total()} pictures, {dict(outcomes)}, {most[0]:.0f} MiB")
    assert outcomes["named"] and outcomes["read"]
    assert most[0] < PEAK


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_good_ones_among_them_are_answered_as_without_them(
    pytestconfig: pytest.Config, batch_size: int
) -> None:
    """Whatever is bad, no row moves; and in batches of one picture no bit of a score changes."""
    random = np.random.default_rng(1)
    model = make_model()
    model.backend = "torch"  # for many pictures `auto` may take another, of other last digits
    arrays = list(random.integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8))
    alone = [model.predict(array)[0] for array in arrays]
    images: list[Any] = []
    good: dict[int, int] = {}  # position to array
    for number, (_, data) in enumerate(of_every_kind(pytestconfig.getoption("mutations"))):
        images.append(data if number % 2 else io.BytesIO(data))
        if random.random() < 0.5:
            good[len(images)] = int(random.integers(len(arrays)))
            images.append(arrays[good[len(images)]])
    with peak() as most:
        found = model.predict(images, on_bad_image="skip", batch_size=batch_size, workers=8)
    assert [p.source for p in found] == [str(i) for i in range(len(images))]
    for position, prediction in enumerate(found):
        if position in good:
            expected = alone[good[position]]
            assert prediction.error is None
            assert prediction.labels == expected.labels
            within = 0 if batch_size == 1 else 1e-5
            assert prediction.log_prob == pytest.approx(expected.log_prob, rel=0, abs=within)
            assert prediction.scores == pytest.approx(expected.scores, rel=0, abs=within)
        elif prediction.error is not None:
            assert prediction.error.startswith(f"image {position} must be a readable image, found")
            assert "\n" not in prediction.error and prediction.labels == []
    print(f"\n{len(images)} pictures, {most[0]:.0f} MiB")
    assert most[0] < PEAK
