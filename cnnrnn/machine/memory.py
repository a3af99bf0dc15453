"""Memory that the threads of a process share."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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
