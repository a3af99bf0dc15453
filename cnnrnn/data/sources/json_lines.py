"""Lines of JSON with an image and its labels, such as `cnnrnn predict --format jsonl` writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from cnnrnn.config import JsonLinesOptions, OnBadImage
from cnnrnn.data.dataset import DataError, Dataset
from cnnrnn.data.files import Problems, read_text, read_vocabulary, reason, short
from cnnrnn.data.folders import Folder, given_folder
from cnnrnn.data.rows import DroppedRows, Row, dataset_of_rows, label_problem

IMAGE_KEYS = ("image", "path", "file_name", "source")
LABEL_KEYS = ("labels", "tags")


def load_json_lines(
    path: str | Path,
    images: str | Path | None = None,
    options: JsonLinesOptions | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    problems: Problems | None = None,
) -> Dataset:
    """Read `{"image": "a.jpg", "labels": ["cat", "dog"]}` from each line.

    The image may also be under `path`, `file_name` or `source`, the labels under `tags`; `split`
    names a split, without it there is one, `all`. Lines of one image are joined. A line with an
    `error`, or without labels, is left out with a warning; an empty list is an image without any.

    Args:
        path: the file, in UTF-8, or in UTF-16 with a byte order mark.
        images: the folder that image paths start from; None takes the option, or the file's own.
        options: image folder and vocabulary.
        on_bad_image: as for `load_dataset`.
        follow_links: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths. Its labels are the vocabulary, or those that occur, sorted.
    """
    problems = problems or Problems()
    options = options or JsonLinesOptions()
    path = Path(path)
    names = read_vocabulary(options.vocabulary, problems)
    vocabulary = None if names is None else {name: i for i, name in enumerate(names)}
    if images is None and options.images is not None:
        images = Path(options.images).expanduser()
    folder = Folder(path.parent if images is None else given_folder(path, images), follow_links)
    rows: list[Row] = []
    dropped = DroppedRows()
    left_out: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        with problems.part():
            record = _record(place, line)
            if record.get("error") is not None:
                left_out.append(f"line {number} has an error")
                continue
            key = next((key for key in LABEL_KEYS if record.get(key) is not None), None)
            if key is None:
                left_out.append(f"line {number} has no {' or '.join(LABEL_KEYS)}")
                continue
            image = _image(place, record, folder)
            if dropped.takes(image, place):
                continue
            labels = _labels(place, key, record[key])
            if (problem := label_problem(labels, vocabulary)) is not None:
                raise DataError(f"{place}: {problem}")
            rows.append(Row(path, number, image, labels, _split(place, record)))
    if left_out:
        warnings.warn(
            f"{path}: {len(left_out):,} lines have an error or no labels, the first: "
            f"{left_out[0]}; they are left out",
            stacklevel=3,
        )
    if (text := dropped.warning()) is not None:
        warnings.warn(text, stacklevel=3)
    return dataset_of_rows(
        f"jsonl:{path}", path, folder, [rows], vocabulary, (), on_bad_image, problems
    )


def _record(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} must be a JSON object, got {reason(error)}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} must be a JSON object, got {short(record)}")
    return record


def _image(place: str, record: dict[str, Any], folder: Folder) -> str:
    key = next((key for key in IMAGE_KEYS if record.get(key) is not None), None)
    if key is None:
        raise DataError(
            f"{place} must name an image as {' or '.join(IMAGE_KEYS)}, found "
            f"{', '.join(map(short, record)) or 'nothing'}"
        )
    image, problem = folder.inside(record[key])
    if problem is not None:
        raise DataError(
            f"{place}: an image must be a file inside the image folder, got {short(record[key])} "
            f"({problem})"
        )
    return image


def _labels(place: str, key: str, values: object) -> tuple[str, ...]:
    """Return the labels of a list; numbers are their digits."""
    if isinstance(values, list) and all(type(value) in (str, int) for value in values):
        labels = tuple(str(value).strip() for value in values)
        if all(labels):
            return labels
    raise DataError(f"{place}: {key} must be a list of non-empty names, got {short(values)}")


def _split(place: str, record: dict[str, Any]) -> str:
    split = record.get("split")
    if split is None:
        return "all"
    if not isinstance(split, str) or not split.strip():
        raise DataError(f"{place}: split must be a non-empty name, got {short(split)}")
    return split.strip()
