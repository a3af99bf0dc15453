"""Datasets of feature vectors as svmlight multi-label text, read through scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cnnrnn.config import SvmlightOptions
from cnnrnn.data.dataset import DataError, Dataset, Records
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    files_by_split,
    read_bytes,
    read_vocabulary,
    reason,
    short,
)
from cnnrnn.machine.extras import from_extra

SVMLIGHT_SUFFIXES = (".svm", ".svmlight", ".libsvm")
MAX_UNPACKED_BYTES = 1 << 28
MAX_UNPACKED_RATIO = 100
"""Features that are larger than both allow, in bytes and to the size of the text, are an error."""


def load_svmlight(
    path: str | Path,
    options: SvmlightOptions | None = None,
    *,
    problems: Problems | None = None,
) -> Dataset:
    """Read feature vectors as svmlight text: `3,17 1:0.5 8:2` has labels 3 and 17.

    A folder is read as one file per split: every `<split>.svm`, `.svmlight` or `.libsvm` in it. A
    single file is one split, `all`. Features that a line does not name are 0.

    Args:
        path: the file or the folder.
        options: label names, and the numbers of features; without these the first feature is 0
            where a 0 occurs in any of the files, else 1, and the last the highest that occurs.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset, its features as float32 [n, F].
    """
    problems = problems or Problems()
    options = options or SvmlightOptions()
    path = Path(path)
    names = read_vocabulary(options.vocabulary, problems)
    parts: list[_Part] = []
    for file in files_by_split(path, SVMLIGHT_SUFFIXES, "file") if path.is_dir() else [path]:
        with problems.part():
            parts.append(_read_part(file, None if names is None else len(names), problems))
    first = options.first
    if first is None:
        first = 0 if any((part.features.indices == 0).any() for part in parts) else 1
    parts = [_within(part, first, options.features, problems) for part in parts]
    if not any(part.labels for part in parts):
        raise EmptySourceError(f"{path} must hold at least one record, got none")
    numbers = sorted({label for part in parts for labels in part.labels for label in labels})
    if names is not None:
        numbers = list(range(len(names)))
    if not numbers:
        raise EmptySourceError(f"{path} must hold at least one label, got none in any line")
    position = {number: i for i, number in enumerate(numbers)}
    records = Records()
    for part in parts:
        split = "all" if part.file == path else part.file.stem
        records.splits[split] = []
        for labels in part.labels:
            records.add(split, [position[label] for label in labels])
    features = _dense(path, parts, first, options.features)
    return records.dataset(f"features:{path}", names or map(str, numbers), features)


class _Part(NamedTuple):
    file: Path
    size: int  # bytes
    lines: list[int]  # number of each record's line
    features: Any  # scipy.sparse [n, F+1], feature numbers as they stand in the file
    labels: list[list[int]]  # of each record


def _read_part(file: Path, label_count: int | None, problems: Problems) -> _Part:
    data = read_bytes(file)
    lines = [
        (number, line)
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.partition(b"#")[0].strip()  # others are no records to scikit-learn either
    ]
    if b"_" in data:  # Python would take 1_0 as 10
        lines = [entry for entry in lines if _has_plain_numbers(file, entry, problems)]
    try:
        features, labels = _parse(lines)
    except (ValueError, OverflowError) as whole:
        lines = [entry for entry in lines if _is_right_line(file, entry, problems)]
        try:
            features, labels = _parse(lines)
        except (ValueError, OverflowError):
            raise DataError(f"{file} must be svmlight text, got {reason(whole)}") from whole
    kept: list[int] = []
    sets: list[list[int]] = []
    for row, (number, _) in enumerate(lines):
        values = features.data[features.indptr[row] : features.indptr[row + 1]]
        problem = _label_problem(labels[row], label_count)
        if problem is None and not np.isfinite(values).all():
            wrong = values[~np.isfinite(values)][0]
            problem = f"features must be finite in float32, got {wrong}"
        if problem is not None:
            problems.add(f"{file}, line {number}: {problem}")
            continue
        kept.append(row)
        sets.append([int(label) for label in labels[row]])
    if len(kept) < len(lines):
        features = features[kept]
    return _Part(file, len(data), [lines[row][0] for row in kept], features, sets)


def _parse(lines: Sequence[tuple[int, bytes]]) -> tuple[Any, list[tuple[float, ...]]]:
    """Return the features [n, F+1], sparse, and the label numbers of each line."""
    with from_extra("scikit-learn", "reading svmlight text"):
        from sklearn.datasets import load_svmlight_file
    text = io.BytesIO(b"\n".join(line for _, line in lines))
    features, labels = load_svmlight_file(text, dtype=np.float32, multilabel=True, zero_based=True)
    return features, labels


def _has_plain_numbers(file: Path, entry: tuple[int, bytes], problems: Problems) -> bool:
    if b"_" not in entry[1].partition(b"#")[0]:
        return True
    problems.add(
        f"{file}, line {entry[0]} must be labels and feature:value pairs, got "
        f"{short(entry[1].decode('latin-1'))} (a number with _)"
    )
    return False


def _is_right_line(file: Path, entry: tuple[int, bytes], problems: Problems) -> bool:
    try:
        _parse([entry])
    except (ValueError, OverflowError) as error:
        problems.add(
            f"{file}, line {entry[0]} must be labels and feature:value pairs, got "
            f"{short(entry[1].decode('latin-1'))} ({reason(error)})"
        )
        return False
    return True


def _label_problem(labels: tuple[float, ...], label_count: int | None) -> str | None:
    seen: set[float] = set()
    for label in labels:
        if not 0 <= label < 2**31 or label != int(label):
            return f"labels must be whole numbers from 0, got {label:g}"
        if label_count is not None and label >= label_count:
            return f"labels must be in 0..{label_count - 1} as in the vocabulary, got {label:g}"
        if label in seen:
            return f"labels must be unique, got {label:g} twice"
        seen.add(label)
    return None


def _within(part: _Part, first: int, width: int | None, problems: Problems) -> _Part:
    """Return the records whose feature numbers start at `first` and are at most `width`."""
    numbers = part.features.indices
    wrong = numbers < first
    if width is not None:
        wrong |= numbers >= first + width
    if not wrong.any():
        return part
    kept: list[int] = []
    for row, line in enumerate(part.lines):
        entries = slice(*part.features.indptr[row : row + 2])
        if not wrong[entries].any():
            kept.append(row)
            continue
        found = numbers[entries][wrong[entries]][0]
        expected = f"start at {first}" if width is None else f"be in {first}..{first + width - 1}"
        problems.add(
            f"{part.file}, line {line}: feature numbers must {expected}, got {found}: "
            "features=COUNT and first=0 or 1 say which there are"
        )
    return part._replace(
        lines=[part.lines[row] for row in kept],
        features=part.features[kept],
        labels=[part.labels[row] for row in kept],
    )


def _dense(
    path: Path, parts: list[_Part], first: int, width: int | None
) -> npt.NDArray[np.float32]:
    """Return the features of all parts, [n, F]."""
    count = sum(len(part.labels) for part in parts)
    if width is None:
        width = max(1, max(part.features.shape[1] for part in parts) - first)
    size = sum(part.size for part in parts)
    message = (
        f"{path} must hold feature vectors of a width that fits memory, got {count} lines with "
        f"feature numbers up to {first + width - 1} in {size} bytes"
    )
    if 4 * count * width > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size):
        raise DataError(message)
    try:
        features = np.zeros((count, width), dtype=np.float32)
    except MemoryError as error:
        raise DataError(message) from error
    row = 0
    for part in parts:
        entries = part.features.tocoo()
        features[row + entries.row, entries.col - first] = entries.data
        row += len(part.labels)
    return features
