"""A folder of the user's cache: what cost time to make is kept, under a bound.

Each entry is a folder of its own, written whole, with checksums of its files. The least recently
used entries are evicted where all together are larger than the bound.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from cnnrnn.machine.files import file_digest, write_whole

ABOUT = "about.json"
FOLDER_VARIABLE = "CNNRNN_CACHE"
BOUND_VARIABLE = "CNNRNN_CACHE_GB"
BOUND_GB = 4.0
_STALE_SECONDS = 24 * 3600.0
"""What a killed process has left half written is removed after a day."""


def cache_folder() -> Path:
    """Return the folder that holds the cache: `CNNRNN_CACHE`, or one in the user's own."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    return platformdirs.user_cache_path("cnnrnn", appauthor=False)


def cache_bound() -> int:
    """Return how many bytes the cache may hold, of `CNNRNN_CACHE_GB`.

    Raises:
        ValueError: it is not a number of at least 0.
    """
    text = os.environ.get(BOUND_VARIABLE) or str(BOUND_GB)
    try:
        gigabytes = float(text)
        if not 0 <= gigabytes < 1e9:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{BOUND_VARIABLE} must be a number of gigabytes, at least 0, got {text!r}"
        ) from None
    return int(gigabytes * 2**30)


class CacheUse(NamedTuple):
    """What a cache holds.

    Attributes:
        entries: their number.
        size: of all files, in bytes.
    """

    entries: int
    size: int


class Cache:
    """Entries of one kind.

    Args:
        kind: name of the folder in `cache_folder()`.

    Raises:
        ValueError: `CNNRNN_CACHE_GB` is not a number.
    """

    def __init__(self, kind: str) -> None:
        self.folder = cache_folder() / kind
        self._bound = cache_bound()

    def find(self, key: str) -> Path | None:
        """Return the folder of an entry whose files are as they were written, or None.

        It is then the most recently used one. An entry that is damaged is removed.
        """
        entry = self.folder / key
        about = _about(entry)
        if about is None:
            return None
        try:
            sound = all(file_digest(entry / name) == sha for name, sha in about["files"].items())
        except FileNotFoundError:
            sound = False
        except OSError:  # such as a file that this user may not read
            return None
        if not sound:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with suppress(OSError):  # a cache that this user may only read
            os.utime(entry / ABOUT)
        return entry

    def has(self, key: str) -> bool:
        """Whether there is an entry, damaged or not."""
        return (self.folder / key / ABOUT).is_file()

    def keep(self, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
        """Make an entry, and return its folder.

        Args:
            key: its name.
            write: writes files into a folder, and returns what else is to be kept of them, as JSON.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{os.getpid()}-{secrets.token_hex(4)}"
        former = partial.with_name(f"{partial.name}.former")
        partial.mkdir()
        try:
            known = write(partial)
            files = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
            (partial / ABOUT).write_text(json.dumps(known | {"files": files}, indent=1) + "\n")
            entry = self.folder / key
            with suppress(OSError):  # there is none
                os.replace(entry, former)
            try:
                os.replace(partial, entry)
            except OSError:  # another process was faster
                if not self.has(key):
                    raise
        finally:
            for left in (partial, former):
                shutil.rmtree(left, ignore_errors=True)
        self._evict(key)
        return entry

    def known(self, key: str) -> dict[str, Any]:
        """Return what `write` returned of an entry, and what was noted since."""
        return _about(self.folder / key) or {}

    def note(self, key: str, values: dict[str, Any]) -> None:
        """Keep more of an entry; nothing happens where it is gone or cannot be written."""
        entry = self.folder / key
        about = _about(entry)
        if about is None:
            return
        text = json.dumps(about | values, indent=1) + "\n"
        with suppress(OSError):
            write_whole(entry / ABOUT, lambda file: file.write_text(text, encoding="utf-8"))

    def use(self) -> CacheUse:
        """Return how many entries there are, and how large they are."""
        sizes = [_size(entry) for entry in self._entries()]
        return CacheUse(len(sizes), sum(sizes))

    def _entries(self) -> list[Path]:
        """Return the entries, the least recently used first."""
        try:
            found = [(_modified(e / ABOUT), e) for e in self.folder.iterdir() if self.has(e.name)]
        except OSError:
            return []
        return [entry for _, entry in sorted(found)]

    def _evict(self, newest: str) -> None:
        entries = self._entries()
        total = sum(map(_size, entries))
        for entry in entries:
            if total <= self._bound:
                break
            if entry.name != newest:
                total -= _size(entry)
                shutil.rmtree(entry, ignore_errors=True)
        for left in self.folder.glob(".partial-*"):
            if time.time() - _modified(left) > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _about(entry: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
        return about if isinstance(about["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(entry: Path) -> int:
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except OSError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
