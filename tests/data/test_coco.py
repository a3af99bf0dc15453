from __future__ import annotations

import copy
import json
import logging
import os
import sys
import time
import tracemalloc
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.dataset import Boxes
from cnnrnn.data.sources.coco import load_coco

pytest.importorskip("pycocotools")

NAMES = ("a.png", "sub/b.png", "c.png")


def document() -> dict[str, Any]:
    """Three images, the last without annotations; category ids with gaps, not in order."""
    return {
        "images": [
            {"id": 10, "file_name": NAMES[0]},
            {"id": 7, "file_name": NAMES[1]},
            {"id": 99, "file_name": NAMES[2]},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 90, "bbox": [0, 0, 5.5, 6], "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 90, "bbox": [2, 2, 1, 1], "iscrowd": 1},
            {"id": 4, "image_id": 7, "category_id": 3, "bbox": [9, 9, 1, 1], "iscrowd": 0},
        ],
        "categories": [
            {"id": 90, "name": "dog"},
            {"id": 3, "name": "cat"},
            {"id": 44, "name": "bird"},
        ],
    }


def write_images(folder: Path, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / name)


def write_split(
    root: Path, suffix: str, data: dict[str, Any] | None = None, images: str = ""
) -> Path:
    file = root / "annotations" / f"instances_{suffix}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document() if data is None else data))
    write_images(root / images / suffix)
    return file


@pytest.fixture
def single(tmp_path: Path) -> tuple[Path, Path]:
    write_images(tmp_path / "pictures")
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(document()))
    return file, tmp_path / "pictures"


def load_changed(single: tuple[Path, Path], data: Any) -> Dataset:
    file, images = single
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return load_coco(file, images)


def label_lists(dataset: Dataset) -> list[list[int]]:
    return [dataset.labels(i).tolist() for i in range(len(dataset))]


def test_single_file(single: tuple[Path, Path]) -> None:
    file, images = single
    dataset = load_dataset(f"coco:{file}", images=images)
    assert dataset.source == f"coco:{file}"
    assert dataset.label_names == ("dog", "cat", "bird")
    assert dataset.image_paths == tuple(images / name for name in NAMES)
    assert label_lists(dataset) == [[0], [0, 1], []]
    assert {name: ids.tolist() for name, ids in dataset.splits.items()} == {"all": [0, 1, 2]}
    assert dataset.label_counts().tolist() == [2, 1, 0]
    assert dataset.features is None
    assert dataset.record_name(1) == str(images / NAMES[1])


def test_boxes_stay_with_their_records(single: tuple[Path, Path]) -> None:
    boxes = load_coco(*single).select([1, 2, 0]).boxes
    assert boxes is not None
    assert boxes.indptr.tolist() == [0, 3, 3, 4]
    assert boxes.label_indices.tolist() == [1, 0, 1, 0]
    assert boxes.xywh.tolist() == [[1, 2, 3, 4], [2, 2, 1, 1], [9, 9, 1, 1], [0, 0, 5.5, 6]]


@pytest.mark.parametrize(
    "outline", [[[1.5, 2, 3, 4, 5, 6]], {"size": [6, 8], "counts": "a0b"}, [], None, "x", {"id": 1}]
)
def test_outlines_are_not_looked_at(single: tuple[Path, Path], outline: Any) -> None:
    data = document()
    for annotation in data["annotations"]:
        annotation["segmentation"] = outline
    assert label_lists(load_changed(single, data)) == [[0], [0, 1], []]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_encodings_of_json(single: tuple[Path, Path], encoding: str) -> None:
    data = document()
    data["categories"][0]["name"] = "été"
    single[0].write_bytes(json.dumps(data, ensure_ascii=False).encode(encoding))
    assert load_coco(*single).label_names == ("été", "cat", "bird")


