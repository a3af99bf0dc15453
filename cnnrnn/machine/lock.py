"""One process at a time in a folder that it writes to."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
"""Stays in the folder: removed, it could be locked and be made anew by another at once."""
HOLDER_FILE = ".holder.json"
LONGEST_ORPHANS = 10.0
"""Seconds in which the children of a killed process, who keep its lock, notice that it is gone."""


class InUseError(OSError):
    """Another process works in the folder."""


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Keep others that ask for the same out of a folder. The lock goes with the process.

    Args:
        folder: made where it is not there.
        what: is done there, for the message to those that come meanwhile.

    Raises:
        InUseError: another process or thread is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK_FILE), folder / HOLDER_FILE
    try:
        lock.acquire(timeout=LONGEST_ORPHANS if _is_gone(_read(holder)) else 0)
    except Timeout:
        raise InUseError(f"{folder} is in use{_named(_read(holder))}") from None
    try:
        about = {"what": what, "process": os.getpid(), "machine": socket.gethostname(),
                 "since": datetime.now().astimezone().isoformat(" ", "seconds")}  # fmt: skip
        holder.write_text(json.dumps(about) + "\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _read(holder: Path) -> dict[str, Any]:
    """Return what a holder says of itself; nothing where it has not, or no longer."""
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _named(about: dict[str, Any]) -> str:
    if not about:
        return " by another process"
    return (
        f" by {about.get('what')}, process {about.get('process')} on {about.get('machine')}, since "
        f"{about.get('since')}"
    )


def _is_gone(about: dict[str, Any]) -> bool:
    """Whether a process that called itself the holder has ended on this machine."""
    process = about.get("process")
    if type(process) is not int or about.get("machine") != socket.gethostname():
        return False
    if os.name != "posix":  # where this would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
