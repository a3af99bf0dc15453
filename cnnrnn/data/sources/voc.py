"""Datasets in PASCAL VOC's layout (VOCdevkit 2007 to 2012), read through defusedxml."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import DataError, Dataset, Records
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    existing_images,
    find_files,
    read_bytes,
    read_lines,
    reason,
    short,
)
from cnnrnn.machine.extras import from_extra

VOC_LABELS = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
MAX_XML_BYTES = 1 << 20
"""Largest annotation file that is parsed; VOC's own have a few thousand bytes."""

_INDEX = {name: position for position, name in enumerate(VOC_LABELS)}
_IMAGE_ID = re.compile(r"\w[\w-]*", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,9}(\.\d*)?", re.ASCII)


def load_voc(
    root: str | Path,
    *,
    on_bad_image: OnBadImage = "error",
    problems: Problems | None = None,
) -> Dataset:
    """Read a VOC data set.

    A split is a file of image ids, `ImageSets/Main/<split>.txt`; splits may overlap, as
    `trainval` does. An image's labels are the names of the objects in `Annotations/<id>.xml`. As
    VOC prescribes, an object marked difficult does not count: a label of which an image has only
    difficult objects is neither present nor absent there, and is in the dataset's `unknown`
    labels. Where `ImageSets/Main/<label>_<split>.txt` are present (1, -1, and 0 for only
    difficult), they must say the same.

    Args:
        root: the folder of one year, such as `VOCdevkit/VOC2007`, or a folder that holds just one.
        on_bad_image: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths, and the boxes of the objects that are not difficult; a box
        covers its outermost pixels, and the image's first pixel is at 0.
    """
    problems = problems or Problems()
    root = _year_folder(Path(root))
    splits = _read_splits(root / "ImageSets" / "Main", problems)
    splits = _annotated(root, splits, problems)
    objects: dict[str, list[_Object]] = {}
    for image_id in dict.fromkeys(image_id for split in splits for image_id in split.lines):
        before = len(problems.messages)
        with problems.part():
            read = _read_objects(root / "Annotations" / f"{image_id}.xml", image_id, problems)
            if len(problems.messages) == before:
                objects[image_id] = read
    for split in splits:
        _check_label_files(split, objects, problems)

    image_ids = list(objects)
    names = [f"{image_id}.jpg" for image_id in image_ids]
    folder = root / "JPEGImages"
    kept = existing_images(
        root / "ImageSets" / "Main", folder, lambda i: f"image {image_ids[i]}", names,
        on_bad_image, problems,
    )  # fmt: skip
    if not kept:
        raise EmptySourceError(f"{root} must hold at least one image, got none in any split")
    records = Records()
    position: dict[str, int] = {}
    for image_id, name in ((image_ids[i], names[i]) for i in kept):
        position[image_id] = len(records)
        certain = [o for o in objects[image_id] if not o.difficult]
        labels = {o.label for o in certain}
        unknown = {o.label for o in objects[image_id]} - labels
        boxes = [(o.label, o.xywh) for o in certain]
        records.add(None, labels, folder / name, unknown=unknown, boxes=boxes)
    for split in splits:
        records.splits[split.name] = [position[i] for i in split.lines if i in position]
    return records.dataset(f"voc:{root}", VOC_LABELS)


class _Object(NamedTuple):
    label: int
    difficult: bool
    xywh: tuple[float, float, float, float]


@dataclass(frozen=True)
class _Split:
    name: str
    file: Path
    lines: Mapping[str, int]  # image id to line number, of the images that are right so far
    listed: frozenset[str]  # every image id


def _year_folder(root: Path) -> Path:
    if not root.is_dir():
        raise DataError(f"{root} must be a VOC folder, found no such folder")
    if (root / "ImageSets" / "Main").is_dir():
        return root
    years = sorted(
        path for path in (*root.glob("VOC*"), *root.glob("VOCdevkit/VOC*"))
        if (path / "ImageSets" / "Main").is_dir()
    )  # fmt: skip
    if not years:
        raise DataError(
            f"{root} must hold ImageSets/Main, or a VOC<year> folder that does, found neither"
        )
    if len(years) > 1:
        raise DataError(
            f"{root} must hold one year's folder, found {', '.join(path.name for path in years)}: "
            f"name one, such as voc:{years[0]}"
        )
    return years[0]


