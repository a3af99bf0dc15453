"""Datasets in PASCAL VOC's format, of VOC or one's own, read through defusedxml."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cnnrnn.config import OnBadImage, VocOptions
from cnnrnn.data.dataset import (
    DataError,
    Dataset,
    Records,
    expected_name,
    usual_split_name,
    usual_split_names,
)
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    is_dropping,
    read_bytes,
    read_lines,
    read_names,
    reason,
    short,
)
from cnnrnn.data.folders import Folder, files_below, folded, given_folder
from cnnrnn.data.images import IMAGE_SUFFIXES
from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.words import listed

VOC_LABELS = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
MAX_XML_BYTES = 1 << 20
"""Largest annotation file that is parsed; VOC's own have a few thousand bytes."""

_MARK = re.compile(rb"\S.*\s(-1|0|1)\s*", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,9}(\.\d*)?", re.ASCII)
_DIFFICULT = {"": False, "0": False, "false": False, "unspecified": False, "1": True, "true": True}


def load_voc(
    root: str | Path,
    images: str | Path | None = None,
    options: VocOptions | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    problems: Problems | None = None,
) -> Dataset:
    """Read a data set in VOC's format.

    A split is a file of image ids, `ImageSets/Main/<split>.txt`; splits may overlap, as
    `trainval` does. Without such files every annotation in `root` and below is read, in one split
    `all`, or in those that the folders at the top are named by, such as `train` and `valid`.

    An image's labels are the names of the objects in its annotation. As VOC prescribes, an object
    marked difficult does not count: a label of which an image has only difficult objects is
    neither present nor absent there, and is in the dataset's `unknown` labels. Where
    `ImageSets/Main/<label>_<split>.txt` are present (1, -1, and 0 for only difficult), they must
    say the same. An image has the name of its annotation with any suffix of images, or else what
    the annotation has as `<filename>`.

    Args:
        root: the folder of one year, such as `VOCdevkit/VOC2007`, or a folder that holds just one,
            or annotations beside or apart from their images.
        images: the image folder; None takes `JPEGImages`, or looks in `root` and below.
        options: labels; without them these are VOC's 20, or the names that occur, sorted, where one
            of them is none of the 20.
        on_bad_image: as for `load_dataset`.
        follow_links: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths, and the boxes of the objects that are not difficult; a box
        covers its outermost pixels, and the image's first pixel is at 0.
    """
    problems = problems or Problems()
    options = options or VocOptions()
    given = None if options.labels is None else Path(options.labels).expanduser()
    vocabulary = None if given is None else read_names(given, "label", problems)
    root = _data_folder(Path(root))
    lists = _lists(root)
    if lists is None:
        found = _annotations_below(root, follow_links)
        place, file_of, splits = root, {name[:-4]: root / name for name in found}, []
        members = _splits_of_folders(root, file_of)
    else:
        annotations = Folder(_annotation_folder(root), follow_links)
        splits = _annotated(_read_splits(lists, annotations, problems), annotations, problems)
        members = {split.name: list(split.lines) for split in splits}
        file_of = {i: file for split in splits for i, file in split.annotations.items()}
        place = lists
    notes: dict[str, _Annotation] = {}
    for image_id, file in file_of.items():
        before = len(problems.messages)
        with problems.part():
            annotation = _read_annotation(file, vocabulary, problems)
            if len(problems.messages) == before:
                notes[image_id] = annotation
    _warn_of_boxes(root, notes)
    label_names = vocabulary or _vocabulary(root, notes, problems)
    for split in splits:
        _check_label_files(split, label_names, notes, problems)

    folder = Folder(_image_folder(root, images, lists is not None), follow_links)
    pictures = None if lists is not None else _Pictures(folder.path, follow_links)
    look = _in_folder if pictures is None else pictures.look
    names = [look(folder, image_id, notes[image_id].file_name) for image_id in notes]
    ids = list(notes)
    kept = folder.existing(place, lambda i: f"image {ids[i]}", names, on_bad_image, problems)
    if not kept:
        raise EmptySourceError(f"{root} must hold at least one image, got none in any split")
    if pictures is not None:
        pictures.warn_of_others(set(names))
    records = Records()
    index = {name: position for position, name in enumerate(label_names)}
    position: dict[str, int] = {}
    taken: dict[str, str] = {}
    for i, name in kept.items():
        other = taken.setdefault(name, ids[i])
        if other != ids[i]:
            problems.add(
                f"{file_of[ids[i]]} must have an image of its own, got {short(name)} as "
                f"{file_of[other].name} has"
            )
            continue
        position[ids[i]] = len(records)
        certain = [o for o in notes[ids[i]].objects if not o.difficult]
        labels = {index[o.name] for o in certain}
        unknown = {index[o.name] for o in notes[ids[i]].objects} - labels
        boxes = [(index[o.name], o.xywh) for o in certain if o.xywh is not None]
        records.add(None, labels, folder.path / name, unknown=unknown, boxes=boxes)
    for split_name, split_ids in members.items():
        records.splits[split_name] = [position[i] for i in split_ids if i in position]
    return records.dataset(f"voc:{root}", label_names)


