"""Datasets saved by the library `datasets`, with every kind of columns."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.images import decode_image, image_identity
from tests.data import sources


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    library.disable_progress_bars()
    return library


def picture(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (grey,) * 3).save(stream, "png")
    return stream.getvalue()


def table(datasets: Any, count: int, **columns: tuple[Any, list[Any]]) -> Any:
    """Records with a picture each and columns of a type."""
    features = {"image": datasets.Image()} | {name: kind for name, (kind, _) in columns.items()}
    values = {"image": [{"bytes": picture(i), "path": None} for i in range(count)]}
    values |= {name: given for name, (_, given) in columns.items()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def sets(dataset: Dataset) -> list[list[str]]:
    return [[dataset.label_names[i] for i in dataset.labels(r)] for r in range(len(dataset))]


def of_numbers(datasets: Any) -> dict[str, tuple[Any, list[Any], list[list[str]]]]:
    value, many = datasets.Value, datasets.Sequence
    names = datasets.ClassLabel(names=["cat", "dog", "owl"])
    return {
        "class labels": (many(names), [[2, 0], []], [["cat", "owl"], []]),
        "one class label": (names, [1, 0], [["dog"], ["cat"]]),
        "names": (many(value("string")), [["dog ", "cat"], []], [["cat", "dog"], []]),
        "multi-hot": (many(value("int8")), [[1, 0, 1], [0, 0, 0]], [["0", "2"], []]),
        "true and false": (many(value("bool")), [[True, False], [False, True]], [["0"], ["1"]]),
        "numbers": (many(value("int64")), [[2, 0], [1]], [["0", "2"], ["1"]]),
        "text": (value("string"), ["cat;dog", "['owl']"], [["cat", "dog"], ["owl"]]),
    }  # fmt: skip


CASES = ["class labels", "one class label", "names", "multi-hot", "true and false", "numbers",
         "text"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["disk", "parquet", "split"])
def test_columns_of_labels(datasets: Any, tmp_path: Path, case: str, form: str) -> None:
    kind, values, expected = of_numbers(datasets)[case]
    data = table(datasets, 2, labels=(kind, values))
    place = tmp_path / "data"
    if form == "disk":
        data.save_to_disk(place)
    elif form == "parquet":
        place.mkdir()
        place = place / "part.parquet"
        data.to_parquet(place)
    else:
        datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(place)
    dataset = load_dataset(f"hf:{place}")
    assert dataset.source == f"hf:{place}"
    assert sets(dataset) == expected * (2 if form == "split" else 1)
    names = {"disk": {"all"}, "parquet": {"train"}, "split": {"train", "val"}}
    assert set(dataset.splits) == names[form]
    if "class" in case:
        assert dataset.label_names == ("cat", "dog", "owl")
    images = dataset.images
    assert images is not None and dataset.image_paths is None
    greys = [decode_image(image).getpixel((0, 0)) for image in images]
    assert greys == [(0, 0, 0), (1, 1, 1)] * (len(greys) // 2)
    assert len({image_identity(image) for image in images}) == 2  # a split is the other's copy
    copy = pickle.loads(pickle.dumps(images[1]))
    assert decode_image(copy).getpixel((0, 0)) == (1, 1, 1)


def test_columns_that_are_one_label_each(datasets: Any, tmp_path: Path) -> None:
    value = datasets.Value
    table(
        datasets, 3, sky=(value("bool"), [True, False, None]), sea=(value("int8"), [0, 1, -1]),
    ).save_to_disk(tmp_path / "data")  # fmt: skip
    dataset = load_dataset(f"hf:{tmp_path / 'data'}")
    assert dataset.label_names == ("sky", "sea") and sets(dataset) == [["sky"], ["sea"], []]
    assert dataset.unknown_matrix().tolist() == [[False] * 2, [False] * 2, [True] * 2]
    assert load_dataset(f"hf:{tmp_path / 'data'},labels=sea,sky").label_names == ("sea", "sky")


def test_labels_inside_structs(datasets: Any, tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    objects = {"area": datasets.Sequence(datasets.Value("int64")),
               "category": datasets.Sequence(names)}  # fmt: skip
    given = [{"area": [3, 4], "category": [1, 1]}, {"area": [], "category": []}]
    table(datasets, 2, objects=(objects, given)).save_to_disk(tmp_path / "data")
    for option in ("", ",labels=objects.category"):
        assert sets(load_dataset(f"hf:{tmp_path / 'data'}{option}")) == [["dog"], []]


def test_a_folder_of_images(datasets: Any, tmp_path: Path) -> None:
    lines = {"train": [("a.png", ["x", "y"]), ("b.png", [])], "test": [("c.png", ["y"])]}
    for split, rows in lines.items():
        for grey, (name, _) in enumerate(rows):
            sources.write_picture(tmp_path / "set" / split / name, grey)
        text = "".join(json.dumps({"file_name": n, "tags": tags}) + "\n" for n, tags in rows)
        (tmp_path / "set" / split / "metadata.jsonl").write_text(text)
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert sets(dataset) == [["x", "y"], [], ["y"]]
    assert [path.name for path in dataset.image_paths or ()] == ["a.png", "b.png", "c.png"]
    assert set(dataset.splits) == {"train", "test"}


def test_web_dataset(datasets: Any, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "part.tar", "w") as archive:
        for i, labels in enumerate((["x"], ["x", "y"])):
            parts = {"png": picture(i), "json": json.dumps({"labels": labels}).encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    dataset = load_dataset(f"hf:{tmp_path / 'part.tar'}")
    assert sets(dataset) == [["x"], ["x", "y"]]
    assert decode_image(dataset.images[1]).getpixel((0, 0)) == (1, 1, 1)  # type: ignore[index]


def test_what_a_column_of_numbers_holds_is_decided_over_all_splits(
    datasets: Any, tmp_path: Path
) -> None:
    """The test split alone would look like 0 and 1 of two labels."""
    numbers = datasets.Sequence(datasets.Value("int64"))
    datasets.DatasetDict({
        "train": table(datasets, 2, labels=(numbers, [[2], [0, 1]])),
        "test": table(datasets, 1, labels=(numbers, [[0, 1]])),
    }).save_to_disk(tmp_path / "data")  # fmt: skip
    assert sets(load_dataset(f"hf:{tmp_path / 'data'}").split("test")) == [["0", "1"]]


def test_names_of_numbered_labels(datasets: Any, tmp_path: Path) -> None:
    numbers = datasets.Sequence(datasets.Value("int64"))
    table(datasets, 2, labels=(numbers, [[1, 0], [0, 0]])).save_to_disk(tmp_path / "data")
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    spec = f"hf:{tmp_path / 'data'},vocabulary={tmp_path / 'words.txt'}"
    problems = Problems()
    assert sets(load_dataset(spec, problems=problems)) == [["cat"], []]
    assert ["labels has 0 or 1 for each of 2 labels" in note for note in problems.notes] == [True]
    (tmp_path / "words.txt").write_text("cat\ndog\nowl\n")
    with pytest.raises(DataError, match="must have 0 or 1 for each of the 3 labels of the vocabul"):
        load_dataset(spec)


def test_rows_without_labels_are_left_out(datasets: Any, tmp_path: Path) -> None:
    names = datasets.Sequence(datasets.Value("string"))
    table(datasets, 3, tags=(names, [["x"], None, []])).save_to_disk(tmp_path / "data")
    with pytest.warns(UserWarning, match="1 rows have no labels and are left out, .*row 1 of all"):
        assert sets(load_dataset(f"hf:{tmp_path / 'data'}")) == [["x"], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "must have one column of labels .labels=COLUMN names one., found one, two"),
        (
            ",labels=three",
            "must have a column 'three' as labels=COLUMN asks for, found one, two, n",
        ),
        (
            ",labels=one,three",
            "must have a column 'three' as labels=COLUMN asks for, found one, two",
        ),
        (",image=two", "must have a column of images 'two' .*found image among image, one, two, n"),
        (",labels=one,n", r"row 0: column one must be 0 or 1, true or false, .* got \['x'\]"),
        (
            ",columns=x",
            "an option of hf must be one of image, labels, config, vocabulary, got 'col",
        ),
    ],
)
def test_columns_are_asked_for_by_name(
    datasets: Any, tmp_path: Path, options: str, message: str
) -> None:
    names = datasets.Sequence(datasets.Value("string"))
    columns = {"one": (names, [["x"]]), "two": (names, [["y"]]), "n": (datasets.Value("int8"), [1])}
    table(datasets, 1, **columns).save_to_disk(tmp_path / "data")
    assert sets(load_dataset(f"hf:{tmp_path / 'data'},labels=two")) == [["y"]]
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(f"hf:{tmp_path / 'data'}{options}")
    assert "\n" not in str(caught.value)


def test_errors(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    for name, message in (
        ("empty", "must be a dataset that can be loaded, got"),
        ("nowhere", "must be a folder, a file or a name on the hub, found none"),
        ("a.txt", "must end in .parquet, .arrow, .tar, got a.txt"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_dataset(f"hf:{tmp_path / name}")
        assert "\n" not in str(caught.value)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'datasets: pip install "cnnrnn\[datasets\]"'):
        load_dataset(f"hf:{tmp_path}")
