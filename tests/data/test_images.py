from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from PIL.PngImagePlugin import PngImageFile

from cnnrnn.config import Preprocessing
from cnnrnn.data import BadImageError, DataError, Dataset, budget
from cnnrnn.data.images import (
    ImageRecords,
    decode_image,
    image_batches,
    normalize,
    read_tensor,
    to_rgb,
    to_tensor,
)
from tests.data import hostile

SIDE = 16
PREPROCESSING = Preprocessing(image_size=SIDE)


def noise(height: int = 24, width: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def assert_pixels(path: Path, expected: Any) -> None:
    image = decode_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected, dtype=np.uint8))


# Decoding: colour modes.


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_rgb(tmp_path: Path, suffix: str) -> None:
    assert_pixels(save(tmp_path / f"x.{suffix}", noise()), noise())


@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif"])
def test_lossy_formats(tmp_path: Path, suffix: str) -> None:
    file = save(tmp_path / f"x.{suffix}", Image.new("RGB", (20, 10), (200, 100, 50)))
    assert np.abs(np.asarray(decode_image(file), dtype=int) - [200, 100, 50]).max() <= 3


def test_grey_and_bilevel(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    assert_pixels(save(tmp_path / "l.png", Image.fromarray(grey)), np.stack([grey] * 3, -1))
    bits = Image.fromarray(grey > 90)
    assert bits.mode == "1"
    assert_pixels(save(tmp_path / "1.png", bits), np.stack([(grey > 90) * 255] * 3, -1))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 1, 128, 129], [257, 32768, 65407, 65535]], dtype=np.uint16)
    expected = np.stack([np.round(values / 257)] * 3, -1)
    file = save(tmp_path / f"x.{suffix}", Image.fromarray(values))
    assert_pixels(file, expected)
    assert expected[0, 3, 0] == 1 and expected[1, 3, 0] == 255


