from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from cnnrnn.config import TableOptions
from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.sources.table import load_table
from tests.data import sources
from tests.nobody import as_nobody


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
    with pytest.raises(DataError, match="val.tsv, line 2: an image must be in one split, got 'a.png"
                                        "' in val, and in train by train.csv, line 2"):  # fmt: skip
        load_table(file.parent)
    (file.parent / "val.csv").write_text("image,labels\na.png,sky\n")
    with pytest.raises(DataError, match="one table per split, found val.csv and val.tsv"):
        load_table(file.parent)


@pytest.mark.parametrize(
    ("usual", "name"),
    [("val", "valid"), ("val", "VALIDATION"), ("val", "Dev"), ("train", "Training"),
     ("train", "TRAIN"), ("test", "testing"), ("test", "Test ")],
)  # fmt: skip
def test_names_of_splits(file: Path, usual: str, name: str) -> None:
    text = file.read_text()
    file.write_text(text.replace(f",{usual}\n", f",{name}\n"))
    assert members(load_table(file)) == {"train": [0, 1], "val": [2], "test": [3]}
    other = "test" if usual != "test" else "val"
    file.write_text(text.replace(f",{other}\n", f",{name}\n"))
    if name.strip().lower() == usual:
        assert len(load_table(file).splits) == 2
    else:
        with pytest.raises(DataError, match=f"one name for a split, got .* both mean {usual}"):
            load_table(file)
    file.write_text("image,labels\na.png,sky\n")
    file.rename(file.with_name(f"{name.strip()}.csv"))
    assert members(load_table(file.parent)) == {usual: [0]}


def test_tables_of_one_split(file: Path) -> None:
    file.rename(file.with_name("train.csv"))
    (file.parent / "Train.tsv").write_text("image\tlabels\na.png\tsky\n")
    with pytest.raises(DataError, match="one table per split, found Train.tsv and train.csv"):
        load_table(file.parent)


def test_other_splits_keep_their_names(file: Path) -> None:
    file.write_text(file.read_text().replace(",val\n", ",Hold-out\n"))
    assert members(load_table(file)) == {"train": [0, 1], "Hold-out": [2], "test": [3]}


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


@pytest.mark.parametrize(
    ("cells", "expected", "said"),
    [
        (["a;b", "c"], [["a", "b"], ["c"]], "separated by ';'"),
        (["a|b", "c, d"], [["a", "b"], ["c, d"]], "separated by '|'"),
        (["a|b;c", "d|e"], [["a|b", "c"], ["d|e"]], "separated by ';'"),
        (["a, b", "c"], [["a", "b"], ["c"]], "separated by ','"),
        (["['a;b', 'c']", "d,e"], [["a;b", "c"], ["d", "e"]], "separated by ','"),
        (["a", "b"], [["a"], ["b"]], "a cell is one label"),
    ],
)
def test_the_first_sign_that_a_cell_has_separates_labels(
    file: Path, cells: list[str], expected: list[list[str]], said: str
) -> None:
    file.write_text(f'image,labels\na.png,"{cells[0]}"\nsub/b.png,"{cells[1]}"\n')
    problems = Problems()
    assert label_names(load_table(file, problems=problems)) == expected
    assert [note for note in problems.notes if said in note]


def test_without_a_delimiter_a_cell_is_one_label(file: Path) -> None:
    file.write_text('image,labels\na.png,"sky, sea"\nsub/b.png,sky;land\n')
    dataset = load_dataset(f"csv:{file},delimiter=none")
    assert label_names(dataset) == [["sky, sea"], ["sky;land"]]


def test_a_delimiter_that_no_cell_has(file: Path) -> None:
    file.write_text("image,labels\na.png,sky|sea\nsub/b.png,sky\n")
    with pytest.warns(UserWarning, match="no cell of labels has the delimiter ';', some have '|'"):
        dataset = load_dataset(f"csv:{file},delimiter=;")
    assert label_names(dataset) == [["sky|sea"], ["sky"]]


def test_names_may_hold_white_space(file: Path) -> None:
    file.write_text("image,labels\na.png,traffic light\nsub/b.png,sky\n")
    with pytest.warns(UserWarning, match="line 2: 'traffic light' is taken for one label"):
        assert label_names(load_table(file)) == [["traffic light"], ["sky"]]