def _read_splits(main: Path, problems: Problems) -> list[_Split]:
    order = ("train", "val", "trainval", "test")
    files = [file for file in main.glob("*.txt") if file.stem in order or _is_split(file)]
    files.sort(key=lambda file: (order.index(file.stem) if file.stem in order else 4, file.stem))
    if not files:
        raise DataError(f"{main} must hold a file of image ids per split, such as train.txt")
    splits = []
    for file in files:
        with problems.part():
            lines: dict[str, int] = {}
            for number, line in enumerate(read_lines(file), 1):
                image_id = line.strip()
                if not _IMAGE_ID.fullmatch(image_id):
                    problems.add(
                        f"{file}, line {number}: an image id must be letters, digits, _ and -, "
                        f"got {short(line)}"
                    )
                elif image_id in lines:
                    problems.add(
                        f"{file}, line {number}: image ids must be unique, got {image_id} as in "
                        f"line {lines[image_id]}"
                    )
                else:
                    lines[image_id] = number
            splits.append(_Split(file.stem, file, lines, frozenset(lines)))
    return splits


def _is_split(file: Path) -> bool:
    """Tell train_small.txt, a split, from train_small.txt, the label train in a split small."""
    label, _, split = file.stem.partition("_")
    if label not in _INDEX:
        return True
    if file.with_name(f"{split}.txt").exists():
        return False
    return len(read_bytes(file).partition(b"\n")[0].split()) == 1


def _annotated(root: Path, splits: list[_Split], problems: Problems) -> list[_Split]:
    """Return the splits without images that lack an annotation, as those of a test split may."""
    result = []
    for split in splits:
        image_ids = list(split.lines)
        places = [f"line {line} (image {image_id})" for image_id, line in split.lines.items()]
        kept, missing = find_files(
            split.file, root / "Annotations", places.__getitem__,
            [f"{image_id}.xml" for image_id in image_ids], problems,
        )  # fmt: skip
        if image_ids and len(missing) == len(image_ids):
            if len(splits) > 1:
                warnings.warn(
                    f"{split.file}: none of its {len(missing)} images has an annotation; split "
                    f"{split.name} is left out",
                    stacklevel=3,
                )
                continue
            raise DataError(f"{root / 'Annotations'} must hold the annotations of {split.file}, "
                            "found none")  # fmt: skip
        if missing and split.name == "test":
            warnings.warn(
                f"{split.file}: {len(missing)} of its {len(image_ids)} images have no annotation, "
                f"the first is {places[missing[0]]}; they are left out",
                stacklevel=3,
            )
            missing = []
        for i in missing:
            problems.add(
                f"{split.file}: {places[i]} must have an annotation in "
                f"{root / 'Annotations' / image_ids[i]}.xml, found no such file"
            )
        lines = {image_ids[i]: split.lines[image_ids[i]] for i in kept}
        result.append(_Split(split.name, split.file, lines, split.listed))
    return result


def _read_objects(file: Path, image_id: str, problems: Problems) -> list[_Object]:
    root = _parse(file)
    if root.tag != "annotation":
        raise DataError(f"{file} must hold an <annotation>, got {short(root.tag)}")
    name = _text(root, "filename")
    if name is not None and name != f"{image_id}.jpg":
        raise DataError(f"{file}: filename must be {image_id}.jpg, got {short(name)}")
    objects = []
    for number, element in enumerate(root.findall("object"), 1):
        with problems.part():
            objects.append(_object(f"{file}, object {number}", element))
    return objects


