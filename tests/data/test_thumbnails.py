from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnnrnn.data.images import decode_image
from cnnrnn.data.thumbnails import thumbnail_uri

PREFIX = "data:image/jpeg;base64,"


def picture(uri: str | None) -> Image.Image:
    assert uri is not None and uri.startswith(PREFIX)
    image = Image.open(io.BytesIO(base64.b64decode(uri[len(PREFIX) :], validate=True)))
    image.load()
    assert image.format == "JPEG" and image.mode == "RGB"
    return image


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right: what JPEG keeps."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "size, expected",
    [
        ((320, 200), (160, 100)),
        ((200, 320), (100, 160)),
        ((64, 48), (64, 48)),  # not enlarged
        ((1, 1), (1, 1)),
        ((2000, 3), (160, 1)),
        ((3, 2000), (1, 160)),
        ((157, 331), (76, 160)),
    ],
)
def test_it_keeps_the_proportions(tmp_path: Path, size: Any, expected: Any) -> None:
    for suffix in ("png", "jpg"):
        file = save(tmp_path / f"x.{suffix}", Image.new("RGB", size, "red"))
        found = picture(thumbnail_uri(file)).size
        assert np.abs(np.subtract(found, expected)).max() <= 1  # JPEG drafts round sizes up


def test_it_shows_what_the_decoder_reads(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        file = save(tmp_path / f"x.{suffix}", halves(640, 480))
        found = np.asarray(picture(thumbnail_uri(file, 80)), dtype=int)
        expected = np.asarray(decode_image(file).resize((80, 60)), dtype=int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = halves(200, 100)
    image.paste((0, 255, 0), (0, 0, 40, 20))
    file = save(tmp_path / "x.jpg", image, exif=exif, quality=95)
    found = picture(thumbnail_uri(file, 100))
    upright = decode_image(file)
    assert found.size == (upright.width // 2, upright.height // 2)
    expected = np.asarray(upright.resize(found.size), dtype=int)
    assert np.abs(np.asarray(found, dtype=int) - expected).mean() < 6


def test_every_kind_of_image_gives_the_same(tmp_path: Path) -> None:
    image = halves(40, 20)
    file = save(tmp_path / "x.png", image)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    uris = {
        thumbnail_uri(given)
        for given in (
            file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()), image, pixels,
            pixels[:, ::1], tensor, tensor.float() / 255, tensor.double() / 255,
        )
    }  # fmt: skip
    assert len(uris) == 1
    assert picture(uris.pop()).size == (40, 20)


def test_what_cannot_be_read_has_none(tmp_path: Path) -> None:
    whole = save(tmp_path / "x.jpg", halves(64, 64)).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("half.jpg", "text.png", "pipe.jpg", "missing.jpg", ".", "nul\0.jpg"):
        assert thumbnail_uri(tmp_path / name) is None
        assert thumbnail_uri(str(tmp_path / name)) is None
    assert thumbnail_uri(b"") is None
    large = save(tmp_path / "large.png", Image.new("L", (100, 100)))
    assert thumbnail_uri(large, max_pixels=9_999) is None
    assert thumbnail_uri(large, max_pixels=200_000) is not None


def test_a_name_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path / "x") + b"\xff.png"))
    assert thumbnail_uri(save(file, halves(8, 8))) is not None


def test_nothing_else_of_the_file_is_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[270] = "where it was taken"
    file = save(tmp_path / "x.jpg", halves(64, 64), exif=exif, comment=b"by whom" * 1000)
    uri = thumbnail_uri(file)
    assert uri is not None and len(uri) < 3000
    assert html.escape(uri, quote=True) == uri
    found = picture(uri)
    assert not found.getexif() and "comment" not in found.info


def test_a_picture_of_the_caller_stays_as_it_is() -> None:
    image = halves(400, 300)
    thumbnail_uri(image)
    assert image.size == (400, 300)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        thumbnail_uri(halves(8, 8), 0)
    with pytest.raises(ValueError, match=r"image must be an array \[H, W, 3\].* got \[8, 8\]"):
        thumbnail_uri(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="of float64"):
        thumbnail_uri(np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="got .0, 8, 3."):
        thumbnail_uri(np.zeros((0, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"image must be a tensor \[3, H, W\], got \[8, 8, 3\]"):
        thumbnail_uri(torch.zeros(8, 8, 3, dtype=torch.uint8))
