"""Small files of pictures that are large, or claim to be, and what reading eight of them takes.

`python -m tests.data.hostile` prints the size of each kind, the peak, and what became of them.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cnnrnn.config import Preprocessing
from cnnrnn.data import BadImageError, budget
from cnnrnn.data.images import read_tensor
from cnnrnn.machine.memory import Budget, return_freed_memory

MEGABYTE = bytes(1 << 20)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, depth: int, colour: int, *, between: bytes = b"", share: float = 1.0
) -> bytes:
    """A PNG of zeros; `between` are chunks after its header, `share` is of the data it has."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    left = int(share * height * (1 + (width * depth * samples + 7) // 8))
    packer, data = zlib.compressobj(9), []
    while left > 0:
        data.append(packer.compress(MEGABYTE[:left]))
        left -= len(MEGABYTE)
    data.append(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + between
        + chunk(b"IDAT", b"".join(data)) + chunk(b"IEND", b"")
    )  # fmt: skip


PALETTE = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\x80\x80")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return chunk(b"eXIf", exif.tobytes()[6:])


def texts(count: int) -> bytes:
    """Chunks that unpack to a MiB each, of letters that take four bytes in Python."""
    body = "\U0001f600".encode() + b"a" * ((1 << 20) - 5)
    packed = zlib.compress(body, 9)
    return b"".join(chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + packed) for i in range(count))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def tiff(width: int, height: int, *, tile: int | None = None, compression: int = 8) -> bytes:
    """A deflated TIFF of 16 bits, RGBA, in one strip or tile, whose data ends at once."""
    data = zlib.compress(bytes(1000))
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, 16), (259, 3, compression), (262, 3, 2),
        (277, 3, 4), (284, 3, 1), (338, 3, 2),
    ]  # fmt: skip
    tags += [(273, 4, 8), (278, 4, height), (279, 4, len(data))] if tile is None else [
        (322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, len(data))
    ]  # fmt: skip
    depths = struct.pack("<4H", 16, 16, 16, 16)
    start = 8 + len(data) + len(data) % 2
    body = data.ljust(start - 8, b"\0")
    entries = b""
    for tag, kind, value in sorted(tags):
        if tag == 258:
            entries += struct.pack("<HHII", tag, 3, 4, start)
        else:
            entries += struct.pack("<HHI", tag, kind, 1) + (
                struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value)
            )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", start + len(depths)) + body + depths + directory


KINDS: dict[str, Callable[[int], bytes]] = {
    "RGBA": lambda side: png(side, side, 8, 6),
    "RGBA, turned": lambda side: png(side, side, 8, 6, between=turned(6)),
    "16-bit grey": lambda side: png(side, side, 16, 0),
    "palette with transparency": lambda side: png(side, side, 1, 3, between=PALETTE),
    "data that ends at once": lambda side: png(side, side, 8, 6, share=0.001),
    "one pixel wide": lambda side: png(1, side * side // 50, 1, 3, between=PALETTE),
    "narrow": lambda side: png(200, side * side // 250, 1, 3, between=PALETTE),
    "texts": lambda side: png(8, 8, 8, 2, between=texts(63)),
    "few texts": lambda side: png(8, 8, 8, 2, between=texts(16)),
    "GIF": lambda side: saved(Image.new("P", (side, side)), "GIF", transparency=0),
    "progressive CMYK": lambda side: saved(
        Image.new("CMYK", (side * 4 // 5, side * 4 // 5)), "JPEG", progressive=True
    ),
    "TIFF of one strip": lambda side: tiff(side * 4 // 5, side * 4 // 5),
    "TIFF of a large tile": lambda side: tiff(10, 10, tile=side // 16 * 16 * 4 // 3),
    "WebP": lambda side: saved(Image.new("RGBA", (side, side)), "WEBP", lossless=True),
    "WebP of a half": lambda side: saved(
        Image.new("RGBA", (side * 7 // 10, side * 7 // 10)), "WEBP", lossless=True
    ),
    "AVIF": lambda side: saved(Image.new("RGBA", (side, side)), "AVIF", speed=10),
    "AVIF of a half": lambda side: saved(
        Image.new("RGBA", (side * 7 // 10, side * 7 // 10)), "AVIF", speed=10
    ),
}  # fmt: skip


def in_memory(what: str = "VmHWM") -> float:
    """Return the most memory that this process has held, or with `VmRSS` holds, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{what}:\s+(\d+) kB", status)[0]) / 1024


@contextmanager
def peak() -> Iterator[list[float]]:
    """Put how much more memory was held than before, in MiB, in the list; Linux alone says it."""
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    except OSError:
        pytest.skip("no peak of memory here")
    before, found = in_memory("VmRSS"), list[float]()
    yield found
    found.append(in_memory() - before)


def read_eight(file: Path, pixels: int) -> tuple[float, str]:
    """Read a file in eight threads at once, with memory for so many pixels.

    Returns:
        The peak in MiB, and what became of each.
    """

    def read(_: int) -> str:
        try:
            read_tensor(file, Preprocessing(jpeg_draft=True), max_pixels=pixels)
        except BadImageError as error:
            return error.reason
        return "read"

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(budget, "PIXELS_AT_ONCE", Budget(pixels))
        with peak() as most:
            (outcome,) = set(pool.map(read, range(8)))
    return most[0], outcome


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for kind, make in KINDS.items():
            file = Path(folder) / "picture"
            file.write_bytes(make(10_000))
            most, outcome = read_eight(file, 100_000_000)
            size = -(-file.stat().st_size // 1024)
            print(f"{kind}: {size} KiB, {most:.0f} MiB, {outcome}", flush=True)
