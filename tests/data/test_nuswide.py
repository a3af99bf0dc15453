from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cnnrnn.config import NusWideOptions
from cnnrnn.data import DataError, Problems, load_dataset
from cnnrnn.data.files import read_blocks
from cnnrnn.data.sources.nuswide import load_nuswide
from tests.data import sources

TAGS = NusWideOptions(labels="tags")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return sources.write_nuswide(tmp_path / "nuswide")


def bits(table: dict[str, tuple[int, ...]]) -> list[list[int]]:
    return [list(row) for row in zip(*table.values(), strict=True)]


def test_concepts(root: Path) -> None:
    dataset = load_dataset(f"nuswide:{root}")
    assert dataset.source == f"nuswide:{root}"
    assert dataset.label_names == ("airport", "sky", "zebra")
    assert dataset.label_matrix().int().tolist() == bits(sources.NUS_CONCEPTS)
    names = [name.replace("\\", "/") for name in sources.NUS_IMAGES]
    assert dataset.image_paths == tuple(root / "Flickr" / name for name in names)
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [3, 0], "test": [1, 2]
    }  # fmt: skip


def test_tags(root: Path) -> None:
    dataset = load_dataset(f"nuswide:{root},labels=tags")
    assert dataset.label_names == ("blue", "d'été")
    assert dataset.label_matrix().int().tolist() == bits(sources.NUS_TAGS)
    assert set(dataset.splits) == {"train", "test"}


def test_train_and_test_labels_alone(root: Path) -> None:
    shutil.rmtree(root / "Groundtruth" / "AllLabels")
    (root / "ImageList" / "Imagelist.txt").unlink()
    dataset = load_nuswide(root)
    order = [row for rows in sources.NUS_SPLITS.values() for row in rows]
    expected = bits(sources.NUS_CONCEPTS)
    assert dataset.label_matrix().int().tolist() == [expected[row] for row in order]
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [0, 1], "test": [2, 3]
    }  # fmt: skip


def test_other_places(root: Path, tmp_path: Path) -> None:
    (root / "ConceptsList").mkdir()
    (root / "Concepts81.txt").rename(root / "ConceptsList" / "Concepts81.txt")
    for file in (root / "ImageList").iterdir():
        file.rename(root / file.name)
    (root / "Flickr").rename(root / "images")
    dataset = load_nuswide(root)
    assert dataset.image_paths is not None and set(dataset.splits) == {"train", "test"}
    assert dataset.image_paths[0] == root / "images" / "actor" / "0001_21.jpg"
    (root / "images").rename(tmp_path / "elsewhere")
    dataset = load_dataset(f"nuswide:{root}", images=tmp_path / "elsewhere")
    assert dataset.label_matrix().int().tolist() == bits(sources.NUS_CONCEPTS)


def test_split_files(root: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("zoo/0001_23.jpg\nactor\\0001_21.jpg\n")
    (tmp_path / "val.txt").write_text("actor/0002_22.jpg\n")
    dataset = load_dataset(
        f"nuswide:{root},labels=tags,train={tmp_path / 'few.txt'},val={tmp_path / 'val.txt'}"
    )
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [2, 0], "val": [1]
    }  # fmt: skip
    (tmp_path / "val.txt").write_text("actor/0002_22.jpg\nactor/0003_22.jpg\n")
    with pytest.raises(DataError, match="val.txt, line 2: an image must be one of the image list"):
        load_nuswide(root, options=NusWideOptions(val=str(tmp_path / "val.txt")))
    (tmp_path / "val.txt").write_text("./actor//0002_22.jpg\n")
    dataset = load_nuswide(root, options=NusWideOptions(val=str(tmp_path / "val.txt")))
    assert dataset.splits["val"].tolist() == [1]
    (tmp_path / "val.txt").write_text("actor/0002_22.jpg\nactor\\0002_22.jpg\n")
    with pytest.raises(DataError, match="val.txt, line 2: images must be unique, got 'actor/0002"):
        load_nuswide(root, options=NusWideOptions(val=str(tmp_path / "val.txt")))
    with pytest.raises(DataError, match="nowhere.txt must be a file, found no such file"):
        load_nuswide(root, options=NusWideOptions(val="nowhere.txt"))


def test_the_home_folder_in_options(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "few.txt").write_text("zoo/0001_23.jpg\n")
    dataset = load_nuswide(root, options=NusWideOptions(val="~/few.txt"))
    assert dataset.splits["val"].tolist() == [2]


def test_without_lists_of_splits(root: Path) -> None:
    for name in ("TrainImagelist.txt", "TestImagelist.txt"):
        (root / "ImageList" / name).unlink()
    assert {name: len(rows) for name, rows in load_nuswide(root).splits.items()} == {"all": 4}


