"""Time and memory of the data readers at full size, on generated sources.

    python -m benchmarks.data_sources FOLDER [NAME ...]

writes the sources into FOLDER if they are missing (2 GB, and 400,000 empty image files),
reads each in its own process and prints a table. Each source has the record count, the file
layout and about the file sizes of the data set that it is named after; its label sets are drawn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.search.label_sets import sample_label_sets

COCO_IMAGES, COCO_LABELS = 120_000, 80
NUS_IMAGES, NUS_CONCEPTS, NUS_TAGS = 269_648, 81, 1_000
VOC_IMAGES = 9_963
BLOCK = 4096


def write_coco(root: Path) -> None:
    """Write train2017: 2.5 objects per label and image, outlines of 6 to 39 points."""
    rng = np.random.default_rng(0)
    sets = sample_label_sets(COCO_IMAGES, COCO_LABELS)
    (root / "annotations").mkdir(parents=True)
    _touch(root / "train2017", [f"{i:012d}.jpg" for i in range(COCO_IMAGES)])
    with open(root / "annotations" / "instances_train2017.json", "w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for i in range(COCO_IMAGES):
            url = f"http://images.cocodataset.org/train2017/{i:012d}.jpg"
            flickr_url = f"http://farm9.staticflickr.com/8186/{i}_{i}_z.jpg"
            image = {
                "license": 3, "file_name": f"{i:012d}.jpg", "coco_url": url, "height": 480,
                "width": 640, "date_captured": "2013-11-14 11:18:45", "flickr_url": flickr_url,
                "id": i,
            }  # fmt: skip
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        number = 0
        for i, row in enumerate(sets):
            labels = np.flatnonzero(row)
            if not len(labels):
                continue
            more = rng.choice(labels, rng.poisson(1.5 * len(labels)))
            for label in np.concatenate([labels, more]):
                outline = np.round(rng.random(2 * rng.integers(6, 40)) * 640, 2).tolist()
                annotation = {
                    "segmentation": [outline], "area": round(rng.random() * 9e4, 5), "iscrowd": 0,
                    "image_id": i, "bbox": np.round(rng.random(4) * 300, 2).tolist(),
                    "category_id": int(label) + 1, "id": number,
                }  # fmt: skip
                file.write((", " if number else "") + json.dumps(annotation))
                number += 1
        categories = [{"supercategory": "x", "id": i + 1, "name": f"label {i}"}
                      for i in range(COCO_LABELS)]  # fmt: skip
        file.write('], "categories": ' + json.dumps(categories) + "}")


def write_nuswide(root: Path) -> None:
    """Write NUS-WIDE with 704 image folders, concepts and tags."""
    rng = np.random.default_rng(0)
    names = [f"concept{i % 704}\\{i:04d}_{2124494179 + i}.jpg" for i in range(NUS_IMAGES)]
    _touch(root / "Flickr", [name.replace("\\", "/") for name in names])
    for folder in ("ImageList", "Groundtruth/AllLabels", "NUS_WID_Tags", "ConceptsList"):
        (root / folder).mkdir(parents=True)
    training = rng.random(NUS_IMAGES) < 0.6
    for title, chosen in (("Image", training | True), ("TrainImage", training),
                          ("TestImage", ~training)):  # fmt: skip
        lines = [f"{name}\r\n" for name, keep in zip(names, chosen, strict=True) if keep]
        (root / "ImageList" / f"{title}list.txt").write_text("".join(lines), newline="")
    concepts = [f"concept{i}" for i in range(NUS_CONCEPTS)]
    (root / "ConceptsList" / "Concepts81.txt").write_text("\n".join(concepts) + "\n")
    for i, concept in enumerate(concepts):
        bits = (rng.random(NUS_IMAGES) < 0.3 / (i + 1)).astype(np.uint8)
        lines = np.stack([bits + ord("0"), np.full_like(bits, ord("\n"))], 1)
        lines.tofile(root / "Groundtruth" / "AllLabels" / f"Labels_{concept}.txt")
    tags = root / "NUS_WID_Tags"
    (tags / "TagList1k.txt").write_text("".join(f"tag{i}\n" for i in range(NUS_TAGS)))
    chance = 0.3 / np.arange(1, NUS_TAGS + 1) ** 0.6
    with open(tags / "AllTags1k.txt", "wb") as file:
        for start in range(0, NUS_IMAGES, BLOCK):
            count = min(BLOCK, NUS_IMAGES - start)
            lines = np.full((count, 2 * NUS_TAGS + 2), ord("\t"), np.uint8)
            lines[:, : 2 * NUS_TAGS : 2] = (rng.random((count, NUS_TAGS)) < chance) + ord("0")
            lines[:, -2:] = list(b"\r\n")
            file.write(lines.tobytes())


def write_voc(root: Path) -> None:
    """Write VOC 2007: 9,963 annotations of 3 objects each, with the 20 label files per split."""
    from cnnrnn.data.sources.voc import VOC_LABELS

    rng = np.random.default_rng(0)
    ids = [f"{i:06d}" for i in range(1, VOC_IMAGES + 1)]
    _touch(root / "JPEGImages", [f"{image_id}.jpg" for image_id in ids])
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (root / "Annotations").mkdir()
    marks = np.full((VOC_IMAGES, len(VOC_LABELS)), -1)
    for i, image_id in enumerate(ids):
        objects = ""
        for label, difficult in zip(rng.integers(0, 20, 3), rng.random(3) < 0.15, strict=True):
            marks[i, label] = max(marks[i, label], 0 if difficult else 1)
            objects += (
                f"\t<object>\n\t\t<name>{VOC_LABELS[label]}</name>\n\t\t<pose>Left</pose>\n"
                f"\t\t<truncated>0</truncated>\n\t\t<difficult>{int(difficult)}</difficult>\n"
                "\t\t<bndbox>\n\t\t\t<xmin>48</xmin>\n\t\t\t<ymin>240</ymin>\n\t\t\t<xmax>195"
                "</xmax>\n\t\t\t<ymax>371</ymax>\n\t\t</bndbox>\n\t</object>\n"
            )
        (root / "Annotations" / f"{image_id}.xml").write_text(
            f"<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>{image_id}.jpg</filename>\n"
            f"\t<segmented>0</segmented>\n{objects}</annotation>\n"
        )
    for split, rows in (("trainval", range(5011)), ("test", range(5011, VOC_IMAGES))):
        (main / f"{split}.txt").write_text("".join(f"{ids[row]}\n" for row in rows))
        for label, name in enumerate(VOC_LABELS):
            lines = [f"{ids[row]} {marks[row, label]:2d}\n" for row in rows]
            (main / f"{name}_{split}.txt").write_text("".join(lines))


def write_csv(root: Path) -> None:
    """Write COCO's label sets as a table."""
    sets = sample_label_sets(COCO_IMAGES, COCO_LABELS)
    names = [f"{i:012d}.jpg" for i in range(COCO_IMAGES)]
    _touch(root / "images", names)
    lines = [
        f"images/{name},{';'.join(f'label {label}' for label in np.flatnonzero(row))},train\n"
        for name, row in zip(names, sets, strict=True)
    ]
    (root / "labels.csv").write_text("image,labels,split\n" + "".join(lines))


