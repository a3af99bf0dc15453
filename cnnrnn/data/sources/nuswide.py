"""NUS-WIDE as it is distributed: an image list, and a file of 0 and 1 per concept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cnnrnn.config import NusWideOptions, OnBadImage
from cnnrnn.data.dataset import DataError, Dataset
from cnnrnn.data.files import (
    EmptySourceError,
    Problems,
    read_blocks,
    read_lines,
    read_names,
    short,
)
from cnnrnn.data.folders import Folder, given_folder, name_problem

_ZERO, _ONE, _LINE_FEED = b"01\n"
_SPACES = np.frombuffer(b" \t\r\n", dtype=np.uint8)

Bits = npt.NDArray[np.uint8]


def load_nuswide(
    root: str | Path,
    images: str | Path | None = None,
    options: NusWideOptions | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    problems: Problems | None = None,
) -> Dataset:
    """Read NUS-WIDE.

    The records are the lines of `ImageList/Imagelist.txt`. Concepts are those of `Concepts81.txt`
    (also in `ConceptsList/`), with one line of 0 or 1 per image in
    `Groundtruth/AllLabels/Labels_<concept>.txt`; where these are missing, the records are those of
    `TrainImagelist.txt` and `TestImagelist.txt` with
    `Groundtruth/TrainTestLabels/Labels_<concept>_Train.txt` and `..._Test.txt`. Tags are those of
    `TagList1k.txt`, with one line of 0s and 1s per image in `AllTags1k.txt` (also in
    `NUS_WID_Tags/`). Backslashes in image names are taken as slashes.

    Args:
        root: the folder.
        images: the image folder; None takes `Flickr` or `images` in `root`.
        options: labels, and split files: lists of image names as in `Imagelist.txt`.
        on_bad_image: as for `load_dataset`.
        follow_links: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths; its splits are `train` and `test`, or those of the options,
        or `all` where no list of images names any.
    """
    problems = problems or Problems()
    options = options or NusWideOptions()
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} must be NUS-WIDE's folder, found no such folder")
    folder = Folder(_image_folder(root, images), follow_links)
    names, places = _read_image_lists(_image_lists(root, options), folder)
    records = _right_names(names, places, problems)
    right = list(records.values())
    if options.labels == "tags":
        label_names, rows, labels = _read_tags(root, len(names), problems)
    else:
        label_names, rows, labels = _read_concepts(root, places, problems)
    splits = _read_splits(root, options, folder, records, problems)
    found = folder.existing(
        places[0].file, partial(_line_of, places, right), [names[i] for i in right], on_bad_image,
        problems,
    )  # fmt: skip
    kept = [right[i] for i in found]
    if not kept:
        raise EmptySourceError(f"{places[0].file} must name at least one image, found none")

    position = np.full(len(names), -1, dtype=np.int64)
    position[kept] = np.arange(len(kept))
    image_folder, files = folder.path, list(found.values())
    del folder, found, kept, names, records, right  # their memory becomes that of the paths
    rows = position[rows]
    order = np.lexsort((labels, rows))
    order = order[rows[order] >= 0]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[order], minlength=len(files)))])
    return Dataset.from_arrays(
        source=f"nuswide:{root}",
        label_names=tuple(label_names),
        label_indptr=indptr,
        label_indices=labels[order],
        splits={name: position[members][position[members] >= 0] for name, members in splits.items()}
        or {"all": np.arange(len(files))},
        images=tuple(image_folder / name for name in files),
    )


@dataclass(frozen=True)
class _ImageList:
    """A file that lists images, and the records that are its lines."""

    file: Path
    split: str  # "", or Train or Test, as in the names of label files
    first: int
    count: int


def _find(root: Path, name: str, *folders: str) -> Path:
    """Return the first of ROOT/NAME and ROOT/FOLDER/NAME that there is."""
    candidates = [root / folder / name for folder in (*folders, ".")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{root} must hold {' or '.join(str(c.relative_to(root)) for c in candidates)}, found none"
    )


def _image_folder(root: Path, images: str | Path | None) -> Path:
    if images is not None:
        return given_folder(root, images)
    for name in ("Flickr", "images"):
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"{root} must hold its images in Flickr or images, or come with images=FOLDER, found none"
    )


def _image_lists(root: Path, options: NusWideOptions) -> list[tuple[Path, str]]:
    if options.labels == "tags" or (root / "Groundtruth" / "AllLabels").is_dir():
        return [(_find(root, "Imagelist.txt", "ImageList"), "")]
    if not (root / "Groundtruth" / "TrainTestLabels").is_dir():
        raise DataError(
            f"{root} must hold Groundtruth/AllLabels or Groundtruth/TrainTestLabels, found neither"
        )
    return [
        (_find(root, f"{split}Imagelist.txt", "ImageList"), split) for split in ("Train", "Test")
    ]


def _read_image_lists(
    lists: list[tuple[Path, str]], folder: Folder
) -> tuple[list[str], list[_ImageList]]:
    names: list[str] = []
    places = []
    for file, split in lists:
        lines = _read_image_list(file, folder)
        places.append(_ImageList(file, split, len(names), len(lines)))
        names += lines
    return names, places


def _read_image_list(file: Path, folder: Folder) -> list[str]:
    return [folder.inside(line.strip())[0] for line in read_lines(file)]


def _line(places: list[_ImageList], row: int) -> str:
    """Name a record by its line, and by its file where that is not the first."""
    place = next(place for place in reversed(places) if row >= place.first)
    file = "" if place is places[0] else f" of {place.file}"
    return f"{row - place.first + 1}{file}"


def _line_of(places: list[_ImageList], rows: list[int], position: int) -> str:
    return f"line {_line(places, rows[position])}"


def _right_names(names: list[str], places: list[_ImageList], problems: Problems) -> dict[str, int]:
    """Return the positions of the names that are right and not there before, by normal path."""
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        problem = name_problem(name)
        if problem is not None:
            problems.add(
                f"{places[0].file}, line {_line(places, row)}: an image must be a file inside the "
                f"image folder, got {short(name)} ({problem})"
            )
        elif (same := os.path.normpath(name)) in seen:
            problems.add(
                f"{places[0].file}, line {_line(places, row)}: images must be unique, got "
                f"{short(name)} as in line {_line(places, seen[same])}"
            )
        else:
            seen[name if name == same else same] = row  # one string, not two
    return seen


Entries = tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int32]]


def _read_concepts(root: Path, places: list[_ImageList], problems: Problems) -> Entries:
    """Return the concepts, and row and label of every 1 in their files."""
    concepts_file = _find(root, "Concepts81.txt", "ConceptsList")
    concepts = read_names(concepts_file, "concept", problems)
    for concept in concepts:
        file_name = f"Labels_{concept}.txt"
        if name_problem(file_name) is not None or "/" in concept or len(file_name) > 255:
            raise DataError(f"{concepts_file}: a concept must be part of a file name, got "
                            f"{short(concept)}")  # fmt: skip
    rows: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    labels: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    for place in places:
        folder = root / "Groundtruth" / ("TrainTestLabels" if place.split else "AllLabels")
        ending = f"_{place.split}.txt" if place.split else ".txt"
        for label, concept in enumerate(concepts):
            with problems.part():
                file = folder / f"Labels_{concept}{ending}"
                found, _ = _read_bits(file, place.count, 1, place.file, problems)
                rows.append(found + place.first)
                labels.append(np.full(len(found), label, dtype=np.int32))
    return concepts, np.concatenate(rows), np.concatenate(labels)


def _read_tags(root: Path, count: int, problems: Problems) -> Entries:
    """Return the tags, and row and label of every 1 in their file."""
    tags = read_names(_find(root, "TagList1k.txt", "NUS_WID_Tags"), "tag", problems)
    file = _find(root, "AllTags1k.txt", "NUS_WID_Tags")
    list_file = _find(root, "Imagelist.txt", "ImageList")
    rows, labels = _read_bits(file, count, len(tags), list_file, problems)
    return tags, rows, labels.astype(np.int32)


def _read_bits(
    file: Path, count: int, width: int, list_file: Path, problems: Problems
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Read lines of 0s and 1s with white space between.

    Args:
        file: has `count` lines of `width` digits.
        count: how many images there are.
        width: labels per image.
        list_file: lists the images, for messages.
        problems: takes lines that are not so.

    Returns:
        Line and column of every 1.
    """
    rows: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    columns: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    line = 0
    for block in _without_blank_end(read_blocks(file)):
        bits = _fast_bits(np.frombuffer(block, dtype=np.uint8), width)
        if bits is None:
            bits = _slow_bits(block, width, file, line, problems)
        found, places = np.nonzero(bits)
        rows.append(found + line)
        columns.append(places)
        line += len(bits)
    if line != count:
        raise DataError(
            f"{file} must have one line for each of the {count} images of {list_file}, got {line}"
        )
    return np.concatenate(rows), np.concatenate(columns)


