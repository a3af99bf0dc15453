"""The files that a source names: paths inside one folder, looked up as people write them."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import CONTROL, DataError, is_text
from cnnrnn.data.files import Problems, cut, is_dropping, short

# Most are, which spares the closer look.
_PLAIN_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)

MAX_NAME = 4096
"""Characters of a path: no system opens a longer one, and resolving it takes quadratic time."""

Listing = dict[str, str]
"""The regular files of a folder: name to the target of a link, "" for no link."""


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


def given_folder(source: Path, images: str | Path) -> Path:
    """Return the image folder that is given for a source.

    Raises:
        DataError: there is no such folder.
    """
    if not Path(images).is_dir():
        raise DataError(f"{source} must come with an existing image folder, got {images}")
    return Path(images)


class Folder:
    """A folder in which a source names files.

    A name that differs from its file in case or in Unicode normal form alone is found too. Each
    folder below is listed once.

    Args:
        path: the folder; a link to one is followed.
        follow_links: links may lead out of it.
    """

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        """Look for nothing yet."""
        self.path = path
        self.follow_links = follow_links
        self._root = os.path.realpath(path)
        self._roots = (os.path.abspath(path), self._root)
        self._listings: dict[str, Listing | None] = {}  # None: a link leads out
        self._actual: dict[str, str] = {}  # folder as named: as it is on disk
        self._spellings: dict[str, dict[str, list[str]]] = {}

    def inside(self, name: object) -> tuple[str, str | None]:
        """Return a name as a path inside the folder with slashes, and why it is none, or None.

        Backslashes read as slashes, and an absolute path may lead into the folder.
        """
        if not isinstance(name, str):
            return "", "not a string"
        if _PLAIN_NAME.fullmatch(name):
            return name, None
        path = name.replace("\\", "/")
        if path.startswith("/") and ".." not in path.split("/"):
            for root in self._roots:
                if path.startswith(root.rstrip("/") + "/"):
                    path = path[len(root.rstrip("/")) :].lstrip("/")
                    break
        return path, name_problem(path)

    def existing(
        self,
        file: Path,
        record: Callable[[int], str],
        names: Sequence[str],
        on_bad_image: OnBadImage,
        problems: Problems,
    ) -> dict[int, str]:
        """Return position and actual name of the images whose files exist.

        Args:
            file: what names them, for messages.
            record: names the record of a position, for messages.
            names: paths as `inside` returns them.
            on_bad_image: with `error` a missing file is a problem, as is a folder that cannot be
                listed; `skip` leaves them out with one warning, and one for each folder.
            problems: collects links that lead out of the folder, and missing files.

        Raises:
            DataError: with `skip`, every file is missing.
        """
        kept, missing = self.find(file, record, names, problems, on_bad_image)

        def message(position: int) -> str:
            place = self.path / names[position]
            shown = cut(str(place), len(str(self.path)) + 200)
            return f"{file}: {record(position)} must exist as {shown}, found no such file"

        if problems.keep:
            for position in missing:
                problems.add(message(position), f"{file}: must exist, found no such file")
        elif missing:
            text = f"{message(missing[0])} ({len(missing)} of {len(names)} images are missing)"
            if on_bad_image == "error" or not kept:
                raise DataError(text)
            warnings.warn(f"{text}; they are left out", stacklevel=4)
        return kept

    def find(
        self,
        file: Path,
        record: Callable[[int], str],
        names: Sequence[str],
        problems: Problems,
        on_bad_image: OnBadImage = "error",
    ) -> tuple[dict[int, str], list[int]]:
        """Look for files; arguments as in `existing`.

        Returns:
            Position and actual name of those that are regular files, and the positions of those
            that are not there.
        """
        kept: dict[int, str] = {}
        missing: list[int] = []
        others: list[int] = []
        for position, name in enumerate(names):
            if len(name) > MAX_NAME:
                missing.append(position)
                continue
            above, base, parent = self._split(name)
            if parent not in self._listings:
                self._listings[parent] = None
                with problems.part():
                    self._listings[parent] = self._list(
                        file, parent, record(position), name, on_bad_image
                    )
            listing = self._listings[parent]
            if listing is None:
                continue  # said once, of its first file
            if base not in listing:
                base = self._other_spelling(parent, listing, base)
            target = listing.get(base)
            if target is None:
                missing.append(position)
            elif target and not self.follow_links and not _is_inside(target, self._root):
                problems.add(
                    f"{file}: {record(position)} must be a file inside {self.path}, got "
                    f"{cut(name)} which links to {target}: follow_links allows it"
                )
            else:
                as_written = base == os.path.basename(name) and parent == above
                kept[position] = name if as_written else os.path.join(parent, base)
                if not as_written and kept[position] != os.path.normpath(name):
                    others.append(position)
        if others:
            first = others[0]
            problems.note(
                f"{file}: {len(others):,} names differ from their files in case or Unicode normal "
                f"form, the first: {record(first)} has {short(names[first])} for "
                f"{short(kept[first])}"
            )
        return kept, missing

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name, or a link, wherever it leads."""
        if len(name) > MAX_NAME:
            return False
        _, base, parent = self._split(name)
        return folded(base) in self._spellings_in(parent)

    def _split(self, name: str) -> tuple[str, str, str]:
        """Return the folder and file of a name, and that folder as it is on disk."""
        above, base = os.path.split(os.path.normpath(name))
        parent = self._actual.get(above)
        if parent is None:
            parent = self._actual[above] = self._actual_folder(above)
        return above, base, parent

    def _list(
        self, file: Path, parent: str, record: str, name: str, on_bad_image: OnBadImage
    ) -> Listing:
        path = os.path.join(self._root, parent)
        real = os.path.realpath(path)
        if not self.follow_links and not _is_inside(real, self._root):
            raise DataError(
                f"{file}: {record} must be a file inside {self.path}, got {cut(name)} which leads "
                f"to {real}: follow_links allows it"
            )
        try:
            with os.scandir(path) as entries:
                return {
                    entry.name: os.path.realpath(entry.path) if entry.is_symlink() else ""
                    for entry in entries
                    if _is_file(entry)
                }
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            text = (
                f"{file}: the folder of {record}, {cut(path)}, cannot be listed: {error.strerror}"
            )
            if on_bad_image == "error":
                raise DataError(text) from error
            warnings.warn(f"{text}; its images are left out", stacklevel=6)
            return {}

    def _actual_folder(self, named: str) -> str:
        """Return a folder's name as it is on disk; as it is named where there is no such folder."""
        if os.path.isdir(os.path.join(self._root, named)):
            return named
        actual = ""
        for part in named.split("/"):
            path = os.path.join(self._root, actual)
            if os.path.isdir(os.path.join(path, part)):
                actual = os.path.join(actual, part)
                continue
            same = self._spellings_in(actual).get(folded(part), [])
            if len(same) != 1 or not os.path.isdir(os.path.join(path, same[0])):
                return named
            actual = os.path.join(actual, same[0])
        return actual

    def _other_spelling(self, parent: str, listing: Listing, base: str) -> str:
        """Return the only file whose name differs in case or normal form alone, else the name."""
        same = [
            name for name in self._spellings_in(parent).get(folded(base), []) if name in listing
        ]
        return same[0] if len(same) == 1 else base

    def _spellings_in(self, folder: str) -> dict[str, list[str]]:
        """Return what a folder below holds by `folded` name; nothing where it cannot be listed."""
        if folder not in self._spellings:
            found = self._spellings[folder] = {}
            with contextlib.suppress(OSError):
                for name in os.listdir(os.path.join(self._root, folder)):
                    found.setdefault(folded(name), []).append(name)
        return self._spellings[folder]


