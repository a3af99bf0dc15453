"""Datasets annotated in COCO's instances format, read through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import DataError, Dataset, Records, expected_name
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    existing_images,
    given_folder,
    name_problem,
    read_bytes,
    reason,
    short,
)
from cnnrnn.machine.extras import from_extra

_FLOAT32_MAX = float(np.finfo(np.float32).max)

Categories = dict[int, str]
Objects = list[dict[str, Any]]  # of JSON


def load_coco(
    root_or_json: str | Path,
    images: str | Path | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    problems: Problems | None = None,
) -> Dataset:
    """Read a COCO data set.

    A folder is read in the standard layout: every `annotations/instances_<suffix>.json` is a
    split, named by its suffix without a trailing year, with its images in `<suffix>/` or
    `images/<suffix>/`; a split without such a folder is left out with a warning. A single file
    becomes one split, `all`. Labels are categories in the order of the file; several annotations
    of one category on one image are one label, crowds included.

    Args:
        root_or_json: the folder, or one annotation file.
        images: the image folder of a single file; for a folder, where the `<suffix>/` folders are
            if not in it.
        on_bad_image: `skip` warns once per annotation file.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths, and with boxes where the annotations have any.
    """
    problems = problems or Problems()
    path = Path(root_or_json)
    if path.is_dir():
        sources = _standard_layout(path, None if images is None else Path(images))
    elif not path.is_file():
        raise DataError(f"{path} must be a COCO folder or annotation file, found no such file")
    elif images is None:
        raise DataError(f"{path} needs its image folder as well (images=FOLDER), got none")
    else:
        sources = [_Source("all", path, given_folder(path, images))]

    records = Records()
    first: tuple[Path, Categories] | None = None
    for source in sources:
        with problems.part():
            coco = _read_annotations(source.file, problems)
            ids, names = list(coco.imgs), [image["file_name"] for image in coco.imgs.values()]
            kept = _existing(source, ids, names, on_bad_image, problems)
            categories = {key: category["name"] for key, category in coco.cats.items()}
            first = first or (source.file, categories)
            _require_same_categories(*first, source.file, categories)
            index = {category: label for label, category in enumerate(first[1])}
            records.splits[source.split] = []
            for i in kept:
                objects = [(index[a["category_id"]], a.get("bbox")) for a in coco.imgToAnns[ids[i]]]
                records.add(
                    source.split,
                    [label for label, _ in objects],
                    source.image_folder / names[i],
                    boxes=[(label, box) for label, box in objects if box is not None],
                )
    if first is None or not len(records):
        raise EmptySourceError(
            f"{path} must hold at least one image, got empty images in every file"
        )
    return records.dataset(f"coco:{path}", first[1].values())


@dataclass(frozen=True)
class _Source:
    split: str
    file: Path
    image_folder: Path


def _standard_layout(root: Path, images: Path | None) -> list[_Source]:
    files = sorted((root / "annotations").glob("instances_*.json"))
    if not files:
        raise DataError(f"{root} must hold annotations/instances_*.json, found none")
    sources: list[_Source] = []
    missing: list[tuple[str, str]] = []
    for file in files:
        suffix = file.stem.removeprefix("instances_")
        split = re.sub(r"(?<=[^\d])\d{4}$", "", suffix).rstrip("_-")
        if not split or suffix in (".", ".."):
            raise DataError(f"{file} must have a split's name after instances_, got {suffix!r}")
        for other in sources:
            if other.split == split:
                raise DataError(
                    f"{file} and {other.file} must differ in split, got {split!r} twice"
                )
        bases = [root, root / "images"] if images is None else [images]
        folders = [base / suffix for base in bases]
        existing = [folder for folder in folders if folder.is_dir()]
        if existing:
            sources.append(_Source(split, file, existing[0]))
        else:
            places = " or ".join(map(str, folders))
            missing.append(
                (split, f"{file} must have its images in {places}, found no such folder")
            )
    if not sources:
        raise DataError(missing[0][1])
    for split, message in missing:
        warnings.warn(f"{message}; split {split} is left out", stacklevel=3)
    return sources


def _existing(
    source: _Source, ids: list[int], names: list[str], on_bad_image: OnBadImage, problems: Problems
) -> list[int]:
    return existing_images(
        source.file, source.image_folder, lambda i: f"image {short(ids[i])}", names, on_bad_image,
        problems,
    )  # fmt: skip


def _read_annotations(file: Path, problems: Problems) -> Any:
    """Return pycocotools' index of what is right in a file."""
    with from_extra("pycocotools", "reading COCO annotations"):
        from pycocotools.coco import COCO
    coco = COCO()
    coco.dataset = _checked(file, _read_json(file), problems)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class _KeyTwiceError(ValueError):
    pass


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_decoded(read_bytes(file)), object_pairs_hook=_without_segmentation)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} must be valid JSON, got {error.msg} at line {error.lineno}, "
            f"column {error.colno}"
        ) from error
    except _KeyTwiceError as error:
        raise DataError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, an endless number, deep nesting
        raise DataError(f"{file} must be valid JSON, got {reason(error)}") from error


def _decoded(data: bytes) -> str:
    """As its own function, so that bytes and text are not both in memory while parsing."""
    return data.decode(json.detect_encoding(data))