def _parse(file: Path) -> Any:
    with from_extra("defusedxml", "reading VOC annotations"):
        from defusedxml import DefusedXmlException, ElementTree
    data = read_bytes(file)
    if len(data) > MAX_XML_BYTES:
        raise DataError(
            f"{file} must be an annotation of at most {MAX_XML_BYTES} bytes, got {len(data)}"
        )
    try:
        return ElementTree.fromstring(data, forbid_dtd=True)
    except ElementTree.ParseError as error:
        raise DataError(f"{file} must be valid XML, got {reason(error)}") from error
    except DefusedXmlException as error:
        kind = type(error).__name__.removesuffix("Forbidden")
        raise DataError(f"{file} must be plain XML, got a forbidden {kind}") from error
    except (ValueError, LookupError) as error:  # encodings that are unknown or not for XML
        raise DataError(f"{file} must be valid XML, got {reason(error)}") from error


def _object(place: str, element: Any) -> _Object:
    name = _text(element, "name")
    if name not in _INDEX:
        raise DataError(
            f"{place} must have one of VOC's {len(VOC_LABELS)} names, got {_shown(name)}"
        )
    difficult = _text(element, "difficult")
    if difficult not in (None, "", "0", "1"):  # a missing one means 0
        raise DataError(f"{place}: difficult must be 0 or 1, got {_shown(difficult)}")
    box = element.find("bndbox")
    if box is None:
        raise DataError(f"{place} must have a bndbox, found none")
    edges = [_number(f"{place}: {side}", _text(box, side))
             for side in ("xmin", "ymin", "xmax", "ymax")]  # fmt: skip
    left, top, right, bottom = edges
    if left > right or top > bottom:
        raise DataError(
            f"{place}: bndbox must have xmin <= xmax and ymin <= ymax, got "
            f"{', '.join(f'{edge:g}' for edge in edges)}"
        )
    return _Object(
        _INDEX[name], difficult == "1", (left - 1, top - 1, right - left + 1, bottom - top + 1)
    )


def _text(element: Any, tag: str) -> str | None:
    """Return the text of the only child of that name, None where there is none."""
    children = element.findall(tag)
    if len(children) > 1:
        return f"{len(children)} of them"
    return (children[0].text or "").strip() if children else None


def _shown(text: str | None) -> str:
    return "none" if text is None else short(text)


def _number(what: str, text: str | None) -> float:
    if text is None or not _NUMBER.fullmatch(text):
        raise DataError(f"{what} must be a number below 1e9, got {_shown(text)}")
    return float(text)


def _check_label_files(
    split: _Split, objects: Mapping[str, list[_Object]], problems: Problems
) -> None:
    """Compare the annotations with `<label>_<split>.txt`, where these exist."""
    for label, name in enumerate(VOC_LABELS):
        file = split.file.with_name(f"{name}_{split.name}.txt")
        if not file.exists():
            continue
        with problems.part():
            _check_label_file(file, label, split, objects, problems)


def _check_label_file(
    file: Path,
    label: int,
    split: _Split,
    objects: Mapping[str, list[_Object]],
    problems: Problems,
) -> None:
    seen: set[str] = set()
    for number, line in enumerate(read_lines(file), 1):
        image_id, value = (*line.split(), "", "")[:2]
        if len(line.split()) != 2 or value not in ("1", "-1", "0"):
            problems.add(
                f"{file}, line {number}: a line must be an image id and 1, -1 or 0, got "
                f"{short(line)}"
            )
        elif image_id in seen:
            problems.add(f"{file}, line {number}: image ids must be unique, got {image_id} again")
        elif image_id in split.lines and image_id in objects:
            marks = [o.difficult for o in objects[image_id] if o.label == label]
            expected = "-1" if not marks else "0" if all(marks) else "1"
            if value != expected:
                problems.add(
                    f"{file}, line {number}: image {image_id} must be {expected} as its "
                    f"annotation says, got {value}"
                )
        elif image_id not in split.listed:
            problems.add(
                f"{file}, line {number}: image ids must be those of {split.file.name}, got "
                f"{short(image_id)}"
            )
        seen.add(image_id)
    missing = [image_id for image_id in split.lines if image_id not in seen]
    if missing:
        problems.add(
            f"{file} must have a line for every image of {split.file.name}, found none for "
            f"{missing[0]} ({len(missing)} missing)"
        )