def test_memory_stays_below_that_of_plain_json(single: tuple[Path, Path]) -> None:
    """Most of a real file is outlines, which must be gone while the rest is read."""
    data = document()
    outline = [[float(i) / 7 for i in range(20_000)]]
    for annotation in data["annotations"]:
        annotation["segmentation"] = outline
    single[0].write_text(json.dumps(data))
    size = single[0].stat().st_size
    peaks = []
    for read in (lambda: json.loads(single[0].read_text()), lambda: load_coco(*single)):
        tracemalloc.start()
        kept = read()
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        peaks.append(peak)
        assert kept
    assert after < size / 4
    assert peaks[1] < 0.9 * peaks[0]


def test_annotations_without_boxes(single: tuple[Path, Path]) -> None:
    data = document()
    for annotation in data["annotations"]:
        del annotation["bbox"]
    dataset = load_changed(single, data)
    assert dataset.boxes is None
    assert label_lists(dataset) == [[0], [0, 1], []]


@pytest.mark.parametrize("images", ["", "images"])
@pytest.mark.parametrize("year", ["", "2014"])
def test_standard_layouts(tmp_path: Path, images: str, year: str) -> None:
    val = document()
    val["categories"].reverse()  # ids decide, not positions
    write_split(tmp_path, f"train{year}", images=images)
    write_split(tmp_path, f"val{year}", val, images=images)
    dataset = load_dataset(f"coco:{tmp_path}")
    assert {name: ids.tolist() for name, ids in dataset.splits.items()} == {
        "train": [0, 1, 2],
        "val": [3, 4, 5],
    }
    assert dataset.label_names == ("dog", "cat", "bird")
    assert label_lists(dataset) == [[0], [0, 1], []] * 2
    part = dataset.split("val")
    assert part.image_paths is not None and part.splits == {}
    assert part.image_paths[0] == tmp_path / images / f"val{year}" / NAMES[0]
    with pytest.raises(DataError, match=r"no split 'test', expected one of: train, val"):
        dataset.split("test")


def test_folder_with_images_elsewhere(tmp_path: Path) -> None:
    write_split(tmp_path / "root", "train")
    (tmp_path / "root" / "train").rename(tmp_path / "train")
    with pytest.raises(DataError, match="instances_train.json must have its images in"):
        load_coco(tmp_path / "root")
    assert len(load_coco(tmp_path / "root", tmp_path)) == 3


def test_a_split_without_its_image_folder_is_left_out(tmp_path: Path) -> None:
    write_split(tmp_path, "train2017")
    write_split(tmp_path, "val2017")
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="instances_val2017.json must have its images in .*, found "
                                         "no such folder; split val is left out"):  # fmt: skip
        dataset = load_coco(tmp_path)
    assert set(dataset.splits) == {"train"} and len(dataset) == 3


def test_keys_that_occur_twice_are_found_in_linear_time(single: tuple[Path, Path]) -> None:
    pairs = ", ".join(f'"{i}": 0' for i in range(100_000))
    start = time.perf_counter()
    with pytest.raises(DataError, match="'99999' twice"):
        load_changed(single, "{" + pairs + ', "99999": 0}')
    assert time.perf_counter() - start < 20


