"""Small valid sources on disk, one per format, for the tests to read and to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VOC_IMAGES = ("000001", "000002", "2008_000003", "000004")
# name, difficult, box; 000002 has a dog that is only difficult, 2008_000003 one of each kind.
VOC_OBJECTS: dict[str, list[tuple[str, int, tuple[float, float, float, float]]]] = {
    "000001": [("dog", 0, (2, 1, 4, 6)), ("person", 0, (1, 1, 8, 6))],
    "000002": [("dog", 1, (1, 1, 2, 2)), ("cat", 0, (3, 3, 3, 3))],
    "2008_000003": [("dog", 1, (1, 1, 2, 2)), ("dog", 0, (1.5, 2, 3.25, 4))],
    "000004": [],
}
VOC_SPLITS = {
    "train": ("000001", "2008_000003"),
    "val": ("000002",),
    "trainval": ("000001", "000002", "2008_000003"),
    "test": ("000004",),
}


def write_picture(file: Path, grey: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (grey,) * 3).save(file)


def voc_xml(image_id: str, objects: list[Any]) -> str:
    body = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
        f"<difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>\n"
        for name, difficult, box in objects
    )
    return (
        f"<annotation>\n<folder>VOC2007</folder><filename>{image_id}.jpg</filename>"
        "<size><width>8</width><height>6</height><depth>3</depth></size>"
        f"<segmented>0</segmented>{body}</annotation>\n"
    )


def write_voc(root: Path) -> Path:
    """VOC2007 in a VOCdevkit, with the label files of dog and person."""
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (root / "Annotations").mkdir()
    for grey, image_id in enumerate(VOC_IMAGES):
        write_picture(root / "JPEGImages" / f"{image_id}.jpg", grey)
        text = voc_xml(image_id, VOC_OBJECTS[image_id])
        (root / "Annotations" / f"{image_id}.xml").write_text(text)
    for split, ids in VOC_SPLITS.items():
        (main / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
        for label in ("dog", "person"):
            lines = []
            for image_id in ids:
                marks = [o[1] for o in VOC_OBJECTS[image_id] if o[0] == label]
                lines.append(f"{image_id} {-1 if not marks else 0 if all(marks) else 1:2d}\n")
            (main / f"{label}_{split}.txt").write_text("".join(lines))
    return root


NUS_IMAGES = ("actor\\0001_21.jpg", "actor\\0002_22.jpg", "zoo\\0001_23.jpg", "zoo\\0004_9.jpg")
NUS_CONCEPTS = {"airport": (0, 0, 1, 0), "sky": (1, 0, 1, 0), "zebra": (0, 0, 0, 1)}
NUS_TAGS = {"blue": (1, 1, 0, 0), "d'été": (0, 1, 0, 1)}
NUS_SPLITS = {"Train": (3, 0), "Test": (1, 2)}


def write_nuswide(root: Path) -> Path:
    (root / "ImageList").mkdir(parents=True)
    for folder in ("Groundtruth/AllLabels", "Groundtruth/TrainTestLabels", "NUS_WID_Tags"):
        (root / folder).mkdir(parents=True)
    for grey, name in enumerate(NUS_IMAGES):
        write_picture(root / "Flickr" / name.replace("\\", "/"), grey)
    (root / "ImageList" / "Imagelist.txt").write_text("".join(f"{n}\r\n" for n in NUS_IMAGES))
    (root / "Concepts81.txt").write_text("".join(f"{name}\n" for name in NUS_CONCEPTS))
    for name, bits in NUS_CONCEPTS.items():
        labels = root / "Groundtruth" / "AllLabels" / f"Labels_{name}.txt"
        labels.write_text("".join(f"{bit}\n" for bit in bits))
    for split, rows in NUS_SPLITS.items():
        images = root / "ImageList" / f"{split}Imagelist.txt"
        images.write_text("".join(f"{NUS_IMAGES[row]}\n" for row in rows))
        for name, bits in NUS_CONCEPTS.items():
            labels = root / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{split}.txt"
            labels.write_text("".join(f"{bits[row]}\n" for row in rows))
    tags = root / "NUS_WID_Tags"
    (tags / "TagList1k.txt").write_text("".join(f"{name}\n" for name in NUS_TAGS))
    rows = zip(*NUS_TAGS.values(), strict=True)
    (tags / "AllTags1k.txt").write_text(
        "".join("\t".join(map(str, row)) + "\t\r\n" for row in rows), newline=""
    )
    return root


CSV_ROWS = (
    ("a.png", "sky;sea", "train"),
    ("sub/b.png", "", "train"),
    ("c d.png", "traffic light", "val"),
    ("e.png", "sea;sky;boat", "test"),
)


def write_csv(root: Path) -> Path:
    root.mkdir(parents=True)
    for grey, (name, _, _) in enumerate(CSV_ROWS):
        write_picture(root / name, grey)
    file = root / "labels.csv"
    file.write_text("image,labels,split\n" + "".join(f"{','.join(row)}\n" for row in CSV_ROWS))
    return file


def write_columns(root: Path) -> Path:
    """A table with a column per label."""
    root.mkdir(parents=True)
    lines = ["image;sky;sea;split"]
    for grey, marks in enumerate(("1;0;train", "?;1;train", "0;-1;val")):
        write_picture(root / f"{grey}.png", grey)
        lines.append(f"{grey}.png;{marks}")
    file = root / "labels.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def write_json_lines(root: Path) -> Path:
    root.mkdir(parents=True)
    file = root / "list.jsonl"
    lines = []
    for grey, (name, labels, split) in enumerate(CSV_ROWS):
        write_picture(root / name, grey)
        lines.append({"image": name, "labels": labels.split(";") if labels else [], "split": split})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


SVMLIGHT = "0,2 1:0.5 3:2\n\n 2:1e-3 # no labels\n2 1:-1\n"


def write_svmlight(root: Path) -> Path:
    root.mkdir(parents=True)
    (root / "train.svm").write_text(SVMLIGHT)
    (root / "test.svm").write_text("1 4:7\n")
    return root


def write_npz(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        file, features=np.arange(6.0).reshape(3, 2), labels=np.array([[1, 0], [0, 0], [1, 1]]),
        label_names=np.array(["a", "b"]), split=np.array(["train", "val", "train"]),
    )  # fmt: skip
    return file


def write_coco(root: Path) -> Path:
    """Two splits, with outlines."""
    for suffix, first in (("train2017", 0), ("val2017", 2)):
        for image_id in (first, first + 1):
            write_picture(root / suffix / f"{image_id}.png", image_id)
        data = {
            "info": {"year": 2017},
            "images": [
                {"id": i, "file_name": f"{i}.png", "height": 6, "width": 8}
                for i in (first, first + 1)
            ],
            "annotations": [
                {"id": 10 * first + label, "image_id": first + label % 2, "category_id": label,
                 "bbox": [1, 2, 3.5, 2], "iscrowd": 0, "area": 7.0,
                 "segmentation": [[1, 2, 3.5, 2, 3, 4]]}
                for label in (1, 2, 3)
            ],
            "categories": [{"id": i, "name": name} for i, name in ((1, "x"), (2, "y"), (3, "z"))],
        }  # fmt: skip
        file = root / "annotations" / f"instances_{suffix}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data))
    return root
