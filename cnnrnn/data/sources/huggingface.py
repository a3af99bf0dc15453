"""Datasets of images that the library `datasets` reads, from files or from the hub."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cnnrnn.config import HuggingFaceOptions
from cnnrnn.data.cells import CellError, cell_labels, shown_delimiter
from cnnrnn.data.dataset import DataError, Dataset, Records, usual_split_names
from cnnrnn.data.files import EmptySourceError, Problems, read_vocabulary, reason, short
from cnnrnn.machine.extras import from_extra

LABEL_COLUMNS = ("labels", "tags", "label", "cls")
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_BATCH = 1000

Labels = tuple[Iterable[str], Iterable[str]]
"""Those of a record, and those that are neither present nor absent."""


def load_huggingface(
    location: str,
    options: HuggingFaceOptions | None = None,
    *,
    problems: Problems | None = None,
) -> Dataset:
    """Read a dataset through `datasets`.

    Args:
        location: a folder of images, Parquet or WebDataset files, one such file, a folder written
            by `save_to_disk`, or a name on the hub.
        options: columns of images and labels, configuration, names of numbered labels. Without
            them images are the only column of that type, and labels a column of lists of class
            labels, of names, or of numbers (0 and 1 for each label, or the labels' numbers), a
            column of class labels, or all other columns where they are true and false.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset; its images are files where `datasets` has paths, and else are read from its
        files when needed. Its labels are in the order of class labels, of the columns or of the
        vocabulary, or sorted.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
    """
    problems = problems or Problems()
    options = options or HuggingFaceOptions()
    source = f"hf:{location}"
    vocabulary = read_vocabulary(options.vocabulary, problems)
    parts = _loaded(source, location, options)
    usual = usual_split_names(source, parts)
    labels: dict[str, int] = {name: i for i, name in enumerate(vocabulary or ())}
    rows: list[tuple[str, Any, Labels]] = []
    left_out: list[str] = []
    for split, part in parts.items():
        with problems.part():
            where = f"{source}, split {split}"
            image = _image_column(where, part.features, options.image)
            reader = _label_reader(where, part, list(parts.values()), image, options, problems)
            for name in reader.names:
                labels.setdefault(name, len(labels))
            images = _images(where, part, image, problems)
            for row, (picture, found) in enumerate(zip(images, reader.read(), strict=True)):
                if found is None:
                    left_out.append(f"row {row} of {split}")
                elif picture is not None:
                    rows.append((usual[split], picture, found))
    if left_out:
        warnings.warn(
            f"{source}: {len(left_out):,} rows have no labels and are left out, the first: "
            f"{left_out[0]}",
            stacklevel=3,
        )
    if not rows:
        raise EmptySourceError(f"{source} must hold at least one image with labels, got none")
    others = {name for _, _, found in rows for names in found for name in names} - set(labels)
    if others and vocabulary is not None:
        raise DataError(
            f"{source}: labels must be among the {len(vocabulary)} of the vocabulary, got "
            f"{short(min(others))}"
        )
    for name in sorted(others):
        labels[name] = len(labels)
    has_unknown = any(unknown for _, _, (_, unknown) in rows)
    records = Records()
    for split, picture, (present, unknown) in rows:
        records.add(
            split, [labels[name] for name in present], picture,
            unknown=[labels[name] for name in unknown] if has_unknown else None,
        )  # fmt: skip
    return records.dataset(source, labels)


@dataclass(frozen=True)
class RowImage:
    """An image in a row of a dataset of `datasets`."""

    column: Any  # a dataset with this column alone, not decoded
    row: int

    @property
    def identity(self) -> str:
        """The fingerprint of the dataset, with the row."""
        return f"{self.column._fingerprint} {self.row}\n"

    def read(self) -> bytes:
        """Return the bytes of the image file."""
        (value,) = self.column[self.row].values()
        data = value["bytes"] if isinstance(value, dict) else value
        return data if data is not None else Path(value["path"]).read_bytes()


def _loaded(source: str, location: str, options: HuggingFaceOptions) -> dict[str, Any]:
    """Return the dataset of each split."""
    with from_extra("datasets", "reading hf: sources", extra="datasets"):
        import datasets
    path = Path(location).expanduser()
    if not path.exists() and location.startswith((".", "/", "~")):
        raise DataError(f"{source} must be a folder, a file or a name on the hub, found none")
    if path.is_file() and path.suffix.lower() not in _FORMATS:
        raise DataError(f"{source} must end in {', '.join(_FORMATS)}, got {path.name}")
    try:
        if path.is_file():
            loaded = datasets.load_dataset(_FORMATS[path.suffix.lower()], data_files=str(path))
        elif any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        else:
            name = str(path) if path.is_dir() else location
            loaded = datasets.load_dataset(name, options.config)
    except Exception as error:  # the library raises nearly anything
        raise DataError(
            f"{source} must be a dataset that can be loaded, got {reason(error)}"
        ) from (error)
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _kind(feature: Any) -> str:
    """Return what a column holds: image, class, text, number, struct, or a list of one of these."""
    if isinstance(feature, list) and len(feature) == 1:
        return f"list of {_kind(feature[0])}"
    if isinstance(feature, dict):
        return "image" if {"bytes", "path"} <= set(feature) else "struct"
    name = type(feature).__name__
    if name in ("Sequence", "List", "LargeList"):
        inner = feature.feature
        # Of structs the library makes a struct of lists, or leaves a list of structs.
        return f"list of {_kind(inner)}"
    if name == "Value":
        kinds = {"string": "text", "large_string": "text", "binary": "image", "bool": "number"}
        number = feature.dtype.startswith(("int", "uint", "float"))
        return kinds.get(feature.dtype, "number" if number else str(feature.dtype))
    return {"Image": "image", "ClassLabel": "class"}.get(name, name)


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    """Return the columns with those inside structs, as `objects.category`."""
    columns: dict[str, Any] = {}
    for name, feature in features.items():
        inner = feature
        listed = type(feature).__name__ in ("Sequence", "List", "LargeList")
        if listed and isinstance(feature.feature, dict):
            inner = {key: [value] for key, value in feature.feature.items()}
        if isinstance(inner, dict) and _kind(inner) == "struct":
            columns |= _flat(inner, f"{prefix}{name}.")
        else:
            columns[prefix + name] = feature
    return columns


def _image_column(where: str, features: Any, asked: str | None) -> str:
    images: list[str] = [name for name, f in features.items() if _kind(f) == "image"]
    if asked is not None and asked in images:
        return asked
    if asked is None and len(images) == 1:
        return images[0]
    expected = "one column of images" if asked is None else f"a column of images {short(asked)}"
    raise DataError(
        f"{where} must have {expected} (image=COLUMN names one), found "
        f"{', '.join(images) or 'none'} among {', '.join(features)}"
    )


def _images(where: str, part: Any, image: str, problems: Problems) -> Iterator[Any]:
    """Return each row's file, or what reads its image later; None where it has none."""
    import datasets

    column = part.select_columns([image])
    if type(part.features[image]).__name__ == "Image":
        column = column.cast_column(image, datasets.Image(decode=False))
    is_struct = _kind(part.features[image]) == "image" and (
        type(part.features[image]).__name__ != "Value"
    )
    row = 0
    for batch in column.with_format("arrow").iter(batch_size=_BATCH):
        values = batch.column(image).combine_chunks()
        stored = values.field("bytes") if is_struct else values
        paths = values.field("path").to_pylist() if is_struct else [None] * len(values)
        for has_bytes, path in zip(stored.is_valid().to_pylist(), paths, strict=True):
            if has_bytes:
                yield RowImage(column, row)
            elif path is not None and Path(path).is_file():
                yield Path(path)
            else:
                problems.add(
                    f"{where}, row {row} must have an image, got {short(path)}",
                    f"{where}: a row must have an image",
                )
                yield None
            row += 1


class _LabelReader(NamedTuple):
    """How labels are read.

    Attributes:
        names: the labels that are known before, in their order.
        read: returns the labels of each row, None of one without.
    """

    names: Sequence[str]
    read: Callable[[], Iterator[Labels | None]]


def _label_reader(
    where: str,
    part: Any,
    parts: Sequence[Any],
    image: str,
    options: HuggingFaceOptions,
    problems: Problems,
) -> _LabelReader:
    """Find the labels of a part by the type of columns or by option.

    What the columns hold is decided over all parts.
    """
    columns = {name: f for name, f in _flat(part.features).items() if name != image}
    asked = options.labels
    if asked is not None and "," in asked and asked not in columns:
        own = [name.strip() for name in asked.split(",")]
        for name in own:
            _require_column(where, name, columns)
        return _LabelReader(own, lambda: _own_columns(where, part, own))
    if asked is not None:
        _require_column(where, asked, columns)
        column: str | None = asked
    else:
        column = _column_of_labels(where, columns)
    if column is None:
        own = [name for name in columns if not name.startswith("__")]
        if own and all(_kind(columns[name]) == "number" for name in own):
            return _LabelReader(own, lambda: _own_columns(where, part, own))
        raise DataError(
            f"{where} must have a column of labels (labels=COLUMN names one), found "
            f"{', '.join(columns) or 'none'} beside the images"
        )
    feature = columns[column]
    kind = _kind(feature).removeprefix("list of ")
    if kind == "class":
        while type(feature).__name__ != "ClassLabel":
            feature = feature[0] if isinstance(feature, list) else feature.feature
        names = list(feature.names)
        return _LabelReader(names, lambda: _numbered(where, part, column, names))
    if kind == "text":
        cells = (value for value in _values_of(parts, column) if isinstance(value, str))
        delimiter = shown_delimiter(cells)
        if delimiter is not None:
            problems.note(f"{where}: labels are separated by {short(delimiter)}")
        return _LabelReader((), lambda: _named(where, part, column, delimiter))
    if kind == "number":
        count, is_multi_hot = _numbers(parts, column)
        vocabulary = read_vocabulary(options.vocabulary, problems)
        numbered = vocabulary or [str(number) for number in range(count)]
        if not is_multi_hot:
            return _LabelReader(numbered, lambda: _numbered(where, part, column, numbered))
        if len(numbered) != count:
            raise DataError(
                f"{where}: {column} must have 0 or 1 for each of the {len(numbered)} labels of the "
                f"vocabulary, got {count}"
            )
        problems.note(f"{where}: {column} has 0 or 1 for each of {count} labels")
        return _LabelReader(numbered, lambda: _multi_hot(part, column, numbered))
    raise DataError(
        f"{where}: column {column} must hold class labels, names or numbers, got {kind}"
    )


def _require_column(where: str, name: str, columns: Iterable[str]) -> None:
    if name not in columns:
        raise DataError(
            f"{where} must have a column {short(name)} as labels=COLUMN asks for, found "
            f"{', '.join(columns) or 'none'} beside the images"
        )


def _column_of_labels(where: str, columns: dict[str, Any]) -> str | None:
    """Return the column of labels by its type, or by its name among several of that type."""
    for kind in ("list of class", "list of text", "list of number", "class", "text", "number"):
        found = [name for name, feature in columns.items() if _kind(feature) == kind]
        named = [name for name in found if name.rpartition(".")[2] in LABEL_COLUMNS]
        if kind in ("text", "number", "list of number"):  # others may hold anything
            found = named
        if len(found) == 1 or len(named) == 1:
            return named[0] if named else found[0]
        if found:
            raise DataError(
                f"{where} must have one column of labels (labels=COLUMN names one), found "
                f"{', '.join(found)}"
            )
    return None


def _values(part: Any, column: str) -> Iterator[Any]:
    """Return the value of each row in a column, or inside a struct."""
    top, *inner = [column] if column in part.features else column.split(".")
    for batch in part.select_columns([top]).iter(batch_size=_BATCH):
        for value in batch[top]:
            for key in inner:
                value = _at(value, key)
            yield value


def _at(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_at(one, key) for one in value]
    return None if value is None else value.get(key)


def _numbered(where: str, part: Any, column: str, names: Sequence[str]) -> Iterator[Labels | None]:
    """Read labels by their numbers; -1 alone is a row without labels."""
    for row, value in enumerate(_values(part, column)):
        if value is None or value == -1:
            yield None
            continue
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if not isinstance(number, (int, float)) or number not in range(len(names)):
                raise DataError(
                    f"{where}, row {row}: {column} must be numbers of labels in "
                    f"0..{len(names) - 1}, got {short(number)}"
                )
        yield {names[int(number)] for number in numbers}, ()


def _named(where: str, part: Any, column: str, delimiter: str | None) -> Iterator[Labels | None]:
    for row, value in enumerate(_values(part, column)):
        if value is None:
            yield None
            continue
        if isinstance(value, str):
            try:
                labels = cell_labels(value, delimiter) or ()
            except CellError as error:
                raise DataError(f"{where}, row {row}: {error}") from error
        elif all(isinstance(label, str) and label.strip() for label in value):
            labels = tuple(label.strip() for label in value)
        else:
            raise DataError(
                f"{where}, row {row}: {column} must be a list of non-empty names, got "
                f"{short(value)}"
            )
        yield set(labels), ()


def _multi_hot(part: Any, column: str, names: Sequence[str]) -> Iterator[Labels | None]:
    for value in _values(part, column):
        if value is None:
            yield None
            continue
        yield (
            {name for name, mark in zip(names, value, strict=True) if mark == 1},
            {name for name, mark in zip(names, value, strict=True) if mark in (None, -1)},
        )


def _own_columns(where: str, part: Any, own: Sequence[str]) -> Iterator[Labels | None]:
    """Read columns that are one label each."""
    for row, values in enumerate(zip(*(_values(part, name) for name in own), strict=True)):
        for name, value in zip(own, values, strict=True):
            if value not in (None, -1, 0, 1):
                raise DataError(
                    f"{where}, row {row}: column {name} must be 0 or 1, true or false, or none or "
                    f"-1 where it is unknown, got {short(value)}"
                )
        pairs = list(zip(own, values, strict=True))
        yield (
            {name for name, value in pairs if value == 1},
            {name for name, value in pairs if value in (None, -1)},
        )


def _values_of(parts: Sequence[Any], column: str) -> Iterator[Any]:
    """Return the values of a column in all parts that have it."""
    for part in parts:
        if column in _flat(part.features):
            yield from _values(part, column)


def _numbers(parts: Sequence[Any], column: str) -> tuple[int, bool]:
    """Return how many labels a column of numbers has, and whether it has 0 or 1 for each of them.

    It has where its lists are all of one length and hold nothing else; otherwise they hold the
    numbers of labels.
    """
    lengths: set[int] = set()
    largest, has_marks = -1, True
    for value in _values_of(parts, column):
        if value is None:
            continue
        numbers = value if isinstance(value, list) else [value]
        lengths.add(len(numbers))
        has_marks &= isinstance(value, list) and all(n in (None, -1, 0, 1) for n in numbers)
        largest = max([largest, *(int(n) for n in numbers if n is not None)])
    if has_marks and len(lengths) == 1 and max(lengths) > 1:
        return max(lengths), True
    return largest + 1, False
