"""Datasets annotated in COCO's instances format, read through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import Boxes, DataError, Dataset, _is_text

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # most are, which spares the closer look

Categories = list[tuple[int, str]]


def load_coco(
    root_or_json: str | Path,
    images: str | Path | None = None,
    *,
    on_bad_image: OnBadImage = "error",
) -> Dataset:
    """Read a COCO data set.

    A folder is read in the standard layout: every `annotations/instances_<suffix>.json` is a
    split, named by its suffix without a trailing year, with its images in `<suffix>/` or
    `images/<suffix>/`. A single file becomes one split, `all`. Labels are categories in the order
    of the file; several annotations of one category on one image are one label, crowds included.

    Args:
        root_or_json: the folder, or one annotation file.
        images: the image folder of a single file; for a folder, where the `<suffix>/` folders are
            if not in it.
        on_bad_image: `error` stops at an image file that does not exist, `skip` leaves such images
            out with one warning per annotation file.

    Returns:
        The dataset with image paths, and with boxes where the annotations have any.

    Raises:
        DataError: files are missing, or their content is not as COCO's format says.
        ModuleNotFoundError: pycocotools is not installed.
    """
    path = Path(root_or_json)
    if path.is_dir():
        sources = _standard_layout(path, None if images is None else Path(images))
    elif not path.is_file():
        raise DataError(f"{path} must be a COCO folder or annotation file, found no such file")
    elif images is None:
        raise DataError(f"{path} needs its image folder as well (images=FOLDER), got none")
    elif not Path(images).is_dir():
        raise DataError(f"{path} must come with an existing image folder, got {images}")
    else:
        sources = [_Source("all", path, Path(images))]

    parts: list[tuple[_Source, _Part]] = []
    for source in sources:
        part = _read_part(source, on_bad_image)
        if parts:
            _require_same_categories(parts[0][0].file, parts[0][1].categories, source.file,
                                     part.categories)  # fmt: skip
        parts.append((source, part))
    if not any(part.paths for _, part in parts):
        raise DataError(f"{path} must hold at least one image, got empty images in every file")
    return _join(f"coco:{path}", parts)


@dataclass(frozen=True)
class _Source:
    split: str
    file: Path
    image_folder: Path


@dataclass(frozen=True)
class _Part:
    categories: Categories
    paths: list[Path]
    labels: list[list[int]]  # category ids of each image
    box_labels: list[list[int]]
    boxes: list[list[list[float]]]


def _standard_layout(root: Path, images: Path | None) -> list[_Source]:
    files = sorted((root / "annotations").glob("instances_*.json"))
    if not files:
        raise DataError(f"{root} must hold annotations/instances_*.json, found none")
    sources: list[_Source] = []
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
        if not existing:
            raise DataError(
                f"{file} must have its images in {' or '.join(map(str, folders))}, "
                "found no such folder"
            )
        sources.append(_Source(split, file, existing[0]))
    return sources


def _read_part(source: _Source, on_bad_image: OnBadImage) -> _Part:
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading COCO annotations needs pycocotools: pip install "cnnrnn[vision]"'
        ) from error
    data = _read_json(source.file)
    _check(source.file, data)
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()

    image_ids = coco.getImgIds()
    names = [str(image["file_name"]) for image in coco.loadImgs(image_ids)]
    part = _Part(
        categories=[(cat["id"], cat["name"]) for cat in coco.loadCats(coco.getCatIds())],
        paths=[], labels=[], box_labels=[], boxes=[],
    )  # fmt: skip
    for image_id, name in _existing(source, image_ids, names, on_bad_image):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        boxed = [annotation for annotation in annotations if "bbox" in annotation]
        part.paths.append(source.image_folder / name)
        part.labels.append([annotation["category_id"] for annotation in annotations])
        part.box_labels.append([annotation["category_id"] for annotation in boxed])
        part.boxes.append([annotation["bbox"] for annotation in boxed])
    return part


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} must be valid JSON, got {error.msg} at line {error.lineno}, "
            f"column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, an endless number, deep nesting
        raise DataError(f"{file} must be valid JSON, got {error}") from error


def _check(file: Path, data: Any) -> None:
    """Check what pycocotools takes on trust."""
    if not isinstance(data, dict):
        raise DataError(f"{file} must hold a JSON object, got {_kind(data)}")
    for key in ("images", "annotations", "categories"):
        if key not in data:
            raise DataError(f"{file}: {key} is missing, found {', '.join(data) or 'nothing'}")
        if not isinstance(data[key], list):
            raise DataError(f"{file}: {key} must be a list, got {_kind(data[key])}")
    if not data["categories"]:
        raise DataError(f"{file}: categories must not be empty")
    image_ids = _check_ids(file, "images", data["images"])
    for image in data["images"]:
        _check_file_name(file, image)
    category_ids = _check_ids(file, "categories", data["categories"])
    category_names: dict[str, int] = {}
    for category in data["categories"]:
        name, category_id = category.get("name"), category["id"]
        if not isinstance(name, str) or not name.strip() or not _is_text(name):
            raise DataError(
                f"{file}: category {category_id} must have a non-empty name, got {_short(name)}"
            )
        if name in category_names:
            raise DataError(
                f"{file}: category names must be unique, got {_short(name)} for categories "
                f"{category_names[name]} and {category_id}"
            )
        category_names[name] = category_id
    _check_ids(file, "annotations", data["annotations"])
    for annotation in data["annotations"]:
        _check_reference(file, annotation, "image_id", image_ids, "images")
        _check_reference(file, annotation, "category_id", category_ids, "categories")
        if "bbox" in annotation and not _is_box(annotation["bbox"]):
            raise DataError(
                f"{file}: annotation {annotation['id']} must have a bbox of four finite numbers, "
                f"got {_short(annotation['bbox'])}"
            )


def _check_ids(file: Path, key: str, records: list[Any]) -> set[int]:
    """Check that every record is an object with its own integer id."""
    ids: set[int] = set()
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{file}: {key}[{position}] must be an object, got {_kind(record)}")
        if "id" not in record:
            raise DataError(f"{file}: {key}[{position}] must have an id, found none")
        record_id = record["id"]
        if type(record_id) is not int:
            raise DataError(
                f"{file}: {key}[{position}] must have an integer id, got {_short(record_id)}"
            )
        if record_id in ids:
            raise DataError(
                f"{file}: ids of {key} must be unique, got {_short(record_id)} again at "
                f"{key}[{position}]"
            )
        ids.add(record_id)
    return ids


def _check_reference(
    file: Path, annotation: dict[str, Any], key: str, ids: set[int], of: str
) -> None:
    value = annotation.get(key)
    if type(value) is int and value in ids:
        return
    found = _short(value) if key in annotation else "none"
    raise DataError(
        f"{file}: annotation {annotation['id']} must have an {key} among the {len(ids)} ids of "
        f"{of}, got {found}"
    )


def _check_file_name(file: Path, image: dict[str, Any]) -> None:
    name = image.get("file_name")
    problem = _file_name_problem(name)
    if problem:
        found = _short(name) if "file_name" in image else "none"
        raise DataError(
            f"{file}: image {image['id']} must have a file_name inside the image folder, "
            f"got {found} ({problem})"
        )


def _file_name_problem(name: object) -> str | None:
    """Say why a name is no path inside a folder, or None where it is one."""
    if not isinstance(name, str):
        return "not a string"
    if _PLAIN_NAME.fullmatch(name):
        return None
    if not PurePosixPath(name).name:
        return "empty" if not PurePosixPath(name).is_absolute() else "absolute"
    if "\0" in name or not _is_text(name):
        return "not a file name"
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:", name):
        return "a URL"
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root:
        return "absolute"
    if ".." in windows.parts:  # splits at both kinds of slash
        return "leaves the folder"
    return None


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        # False for NaN and infinity as well
        and all(type(number) in (int, float) and abs(number) <= _FLOAT32_MAX for number in value)
    )


def _existing(
    source: _Source, image_ids: list[int], names: list[str], on_bad_image: OnBadImage
) -> list[tuple[int, str]]:
    """Return the images whose files exist; each folder is listed once."""
    root = os.path.realpath(source.image_folder)
    listings: dict[str, dict[str, str]] = {}
    kept: list[tuple[int, str]] = []
    missing: list[tuple[int, str]] = []
    for image_id, name in zip(image_ids, names, strict=True):
        folder, base = os.path.split(os.path.normpath(name))
        if folder not in listings:
            listings[folder] = _list_files(source, root, folder, image_id, name)
        target = listings[folder].get(base)
        if target is None:
            missing.append((image_id, name))
            continue
        if target and not _is_inside(target, root):
            raise DataError(
                f"{source.file}: image {image_id} must be a file inside {source.image_folder}, "
                f"got {name} which links to {target}"
            )
        kept.append((image_id, name))
    if missing:
        image_id, name = missing[0]
        message = (
            f"{source.file}: image {image_id} must exist as {source.image_folder / name}, found "
            f"no such file ({len(missing)} of {len(names)} images are missing)"
        )
        if on_bad_image == "error" or not kept:
            raise DataError(message)
        warnings.warn(message + "; they are left out", stacklevel=4)
    return kept


def _list_files(
    source: _Source, root: str, folder: str, image_id: int, name: str
) -> dict[str, str]:
    """Return the regular files of a folder: name to where a link leads, "" for no link."""
    path = os.path.join(root, folder)
    real = os.path.realpath(path)
    if not _is_inside(real, root):
        raise DataError(
            f"{source.file}: image {image_id} must be a file inside {source.image_folder}, got "
            f"{name} which leads to {real}"
        )
    try:
        with os.scandir(path) as entries:
            return {
                entry.name: os.path.realpath(entry.path) if entry.is_symlink() else ""
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(
            f"{source.file}: the folder of image {image_id}, {path}, cannot be listed: "
            f"{error.strerror}"
        ) from error


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _require_same_categories(
    first_file: Path, first: Categories, file: Path, categories: Categories
) -> None:
    if sorted(first) == sorted(categories):
        return
    expected, found = dict(first), dict(categories)
    for category_id in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(category_id), found.get(category_id)
        if ours != theirs:
            raise DataError(
                f"{file} must have the categories of {first_file}, but category {category_id} is "
                f"{_short(theirs) if theirs else 'missing'}, expected "
                f"{_short(ours) if ours else 'none'}"
            )


def _join(source: str, parts: list[tuple[_Source, _Part]]) -> Dataset:
    categories = parts[0][1].categories
    index = {category_id: position for position, (category_id, _) in enumerate(categories)}
    paths: list[Path] = []
    labels: list[list[int]] = []
    box_labels: list[list[int]] = []
    boxes: list[list[float]] = []
    splits = {}
    for origin, part in parts:
        splits[origin.split] = np.arange(len(paths), len(paths) + len(part.paths))
        paths += part.paths
        labels += [sorted({index[category_id] for category_id in ids}) for ids in part.labels]
        box_labels += [[index[category_id] for category_id in ids] for ids in part.box_labels]
        boxes += [box for record in part.boxes for box in record]
    return Dataset(
        source=source,
        label_names=tuple(name for _, name in categories),
        label_indptr=_pointers(labels),
        label_indices=_flat(labels),
        splits=splits,
        image_paths=tuple(paths),
        features=None,
        boxes=Boxes(
            _pointers(box_labels), _flat(box_labels), np.asarray(boxes, dtype=np.float32)
        ) if boxes else None,
    )  # fmt: skip


def _pointers(rows: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.cumsum([0, *map(len, rows)], dtype=np.int64)


def _flat(rows: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray([value for row in rows for value in row], dtype=np.int32)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _short(value: object) -> str:
    """Return a value for a message, cut to one readable line."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    text = ascii(value) if isinstance(value, str) and not _is_text(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