def _without_segmentation(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Drop the outlines as soon as they are read: they are most of the memory and not needed."""
    record = dict(pairs)
    if len(record) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _KeyTwiceError(
            f"keys of an object must be unique, got {short(twice)} twice in the object with id "
            f"{short(record.get('id'))}"
        )
    record.pop("segmentation", None)
    return record


def _checked(file: Path, data: Any, problems: Problems) -> dict[str, Objects]:
    """Check what pycocotools takes on trust; return what is right."""
    if not isinstance(data, dict):
        raise DataError(f"{file} must hold a JSON object, got {_kind(data)}")
    for key in ("images", "annotations", "categories"):
        if key not in data:
            found = ", ".join(map(short, data)) or "nothing"
            raise DataError(f"{file}: {key} is missing, found {found}")
        if not isinstance(data[key], list):
            raise DataError(f"{file}: {key} must be a list, got {_kind(data[key])}")
    if not data["categories"]:
        raise DataError(f"{file}: categories must not be empty")
    images, image_ids = _with_ids(file, "images", data["images"], problems)
    categories, category_ids = _with_ids(file, "categories", data["categories"], problems)
    annotations, _ = _with_ids(file, "annotations", data["annotations"], problems)
    images = _with_file_names(file, images, problems)
    categories = _with_names(file, categories, problems)
    kept_images = {image["id"] for image in images}
    kept_categories = {category["id"] for category in categories}
    annotations = [
        annotation
        for annotation in annotations
        if _refers(file, annotation, "image_id", image_ids, "images", problems)
        and _refers(file, annotation, "category_id", category_ids, "categories", problems)
        and _has_box_or_none(file, annotation, problems)
        # What refers to a record that was left out is left out too.
        and annotation["image_id"] in kept_images
        and annotation["category_id"] in kept_categories
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _with_ids(
    file: Path, key: str, records: list[Any], problems: Problems
) -> tuple[Objects, set[int]]:
    """Return the records that are objects with an integer id of their own, and the ids."""
    ids: set[int] = set()
    kept: Objects = []
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            problems.add(f"{file}: {key}[{position}] must be an object, got {_kind(record)}")
        elif "id" not in record:
            problems.add(f"{file}: {key}[{position}] must have an id, found none")
        elif type(record["id"]) is not int:
            problems.add(
                f"{file}: {key}[{position}] must have an integer id, got {short(record['id'])}"
            )
        elif record["id"] in ids:
            problems.add(
                f"{file}: ids of {key} must be unique, got {short(record['id'])} again at "
                f"{key}[{position}]"
            )
        else:
            ids.add(record["id"])
            kept.append(record)
    return kept, ids


def _with_names(file: Path, categories: Objects, problems: Problems) -> Objects:
    """Return the categories that have a name of their own."""
    names: dict[str, int] = {}
    kept: Objects = []
    for category in categories:
        name: Any = category.get("name")
        category_id = category["id"]
        if (expected := expected_name(name)) is not None:
            problems.add(f"{file}: category {short(category_id)} must have {expected}, got "
                         f"{short(name)}")  # fmt: skip
        elif name in names:
            problems.add(
                f"{file}: category names must be unique, got {short(name)} for categories "
                f"{short(names[name])} and {short(category_id)}"
            )
        else:
            names[name] = category_id
            kept.append(category)
    return kept


def _refers(
    file: Path, annotation: dict[str, Any], key: str, ids: set[int], of: str, problems: Problems
) -> bool:
    value = annotation.get(key)
    if type(value) is int and value in ids:
        return True
    found = short(value) if key in annotation else "none"
    problems.add(
        f"{file}: annotation {short(annotation['id'])} must have an {key} among the {len(ids)} "
        f"ids of {of}, got {found}"
    )
    return False


def _with_file_names(file: Path, images: Objects, problems: Problems) -> Objects:
    """Return the images that have a file of their own inside the image folder."""
    seen: dict[str, int] = {}
    kept: Objects = []
    for image in images:
        name, image_id = image.get("file_name"), image["id"]
        problem = name_problem(name)
        if problem is not None:
            found = short(name) if "file_name" in image else "none"
            problems.add(
                f"{file}: image {short(image_id)} must have a file_name inside the image folder, "
                f"got {found} ({problem})"
            )
        elif (same := os.path.normpath(str(name))) in seen:
            problems.add(
                f"{file}: file names must be unique, got {short(name)} for images "
                f"{short(seen[same])} and {short(image_id)}"
            )
        else:
            seen[same] = image_id
            kept.append(image)
    return kept


def _has_box_or_none(file: Path, annotation: dict[str, Any], problems: Problems) -> bool:
    if "bbox" not in annotation or _is_box(annotation["bbox"]):
        return True
    problems.add(
        f"{file}: annotation {short(annotation['id'])} must have a bbox of four finite numbers, "
        f"width and height at least 0, got {short(annotation['bbox'])}"
    )
    return False


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        # False for NaN and infinity as well
        and all(type(number) in (int, float) and abs(number) <= _FLOAT32_MAX for number in value)
        and min(value[2:]) >= 0
    )


def _require_same_categories(
    first_file: Path, expected: Categories, file: Path, found: Categories
) -> None:
    for category_id in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(category_id), found.get(category_id)
        if ours != theirs:
            raise DataError(
                f"{file} must have the categories of {first_file}, but category {category_id} is "
                f"{short(theirs) if theirs else 'missing'}, expected "
                f"{short(ours) if ours else 'none'}"
            )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
