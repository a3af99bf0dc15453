"""The one dataset type: label sets of records, with their images, features or boxes."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from cnnrnn.config import MAX_PIXELS, require_max_pixels

if TYPE_CHECKING:
    from PIL import Image

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_SPLITS = 100
"""More are an error: something else was taken for splits, such as ids."""

Indices = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor


_SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class DataError(ValueError):
    """Wrong data; the message is one sentence naming file, record, expected and found."""


@runtime_checkable
class StoredImage(Protocol):
    """An image inside a larger file, read when it is needed."""

    @property
    def identity(self) -> str:
        """Another text where the content may be another."""

    def read(self) -> bytes:
        """Return the bytes of an image file."""


ImageSource: TypeAlias = "Path | bytes | Image.Image | StoredImage"
"""What a record's image is read from: an image file, its bytes, or an image in memory."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Object boxes of n records in compressed rows.

    Attributes:
        indptr: [n+1] int64; record i owns boxes `indptr[i]:indptr[i+1]`.
        label_indices: [m] int32, the label of each box.
        xywh: [m, 4] float32, left, top, width and height in pixels.
    """

    indptr: npt.NDArray[np.int64]
    label_indices: npt.NDArray[np.int32]
    xywh: npt.NDArray[np.float32]


WRITE_ZERO = "write 0 where a label is absent: what is blank, -1 or ? is unknown"


@dataclass(frozen=True, eq=False, init=False)
class Dataset:
    """Records with label sets; images, features and boxes stay aligned with them.

    Made of images and their labels, `Dataset(images=["a.jpg", ...], labels=[["cat"], ...])`, or of
    arrays by `from_arrays`.

    Attributes:
        source: the spec it came from, for messages and cache keys.
        label_names: L unique names, in the order of the source.
        label_indptr: [n+1] int64; record i owns `label_indices[indptr[i]:indptr[i+1]]`.
        label_indices: int32, ascending and unique within a record.
        splits: split name to record indices, int64.
        images: n files, their bytes, or images in memory; or None.
        features: [n, F] float32, finite, or None.
        boxes: boxes of the records, or None.
        rows: [n] int64, each record's number in its source; 0..n-1 unless records were selected.
        unknown_indptr: [n+1] int64, or None where every label is known; record i owns
            `unknown_indices[unknown_indptr[i]:unknown_indptr[i+1]]`.
        unknown_indices: int32, ascending and unique within a record: labels that are neither
            present nor absent, such as VOC's difficult ones; never among the record's labels.
        max_pixels: images of more pixels cannot be read, see `Predictor.predict`.

    Raises:
        DataError: the parts do not fit together.
    """

    source: str
    label_names: tuple[str, ...]
    label_indptr: npt.NDArray[np.int64]
    label_indices: npt.NDArray[np.int32]
    splits: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    images: tuple[ImageSource, ...] | None = None
    features: npt.NDArray[np.float32] | None = None
    boxes: Boxes | None = None
    rows: npt.NDArray[np.int64] = None  # type: ignore[assignment]  # filled in below
    unknown_indptr: npt.NDArray[np.int64] | None = None
    unknown_indices: npt.NDArray[np.int32] | None = None
    max_pixels: int = MAX_PIXELS

    def __init__(
        self,
        images: Sequence[str | os.PathLike[str] | bytes | Image.Image],
        labels: Sequence[Iterable[str]],
        splits: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
        label_names: Sequence[str] | None = None,
        unknown: Sequence[Iterable[str]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Take images with the labels of each.

        Args:
            images: n paths, bytes of image files, or PIL images.
            labels: for each image its labels, none or more, in any order.
            splits: the split of each image, or split names with the numbers of their images; None
                puts all into one split, `all`.
            label_names: the labels in their order; None takes those that occur, sorted.
            unknown: for each image the labels that it may have or not: nobody looked. All others
                are absent. None where every label is known.
            max_pixels: images of more pixels cannot be read.

        Raises:
            TypeError: an image is none of these, or the labels of an image are no list of strings.
            DataError: there are not as many labels as images, a label is not among `label_names`,
                or both present and unknown in an image, or a split does not fit.
        """
        sets = _lists_of_strings("labels", labels)
        hidden = None if unknown is None else _lists_of_strings("unknown", unknown)
        label_names = None if label_names is None else list(label_names)
        if label_names is None:
            label_names = sorted({label for own in (*sets, *(hidden or ())) for label in own})
        indptr, indices = _named_sets("labels", sets, label_names)
        unknown_indptr, unknown_indices = (
            (None, None) if hidden is None else _named_sets("unknown", hidden, label_names)
        )
        self._fill(
            source="python:Dataset",
            label_names=tuple(label_names),
            label_indptr=indptr,
            label_indices=indices,
            unknown_indptr=unknown_indptr,
            unknown_indices=unknown_indices,
            splits=_given_splits(splits, len(indptr) - 1),
            images=tuple(map(_given_image, range(len(images)), images)),
            max_pixels=max_pixels,
        )

    @classmethod
    def from_arrays(
        cls,
        source: str,
        label_names: tuple[str, ...],
        label_indptr: npt.NDArray[np.integer[Any]],
        label_indices: npt.NDArray[np.integer[Any]],
        splits: Mapping[str, npt.NDArray[np.integer[Any]]] | None = None,
        images: tuple[ImageSource, ...] | None = None,
        features: npt.NDArray[np.floating[Any]] | None = None,
        boxes: Boxes | None = None,
        rows: npt.NDArray[np.int64] | None = None,
        unknown_indptr: npt.NDArray[np.integer[Any]] | None = None,
        unknown_indices: npt.NDArray[np.integer[Any]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Dataset:
        """Return a dataset of its attributes.

        Raises:
            DataError: they do not fit together.
        """
        dataset = cls.__new__(cls)
        dataset._fill(
            source=source,
            label_names=label_names,
            label_indptr=label_indptr,
            label_indices=label_indices,
            splits={} if splits is None else splits,
            images=images,
            features=features,
            boxes=boxes,
            rows=rows,
            unknown_indptr=unknown_indptr,
            unknown_indices=unknown_indices,
            max_pixels=max_pixels,
        )
        return dataset

    def with_changes(self, **changes: Any) -> Dataset:
        """Return a dataset with other attributes in the place of some."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Dataset.from_arrays(**own | changes)

    def _fill(self, **parts: object) -> None:
        """Set the attributes, check that they fit together and bring arrays to their types."""
        for part in fields(self):
            self._set(part.name, parts.get(part.name))
        self._check_names()
        indptr, indices = self._checked_sets("label_", self.label_indptr, self.label_indices)
        count = len(indptr) - 1
        self._set("label_indptr", indptr)
        self._set("label_indices", indices)
        self._check_unknown(count)

        rows = np.arange(count) if self.rows is None else np.asarray(self.rows)
        self._set("rows", rows.astype(np.int64, copy=False))
        if self.rows.shape != (count,):
            self._fail(f"rows must be [{count}], got {list(self.rows.shape)}")
        if self.images is not None and len(self.images) != count:
            self._fail(f"images must be {count} like the label sets, got {len(self.images)}")
        self._check_features(count)
        self._check_boxes(count)
        self._check_splits(count)
        require_max_pixels(self.max_pixels)

    def _fail(self, message: str) -> None:
        raise DataError(f"{self.source}: {message}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_names(self) -> None:
        seen: dict[str, int] = {}
        for position, name in enumerate(self.label_names):
            if (expected := expected_name(name)) is not None:
                self._fail(f"label {position} must have {expected}, got {name!a}")
            if name in seen:
                self._fail(
                    f"label names must be unique, got {name!r} as labels {seen[name]} "
                    f"and {position}"
                )
            seen[name] = position

    def _checked_csr(
        self, prefix: str, indptr: npt.ArrayLike, indices: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        pointers, values = np.asarray(indptr), np.asarray(indices)
        for name, part in (("indptr", pointers), ("indices", values)):
            if not _is_integers(part):
                self._fail(
                    f"{prefix}{name} must be a vector of integers, got {list(part.shape)} "
                    f"{part.dtype}"
                )
        if not len(pointers) or pointers[0] != 0 or pointers[-1] != len(values):
            ends = [int(pointers[0]), int(pointers[-1])] if len(pointers) else []
            self._fail(f"{prefix}indptr must run from 0 to {len(values)}, got {ends}")
        pointers = pointers.astype(np.int64, copy=False)
        if np.any(np.diff(pointers) < 0):
            self._fail(f"{prefix}indptr must not decrease")
        count = len(self.label_names)
        if values.size and (values.min() < 0 or values.max() >= count):
            self._fail(
                f"{prefix}indices must be in 0..{count - 1}, got {values.min()}..{values.max()}"
            )
        return pointers, values.astype(np.int32, copy=False)

    def _checked_sets(
        self, prefix: str, indptr: npt.ArrayLike, indices: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        pointers, values = self._checked_csr(prefix, indptr, indices)
        starts_record = np.zeros(len(values), dtype=bool)
        starts_record[pointers[:-1][np.diff(pointers) > 0]] = True
        if not np.all(starts_record[1:] | (np.diff(values) > 0)):
            self._fail(f"{prefix}indices must be ascending and unique within each record")
        return pointers, values

    def _check_unknown(self, count: int) -> None:
        if self.unknown_indptr is None or self.unknown_indices is None:
            if self.unknown_indptr is not None or self.unknown_indices is not None:
                self._fail("unknown_indptr and unknown_indices must come together, got one")
            return
        pointers, values = self._checked_sets("unknown_", self.unknown_indptr, self.unknown_indices)
        if len(pointers) != count + 1:
            self._fail(f"unknown_indptr must cover {count} records, got {len(pointers) - 1}")
        present, unknown = (
            np.repeat(np.arange(count), np.diff(rows)) * len(self.label_names) + labels
            for rows, labels in ((self.label_indptr, self.label_indices), (pointers, values))
        )
        both = np.intersect1d(present, unknown)
        if len(both):
            record, label = divmod(int(both[0]), len(self.label_names))
            self._fail(f"record {record} has {self.label_names[label]!r} as label and as unknown")
        self._set("unknown_indptr", pointers)
        self._set("unknown_indices", values)

    def _check_features(self, count: int) -> None:
        if self.features is None:
            return
        features = np.asarray(self.features)
        if features.ndim != 2 or len(features) != count or features.dtype.kind != "f":
            self._fail(
                f"features must be [{count}, F] floats, got {list(features.shape)} {features.dtype}"
            )
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is named below
            self._set("features", np.ascontiguousarray(features, dtype=np.float32))
        finite = np.isfinite(self.features)
        if not finite.all():
            row, column = (int(position) for position in np.argwhere(~finite)[0])
            raise DataError(
                f"row {self.rows[row]} of {_location(self.source)}: features must be finite "
                f"in float32, got {features[row, column]} in column {column}"
            )

    def _check_boxes(self, count: int) -> None:
        if self.boxes is None:
            return
        pointers, labels = self._checked_csr("box ", self.boxes.indptr, self.boxes.label_indices)
        xywh = np.asarray(self.boxes.xywh, dtype=np.float32)
        if len(pointers) != count + 1 or xywh.shape != (len(labels), 4):
            self._fail(
                f"boxes must cover {count} records with xywh [{len(labels)}, 4], got "
                f"{len(pointers) - 1} records and {list(xywh.shape)}"
            )
        if not np.isfinite(xywh).all():
            self._fail("boxes must be finite")
        self._set("boxes", Boxes(pointers, labels, xywh))

    def _check_splits(self, count: int) -> None:
        if len(self.splits) > MAX_SPLITS:
            self._fail(f"splits must be at most {MAX_SPLITS}, got {len(self.splits):,}")
        splits: dict[str, npt.NDArray[np.int64]] = {}
        for name, records in self.splits.items():
            members = np.asarray(records)
            if (expected := expected_name(name)) is not None:
                self._fail(f"a split must have {expected}, got {name!a}")
            if not _is_integers(members):
                self._fail(f"split {name} must be a vector of record indices, got {members.dtype}")
            if members.size and (members.min() < 0 or members.max() >= count):
                self._fail(
                    f"split {name} must hold records 0..{count - 1}, got "
                    f"{members.min()}..{members.max()}"
                )
            splits[name] = members.astype(np.int64, copy=False)
        self._set("splits", splits)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.label_indptr) - 1

    def labels(self, index: int) -> npt.NDArray[np.int32]:
        """Return the label indices of one record, ascending."""
        if not 0 <= index < len(self):
            raise IndexError(f"record must be in 0..{len(self) - 1}, got {index}")
        return self.label_indices[self.label_indptr[index] : self.label_indptr[index + 1]]

    def label_matrix(self) -> torch.Tensor:
        """Return the label sets, bool [n, L]."""
        return self._matrix(self.label_indptr, self.label_indices)

    def unknown_matrix(self) -> torch.Tensor:
        """Return the labels that are neither present nor absent, bool [n, L]."""
        if self.unknown_indptr is None or self.unknown_indices is None:
            return torch.zeros(len(self), len(self.label_names), dtype=torch.bool)
        return self._matrix(self.unknown_indptr, self.unknown_indices)

    def _matrix(
        self, pointers: npt.NDArray[np.int64], labels: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        matrix = torch.zeros(len(pointers) - 1, len(self.label_names), dtype=torch.bool)
        rows = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
        matrix[torch.from_numpy(rows), torch.from_numpy(labels.astype(np.int64))] = True
        return matrix

    @property
    def has_unknown(self) -> bool:
        """Tell whether a label of any record is neither present nor absent."""
        return self.unknown_indices is not None and len(self.unknown_indices) > 0

    def never_absent(self) -> list[str]:
        """Return the labels that no record is known to lack, though they are unknown in some."""
        if self.unknown_indices is None:
            return []
        unknown = np.bincount(self.unknown_indices, minlength=len(self.label_names))
        never = (unknown > 0) & (self.label_counts() + unknown == len(self))
        return [self.label_names[label] for label in np.flatnonzero(never)]

    def label_counts(self) -> npt.NDArray[np.int64]:
        """Return how many records have each label, int64 [L]."""
        counts = np.bincount(self.label_indices, minlength=len(self.label_names))
        return counts.astype(np.int64)

    def _checked_indices(self, indices: Indices) -> npt.NDArray[np.int64]:
        rows = np.asarray(indices)
        if not _is_integers(rows):
            raise TypeError(
                f"indices must be a vector of integers, got {list(rows.shape)} {rows.dtype}"
            )
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(
                f"indices must be in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}"
            )
        return rows.astype(np.int64)

    def select(self, indices: Indices) -> Dataset:
        """Return the records `indices`, in that order; splits are dropped.

        Args:
            indices: [m] integers in 0..n-1, repeats allowed.

        Raises:
            IndexError: an index is out of range.
        """
        chosen = self._checked_indices(indices)
        label_indptr, label_positions = _csr_rows(self.label_indptr, chosen)
        boxes = None
        if self.boxes is not None:
            indptr, positions = _csr_rows(self.boxes.indptr, chosen)
            boxes = Boxes(indptr, self.boxes.label_indices[positions], self.boxes.xywh[positions])
        unknown_indptr, unknown_indices = self.unknown_indptr, self.unknown_indices
        if unknown_indptr is not None and unknown_indices is not None:
            unknown_indptr, positions = _csr_rows(unknown_indptr, chosen)
            unknown_indices = unknown_indices[positions]
        images = self.images
        return self.with_changes(
            label_indptr=label_indptr,
            label_indices=self.label_indices[label_positions],
            splits={},
            images=None if images is None else tuple(images[i] for i in chosen),
            features=None if self.features is None else self.features[chosen],
            boxes=boxes,
            rows=self.rows[chosen],
            unknown_indptr=unknown_indptr,
            unknown_indices=unknown_indices,
        )

    def split(self, name: str) -> Dataset:
        """Return the records of one split.

        Raises:
            DataError: there is no such split; the message lists those that exist.
        """
        return self.select(self.splits[self.split_name(name)])

    def split_name(self, name: str) -> str:
        """Return the name here of a split that is asked for, such as `val` for `validation`.

        Raises:
            DataError: there is no such split; the message lists those that exist.
        """
        for candidate in (name, usual_split_name(name)):
            if candidate in self.splits:
                return candidate
        raise DataError(
            f"{self.source} has no split {name!r}, expected one of: "
            f"{', '.join(self.splits) or '(none)'}"
        )

    @property
    def image_paths(self) -> tuple[Path, ...] | None:
        """The n image files; None without images, or where some are in no file of their own."""
        if self.images is None or not all(isinstance(image, Path) for image in self.images):
            return None
        return cast("tuple[Path, ...]", self.images)

    def record_name(self, index: int) -> str:
        """Return the record's image path, or `row i of FILE`, for messages."""
        if not 0 <= index < len(self):
            raise IndexError(f"record must be in 0..{len(self) - 1}, got {index}")
        if self.images is not None and isinstance(self.images[index], Path):
            return str(self.images[index])
        return f"row {self.rows[index]} of {_location(self.source)}"


def usual_split_name(name: str) -> str:
    """Return train, val or test for their other names, in any case; other names as they are."""
    return _SPLITS.get(name.strip().lower(), name)


def usual_split_names(place: object, names: Iterable[str], apart: bool = True) -> dict[str, str]:
    """Return the `usual_split_name` of each split of a source.

    Args:
        place: the source, for messages.
        names: of its splits.
        apart: each names a part of its own, such as a file; else names of records, where `train`
            and `Train` are one.

    Raises:
        DataError: two names mean one split.
    """
    usual: dict[str, str] = {}
    meant: dict[str, str] = {}
    for name in names:
        usual[name] = usual_split_name(name)
        other = meant.setdefault(usual[name], name)
        if other != name and (apart or other.strip().lower() != name.strip().lower()):
            raise DataError(
                f"{place} must have one name for a split, got {other!r} and {name!r}, which both "
                f"mean {usual[name]}"
            )
    return usual


def _given_image(position: int, image: object) -> ImageSource:
    """Return an image that was passed, a path as `Path`."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if isinstance(image, (bytes, Image.Image)):
        return image
    raise TypeError(
        f"image {position} must be a path, the bytes of an image file or a PIL image, got "
        f"{type(image).__name__}"
    )


def _lists_of_strings(name: str, given: Sequence[Iterable[str]]) -> list[list[str]]:
    """Return the labels of each image as lists; `name` is that of the argument."""
    lists = []
    for position, labels in enumerate(given):
        own = None if isinstance(labels, (str, bytes)) else list(labels)
        if own is None or not all(isinstance(label, str) for label in own):
            raise TypeError(f"{name} of image {position} must be a list of strings, got {labels!r}")
        lists.append(own)
    return lists


def _named_sets(
    name: str, sets: Sequence[Sequence[str]], label_names: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return compressed rows of the labels of each image."""
    index = {label: position for position, label in enumerate(label_names)}
    for position, own in enumerate(sets):
        for label in own:
            if label not in index:
                raise DataError(
                    f"{name} of image {position} must be among the {len(label_names)} of "
                    f"label_names, got {label!r}"
                )
    return csr(sorted({index[label] for label in own}) for own in sets)


def _given_splits(
    splits: Sequence[str] | Mapping[str, Sequence[int]] | None, count: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the record numbers of each split."""
    if splits is None:
        return {"all": np.arange(count)}
    if isinstance(splits, Mapping):
        usual = usual_split_names("splits", splits)
        return {usual[name]: np.asarray(members) for name, members in splits.items()}
    if isinstance(splits, str) or len(splits) != count:
        raise DataError(f"splits must name the split of each of the {count} images, got {splits!r}")
    usual = usual_split_names("splits", dict.fromkeys(splits), apart=False)
    members: dict[str, list[int]] = {}
    for position, name in enumerate(splits):
        members.setdefault(usual[name], []).append(position)
    return {name: np.array(numbers, np.int64) for name, numbers in members.items()}


def _is_integers(values: npt.NDArray[Any]) -> bool:
    return values.ndim == 1 and (not values.size or values.dtype.kind in "iu")


def _csr_rows(
    indptr: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the row pointers of the chosen rows and the positions of their entries."""
    lengths = indptr[rows + 1] - indptr[rows]
    pointers = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    positions = np.arange(pointers[-1]) + np.repeat(indptr[rows] - pointers[:-1], lengths)
    return pointers, positions


def _location(source: str) -> str:
    """Return the path in a spec such as `features:FILE.npz`."""
    return source.partition(":")[2] or source


def expected_name(name: object) -> str | None:
    """Return what a label or split must have, if its name is wrong; else None."""
    if not isinstance(name, str) or not name.strip():
        return "a non-empty string as name"
    if not is_text(name):
        return "a name that is valid text"
    return "a name without control characters" if CONTROL.search(name) else None


def is_text(value: str) -> bool:
    """Tell whether a string can be encoded as UTF-8 (JSON may hold half a character)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def csr(rows: Iterable[Iterable[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return rows of label indices as compressed rows: pointers [n+1] and indices."""
    result = _Rows()
    for row in rows:
        result.add(row)
    return result.arrays()


class _Rows:
    """Compressed rows of label indices that grow."""

    def __init__(self) -> None:
        self.ends = array("q", [0])
        self.values = array("i")

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, row: Iterable[int]) -> None:
        self.values.extend(row)
        self.ends.append(len(self.values))

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        return np.array(self.ends), np.array(self.values)


class Records:
    """Gathers the records that a reader finds, one by one, into a `Dataset`.

    Attributes:
        splits: split name to record numbers; a record may be put into more than one.
    """

    def __init__(self) -> None:
        """Start without records."""
        self.splits: dict[str, list[int]] = {}
        self._images: list[ImageSource] = []
        self._labels, self._unknown, self._box_labels = _Rows(), _Rows(), _Rows()
        self._xywh = array("f")

    def __len__(self) -> int:
        """Return how many there are so far."""
        return len(self._labels)

    def add(
        self,
        split: str | None,
        labels: Iterable[int],
        image: ImageSource | None = None,
        *,
        unknown: Iterable[int] | None = None,
        boxes: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        """Add a record.

        Args:
            split: its split; None leaves that to `splits`.
            labels: in any order, repeats allowed.
            image: its file or content; all records have one, or none has.
            unknown: labels that are neither present nor absent; all records have some, which may be
                none, or all have None.
            boxes: label and left, top, width and height of each object.
        """
        if split is not None:
            self.splits.setdefault(split, []).append(len(self))
        self._labels.add(sorted(set(labels)))
        if image is not None:
            self._images.append(image)
        if unknown is not None:
            self._unknown.add(sorted(set(unknown)))
        self._box_labels.add(label for label, _ in boxes)
        for _, box in boxes:
            self._xywh.extend(box)

    def dataset(
        self,
        source: str,
        label_names: Iterable[str],
        features: npt.NDArray[np.float32] | None = None,
    ) -> Dataset:
        """Return all records as a dataset; with boxes where any record has one."""
        label_indptr, label_indices = self._labels.arrays()
        unknown = self._unknown.arrays() if len(self._unknown) else (None, None)
        xywh = np.array(self._xywh).reshape(-1, 4)
        return Dataset.from_arrays(
            source=source,
            label_names=tuple(label_names),
            label_indptr=label_indptr,
            label_indices=label_indices,
            splits={name: np.array(members, np.int64) for name, members in self.splits.items()},
            images=tuple(self._images) if self._images else None,
            features=features,
            boxes=Boxes(*self._box_labels.arrays(), xywh) if len(xywh) else None,
            unknown_indptr=unknown[0],
            unknown_indices=unknown[1],
        )
