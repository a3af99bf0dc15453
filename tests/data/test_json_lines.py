from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cnnrnn.cli.output import prediction_writer
from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.sources.json_lines import load_json_lines
from cnnrnn.prediction.result import Prediction
from tests.data import sources

NAMES = ("a.png", "sub/b.png", "c.png")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for grey, name in enumerate(NAMES):
        sources.write_picture(tmp_path / name, grey)
    return tmp_path / "list.jsonl"


def read(file: Path, *lines: Any, **options: Any) -> Dataset:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return load_json_lines(file, **options)


def sets(dataset: Dataset) -> dict[str, list[str]]:
    return {
        str(path): [dataset.label_names[label] for label in dataset.labels(i)]
        for i, path in enumerate(dataset.image_paths or ())
    }


@pytest.mark.parametrize("image", ["image", "path", "file_name", "source"])
@pytest.mark.parametrize("labels", ["labels", "tags"])
def test_keys(file: Path, image: str, labels: str) -> None:
    dataset = read(
        file, {image: "a.png", labels: ["x", "y"]}, "", {image: "sub\\b.png", labels: []}
    )
    assert dataset.source == f"jsonl:{file}" and list(dataset.splits) == ["all"]
    assert sets(dataset) == {f"{file.parent}/a.png": ["x", "y"], f"{file.parent}/sub/b.png": []}


def test_predictions_are_read_again(file: Path) -> None:
    """Lines as the command line writes them, with an error and with labels put right by hand."""
    stream = io.StringIO()
    write = prediction_writer("jsonl", stream)
    write(Prediction(str(file.parent.resolve() / "a.png"), "no image in a known format"))
    made = {"image": "c.png", "labels": ["x"], "log_prob": -0.1, "scores": {"x": 0.9}}
    with pytest.warns(
        UserWarning, match="1 lines have an error or no labels, .*: line 1 has an er"
    ):
        dataset = read(file, stream.getvalue().strip(), made)
    assert sets(dataset) == {f"{file.parent}/c.png": ["x"]}


def test_lines_without_labels_are_counted(file: Path) -> None:
    with pytest.warns(UserWarning, match="2 lines have an error or no labels, the first: line 2"):
        dataset = read(
            file, {"image": "a.png", "labels": ["x"]}, {"image": "c.png"},
            {"image": "c.png", "labels": None},
        )  # fmt: skip
    assert len(dataset) == 1


def test_splits_and_numbers(file: Path) -> None:
    dataset = read(
        file, {"image": "a.png", "labels": [3, "x"], "split": "Training"},
        {"image": "c.png", "labels": ["x "], "split": "dev"},
    )  # fmt: skip
    assert dataset.label_names == ("3", "x")
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [0], "val": [1]
    }  # fmt: skip


def test_lines_of_one_image_are_joined(file: Path) -> None:
    problems = Problems()
    dataset = read(
        file, {"image": "a.png", "labels": ["x"]}, {"image": "./a.png", "labels": ["y", "x"]},
        problems=problems,
    )  # fmt: skip
    assert sets(dataset) == {f"{file.parent}/a.png": ["x", "y"]}
    assert ["1 rows are joined" in note for note in problems.notes] == [True]


def test_another_image_folder(file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "lists" / "list.jsonl"
    moved.parent.mkdir()
    moved.write_text('{"image": "a.png", "labels": ["x"]}\n')
    for spec, images in ((f"jsonl:{moved},images={tmp_path}", None), (f"jsonl:{moved}", tmp_path)):
        assert load_dataset(spec, images=images).image_paths == (tmp_path / "a.png",)


def test_a_vocabulary(file: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("z\nx\n")
    file.write_text('{"image": "a.png", "labels": ["x"]}\n')
    assert load_dataset(f"jsonl:{file},vocabulary={tmp_path}/words.txt").label_names == ("z", "x")
    file.write_text('{"image": "a.png", "labels": ["y"]}\n')
    with pytest.raises(
        DataError, match="line 1: labels must be among the 2 of the vocabulary, got"
    ):
        load_dataset(f"jsonl:{file},vocabulary={tmp_path}/words.txt")


GOOD = {"image": "a.png", "labels": ["x"]}
BAD_LINES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line 2 must be a JSON object, got Expecting"),
    "deep": ("[" * 100_000, "line 2 must be a JSON object, got"),
    "list": ([1], r"line 2 must be a JSON object, got \[1\]"),
    "no image": ({"labels": []}, "line 2 must name an image as image or path .* found 'lab"),
    "path up": ({"image": "../a.png", "labels": []}, "line 2: an image .* '../a.png' .leaves"),
    "path number": ({"image": 3, "labels": []}, "line 2: an image .* got 3 .not a string"),
    "absolute": ({"image": "/etc/passwd", "labels": []}, "line 2: an image must .*absolute"),
    "missing": ({"image": "z.png", "labels": []}, "line 2 must exist as .*z.png, found no such"),
    "labels text": ({"image": "c.png", "labels": "x"}, "line 2: labels must be a list .* got 'x'"),
    "labels none": ({"image": "c.png", "tags": [None]}, r"line 2: tags must be .*\[None\]"),
    "label empty": ({"image": "c.png", "labels": [" "]}, "line 2: labels must be a list of non-em"),
    "label bool": ({"image": "c.png", "labels": [True]}, r"line 2: labels must .*got \[True\]"),
    "label twice": ({"image": "c.png", "labels": ["x", "x"]}, "line 2: labels must be unique, got"),
    "label control": ({"image": "c.png", "labels": ["\x07"]}, "line 2: labels .* control charact"),
    "split": ({"image": "c.png", "labels": [], "split": 1}, "line 2: split must be .* got 1"),
    "two splits": ({**GOOD, "split": "val"}, "line 2: an image must be in one split, got 'a.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_errors_name_file_and_line(file: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    with pytest.raises(DataError, match=message) as caught:
        read(file, GOOD, line)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_every_problem_is_kept(file: Path) -> None:
    problems = Problems(keep=True)
    lines = [line for line, _ in BAD_LINES.values()]
    assert len(read(file, GOOD, *lines, problems=problems)) == 1
    assert len(problems.messages) == len(lines)


def test_empty_files(file: Path) -> None:
    with pytest.raises(DataError, match="list.jsonl must hold at least one image, got none"):
        read(file)
    with pytest.raises(DataError, match="list.jsonl must hold at least one label, got none in any"):
        read(file, {"image": "a.png", "labels": []})
    with pytest.raises(DataError, match="nowhere.jsonl must be a file, found no such file"):
        load_json_lines(file.with_name("nowhere.jsonl"))
