"""Datasets of feature vectors as svmlight multi-label text, read through scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cnnrnn.data.dataset import DataError, Dataset, csr
from cnnrnn.data.files import read_bytes, read_names, reason, short
from cnnrnn.data.problems import Problems

SVMLIGHT_SUFFIXES = (".svm", ".svmlight", ".libsvm")
MAX_SPARSE_VALUES = 1 << 26
"""Most feature values, absent ones included, of data of which fewer than 1 in 1,000 is present."""


def load_svmlight(
    path: str | Path,
    vocabulary: str | Path | None = None,
    *,
    problems: Problems | None = None,
) -> Dataset:
    """Read feature vectors as svmlight text: `3,17 1:0.5 8:2` has labels 3 and 17.

    A folder is read as one file per split: every `<split>.svm`, `.svmlight` or `.libsvm` in it. A
    single file is one split, `all`. Features that a line does not name are 0. Feature numbers
    start at 0 where a 0 occurs in any of the files, else at 1.

    Args:
        path: the file or the folder.
        vocabulary: file with label names, one per line, label 0 first; None takes the label
            numbers that occur, with their digits as names.
        problems: takes what is wrong; without it the first problem is raised.

    Returns:
        The dataset, its features as float32 [n, F].

    Raises:
        DataError: a file is not as described.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    problems = problems or Problems()
    path = Path(path)
    names = None if vocabulary is None else read_names(Path(vocabulary), "label", problems)
    parts: list[_Part] = []
    splits: dict[str, npt.NDArray[np.int64]] = {}
    count = 0
    for file in _svmlight_files(path):
        with problems.part():
            part = _read_part(file, None if names is None else len(names), problems)
            size = len(part.labels)
            splits["all" if file == path else file.stem] = np.arange(count, count + size)
            count += size
            parts.append(part)
    if not count:
        raise DataError(f"{path} must hold at least one record, got none")
    label_sets = [labels for part in parts for labels in part.labels]
    if names is None:
        numbers = sorted({label for labels in label_sets for label in labels})
        names = [str(number) for number in numbers]
        position = {number: i for i, number in enumerate(numbers)}
        label_sets = [[position[label] for label in labels] for labels in label_sets]
    if not names:
        raise DataError(f"{path} must hold at least one label, got none in any line")
    label_indptr, label_indices = csr(label_sets)
    return Dataset(
        source=f"features:{path}",
        label_names=tuple(names),
        label_indptr=label_indptr,
        label_indices=label_indices,
        splits=splits,
        features=_dense(path, [part.features for part in parts]),
    )


class _Part(NamedTuple):
    features: Any  # scipy.sparse [n, F+1], feature numbers as they stand in the file
    labels: list[list[int]]  # ascending


def _svmlight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SVMLIGHT_SUFFIXES)
    if not files:
        raise DataError(f"{path} must hold a file per split, such as train.svm, found none")
    for first, second in zip(files, files[1:], strict=False):
        if first.stem == second.stem:
            raise DataError(
                f"{path} must hold one file per split, found {first.name} and {second.name}"
            )
    return files


def _read_part(file: Path, label_count: int | None, problems: Problems) -> _Part:
    lines = [
        (number, line)
        for number, line in enumerate(read_bytes(file).split(b"\n"), 1)
        if line.partition(b"#")[0].strip()  # others are no records to scikit-learn either
    ]
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
        sets.append(sorted(int(label) for label in labels[row]))
    return _Part(features[kept] if len(kept) < len(lines) else features, sets)


def _parse(lines: Sequence[tuple[int, bytes]]) -> tuple[Any, list[tuple[float, ...]]]:
    """Return the features [n, F+1], sparse, and the label numbers of each line."""
    try:
        from sklearn.datasets import load_svmlight_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading svmlight text needs scikit-learn: pip install "cnnrnn[vision]"'
        ) from error
    text = io.BytesIO(b"\n".join(line for _, line in lines))
    features, labels = load_svmlight_file(text, dtype=np.float32, multilabel=True, zero_based=True)
    return features, labels


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
    for position, label in enumerate(labels):
        if not 0 <= label < 2**31 or label != int(label):
            return f"labels must be whole numbers from 0, got {label:g}"
        if label_count is not None and label >= label_count:
            return f"labels must be in 0..{label_count - 1} as in the vocabulary, got {label:g}"
        if label in labels[:position]:
            return f"labels must be unique, got {label:g} twice"
    return None


def _dense(path: Path, parts: list[Any]) -> npt.NDArray[np.float32]:
    """Return the features of all parts, [n, F]."""
    count = sum(part.shape[0] for part in parts)
    width = max(part.shape[1] for part in parts)
    present = sum(part.nnz for part in parts)
    if count * width > max(MAX_SPARSE_VALUES, 1000 * present):
        raise DataError(
            f"{path} must hold feature vectors of a width that fits memory, got {count} lines with "
            f"feature numbers up to {width - 1} and only {present} values"
        )
    features = np.zeros((count, width), dtype=np.float32)
    row = 0
    for part in parts:
        entries = part.tocoo()
        features[row + entries.row, entries.col] = entries.data
        row += part.shape[0]
    first = 0 if any((part.indices == 0).any() for part in parts) else 1
    return features[:, first:]
