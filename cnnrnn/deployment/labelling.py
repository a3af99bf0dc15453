"""Labelling of many files that may be stopped and resumed, in memory that hardly grows.

While it runs, finished rows lie in parts in a folder beside the results, `.NAME.labelling`, each
part written whole. At the end they are joined in the order of the images, and the parts are
removed. What stays there of a run that may be resumed says which files the rows are of, by size and
time, so that a later run labels only files that are new or were changed since.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cnnrnn.data import BadImageError
from cnnrnn.data.files import short
from cnnrnn.deployment.rows import RowFile, record_of
from cnnrnn.machine.files import write_whole
from cnnrnn.machine.lock import alone_in
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.prediction.result import Prediction

FORMAT = 1
PART_ROWS = 4096
PART_SECONDS = 60.0
"""A part is written once it has so many rows, or so long after the one before."""
MOST_BAD = 10
"""Files that a summary names."""
TO_RETRY = -2
"""In place of the size of a file that could not be read: it is tried again."""

_RUN, _DONE, _JOINED, _KEPT = "run.json", "done.npz", "joined", "part-kept"

Image = str | BadImageError
Predict = Callable[["Images", npt.NDArray[np.int64]], Iterator[Prediction]]
"""Labels some images, in order; gets them and their positions among all."""


class LabellingError(ValueError):
    """What a former run left does not fit this one."""


class Images(Sequence[Image]):
    """Files in order, or some of them, without a copy.

    Args:
        paths: files, or folders that cannot be listed.
        positions: which of them, in what order; all by default.
    """

    def __init__(
        self, paths: Sequence[Image], positions: npt.NDArray[np.int64] | None = None
    ) -> None:
        self._paths = paths
        self._positions = np.arange(len(paths)) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> Image | Images:
        if isinstance(index, slice):
            return Images(self._paths, self._positions[index])
        path: Image = self._paths[int(self._positions[index])]
        return path


@dataclass
class Summary:
    """What a labelling did.

    Attributes:
        images: rows of the results.
        labelled: of these, rows that are new.
        bad: how many images could not be read.
        first_bad: the first of them, with the reason.
    """

    images: int = 0
    labelled: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)

    def lines(self, out: Path) -> list[str]:
        """Say it, and name images that could not be read."""
        former = self.images - self.labelled
        before = f", {former:,} of them labelled before" if former else ""
        said = [f"{out}: {self.images:,} images{before}"]
        if self.bad:
            more = f", the first {MOST_BAD}" if self.bad > MOST_BAD else ""
            said.append(f"{self.bad:,} could not be read{more}:")
            said += [f"  {reason}" for reason in self.first_bad]
        return said


def label_files(
    paths: Sequence[Image],
    predict: Predict,
    out: Path,
    rows: RowFile,
    identity: dict[str, Any],
    *,
    resume: bool = False,
    each: Callable[[Prediction], None] = lambda prediction: None,
    progress: Progress = no_progress,
    told: Sequence[str] | None = None,
    batch_size: int = 64,
    part_rows: int = PART_ROWS,
) -> Summary:
    """Label files and write a row for each, in their order.

    The rows are those of a run that was not stopped, to the last digit, as long as no file changed
    and all could be read: parts hold whole batches, so that what is left is labelled in the same
    batches, on which the last digits depend.

    Args:
        paths: of the images.
        predict: labels some of them.
        out: the file of results, which appears whole at the end; of a link the file that it names.
        rows: its form.
        identity: what rows must have in common: names with JSON values.
        resume: keep rows of files that are as they were when a former run labelled them, one that
            was stopped, or one that was complete and could be resumed. Files that could not be read
            are tried again. The first run may have it, too. False starts over.
        each: called with each prediction, before its row is kept.
        progress: told how many files are done.
        told: what is told of each image; one that is told something else is labelled again.
        batch_size: images that `predict` labels together.
        part_rows: least number of rows of a part.

    Returns:
        Counts, and the images that could not be read.

    Raises:
        LabellingError: with `resume`, what a former run left is of another identity, or `out` was
            made otherwise or changed since.
        InUseError: another process writes to `out`.
        OSError: with the name of the file that cannot be written.
    """
    out = out.resolve()
    folder = _folder_of(out)
    with alone_in(folder, "labelling"):
        state = _State(folder, out, rows, json.loads(json.dumps(identity)))
        state.open(resume)
        names: dict[str, int] = {}
        first = np.array(
            [names.setdefault(rows.name(_name(path)), i) for i, path in enumerate(paths)],
            dtype=np.int64,
        )
        stats = _stats(paths, told)
        found = state.find(names, len(paths)) if resume else _Found.nothing(len(paths))
        todo = np.flatnonzero((first == np.arange(len(paths))) & ~found.holds(stats))
        part = _Part(state, part_rows, batch_size)
        with progress("predict", len(todo)) as advance:
            try:
                predictions = predict(Images(paths, todo), todo)
                for position, prediction in zip(todo.tolist(), predictions, strict=True):
                    each(prediction)
                    name = rows.name(_name(paths[position]))
                    part.add(name, prediction, stats[position])
                    advance(1)
            except BaseException:  # Ctrl-C too: what is labelled is kept
                with suppress(OSError):
                    part.write_batches()
                raise
            part.write()
        found = state.find(names, len(paths))
        summary = state.join(found, first, len(todo))
        if not resume:
            state.clear()
            shutil.rmtree(folder, ignore_errors=True)
        return summary


def has_parts(out: Path) -> bool:
    """Whether a run for a file, or for what a link names, was stopped and left rows."""
    return any(_folder_of(out.resolve()).glob("part-[0-9]*"))


def _folder_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.labelling")


def _name(path: Image) -> str:
    return path if isinstance(path, str) else path.path


def _stats(paths: Sequence[Image], told: Sequence[str] | None) -> npt.NDArray[np.int64]:
    """Return size, time of change in ns and a digest of what is told of each file: [n, 3].

    Size and time are -1 where there is no file.
    """
    stats = np.full((len(paths), 3), -1, dtype=np.int64)
    for position, path in enumerate(paths):
        with suppress(OSError, ValueError):
            about = os.stat(_name(path))
            stats[position, :2] = about.st_size, about.st_mtime_ns
        text = "" if told is None else told[position]
        stats[position, 2] = zlib.crc32(text.encode("utf-8", "surrogateescape"))
    return stats


@dataclass(frozen=True, eq=False)
class _Found:
    """Where the rows of images are.

    Attributes:
        parts: files of rows.
        part: [n] int32, which of them has an image's row; -1 for none.
        offset: [n] int64, where it begins, in bytes.
        stats: [n, 3] int64, as `_stats` of the file that was labelled.
    """

    parts: list[Path]
    part: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    stats: npt.NDArray[np.int64]

    @classmethod
    def nothing(cls, count: int) -> _Found:
        """Return that of images without rows."""
        return cls(
            [], np.full(count, -1, dtype=np.int32), np.zeros(count, dtype=np.int64),
            np.full((count, 3), TO_RETRY, dtype=np.int64),
        )  # fmt: skip

    def holds(self, stats: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which images have a row that is of the file as it is now: [n]."""
        same: npt.NDArray[np.bool_] = (self.stats == stats).all(1)
        return (self.part >= 0) & same