def test_empty_split_is_legal_beside_another(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    write_split(tmp_path, "val", {**document(), "images": [], "annotations": []})
    assert len(load_coco(tmp_path).split("val")) == 0


def test_nothing_is_printed(single: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_coco(*single)
    assert capfd.readouterr() == ("", "")


def change(*path: str | int, to: Any = None, drop: bool = False) -> dict[str, Any]:
    data = document()
    node: Any = data
    for key in path[:-1]:
        node = node[key]
    if drop:
        del node[path[-1]]
    else:
        node[path[-1]] = to
    return data


def annotation_2(*path: str | int, to: Any = None, drop: bool = False) -> dict[str, Any]:
    return change("annotations", 1, *path, to=to, drop=drop)


def image_7(*path: str | int, to: Any = None, drop: bool = False) -> dict[str, Any]:
    return change("images", 1, *path, to=to, drop=drop)


BAD_FILES: dict[str, tuple[Any, str]] = {
    "malformed": ('{"images": [}', "must be valid JSON, got Expecting value at line 1, column 13"),
    "truncated": (json.dumps(document(), indent=1)[:200], r"valid JSON, got .* at line 1\d, col"),
    "empty": ("", "must be valid JSON, got Expecting value at line 1, column 1"),
    "deep": ("[" * 200_000, "must be valid JSON, got"),
    "endless number": ('{"images": ' + "1" * 5000 + "}", "must be valid JSON, got"),
    "deep inside": ('{"info": ' + "[" * 200_000 + "]" * 200_000 + "}", "must be valid JSON, got"),
    "key twice": ('{"images": [{"id": 1, "id": 2}]}', "'id' twice in the object with id 2"),
    "key twice on top": ('{"images": [], "images": []}', "'images' twice in the object with id N"),
    "not an object": ("[]", "must hold a JSON object, got a list"),
    "no images": (change("images", drop=True), "images is missing, found 'annotations', 'cat"),
    "no annotations": (change("annotations", drop=True), "annotations is missing"),
    "no categories": (change("categories", drop=True), "categories is missing"),
    "images no list": (change("images", to={}), "images must be a list, got an object"),
    "images empty": ({**document(), "images": [], "annotations": []}, "at least one image"),
    "categories empty": (change("categories", to=[]), "categories must not be empty"),
    "image no object": (change("images", 1, to=5), r"images\[1\] must be an object, got a number"),
    "image without id": (image_7("id", drop=True), r"images\[1\] must have an id"),
    "image id bool": (image_7("id", to=True), r"images\[1\] .*number or text as id, got True"),
    "image id nan": (image_7("id", to=float("nan")), r"images\[1\].* got nan"),
    "image id twice": (image_7("id", to=10), r"images must be unique, got 10 again"),
    "category twice": (change("categories", 1, "id", to=90), "categories must be unique, got 90"),
    "unknown image": (annotation_2("image_id", to=8), "annotation 2 .*image_id.* got 8"),
    "no image id": (annotation_2("image_id", drop=True), "annotation 2 .*image_id.*none"),
    "image id list": (annotation_2("image_id", to=[7]), r"annotation 2 .* got \[7\]"),
    "unknown category": (annotation_2("category_id", to=1), "annotation 2.*category_id"),
    "file_name twice": (image_7("file_name", to="a.png"), "got 'a.png' for images 10 and 7"),
    "file_name again": (image_7("file_name", to="./a.png/"), "'./a.png/' for images 10 and 7"),
    "file_name missing": (image_7("file_name", drop=True), "image 7 .*got none"),
    "file_name number": (image_7("file_name", to=3), "image 7 .*got 3 .not a string"),
    "file_name empty": (image_7("file_name", to=""), "image 7 .*empty"),
    "file_name dot": (image_7("file_name", to="./."), "image 7 .*empty"),
    "file_name absolute": (image_7("file_name", to="/etc/passwd"), "image 7 .*absolute"),
    "file_name drive": (image_7("file_name", to="C:\\x.png"), "image 7 .*absolute"),
    "file_name up": (image_7("file_name", to="sub/../../x"), "image 7 .*leaves"),
    "file_name up, backslash": (image_7("file_name", to="s\\..\\x"), "image 7 .*leaves"),
    "file_name NUL": (image_7("file_name", to="a\0.png"), "image 7 .*not a file name"),
    "file_name line feed": (image_7("file_name", to="a\n.png"), "image 7 .*not a file name"),
    "file_name half": (image_7("file_name", to="\ud800"), "image 7 .*not a file name"),
    "file_name URL": (image_7("file_name", to="http://h/a.png"), "image 7 .*a URL"),
    "file_name long": (image_7("file_name", to="x" * 5000), "image 7 must exist"),
    "folder long": (image_7("file_name", to="x" * 5000 + "/a"), "image 7"),
    "file in file": (image_7("file_name", to="a.png/b.png"), "image 7 must exist"),
    "file is folder": (image_7("file_name", to="sub"), "image 7 must exist"),
}  # fmt: skip


BAD_BOXES = {
    "short": [1, 2, 3], "nan": [float("nan"), 0, 5, 6], "inf": [0, float("inf"), 5, 6],
    "beyond float32": [10**400, 0, 5, 6], "string": ["1", 0, 5, 6], "null": None, "none": [],
    "negative": [0, 0, -1, 6], "upwards": [0, 0, 5, -0.5], "object": {"x": 1},
}  # fmt: skip


@pytest.mark.parametrize("box", BAD_BOXES.values(), ids=BAD_BOXES)
def test_a_broken_box_is_no_box(single: tuple[Path, Path], box: Any) -> None:
    message = r"labels.json: the bbox of 1 of 4 annotations is not four .* the first: annotation 2 "
    with pytest.warns(UserWarning, match=message):
        dataset = load_changed(single, annotation_2("bbox", to=box))
    assert label_lists(dataset) == [[0], [0, 1], []]
    assert dataset.boxes is not None and dataset.boxes.indptr.tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("own", [1, "1", None, [1], {"x": 2}, "drop"])
def test_ids_of_annotations_are_not_needed(single: tuple[Path, Path], own: Any) -> None:
    data = annotation_2("id", drop=own == "drop", to=own)
    data["annotations"][3]["id"] = own
    dataset = load_changed(single, data)
    assert label_lists(dataset) == [[0], [0, 1], []]
    assert dataset.boxes is not None and len(dataset.boxes.xywh) == 4


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("7", 7), (7, "7"), (7.0, 7), (7, 7.0), ("7.0", 7), (" 7", "7"), ("img-7", "img-7"),
     (1.5, "1.5"), ("007", "007"), (-7, "-7"), (0, "0.0")],
)  # fmt: skip
def test_ids_are_numbers_or_text(single: tuple[Path, Path], ours: Any, theirs: Any) -> None:
    data = image_7("id", to=ours)
    data["categories"][1]["id"] = ours
    for annotation in data["annotations"]:
        for key, value in (("image_id", 7), ("category_id", 3)):
            annotation[key] = theirs if annotation[key] == value else annotation[key]
    assert label_lists(load_changed(single, data)) == [[0], [0, 1], []]