def test_transparency_is_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    expected = [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
    assert_pixels(save(tmp_path / "rgba.png", Image.fromarray(rgba)), expected)
    grey_alpha = np.array([[[10, 255], [10, 0]]], dtype=np.uint8)
    assert_pixels(
        save(tmp_path / "la.png", Image.fromarray(grey_alpha, mode="LA")),
        [[[10] * 3, [255] * 3]],
    )
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert_pixels(save(tmp_path / "p.png", palette), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])
    expected = [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert_pixels(save(tmp_path / "pt.png", palette, transparency=1), expected)
    assert_pixels(save(tmp_path / "pt.gif", palette, transparency=1), expected)
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    file = save(tmp_path / "rgb.png", keyed, transparency=(4, 5, 6))
    assert_pixels(file, [[[1, 2, 3], [255, 255, 255]]])


def test_cmyk(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = np.asarray(decode_image(save(tmp_path / "x.jpg", cmyk, quality=95)), dtype=int)
    assert np.abs(pixels - [255, 0, 0]).max() <= 3
    assert_pixels(save(tmp_path / "x.tiff", cmyk), np.full((16, 16, 3), [255, 0, 0]))


def test_modes_without_a_meaning(tmp_path: Path) -> None:
    file = save(tmp_path / "f.tiff", Image.fromarray(np.zeros((2, 2), np.float32)))
    with pytest.raises(BadImageError, match="f.tiff .*found: floating-point pixels"):
        decode_image(file)
    file = save(tmp_path / "i.tiff", Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(BadImageError, match=r"i.tiff .*grey values 0\.\.70000"):
        decode_image(file)


def test_to_rgb_leaves_its_argument_alone() -> None:
    image = noise()
    copy = to_rgb(image)
    copy.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == noise().getpixel((0, 0)) != (1, 2, 3)


# Decoding: orientation.


TURNED = {  # EXIF orientation: what the stored rows and columns of a [H, W] picture must become
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    file = save(tmp_path / f"x.{suffix}", noise(), exif=exif, **options)
    assert_pixels(file, TURNED[orientation](np.asarray(noise())))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_pixels(save(tmp_path / "x.png", noise(), exif=exif), noise())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_does_not_spoil_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    generator = np.random.default_rng(0)
    for _ in range(100):
        altered = bytearray(block)
        for position in generator.integers(6, len(block), 3):
            altered[position] = generator.integers(256)
        file = save(tmp_path / "x.png", noise(), exif=bytes(altered))
        assert sorted(decode_image(file).size) == [24, 40]


# Decoding: bad files.


def test_bad_files_name_path_and_record(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "missing.png": "no such file",
        "text.png": "no image in a known format",
        "empty.jpg": "no image in a known format",
        "folder.png": "a folder",
        "pipe.png": "something that is not a file",
        "nul\0.png": "embedded null byte",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(BadImageError) as caught:
            decode_image(tmp_path / name, "record 3 of coco:here")
        error = caught.value
        assert error.path == str(tmp_path / name) and error.record == "record 3 of coco:here"
        assert str(error) == (
            f"{tmp_path / name} (record 3 of coco:here) must be a readable image, found: {reason}"
        )
        assert isinstance(error, DataError)


@pytest.mark.parametrize(("suffix", "form"), [(".pgm", "ppm"), (".jfif", "jpeg"), (".jpe", "jpeg")])
def test_other_suffixes(tmp_path: Path, suffix: str, form: str) -> None:
    Image.new("L", (8, 6), 77).save(tmp_path / f"a{suffix}", form)
    assert decode_image(tmp_path / f"a{suffix}").getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_heif_names_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brand: bytes
) -> None:
    monkeypatch.setattr("cnnrnn.data.images._known_formats", lambda: ("JPEG", "PNG"))
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic"
    (tmp_path / "a.heic").write_bytes(data)
    message = "found: a HEIF image, which only pillow-heif reads: pip install pillow-heif"
    for image in (tmp_path / "a.heic", data):
        with pytest.raises(BadImageError, match=message):
            decode_image(image)
    monkeypatch.setattr("cnnrnn.data.images._known_formats", lambda: ("JPEG", "HEIF"))
    with pytest.raises(BadImageError, match="found: "):
        decode_image(data)


def test_heif_is_read_where_its_library_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.heic")
    red, green, _ = decode_image(tmp_path / "a.heic").getpixel((8, 8))  # type: ignore[misc]
    assert red > 200 and green < 60


def test_bytes_and_open_files_are_like_files(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (1, 2, 3)).save(file)
    with open(file, "rb") as handle:
        handle.read(5)
        for image in (file.read_bytes(), io.BytesIO(file.read_bytes()), handle, handle):
            assert decode_image(image).tobytes() == decode_image(file).tobytes()
    file.write_bytes(file.read_bytes()[:40])
    with open(file, "rb") as handle:
        for image in (file.read_bytes(), handle):
            with pytest.raises(BadImageError, match="picture 7 must be a readable image, found: "):
                decode_image(image, name="picture 7")


def test_jpeg_2000_is_not_read(tmp_path: Path) -> None:
    """Its decoder makes a picture of a file that is cut short."""
    file = save(tmp_path / "x.jp2", noise())
    with pytest.raises(BadImageError, match="no image in a known format"):
        decode_image(file)


def test_ghostscript_is_never_started(tmp_path: Path) -> None:
    file = save(tmp_path / "x.eps", noise())
    with pytest.raises(BadImageError, match="no image in a known format"):
        decode_image(file)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"whole.{suffix}", noise())
    data, pixels = whole.read_bytes(), np.asarray(decode_image(whole))
    file = tmp_path / f"cut.{suffix}"
    for cut in {1, 2, 3, 8, *range(16, len(data), len(data) // 20)}:
        file.write_bytes(data[:-cut])
        try:
            image = decode_image(file)
        except BadImageError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        else:  # only a trailer is missing
            assert cut <= 16 or suffix == "tiff"  # PNG: an empty chunk and a checksum
            np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    ("suffix", "options", "trailer"),
    [("png", {}, 20), ("jpg", {}, 2), ("jpg", {"progressive": True}, 2), ("webp", {}, 0),
     ("webp", {"lossless": True}, 0), ("gif", {}, 2), ("bmp", {}, 0), ("ppm", {}, 0),
     ("avif", {}, 0), ("tiff", {}, 0), ("tiff", {"compression": "tiff_deflate"}, 0),
     ("tiff", {"compression": "tiff_lzw"}, 0), ("tiff", {"compression": "jpeg"}, 0)],
)  # fmt: skip
def test_a_picture_cut_at_every_length(
    tmp_path: Path, suffix: str, options: dict[str, Any], trailer: int
) -> None:
    """Only where no more than checksums and end marks are gone may it still be read."""
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = save(tmp_path / f"whole.{suffix}", noise(6, 8), **options)
    data, pixels = whole.read_bytes(), np.asarray(decode_image(whole))
    file = tmp_path / f"cut.{suffix}"
    for length in range(len(data)):
        file.write_bytes(data[:length])
        try:
            image = decode_image(file)
        except BadImageError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert len(data) - length <= trailer, length
            np.testing.assert_array_equal(np.asarray(image), pixels)


DRAFTS = Preprocessing(image_size=SIDE, jpeg_draft=True)


def smooth(height: int, width: int) -> Image.Image:
    return noise(4, 6).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((63, 200), (63, 200)), ((64, 200), (32, 100)), ((129, 128), (32, 32)), ((131, 128), (33, 32)),
     ((504, 260), (63, 32)), ((260, 504), (32, 63)), ((8, 900), (8, 900))],
)  # fmt: skip
def test_large_jpegs_are_decoded_at_twice_the_input_or_more(
    tmp_path: Path, size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    file = save(tmp_path / "x.jpg", smooth(size[1], size[0]), quality=95)
    assert decode_image(file).size == size
    assert decode_image(file, preprocessing=PREPROCESSING).size == size
    assert decode_image(file, preprocessing=DRAFTS).size == decoded
    assert decode_image(file.read_bytes(), preprocessing=DRAFTS).size == decoded
    pixels = [
        to_tensor(decode_image(file, preprocessing=p), p).int() for p in (PREPROCESSING, DRAFTS)
    ]
    assert (pixels[0] - pixels[1]).abs().float().mean() < 4


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "gif"])
def test_other_formats_have_no_drafts(tmp_path: Path, suffix: str) -> None:
    file = save(tmp_path / f"x.{suffix}", smooth(200, 200))
    assert decode_image(file, preprocessing=DRAFTS).size == (200, 200)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_drafts_of_other_colours_and_orientations(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    file = save(tmp_path / "x.jpg", smooth(128, 256).convert(mode), exif=exif, quality=95)
    whole, draft = decode_image(file), decode_image(file, preprocessing=DRAFTS)
    assert (whole.size, draft.size) == ((128, 256), (32, 64))
    same = whole.resize(draft.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(same, dtype=int) - np.asarray(draft, dtype=int))
    assert difference.mean() < 3


def test_a_truncated_draft_is_a_bad_image(tmp_path: Path) -> None:
    data = save(tmp_path / "x.jpg", noise(200, 200)).read_bytes()
    with pytest.raises(BadImageError, match="truncated"):
        decode_image(data[: len(data) // 2], preprocessing=DRAFTS)


def test_training_and_prediction_see_the_same_draft(tmp_path: Path) -> None:
    from cnnrnn.prediction.inputs import read_image

    files = [save(tmp_path / f"{i}.jpg", smooth(90 + 30 * i, 200)) for i in range(3)]
    data = Dataset(images=files, labels=[["a"], ["b"], []])
    for i, file in enumerate(files):
        trained = ImageRecords(data, DRAFTS)[i][1]
        for source in (file, file.read_bytes()):
            predicted = read_image(i, source, DRAFTS, "error").image
            assert isinstance(trained, torch.Tensor) and predicted is not None
            assert torch.equal(trained, predicted)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("size", [(60000, 60000), (10001, 10000)])
def test_huge_pictures_are_rejected_by_their_header(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pillow_limit: int | None,
    size: tuple[int, int],
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    file = tmp_path / "bomb.png"
    file.write_bytes(png_claiming(*size))
    started = time.perf_counter()
    with pytest.raises(BadImageError, match=r"bomb\.png.*more than 100,000,000.*max_pixels"):
        decode_image(file)
    assert time.perf_counter() - started < 0.5


def test_max_pixels_is_of_a_picture(tmp_path: Path) -> None:
    file = save(tmp_path / "x.png", noise(20, 30))
    for image in (file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()), noise(20, 30)):
        assert decode_image(image, max_pixels=600).size == (30, 20)
        with pytest.raises(BadImageError) as caught:
            decode_image(image, max_pixels=599)
        assert caught.value.reason == "30x20 pixels, more than 599: max_pixels allows more"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pillows_own_limit_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    message = "more than 500 pixels: max_pixels and PIL.Image.MAX_IMAGE_PIXELS allow more"
    with pytest.raises(BadImageError, match=message):
        decode_image(png_claiming(30, 20))


def test_a_draft_counts_by_its_own_size_and_a_progressive_one_in_full(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.jpg", smooth(128, 256))
    progressive = save(tmp_path / "b.jpg", smooth(128, 256), progressive=True)
    for file, most in ((plain, 2048), (progressive, 1024 + 6 * 32768 // 8)):
        assert decode_image(file, preprocessing=DRAFTS, max_pixels=most).size == (64, 32)
        with pytest.raises(BadImageError, match=f"^{file} .*more than {most - 1:,}: max_pixels"):
            decode_image(file, preprocessing=DRAFTS, max_pixels=most - 1)
    with pytest.raises(BadImageError, match="256x128 pixels, more than 32,767: max_pixels"):
        decode_image(plain, max_pixels=32767)


def test_a_tall_picture_counts_as_wide_as_it_is_resized(tmp_path: Path) -> None:
    file = save(tmp_path / "x.png", noise(1000, 2))
    assert decode_image(file, max_pixels=2000).size == (2, 1000)
    assert read_tensor(file, PREPROCESSING, max_pixels=9000).shape == (3, SIDE, SIDE)
    message = "2x1000 pixels with the memory of 9,000, more than 8,999: max_pixels allows more"
    with pytest.raises(BadImageError, match=message):
        read_tensor(file, PREPROCESSING, max_pixels=8999)


@pytest.mark.parametrize(
    ("suffix", "options", "counted"),
    [("webp", {}, 1200), ("tiff", {}, 600), ("tiff", {"compression": "tiff_deflate"}, 600),
     ("bmp", {}, 600), ("gif", {}, 600), ("jpg", {"progressive": True}, 750)],
)  # fmt: skip
def test_what_a_decoder_holds_counts(
    tmp_path: Path, suffix: str, options: dict[str, Any], counted: int
) -> None:
    file = save(tmp_path / f"x.{suffix}", noise(20, 30), **options)
    decode_image(file, max_pixels=counted)
    with pytest.raises(BadImageError, match="max_pixels allows more"):
        decode_image(file, max_pixels=counted - 1)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_the_tile_of_a_tiff_counts() -> None:
    assert "30x20" in str(bad_reason(hostile.tiff(30, 20), max_pixels=300 + 20 * 30 * 8 // 8 - 1))
    assert "more than 100,000,000" in str(bad_reason(hostile.tiff(10, 10, tile=12_000)))
    start = int.from_bytes(hostile.tiff(30, 20)[4:8], "little")
    for position in range(start, len(hostile.tiff(30, 20))):  # whatever its tags say
        data = bytearray(hostile.tiff(30, 20))
        data[position] = 0xFF
        bad_reason(bytes(data))


def bad_reason(data: bytes, **options: Any) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_image(data, **options)
    assert "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("place", ["open", "load", "convert", "resize"])
def test_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A picture that takes too much is bad, and others go on."""
    file = save(tmp_path / "x.png", noise())
    dataset = grey_dataset(tmp_path, 3)

    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    target = Image if place == "open" else Image.Image if place != "load" else PngImageFile
    reason = "one that needs more memory than there is"
    with monkeypatch.context() as patch:
        patch.setattr(target, place, fail)
        for image in (file, file.read_bytes()):
            with pytest.raises(BadImageError, match=reason):
                read_tensor(image, PREPROCESSING)
        if place in ("convert", "resize"):
            with pytest.raises(BadImageError, match=f"image 7 must be .*{reason}"):
                read_tensor(noise(), PREPROCESSING, name="image 7")
        bad = ImageRecords(dataset, PREPROCESSING, on_bad_image="skip")[1][1]
        assert isinstance(bad, BadImageError) and bad.reason == reason
    assert read_tensor(file, PREPROCESSING).shape == (3, SIDE, SIDE)


def test_errors_that_are_kept_do_not_keep_the_picture(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 1, bad=(0,))
    error = ImageRecords(dataset, PREPROCESSING, on_bad_image="skip")[0][1]
    assert isinstance(error, BadImageError)
    assert error.__traceback__ is error.__cause__ is error.__context__ is None


def large_pictures() -> dict[str, Image.Image]:
    """One of each mode, and of each kind of transparency, on which strips end in odd places."""
    random = np.random.default_rng(0)
    rgba = Image.fromarray(random.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(random.integers(0, 65536, (37, 23), dtype=np.uint16))
    found = {mode: rgba.convert(mode) for mode in ("RGBA", "LA", "RGBa", "RGBX")}
    found |= {mode: rgb.convert(mode) for mode in ("RGB", "L", "1", "CMYK", "YCbCr", "HSV", "LAB")}
    found |= {mode: deep.convert(mode) for mode in ("I;16", "I")}
    found["P"] = rgb.quantize(7)
    shares = bytes(range(0, 140, 20))
    for name, image, key in (("P", found["P"], 3), ("P, several", found["P"], shares),
                             ("RGB", rgb, rgb.getpixel((5, 5))), ("L", grey, 77)):  # fmt: skip
        found[f"{name}, transparent"] = image.copy()
        found[f"{name}, transparent"].info["transparency"] = key
    return found


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("name", large_pictures())
def test_a_large_picture_is_converted_as_a_small_one(
    monkeypatch: pytest.MonkeyPatch, name: str, orientation: int
) -> None:
    image = large_pictures()[name]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    whole = to_rgb(image)
    expected = TURNED[orientation](np.asarray(to_rgb(large_pictures()[name])))
    np.testing.assert_array_equal(np.asarray(whole), expected)
    for pixels in (1, 100, 23 * 36):
        monkeypatch.setattr("cnnrnn.data.images._STRIP", pixels)
        strips = to_rgb(image)
        assert strips.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(strips), np.asarray(whole))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_eight_hostile_pictures_at_once(tmp_path: Path, kind: str) -> None:
    """They are small files, and take 8 bytes a pixel of the budget: at most half of what eight do.

    glibc keeps more of these few megapixels than of the 100 that `tests.data.hostile` has.
    """
    if "AVIF" in kind and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    side = 5000 if "WebP" in kind else 2500  # glibc clears smaller canvases as a file is opened
    (tmp_path / "picture").write_bytes(hostile.KINDS[kind](side))
    assert (tmp_path / "picture").stat().st_size < 200_000
    most, _ = hostile.read_eight(tmp_path / "picture", side**2)
    texts = 8 * 5 * budget.MAX_TEXTS if kind == "few texts" else 0
    arenas = 8 * 8  # what glibc keeps for each thread
    assert most < 4 * 8 * side**2 / 2**20 + texts + arenas


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_eight_pictures_of_100_megapixels(tmp_path: Path) -> None:
    """The kind of the smallest file; `python -m tests.data.hostile` reads them all."""
    (tmp_path / "picture").write_bytes(hostile.KINDS["palette with transparency"](10_000))
    assert (tmp_path / "picture").stat().st_size < 20_000
    most, outcome = hostile.read_eight(tmp_path / "picture", 100_000_000)
    assert most < 1000 and outcome == "read"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_file_stays_open(tmp_path: Path) -> None:
    file = save(tmp_path / "x.tiff", noise(), compression="tiff_deflate")
    (tmp_path / "cut.tiff").write_bytes(file.read_bytes()[:-40])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = decode_image(file)
        with pytest.raises(BadImageError):
            decode_image(tmp_path / "cut.tiff")
    file.unlink()
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise()))
    assert not hasattr(image, "fp")


def test_errors_travel_between_processes() -> None:
    error = BadImageError("a.png", "no such file", "record 3 of here")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is BadImageError and str(copy) == str(error)
    assert (copy.path, copy.reason, copy.record) == (error.path, error.reason, error.record)


# Preprocessing.


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (90, 31)])
def test_to_tensor_squashes_the_whole_picture(interpolation: Any, size: tuple[int, int]) -> None:
    image = noise(*size)
    tensor = to_tensor(image, Preprocessing(image_size=SIDE, interpolation=interpolation))
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, SIDE, SIDE)
    assert tensor.is_contiguous()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double(),
        (SIDE, SIDE),
        mode=interpolation,
        antialias=True,
    )
    # torch's bicubic uses another coefficient (-0.75 against -0.5), so only bilinear is compared.
    if interpolation == "bilinear":
        assert (tensor - expected[0].clamp(0, 255)).abs().max() <= 1.5
    if size == (SIDE, SIDE):
        np.testing.assert_array_equal(tensor.permute(1, 2, 0), np.asarray(image))


def test_to_tensor_wants_rgb() -> None:
    with pytest.raises(ValueError, match="image must be RGB, got mode L"):
        to_tensor(Image.new("L", (4, 4)), PREPROCESSING)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_normalize(batch: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    inputs = images if dtype == torch.uint8 else (images.double() / 255).to(dtype)
    scaled = images.double() / 255 if dtype == torch.uint8 else inputs.double()
    mean = torch.tensor(PREPROCESSING.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(PREPROCESSING.std, dtype=torch.float64).view(3, 1, 1)
    result = normalize(inputs.to(device), PREPROCESSING)
    assert result.device.type == device.type
    torch.testing.assert_close(result.cpu(), ((scaled - mean) / std).float(), rtol=1e-5, atol=1e-6)


def test_normalize_checks_its_argument() -> None:
    with pytest.raises(ValueError, match=r"batch must be \[B, 3, S, S\], got \[3, 8, 8\]"):
        normalize(torch.zeros(3, 8, 8), PREPROCESSING)
    with pytest.raises(ValueError, match="batch must be uint8 or floating point, got torch.int64"):
        normalize(torch.zeros(1, 3, 8, 8, dtype=torch.int64), PREPROCESSING)


# Records and batches. Picture i is of one grey i * 10, so that a shift of labels shows.


def grey_dataset(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Dataset:
    for i in range(count):
        Image.new("RGB", (20 + i, 12), (i * 10,) * 3).save(folder / f"{i}.png")
    for i in bad:
        data = (folder / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(data[: len(data) // 2])
    return Dataset.from_arrays(
        source="coco:here",
        label_names=tuple(f"label {i}" for i in range(count)),
        label_indptr=np.arange(count + 1),
        label_indices=np.arange(count),
        images=tuple(folder / f"{i}.png" for i in range(count)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order(tmp_path: Path, workers: int) -> None:
    state = torch.get_rng_state()
    batches = list(
        image_batches(grey_dataset(tmp_path, 11), PREPROCESSING, batch_size=4, workers=workers)
    )
    assert [batch.images.shape for batch in batches] == [(4, 3, 16, 16)] * 2 + [(3, 3, 16, 16)]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(11))
    assert batches[0].indices.dtype == torch.int64 and batches[0].images.dtype == torch.uint8
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist() == [
        i * 10 for i in range(11)
    ]
    torch.testing.assert_close(torch.get_rng_state(), state)  # plain reading draws nothing


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_labels_never_shift(tmp_path: Path, workers: int, shuffle: bool) -> None:
    dataset = grey_dataset(tmp_path, 20, bad=(0, 5, 6, 19))
    batches = image_batches(
        dataset,
        PREPROCESSING,
        batch_size=3,
        workers=workers,
        shuffle_generator=torch.Generator().manual_seed(3) if shuffle else None,
        on_bad_image="skip",
    )
    seen: list[int] = []
    bad: list[BadImageError] = []
    message = r"^4 of 20 images were left out, the first: .*\.png \(record \d+ of coco:here\) must"
    with pytest.warns(UserWarning, match=message) as caught:
        for batch in batches:
            grey = batch.images[:, 0, 3, 3].tolist()
            assert grey == [dataset.labels(int(i)).item() * 10 for i in batch.indices]
            seen += batch.indices.tolist()
            bad += batch.bad
    assert len(caught) == 1
    assert sorted(seen) == [i for i in range(20) if i not in (0, 5, 6, 19)]
    assert (sorted(seen) == seen) != shuffle
    assert len(bad) == 4
    assert {Path(error.path).name for error in bad} == {"0.png", "5.png", "6.png", "19.png"}
    assert list(batches) == []  # one pass, one warning


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_they_are(tmp_path: Path, workers: int) -> None:
    dataset = grey_dataset(tmp_path, 9, bad=(4,)).select([8, 4, 2])
    with pytest.raises(BadImageError) as caught:
        list(image_batches(dataset, PREPROCESSING, batch_size=2, workers=workers))
    assert str(caught.value).startswith(
        f"{tmp_path / '4.png'} (record 4 of coco:here) must be a readable image, found: "
    )
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []  # although the error is still held
    records = ImageRecords(dataset, PREPROCESSING)
    assert records[0][0] == 0
    with pytest.raises(BadImageError, match="record 4 of coco:here"):
        records[1]


def test_batches_without_any_picture(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 6, bad=(2, 3))
    batches = image_batches(dataset, PREPROCESSING, batch_size=2, on_bad_image="skip")
    with pytest.warns(UserWarning, match="2 of 6 images"):
        assert [batch.indices.tolist() for batch in batches] == [[0, 1], [4, 5]]
    batches = image_batches(
        dataset.select([2, 3]), PREPROCESSING, batch_size=2, on_bad_image="skip"
    )
    with pytest.raises(DataError, match="2 of 2 images cannot be read, the first: .*2.png"):
        list(batches)
    assert list(image_batches(dataset.select([]), PREPROCESSING, batch_size=2)) == []


def test_image_batches_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        image_batches(grey_dataset(tmp_path, 1), PREPROCESSING, batch_size=0)
    features = Dataset.from_arrays("features:f.npz", ("a",), np.array([0, 1]), np.array([0]),
                       features=np.zeros((1, 2)))  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(DataError, match="features:f.npz must have image files"):
        image_batches(features, PREPROCESSING, batch_size=1)


def gather(dataset: Dataset, seed: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    batches = list(
        image_batches(
            dataset,
            PREPROCESSING,
            batch_size=3,
            workers=workers,
            augment=True,
            shuffle_generator=torch.Generator().manual_seed(seed),
        )
    )
    return torch.cat([b.indices for b in batches]), torch.cat([b.images for b in batches])


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_follows_the_seed(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("torchvision")
    dataset = grey_dataset(tmp_path, 8)
    for i, path in enumerate(dataset.image_paths or ()):
        noise(seed=i).save(path)
    first, again = gather(dataset, 1, workers), gather(dataset, 1, workers)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    other = gather(dataset, 2, workers)
    assert not torch.equal(first[0], other[0]) or not torch.equal(first[1], other[1])


def test_augmentation_flips_and_shifts(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    side = 32
    image = noise(side, side)
    image.save(tmp_path / "0.png")
    dataset = Dataset.from_arrays("coco:here", ("a",), np.array([0, 0]), np.array([], np.int32),
                      images=(tmp_path / "0.png",))  # fmt: skip
    records = ImageRecords(dataset, Preprocessing(image_size=side), augment=True)
    pixels = np.asarray(image)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    flipped = np.pad(pixels[:, ::-1], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    possible = {
        base[top : top + side, left : left + side].tobytes(): (turn, top, left)
        for turn, base in enumerate((padded, flipped))
        for top in range(5)
        for left in range(5)
    }
    torch.manual_seed(0)
    seen = set()
    for _ in range(400):
        _, result = records[0]
        assert isinstance(result, torch.Tensor) and result.dtype == torch.uint8
        seen.add(possible[result.permute(1, 2, 0).contiguous().numpy().tobytes()])
    assert len(seen) == 50


@pytest.mark.parametrize("side", [1, 15])
def test_small_sides_do_not_shift(tmp_path: Path, side: int) -> None:
    pytest.importorskip("torchvision")
    dataset = grey_dataset(tmp_path, 1)
    image = ImageRecords(dataset, Preprocessing(image_size=side), augment=True)[0][1]
    assert isinstance(image, torch.Tensor) and image.shape == (3, side, side)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cnnrnn\[vision\]"'):
        ImageRecords(grey_dataset(tmp_path, 1), PREPROCESSING, augment=True)


def test_augmentation_depends_on_no_number_of_workers(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    dataset = grey_dataset(tmp_path, 8)
    for i, path in enumerate(dataset.image_paths or ()):
        noise(seed=i).save(path)
    alone = gather(dataset, 1, 0)
    state = torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(1).get_state())  # nothing was drawn from torch's
    torch.testing.assert_close(alone, gather(dataset, 1, 2), rtol=0, atol=0)


def test_empty_batches_are_kept_on_request(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 5)
    for path in (dataset.image_paths or ())[2:4]:
        path.write_bytes(b"no picture")
    sizes = []
    for keep in (False, True):
        with pytest.warns(UserWarning, match="2 of 5 images were left out"):
            batches = image_batches(
                dataset, PREPROCESSING, batch_size=2, on_bad_image="skip", keep_empty=keep
            )
            sizes.append([len(batch.indices) for batch in batches])
    assert sizes == [[2, 1], [2, 0, 1]]