@pytest.mark.parametrize("options", [NusWideOptions(), TAGS])
def test_labels_never_shift(root: Path, options: NusWideOptions) -> None:
    (root / "Flickr" / "actor" / "0002_22.jpg").unlink()
    message = r"Imagelist.txt: line 2 must exist as .*0002_22.jpg, found no such file \(1 of 4 ima"
    with pytest.raises(DataError, match=message):
        load_nuswide(root, options=options)
    with pytest.warns(UserWarning, match=message):
        dataset = load_nuswide(root, options=options, on_bad_image="skip")
    table = sources.NUS_TAGS if options.labels == "tags" else sources.NUS_CONCEPTS
    expected = bits(table)
    assert dataset.label_matrix().int().tolist() == [expected[row] for row in (0, 2, 3)]
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "train": [2, 0], "test": [1]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "width", "between", "ending"),
    [
        *((count, width, between, ending)
          for count, width in ((1, 1), (7, 3))
          for between in (" ", "\t", "   ")
          for ending in ("\n", "\r\n", "\t\n", " \t\r\n", "")),
        (600, 4000, "\t", "\n"),
        (600, 4000, "   ", "\t\n"),
    ],
)  # fmt: skip
def test_every_way_to_write_bits(
    tmp_path: Path, count: int, width: int, between: str, ending: str
) -> None:
    """With 600 lines of 4,000 the file is several blocks; a digit late in it must keep its row."""
    matrix = (np.random.default_rng(0).random((count, width)) < 0.3).astype(int)
    matrix[-1, -1] = 1
    root = tmp_path / "nuswide"
    (root / "Flickr").mkdir(parents=True)
    for row in range(count):
        (root / "Flickr" / f"{row}.jpg").touch()
    (root / "Imagelist.txt").write_text("".join(f"{row}.jpg\n" for row in range(count)))
    (root / "TagList1k.txt").write_text("".join(f"t{i}\n" for i in range(width)))
    lines = [between.join(map(str, row)) for row in matrix]
    (root / "AllTags1k.txt").write_bytes((ending or "\n").join([*lines, ""]).encode())
    if not ending:  # no line feed at the end of the file
        (root / "AllTags1k.txt").write_text("\n".join(lines))
    dataset = load_nuswide(root, options=TAGS)
    np.testing.assert_array_equal(dataset.label_matrix().int().numpy(), matrix)


def test_blank_lines_at_the_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cnnrnn.data.sources.nuswide.read_blocks", lambda file: read_blocks(file, 2)
    )
    for name, options in ((LABELS, NusWideOptions()), (ALL_TAGS, TAGS)):
        expected = load_nuswide(root, options=options).label_indices.tolist()
        with (root / name).open("ab") as file:
            file.write(b"\n \r\n\n")
        assert load_nuswide(root, options=options).label_indices.tolist() == expected