class _Object(NamedTuple):
    name: str
    difficult: bool
    xywh: tuple[float, float, float, float] | None


class _Annotation(NamedTuple):
    file_name: str | None
    objects: list[_Object]
    broken_box: str | None  # the first
    broken_boxes: int


@dataclass(frozen=True)
class _Split:
    name: str
    file: Path
    lines: Mapping[str, int]  # image id to line number, of the images that are right so far
    listed: frozenset[str]  # every image id
    annotations: Mapping[str, Path] = field(default_factory=dict)  # of the images in `lines`


def _lists(root: Path) -> Path | None:
    """Return the folder with a file of image ids per split, None where there is none."""
    for folder in (root / "ImageSets" / "Main", root / "ImageSets"):
        if folder.is_dir() and (folder.name == "Main" or any(folder.glob("*.txt"))):
            return folder
    return None


def _data_folder(root: Path) -> Path:
    if not root.is_dir():
        raise DataError(f"{root} must be a VOC folder, found no such folder")
    if _lists(root) is not None:
        return root
    years = sorted(
        path for path in (*root.glob("VOC*"), *root.glob("VOCdevkit/VOC*"))
        if _lists(path) is not None
    )  # fmt: skip
    if len(years) > 1:
        raise DataError(
            f"{root} must hold one year's folder, found {', '.join(path.name for path in years)}: "
            f"name one, such as voc:{years[0]}"
        )
    return years[0] if years else root


def _annotations_below(root: Path, follow_links: bool) -> list[str]:
    """Return the XML files in a folder and below; those in `Annotations` alone if there are any."""
    files = files_below(root, (".xml",), follow_links)
    found = [name for name in files if name.lower().endswith(".xml")]
    if not found:
        raise DataError(
            f"{root} must hold ImageSets/Main, or a VOC<year> folder that does, or annotations as "
            "XML files, found none"
        )
    own = [name for name in found if name.lower().startswith("annotations/")]
    return own or found


def _splits_of_folders(root: Path, image_ids: Iterable[str]) -> dict[str, list[str]]:
    """Return the annotations of each split: the folders at the top if all are named like splits."""
    tops: dict[str, list[str]] = {}
    for image_id in image_ids:
        tops.setdefault(image_id.partition("/")[0] if "/" in image_id else "", []).append(image_id)
    if not all(usual_split_name(top) in ("train", "val", "test") for top in tops):
        return {"all": [image_id for members in tops.values() for image_id in members]}
    splits = usual_split_names(root, tops)
    return {splits[top]: members for top, members in tops.items()}


def _annotation_folder(root: Path) -> Path:
    for name in ("Annotations", "annotations"):
        if (root / name).is_dir():
            return root / name
    beside = root / "JPEGImages"
    return beside if any(beside.glob("*.xml")) else root / "Annotations"


def _image_folder(root: Path, images: str | Path | None, has_lists: bool) -> Path:
    if images is not None:
        return given_folder(root, images)
    if has_lists:
        for name in ("JPEGImages", "images", "Images"):
            if (root / name).is_dir():
                return root / name
        return root / "JPEGImages"
    return root


def _in_folder(folder: Folder, image_id: str, hint: str | None) -> str:
    """Return the image of an id in the image folder; ID.jpg where there is none."""
    suffix = os.path.splitext(hint or "")[1].lower()
    suffixes = (suffix, *IMAGE_SUFFIXES) if suffix in IMAGE_SUFFIXES else IMAGE_SUFFIXES
    for candidate in suffixes:
        if folder.has(image_id + candidate):
            return image_id + candidate
    if hint is not None:
        name, problem = folder.inside(hint)
        for candidate in (name, os.path.basename(name)):
            if problem is None and folder.has(candidate):
                return candidate
    return f"{image_id}.jpg"


