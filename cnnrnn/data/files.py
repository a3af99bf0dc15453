"""The files of a source: their text, the names in it, and the files that the names refer to."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import CONTROL, DataError, is_text

_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # most are, which spares the closer look


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


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: it cannot be read or is no UTF-8.
    """
    data = read_bytes(file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: text must be UTF-8, got byte 0x{data[error.start]:02x}"
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


def name_problem(name: object) -> str | None:
    """Return why a name is not a path inside a folder, or None if it is one."""
    if not isinstance(name, str):
        return "not a string"
    if _PLAIN_NAME.fullmatch(name):
        return None
    if not PurePosixPath(name).name:
        return "empty" if not PurePosixPath(name).is_absolute() else "absolute"
    if CONTROL.search(name) or not is_text(name):
        return "not a file name"
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:", name):
        return "a URL"
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root:
        return "absolute"
    if ".." in windows.parts:  # splits at both kinds of slash
        return "leaves the folder"
    return None


def existing_images(
    file: Path,
    folder: Path,
    record: Callable[[int], str],
    names: Sequence[str],
    on_bad_image: OnBadImage,
    problems: Problems,
) -> list[int]:
    """Return the positions of the names whose image files exist.

    Args:
        file: what names them, for messages.
        folder: the image folder; links may not lead out of it.
        record: names the record of a position, for messages.
        names: paths inside the folder, checked by `name_problem`.
        on_bad_image: with `error` a missing file is a problem, `skip` leaves it out with one
            warning.
        problems: collects links that lead out of the folder, and missing files.

    Raises:
        DataError: with `skip`, every file is missing.
    """
    kept, missing = find_files(file, folder, record, names, problems)

    def message(position: int) -> str:
        place = folder / names[position]
        shown = _cut(str(place), len(str(folder)) + 200)
        return f"{file}: {record(position)} must exist as {shown}, found no such file"

    if problems.keep:
        for position in missing:
            problems.add(message(position))
    elif missing:
        text = f"{message(missing[0])} ({len(missing)} of {len(names)} images are missing)"
        if on_bad_image == "error" or not kept:
            raise DataError(text)
        warnings.warn(f"{text}; they are left out", stacklevel=4)
    return kept


def given_folder(source: Path, images: str | Path) -> Path:
    """Return the image folder that is given for a source.

    Raises:
        DataError: there is no such folder.
    """
    if not Path(images).is_dir():
        raise DataError(f"{source} must come with an existing image folder, got {images}")
    return Path(images)


def files_by_split(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """Return the files `<split><suffix>` of a folder, by name.

    Args:
        folder: that holds them.
        suffixes: of the files that count, such as `.csv`, in lower case.
        what: a file is called in messages.

    Raises:
        DataError: there is none, or two are of one split.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    if not files:
        raise DataError(
            f"{folder} must hold a {what} per split, such as train{suffixes[0]}, found none"
        )
    for first, second in zip(files, files[1:], strict=False):
        if first.stem == second.stem:
            raise DataError(
                f"{folder} must hold one {what} per split, found {first.name} and {second.name}"
            )
    return files


def find_files(
    file: Path,
    folder: Path,
    record: Callable[[int], str],
    names: Sequence[str],
    problems: Problems,
) -> tuple[list[int], list[int]]:
    """Look for files, listing each folder once; arguments as in `existing_images`.

    Returns:
        The positions of the names that are regular files, and of those that are not there.
    """
    root = os.path.realpath(folder)
    listings: dict[str, dict[str, str]] = {}
    kept: list[int] = []
    missing: list[int] = []
    for position, name in enumerate(names):
        parent, base = os.path.split(os.path.normpath(name))
        if parent not in listings:
            listings[parent] = {}
            with problems.part():
                listings[parent] = _list_files(file, folder, root, parent, record(position), name)
        target = listings[parent].get(base)
        if target is None:
            missing.append(position)
        elif target and not _is_inside(target, root):
            problems.add(
                f"{file}: {record(position)} must be a file inside {folder}, got "
                f"{_cut(name)} which links to {target}"
            )
        else:
            kept.append(position)
    return kept, missing


def _list_files(
    file: Path, folder: Path, root: str, parent: str, record: str, name: str
) -> dict[str, str]:
    """Return the regular files of a folder: name to the target of a link, "" for no link."""
    path = os.path.join(root, parent)
    real = os.path.realpath(path)
    if not _is_inside(real, root):
        raise DataError(
            f"{file}: {record} must be a file inside {folder}, got {_cut(name)} which leads "
            f"to {real}"
        )
    try:
        with os.scandir(path) as entries:
            return {
                entry.name: os.path.realpath(entry.path) if entry.is_symlink() else ""
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(
            f"{file}: the folder of {record}, {_cut(path)}, cannot be listed: {error.strerror}"
        ) from error


def kind_of_path(path: Path) -> str:
    """Return what is at a path, for messages."""
    if path.is_dir():
        return "a folder"
    return "something that is not a file" if path.exists() else "no such file"


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def short(value: object) -> str:
    """Return a value for a message, cut to one short line."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def reason(error: BaseException) -> str:
    """Return what a library says about broken data, cut to one short line."""
    return _cut(" ".join(str(error).split()) or type(error).__name__)


class EmptySourceError(DataError):
    """Nothing is left of a source; if there are other problems, this follows from them."""


class Problems:
    """Collects what is wrong with a source, one sentence each: raises the first, or keeps them all.

    A reader that continues after `add` leaves the record out.

    Args:
        keep: continue and keep every message.

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
        """If problems are kept, a part that cannot be read at all does not stop the others."""
        try:
            yield
        except DataError as error:
            if not self.keep:
                raise
            if self.messages and isinstance(error, EmptySourceError):
                return
            self.messages.append(str(error))