def test_cells_that_combine_words_have_a_delimiter(file: Path) -> None:
    """With either of the two that the error names, labels are as it says."""
    cells = ["car person", "car", "person", "bus person"]
    names = [row[0] for row in sources.CSV_ROWS]
    lines = [f"{name},{cell}\n" for name, cell in zip(names, cells, strict=True)]
    file.write_text("image,labels\n" + "".join(lines))
    message = "line 2: labels must be separated .* got 'car person' among .*: say delimiter=space"
    with pytest.raises(DataError, match=message):
        load_table(file)
    parts = load_dataset(f"csv:{file},delimiter=space")
    assert label_names(parts) == [["car", "person"], ["car"], ["person"], ["bus", "person"]]
    assert label_names(load_dataset(f"csv:{file},delimiter=none")) == [[cell] for cell in cells]


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
    "path of many folders": (GOOD + "a/" * 60_000 + "b.png,sky,val\n", "line 3 must exist as"),
    "two splits": (GOOD + "a.png,sky,val\n", "line 3: an image must be in one split, got 'a.png'"),
    "two splits, dot": (GOOD + "./a.png,sky,val\n", "line 3: an image must .* and in train by"),
    "two splits, slash": (GOOD + "a.png/,sky,val\n", "line 3: an image must be in one split, got"),
    "label control": (GOOD + '"sub/b.png","a\nb",val\n', r"line 3: .*control .*, got 'a\\nb'"),
    "split control": (GOOD + "sub/b.png,sky,v\x1bl\n", r"split must .*control .* got 'v\\x1bl'"),
    "label twice": (GOOD + "sub/b.png,sky;sky,val\n", "line 3: labels must be unique, got 'sky'"),
    "split empty": (GOOD + "sub/b.png,sky, \n", "line 3: split must be a non-empty name, got ''"),
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
            "option of csv must be one of image, labels, split, delimiter, separator, encoding",
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
    assert sorted(message.partition("labels.csv")[2][:8] for message in problems.messages) == [
        ", line 6", ", line 7", ", line 8", ": line 9"
    ]  # fmt: skip


# One column per label.


def unknown_names(dataset: Dataset) -> list[list[str]]:
    return [
        [name for name, on in zip(dataset.label_names, row, strict=True) if on]
        for row in dataset.unknown_matrix().tolist()
    ]


@pytest.mark.parametrize(
    ("present", "absent", "unknown"),
    [("1", "0", ""), ("1.0", "0.0", "-1.0"), ("True", "FALSE", "?"), ("yes", "No", "-1"),
     (" 1", "0 ", "nan")],
)  # fmt: skip
def test_a_column_per_label(file: Path, present: str, absent: str, unknown: str) -> None:
    file.write_text(
        f"image,sky,sea,split\na.png,{present},{absent},train\nsub/b.png,{unknown},{present},val\n"
    )
    dataset = load_table(file)
    assert dataset.label_names == ("sky", "sea")
    assert label_names(dataset) == [["sky"], ["sea"]]
    assert unknown_names(dataset) == [[], ["sky"]]
    assert members(dataset) == {"train": [0], "val": [1]}
    assert unknown_names(dataset.split("val")) == [["sky"]]


def test_without_unknown_cells_there_are_no_unknown_labels(file: Path) -> None:
    file.write_text("image,sky\na.png,1\nsub/b.png,0\n")
    assert load_table(file).unknown_indices is None


def test_the_numbering_of_pandas_is_no_label(file: Path) -> None:
    file.write_text(",image,sky,sea\n0,a.png,1,0\n1,sub/b.png,0,1\n")
    assert load_table(file).label_names == ("sky", "sea")


WIDE = "id,image,sky,sea,land,note\n7,a.png,1,0,?,dim\n8,sub/b.png,0,1,1,\n"


