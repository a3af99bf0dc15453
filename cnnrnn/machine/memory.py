"""Memory that the threads of a process share, and what the C library keeps of it."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def return_freed_memory() -> None:
    """Return what glibc keeps of the memory that each thread has freed; elsewhere do nothing."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Budget:
    """An amount of which each thread takes what it needs, and waits while too little is left.

    Who waits is not overtaken. A forked process starts with all of it.

    Args:
        total: the amount; who needs more than that waits until nobody else has any.
    """

    def __init__(self, total: int) -> None:
        """Start with all of it left."""
        self.total = total
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self._left = self.total
        self._first = threading.Lock()  # held by the one that is next
        self._returned = threading.Condition()

    @contextmanager
    def share(self, amount: int) -> Iterator[None]:
        """Hold an amount, as soon as so much is left."""
        amount = min(amount, self.total)
        with self._first, self._returned:
            self._returned.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._returned:
                self._left += amount
                self._returned.notify()
