"""Progress bars with images/s and time left, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Advance = Callable[[int], None]
# Called with a description and a total; yields a function to call with the number of images done.
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]


def no_progress(description: str, total: int | None) -> AbstractContextManager[Advance]:
    """Show nothing."""
    return nullcontext(lambda count: None)


def terminal_progress(description: str, total: int | None) -> AbstractContextManager[Advance]:
    """Show a bar on standard error where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        return no_progress(description, total)
    return _bar(description, total)


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} images"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            speed = bars.tasks[0].speed
            bars.update(task, advance=count, rate=f"{speed:,.0f} images/s" if speed else "")

        yield advance