class _State:
    """What a labelling has on disk; see the module."""

    def __init__(self, folder: Path, out: Path, rows: RowFile, identity: dict[str, Any]) -> None:
        self.folder, self.out, self.rows, self.identity = folder, out, rows, identity

    def parts(self) -> list[Path]:
        """Return the files of rows, the oldest first."""
        return sorted(self.folder.glob("part-[0-9]*"), key=lambda f: int(f.name[5:]))

    def open(self, resume: bool) -> None:
        """Check what a former run left, and put the rows of its results with the parts."""
        run = self._read_run() if resume else {}
        result = run.get("result")
        joined = self.folder / _JOINED
        if result is not None and _stat(joined) == result:  # stopped before the last step
            os.replace(joined, self.out)
        joined.unlink(missing_ok=True)
        if run:
            self._require_same(run)
            if result is not None:
                self._keep(result)
        elif resume and self.out.exists():
            raise LabellingError(
                f"{self.out} cannot be resumed: what it was made from is not known; name another "
                "file, or leave --resume out to replace it"
            )
        else:
            self.clear()
        self._write_run(result)

    def clear(self) -> None:
        """Remove what former runs left; last of all what it says of them."""
        for file in [*self.parts(), *(self.folder / name for name in (_KEPT, _DONE, _RUN))]:
            file.unlink(missing_ok=True)

    def _read_run(self) -> dict[str, Any]:
        file = self.folder / _RUN
        if not file.exists():
            return {}
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            if run["format"] == FORMAT and isinstance(run["identity"], dict):
                return dict(run)
        except (ValueError, KeyError, TypeError):
            pass
        raise LabellingError(
            f"{file} must describe a labelling in format {FORMAT}; remove {self.folder} to start "
            "over"
        )

    def _write_run(self, result: list[int] | None) -> None:
        about = {"format": FORMAT, "identity": self.identity, "result": result}
        text = json.dumps(about, indent=1) + "\n"
        write_whole(self.folder / _RUN, lambda file: file.write_text(text, encoding="utf-8"))

    def _require_same(self, run: dict[str, Any]) -> None:
        former = run["identity"]
        differing = [
            f"{name} was {short(former.get(name))} and is {short(self.identity.get(name))}"
            for name in {**former, **self.identity}
            if former.get(name) != self.identity.get(name)
        ]
        if differing:
            raise LabellingError(
                f"{self.out} cannot be resumed: {'; '.join(differing)}. Use the same options, name "
                f"another file, or remove {self.folder} to start over"
            )

    def _keep(self, result: list[int]) -> None:
        """Write the rows of the results of a former run as a part, if that is not done yet."""
        if _stat(self.out) != result:
            raise LabellingError(
                f"{self.out} was changed or removed since it was written: its rows are not known "
                f"any more. Name another file, or remove {self.folder} to start over"
            )
        if (self.folder / _KEPT).exists():
            return
        with np.load(self.folder / _DONE, allow_pickle=False) as done:
            stats = done["stats"]

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                for (image, error, row), stat in zip(self.rows.read(self.out), stats, strict=True):
                    stream.write(_line(image, stat, error, row))

        write_whole(self.folder / _KEPT, write)

    def find(self, names: dict[str, int], count: int) -> _Found:
        """Find the rows of `count` images, by name; of several rows the newest counts."""
        found = _Found.nothing(count)
        kept = self.folder / _KEPT
        found.parts.extend([kept] if kept.exists() else [])
        found.parts.extend(self.parts())
        for number, file in enumerate(found.parts):
            offset = 0
            with file.open("rb") as stream:
                for line in stream:
                    image, stat, _, _ = json.loads(line)
                    position = names.get(image)
                    if position is not None:
                        found.part[position], found.offset[position] = number, offset
                        found.stats[position] = stat
                    offset += len(line)
        return found

    def join(self, found: _Found, positions: npt.NDArray[np.int64], labelled: int) -> Summary:
        """Write the results: the rows of images in the order of their positions."""
        summary = Summary(len(positions), labelled)
        streams = [part.open("rb") for part in found.parts]

        def lines() -> Iterator[Any]:
            for position in positions.tolist():
                stream = streams[found.part[position]]
                if stream.tell() != found.offset[position]:
                    stream.seek(found.offset[position])
                image, _, error, row = json.loads(stream.readline())
                if error is not None:
                    summary.bad += 1
                    if len(summary.first_bad) < MOST_BAD:
                        summary.first_bad.append(error if image in error else f"{image}: {error}")
                yield row

        try:
            write_whole(self.folder / _JOINED, lambda file: self.rows.write(file, lines()))
        finally:
            for stream in streams:
                stream.close()
        stats = found.stats[positions]
        write_whole(self.folder / _DONE, lambda file: _save(file, stats))
        self._write_run(_stat(self.folder / _JOINED))
        os.replace(self.folder / _JOINED, self.out)
        for file in found.parts:
            file.unlink()
        return summary