@pytest.mark.parametrize(("one", "other"), [("07", 7), ("1.5", 1), ("a", "A")])
def test_other_ids_do_not_match(single: tuple[Path, Path], one: Any, other: Any) -> None:
    data = image_7("id", to=one)
    for annotation in data["annotations"]:
        annotation["image_id"] = other
    with pytest.raises(DataError, match="annotation 1 must have an image_id among the 3 ids"):
        load_changed(single, data)


def test_ids_that_are_one_id_are_not_unique(single: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="ids of images must be unique, got '10.0' again at imag"):
        load_changed(single, image_7("id", to="10.0"))


UNUSABLE = {"missing": None, "empty": " ", "half": "\ud800", "control": "a\x7f", "list": ["a"],
            "boolean": True}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE.values(), ids=UNUSABLE)
def test_a_category_without_a_name_costs_its_annotations(
    single: tuple[Path, Path], name: Any
) -> None:
    data = change("categories", 1, "name", to=name)
    with pytest.warns(UserWarning, match=r"category 3 must have .*; its 2 annotations are") as said:
        dataset = load_changed(single, data)
    assert len(said) == 1
    assert dataset.label_names == ("dog", "bird") and label_lists(dataset) == [[0], [0], []]
    for category in data["categories"]:
        category["name"] = name
    with pytest.raises(DataError, match="category 90 must have .* and so must every other"):
        load_changed(single, data)


@pytest.mark.parametrize(("name", "text"), [(1, "1"), (2.5, "2.5"), ("1", "1"), (" cat\t", "cat")])
def test_names_of_categories_are_text(single: tuple[Path, Path], name: Any, text: str) -> None:
    dataset = load_changed(single, change("categories", 1, "name", to=name))
    assert dataset.label_names == ("dog", text, "bird")


