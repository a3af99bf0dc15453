"""`Dataset` made of images and labels in Python."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrnn
from cnnrnn.config import ModelConfig, Preprocessing, TrainConfig
from cnnrnn.data import BadImageError, DataError, Dataset, load_dataset
from cnnrnn.data.images import ImageRecords, image_batches, image_digest, image_identity
from tests.data import sources

LABELS = [["dog", "cat"], [], ["cat"]]
SQUARE = Preprocessing(image_size=4)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for grey in range(3):
        sources.write_picture(tmp_path / f"{grey}.png", 50 * grey)
    return [tmp_path / f"{grey}.png" for grey in range(3)]


def in_memory(files: list[Path], form: str) -> list[Any]:
    if form == "bytes":
        return [file.read_bytes() for file in files]
    if form == "pil":
        return [Image.open(file) for file in files]
    if form == "mixed":
        return [str(files[0]), files[1].read_bytes(), Image.open(files[2])]
    return [str(file) for file in files]


FORMS = ["paths", "bytes", "pil", "mixed"]


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels(files: list[Path], form: str) -> None:
    dataset = cnnrnn.Dataset(images=in_memory(files, form), labels=LABELS)
    assert dataset.label_names == ("cat", "dog")
    assert dataset.label_matrix().tolist() == [[True, True], [False, False], [True, False]]
    assert not dataset.unknown_matrix().any()
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {"all": [0, 1, 2]}
    assert dataset.image_paths == (tuple(files) if form == "paths" else None)
    part = dataset.select([2, 0])
    assert part.labels(1).tolist() == [0, 1] and part.rows.tolist() == [2, 0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_images_are_read_alike(files: list[Path], form: str, workers: int) -> None:
    expected = [50 * grey for grey in range(3)]
    dataset = Dataset(images=in_memory(files, form), labels=LABELS)
    batches = list(image_batches(dataset, SQUARE, batch_size=2, workers=workers))
    images = torch.cat([batch.images for batch in batches])
    assert images[:, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_image_is_named(files: list[Path], form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(files[0])
    files[0].write_bytes(files[0].read_bytes()[:5000])
    dataset = Dataset(images=in_memory(files, form), labels=LABELS)
    place = "0.png" if form in ("paths", "mixed") else "record 0 of python:Dataset"
    with pytest.raises(BadImageError, match=f"{place}.* must be a readable image, found: "):
        list(image_batches(dataset, SQUARE, batch_size=2))


def test_identities_and_digests(files: list[Path]) -> None:
    for form in FORMS:
        images = Dataset(images=in_memory(files, form), labels=LABELS).images
        again = Dataset(images=in_memory(files, form), labels=LABELS).images
        assert images is not None and again is not None
        for same in (image_identity, image_digest):
            assert [same(image) for image in images] == [same(image) for image in again]
            assert len({same(image) for image in images}) == 3


@pytest.mark.parametrize(
    "splits",
    [["Training", "valid", "Training"], {"train": [0, 2], "validation": [1]},
     {"train": np.array([0, 2]), "dev": [1]}],
)  # fmt: skip
def test_splits(files: list[Path], splits: Any) -> None:
    dataset = Dataset(images=files, labels=LABELS, splits=splits)
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [0, 2], "val": [1]
    }  # fmt: skip
    assert dataset.split("Validation").labels(0).tolist() == []
    assert dataset.split_name("TRAIN") == "train"
    with pytest.raises(DataError, match="no split 'testing', expected one of: train, val"):
        dataset.split("testing")


def test_label_names_give_the_order(files: list[Path]) -> None:
    dataset = Dataset(images=files, labels=LABELS, label_names=["dog", "bird", "cat"])
    assert dataset.label_names == ("dog", "bird", "cat") and dataset.labels(0).tolist() == [0, 2]


def test_labels_that_nobody_looked_for(files: list[Path]) -> None:
    dataset = Dataset(images=files, labels=LABELS, unknown=[[], ["emu", "cat"], ("dog",)])
    assert dataset.label_names == ("cat", "dog", "emu")  # emu is unknown everywhere it is named
    assert dataset.label_matrix().sum() == sum(map(len, LABELS))
    assert dataset.unknown_matrix().tolist() == [
        [False, False, False], [True, False, True], [False, True, False],
    ]  # fmt: skip
    assert Dataset(images=files, labels=LABELS).unknown_indices is None


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"labels": LABELS[:2]}, DataError, "images must be 2 like the label sets, got 3"),
        (
            {"labels": ["dog", [], []]},
            TypeError,
            "labels of image 0 must be a list of strings, got",
        ),
        ({"labels": [[], [3], []]}, TypeError, r"labels of image 1 must be a list .*got \[3\]"),
        (
            {"label_names": ["dog"]},
            DataError,
            "labels of image 0 must be among the 1 of label_names",
        ),
        (
            {"label_names": ["dog", "dog", "cat"]},
            DataError,
            "label names must be unique, got 'dog'",
        ),
        ({"unknown": ["dog", [], []]}, TypeError, "unknown of image 0 must be a list of strings"),
        (
            {"unknown": [["emu"], [], []], "label_names": ["dog", "cat"]},
            DataError,
            "unknown of image 0 must be among the 2 of label_names, got 'emu'",
        ),
        ({"unknown": [["dog"], [], []]}, DataError, "record 0 has 'dog' as label and as unknown"),
        ({"unknown": [[]]}, DataError, "unknown_indptr must cover 3 records, got 1"),
        ({"splits": ["train"]}, DataError, "the split of each of the 3 images, got"),
        ({"splits": "train"}, DataError, "the split of each of the 3 images, got 'train'"),
        (
            {"splits": ["val", "valid", "x"]},
            DataError,
            "one name for a split, got 'val' and 'valid'",
        ),
        ({"splits": {"a": [3]}}, DataError, r"split a must hold records 0\.\.2, got 3\.\.3"),
        ({"images": [1, 2, 3]}, TypeError, "image 0 must be a path, the bytes of an image file or"),
        ({"images": [io.BytesIO()] * 3}, TypeError, "image 0 must be a path, .*got BytesIO"),
    ],
)
def test_parts_are_checked(
    files: list[Path], parts: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Dataset(**{"images": files, "labels": LABELS, **parts})


@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_a_model_is_trained(tmp_path: Path, form: str) -> None:
    files = []
    for i in range(16):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (16, 16), ("red", "blue")[i % 2]).save(files[-1])
    dataset = Dataset(
        images=in_memory(files, form), labels=[[("red", "blue")[i % 2]] for i in range(16)],
        splits=["train"] * 8 + ["val"] * 4 + ["spare"] * 4,
    )  # fmt: skip
    said: list[str] = []
    small = ModelConfig(backbone="small", pretrained=False, freeze_backbone=True, image_size=16)
    config = TrainConfig(epochs=1, finish_epochs=0, device="cpu", workers=0)
    with pytest.warns(UserWarning, match=r"does not use the split spare \(4\)"):
        model = cnnrnn.train(
            dataset, out=tmp_path / "run", model=small, train=config, say=said.append
        )
    assert said[0] == "training on train (8 records), validating on val (4)"
    assert set(model.labels) == {"red", "blue"}
    assert (tmp_path / "run" / "best").is_dir()
    assert len(model.predict(in_memory(files[:2], form))) == 2


def test_max_pixels_stays_with_the_records(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,labels,split\na.png,x,train\n")
    made = Dataset([tmp_path / "a.png"], [["x"]], ["train"], max_pixels=599)
    for dataset in (made, load_dataset(f"csv:{tmp_path / 't.csv'}", max_pixels=599)):
        for part in (dataset, dataset.split("train"), dataset.select([0]), dataset.with_changes()):
            assert part.max_pixels == 599
            with pytest.raises(BadImageError, match="30x20 pixels, more than 599: max_pixels"):
                ImageRecords(part, Preprocessing(image_size=16))[0]
    message = "max_pixels must be at least 1, got 0"
    with pytest.raises(ValueError, match=message):
        Dataset([b""], [[]], max_pixels=0)
    with pytest.raises(ValueError, match=message):
        load_dataset("csv:x", max_pixels=0)
