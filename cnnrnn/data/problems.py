"""What is wrong with a source: raised at once, or kept for a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cnnrnn.data.dataset import DataError


class EmptySourceError(DataError):
    """Nothing is left of a source; beside other problems this follows from them."""


class Problems:
    """Takes what is wrong with a source, one sentence each: raises the first, or keeps them all.

    A reader that goes on after `add` leaves the record out.

    Args:
        keep: go on and keep every message.

    Attributes:
        messages: what was kept.
    """

    def __init__(self, keep: bool = False) -> None:
        """Start without problems."""
        self.keep = keep
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Raise `DataError`, or keep the message."""
        if not self.keep:
            raise DataError(message)
        self.messages.append(message)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Where problems are kept, a part that cannot be read at all does not end the others."""
        try:
            yield
        except DataError as error:
            if not self.keep:
                raise
            if self.messages and isinstance(error, EmptySourceError):
                return
            self.messages.append(str(error))