def test_categories_of_one_name_are_joined(single: tuple[Path, Path]) -> None:
    single[0].write_text(json.dumps(change("categories", 1, "name", to=" dog ")))
    problems = Problems(keep=True)
    dataset = load_coco(*single, problems=problems)
    assert dataset.label_names == ("dog", "bird") and label_lists(dataset) == [[0], [0], []]
    assert problems.messages == []
    assert [note.partition("labels.json: ")[2] for note in problems.notes] == [
        "categories of one name are joined: 90 and 3 are 'dog'"
    ]


def test_a_category_twice(single: tuple[Path, Path]) -> None:
    data = document()
    data["categories"].append({"id": "90", "name": "dog "})
    assert load_changed(single, data).label_names == ("dog", "cat", "bird")
    data["categories"][-1]["name"] = "fox"
    with pytest.raises(DataError, match="ids of categories must be unique, got '90' again at cat"):
        load_changed(single, data)


def test_backslashes_and_absolute_paths(single: tuple[Path, Path]) -> None:
    data = image_7("file_name", to="sub\\b.png")
    data["images"][0]["file_name"] = str(single[1].resolve() / "a.png")
    dataset = load_changed(single, data)
    assert dataset.image_paths == tuple(single[1] / name for name in NAMES)


def test_droppings_are_no_images(single: tuple[Path, Path]) -> None:
    data = image_7("file_name", to="sub/._b.png")
    with pytest.warns(UserWarning, match=r"1 images are hidden .* the first: image 7 is 'sub/._b"):
        assert label_lists(load_changed(single, data)) == [[0], []]


def test_the_layout_of_roboflow(tmp_path: Path) -> None:
    for split, name in (("train", "a.png"), ("valid", "b.png"), ("test", "c.png")):
        data = {**document(), "images": [{"id": 7, "file_name": name}]}
        data["annotations"] = data["annotations"][:1]
        write_images(tmp_path / split, (name,))
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(data))
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "_annotations.coco.json").write_bytes(b"\0\5")
    dataset = load_dataset(f"coco:{tmp_path}")
    paths = dataset.image_paths
    assert paths is not None
    assert {name: [paths[i] for i in rows] for name, rows in dataset.splits.items()} == {
        "train": [tmp_path / "train" / "a.png"], "val": [tmp_path / "valid" / "b.png"],
        "test": [tmp_path / "test" / "c.png"],
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["images", "images/Train", "images/train", "Train"])
def test_the_layouts_of_cvat(tmp_path: Path, folder: str) -> None:
    write_images(tmp_path / folder)
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_Train.json"
    file.write_text(json.dumps(document()))
    dataset = load_coco(tmp_path)
    assert dataset.image_paths == tuple(tmp_path / folder / name for name in NAMES)
    assert set(dataset.splits) == {"train"}
    data = document()
    for image in data["images"]:  # named from the folder above
        image["file_name"] = f"{Path(folder).name}/{image['file_name']}"
    file.write_text(json.dumps(data))
    if folder == "images/Train":
        assert load_coco(tmp_path).image_paths == dataset.image_paths


@pytest.mark.parametrize("prefix", ["images/", "images\\", ""])
def test_the_layout_of_label_studio(tmp_path: Path, prefix: str) -> None:
    write_images(tmp_path / "images")
    data = document()
    for image in data["images"]:
        image["file_name"] = prefix + image["file_name"]
    (tmp_path / "result.json").write_text(json.dumps(data))
    dataset = load_coco(tmp_path)
    assert [path.resolve() for path in dataset.image_paths or ()] == [
        (tmp_path / "images" / name).resolve() for name in NAMES
    ]
    assert set(dataset.splits) == {"all"}


def test_two_names_of_one_split(tmp_path: Path) -> None:
    write_split(tmp_path, "val")
    write_split(tmp_path, "validation2017")
    with pytest.raises(DataError, match="one name for a split, got 'val' and 'validation', which"):
        load_coco(tmp_path)


@pytest.mark.parametrize("case", BAD_FILES)
def test_errors_name_file_and_record(single: tuple[Path, Path], case: str) -> None:
    data, message = BAD_FILES[case]
    with pytest.raises(DataError, match=message) as caught:
        load_changed(single, data)
    text = str(caught.value)
    assert str(single[0]) in text and "\n" not in text


