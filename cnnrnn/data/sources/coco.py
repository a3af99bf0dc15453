"""Datasets annotated in COCO's instances format, read through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import (
    DataError,
    Dataset,
    Records,
    expected_name,
    usual_split_names,
)
from cnnrnn.data.files import EmptySourceError, Problems, is_dropping, read_bytes, reason, short
from cnnrnn.data.folders import Folder, folded, given_folder
from cnnrnn.data.images import IMAGE_SUFFIXES
from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.words import listed

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ROBOFLOW = "_annotations.coco.json"
_LABEL_STUDIO = "result.json"

_LOOKED_FOR = 20
_LONGEST_NAME = 4096
_WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9]\d{0,17}))(?:\.0*)?", re.ASCII)

Id = int | str
Objects = list[dict[str, Any]]  # of JSON


def load_coco(
    root_or_json: str | Path,
    images: str | Path | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    problems: Problems | None = None,
) -> Dataset:
    """Read a COCO data set.

    A folder is read in one of these layouts: COCO's own, every
    `annotations/instances_<suffix>.json` a split, named by its suffix without a trailing year,
    with its images in `<suffix>/` or `images/<suffix>/`, or as CVAT writes them all in `images/`;
    Roboflow's, `<split>/_annotations.coco.json` beside the images; Label Studio's, `result.json`
    and `images/`. A split of COCO's layout without an image folder is left out with a warning. A
    single file becomes one split, `all`. Labels are the names of the categories in the order of
    the files; several annotations of one category on one image are one label, crowds included.

    Args:
        root_or_json: the folder, or one annotation file.
        images: the image folder of a single file; for a folder, where the `<suffix>/` folders are
            if not in it.
        on_bad_image: `skip` warns once per annotation file.
        follow_links: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths, and with boxes where the annotations have any.
    """
    problems = problems or Problems()
    path = Path(root_or_json)
    if path.is_dir():
        sources = _layout(path, None if images is None else Path(images))
    elif not path.is_file():
        raise DataError(f"{path} must be a COCO folder or annotation file, found no such file")
    elif images is None:
        raise DataError(f"{path} needs its image folder as well (images=FOLDER), got none")
    else:
        sources = [_Source("all", path, (given_folder(path, images),))]

    records = Records()
    labels: dict[str, int] = {}  # name to number, over all files
    for source in sources:
        with problems.part():
            _read_split(source, records, labels, on_bad_image, follow_links, problems)
    if not len(records):
        raise EmptySourceError(
            f"{path} must hold at least one image, got empty images in every file"
        )
    return records.dataset(f"coco:{path}", labels)


def _read_split(
    source: _Source,
    records: Records,
    labels: dict[str, int],
    on_bad_image: OnBadImage,
    follow_links: bool,
    problems: Problems,
) -> None:
    """Add the images of an annotation file to the records, and its new labels to the labels."""
    data = _with_lists(source.file, _read_json(source.file))
    place = _image_folder(source.folders, data["images"])
    folder = Folder(place, follow_links)
    coco = _index(_checked(source.file, data, folder, problems))
    ids, names = list(coco.imgs), [image["file_name"] for image in coco.imgs.values()]
    kept = folder.existing(
        source.file, lambda i: f"image {short(ids[i])}", names, on_bad_image, problems
    )
    label_of = {
        key: labels.setdefault(category["name"], len(labels)) for key, category in coco.cats.items()
    }
    records.splits[source.split] = []
    for i, name in kept.items():
        objects = [(label_of[a["category_id"]], a.get("bbox")) for a in coco.imgToAnns[ids[i]]]
        records.add(
            source.split,
            [label for label, _ in objects],
            place / name,
            boxes=[(label, box) for label, box in objects if box is not None],
        )


@dataclass(frozen=True)
class _Source:
    split: str
    file: Path
    folders: tuple[Path, ...]  # that may hold its images, the likeliest first


def _layout(root: Path, images: Path | None) -> list[_Source]:
    """Find the annotation file of each split, and where its images may be."""
    standard = sorted((root / "annotations").glob("instances_*.json"))
    if standard:
        return _standard_layout(root, standard, images)
    roboflow = sorted(
        file for file in root.glob(f"*/{_ROBOFLOW}") if not is_dropping(file.parent.name)
    )
    if roboflow:
        splits = usual_split_names(root, (file.parent.name for file in roboflow))
        sources = []
        for file in roboflow:
            own = file.parent
            folders = (own, own / "images") if images is None else (images / own.name, images)
            sources.append(_Source(splits[own.name], file, folders))
        return sources
    for file in (root / _LABEL_STUDIO, root / _ROBOFLOW):
        if file.is_file():
            beside = (root / "images", root) if images is None else (images,)
            return [_Source("all", file, tuple(f for f in beside if f.is_dir()) or (root,))]
    raise DataError(
        f"{root} must hold annotations/instances_*.json, <split>/{_ROBOFLOW} or {_LABEL_STUDIO}, "
        "found none"
    )


def _standard_layout(root: Path, files: list[Path], images: Path | None) -> list[_Source]:
    found: dict[str, Path] = {}
    for file in files:
        suffix = file.stem.removeprefix("instances_")
        split = re.sub(r"(?<=[^\d])\d{4}$", "", suffix).rstrip("_-")
        if not split or suffix in (".", ".."):
            raise DataError(f"{file} must have a split's name after instances_, got {suffix!r}")
        if split in found:
            raise DataError(f"{file} and {found[split]} must differ in split, got {split!r} twice")
        found[split] = file
    splits = usual_split_names(root / "annotations", found)
    bases = [root, root / "images"] if images is None else [images]
    sources: list[_Source] = []
    missing: list[tuple[str, str]] = []
    for split, file in found.items():
        suffix = file.stem.removeprefix("instances_")
        folders = [place for base in bases if (place := _subfolder(base, suffix)) is not None]
        # One folder for all splits, or names that begin with the split's folder.
        folders += [base for base in reversed(bases) if folders or _holds_images(base)]
        if folders:
            sources.append(_Source(splits[split], file, tuple(folders)))
        else:
            places = " or ".join(str(base / suffix) for base in bases)
            missing.append(
                (split, f"{file} must have its images in {places}, found no such folder")
            )
    if not sources:
        raise DataError(missing[0][1])
    for split, message in missing:
        warnings.warn(f"{message}; split {split} is left out", stacklevel=4)
    return sources


def _subfolder(base: Path, name: str) -> Path | None:
    """Return the folder of that name, upper and lower case alike, if there is one."""
    if (base / name).is_dir():
        return base / name
    if not base.is_dir():
        return None
    same = [entry for entry in base.iterdir() if folded(entry.name) == folded(name)]
    return same[0] if len(same) == 1 and same[0].is_dir() else None


def _holds_images(folder: Path) -> bool:
    """Tell whether there is an image in a folder itself."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(
            os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            and not is_dropping(entry.name)
            for entry in entries
        )