def files_below(
    folder: Path,
    suffixes: tuple[str, ...],
    follow_links: bool = False,
    on_bad_image: OnBadImage = "error",
    problems: Problems | None = None,
) -> list[str]:
    """Return the regular files in a folder and below as relative paths, sorted; no droppings.

    Args:
        folder: the folder; a link to one is followed.
        suffixes: of the files that count, in lower case: others are left out where they are links
            that lead out of the folder.
        follow_links: links may lead out of it. A folder that was entered already is not again.
        on_bad_image: with `error` a folder below that cannot be listed is a problem, `skip` leaves
            such folders out with one warning.
        problems: collects them; without it the first is raised.

    Raises:
        DataError: a link leads out of it, or it cannot be listed.
    """
    problems = problems or Problems()
    unlisted: list[str] = []
    root = os.path.realpath(folder)
    found: list[str] = []
    entered = {root}
    todo = [""]
    while todo:
        parent = todo.pop()
        try:
            with os.scandir(os.path.join(root, parent)) as entries:
                for entry in entries:
                    path = os.path.join(parent, entry.name)
                    if is_dropping(entry.name):
                        continue
                    if entry.is_symlink():
                        target = os.path.realpath(entry.path)
                        if not follow_links and not _is_inside(target, root):
                            if not _is_folder(entry) and not path.lower().endswith(suffixes):
                                continue
                            raise DataError(
                                f"{folder} must hold its files itself, got {path} which links to "
                                f"{target}: follow_links allows it"
                            )
                        if _is_folder(entry) and target in entered:
                            continue
                        entered.add(target)
                    if _is_folder(entry):
                        todo.append(path)
                    elif _is_file(entry):
                        found.append(path)
        except OSError as error:
            place = os.path.join(root, parent) if parent else root
            text = f"{place} cannot be listed: {error.strerror}"
            if not parent:
                raise DataError(text) from error
            if on_bad_image == "error":
                problems.add(text)
            else:
                unlisted.append(text)
    if unlisted:
        warnings.warn(
            f"{folder}: {len(unlisted)} folders were left out, the first: {unlisted[0]}",
            stacklevel=3,
        )
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or a link to one; a link in a circle is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry[str]) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def folded(name: str) -> str:
    """Return a file name without its case and Unicode normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
