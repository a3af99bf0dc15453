"""Tables of image paths and labels: one CSV file, or one per split."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cnnrnn.config import OnBadImage, TableOptions
from cnnrnn.data.cells import (
    NO_LABELS,
    CellError,
    cell_labels,
    is_list,
    looks_separated_by_spaces,
    shown_delimiter,
)
from cnnrnn.data.dataset import MAX_SPLITS, DataError, Dataset, expected_name
from cnnrnn.data.files import (
    Problems,
    files_by_split,
    read_text,
    read_vocabulary,
    reason,
    short,
)
from cnnrnn.data.folders import Folder, given_folder
from cnnrnn.data.rows import DroppedRows, Row, dataset_of_rows, label_problem

IMAGE_COLUMNS = (
    "image", "fname", "file_name", "filename", "image_name", "image_path", "path", "file",
)  # fmt: skip
LABEL_COLUMNS = ("labels", "tags", "label")
SPLIT_COLUMNS = ("split", "is_valid")
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
_IS_VALID = {"true": "val", "1": "val", "false": "train", "0": "train"}

# A cell of a column that is one label; what is neither present nor absent is unknown.
_ABSENT, _PRESENT, _UNKNOWN, _WRONG = range(4)
_ONE_LABEL = {
    **dict.fromkeys(("0", "0.0", "false", "no"), _ABSENT),
    **dict.fromkeys(("1", "1.0", "true", "yes"), _PRESENT),
    **dict.fromkeys(("", "?", "-1", "-1.0", *NO_LABELS), _UNKNOWN),
}
_ONE_LABEL_WORDS = "0 or 1, true or false, yes or no, or blank, -1 or ? where it is unknown"


def load_table(
    path: str | Path,
    images: str | Path | None = None,
    options: TableOptions | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    problems: Problems | None = None,
) -> Dataset:
    """Read a table with a header row and a row per image, or per image and label.

    A folder is read as one table per split: every `<split>.csv` or `<split>.tsv` in it. In a
    single file a column may name the split; without one there is one split, `all`. Labels are in
    the cells of one column, or each has a column of its own with 0 and 1. Rows of one image are
    joined. A table of a folder that has no labels beside others that have is left out with a
    warning.

    Args:
        path: the file or the folder.
        images: the folder that image paths start from; None takes the table's own.
        options: columns, delimiter, separator, encoding, suffix and vocabulary.
        on_bad_image: `skip` warns once per table.
        follow_links: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths. Its labels are the vocabulary, or those of columns of their
        own in the order of the header, or the labels that occur, sorted.
    """
    problems = problems or Problems()
    options = options or TableOptions()
    path = Path(path)
    names = read_vocabulary(options.vocabulary, problems)
    vocabulary = None if names is None else {name: i for i, name in enumerate(names)}
    if images is not None:
        root = given_folder(path, images)
    else:
        root = path if path.is_dir() else path.parent
    folder = Folder(root, follow_links)
    dropped = DroppedRows()
    tables: list[_Table] = []
    lacking: list[_NoColumnError] = []
    for file in _table_files(path):
        split = "all" if file == path else file.stem
        with problems.part():
            try:
                tables.append(_read_table(file, split, options, folder, dropped, problems))
            except _NoColumnError as error:
                lacking.append(error)
    for unlabelled in lacking:
        if not tables:
            problems.add(str(unlabelled))
        else:
            warnings.warn(f"{unlabelled}; the table is left out", stacklevel=3)
    if (text := dropped.warning()) is not None:
        warnings.warn(text, stacklevel=3)
    delimiter = _delimiter(path, tables, options, vocabulary, problems)
    own = dict.fromkeys(name for table in tables for name in table.own_labels)
    rows = [_rows(table, own, delimiter, vocabulary, problems) for table in tables]
    without = sum(table.without for table in tables)
    if without:
        problems.note(f"{path}: {without:,} cells of labels hold a word for none, such as nan")
    return dataset_of_rows(
        f"csv:{path}", path, folder, rows, vocabulary, own, on_bad_image, problems
    )


class _Line(NamedTuple):
    number: int
    image: str
    cell: str
    marks: bytes  # _ABSENT, _PRESENT or _UNKNOWN of each label with a column of its own
    split: str


class _Table:
    """What a file holds, its cells of labels not yet taken apart."""

    def __init__(self, file: Path, own_labels: Sequence[str]) -> None:
        self.file = file
        self.own_labels = own_labels
        self.lines: list[_Line] = []
        self.without = 0  # cells that hold a word for no labels


def _table_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} must be a table or a folder of tables, found no such file")
    return files_by_split(path, (".csv", ".tsv"), "table")


class _NoColumnError(DataError):
    """A column of images or labels that a table does not have."""


class _Columns(NamedTuple):
    """Where the labels of a table are.

    Attributes:
        cells: the column of cells that hold labels, or None.
        own: columns that are one label each.
        named: the columns were asked for by name.
    """

    cells: int | None
    own: list[int]
    named: bool


def _read_table(
    file: Path,
    split: str,
    options: TableOptions,
    folder: Folder,
    dropped: DroppedRows,
    problems: Problems,
) -> _Table:
    """Return the lines whose image and split are right."""
    header, separator, lines = _opened(file, options)
    if separator != _usual_separator(file) and options.separator is None:
        problems.note(f"{file}: the cells of a row are separated by {short(separator)}")
    image_column = _column(file, header, "image", options.image, IMAGE_COLUMNS)
    split_column = None
    if options.split is not None or set(SPLIT_COLUMNS) & set(map(str.lower, header)):
        split_column = _column(file, header, "split", options.split, SPLIT_COLUMNS)
    columns = _columns_of_labels(file, header, options)
    if columns.cells is not None and columns.named:  # it may be one label
        columns = columns._replace(own=[columns.cells])
    for column in columns.own:
        if (expected := expected_name(header[column])) is not None:
            raise DataError(
                f"{file}: a column of one label must have {expected}, got {header[column]!a}"
            )
    table = _Table(file, [header[column] for column in columns.own])
    wrong: tuple[int, int, str] | None = None
    for number, cells in lines:
        if not any(map(str.strip, cells)):
            continue
        place = f"{file}, line {number}"
        if len(cells) != len(header):
            problems.add(
                f"{place} must have {len(header)} cells like the header, got {len(cells)}",
                f"{file}: must have cells like the header",
            )
            continue
        named = cells[image_column].strip()
        image, problem = folder.inside(named and named + options.suffix)
        if problem is None and dropped.takes(image, place):
            continue
        name: str | None = split
        if split_column is not None:
            name = _split_name(header[split_column], cells[split_column])
        marks = bytes([_ONE_LABEL.get(cells[i].strip().lower(), _WRONG) for i in columns.own])
        if _WRONG in marks and wrong is None:
            column = columns.own[marks.index(_WRONG)]
            wrong = number, column, cells[column]
        cell = "" if columns.cells is None else cells[columns.cells]
        if problem is not None:
            problems.add(
                f"{place}: an image must be a file inside the image folder, got {short(named)} "
                f"({problem})",
                f"{file}: an image must be a file inside the image folder ({problem})",
            )
        elif name is None:
            problems.add(
                f"{place}: {header[split_column or 0]} must be "
                f"{_split_values(header[split_column or 0])}, got "
                f"{short(cells[split_column or 0])}"
            )
        elif _WRONG in marks and columns.cells is None and options.labels is not None:
            column = columns.own[marks.index(_WRONG)]
            problems.add(
                f"{place}: column {short(header[column])} must be {_ONE_LABEL_WORDS}, got "
                f"{short(cells[column])}",
                f"{file}: column {header[column]} must be {_ONE_LABEL_WORDS}",
            )
        else:
            table.lines.append(_Line(number, image, cell, marks, name))
    splits = {line.split for line in table.lines}
    if split_column is not None and len(splits) > MAX_SPLITS:
        raise DataError(
            f"{file}: column {short(header[split_column])} must name at most {MAX_SPLITS} splits, "
            f"got {len(splits):,}: split=COLUMN names another column"
        )
    if columns.cells is not None:
        _choose_kind(table, columns)
    elif not table.lines:
        table.own_labels = []
    elif wrong is not None and options.labels is None:
        number, column, found = wrong
        raise _NoColumnError(
            f"{file} must have a column of labels, {' or '.join(LABEL_COLUMNS)} (labels=COLUMN "
            f"names another), or columns that are each {_ONE_LABEL_WORDS} (labels=FIRST..LAST "
            f"names them), got {short(found)} in column {short(header[column])} in line {number}, "
            f"found {', '.join(map(short, header))} in the header row"
        )
    return table


def _choose_kind(table: _Table, columns: _Columns) -> None:
    """Take a column that was named for one label where it holds 0 and 1, else for cells of labels.

    A column that was recognised by its name holds cells of labels.
    """
    marks = {line.marks for line in table.lines}
    if not columns.named or bytes([_WRONG]) in marks or marks <= {bytes([_UNKNOWN])}:
        table.own_labels = []
        table.lines = [line._replace(marks=b"") for line in table.lines]
    else:
        table.lines = [line._replace(cell="") for line in table.lines]


def _columns_of_labels(file: Path, header: list[str], options: TableOptions) -> _Columns:
    """Find the labels: the columns named, a column of cells, or all other columns.

    Raises:
        DataError: a column that is named does not exist.
    """
    words = options.labels
    if words is not None and words not in header and ("," in words or ".." in words):
        own = [column for word in words.split(",") for column in _range(file, header, word.strip())]
        return _Columns(None, list(dict.fromkeys(own)), True)
    if words is not None or set(LABEL_COLUMNS) & set(map(str.lower, header)):
        return _Columns(
            _column(file, header, "labels", words, LABEL_COLUMNS), [], words is not None
        )
    image = _column(file, header, "image", options.image, IMAGE_COLUMNS)
    split = [name for name in (options.split,) if name is not None] or SPLIT_COLUMNS
    lowered = header if options.split is not None else list(map(str.lower, header))
    # A column without a name is the numbering that pandas writes.
    own = [i for i, name in enumerate(header) if i != image and lowered[i] not in split and name]
    counts = Counter(header)
    for column in own:
        if counts[header[column]] > 1:
            raise DataError(f"{file}: columns must be unique, got {short(header[column])} twice")
    if not own:
        _column(file, header, "labels", None, LABEL_COLUMNS)
    return _Columns(None, own, False)


def _range(file: Path, header: list[str], word: str) -> list[int]:
    """Return the columns of `first..last`, or of one name."""
    if word in header or ".." not in word:
        return [_column(file, header, "labels", word, ())]
    first, last = (_column(file, header, "labels", end.strip(), ()) for end in word.split("..", 1))
    if first > last:
        raise DataError(
            f"{file}: labels must name a range of columns from left to right, got {short(word)}"
        )
    return list(range(first, last + 1))


def _delimiter(
    path: Path,
    tables: list[_Table],
    options: TableOptions,
    vocabulary: Mapping[str, int] | None,
    problems: Problems,
) -> str | None:
    """Return what separates the labels of a cell: as asked, or the first sign that any cell has."""
    cells = [line.cell for table in tables for line in table.lines if line.cell]
    if not cells or options.delimiter in ("none", "space"):
        return None if options.delimiter == "none" else options.delimiter
    found = shown_delimiter(cells, vocabulary or ())
    if options.delimiter is not None:
        if found is not None and not any(options.delimiter in cell for cell in cells):
            warnings.warn(
                f"{path}: no cell of labels has the delimiter {short(options.delimiter)}, some "
                f"have {short(found)}",
                stacklevel=4,
            )
        return options.delimiter
    if found is not None:
        problems.note(f"{path}: labels are separated by {short(found)}")
        return found
    if vocabulary is None:
        with problems.part():
            _check_spaces(tables, problems)
    problems.note(f"{path}: a cell is one label, none has ; or | or ,")
    return None


def _check_spaces(tables: list[_Table], problems: Problems) -> None:
    """Find cells of several words, where no sign separates labels."""
    cells = {line.cell for table in tables for line in table.lines if not is_list(line.cell)}
    several = looks_separated_by_spaces(cells)
    places = (
        (table.file, line)
        for table in tables
        for line in table.lines
        if " " in line.cell.strip() and line.cell in cells and line.cell.strip()[0].isalnum()
    )
    file, first = next(places, (None, None))
    if first is None:
        return
    if several is None:
        warnings.warn(
            f"{file}, line {first.number}: {short(first.cell)} is taken for one label, as no cell "
            "has ; or | or ,; with delimiter=space white space separates labels",
            stacklevel=5,
        )
        return
    raise DataError(
        f"{file}, line {first.number}: labels must be separated by ; or | or ,, which no cell has, "
        f"got {short(first.cell)} among cells that combine the same words: say delimiter=space, or "
        "delimiter=none if each cell is one label"
    )


def _rows(
    table: _Table,
    own: Mapping[str, object],
    delimiter: str | None,
    vocabulary: Mapping[str, int] | None,
    problems: Problems,
) -> list[Row]:
    """Return the rows whose labels are right.

    Labels with a column of their own in another table alone are unknown here.
    """
    there = set(table.own_labels)
    lacking = tuple(name for name in own if name not in there)
    if lacking and table.own_labels:
        warnings.warn(
            f"{table.file} has no column {short(lacking[0])} as other tables have"
            + (f", and {len(lacking) - 1} more like that" if len(lacking) > 1 else "")
            + "; these labels are unknown in its rows",
            stacklevel=4,
        )
    read: dict[str, tuple[str, ...] | None] = {}  # cells that are right
    rows = []
    table.lines.reverse()
    while table.lines:  # each goes as its row comes
        line = table.lines.pop()
        unknown: tuple[str, ...] = ()
        if table.own_labels:
            marks = list(zip(table.own_labels, line.marks, strict=True))
            labels = tuple(name for name, mark in marks if mark == _PRESENT)
            unknown = (*(name for name, mark in marks if mark == _UNKNOWN), *lacking)
            problem = label_problem((*labels, *unknown), vocabulary)
        else:
            labels, problem = _labels_of_cell(line.cell, delimiter, vocabulary, read)
            table.without += read.get(line.cell, ()) is None
        if problem is not None:
            problems.add(f"{table.file}, line {line.number}: {problem}")
        else:
            rows.append(Row(table.file, line.number, line.image, labels, line.split, unknown))
    return rows


def _labels_of_cell(
    cell: str,
    delimiter: str | None,
    vocabulary: Mapping[str, int] | None,
    read: dict[str, tuple[str, ...] | None],
) -> tuple[tuple[str, ...], str | None]:
    """Return the labels of a cell, and what is wrong with them; `read` keeps those that are right.

    There None stands for a word for no labels.
    """
    if cell not in read:
        try:
            labels = cell_labels(cell, delimiter, vocabulary or ())
        except CellError as error:
            return (), str(error)
        problem = label_problem(labels or (), vocabulary)
        if problem is not None:
            return (), problem
        read[cell] = labels
    return read[cell] or (), None


def _opened(
    file: Path, options: TableOptions
) -> tuple[list[str], str, Iterator[tuple[int, list[str]]]]:
    """Return the header, what separates the cells, and the other rows."""
    text = read_text(file, options.encoding, option=True)
    separator = options.separator or _separator(file, text, options)
    lines = _cells(file, text, SEPARATORS.get(separator, separator))
    _, header = next(lines, (1, []))
    if header and header[0].lower().startswith("sep="):  # written for Excel
        _, header = next(lines, (1, []))
    return [cell.strip() for cell in header], SEPARATORS.get(separator, separator), lines


def _usual_separator(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _separator(file: Path, text: str, options: TableOptions) -> str:
    """Return the sign that takes the header apart: into a column of images, and into most cells."""
    head = next((line for line in text.splitlines() if line.strip()), "")
    if (said := head.strip('" ').lower()).startswith("sep=") and said[4:] in SEPARATORS.values():
        return said[4:]
    images = IMAGE_COLUMNS if options.image is None else (options.image.lower(),)

    def fit(sign: str) -> tuple[bool, int]:
        try:
            cells = next(csv.reader([head], delimiter=sign, skipinitialspace=True), [])
        except csv.Error:  # said when it is read
            return False, 0
        names = {cell.strip().lower() for cell in cells}
        return bool(names & set(images)), len(cells)

    usual = _usual_separator(file)
    return max((usual, *(sign for sign in SEPARATORS.values() if sign != usual)), key=fit)


def _cells(file: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Return the line number and cells of each row that is not empty."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
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
    raise (DataError if what == "split" else _NoColumnError)(
        f"{file} must have a column of {what}, {expected} ({what}=COLUMN names another), found "
        f"{', '.join(map(short, header)) or 'nothing'} in the header row"
    )


def _split_name(column: str, cell: str) -> str | None:
    """Return the split that a cell names, None where it names none."""
    name = cell.strip()
    return _IS_VALID.get(name.lower()) if column.lower() == "is_valid" else name or None


def _split_values(column: str) -> str:
    return "true or false" if column.lower() == "is_valid" else "a non-empty name"
