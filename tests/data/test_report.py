"""`check_source` against counts made by hand or by brute force."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cnnrnn.cli import main
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.report import Pair, SplitCounts, check_source, prefix_sharing
from tests.data import sources


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return sources.write_csv(tmp_path / "table")


def test_counts(table: Path) -> None:
    report = check_source(f"csv:{table}")
    assert (report.records, report.problems, report.warnings) == (4, [], [])
    assert report.splits == {
        "train": SplitCounts(2, 1, 1.0, 2),
        "val": SplitCounts(1, 0, 1.0, 1),
        "test": SplitCounts(1, 0, 3.0, 3),
    }
    assert list(report.label_counts.items()) == [
        ("sea", 2), ("sky", 2), ("boat", 1), ("traffic light", 1)
    ]  # fmt: skip
    assert report.set_sizes == {0: 1, 1: 1, 2: 1, 3: 1}
    assert report.pairs == [Pair("sea", "sky", 2), Pair("sea", "boat", 1), Pair("sky", "boat", 1)]
    assert (report.unreadable, report.duplicates) == (0, [])


def random_dataset(records: int, labels: int, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    matrix = generator.random((records, labels)) < generator.random(labels) / 2
    rows, columns = np.nonzero(matrix)
    return Dataset.from_arrays(
        source="features:here",
        label_names=tuple(f"label {i}" for i in range(labels)),
        label_indptr=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=records))]),
        label_indices=columns.astype(np.int32),
        features=np.zeros((records, 1), np.float32),
    )


@pytest.mark.parametrize(("records", "labels"), [(0, 3), (1, 1), (50, 1), (997, 13), (9001, 5)])
def test_prefixes_and_pairs_by_brute_force(
    monkeypatch: pytest.MonkeyPatch, records: int, labels: int
) -> None:
    dataset = random_dataset(records, labels, seed=records)
    counts = dataset.label_counts()
    order = sorted(range(labels), key=lambda label: -counts[label])
    paths = [[label for label in order if label in set(dataset.labels(i))] for i in range(records)]
    visits = Counter(tuple(path[: i + 1]) for path in paths for i in range(len(path)))
    monkeypatch.setattr("cnnrnn.data.report.VISITED_PREFIXES", 7)
    sharing = prefix_sharing(dataset, np.array(order))
    assert (sharing.steps, sharing.distinct) == (sum(visits.values()), len(visits))
    top = sum(sorted(visits.values())[-7:]) / max(sharing.steps, 1)
    assert sharing.visited_share == pytest.approx(top)

    monkeypatch.setattr("cnnrnn.data.report.load_dataset", lambda *args, **kwargs: dataset)
    report = check_source("features:here", pairs=1000)
    together = Counter(pair for path in paths for pair in itertools.combinations(path, 2))
    expected = {(f"label {a}", f"label {b}"): n for (a, b), n in together.items()}
    assert {(p.first, p.second): p.records for p in report.pairs} == expected
    assert [p.records for p in report.pairs] == sorted(expected.values(), reverse=True)


def test_duplicates_and_unreadable_pictures(table: Path) -> None:
    folder = table.parent
    shutil.copy(folder / "a.png", folder / "e.png")  # train and test, other labels
    shutil.copy(folder / "a.png", folder / "sub" / "b.png")
    (folder / "c d.png").write_bytes((folder / "c d.png").read_bytes()[:-30])
    for workers in (0, 2):
        report = check_source(f"csv:{table}", workers=workers)
        names = [str(folder / name) for name in ("a.png", "sub/b.png", "e.png")]
        assert report.duplicates == [names]
        assert (report.duplicates_across_splits, report.duplicates_with_other_labels) == (1, 1)
        assert report.unreadable == 1
        assert len(report.problems) == 1
        assert (
            f"{folder / 'c d.png'} (record 2 of csv:{table}) must be a readable"
            in (report.problems[0])
        )


def test_copies_within_overlapping_splits_do_not_leak(tmp_path: Path) -> None:
    pytest.importorskip("defusedxml")
    root = sources.write_voc(tmp_path / "VOC2007")
    pictures = root / "JPEGImages"
    shutil.copy(pictures / "000001.jpg", pictures / "2008_000003.jpg")  # both in train, trainval
    report = check_source(f"voc:{root}")
    assert (len(report.duplicates), report.duplicates_across_splits) == (1, 0)
    assert report.unknown_labels == 1
    shutil.copy(pictures / "000002.jpg", pictures / "000001.jpg")  # in val, and both in trainval
    assert check_source(f"voc:{root}").duplicates_across_splits == 1


def split_dataset(splits: dict[str, list[int]], contents: list[int]) -> Dataset:
    return Dataset.from_arrays(
        source="features:here",
        label_names=("a",),
        label_indptr=np.arange(len(contents) + 1),
        label_indices=np.zeros(len(contents), np.int32),
        splits={name: np.array(rows, np.int64) for name, rows in splits.items()},
        features=np.array(contents, np.float32)[:, None],
    )


@pytest.mark.parametrize("seed", range(20))
def test_overlap_and_copies_across_splits_by_brute_force(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 13))
    splits = {
        name: np.flatnonzero(generator.random(count) < generator.random()).tolist()
        for name in "abcd"
    }
    contents = generator.integers(0, count, count).tolist()
    dataset = split_dataset(splits, contents)
    monkeypatch.setattr("cnnrnn.data.report.load_dataset", lambda *args, **kwargs: dataset)
    report = check_source("features:here")

    expected, across = [], set()
    for first, second in itertools.combinations(splits, 2):
        ours, theirs = set(splits[first]), set(splits[second])
        both = sorted(ours & theirs)
        if both and not ours <= theirs and not theirs <= ours:
            expected.append(
                (
                    f"splits {first} and {second} must not share records",
                    f"got {len(both)} in both, the first of them row {both[0]} of here",
                )
            )
        across |= {contents[i] for i in ours - theirs} & {contents[i] for i in theirs - ours}
    assert len(report.problems) == len(expected)
    for problem, parts in zip(report.problems, expected, strict=True):
        assert all(part in problem for part in parts), problem
    assert report.duplicates_across_splits == len(across)


def test_a_record_in_train_and_test_is_a_problem(tmp_path: Path) -> None:
    root = sources.write_nuswide(tmp_path / "nuswide")
    images = root / "ImageList" / "TestImagelist.txt"
    images.write_text(images.read_text() + sources.NUS_IMAGES[0] + "\n")
    shutil.copy(root / "Flickr/actor/0002_22.jpg", root / "Flickr/zoo/0004_9.jpg")
    report = check_source(f"nuswide:{root}")
    assert len(report.problems) == 1 and report.duplicates_across_splits == 1
    assert (
        f"nuswide:{root}: splits train and test must not share records unless one holds the "
        f"other, got 1 in both, the first of them {root / 'Flickr/actor/0001_21.jpg'}"
    ) == report.problems[0]


def test_a_column_of_ids_is_no_split(table: Path) -> None:
    rows = [f"{i}.png,sky,{i}\n" for i in range(101)]
    for i in range(101):
        (table.parent / f"{i}.png").touch()
    table.write_text("image,labels,split\n" + "".join(rows))
    report = check_source(f"csv:{table}")
    assert (
        f"{table}: column 'split' must name at most 100 splits, got 101: split=COLUMN names "
        "another column"
    ) == report.problems[0]
    file = table.parent / "f.npz"
    np.savez(file, features=np.zeros((101, 1)), labels=np.ones((101, 1)),
             label_names=np.array(["a"]), split=np.arange(101).astype(str))  # fmt: skip
    problems = check_source(f"features:{file}").problems
    assert problems == [f"{file}: split must name at most 100 splits, got 101"]
    with pytest.raises(DataError, match="features:here: splits must be at most 100, got 101"):
        split_dataset({str(i): [0] for i in range(101)}, [1])


def test_unreadable_pictures_are_no_duplicates(table: Path) -> None:
    for name in ("a.png", "e.png"):
        (table.parent / name).write_bytes(b"no picture")
    report = check_source(f"csv:{table}")
    assert (report.unreadable, report.duplicates) == (2, [])


def test_duplicate_rows_of_features(tmp_path: Path) -> None:
    file = tmp_path / "f.npz"
    np.savez(file, features=np.array([[1.0, 2], [3, 4], [1, 2]]), labels=np.eye(3),
             label_names=np.array(["a", "b", "c"]))  # fmt: skip
    report = check_source(f"features:{file}")
    assert report.duplicates == [[f"row 0 of {file}", f"row 2 of {file}"]]
    assert (report.duplicates_across_splits, report.duplicates_with_other_labels) == (0, 1)


def test_everything_wrong_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = sources.write_coco(tmp_path / "coco")
    file = root / "annotations" / "instances_train2017.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["image_id"] = 77
    data["annotations"][1]["category_id"] = 88
    data["annotations"].append(
        {"id": 4, "image_id": 0, "category_id": 3, "bbox": [1, float("nan"), 3, 4]}
    )
    data["images"][1]["file_name"] = "../1.png"
    data["images"].append({"id": 0, "file_name": "0.png"})
    file.write_text(json.dumps(data))
    (root / "val2017" / "2.png").unlink()
    (root / "val2017" / "3.png").write_bytes(b"no picture")
    report = check_source(f"coco:{root}")
    expected = ("images[2]", "annotation 1 ", "annotation 2 ", "image 1 ", "image 2", "3.png")
    assert len(report.warnings) == 1 and "annotation 4 has [1, nan, 3, 4]" in report.warnings[0]
    for part in expected:
        assert sum(part in problem for problem in report.problems) == 1, (part, report.problems)
    assert len(report.problems) == len(expected)
    assert {name: counts.records for name, counts in report.splits.items()} == {
        "train": 1, "val": 1
    }  # fmt: skip


def test_a_part_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = sources.write_coco(tmp_path / "coco")
    (root / "annotations" / "instances_train2017.json").write_text("{")
    (root / "val2017" / "2.png").unlink()
    report = check_source(f"coco:{root}")
    assert len(report.problems) == 2 and report.records == 1
    assert "instances_train2017.json must be valid JSON" in report.problems[0]


def test_a_source_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    report = check_source(f"csv:{tmp_path / 'nowhere.csv'}")
    assert report.records == 0 and len(report.problems) == 1
    assert report.lines()[0] == f"csv:{tmp_path / 'nowhere.csv'}: 0 records, 0 labels"
    assert report.lines()[-1] == "1 problem"
    assert "data must be one of coco:ROOT" in check_source("pictures").problems[0]


def test_on_the_command_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    assert main(["data", "check", f"csv:{table}", "--labels=3", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for part in ("4 records, 4 labels", "train           2               1   1.00     2",
                 "0: 1, 1: 1, 2: 1, 3: 1", "sea", "and 1 more", "sea + sky: 2, 100.0 % of the",
                 "4 different ones for 6 steps", "unreadable images: 0", "no problems",
                 ):  # fmt: skip
        assert part in out, part
    report = json.loads(file.read_text())
    assert report["splits"]["test"]["most_labels"] == 3 and report["problems"] == []
    assert report["pairs"][0] == {"first": "sea", "second": "sky", "records": 2}

    (table.parent / "a.png").unlink()
    assert main(["data", "check", f"csv:{table}", "--workers=1"]) == 1
    assert "problem: " in (out := capsys.readouterr().out) and out.endswith("\n1 problem\n")
    shutil.move(table, tmp_path / "moved.csv")
    words = ["data", "check", f"csv:{tmp_path / 'moved.csv'}", "--images", str(table.parent)]
    assert main(words) == 1 and "line 2 must exist as" in capsys.readouterr().out


def test_problems_of_one_kind_are_grouped(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"lost {i}.png,sky\n" for i in range(9)] + ["../x.png,sky\n", "c d.png,a;a\n"]
    lines += [f"cut-{i}.png,sky\n" for i in range(5)]
    for i in range(5):
        (table.parent / f"cut-{i}.png").write_bytes(b"no picture")
    table.write_text("image,labels\na.png,sky\n" + "".join(lines))
    report = check_source(f"csv:{table}")
    assert len(report.problems) == len(report.kinds) == 16
    short, whole = report.lines(), report.lines(every=True)
    assert [line for line in whole if line.startswith("problem: ")] == [
        f"problem: {problem}" for problem in report.problems
    ]
    shown = [line for line in short if line.startswith(("problem: ", "  and "))]
    assert len(shown) == 3 + 1 + 3 + 1 + 2
    assert sum("lost" in line for line in shown) == sum("cut-" in line for line in shown) == 3
    for count, more in ((9, 6), (5, 2)):
        text = f"  and {more} more of this kind, {count} in all (--all lists them)"
        assert shown.count(text) == 1
    assert short[-1] == whole[-1] == "16 problems"
    for words, lost in ((["--all"], 9), ([], 3)):
        assert main(["data", "check", f"csv:{table}", *words]) == 1
        assert capsys.readouterr().out.count("lost ") == lost


def test_how_a_source_was_read_is_in_the_report(table: Path, tmp_path: Path) -> None:
    table.write_text("image;labels\na.png;x|y\na.png;nan\nA.PNG;x\n", encoding="utf-8")
    (tmp_path / "outside").mkdir()
    notes = check_source(f"csv:{table}").notes
    for part in ("separated by ';'", "separated by '|'", "1 cells of labels hold a word for none",
                 "rows are joined"):  # fmt: skip
        assert sum(part in note for note in notes) == 1, (part, notes)
    lines = check_source(f"csv:{table}").lines()
    assert sum(line.startswith("note: ") for line in lines) == len(notes)


def test_labels_that_are_never_known_to_be_absent_are_named(table: Path) -> None:
    shutil.copy(table.parent / "a.png", table.parent / "b.png")
    for cells, warned in (("1,-1", True), ("1,0", False)):
        sky, sea = cells.split(",")
        table.write_text(f"image,sky,sea\na.png,{sky},{sea}\nb.png,{sea},0\n")
        warnings = check_source(f"csv:{table}").warnings
        assert any("no record is known to lack sky; write 0" in text for text in warnings) == warned


def test_links_are_followed_where_asked(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (table.parent / "a.png").rename(tmp_path / "outside.png")
    (table.parent / "a.png").symlink_to(tmp_path / "outside.png")
    assert main(["data", "check", f"csv:{table}"]) == 1
    assert "follow_links allows it" in capsys.readouterr().out
    assert main(["data", "check", f"csv:{table}", "--follow-links"]) == 0


def test_images_in_memory(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    data = (table.parent / "a.png").read_bytes()
    dataset = Dataset(images=[data, b"no picture", data], labels=[["x"], ["x"], ["y"]])
    monkeypatch.setattr("cnnrnn.data.report.load_dataset", lambda *args, **kwargs: dataset)
    report = check_source("python:Dataset")
    assert report.unreadable == 1 and report.duplicates == [
        ["row 0 of Dataset", "row 2 of Dataset"]
    ]
    assert report.problems == [
        "record 1 of python:Dataset must be a readable image, found: no image in a known format"
    ]


def test_what_follows_from_a_problem_is_none(table: Path) -> None:
    table.write_text("image,labels\n../a.png,sky\n")
    report = check_source(f"csv:{table}")
    assert len(report.problems) == 1 and "line 2: an image must be" in report.problems[0]
    table.write_text("image,labels\n")
    report = check_source(f"csv:{table}")
    assert len(report.problems) == 1 and "must hold at least one image" in report.problems[0]


def test_pairs_among_the_most_frequent_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a matrix that is as wide as the label space."""
    dataset = random_dataset(97, 11, seed=0)
    order = np.argsort(-dataset.label_counts(), kind="stable")
    matrix = dataset.label_matrix().numpy()
    monkeypatch.setattr("cnnrnn.data.report.CO_OCCURRENCE_LABELS", 4)
    monkeypatch.setattr("cnnrnn.data.report._BLOCK", 10)
    monkeypatch.setattr("cnnrnn.data.report.load_dataset", lambda *args, **kwargs: dataset)
    monkeypatch.setattr(Dataset, "label_matrix", None)
    report = check_source("features:here", pairs=1000)
    expected = {
        (f"label {a}", f"label {b}"): int((matrix[:, a] & matrix[:, b]).sum())
        for a, b in itertools.combinations(order[:4], 2)
    }
    assert {(p.first, p.second): p.records for p in report.pairs} == expected


def test_names_that_are_no_text_leave_as_they_came(table: Path) -> None:
    """A folder of bytes that are no UTF-8, on a standard output that is strict."""
    folder = os.fsdecode(os.fsencode(table.parent.parent) + b"/\xff")
    os.rename(table.parent, folder)
    done = subprocess.run(
        [sys.executable, "-m", "cnnrnn", "data", "check", f"csv:{folder}/labels.csv"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, check=True,
    )  # fmt: skip
    assert os.fsencode(f"csv:{folder}/labels.csv: 4 records") in done.stdout


@pytest.mark.parametrize(
    ("word", "message"),
    [("--workers=-1", "at least 0, got 20 and -1"), ("--labels=-2", "at least 0, got -2 and 0"),
     ("--json=nowhere/x.json", "--json nowhere/x.json must be in a folder that exists")],
)  # fmt: skip
def test_options_are_checked(
    table: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert main(["data", "check", f"csv:{table}", word]) == 1
    assert message in capsys.readouterr().err