def _touch(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


SOURCES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "coco": ("coco:{}", write_coco, "annotations/instances_train2017.json"),
    "voc": ("voc:{}", write_voc, "Annotations"),
    "nuswide": ("nuswide:{}", write_nuswide, "Groundtruth"),
    "nuswide tags": ("nuswide:{},labels=tags", write_nuswide, "NUS_WID_Tags"),
    "csv": ("csv:{}/labels.csv", write_csv, "labels.csv"),
}


def measure(what: str, argument: str) -> None:
    """Print seconds, peak and resident MiB after reading, both above what the imports take."""
    from cnnrnn.data import load_dataset

    for module in ("pycocotools.coco", "defusedxml.ElementTree"):
        __import__(module)
    before = _status("VmRSS")
    started = time.perf_counter()
    if what == "json":
        with open(argument) as file:
            kept: object = json.load(file)
        records = 0
    else:
        kept = dataset = load_dataset(argument)
        records = len(dataset)
    seconds = time.perf_counter() - started
    after = _status("VmRSS")
    print(json.dumps([records, seconds, _status("VmHWM") - before, after - before]))
    del kept


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(f"this system does not say {name}")


def _measured(what: str, argument: str) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.data_sources", "--measure", what, argument]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    values: list[float] = json.loads(result.stdout)
    return values


def main() -> None:
    """Write what is missing, measure, print."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the sources are, or are written")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}")
    options = parser.parse_args()
    folder = options.folder
    print("| source | records | file, MiB | seconds | peak, MiB | after, MiB |")
    print("|---|---|---|---|---|---|")
    for name in options.names or SOURCES:
        spec, write, part = SOURCES[name]
        root = folder / name.split()[0]
        if not root.exists():
            write(root)
        files = [root / part] if (root / part).is_file() else (root / part).rglob("*.*")
        size = sum(file.stat().st_size for file in files) / 2**20
        rows = [(f"`{spec.format('ROOT')}`", _measured("load", spec.format(root)))]
        if name == "coco":
            rows.append(("its file by `json.load`", _measured("json", str(root / part))))
        for title, (records, seconds, peak, after) in rows:
            print(f"| {title} | {records:,.0f} | {size:,.0f} | {seconds:.1f} | {peak:,.0f} | "
                  f"{after:,.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
