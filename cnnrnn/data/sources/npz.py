"""Datasets of precomputed features: arrays in an .npz file, or svmlight text."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnrnn.config import SvmlightOptions
from cnnrnn.data.dataset import MAX_SPLITS, DataError, Dataset, usual_split_names
from cnnrnn.data.files import EmptySourceError, Problems, kind_of_path, reason
from cnnrnn.data.sources.svmlight import is_svmlight, load_svmlight

MAX_UNPACKED_BYTES = 1 << 30
MAX_UNPACKED_RATIO = 500
"""An array that is larger than both allow, in bytes and to its size in the file, is an error."""


def load_features(
    path: str | Path,
    options: SvmlightOptions | None = None,
    *,
    problems: Problems | None = None,
) -> Dataset:
    """Read a dataset of feature vectors.

    Args:
        path: an .npz file with `features` [n, F] float, `labels` [n, L] 0/1 or bool,
            `label_names` [L] strings and, optionally, `split` [n] strings; without `split` every
            record is in one split, `all`. Nothing is unpickled. Or what `load_svmlight` reads: a
            folder, or a file that ends in .svm, .svmlight, .libsvm or .txt, also packed with .gz.
        options: of svmlight text.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset, its features as float32.
    """
    path = Path(path)
    inside = path.iterdir() if path.is_dir() else [path]
    if any(file.name.lower().removesuffix(".gz").endswith(".arff") for file in inside):
        raise DataError(
            f"{path} must be .npz or svmlight text, got ARFF: convert it, for example with "
            "scikit-multilearn's load_from_arff, which reads Mulan's XML of labels, and "
            "scikit-learn's dump_svmlight_file(..., multilabel=True)"
        )
    if path.is_dir() or is_svmlight(path):
        return load_svmlight(path, options, problems=problems)
    if options not in (None, SvmlightOptions()):
        raise DataError(
            f"{path} names its labels and features itself: vocabulary, features and first are only "
            "for svmlight text"
        )
    problems = problems or Problems()
    arrays = _read_arrays(path)
    features, labels, names = arrays["features"], arrays["labels"], arrays["label_names"]
    _require_array(path, "features", features, "f", "[n, F] floats", ndim=2)
    _require_array(path, "labels", labels, "biuf", "[n, L] of 0/1 or bool", ndim=2)
    _require_array(path, "label_names", names, "U", "[L] strings", ndim=1)
    count, label_count = labels.shape
    for name, expected, shape in (
        ("features", f"[{count}, F] like labels [{count}, L]", features.shape[:1] == (count,)),
        ("label_names", f"[{label_count}] like labels [n, {label_count}]",
         names.shape == (label_count,)),
    ):  # fmt: skip
        if not shape:
            raise DataError(f"{path}: {name} must be {expected}, got {list(arrays[name].shape)}")
    for name, array in (("features", features), ("labels", labels)):
        if 0 in array.shape:
            raise DataError(f"{path}: {name} must not be empty, got {list(array.shape)}")
    splits = _splits(path, arrays.get("split"), count)
    kept = _right_rows(path, features, labels, problems)
    if len(kept) < count:
        features, labels = features[kept], labels[kept]
        splits = {name: np.flatnonzero(np.isin(kept, rows)) for name, rows in splits.items()}
    rows, columns = np.nonzero(labels)
    return Dataset.from_arrays(
        source=f"features:{path}",
        label_names=_strings(path, "label_names", names),
        label_indptr=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(kept)))]),
        label_indices=columns.astype(np.int32),
        splits=splits,
        features=features,
        rows=kept,
    )


def _right_rows(
    path: Path, features: npt.NDArray[Any], labels: npt.NDArray[Any], problems: Problems
) -> npt.NDArray[np.int64]:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf
        finite = np.isfinite(features.astype(np.float32, copy=False))
    wrong = np.zeros(len(labels), dtype=bool)
    for name, array, expected, right in (
        ("labels", labels, "0 or 1", (labels == 0) | (labels == 1)),
        ("features", features, "finite in float32", finite),
    ):
        for row in np.flatnonzero(~right.all(1)):
            column = int(np.argmin(right[row]))
            problems.add(
                f"row {row} of {path}: {name} must be {expected}, got {array[row, column]} "
                f"in column {column}"
            )
            wrong[row] = True
    if wrong.all():
        raise EmptySourceError(f"{path} must hold at least one row that is right, found none")
    return np.flatnonzero(~wrong)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"{path} must be an .npz file, found {kind_of_path(path)}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    with contextlib.ExitStack() as stack:
        try:
            if not zipfile.is_zipfile(path):
                raise zipfile.BadZipFile("no zip archive")
            archive = stack.enter_context(np.load(path, allow_pickle=False))
        except Exception as error:  # numpy and zipfile raise nearly anything on broken files
            raise DataError(f"{path} must be a complete .npz file, got {reason(error)}") from error
        for member in archive.zip.infolist():
            if member.file_size > max(
                MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * member.compress_size
            ):
                raise DataError(
                    f"{path}: {member.filename} must not unpack to more than {MAX_UNPACKED_RATIO} "
                    f"times its size, got {member.file_size} bytes from {member.compress_size}"
                )
        for name in ("features", "labels", "label_names", "split"):
            if name in archive.files:
                arrays[name] = _read_array(path, archive, name)
            elif name != "split":
                found = ", ".join(archive.files) or "no arrays"
                raise DataError(f"{path}: {name} is missing, found {found}")
    return arrays


def _read_array(path: Path, archive: Any, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(archive[name])
    except Exception as error:  # as above
        if "allow_pickle" in str(error):
            raise DataError(f"{path}: {name} must be a plain array, got Python objects") from error
        raise DataError(f"{path}: {name} must be a complete array, got {reason(error)}") from error


def _require_array(
    path: Path, name: str, array: npt.NDArray[Any], kinds: str, expected: str, ndim: int
) -> None:
    if array.ndim != ndim or array.dtype.kind not in kinds:
        raise DataError(f"{path}: {name} must be {expected}, got {list(array.shape)} {array.dtype}")


def _strings(path: Path, name: str, array: npt.NDArray[Any]) -> tuple[str, ...]:
    try:
        return tuple(array.tolist())
    except Exception as error:  # numbers that are no character
        raise DataError(f"{path}: {name} must be text, {reason(error)}") from error


def _splits(
    path: Path, split: npt.NDArray[Any] | None, count: int
) -> dict[str, npt.NDArray[np.int64]]:
    if split is None:
        return {"all": np.arange(count)}
    _require_array(path, "split", split, "U", "[n] strings", ndim=1)
    if len(split) != count:
        raise DataError(f"{path}: split must be [{count}] like labels, got [{len(split)}]")
    members: dict[str, list[int]] = {}
    for row, name in enumerate(_strings(path, "split", split)):
        if not name.strip():
            raise DataError(f"row {row} of {path}: split must be a non-empty name, got {name!r}")
        members.setdefault(name, []).append(row)
    if len(members) > MAX_SPLITS:
        raise DataError(
            f"{path}: split must name at most {MAX_SPLITS} splits, got {len(members):,}"
        )
    usual = usual_split_names(path, members, apart=False)
    splits: dict[str, list[int]] = {}
    for name, rows in members.items():
        splits.setdefault(usual[name], []).extend(rows)
    return {name: np.array(sorted(rows), dtype=np.int64) for name, rows in splits.items()}