@pytest.mark.parametrize(
    ("option", "names", "sets"),
    [
        ("sky..land", ("sky", "sea", "land"), [["sky"], ["sea", "land"]]),
        ("sky,land", ("sky", "land"), [["sky"], ["land"]]),
        ("sea..land,sky", ("sea", "land", "sky"), [[("sky")], ["sea", "land"]]),
        ("sea", ("sea",), [[], ["sea"]]),
        ("note", ("dim",), [["dim"], []]),
    ],
)
def test_columns_of_labels_by_name(
    file: Path, option: str, names: tuple[str, ...], sets: list[list[str]]
) -> None:
    file.write_text(WIDE)
    dataset = load_dataset(f"csv:{file},labels={option}")
    assert dataset.label_names == names and label_names(dataset) == sets


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            None,
            "columns that are each 0 or 1, .* got '7' in column 'id' in line 2, found 'id'",
        ),
        ("sky..nowhere", "column of labels, 'nowhere' .*found 'id', 'image', 'sky', 'sea', 'land'"),
        ("sky,nowhere", "column of labels, 'nowhere' .*found 'id', 'image', 'sky', 'sea', 'land'"),
        ("land..sky", "labels must name a range of columns from left to right, got 'land..sky'"),
        ("sky..note", "line 2: column 'note' must be 0 or 1, true or false, .* got 'dim'"),
        ("weather", "column of labels, 'weather' .*found 'id', 'image', 'sky', 'sea', 'land'"),
    ],
)
def test_errors_of_columns_of_labels(file: Path, option: str | None, message: str) -> None:
    file.write_text(WIDE)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(f"csv:{file}" + ("" if option is None else f",labels={option}"))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_label_without_a_column_is_unknown_in_that_table(file: Path) -> None:
    file.unlink()
    (file.parent / "train.csv").write_text("image,sky,sea\na.png,1,0\n")
    (file.parent / "val.csv").write_text("image,sky\nsub/b.png,1\n")
    with pytest.warns(UserWarning, match="val.csv has no column 'sea' as other tables have; these"):
        dataset = load_table(file.parent)
    assert label_names(dataset) == [["sky"], ["sky"]] and unknown_names(dataset) == [[], ["sea"]]