def _image_folder(folders: tuple[Path, ...], images: list[Any]) -> Path:
    """Return the first folder that holds one of the first images; the first where none does."""
    if len(folders) == 1:
        return folders[0]
    names = [image.get("file_name") for image in images[:_LOOKED_FOR] if isinstance(image, dict)]
    for place in folders:
        folder = Folder(place)
        for given in names:
            name, problem = folder.inside(given)
            if problem is None and len(name) < _LONGEST_NAME and (place / name).is_file():
                return place
    return folders[0]


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


def _with_lists(file: Path, data: Any) -> dict[str, list[Any]]:
    """Return a file's images, annotations and categories."""
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
    return data


def _index(data: dict[str, Objects]) -> Any:
    """Return pycocotools' index of checked data."""
    with from_extra("pycocotools", "reading COCO annotations"):
        from pycocotools.coco import COCO
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _checked(
    file: Path, data: dict[str, list[Any]], folder: Folder, problems: Problems
) -> dict[str, Objects]:
    """Check what pycocotools takes on trust; return what is right, with ids that compare."""
    with_ids = _with_ids(file, "images", data["images"], problems)
    image_ids = {image["id"] for image in with_ids}
    images = _with_file_names(file, with_ids, folder, problems)
    categories, category_ids, unusable = _categories(file, data["categories"], problems)
    annotations: Objects = []
    broken = _Counted()
    lost: Counter[Id] = Counter()
    kept = {image["id"] for image in images}
    usable = {category["id"] for category in categories}
    for position, annotation in enumerate(data["annotations"]):
        if not isinstance(annotation, dict):
            problems.add(f"{file}: annotations[{position}] must be an object, got "
                         f"{_kind(annotation)}")  # fmt: skip
            continue
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if type(image) is not int or image not in image_ids:
            image = _reference(file, position, annotation, "image_id", image_ids, problems)
        if type(category) is not int or category not in category_ids:
            category = _reference(file, position, annotation, "category_id", category_ids, problems)
        if image is None or category is None or image not in kept:
            continue  # what refers to a record that was left out is left out too
        if category not in usable:
            lost[category] += category in unusable
            continue
        own = annotation.get("id")
        annotation |= {"id": position, "image_id": image, "category_id": category}
        if "bbox" in annotation and not _is_box(annotation["bbox"]):
            broken.add(f"{_name(position, own)} has {short(annotation.pop('bbox'))}")
        annotations.append(annotation)
    for category, expected in unusable.items():
        warnings.warn(
            f"{file}: category {short(category)} must have {expected}; its {lost[category]:,} "
            "annotations are left out",
            stacklevel=5,
        )
    if broken.count:
        warnings.warn(
            f"{file}: the bbox of {broken.count:,} of {len(annotations):,} annotations is not four "
            f"finite numbers, width and height at least 0, the first: {broken.first}; their labels "
            "count, without a box",
            stacklevel=5,
        )
    return {"images": images, "annotations": annotations, "categories": categories}