class _Pictures:
    """The images in a folder and below, to be found by the annotations that lie anywhere in it."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        """List them."""
        self._root = root
        self._of_stem: dict[str, list[str]] = {}
        self._of_name: dict[str, list[str]] = {}
        for name in files_below(root, IMAGE_SUFFIXES, follow_links):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                self._of_stem.setdefault(folded(os.path.basename(stem)), []).append(name)
                self._of_name.setdefault(folded(os.path.basename(name)), []).append(name)

    def look(self, folder: Folder, image_id: str, hint: str | None) -> str:
        """Return the image of an annotation: beside it, in a folder like its own, or anywhere."""
        parent, stem = os.path.split(image_id)
        hinted = os.path.basename((hint or "").replace("\\", "/"))
        for found in (self._of_stem.get(folded(stem), []), self._of_name.get(folded(hinted), [])):
            likeliest = sorted(found, key=lambda name: (
                os.path.dirname(name) != parent,
                os.path.dirname(name).partition("/")[2] != parent.partition("/")[2],
                os.path.basename(name) != hinted,
                not name.lower().endswith(".jpg"),
            ))  # fmt: skip
            if likeliest:
                return likeliest[0]
        return f"{image_id}.jpg"

    def warn_of_others(self, annotated: set[str]) -> None:
        """Say how many images have no annotation."""
        others = [n for names in self._of_name.values() for n in names if n not in annotated]
        if others:
            warnings.warn(
                f"{self._root}: {len(others):,} images have no annotation, the first: "
                f"{short(min(others))}; they are left out",
                stacklevel=4,
            )


def _warn_of_boxes(root: Path, notes: Mapping[str, _Annotation]) -> None:
    broken = sum(note.broken_boxes for note in notes.values())
    if broken:
        first = next(note.broken_box for note in notes.values() if note.broken_box)
        warnings.warn(
            f"{root}: the bndbox of {broken:,} objects is not right, the first: {first}; their "
            "labels count, without a box",
            stacklevel=4,
        )


def _vocabulary(root: Path, notes: Mapping[str, _Annotation], problems: Problems) -> Sequence[str]:
    """Return VOC's labels, or those that occur where one of them is none of these."""
    names = sorted({o.name for note in notes.values() for o in note.objects})
    others = [name for name in names if name not in VOC_LABELS]
    if not others:
        return VOC_LABELS
    problems.note(
        f"{root}: the labels are the names that occur, {len(names)}, as these are not among VOC's "
        f"20: {listed(others, 5)}"
    )
    return names


def _read_splits(main: Path, annotations: Folder, problems: Problems) -> list[_Split]:
    order = ("train", "val", "trainval", "test")
    texts = [file for file in main.glob("*.txt") if not is_dropping(file.name)]
    stems = {file.stem for file in texts}
    files = [file for file in texts if file.stem in order or _is_split(file, stems)]
    usual = usual_split_names(main, sorted(file.stem for file in files))

    def rank(file: Path) -> tuple[int, str]:
        name = usual[file.stem]
        return order.index(name) if name in order else len(order), name

    if not files:
        raise DataError(f"{main} must hold a file of image ids per split, such as train.txt")
    splits = []
    for file in sorted(files, key=rank):
        with problems.part():
            lines = _read_ids(file, annotations, problems)
            splits.append(_Split(usual[file.stem], file, lines, frozenset(lines)))
    return splits


def _read_ids(file: Path, annotations: Folder, problems: Problems) -> dict[str, int]:
    """Return the image ids of a file with their line numbers; an id may have an image's suffix."""
    lines: dict[str, int] = {}
    dropped = 0
    for number, line in enumerate(read_lines(file), 1):
        image_id, problem = annotations.inside(line.strip())
        stem, suffix = os.path.splitext(image_id)
        is_file = suffix.lower() in (*IMAGE_SUFFIXES, ".xml")
        if is_file and not annotations.has(f"{image_id}.xml"):
            image_id = stem
        if problem is not None:
            problems.add(
                f"{file}, line {number}: an image id must be a file name without suffix, got "
                f"{short(line)} ({problem})"
            )
        elif is_dropping(image_id):
            dropped += 1
        elif image_id in lines:
            problems.add(
                f"{file}, line {number}: image ids must be unique, got {image_id} as in "
                f"line {lines[image_id]}"
            )
        else:
            lines[image_id] = number
    if dropped:
        warnings.warn(
            f"{file}: {dropped:,} ids are hidden files or those of a system or program; they are "
            "left out",
            stacklevel=5,
        )
    return lines


def _is_split(file: Path, stems: set[str]) -> bool:
    """Tell train_small.txt, a split, from train_small.txt, the label train in a split small."""
    parts = file.stem.split("_")
    for cut in range(1, len(parts)):
        label, split = "_".join(parts[:cut]), "_".join(parts[cut:])
        if split in stems and (label in VOC_LABELS or _holds_marks(file)):
            return False
    if parts[0] not in VOC_LABELS or len(parts) == 1:
        return True
    return len(read_bytes(file).partition(b"\n")[0].split()) == 1


def _holds_marks(file: Path) -> bool:
    """Tell whether each line ends with 1, -1 or 0, as in the file of a label."""
    lines = [line for line in read_bytes(file).splitlines() if line.strip()]
    return bool(lines) and all(_MARK.fullmatch(line) for line in lines)


