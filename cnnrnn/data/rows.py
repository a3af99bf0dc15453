"""Rows of an image and its labels, of whatever file, made one dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import CONTROL, Dataset, Records, usual_split_name, usual_split_names
from cnnrnn.data.files import EmptySourceError, Problems, is_dropping, short
from cnnrnn.data.folders import Folder


class Row(NamedTuple):
    """A line of a file.

    Attributes:
        file: that holds it.
        line: its number.
        image: path inside the image folder, or as it is named where it is none.
        labels: unique, in any order.
        split: as the file names it.
        unknown: labels that are neither present nor absent.
    """

    file: Path
    line: int
    image: str
    labels: tuple[str, ...]
    split: str
    unknown: tuple[str, ...] = ()


def dataset_of_rows(
    source: str,
    path: Path,
    folder: Folder,
    tables: Iterable[Sequence[Row]],
    vocabulary: Mapping[str, int] | None,
    ordered: Iterable[str],
    on_bad_image: OnBadImage,
    problems: Problems,
) -> Dataset:
    """Return the dataset of rows; those of one image are joined.

    Args:
        source: the spec, for messages.
        path: what was read, for messages.
        folder: holds the images.
        tables: the rows of each file.
        vocabulary: the labels with their numbers; None takes those that occur.
        ordered: labels that come first without a vocabulary; the others follow, sorted.
        on_bad_image: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.
    """
    records: dict[str, Row] = {}  # by the image's path
    joined = 0
    for rows in tables:
        with problems.part():
            joined += _add_rows(records, folder, rows, on_bad_image, problems)
    if joined:
        problems.note(
            f"{path}: {joined:,} rows are joined to an earlier one of the same image, "
            f"{len(records):,} images are left"
        )
    if not records:
        raise EmptySourceError(f"{path} must hold at least one image, got none")
    names = list(vocabulary or ())
    if vocabulary is None:
        first = list(dict.fromkeys(ordered))
        found: set[str] = set()
        for row in records.values():
            found.update(row.labels, row.unknown)
        names = [*first, *sorted(found - set(first))]
    if not names:
        raise EmptySourceError(f"{path} must hold at least one label, got none in any row")
    index = {name: position for position, name in enumerate(names)}
    found_splits = dict.fromkeys(row.split for row in records.values())
    splits = usual_split_names(path, found_splits, apart=False)
    has_unknown = any(row.unknown for row in records.values())
    result = Records()
    for row in records.values():
        unknown = [index[label] for label in row.unknown if label not in row.labels]
        result.add(
            splits[row.split],
            [index[label] for label in row.labels],
            folder.path / row.image,
            unknown=unknown if has_unknown else None,
        )
    return result.dataset(source, names)


def _add_rows(
    records: dict[str, Row],
    folder: Folder,
    rows: Sequence[Row],
    on_bad_image: OnBadImage,
    problems: Problems,
) -> int:
    """Add the rows of a file to the records by the image's path; return how many were joined."""
    if not rows:
        return 0
    file = rows[0].file
    first: dict[str, int] = {}
    place = [first.setdefault(os.path.normpath(row.image), i) for i, row in enumerate(rows)]
    distinct = list(first.values())
    kept = folder.existing(
        file, lambda i: f"line {rows[distinct[i]].line}", [rows[i].image for i in distinct],
        on_bad_image, problems,
    )  # fmt: skip
    actual = {distinct[position]: name for position, name in kept.items()}
    again: dict[str, list[Row]] = {}
    for position, row in zip(place, rows, strict=True):
        if position not in actual:
            continue
        image = actual[position]
        key = os.path.normpath(image)
        earlier = records.get(key)
        if earlier is None:
            records[key] = row if row.image == image else row._replace(image=image)
        elif usual_split_name(earlier.split) != usual_split_name(row.split):
            problems.add(
                f"{file}, line {row.line}: an image must be in one split, got {short(row.image)} "
                f"in {row.split}, and in {earlier.split} by {earlier.file.name}, line "
                f"{earlier.line}"
            )
        else:
            again.setdefault(key, [earlier]).append(row)
    for key, same in again.items():  # all at once: an image may have a row per label
        records[key] = same[0]._replace(
            labels=tuple({label for row in same for label in row.labels}),
            unknown=tuple({label for row in same for label in row.unknown}),
        )
    return sum(len(same) - 1 for same in again.values())


def label_problem(labels: Sequence[str], vocabulary: Mapping[str, int] | None) -> str | None:
    """Return what is wrong with the labels of a row, or None."""
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            return f"labels must be unique, got {short(label)} twice"
        if CONTROL.search(label):
            return f"labels must be names without control characters, got {short(label)}"
        seen.add(label)
        if vocabulary is not None and label not in vocabulary:
            return (
                f"labels must be among the {len(vocabulary)} of the vocabulary, got {short(label)}"
            )
    return None


class DroppedRows:
    """Counts the rows that name what systems leave behind, which are no records."""

    def __init__(self) -> None:
        """Start without any."""
        self.count = 0
        self.first = ""

    def takes(self, image: str, place: str) -> bool:
        """Tell whether a row is one, and count it."""
        if not is_dropping(image):
            return False
        self.first = self.first or f"{place} has {short(image)}"
        self.count += 1
        return True

    def warning(self) -> str | None:
        """Return a sentence on them, None where there are none."""
        if not self.count:
            return None
        return (
            f"{self.first}: {self.count:,} rows name hidden files or those of a system or program, "
            "which are no images; they are left out"
        )
