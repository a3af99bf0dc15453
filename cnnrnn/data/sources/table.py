"""Tables of image paths and labels: one CSV file, or one per split."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cnnrnn.config import OnBadImage, TableOptions
from cnnrnn.data.dataset import CONTROL, MAX_SPLITS, DataError, Dataset, Records
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    existing_images,
    files_by_split,
    given_folder,
    name_problem,
    read_text,
    read_vocabulary,
    reason,
    short,
)

IMAGE_COLUMNS = (
    "image", "fname", "file_name", "filename", "image_name", "image_path", "path", "file",
)  # fmt: skip
LABEL_COLUMNS = ("labels", "tags", "label")
SPLIT_COLUMNS = ("split", "is_valid")
_IS_VALID = {"true": "val", "1": "val", "false": "train", "0": "train"}
_NAMES_OF_VAL = ("valid", "validation", "dev")
_OTHER_DELIMITERS = ("|", ",", " ")


def load_table(
    path: str | Path,
    images: str | Path | None = None,
    options: TableOptions | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    problems: Problems | None = None,
) -> Dataset:
    """Read a table with a header row and a row per image.

    A folder is read as one table per split: every `<split>.csv` or `<split>.tsv` in it. In a
    single file a column may name the split; without one there is one split, `all`. A split called
    `valid`, `validation` or `dev` is `val` where it is the only one of these. Cells are separated
    by commas, in `.tsv` files by tabs. An image without labels has an empty cell.

    Args:
        path: the file or the folder.
        images: the folder that image paths start from; None takes the table's own.
        options: columns, delimiter, suffix and vocabulary. Without a delimiter labels are
            separated by `;`, and a table that looks as if they were not is an error.
        on_bad_image: `skip` warns once per table.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths. Its labels are the vocabulary, or the labels that occur,
        sorted.
    """
    problems = problems or Problems()
    options = options or TableOptions()
    path = Path(path)
    names = read_vocabulary(options.vocabulary, problems)
    vocabulary = None if names is None else _numbered(names)
    if images is not None:
        folder = given_folder(path, images)
    else:
        folder = path if path.is_dir() else path.parent
    rows: list[_Row] = []
    seen: dict[str, str] = {}
    for file in _table_files(path):
        split = "all" if file == path else file.stem
        with problems.part():
            table = _read_table(file, split, options, vocabulary, seen, problems)
            kept = _existing(file, folder, table, on_bad_image, problems)
            rows += [table[i] for i in kept]
    if options.delimiter is None and vocabulary is None:
        with problems.part():
            _check_delimiter(rows)
    if not rows:
        raise EmptySourceError(f"{path} must hold at least one image, got none")
    if vocabulary is None:
        vocabulary = _numbered(sorted({label for row in rows for label in row.labels}))
    if not vocabulary:
        raise EmptySourceError(f"{path} must hold at least one label, got none in any row")
    splits = {row.split: row.split for row in rows}
    others = [name for name in splits if name in _NAMES_OF_VAL]
    if "val" not in splits and len(others) == 1:
        splits[others[0]] = "val"
    records = Records()
    for row in rows:
        labels = [vocabulary[label] for label in row.labels]
        records.add(splits[row.split], labels, folder / row.image)
    return records.dataset(f"csv:{path}", vocabulary)


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


class _Row(NamedTuple):
    file: Path
    line: int
    image: str
    labels: tuple[str, ...]
    split: str


def _table_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} must be a table or a folder of tables, found no such file")
    return files_by_split(path, (".csv", ".tsv"), "table")


def _read_table(
    file: Path,
    split: str,
    options: TableOptions,
    vocabulary: Mapping[str, int] | None,
    seen: dict[str, str],
    problems: Problems,
) -> list[_Row]:
    """Return the rows that are right; `seen` says where each image was first named."""
    lines = _cells(file)
    header = [cell.strip() for cell in next(lines, (1, []))[1]]
    image_column = _column(file, header, "image", options.image, IMAGE_COLUMNS)
    label_column = _column(file, header, "labels", options.labels, LABEL_COLUMNS)
    split_column = None
    if options.split is not None or set(SPLIT_COLUMNS) & set(map(str.lower, header)):
        split_column = _column(file, header, "split", options.split, SPLIT_COLUMNS)
    rows: list[_Row] = []
    for line, cells in lines:
        place = f"{file}, line {line}"
        if len(cells) != len(header):
            problems.add(f"{place} must have {len(header)} cells like the header, got {len(cells)}")
            continue
        image = cells[image_column].strip().replace("\\", "/")
        text = cells[label_column]
        image = image and image + options.suffix
        name = None if split_column is None else _split_name(header[split_column],
                                                             cells[split_column])  # fmt: skip
        labels = _labels(text, options.delimiter or ";")
        problem = _row_problem(image, labels, vocabulary)
        if problem is not None:
            problems.add(f"{place}: {problem}")
        elif split_column is not None and name is None:
            problems.add(
                f"{place}: {header[split_column]} must be {_split_values(header[split_column])}, "
                f"got {short(cells[split_column])}"
            )
        elif (same := os.path.normpath(image)) in seen:
            problems.add(f"{place}: images must be unique, got {short(image)} as in {seen[same]}")
        else:
            seen[same] = f"{file.name}, line {line}"
            rows.append(_Row(file, line, image, labels, name or split))
    splits = {row.split for row in rows}
    if split_column is not None and len(splits) > MAX_SPLITS:
        raise DataError(
            f"{file}: column {short(header[split_column])} must name at most {MAX_SPLITS} splits, "
            f"got {len(splits):,}: split=COLUMN names another column"
        )
    return rows


def _check_delimiter(rows: list[_Row]) -> None:
    """Find rows that hold several labels as one, where no row has two."""
    if any(len(row.labels) > 1 for row in rows):
        return
    for row in rows:
        for label in row.labels:
            if any(sign in label for sign in _OTHER_DELIMITERS):
                raise DataError(
                    f"{row.file}, line {row.line}: labels must be separated by ';', which no row "
                    f"has, got {short(label)}: say delimiter=space or another, or delimiter=; if "
                    "these are single labels"
                )


def _cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Return the line number and cells of each row that is not empty."""
    reader = csv.reader(
        io.StringIO(read_text(file), newline=""),
        delimiter="\t" if file.suffix.lower() == ".tsv" else ",",
        strict=True,
    )
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{file}, line {line}: a row must be CSV, got {reason(error)}"
            ) from error
        if cells:
            yield line, cells


