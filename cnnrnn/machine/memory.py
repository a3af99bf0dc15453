"""What the C library does with memory that is no longer used."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep up to a gigabyte that is free, for the next activations.

    It gives large arrays back to the system, which clears their pages one by one when they are
    asked for again: a quarter of the time of a training step of an EfficientNet on a CPU. Nothing
    happens where the C library is another.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, KEPT_BYTES)