LABELS = "Groundtruth/AllLabels/Labels_sky.txt"
ALL_TAGS = "NUS_WID_Tags/AllTags1k.txt"
LIST = "ImageList/Imagelist.txt"
BAD_FILES: dict[str, tuple[NusWideOptions, str, bytes, str]] = {
    "label two": (NusWideOptions(), LABELS, b"1\n0\n2\n0\n", "line 3: .* 1 of 0 or 1, got '2'"),
    "label minus": (NusWideOptions(), LABELS, b"1\n-1\n1\n0\n", "line 2: .*got '-1'"),
    "label nan": (NusWideOptions(), LABELS, b"1\nnan\n1\n0\n", "line 2: .*got 'nan'"),
    "label words": (NusWideOptions(), LABELS, b"1\n0\n1\nno\xff\n", "line 4: .*got 'noÿ'"),
    "label blank": (NusWideOptions(), LABELS, b"1\n\n1\n0\n", "line 2: .*got 0 values"),
    "label pair": (NusWideOptions(), LABELS, b"1\n0 1\n1\n0\n", "line 2: .*got 2 values"),
    "label digits": (NusWideOptions(), LABELS, b"10\n10\n10\n10\n", "line 1: .*got '10'"),
    "labels few": (NusWideOptions(), LABELS, b"1\n0\n1\n", "each of the 4 images of .*, got 3"),
    "labels many": (NusWideOptions(), LABELS, b"1\n" * 5, "each of the 4 images of .*, got 5"),
    "labels none": (NusWideOptions(), LABELS, b"", "each of the 4 images of .*, got 0"),
    "tags few": (TAGS, ALL_TAGS, b"1\t0\n0\n1\n1\t0\n0\t1\n", "line 2: .* 2 of 0 or 1, got 1"),
    "tags many": (TAGS, ALL_TAGS, b"1\t0\t0\n" * 4, "line 1: .* 2 of 0 or 1, got 3 values"),
    "tags NUL": (TAGS, ALL_TAGS, b"1\x000\n" * 4, r"line 1: .*got '1\\x000'"),
    "tags short": (TAGS, ALL_TAGS, b"1\t0\n" * 3, "each of the 4 images of .*, got 3"),
    "tag twice": (TAGS, "NUS_WID_Tags/TagList1k.txt", b"a\na\n", "line 2: tag must be unique"),
    "tag blank": (TAGS, "NUS_WID_Tags/TagList1k.txt", b"a\n\nb\n", "line 2: tag must be a non-"),
    "tags empty": (TAGS, "NUS_WID_Tags/TagList1k.txt", b"\n", "must hold tags, one per line"),
    "concept up": (NusWideOptions(), "Concepts81.txt", b"../sky\n", "a concept must be part of a"),
    "concept long": (NusWideOptions(), "Concepts81.txt", b"x" * 5000, "a concept must be part"),
    "concept gone": (NusWideOptions(), "Concepts81.txt", b"sea\n", "sea.txt must be a file, found"),
    "name up": (NusWideOptions(), LIST, b"a\\..\\..\\b\n" * 4, "line 1: .*leaves the folder"),
    "name absolute": (NusWideOptions(), LIST, b"/etc/passwd\n" * 4, "line 1: .*absolute"),
    "name drive": (NusWideOptions(), LIST, b"C:\\a.jpg\n" * 4, "line 1: .*absolute"),
    "name URL": (NusWideOptions(), LIST, b"http://h/a.jpg\n" * 4, "line 1: .*a URL"),
    "name NUL": (NusWideOptions(), LIST, b"a\0b\n" * 4, "line 1: .*not a file name"),
    "name blank": (NusWideOptions(), LIST, b"\na\n" * 4, r"line 1: .*got '' \(empty\)"),
    "name twice": (NusWideOptions(), LIST, b"zoo/0001_23.jpg\nzoo\\0001_23.jpg\na\nb\n",
                   "line 2: images must be unique, got 'zoo/0001_23.jpg' as in line 1"),
    "name twice, dot": (NusWideOptions(), LIST, b"zoo/1.jpg\n./zoo//1.jpg\na\nb\n",
                        "line 2: images must be unique, got './zoo//1.jpg' as in line 1"),
    "list not UTF-8": (NusWideOptions(), LIST, b"a\n\xff\n", "line 2: text must be UTF-8"),
    "list empty": (NusWideOptions(), LIST, b"", "each of the 0 images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_errors_name_file_and_line(root: Path, case: str) -> None:
    options, name, content, message = BAD_FILES[case]
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_nuswide(root, options=options)
    named = "sea.txt" if case == "concept gone" else "Imagelist" if "list e" in case else name
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_links_may_not_leave_the_image_folder(root: Path, tmp_path: Path) -> None:
    (root / "Flickr" / "zoo").rename(tmp_path / "zoo")
    (root / "Flickr" / "zoo").symlink_to(tmp_path / "zoo")
    with pytest.raises(DataError, match="line 3 must be a file inside .*Flickr, got zoo/0001_23"):
        load_nuswide(root)


def test_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere must be NUS-WIDE's folder, found no such folder"):
        load_nuswide(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold its images in Flickr or images, or come with"):
        load_nuswide(tmp_path)
    with pytest.raises(DataError, match="must come with an existing image folder, got .*nowhere"):
        load_nuswide(tmp_path, tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="must hold Groundtruth/AllLabels or Groundtruth/TrainTest"):
        load_nuswide(tmp_path)
    with pytest.raises(DataError, match="must hold ImageList/Imagelist.txt or Imagelist.txt, foun"):
        load_nuswide(tmp_path, options=TAGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("labels=words", "labels must be one of concepts, tags, got 'words'"),
        ("label=tags", "option of nuswide must be one of labels, train, val, test, got 'label'"),
        ("labels=tags,labels=tags", "an option must be given once, got labels twice"),
    ],
)
def test_options_are_checked(root: Path, options: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(f"nuswide:{root},{options}")


def test_every_problem_is_kept(root: Path) -> None:
    (root / LABELS).write_text("1\n7\n1\n0\n")
    (root / "Groundtruth" / "AllLabels" / "Labels_zebra.txt").unlink()
    (root / LIST).write_text("actor/0001_21.jpg\nactor/../x\nzoo/0001_23.jpg\nzoo/0004_9.jpg\n")
    (root / "Flickr" / "zoo" / "0004_9.jpg").unlink()
    problems = Problems(keep=True)
    dataset = load_nuswide(root, problems=problems)
    expected = ("Imagelist.txt, line 2", "Labels_sky.txt, line 2", "Labels_zebra.txt must be a fi",
                "TestImagelist.txt, line 1", "Imagelist.txt: line 4 must exist")  # fmt: skip
    for part in expected:
        assert sum(part in message for message in problems.messages) >= 1, part
    assert len(problems.messages) == len(expected)
    assert dataset.label_matrix().int().tolist() == [[0, 1, 0], [1, 1, 0]]