def _column(
    file: Path, header: list[str], what: str, name: str | None, defaults: tuple[str, ...]
) -> int:
    """Return the position of a column: the one named, or the first of the defaults."""
    cells = [cell.lower() for cell in header] if name is None else header
    for candidate in defaults if name is None else (name,):
        if cells.count(candidate) > 1:
            raise DataError(f"{file}: columns must be unique, got {short(candidate)} twice")
        if candidate in cells:
            return cells.index(candidate)
    expected = " or ".join(defaults) if name is None else short(name)
    raise DataError(
        f"{file} must have a column of {what}, {expected} ({what}=COLUMN names another), found "
        f"{', '.join(map(short, header)) or 'nothing'} in the header row"
    )


def _labels(text: str, delimiter: str) -> tuple[str, ...]:
    if not text.strip():
        return ()
    if delimiter == "space":
        return tuple(text.split())
    return tuple(label.strip() for label in text.split(delimiter))


def _row_problem(
    image: str, labels: tuple[str, ...], vocabulary: Mapping[str, int] | None
) -> str | None:
    problem = name_problem(image)
    if problem is not None:
        return f"an image must be a file inside the image folder, got {short(image)} ({problem})"
    seen: set[str] = set()
    for label in labels:
        if not label:
            return f"labels must be non-empty names, got {short(';'.join(labels))}"
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


def _split_name(column: str, cell: str) -> str | None:
    """Return the split that a cell names, None where it names none."""
    name = cell.strip()
    return _IS_VALID.get(name.lower()) if column.lower() == "is_valid" else name or None


def _split_values(column: str) -> str:
    return "true or false" if column.lower() == "is_valid" else "a non-empty name"


def _existing(
    file: Path, folder: Path, rows: list[_Row], on_bad_image: OnBadImage, problems: Problems
) -> list[int]:
    names = [row.image for row in rows]
    return existing_images(
        file, folder, lambda i: f"line {rows[i].line}", names, on_bad_image, problems
    )
