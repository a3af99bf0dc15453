"""Datasets of feature vectors as svmlight multi-label text, read through scikit-learn."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cnnrnn.config import SvmlightOptions
from cnnrnn.data.dataset import (
    DataError,
    Dataset,
    Records,
    usual_split_name,
    usual_split_names,
)
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    is_dropping,
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

# How files of extreme classification begin: records, features and labels.
_HEADER = re.compile(rb"\s*(\d{1,9})\s+(\d{1,9})\s+(\d{1,9})\s*", re.ASCII)


def load_svmlight(
    path: str | Path,
    options: SvmlightOptions | None = None,
    *,
    problems: Problems | None = None,
) -> Dataset:
    """Read feature vectors as svmlight text: `3,17 1:0.5 8:2` has labels 3 and 17.

    A folder is read as one file per split: every `<split>.svm`, `.svmlight` or `.libsvm` in it,
    and `train.txt`, `val.txt` and `test.txt`. A single file is one split, `all`. Each may be
    packed, `.gz`. Features that a line does not name are 0. Files of extreme classification begin
    with the numbers of records, features and labels; their first feature is 0.

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
    files = _files_of_splits(path) if path.is_dir() else {"all": path}
    for split, file in files.items():
        with problems.part():
            parts.append(_read_part(file, split, None if names is None else len(names), problems))
    first, width = options.first, options.features
    widths = [part.width for part in parts if part.width is not None]
    if first is None:
        zero = widths or any((part.features.indices == 0).any() for part in parts)
        first = 0 if zero else 1
    if width is None and len(widths) == len(parts) > 0:
        width = max(widths)
    parts = [_within(part, first, width, problems) for part in parts]
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
        records.splits[part.split] = []
        for labels in part.labels:
            records.add(part.split, [position[label] for label in labels])
    features = _dense(path, parts, first, width)
    return records.dataset(f"features:{path}", names or map(str, numbers), features)


def is_svmlight(path: Path) -> bool:
    """Tell whether a file is svmlight text by its name."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith((*SVMLIGHT_SUFFIXES, ".txt"))


def _files_of_splits(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their split; `.txt` files only where named like one."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        packed = file.suffix.lower() == ".gz"
        stem, suffix = os.path.splitext(file.name[:-3] if packed else file.name)
        if is_dropping(file.name) or not is_svmlight(file):
            continue
        if suffix.lower() == ".txt" and usual_split_name(stem) not in ("train", "val", "test"):
            continue
        if stem in found:
            raise DataError(
                f"{folder} must hold one file per split, found {found[stem].name} and {file.name}"
            )
        found[stem] = file
    if not found:
        raise DataError(
            f"{folder} must hold a file per split, such as train{SVMLIGHT_SUFFIXES[0]}, found none"
        )
    usual = usual_split_names(folder, found)
    return {usual[split]: file for split, file in found.items()}


class _Part(NamedTuple):
    file: Path
    split: str
    size: int  # bytes
    width: int | None  # features, by the header
    lines: list[int]  # number of each record's line
    features: Any  # scipy.sparse [n, F+1], feature numbers as they stand in the file
    labels: list[list[int]]  # of each record


def _unpacked(file: Path) -> tuple[bytes, int]:
    """Return the text of a file without its byte order mark, and the size of the file."""
    data = read_bytes(file)
    size = len(data)
    if file.suffix.lower() == ".gz":
        most = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size)
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file} must be a complete gzip file, got {reason(error)}") from error
        if len(data) > most:
            raise DataError(
                f"{file} must not unpack to more than {MAX_UNPACKED_RATIO} times its size, got "
                f"more than {most} bytes from {size}"
            )
    return data.removeprefix(codecs.BOM_UTF8), size


def _read_part(file: Path, split: str, label_count: int | None, problems: Problems) -> _Part:
    data, size = _unpacked(file)
    lines = [
        (number, line)
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.partition(b"#")[0].strip()  # others are no records to scikit-learn either
    ]
    width = None
    if lines and (header := _HEADER.fullmatch(lines[0][1])) is not None:
        count, width, labels_in_all = map(int, header.groups())
        label_count = labels_in_all if label_count is None else label_count
        lines = lines[1:]
        if len(lines) != count:
            problems.add(
                f"{file}, line 1: the header must count the records, got {count}, found "
                f"{len(lines)} lines that are not blank"
            )
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
    return _Part(file, split, size, width, [lines[row][0] for row in kept], features, sets)


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
        _check_line(entry[1])
    except ValueError as error:
        problems.add(
            f"{file}, line {entry[0]} must be labels and feature:value pairs, got "
            f"{short(entry[1].decode('latin-1'))} ({reason(error)})"
        )
        return False
    return True


def _check_line(line: bytes) -> None:
    """Raise a ValueError where scikit-learn would, a call of which takes longer than most lines."""
    labels, *pairs = line.partition(b"#")[0].split()
    if b":" in labels:  # there are none
        pairs = [labels, *pairs]
    else:
        for label in labels.split(b","):
            float(label)
    if pairs and pairs[0].startswith(b"qid") and b":" in pairs[0]:
        del pairs[0]
    last = -1
    for pair in pairs:
        number, colon, value = pair.partition(b":")
        if not colon:
            raise ValueError(f"no colon in {short(pair.decode('latin-1'))}")
        before, last = last, int(number)
        if last >= 2**31:
            raise ValueError("a feature number is too large")
        if last <= before:
            raise ValueError("feature numbers must be sorted and unique")
        float(value)


def _label_problem(labels: tuple[float, ...], label_count: int | None) -> str | None:
    seen: set[float] = set()
    for label in labels:
        if not 0 <= label < 2**31 or label != int(label):
            return f"labels must be whole numbers from 0, got {label:g}"
        if label_count is not None and label >= label_count:
            return (
                f"labels must be in 0..{label_count - 1} as in the vocabulary or header, got "
                f"{label:g}"
            )
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