class _Counted:
    """How often something occurred, and its first occurrence."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, text: str) -> None:
        self.first = self.first or text
        self.count += 1


def _id(value: object) -> Id | None:
    """Return an id that compares, the number 11 for 11, 11.0 and "11"; None where it is none."""
    if type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value == int(value) else str(value)
    if isinstance(value, str) and value.strip():
        text = value.strip()
        number = _WHOLE_NUMBER.fullmatch(text)
        return int(number[1]) if number else text
    return None


def _with_ids(file: Path, key: str, records: list[Any], problems: Problems) -> Objects:
    """Return the records that are objects with an id of their own, which they have as `_id`."""
    seen: set[Id] = set()
    kept: Objects = []
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            problems.add(f"{file}: {key}[{position}] must be an object, got {_kind(record)}")
        elif "id" not in record:
            problems.add(f"{file}: {key}[{position}] must have an id, found none")
        elif (own := _id(record["id"])) is None:
            problems.add(
                f"{file}: {key}[{position}] must have a number or text as id, got "
                f"{short(record['id'])}"
            )
        elif own in seen:
            problems.add(
                f"{file}: ids of {key} must be unique, got {short(record['id'])} again at "
                f"{key}[{position}]"
            )
        else:
            seen.add(own)
            kept.append({**record, "id": own})
    return kept


def _categories(
    file: Path, records: list[Any], problems: Problems
) -> tuple[Objects, set[Id], dict[Id, str]]:
    """Return the categories with a name, all ids, and what the others lack.

    Names are without white space around them. Categories of one name are one label.
    """
    names: dict[str, Id] = {}
    joined: list[str] = []
    kept: Objects = []
    ids: set[Id] = set()
    unusable: dict[Id, str] = {}
    for category in _with_ids(file, "categories", _without_repeats(records), problems):
        own: Id = category["id"]
        name = _category_name(category)
        ids.add(own)
        if (expected := expected_name(name)) is not None:
            unusable[own] = f"{expected}, got {short(name)}"
            continue
        if names.setdefault(name, own) != own:
            joined.append(f"{short(names[name])} and {short(own)} are {short(name)}")
        kept.append({"id": own, "name": name})
    if joined:
        problems.note(f"{file}: categories of one name are joined: {listed(joined, 5)}")
    if unusable and not kept:
        first = next(iter(unusable))
        raise DataError(f"{file}: category {short(first)} must have {unusable[first]}, and so must "
                        "every other")  # fmt: skip
    return kept, ids, unusable


def _category_name(category: dict[str, Any]) -> Any:
    """Return a category's name as text, or what it has in its place."""
    name = category.get("name")
    if type(name) in (int, float):
        return str(name)
    return name.strip() if isinstance(name, str) else name


def _without_repeats(categories: list[Any]) -> list[Any]:
    """Leave out categories that have the id and the name of an earlier one."""
    seen: set[tuple[Id, str]] = set()
    kept = []
    for category in categories:
        own = _id(category.get("id")) if isinstance(category, dict) else None
        name = None if own is None else _category_name(category)
        if own is not None and isinstance(name, str):
            if (own, name) in seen:
                continue
            seen.add((own, name))
        kept.append(category)
    return kept


def _name(position: int, own: object) -> str:
    """Name an annotation by its own id, or by its position without one."""
    return f"annotations[{position}]" if own is None else f"annotation {short(own)}"


def _reference(
    file: Path,
    position: int,
    annotation: dict[str, Any],
    key: str,
    ids: set[Id],
    problems: Problems,
) -> Id | None:
    """Return the id of the record that an annotation refers to, None where there is none."""
    of = "images" if key == "image_id" else "categories"
    value = _id(annotation.get(key))
    if value is not None and value in ids:
        return value
    found = short(annotation[key]) if key in annotation else "none"
    problems.add(
        f"{file}: {_name(position, annotation.get('id'))} must have an {key} among the "
        f"{len(ids)} ids of {of}, got {found}",
        f"{file}: an annotation must have an {key} among the ids of {of}",
    )
    return None


def _with_file_names(file: Path, images: Objects, folder: Folder, problems: Problems) -> Objects:
    """Return the images that have a file of their own inside the image folder."""
    seen: dict[str, Id] = {}
    kept: Objects = []
    dropped = _Counted()
    for image in images:
        image_id = image["id"]
        name, problem = folder.inside(image.get("file_name"))
        if problem is not None:
            found = short(image["file_name"]) if "file_name" in image else "none"
            problems.add(
                f"{file}: image {short(image_id)} must have a file_name inside the image folder, "
                f"got {found} ({problem})",
                f"{file}: an image must have a file_name inside the image folder ({problem})",
            )
        elif is_dropping(name):
            dropped.add(f"image {short(image_id)} is {short(name)}")
        elif (same := os.path.normpath(name)) in seen:
            problems.add(
                f"{file}: file names must be unique, got {short(name)} for images "
                f"{short(seen[same])} and {short(image_id)}"
            )
        else:
            seen[same] = image_id
            kept.append({"id": image_id, "file_name": name})
    if dropped.count:
        warnings.warn(
            f"{file}: {dropped.count:,} images are hidden files or those of a system or program, "
            f"the first: {dropped.first}; they are left out",
            stacklevel=5,
        )
    return kept


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        # False for NaN and infinity as well
        and all(type(number) in (int, float) and abs(number) <= _FLOAT32_MAX for number in value)
        and min(value[2:]) >= 0
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