def test_not_utf8(single: tuple[Path, Path]) -> None:
    single[0].write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="labels.json must be valid JSON"):
        load_coco(*single)


def test_links_may_not_leave_the_image_folder(single: tuple[Path, Path]) -> None:
    file, images = single
    outside = file.parent / "outside"
    write_images(outside, ("b.png",))
    (images / "c.png").unlink()
    (images / "c.png").symlink_to(images / "a.png")
    assert len(load_coco(file, images)) == 3
    (images / "c.png").unlink()
    (images / "c.png").symlink_to(outside / "b.png")
    with pytest.raises(DataError, match=r"labels\.json: image 99 must be a file inside .*links to"):
        load_coco(file, images)
    (images / "c.png").unlink()
    write_images(images)
    (images / "sub" / "b.png").unlink()
    (images / "sub").rmdir()
    (images / "sub").symlink_to(outside)
    with pytest.raises(DataError, match=r"labels\.json: image 7 must be a file inside .*leads to"):
        load_coco(file, images)


def test_linked_image_folder_is_fine(single: tuple[Path, Path]) -> None:
    file, images = single
    link = file.parent / "link"
    link.symlink_to(images)
    assert len(load_coco(file, link)) == 3


def test_missing_images(single: tuple[Path, Path]) -> None:
    file, images = single
    (images / NAMES[0]).unlink()
    (images / NAMES[2]).unlink()
    message = r"labels\.json: image 10 must exist as .*a\.png, found no such file \(2 of 3 images"
    with pytest.raises(DataError, match=message):
        load_coco(file, images)
    with pytest.warns(UserWarning, match=message) as caught:
        dataset = load_dataset(f"coco:{file}", images=images, on_bad_image="skip")
    assert len(caught) == 1
    assert dataset.image_paths == (images / NAMES[1],)
    assert label_lists(dataset) == [[0, 1]]
    assert dataset.boxes is not None and dataset.boxes.indptr.tolist() == [0, 3]
    (images / NAMES[1]).unlink()
    with pytest.raises(DataError, match="3 of 3 images"):
        load_coco(file, images, on_bad_image="skip")


def test_pipes_are_not_images(single: tuple[Path, Path]) -> None:
    (single[1] / "c.png").unlink()
    os.mkfifo(single[1] / "c.png")
    with pytest.raises(DataError, match="image 99 must exist"):
        load_coco(*single)