def _without_blank_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Leave out the blank lines behind the last that is not."""
    blank: list[bytes] = []
    for block in blocks:
        end = len(block.rstrip())
        if not end:
            blank.append(block)
            continue
        cut = block.find(b"\n", end) + 1 or len(block)
        yield b"".join([*blank, block[:cut]])
        blank = [block[cut:]] if cut < len(block) else []


def _fast_bits(block: Bits, width: int) -> npt.NDArray[np.bool_] | None:
    """Read lines that all look like the first, one white space after each digit; else None."""
    breaks = np.flatnonzero(block[: 4 * width + 8] == _LINE_FEED)
    stride = int(breaks[0]) + 1 if len(breaks) else 0
    if stride < 2 * width or len(block) % stride:
        return None
    lines = block.reshape(-1, stride)
    digits, between = lines[:, : 2 * width : 2], lines[:, 1 : 2 * width : 2]
    rest = lines[:, 2 * width - 1 :]
    bits: npt.NDArray[np.bool_] = digits == _ONE
    if (
        not np.all(bits | (digits == _ZERO))
        or not np.isin(between, _SPACES).all()
        or not np.isin(rest, _SPACES).all()
        or not np.all(lines[:, -1] == _LINE_FEED)
        or np.any(lines[:, :-1] == _LINE_FEED)
    ):
        return None
    return bits


def _slow_bits(
    block: bytes, width: int, file: Path, first: int, problems: Problems
) -> npt.NDArray[np.bool_]:
    """Read line by line; a line that is wrong is a problem, and all 0."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    bits = np.zeros((len(lines), width), dtype=bool)
    for number, line in enumerate(lines):
        digits = line.split()
        if len(digits) == width and all(digit in (b"0", b"1") for digit in digits):
            bits[number] = [digit == b"1" for digit in digits]
            continue
        wrong = next((digit for digit in digits if digit not in (b"0", b"1")), None)
        found = f"{len(digits)} values" if wrong is None else short(wrong.decode("latin-1"))
        problems.add(
            f"{file}, line {first + number + 1}: a line must be {width} of 0 or 1, got {found}"
        )
    return bits


def _read_splits(
    root: Path,
    options: NusWideOptions,
    folder: Folder,
    rows: dict[str, int],
    problems: Problems,
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the rows of each split, by the options' files or the set's own."""
    files = {
        name: Path(file).expanduser()
        for name, file in (("train", options.train), ("val", options.val), ("test", options.test))
        if file is not None
    }
    if not files:
        for name, title in (("train", "TrainImagelist.txt"), ("test", "TestImagelist.txt")):
            for file in (root / "ImageList" / title, root / title):
                if file.is_file():
                    files.setdefault(name, file)
    splits = {}
    for name, file in files.items():
        with problems.part():
            members: dict[int, None] = {}
            for number, image in enumerate(_read_image_list(file, folder), 1):
                row = rows.get(os.path.normpath(image))
                if row is None:
                    problems.add(
                        f"{file}, line {number}: an image must be one of the image list, got "
                        f"{short(image)}"
                    )
                elif row in members:
                    problems.add(
                        f"{file}, line {number}: images must be unique, got {short(image)} again"
                    )
                else:
                    members[row] = None
            splits[name] = np.array(list(members), dtype=np.int64)
    return splits
