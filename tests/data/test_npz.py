from __future__ import annotations

import gzip
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnrnn.config import SvmlightOptions
from cnnrnn.data import DataError, Problems, load_dataset
from cnnrnn.data.sources import svmlight
from cnnrnn.data.sources.npz import load_features
from tests.data import sources


def arrays(**changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "features": np.arange(10, dtype=np.float32).reshape(5, 2),
        "labels": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]], dtype=np.uint8),
        "label_names": np.array(["sky", "sea", "été"]),
        "split": np.array(["train", "val", "train", "test", "val"]),
        **changes,
    }
    return {name: value for name, value in parts.items() if value is not None}


def write(path: Path, **changes: Any) -> Path:
    np.savez(path, **arrays(**changes))
    return path


def test_everything_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "f.npz")
    dataset = load_dataset(f"features:{file}")
    assert dataset.source == f"features:{file}"
    assert dataset.label_names == ("sky", "sea", "été")
    assert [dataset.labels(i).tolist() for i in range(5)] == [[0, 2], [], [1], [0, 1, 2], [2]]
    assert {name: ids.tolist() for name, ids in dataset.splits.items()} == {
        "train": [0, 2],
        "val": [1, 4],
        "test": [3],
    }
    assert dataset.features is not None and dataset.features.dtype == np.float32
    np.testing.assert_array_equal(dataset.features, arrays()["features"])
    assert dataset.image_paths is None and dataset.boxes is None
    assert dataset.split("val").record_name(1) == f"row 4 of {file}"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [bool, np.int64, np.float16, ">f8"])