def _annotated(splits: list[_Split], annotations: Folder, problems: Problems) -> list[_Split]:
    """Return the splits without images that lack an annotation, as those of a test split may."""
    result = []
    for split in splits:
        image_ids = list(split.lines)
        places = [f"line {line} (image {image_id})" for image_id, line in split.lines.items()]
        kept, missing = annotations.find(
            split.file, places.__getitem__, [f"{image_id}.xml" for image_id in image_ids], problems
        )
        if image_ids and len(missing) == len(image_ids):
            if len(splits) > 1:
                warnings.warn(
                    f"{split.file}: none of its {len(missing)} images has an annotation; split "
                    f"{split.name} is left out",
                    stacklevel=3,
                )
                continue
            raise DataError(f"{annotations.path} must hold the annotations of {split.file}, "
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
                f"{annotations.path / image_ids[i]}.xml, found no such file",
                f"{split.file}: an image must have an annotation",
            )
        lines = {image_ids[i]: split.lines[image_ids[i]] for i in kept}
        files = {image_ids[i]: annotations.path / name for i, name in kept.items()}
        result.append(_Split(split.name, split.file, lines, split.listed, files))
    return result


def _read_annotation(
    file: Path, vocabulary: Sequence[str] | None, problems: Problems
) -> _Annotation:
    root = _parse(file)
    if root.tag != "annotation":
        raise DataError(f"{file} must hold an <annotation>, got {short(root.tag)}")
    objects = []
    broken: list[str] = []
    for number, element in enumerate(root.findall("object"), 1):
        place = f"{file}, object {number}"
        with problems.part():
            name, difficult = _name(place, element, vocabulary), _is_difficult(place, element)
            box, problem = _box(element)
            if problem is not None:
                broken.append(f"{place}: {problem}")
            objects.append(_Object(name, difficult, box))
    return _Annotation(_text(root, "filename"), objects, broken[0] if broken else None, len(broken))


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


def _name(place: str, element: Any, vocabulary: Sequence[str] | None) -> str:
    name = _text(element, "name")
    if len(element.findall("name")) > 1 or (expected := expected_name(name)) is not None:
        wanted = "one name" if name else expected
        raise DataError(f"{place} must have {wanted}, got {_shown(name)}")
    assert name is not None
    if vocabulary is not None and name not in vocabulary:
        raise DataError(
            f"{place} must have one of the {len(vocabulary)} names of labels=FILE, got "
            f"{short(name)}"
        )
    return sys.intern(name)


def _is_difficult(place: str, element: Any) -> bool:
    difficult = _text(element, "difficult") or ""  # a missing one means 0
    if difficult.lower() not in _DIFFICULT:
        raise DataError(f"{place}: difficult must be 0 or 1, got {_shown(difficult)}")
    return _DIFFICULT[difficult.lower()]


def _box(element: Any) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """Return left, top, width and height of an object, or None and what is wrong with them."""
    box = element.find("bndbox")
    if box is None:
        return None, None
    edges = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(box, side)
        if text is None or not _NUMBER.fullmatch(text):
            return None, f"{side} must be a number below 1e9, got {_shown(text)}"
        edges.append(float(text))
    left, top, right, bottom = edges
    if left > right or top > bottom:
        found = ", ".join(f"{edge:g}" for edge in edges)
        return None, f"bndbox must have xmin <= xmax and ymin <= ymax, got {found}"
    return (left - 1, top - 1, right - left + 1, bottom - top + 1), None


def _text(element: Any, tag: str) -> str | None:
    """Return the text of the only child of that name, None where there is none."""
    children = element.findall(tag)
    if len(children) > 1:
        return f"{len(children)} of them"
    return (children[0].text or "").strip() if children else None


def _shown(text: str | None) -> str:
    return "none" if text is None else short(text)


def _check_label_files(
    split: _Split,
    label_names: Sequence[str],
    notes: Mapping[str, _Annotation],
    problems: Problems,
) -> None:
    """Compare the annotations with `<label>_<split>.txt`, where these exist."""
    there = set(os.listdir(split.file.parent))
    for name in label_names:
        file = f"{name}_{split.file.stem}.txt"
        if file in there:
            with problems.part():
                _check_label_file(split.file.with_name(file), name, split, notes, problems)


def _check_label_file(
    file: Path,
    label: str,
    split: _Split,
    notes: Mapping[str, _Annotation],
    problems: Problems,
) -> None:
    seen: set[str] = set()
    for number, line in enumerate(read_lines(file), 1):
        image_id, value = (*line.strip().rsplit(maxsplit=1), "", "")[:2]
        if value not in ("1", "-1", "0"):
            problems.add(
                f"{file}, line {number}: a line must be an image id and 1, -1 or 0, got "
                f"{short(line)}"
            )
        elif image_id in seen:
            problems.add(f"{file}, line {number}: image ids must be unique, got {image_id} again")
        elif image_id in split.lines and image_id in notes:
            marks = [o.difficult for o in notes[image_id].objects if o.name == label]
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
