from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cnnrnn.config import TableOptions
from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.sources.table import load_table
from tests.data import sources


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sources.write_csv(tmp_path / "table")


def label_names(dataset: Dataset) -> list[list[str]]:
    return [[dataset.label_names[i] for i in dataset.labels(r)] for r in range(len(dataset))]


def members(dataset: Dataset) -> dict[str, list[int]]:
    return {name: records.tolist() for name, records in dataset.splits.items()}


def test_everything_is_read(file: Path) -> None:
    dataset = load_dataset(f"csv:{file}")
    assert dataset.source == f"csv:{file}"
    assert dataset.label_names == ("boat", "sea", "sky", "traffic light")
    assert label_names(dataset) == [["sea", "sky"], [], ["traffic light"], ["boat", "sea", "sky"]]
    assert dataset.image_paths == tuple(file.parent / row[0] for row in sources.CSV_ROWS)
    assert members(dataset) == {"train": [0, 1], "val": [2], "test": [3]}


def test_the_table_of_fastai(file: Path) -> None:
    """fname, labels with spaces between, is_valid."""
    file.write_text("fname,labels,is_valid\na.png,chair person,True\nsub/b.png,car,False\n")
    dataset = load_dataset(f"csv:{file},delimiter=space")
    assert label_names(dataset) == [["chair", "person"], ["car"]]
    assert members(dataset) == {"val": [0], "train": [1]}


def test_the_table_of_planet(file: Path) -> None:
    """Names without their suffix."""
    file.write_text("image_name,tags\na,haze  primary\nsub/b,clear\n")
    dataset = load_dataset(f"csv:{file},delimiter=space,suffix=.png")
    assert label_names(dataset) == [["haze", "primary"], ["clear"]]
    assert members(dataset) == {"all": [0, 1]}


def test_columns_by_name(file: Path, tmp_path: Path) -> None:
    file.write_text("labels,what,where,part\nno,x|y,a.png,one\nno, y | z ,sub\\b.png,two\n")
    shutil.copytree(file.parent, tmp_path / "pictures")
    spec = f"csv:{file},image=where,labels=what,split=part,delimiter=|"
    dataset = load_dataset(spec, images=tmp_path / "pictures")
    assert label_names(dataset) == [["x", "y"], ["y", "z"]]
    assert members(dataset) == {"one": [0], "two": [1]}
    assert dataset.image_paths is not None
    assert dataset.image_paths[1] == tmp_path / "pictures" / "sub" / "b.png"


@pytest.mark.parametrize("text", ["image,labels\r\na.png,sky;sea\r\n", "\ufeffimage,labels\na.png,"
                                  '"sky;sea"', "image , labels\n\na.png,sea ; sky\n"])  # fmt: skip
def test_ways_to_write_a_table(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="")
    assert label_names(load_table(file)) == [["sea", "sky"]]


def test_a_comma_may_separate_labels(file: Path) -> None:
    file.write_text('image,labels\na.png,"sky,sea"\n')
    dataset = load_dataset(f"csv:{file},delimiter=,")
    assert label_names(dataset) == [["sea", "sky"]]


def test_a_folder_with_a_table_per_split(file: Path) -> None:
    file.unlink()
    (file.parent / "train.csv").write_text("image,labels\na.png,sky\n")
    (file.parent / "val.tsv").write_text("image\tlabels\nsub/b.png\tsky;sea, deep\n")
    dataset = load_table(file.parent)
    assert members(dataset) == {"train": [0], "val": [1]}
    assert label_names(dataset) == [["sky"], ["sea, deep", "sky"]]
    (file.parent / "val.tsv").write_text("image\tlabels\na.png\tsky\n")
    with pytest.raises(DataError, match="val.tsv, line 2: images must be unique, got 'a.png' as in "
                                        "train.csv, line 2"):  # fmt: skip
        load_table(file.parent)
    (file.parent / "val.csv").write_text("image,labels\na.png,sky\n")
    with pytest.raises(DataError, match="one table per split, found val.csv and val.tsv"):
        load_table(file.parent)


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_other_names_of_val(file: Path, name: str) -> None:
    text = file.read_text()
    file.write_text(text.replace("val", name))
    assert members(load_table(file)) == {"train": [0, 1], "val": [2], "test": [3]}
    file.write_text(text.replace("test", name))
    assert members(load_table(file)) == {"train": [0, 1], "val": [2], name: [3]}
    file.write_text("image,labels\na.png,sky\n")
    file.rename(file.with_name(f"{name}.csv"))
    assert members(load_table(file.parent)) == {"val": [0]}