def test_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere must be a COCO folder or annotation file"):
        load_coco(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold annotations/instances_"):
        load_coco(tmp_path)
    file = write_split(tmp_path, "train2014")
    with pytest.raises(DataError, match="instances_train2014.json needs its image folder"):
        load_coco(file)
    with pytest.raises(DataError, match="existing image folder, got .*nowhere"):
        load_coco(file, tmp_path / "nowhere")
    write_split(tmp_path, "train2017")
    with pytest.raises(DataError, match="train2017.json and .*train2014.json .* 'train' twice"):
        load_coco(tmp_path)


@pytest.mark.parametrize("suffix", ["", "..", "_2014"])
def test_suffix_must_name_a_split(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "annotations" / f"instances_{suffix}.json"
    file.parent.mkdir()
    file.write_text(json.dumps(document()))
    with pytest.raises(DataError, match="must have a split's name after instances_"):
        load_coco(tmp_path)


def test_a_huge_id_of_a_missing_image(single: tuple[Path, Path]) -> None:
    data = change("images", 0, "id", to=10**3000)
    data["annotations"] = []
    (single[1] / NAMES[0]).unlink()
    with pytest.raises(DataError, match="image a number of more than 60 digits must exist"):
        load_changed(single, data)


def test_splits_with_other_categories_share_a_vocabulary(tmp_path: Path) -> None:
    """Names are what counts: other ids, another order, names that one file alone has."""
    val = document()
    val["categories"] = [{"id": 3, "name": "fish"}, {"id": 90, "name": "cat"}]
    write_split(tmp_path, "train")
    write_split(tmp_path, "val", val)
    dataset = load_coco(tmp_path)
    assert dataset.label_names == ("dog", "cat", "bird", "fish")
    assert label_lists(dataset) == [[0], [0, 1], [], [1], [1, 3], []]


def test_missing_extra(single: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cnnrnn\[vision\]"'):
        load_coco(*single)


@pytest.mark.parametrize("spec", ["", "coco", "coco:", "voc:", "pascal:x", "labels.json", ":x"])
def test_unknown_kinds(spec: str) -> None:
    with pytest.raises(DataError, match="data must be one of coco:ROOT, .*scenes:ROOT, features"):
        load_dataset(spec)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="images is only for coco, voc, nuswide, csv, jsonl sources"
    ):
        load_dataset("scenes:x", images=tmp_path)
    with pytest.raises(ValueError, match="on_bad_image must be one of error, skip, got 'ignore'"):
        load_dataset("coco:x", on_bad_image="ignore")  # type: ignore[arg-type]


def test_scenes_are_generated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Path] = []

    def write_scenes(folder: Path) -> None:
        calls.append(folder)
        write_split(folder, "train")

    module = types.ModuleType("cnnrnn.data.sources.scenes")
    module.write_scenes = write_scenes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cnnrnn.data.sources.scenes", module)
    root = tmp_path / "new" / "scenes"
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            dataset = load_dataset(f"scenes:{root}")
            assert dataset.source == f"scenes:{root}" and len(dataset) == 3
    assert calls == [root]
    assert [record.levelname for record in caplog.records] == ["INFO"]


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    keys: list[Any] = (
        list(value) if isinstance(value, dict)
        else list(range(len(value))) if isinstance(value, list)
        else []
    )  # fmt: skip
    inner = [found for key in keys for found in nodes(value[key], (*path, key))]
    return [path, *inner]


PATHS = nodes(document())[1:]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([7, 10, 99, 3, 90, 44, "a.png", "dog", "..", "sub", ".", "\ud800", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)  # fmt: skip


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.sampled_from(PATHS), st.booleans(), JSON_VALUES), min_size=1, max_size=3
    )
)
def test_mutated_files_load_or_raise_data_error(
    single: tuple[Path, Path], edits: list[tuple[tuple[str | int, ...], bool, Any]]
) -> None:
    data: Any = document()
    for path, drop, value in edits:
        node = data
        try:
            for key in path[:-1]:
                node = node[key]
            if drop:
                del node[path[-1]]
            else:
                node[path[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit removed this place
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = load_changed(single, data)
    except DataError as error:
        assert "labels.json" in str(error)
    else:
        assert len(dataset) <= len(data["images"])  # droppings are left out


# The dataset type itself.


def small_dataset(**changes: Any) -> Dataset:
    parts: dict[str, Any] = {
        "source": "test:here",
        "label_names": ("x", "y", "z"),
        "label_indptr": np.array([0, 2, 2, 3]),
        "label_indices": np.array([0, 2, 1]),
        "features": np.arange(6.0).reshape(3, 2),
        "splits": {"train": np.array([2, 0])},
    }
    return Dataset.from_arrays(**{**parts, **changes})


def test_selection_keeps_everything_aligned() -> None:
    dataset = small_dataset()
    expected = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    torch.testing.assert_close(dataset.label_matrix(), expected)
    generator = np.random.default_rng(0)
    for size in (0, 1, 7):
        chosen = generator.integers(0, 3, size)
        part = dataset.select(chosen)
        torch.testing.assert_close(part.label_matrix(), expected[chosen])
        assert part.label_counts().tolist() == expected[chosen].sum(0).tolist()
        for same in (chosen.tolist(), torch.from_numpy(chosen)):
            torch.testing.assert_close(dataset.select(same).label_matrix(), expected[chosen])
        assert part.features is not None and dataset.features is not None
        np.testing.assert_array_equal(part.features, dataset.features[chosen])
        assert part.rows.tolist() == chosen.tolist()
    twice = dataset.split("train").select([1])
    assert twice.record_name(0) == "row 0 of here"
    assert twice.labels(0).dtype == np.int32 and twice.labels(0).tolist() == [0, 2]


def test_unknown_labels_are_selected_with_their_records() -> None:
    dataset = small_dataset(
        unknown_indptr=np.array([0, 1, 3, 3]), unknown_indices=np.array([1, 0, 2])
    )
    expected = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(dataset.unknown_matrix(), expected)
    for chosen in ([], [1], [2, 1, 1, 0]):
        torch.testing.assert_close(dataset.select(chosen).unknown_matrix(), expected[chosen])
    assert not small_dataset().unknown_matrix().any()


@pytest.mark.parametrize("indices", [[3], [-1], torch.tensor([0, 5])])
def test_indices_out_of_range(indices: Any) -> None:
    with pytest.raises(IndexError, match=r"indices must be in 0\.\.2, got"):
        small_dataset().select(indices)


def test_masks_are_not_indices() -> None:
    with pytest.raises(TypeError, match="vector of integers"):
        small_dataset().select(np.array([True, False, True]))
    with pytest.raises(IndexError, match=r"record must be in 0\.\.2, got -1"):
        small_dataset().labels(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_names": ("x", "x", "z")}, "unique, got 'x' as labels 0 and 1"),
        ({"label_names": ("x", "", "z")}, "label 1 must have a non-empty string as name, got ''"),
        ({"label_names": ("x", 3, "z")}, "label 1 must have a non-empty string as name, got 3"),
        ({"label_names": ("x", "y\n", "z")}, r"label 1 .* without control .*got 'y\\n'"),
        ({"splits": {"a\x1b[2J": np.array([0])}}, r"a split .* without control .*got 'a\\x1b"),
        ({"label_indptr": np.array([0, 2, 2, 4])}, r"must run from 0 to 3, got \[0, 4\]"),
        ({"label_indptr": np.array([0, 3, 2, 3])}, "label_indptr must not decrease"),
        ({"label_indptr": np.array([])}, "label_indptr must run from 0 to 3"),
        ({"label_indices": np.array([0, 3, 1])}, r"label_indices must be in 0\.\.2, got 0\.\.3"),
        ({"label_indices": np.array([0, 0, 1])}, "ascending and unique"),
        ({"label_indices": np.array([2, 0, 1])}, "ascending and unique"),
        ({"label_indices": np.array([0.0, 2, 1])}, "vector of integers, got .* float64"),
        ({"features": np.zeros((2, 2))}, r"features must be \[3, F\] floats, got \[2, 2\]"),
        ({"features": np.array([[0, 1], [2, np.nan], [0, 0]])}, "row 1 of here.*nan in column 1"),
        ({"images": (Path("a"),)}, "images must be 3 like the label sets, got 1"),
        ({"splits": {"train": np.array([3])}}, r"split train must hold records 0\.\.2, got 3\.\.3"),
        ({"splits": {" ": np.array([0])}}, "split must have a non-empty string as name"),
        ({"rows": np.array([1])}, r"rows must be \[3\]"),
        ({"unknown_indptr": np.array([0, 0, 0, 0])}, "must come together, got one"),
        ({"unknown_indptr": np.array([0, 1]), "unknown_indices": np.array([1])}, "cover 3 records"),
        ({"unknown_indptr": np.array([0, 0, 0, 1]), "unknown_indices": np.array([3])},
         r"unknown_indices must be in 0\.\.2, got 3\.\.3"),
        ({"unknown_indptr": np.array([0, 1, 1, 1]), "unknown_indices": np.array([2])},
         "record 0 has 'z' as label and as unknown"),
        ({"unknown_indptr": np.array([0, 0, 2, 2]), "unknown_indices": np.array([1, 1])},
         "unknown_indices must be ascending and unique"),
        ({"boxes": Boxes(np.array([0, 1]), np.array([0]), np.zeros((1, 4)))}, "cover 3 records"),
        ({"boxes": Boxes(np.array([0, 0, 0, 1]), np.array([0]), np.zeros((1, 3)))}, "xywh"),
    ],
)  # fmt: skip
def test_parts_must_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small_dataset(**changes)