def test_label_types(tmp_path: Path, dtype: Any, compressed: bool) -> None:
    parts = arrays(labels=arrays()["labels"].astype(dtype))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "f.npz", **parts)
    np.testing.assert_array_equal(
        load_features(tmp_path / "f.npz").label_matrix().numpy(), arrays()["labels"] == 1
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_feature_types(tmp_path: Path, dtype: Any, order: Any) -> None:
    features = np.asarray(arrays()["features"], dtype=dtype, order=order)
    loaded = load_features(write(tmp_path / "f.npz", features=features)).features
    assert loaded is not None and loaded.dtype == np.float32 and loaded.flags.c_contiguous
    assert loaded.dtype.isnative
    np.testing.assert_array_equal(loaded, arrays()["features"])


def test_names_of_splits(tmp_path: Path) -> None:
    arrays = {"features": np.eye(3), "labels": np.eye(3), "label_names": np.array(["a", "b", "c"])}
    np.savez(tmp_path / "f.npz", split=np.array(["Training", "dev", "own"]), **arrays)
    splits = load_features(tmp_path / "f.npz").splits
    assert {name: rows.tolist() for name, rows in splits.items()} == {
        "train": [0], "val": [1], "own": [2]
    }  # fmt: skip
    np.savez(tmp_path / "f.npz", split=np.array(["val", "dev", "own"]), **arrays)
    with pytest.raises(
        DataError, match="one name for a split, got 'val' and 'dev', which both mean"
    ):
        load_features(tmp_path / "f.npz")


def test_without_splits(tmp_path: Path) -> None:
    dataset = load_features(write(tmp_path / "f.npz", split=None))
    assert list(dataset.splits) == ["all"] and len(dataset.split("all")) == 5


def changed(name: str, position: Any, value: Any, dtype: Any = None) -> dict[str, Any]:
    array = np.array(arrays()[name], dtype=dtype)
    array[position] = value
    return {name: array}


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no features": ({"features": None}, "features is missing, found labels, label_names, split"),
    "no labels": ({"labels": None}, "labels is missing"),
    "no label_names": ({"label_names": None}, "label_names is missing"),
    "features vector": ({"features": np.zeros(5)}, r"features must be \[n, F\] floats, got \[5\]"),
    "features int": ({"features": np.zeros((5, 2), int)}, "features must be .*int64"),
    "features short": ({"features": np.zeros((4, 2))}, r"features must be \[5, F\] like labels"),
    "features narrow": ({"features": np.zeros((5, 0))}, "features must not be empty"),
    "features nan": (changed("features", (3, 1), np.nan), "row 3 of .*finite.* nan in column 1"),
    "features inf": (changed("features", (0, 0), -np.inf), "row 0 of .*finite.* -inf in column 0"),
    "features 1e300": (changed("features", (2, 1), 1e300, float), r"row 2 of .*finite.* 1e\+300"),
    "features objects": ({"features": np.array([[1.0]] * 5, object)}, "features .*Python objects"),
    "labels vector": ({"labels": np.zeros(5)}, r"labels must be \[n, L\] of 0/1 or bool, got \[5"),
    "labels text": ({"labels": np.full((5, 3), "1")}, "labels must be .* <U1"),
    "labels two": (changed("labels", (4, 2), 2), "row 4 of .*labels must be 0 or 1, got 2 in col"),
    "labels minus": (changed("labels", (1, 0), -1, int), "row 1 of .*0 or 1, got -1 in column 0"),
    "labels half": (changed("labels", (1, 0), 0.5, float), "row 1 of .*0 or 1, got 0.5 in"),
    "labels nan": (changed("labels", (1, 0), np.nan, float), "row 1 of .*0 or 1, got nan in"),
    "labels empty": ({"labels": np.zeros((0, 3)), "features": np.zeros((0, 2))}, "must not be em"),
    "names short": ({"label_names": np.array(["a", "b"])}, r"label_names must be \[3\].*got \[2\]"),
    "names matrix": ({"label_names": np.array([["a"] * 3])}, r"label_names must be \[L\] strings"),
    "names numbers": ({"label_names": np.arange(3)}, "label_names must be .*int64"),
    "names objects": ({"label_names": np.array(["a", "b", None], object)}, "label_names .*objects"),
    "names twice": ({"label_names": np.array(["a", "b", "a"])}, "unique, got 'a' as labels 0 and"),
    "names empty": ({"label_names": np.array(["a", "", "b"])}, "label 1 must have a non-empty"),
    "split short": ({"split": np.array(["train"])}, r"split must be \[5\] like labels, got \[1\]"),
    "split numbers": ({"split": np.arange(5)}, r"split must be \[n\] strings"),
    "split empty": (changed("split", 3, ""), "row 3 of .*split must be a non-empty name"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_errors_name_file_and_row(tmp_path: Path, case: str) -> None:
    changes, message = BAD_ARRAYS[case]
    file = write(tmp_path / "f.npz", **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_features(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    file = write(tmp_path / "f.npz", features=np.array([[Trap()]] * 5, object))
    with pytest.raises(DataError, match="Python objects"):
        load_features(file)
    assert not (tmp_path / "sprung").exists()


def test_an_array_that_unpacks_to_far_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.npz"
    np.savez_compressed(file, **arrays(features=np.zeros((5, 200_000), np.float32)))
    assert load_features(file).features is not None
    monkeypatch.setattr("cnnrnn.data.sources.npz.MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(DataError, match="features.npy must not unpack .* 500 times .* 4000128 byt"):
        load_features(file)
    np.savez(file, **arrays(features=np.zeros((5, 200_000), np.float32)))
    assert load_features(file).features is not None


def test_an_array_whose_header_claims_terabytes(tmp_path: Path) -> None:
    file = write(tmp_path / "f.npz")
    data = file.read_bytes()
    shape = b"'shape': (5, 2), }"
    claimed = b"'shape': (5, 10**12), }".replace(b"10**12", b"1" + b"0" * 11)
    place = data.index(shape)
    end = place + len(claimed)
    file.write_bytes(data[:place] + claimed + data[end:])
    with pytest.raises(DataError, match="f.npz: features must be a complete array"):
        load_features(file)


def test_no_npz_at_all(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    for name in ("array.npy", "text.npz", "empty.npz"):
        with pytest.raises(DataError, match=f"{name} must be a complete .npz file"):
            load_features(tmp_path / name)
    with pytest.raises(DataError, match="nowhere.npz must be an .npz file, found no such file"):
        load_features(tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match="must hold a file per split, such as train.svm"):
        load_features(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("features", "no array")
        archive.writestr("labels.npy", "no array")
        archive.writestr("label_names.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((  \n")
    with pytest.raises(DataError, match="other.npz: "):
        load_features(tmp_path / "other.npz")


def test_cut_and_altered_files(tmp_path: Path) -> None:
    data = write(tmp_path / "whole.npz").read_bytes()
    whole = load_features(tmp_path / "whole.npz")
    generator = np.random.default_rng(0)
    file = tmp_path / "f.npz"
    for length in range(0, len(data), 97):
        file.write_bytes(data[:length])
        with pytest.raises(DataError, match="f.npz"):
            load_features(file)
    for _ in range(300):
        altered = bytearray(data)
        altered[generator.integers(len(data))] ^= 1 << generator.integers(8)
        file.write_bytes(altered)
        try:
            dataset = load_features(file)
        except DataError as error:
            assert str(file) in str(error)
        else:  # a byte that means nothing, or the name of the optional array
            np.testing.assert_array_equal(dataset.label_indices, whole.label_indices)
            np.testing.assert_array_equal(dataset.features, whole.features)


# svmlight text.


@pytest.fixture
def text(tmp_path: Path) -> Path:
    pytest.importorskip("sklearn")
    return sources.write_svmlight(tmp_path / "text")


def test_svmlight(text: Path) -> None:
    dataset = load_dataset(f"features:{text / 'train.svm'}")
    assert dataset.source == f"features:{text / 'train.svm'}"
    assert dataset.label_names == ("0", "2")
    assert [dataset.labels(i).tolist() for i in range(3)] == [[0, 1], [], [1]]
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {"all": [0, 1, 2]}
    assert dataset.features is not None and dataset.features.dtype == np.float32
    expected = np.array([[0.5, 0, 2], [0, 1e-3, 0], [-1, 0, 0]], np.float32)
    np.testing.assert_array_equal(dataset.features, expected)


def test_svmlight_suffixes_in_any_case_and_words_in_comments(text: Path) -> None:
    (text / "train.svm").write_text("0 1:1 # a_b\n")
    (text / "train.svm").rename(text / "train.SVM")
    assert len(load_features(text / "train.SVM")) == 1
    assert set(load_features(text).splits) == {"train", "test"}


def test_svmlight_per_split(text: Path) -> None:
    dataset = load_features(text)
    assert {name: rows.tolist() for name, rows in dataset.splits.items()} == {
        "test": [0], "train": [1, 2, 3]
    }  # fmt: skip
    assert dataset.label_names == ("0", "1", "2") and dataset.labels(0).tolist() == [1]
    assert dataset.features is not None and dataset.features[0].tolist() == [0, 0, 0, 7]


def test_svmlight_numbers_from_0_where_a_file_does(text: Path) -> None:
    (text / "test.svm").write_text("1 0:7\n")
    features = load_features(text).features
    assert features is not None and features.shape == (4, 4)
    assert features[:, 0].tolist() == [7, 0, 0, 0] and features[1].tolist() == [0, 0.5, 0, 2]


def test_svmlight_vocabulary(text: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky\nsea\nboat\n")
    dataset = load_dataset(f"features:{text},vocabulary={tmp_path / 'names.txt'}")
    assert dataset.label_names == ("sky", "sea", "boat")
    assert dataset.label_matrix().int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    with pytest.raises(DataError, match=r"train.svm, line 1: labels must be in 0\.\.1 as in the v"):
        load_features(text, SvmlightOptions(str(tmp_path / "names.txt")))
    with pytest.raises(DataError, match="names its labels and features itself: vocabulary, feat"):
        load_features(write(tmp_path / "f.npz"), SvmlightOptions(str(tmp_path / "names.txt")))


def test_svmlight_numbers_of_features(text: Path) -> None:
    file = text / "test.svm"
    for options, expected in (
        ("", [0, 0, 0, 7]), ("first=0", [0, 0, 0, 0, 7]), ("features=6", [0, 0, 0, 7, 0, 0]),
        ("features=6,first=0", [0, 0, 0, 0, 7, 0]), ("first=1,features=4", [0, 0, 0, 7]),
    ):  # fmt: skip
        features = load_dataset(f"features:{file}{',' if options else ''}{options}").features
        assert features is not None and features.tolist() == [expected], options
    for options, message in (
        (SvmlightOptions(features=3), r"be in 1\.\.3, got 4: features=COUNT and first=0 or 1 say"),
        (SvmlightOptions(features=4, first=0), r"be in 0\.\.3, got 4"),
    ):
        with pytest.raises(DataError, match="test.svm, line 1: feature numbers must " + message):
            load_features(file, options)
    file.write_text("1 4:7\n\n1 0:1 4:7\n2 1:1\n")
    problems = Problems(keep=True)
    dataset = load_features(file, SvmlightOptions(first=1), problems=problems)
    assert dataset.features is not None and dataset.features.tolist() == [
        [0, 0, 0, 7],
        [1, 0, 0, 0],
    ]
    assert [dataset.labels(i).tolist() for i in range(2)] == [[0], [1]]
    assert len(problems.messages) == 1
    assert "test.svm, line 3: feature numbers must start at 1, got 0" in problems.messages[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("features=0", "features must be at least 1, got 0"),
        ("features=many", "features must be a whole number, got 'many'"),
        ("features=-3", "features must be a whole number, got '-3'"),
        ("first=2", "first must be 0 or 1, got 2"),
        (
            "features=1000000000000",
            "width that fits memory, got 1 lines with .* 1000000000000 in 6",
        ),
        ("width=3", "option of features must be one of vocabulary, features, first, got 'width'"),
    ],
)
def test_svmlight_options_are_checked(text: Path, options: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(f"features:{text / 'test.svm'},{options}")


def test_svmlight_that_unpacks_to_far_more(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 11 bytes with a vector of 2,000,000 features; then the same in enough text."""
    file = text / "train.svm"
    file.write_text("1 2000000:1\n")
    assert load_features(file).features is not None
    monkeypatch.setattr("cnnrnn.data.sources.svmlight.MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(DataError, match="got 1 lines with feature numbers up to 2000000 in 12 byt"):
        load_features(file)
    file.write_text("1 " + " ".join(f"{i}:1" for i in range(1, 20_000)) + " 2000000:1\n")
    features = load_features(file).features
    assert features is not None and features.sum() == 20_000 and features.flags.owndata


def test_svmlight_beyond_memory(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = np.zeros

    def scarce(shape: Any, *args: Any, **options: Any) -> Any:
        if shape == (1, 4):
            raise MemoryError
        return zeros(shape, *args, **options)

    monkeypatch.setattr(np, "zeros", scarce)
    with pytest.raises(DataError, match="test.svm must hold feature vectors of a width that fits"):
        load_features(text / "test.svm")


BAD_LINES = {
    "no colon": (b"1 5", "line 2 must be labels and feature:value pairs, got '1 5'"),
    "header": (b"2000 500 374", "line 2 must be labels and feature:value pairs, got '2000 500"),
    "no number": (b"1 1:x", "line 2 must be labels and"),
    "label words": (b"sky 1:1", "line 2 must be labels and"),
    "label gap": (b"1,,2 1:1", "line 2 must be labels and"),
    "index underscore": (b"1 1_0:1", "line 2 must be labels and .*'1 1_0:1' .a number with _"),
    "value underscore": (b"1 1:1_0 # a_b", "line 2 must be labels and .*a number with _"),
    "label underscore": (b"1_0 1:1", "line 2 must be labels and .*a number with _"),
    "index minus": (b"1 -1:1", "line 2 must be labels and"),
    "index twice": (b"1 2:1 2:1", "line 2 must be .*sorted and unique"),
    "index down": (b"1 2:1 1:1", "line 2 must be .*sorted and unique"),
    "index huge": (b"1 99999999999999999999:1", "line 2 must be .*too large"),
    "not text": (b"\xff\xfe\0 1:1", "line 2 must be labels and"),
    "value nan": (b"1 1:nan", "line 2: features must be finite in float32, got nan"),
    "value inf": (b"1 1:-inf", "line 2: features must be finite in float32, got -inf"),
    "value 1e400": (b"1 1:1e400", "line 2: features must be finite in float32, got inf"),
    "value 1e300": (b"1 1:1 2:1e300", "line 2: features must be finite in float32, got inf"),
    "label nan": (b"nan 1:1", "line 2: labels must be whole numbers from 0, got nan"),
    "label inf": (b"inf 1:1", "line 2: labels must be whole numbers from 0, got inf"),
    "label half": (b"1.5 1:1", "line 2: labels must be whole numbers from 0, got 1.5"),
    "label minus": (b"-1 1:1", "line 2: labels must be whole numbers from 0, got -1"),
    "label huge": (b"1e300 1:1", r"line 2: labels must be whole numbers from 0, got 1e\+300"),
    "label twice": (b"3,3 1:1", "line 2: labels must be unique, got 3 twice"),
    "bomb": (b"1 2000000000:1", "width that fits memory, got 2 lines with .* up to 2000000000"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_svmlight_errors_name_file_and_line(text: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    file = text / "train.svm"
    file.write_bytes(b"0 1:1\n" + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        load_features(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_svmlight_labels_are_compared_in_linear_time(text: Path) -> None:
    (text / "train.svm").write_text(",".join(map(str, range(100_000))) + ",99999 1:1\n")
    start = time.perf_counter()
    with pytest.raises(DataError, match="line 1: labels must be unique, got 99999 twice"):
        load_features(text / "train.svm")
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("keep", [False, True])
def test_svmlight_lines_are_checked_in_linear_time(text: Path, keep: bool) -> None:
    """A line takes microseconds, not a call of scikit-learn each: these took two minutes."""
    (text / "train.svm").write_text("1 1:1\n" * 200_000 + "x\n" + "1 1:1\n" * 50_000)
    problems = Problems(keep)
    start = time.perf_counter()
    with nullcontext() if keep else pytest.raises(DataError, match="line 200001 must be labels"):
        dataset = svmlight.load_svmlight(text / "train.svm", problems=problems)
        assert len(dataset) == 250_000
    assert len(problems.messages) == keep
    assert time.perf_counter() - start < 40


@pytest.mark.parametrize("line", [
    *(line for line, _ in BAD_LINES.values() if b"_" not in line), b"1", b"1 ", b"1,2", b" 1:1",
    b"1 qid:3 1:1", b"qid:3 1:1", b"1 qid", b"1 1:1 qid:3", b"1:1 2:2", b"1 1:1#2:x", b"1 1:1 # x",
    b"1 1:1\0#", b"1 1:1:1", b"1 :1", b"1 1:", b"1 0:1", b"1 2147483647:1", b"1 2147483648:1",
    b"1 +1:1", b"1 1:0x1", b"1 1.0:1", b"1\x0b1:1", b"1\x851:1", b"1, 1:1", b"1 1:1e999",
])  # fmt: skip
def test_svmlight_lines_are_checked_as_by_scikit_learn(line: bytes) -> None:
    def refuses(check: Callable[[], object]) -> bool:
        try:
            check()
        except (ValueError, OverflowError):
            return True
        return False

    theirs = refuses(lambda: svmlight._parse([(1, line)]))
    assert refuses(lambda: svmlight._check_line(line)) == theirs


def test_svmlight_layout_errors(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.svm must be a file, found no such file"):
        load_features(tmp_path / "nowhere.svm")
    (text / "train.libsvm").write_text("1 1:1\n")
    with pytest.raises(DataError, match="one file per split, found train.libsvm and train.svm"):
        load_features(text)
    (text / "train.svm").write_text("# nothing\n\n")
    with pytest.raises(DataError, match="train.svm must hold at least one record, got none"):
        load_features(text / "train.svm")
    (text / "train.svm").write_text(" 1:1\n")
    with pytest.raises(DataError, match="train.svm must hold at least one label, got none"):
        load_features(text / "train.svm")


@pytest.mark.parametrize("name", ["train.svm", "train.txt", "train.svm.gz", "TRAIN.TXT.GZ"])
def test_svmlight_files(text: Path, tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + sources.SVMLIGHT.encode()
    expected = load_features(text / "train.svm")
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / name
    file.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    (tmp_path / "set" / "._train.svm").write_bytes(b"\0\5")
    (tmp_path / "set" / "readme.txt").write_text("Not a split.")
    for place, splits in ((file, {"all"}), (file.parent, {"train"})):
        dataset = load_features(place)
        assert dataset.label_names == expected.label_names and set(dataset.splits) == splits
        np.testing.assert_array_equal(dataset.features, expected.features)


@pytest.mark.parametrize("names", [("training", "dev"), ("TRAIN", "Validation")])
def test_svmlight_names_of_splits(text: Path, names: tuple[str, str]) -> None:
    (text / "train.svm").rename(text / f"{names[0]}.svm")
    (text / "test.svm").rename(text / f"{names[1]}.svm")
    assert set(load_features(text).splits) == {"train", "val"}
    (text / "val.svm").write_text("1 1:1\n")
    with pytest.raises(DataError, match="one name for a split, got .* which both mean val"):
        load_features(text)


def test_svmlight_of_extreme_classification(text: Path) -> None:
    """A header of the numbers of records, features and labels; features are numbered from 0."""
    (text / "train.svm").write_text("2 5 3\n0,2 1:0.5 3:1\n1 4:2\n")
    (text / "test.svm").write_text("1 5 3\n2 2:1\n")
    dataset = load_features(text)
    assert dataset.features is not None and dataset.label_names == ("0", "1", "2")
    expected = np.zeros((3, 5), np.float32)  # in the order of the files: test, train
    expected[[0, 1, 1, 2], [2, 1, 3, 4]] = [1, 0.5, 1, 2]
    np.testing.assert_array_equal(dataset.features, expected)
    for lines, message in (
        ("3 5 3\n0 0:1\n", "train.svm, line 1: the header must count the records, got 3, found 1"),
        ("1 5 3\n3 0:1\n", r"train.svm, line 2: labels must be in 0\.\.2 as in the vocabulary or"),
        ("1 5 3\n0 5:1\n", r"train.svm, line 2: feature numbers must be in 0\.\.4, got 5"),
    ):
        (text / "train.svm").write_text(lines)
        with pytest.raises(DataError, match=message):
            load_features(text / "train.svm")


def test_svmlight_that_is_packed_wrongly(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"1 1:1\n" * 1000)
    file = text / "x.svm.gz"
    for data in (packed[:-20], b"1 1:1\n", packed[:-6] + b"\0\0" + packed[-4:]):
        file.write_bytes(data)
        with pytest.raises(DataError, match="x.svm.gz must be a complete gzip file, got"):
            load_features(file)
    monkeypatch.setattr("cnnrnn.data.sources.svmlight.MAX_UNPACKED_BYTES", 1000)
    monkeypatch.setattr("cnnrnn.data.sources.svmlight.MAX_UNPACKED_RATIO", 2)
    file.write_bytes(packed)
    with pytest.raises(DataError, match="must not unpack to more than 2 times its size, got more"):
        load_features(file)


@pytest.mark.parametrize("name", ["x.arff", "x.ARFF", "x.arff.gz"])
def test_arff_says_how_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("@relation marks\n")
    with pytest.raises(
        DataError, match="got ARFF: convert it, .*load_from_arff.*dump_svmlight_fil"
    ):
        load_dataset(f"features:{tmp_path / name}")


def test_svmlight_missing_extra(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cnnrnn\[vision\]"'):
        load_features(text)


def test_every_problem_is_kept(text: Path, tmp_path: Path) -> None:
    (text / "train.svm").write_text("1 1:1\nx 1:1\n2 1:nan\n\n3 2:2\n-1 1:1\n4 1:1 1:1\n")
    problems = Problems(keep=True)
    dataset = load_features(text, problems=problems)
    lines = [message.partition("train.svm, ")[2][:6] for message in problems.messages]
    assert sorted(lines) == ["line 2", "line 3", "line 6", "line 7"]
    assert dataset.label_names == ("1", "3") and len(dataset.split("train")) == 2
    labels, features = np.array(arrays()["labels"]), np.array(arrays()["features"])
    labels[1, 0], features[3, 1] = 7, np.nan
    file = write(tmp_path / "f.npz", labels=labels, features=features)
    problems = Problems(keep=True)
    dataset = load_features(file, problems=problems)
    assert [message[:5] for message in problems.messages] == ["row 1", "row 3"]
    assert dataset.rows.tolist() == [0, 2, 4] and dataset.splits["val"].tolist() == [2]
    assert [dataset.labels(i).tolist() for i in range(3)] == [[0, 2], [1], [2]]