def test_a_vocabulary_orders_columns(file: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("sea\nsky\n")
    file.write_text("image,sky,sea\na.png,1,0\n")
    assert load_dataset(f"csv:{file},vocabulary={tmp_path}/words.txt").label_names == ("sea", "sky")
    (tmp_path / "words.txt").write_text("sea\n")
    with pytest.raises(
        DataError, match="line 2: labels must be among the 1 of the vocabulary, got"
    ):
        load_dataset(f"csv:{file},vocabulary={tmp_path}/words.txt")


# What separates cells, and how text is encoded.


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv"])
def test_the_separator_is_what_fits_the_header(file: Path, sign: str, name: str) -> None:
    file = file.rename(file.with_name(name))
    rows = [("place", "image", "labels"), ("a; b", "a.png", "sky"), ("c, d", "sub/b.png", "sea")]
    file.write_text("".join(sign.join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    problems = Problems()
    assert label_names(load_table(file, problems=problems)) == [["sky"], ["sea"]]
    usual = "\t" if name.endswith("tsv") else ","
    assert any("are separated by" in note for note in problems.notes) == (sign != usual)


@pytest.mark.parametrize(
    ("option", "sign"),
    [("semicolon", ";"), (";", ";"), ("tab", "\t"), ("pipe", "|"), ("comma", ","), (",", ",")],
)
def test_a_separator_by_name(file: Path, option: str, sign: str) -> None:
    file.write_text(f"image{sign}labels\na.png{sign}sky\n")
    assert label_names(load_dataset(f"csv:{file},separator={option}")) == [["sky"]]
    with pytest.raises(DataError, match="separator must be comma, semicolon, tab or pipe, got '/'"):
        load_dataset(f"csv:{file},separator=/")


def test_the_separator_that_excel_is_told(file: Path) -> None:
    file.write_text("sep=;\nimage;labels\na.png;sky\n")
    assert label_names(load_table(file)) == [["sky"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_encodings_by_byte_order_mark(file: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    file.write_bytes((mark + "image,labels\na.png,été;sky\n").encode(encoding))
    assert label_names(load_table(file)) == [["sky", "été"]]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp850", "utf-8"])
def test_an_encoding_by_name(file: Path, encoding: str) -> None:
    file.write_bytes("image,labels\na.png,été\n".encode(encoding))
    assert label_names(load_dataset(f"csv:{file},encoding={encoding}")) == [["été"]]


def test_errors_of_encodings(file: Path) -> None:
    file.write_bytes(b"image,labels\na.png,\xe9t\xe9\n")
    with pytest.raises(DataError, match="line 2: text must be UTF-8, got byte 0xe9: encoding=NAME"):
        load_table(file)
    with pytest.raises(DataError, match="line 2: text must be ascii, got byte 0xe9: encoding=NAME"):
        load_dataset(f"csv:{file},encoding=ascii")
    file.write_bytes("image,labels\na.png,sky\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="line 1: text must be UTF-8, got byte 0x00: encoding=NAME"):
        load_table(file)
    assert label_names(load_dataset(f"csv:{file},encoding=utf-16-le")) == [["sky"]]
    for name in ("klingon", "zip"):
        with pytest.raises(DataError, match=f"encoding must be one that Python knows, .*'{name}'"):
            load_dataset(f"csv:{file},encoding={name}")


# Rows, cells and paths as people have them.


def test_rows_of_one_image_are_joined(file: Path) -> None:
    file.write_text(
        "filename,xmin,label\na.png,1,sky\nsub/b.png,1,sea\n./a.png,2,sea\na.png,3,sky\n"
    )
    problems = Problems()
    dataset = load_table(file, problems=problems)
    assert label_names(dataset) == [["sea", "sky"], ["sea"]]
    assert [n for n in problems.notes if "2 rows are joined to an earlier one of the" in n]


def test_many_rows_of_one_image_are_joined_in_linear_time(file: Path) -> None:
    """A minute, where every row made the set of all labels again."""
    image = sources.CSV_ROWS[0][0]
    file.write_text("image,labels\n" + "".join(f"{image},{i}\n" for i in range(40_000)))
    start = time.process_time()
    dataset = load_dataset(f"csv:{file}")
    assert time.process_time() - start < 20
    assert len(dataset) == 1 and len(dataset.labels(0)) == 40_000


def test_many_columns_are_read_in_linear_time(file: Path) -> None:
    """A minute, where every column was looked for among all others."""
    count = 60_000
    header = ",".join(f"c{i}" for i in range(count))
    file.write_text(f"image,{header}\n{sources.CSV_ROWS[0][0]}{',1' * count}\n")
    start = time.process_time()
    dataset = load_dataset(f"csv:{file}")
    assert time.process_time() - start < 20
    assert len(dataset.labels(0)) == count


def test_joined_rows_of_columns(file: Path) -> None:
    """Present in one row is present; unknown beside absent is unknown."""
    file.write_text("image,sky,sea,land\na.png,1,0,?\na.png,?,?,?\nsub/b.png,0,0,0\n")
    dataset = load_table(file)
    assert label_names(dataset) == [["sky"], []]
    assert unknown_names(dataset) == [["sea", "land"], []]


def test_cells_that_say_none(file: Path) -> None:
    file.write_text("image,labels\na.png,nan\nsub/b.png,None\nc d.png,\ne.png,sky;nan\n")
    problems = Problems()
    dataset = load_table(file, problems=problems)
    assert label_names(dataset) == [[], [], [], ["nan", "sky"]]
    assert [n for n in problems.notes if "2 cells of labels hold a word for none" in n]


def test_blank_rows_are_no_records(file: Path) -> None:
    file.write_text("image,labels\na.png,sky\n,\n , \n\n")
    assert len(load_table(file)) == 1


def test_quotes_that_do_not_fit_name_file_and_line(file: Path) -> None:
    file.write_text('image,labels\na.png,sky\nsub/b.png,sea;"sky\n')
    with pytest.raises(DataError, match=r"labels.csv, line 3: labels must have both ends of a quo"):
        load_table(file)


def test_absolute_paths_inside_the_image_folder(file: Path, tmp_path: Path) -> None:
    file.write_text(f"image,labels\n{file.parent.resolve()}/a.png,sky\n")
    assert load_table(file).image_paths == (file.parent / "a.png",)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match="line 2: an image must be a file inside .*absolute"):
        load_table(file, tmp_path / "elsewhere")


def test_names_that_differ_in_case_or_normal_form(file: Path) -> None:
    sources.write_picture(file.parent / "Deep" / "Grün.PNG")
    file.write_text("image,labels\nDEEP/gru\u0308n.png,sky\nA.png,sea\nsub/b.png,sea\n")
    problems = Problems()
    paths = load_table(file, problems=problems).image_paths
    if not (file.parent / "A.png").exists():  # where the file system tells cases apart
        assert paths == tuple(
            file.parent / name for name in ("Deep/Grün.PNG", "a.png", "sub/b.png")
        )
        assert [n for n in problems.notes if "2 names differ from their files in case" in n]


def test_a_name_that_fits_two_files_is_missing(file: Path) -> None:
    sources.write_picture(file.parent / "x.png")
    sources.write_picture(file.parent / "X.png")
    file.write_text("image,labels\nx.PNG,sky\n")
    with pytest.raises(DataError, match="line 2 must exist as .*x.PNG, found no such file"):
        load_table(file)
    file.write_text("image,labels\nX.png,sky\n")
    assert load_table(file).image_paths == (file.parent / "X.png",)


def test_links_are_followed_where_asked(file: Path, tmp_path: Path) -> None:
    sources.write_picture(tmp_path / "outside" / "deep" / "z.png")
    (file.parent / "linked").symlink_to(tmp_path / "outside")
    (file.parent / "z.png").symlink_to(tmp_path / "outside" / "deep" / "z.png")
    for name in ("linked/deep/z.png", "z.png"):
        file.write_text(f"image,labels\n{name},sky\n")
        with pytest.raises(DataError, match="must be a file inside .* follow_links allows it"):
            load_table(file)
        dataset = load_dataset(f"csv:{file}", follow_links=True)
        assert dataset.image_paths == (file.parent / name,)


def test_droppings_are_no_tables_and_no_rows(file: Path) -> None:
    names = ("._train.csv", ".~lock.train.csv#", "~$train.csv", ".hidden.csv")
    for name in names:
        (file.parent / name).write_bytes(b"\0\5\xff")
    file.write_text("image,labels\na.png,sky\n._a.png,sky\nsub/Thumbs.db,sea\n")
    file.rename(file.with_name("train.csv"))
    with pytest.warns(UserWarning, match="line 3 has '._a.png': 2 rows name hidden files or those"):
        dataset = load_table(file.parent)
    assert members(dataset) == {"train": [0]} and dataset.label_names == ("sky",)


@pytest.mark.parametrize(
    "text", ["id,usage\n1,public\n", "image,width\na.png,640\n", "image\na.png\n"]
)
def test_a_table_without_labels_beside_others(file: Path, text: str) -> None:
    file.write_text("image,labels\na.png,sky\n")
    (file.parent / "submission.csv").write_text(text)
    with pytest.warns(UserWarning, match=r"submission.csv must have a column of .* is left out"):
        assert set(load_table(file.parent).splits) == {"labels"}
    file.unlink()
    with pytest.raises(DataError, match="submission.csv must have a column of"):
        load_table(file.parent)


def test_a_table_without_the_split_that_is_asked_for(file: Path) -> None:
    (file.parent / "more.csv").write_text("image,labels\na.png,sky\n")
    with pytest.raises(
        DataError, match="more.csv must have a column of split, 'split' .*found 'ima"
    ):
        load_dataset(f"csv:{file.parent},split=split")


def test_a_path_that_looks_like_options(file: Path) -> None:
    odd = file.rename(file.with_name("x,labels=tags.csv"))
    assert len(load_dataset(f"csv:{odd}")) == 4
    with pytest.raises(DataError, match="folder has no options, got 'labels'"):
        load_dataset(f"folder:{file.parent},labels=x")


def test_lists_alone_need_no_delimiter(file: Path) -> None:
    """Their words come together again and again, which says nothing of white space."""
    cells = ["['a b', 'c']", "['c', 'a b']", "['c']", "['a b', 'd', 'c']"]
    names = [row[0] for row in sources.CSV_ROWS]
    lines = [f'{name},"{cell}"\n' for name, cell in zip(names, cells, strict=True)]
    file.write_text("image,labels\n" + "".join(lines))
    assert label_names(load_table(file)) == [["a b", "c"], ["a b", "c"], ["c"], ["a b", "c", "d"]]


def test_a_folder_that_cannot_be_listed(public_folder: Path) -> None:
    sources.write_picture(public_folder / "a.png", 1)
    (public_folder / "sub").mkdir()
    for name in ("b.png", "c.png"):
        sources.write_picture(public_folder / "sub" / name, 2)
    (public_folder / "sub").chmod(0)
    (public_folder / "d.png").symlink_to("d.png")  # in a circle
    file = public_folder / "t.csv"
    file.write_text("image,labels\na.png,x\nsub/b.png,x\nsub/c.png,y\n")
    with as_nobody():
        with pytest.raises(DataError, match="the folder of line 3, .*sub, cannot be listed: Perm"):
            load_table(file)
        with pytest.warns(UserWarning) as caught:
            dataset = load_table(file, on_bad_image="skip")
    assert [path.name for path in dataset.image_paths or ()] == ["a.png"]
    first, second = (str(warning.message) for warning in caught)
    assert "cannot be listed: Permission denied; its images are left out" in first
    assert "2 of 3 images are missing" in second
