"""What only an extra installs, imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(package: str, what: str, extra: str = "vision") -> Iterator[None]:
    """Say which extra to install where an import in the block fails.

    Args:
        package: what is imported, by its name on PyPI.
        what: what needs it, to begin the message with.
        extra: the extra of this package that installs it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs {package}: pip install "cnnrnn[{extra}]"'
        ) from error