def test_vocabulary(file: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("sky\nnever\nsea\ntraffic light\nboat\n")
    dataset = load_dataset(f"csv:{file},vocabulary={words}")
    assert dataset.label_names == ("sky", "never", "sea", "traffic light", "boat")
    assert [dataset.labels(i).tolist() for i in range(4)] == [[0, 2], [], [3], [0, 2, 4]]
    words.write_text("sky\nsea\nboat\n")
    with pytest.raises(DataError, match="labels.csv, line 4: labels must be among the 3 of the vo"
                                        "cabulary, got 'traffic light'"):  # fmt: skip
        load_table(file, options=TableOptions(vocabulary=str(words)))
    words.write_text("sky\nsea\nsky\n")
    with pytest.raises(DataError, match="words.txt, line 3: label must be unique, got 'sky' as in"):
        load_table(file, options=TableOptions(vocabulary=str(words)))


@pytest.mark.parametrize("labels", ["chair person", "chair|person", '"chair,person"'])
def test_a_forgotten_delimiter_is_an_error(file: Path, labels: str) -> None:
    file.write_text(f"image,labels\na.png,sky\nsub/b.png,{labels}\n")
    with pytest.raises(DataError, match="line 3: labels must be separated by ';', which no row"):
        load_table(file)
    dataset = load_table(file, options=TableOptions(delimiter=";"))
    assert label_names(dataset) == [["sky"], [labels.strip('"')]]


def test_one_table_of_a_folder_shows_the_delimiter(file: Path) -> None:
    file.rename(file.with_name("train.csv"))
    (file.parent / "val.csv").write_text("image,labels,split\nc d.png,traffic light,val\n")
    text = (file.parent / "train.csv").read_text()
    (file.parent / "train.csv").write_text(text.replace("c d.png,traffic light,val\n", ""))
    assert "traffic light" in load_table(file.parent).label_names


def test_headers_in_any_case(file: Path) -> None:
    file.write_text("Image,LABELS,Is_Valid\na.png,sky,1\nsub/b.png,sky,0\n")
    assert members(load_table(file)) == {"val": [0], "train": [1]}
    with pytest.raises(DataError, match="found 'Image', 'LABELS', 'Is_Valid' in the header row"):
        load_table(file, options=TableOptions(image="image"))


def test_suffixes_in_any_case(file: Path) -> None:
    file.unlink()
    (file.parent / "train.CSV").write_text("image,labels\na.png,sky\n")
    (file.parent / "val.TSV").write_text("image\tlabels\nsub/b.png\tsky\n")
    assert members(load_table(file.parent)) == {"train": [0], "val": [1]}


def test_the_home_folder_in_options(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words.txt").write_text("sky\nsea\nboat\ntraffic light\n")
    dataset = load_dataset(f"csv:{file},vocabulary=~/words.txt", images="~/table")
    assert dataset.label_names[0] == "sky"


def test_missing_images(file: Path) -> None:
    (file.parent / "c d.png").unlink()
    message = r"labels.csv: line 4 must exist as .*c d.png, found no such file \(1 of 4 images"
    with pytest.raises(DataError, match=message):
        load_table(file)
    with pytest.warns(UserWarning, match=message):
        dataset = load_table(file, on_bad_image="skip")
    assert label_names(dataset) == [["sea", "sky"], [], ["boat", "sea", "sky"]]
    assert members(dataset) == {"train": [0, 1], "test": [2]}


HEAD = "image,labels,split\n"
GOOD = HEAD + "a.png,sky;sea,train\n"
BAD_TABLES = {
    "empty": ("", "must have a column of image, image or fname .*found nothing"),
    "header alone": (HEAD, "must hold at least one image, got none"),
    "no image": ("x,labels\na.png,sky\n", r"column of image, .*image=COLUMN.*found 'x', 'labels'"),
    "no labels": ("image,x\na.png,sky\n", "column of labels, labels or tags or label"),
    "column twice": ("image,labels,image\na.png,sky,b\n", "columns must be unique, got 'image' tw"),
    "few cells": (GOOD + "sub/b.png,sky\n", "line 3 must have 3 cells like the header, got 2"),
    "many cells": (GOOD + "sub/b.png,sky,val,\n", "line 3 must have 3 cells like the header, got"),
    "open quote": (GOOD + '"sub/b.png,sky,val\n', "line 3: a row must be CSV, got unexpected end"),
    "odd quote": (GOOD + '"sub"/b.png,sky,val\n', "line 3: a row must be CSV, got ',' expected"),
    "endless cell": (GOOD + "x" * 200_000 + ",,\n", "line 3: a row must be CSV, got field larger"),
    "after a long row": (HEAD + 'a.png,"sky\n",train\n../b,sky,val\n', "line 4: an image must be"),
    "path empty": (GOOD + ",sky,val\n", r"line 3: .* inside the image folder, got '' \(empty\)"),
    "path up": (GOOD + "../b.png,sky,val\n", "line 3: .*leaves the folder"),
    "path up, backslash": (GOOD + "sub\\..\\..\\b.png,sky,val\n", "line 3: .*leaves the folder"),
    "path absolute": (GOOD + "/etc/passwd,sky,val\n", "line 3: .*absolute"),
    "path drive": (GOOD + "C:\\b.png,sky,val\n", "line 3: .*absolute"),
    "path NUL": (GOOD + "b\0.png,sky,val\n", "line 3: .*not a file name"),
    "path URL": (GOOD + "https://h/b.png,sky,val\n", "line 3: .*a URL"),
    "path long": (GOOD + "x" * 5000 + ",sky,val\n", "labels.csv: line 3 must exist as"),
    "image twice": (GOOD + "a.png,sky,val\n", "line 3: images must be unique, got 'a.png' as in"),
    "image twice, dot": (GOOD + "./a.png,sky,val\n", "line 3: images must .* './a.png' as in"),
    "image twice, slash": (GOOD + "a.png/,sky,val\n", "line 3: images must .* 'a.png/' as in"),
    "label control": (GOOD + '"sub/b.png","a\nb",val\n', r"line 3: .*control .*, got 'a\\nb'"),
    "split control": (GOOD + "sub/b.png,sky,v\x1bl\n", r"split must .*control .* got 'v\\x1bl'"),
    "label empty": (GOOD + "sub/b.png,sky;;sea,val\n", "line 3: labels must be non-empty names"),
    "label twice": (GOOD + "sub/b.png,sky;sky,val\n", "line 3: labels must be unique, got 'sky'"),
    "split empty": (GOOD + "sub/b.png,sky, \n", "line 3: split must be a non-empty name, got ' '"),
    "is_valid": ("image,labels,is_valid\na.png,sky,maybe\n", "is_valid must be true or false, got"),
    "no label": ("image,labels\na.png,\n", "must hold at least one label, got none in any row"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_errors_name_file_and_line(file: Path, case: str) -> None:
    text, message = BAD_TABLES[case]
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_table(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_not_utf8(file: Path) -> None:
    file.write_bytes(b"image,labels\na.png,\xe9t\xe9\n")
    with pytest.raises(DataError, match="labels.csv, line 2: text must be UTF-8, got byte 0xe9"):
        load_table(file)


def test_links_may_not_leave_the_image_folder(file: Path, tmp_path: Path) -> None:
    (file.parent / "a.png").rename(tmp_path / "a.png")
    (file.parent / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(DataError, match="labels.csv: line 2 must be a file inside .*which links"):
        load_table(file)


def test_layout_errors(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DataError, match="nowhere must be a table or a folder of tables, found no"):
        load_table(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold a table per split, such as train.csv, found no"):
        load_table(tmp_path)
    with pytest.raises(DataError, match="must come with an existing image folder, got .*nowhere"):
        load_table(file, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("delimiter=", "delimiter must not be empty"),
        (
            "columns=x",
            "option of csv must be one of image, labels, split, delimiter, suffix",
        ),
        ("image=x", "must have a column of image, 'x' .image=COLUMN names another., found 'image'"),
        ("split=x", "must have a column of split, 'x'"),
        ("vocabulary=nowhere", "nowhere must be a file, found no such file"),
    ],
)
def test_options_are_checked(file: Path, options: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(f"csv:{file},{options}")


def test_every_problem_is_kept(file: Path) -> None:
    file.write_text(file.read_text() + "a.png,sky,val\n..,sky,val\nx,y\nnowhere.png,sky,val\n")
    problems = Problems(keep=True)
    dataset = load_table(file, problems=problems)
    assert len(dataset) == 4
    assert [message.partition("labels.csv")[2][:8] for message in problems.messages] == [
        ", line 6", ", line 7", ", line 8", ": line 9"
    ]  # fmt: skip
