from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnrnn.data import DataError, load_dataset
from cnnrnn.data.features import load_features


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
