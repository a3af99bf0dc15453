"""Small files of pictures that are large, or claim to be, and what reading eight of them takes.

`python -m tests.data.hostile FILE SIDE` prints the peak in MiB, above what the imports and a small
picture take, and what became of each.
"""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from cnnrnn.config import Preprocessing
from cnnrnn.data import BadImageError
from cnnrnn.data.images import read_tensor

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


SIDE = 10_000

KINDS: dict[str, Callable[[], bytes]] = {
    "rgba": lambda: png(SIDE, SIDE, 8, 6),
    "rgba turned": lambda: png(SIDE, SIDE, 8, 6, between=turned(6)),
    "16-bit grey": lambda: png(SIDE, SIDE, 16, 0),
    "palette": lambda: png(SIDE, SIDE, 1, 3, between=PALETTE),
    "16-bit rgba": lambda: png(SIDE, SIDE, 16, 6, share=0.3),
    "cut": lambda: png(SIDE, SIDE, 8, 6, share=0.001),
    "tall": lambda: png(1, 20_000_000, 1, 3, between=PALETTE),
    "narrow": lambda: png(200, 500_000, 1, 3, between=PALETTE),
    "texts": lambda: png(8, 8, 8, 2, between=texts(63)),
    "gif": lambda: saved(Image.new("P", (SIDE, SIDE)), "GIF", transparency=0),
    "webp": lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "WEBP", lossless=True),
    "webp in the budget": lambda: saved(Image.new("RGBA", (5_700, 5_700)), "WEBP", lossless=True),
    "avif": lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "AVIF", speed=10),
    "avif in the budget": lambda: saved(Image.new("RGBA", (7_000, 7_000)), "AVIF", speed=10),
    "progressive": lambda: saved(Image.new("CMYK", (8_000, 8_000)), "JPEG", progressive=True),
    "tiff": lambda: tiff(8_000, 8_000),
    "tiff tile": lambda: tiff(10, 10, tile=13_312),
}  # fmt: skip


def peak() -> int:
    """The most memory that this process has held, in KiB; Linux alone says it."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def main(name: str, side: str) -> None:
    preprocessing = Preprocessing(image_size=int(side), jpeg_draft=True)
    read_tensor(saved(Image.new("RGBA", (2000, 2000)), "PNG"), preprocessing)
    before = peak()

    def read(_: int) -> str:
        try:
            read_tensor(Path(name), preprocessing)
        except BadImageError as error:
            return error.reason
        return "read"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(read, range(8)))
    print(json.dumps({"peak": (peak() - before) / 1024, "outcomes": outcomes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