def _line(image: str, stat: npt.NDArray[np.int64], error: str | None, row: Any) -> bytes:
    return json.dumps([image, stat.tolist(), error, row]).encode() + b"\n"


def _save(file: Path, stats: npt.NDArray[np.int64]) -> None:
    with file.open("wb") as stream:
        np.savez(stream, stats=stats)


def _stat(file: Path) -> list[int] | None:
    """Return size and time of a file, which moving it does not change; None where it is not."""
    try:
        about = os.stat(file)
    except OSError:
        return None
    return [about.st_size, about.st_mtime_ns]


class _Part:
    """Rows until they are written as a part, which holds whole batches of them.

    Args:
        state: where parts are written.
        rows: the least number in a part.
        batch_size: of what is predicted.
    """

    def __init__(self, state: _State, rows: int, batch_size: int) -> None:
        self._state, self._rows, self._batch_size = state, rows, batch_size
        parts = state.parts()
        self._number = int(parts[-1].name[5:]) + 1 if parts else 0
        self._lines: list[bytes] = []
        self._began = time.monotonic()

    def add(self, name: str, prediction: Prediction, stat: npt.NDArray[np.int64]) -> None:
        """Take the prediction of a file of that name, size and time."""
        error = prediction.error
        row = self._state.rows.row(record_of(prediction, self._state.rows.options))
        if error is not None:
            stat = np.full_like(stat, TO_RETRY)
        self._lines.append(_line(name, stat, error, row))
        late = time.monotonic() - self._began > PART_SECONDS
        if len(self._lines) % self._batch_size == 0 and (late or len(self._lines) >= self._rows):
            self.write()

    def write_batches(self) -> None:
        """Write whole batches, and forget the rest."""
        del self._lines[len(self._lines) // self._batch_size * self._batch_size :]
        self.write()

    def write(self) -> None:
        """Write what there is."""
        self._began = time.monotonic()
        if not self._lines:
            return
        file = self._state.folder / f"part-{self._number:06d}"
        write_whole(file, lambda part: part.write_bytes(b"".join(self._lines)))
        self._number += 1
        self._lines = []
