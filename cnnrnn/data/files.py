"""The files of a source: their text, names in it, and what is wrong with it."""

from __future__ import annotations

import codecs
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cnnrnn.data.dataset import DataError, is_text

_DROPPINGS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}

_log = logging.getLogger(__name__)


def read_bytes(file: Path) -> bytes:
    """Read a regular file whole.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    return b"".join(read_blocks(file, -1))


def read_blocks(file: Path, size: int = 1 << 22) -> Iterator[bytes]:
    """Read a regular file in blocks of whole lines of about `size` bytes, or at once with -1.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{file} must be a file, found {kind_of_path(file)}")
        with open(file, "rb") as handle:
            while block := handle.read(size) + handle.readline():
                yield block
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{file} must be a file, found no such file") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # NUL in the name
        raise DataError(f"{short(str(file))} must be a file name, got {error}") from error


def read_text(file: Path, encoding: str | None = None, *, option: bool = False) -> str:
    """Read a text file without its byte order mark.

    Args:
        file: the file.
        encoding: of the file; None takes UTF-8, or UTF-16 where its byte order mark says so.
        option: the message may name the option `encoding=`.

    Raises:
        DataError: it cannot be read or is in another encoding.
    """
    data = read_bytes(file)
    if option and encoding is None and 0 in data[:2]:
        raise DataError(
            f"{file}, line 1: text must be UTF-8, got byte 0x00: encoding=NAME says another, such "
            "as encoding=utf-16-le"
        )
    if encoding is None:
        encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None
    try:
        return data.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        remedy = ": encoding=NAME says another, such as encoding=cp1252" if option else ""
        raise DataError(
            f"{file}, line {line}: text must be {encoding or 'UTF-8'}, got byte "
            f"0x{data[error.start]:02x}{remedy}"
        ) from error
    except LookupError as error:
        raise DataError(
            f"{file}: encoding must be one that Python knows, such as cp1252, got {encoding!r}"
        ) from error


def read_lines(file: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends, blank ones at the end left out."""
    lines = [line.rstrip("\r") for line in read_text(file).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_names(file: Path, what: str, problems: Problems) -> list[str]:
    """Read a list of label names, one per line, white space around them removed.

    Raises:
        DataError: the file is empty, or a line is blank or repeats a name.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(read_lines(file), 1):
        name = line.strip()
        if not name:
            problems.add(
                f"{file}, line {number}: {what} must be a non-empty name, got a blank line"
            )
        elif name in seen:
            problems.add(
                f"{file}, line {number}: {what} must be unique, got {short(name)} as in line "
                f"{seen[name]}"
            )
        else:
            seen[name] = number
    if not seen:
        raise DataError(f"{file} must hold {what}s, one per line, found none")
    return list(seen)


def read_vocabulary(file: str | None, problems: Problems) -> list[str] | None:
    """Read the label names of an option `vocabulary=FILE`, as `read_names`; None without one."""
    return None if file is None else read_names(Path(file).expanduser(), "label", problems)


def files_by_split(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """Return the files `<split><suffix>` of a folder, by name.

    Args:
        folder: that holds them.
        suffixes: of the files that count, such as `.csv`, in lower case.
        what: a file is called in messages.

    Raises:
        DataError: there is none, or two are of one split.
    """
    found = [file for file in folder.iterdir() if file.suffix.lower() in suffixes]
    files = sorted(
        (file for file in found if not is_dropping(file.name)), key=lambda f: (f.stem.lower(), f)
    )
    if not files:
        raise DataError(
            f"{folder} must hold a {what} per split, such as train{suffixes[0]}, found none"
        )
    for first, second in zip(files, files[1:], strict=False):
        if first.stem.lower() == second.stem.lower():
            raise DataError(
                f"{folder} must hold one {what} per split, found {first.name} and {second.name}"
            )
    return files


def is_dropping(name: str) -> bool:
    """Tell whether a relative path is what systems and programs leave behind, and no data.

    These are hidden files and folders (`._a.jpg`, `.DS_Store`, `.ipynb_checkpoints/`), and those of
    Windows, of archives and of open documents (`Thumbs.db`, `__MACOSX/`, `~$a.csv`).
    """
    return any(
        part.startswith((".", "~$")) and part not in (".", "..") or part.lower() in _DROPPINGS
        for part in name.replace("\\", "/").split("/")
    )


def kind_of_path(path: Path) -> str:
    """Return what is at a path, for messages."""
    if path.is_dir():
        return "a folder"
    return "something that is not a file" if path.exists() else "no such file"


def short(value: object) -> str:
    """Return a value for a message, cut to one short line."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def cut(text: str, most: int = 200) -> str:
    """Return a text for a message, cut to so many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def reason(error: BaseException) -> str:
    """Return what a library says about broken data, cut to one short line."""
    return cut(" ".join(str(error).split()) or type(error).__name__)


class EmptySourceError(DataError):
    """Nothing is left of a source; if there are other problems, this follows from them."""


class Problems:
    """Collects what is wrong with a source, one sentence each: raises the first, or keeps them all.

    A reader that continues after `add` leaves the record out.

    Args:
        keep: continue and keep every message.

    Attributes:
        messages: what was kept.
        kinds: of each message; messages of one kind differ in record and value only.
        notes: how the source was read, where that is not plain: one sentence each.
    """

    def __init__(self, keep: bool = False) -> None:
        """Start without problems."""
        self.keep = keep
        self.messages: list[str] = []
        self.kinds: list[str] = []
        self.notes: list[str] = []

    def add(self, message: str, kind: str | None = None) -> None:
        """Raise `DataError`, or keep the message; its kind are its words, or those given."""
        if not self.keep:
            raise DataError(message)
        self.messages.append(message)
        self.kinds.append(_VALUES.sub("", kind or message))

    def note(self, message: str) -> None:
        """Keep how something was read, with no loss."""
        self.notes.append(message)
        _log.info("%s", message)

    @contextmanager
    def part(self) -> Iterator[None]:
        """If problems are kept, a part that cannot be read at all does not stop the others."""
        try:
            yield
        except DataError as error:
            if not self.keep:
                raise
            if self.messages and isinstance(error, EmptySourceError):
                return
            self.add(str(error))


# What differs in messages of one kind: quoted values, file names and words with digits.
_VALUES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S*(?:[\d/\\]|\w\.\w)\S*""")
