from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.images import IMAGE_SUFFIXES
from cnnrnn.data.report import check_source
from cnnrnn.data.sources.folder import load_folder
from tests.data import sources
from tests.nobody import as_nobody


def write(root: Path, *names: str) -> None:
    for grey, name in enumerate(names):
        sources.write_picture(root / "first.png", grey)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "first.png").rename(root / name)


def read(dataset: Dataset) -> dict[str, dict[str, list[str]]]:
    """Split to path and labels of each record."""
    paths = dataset.image_paths
    assert paths is not None
    return {
        split: {str(paths[i]): [dataset.label_names[label] for label in dataset.labels(int(i))]
                for i in rows}
        for split, rows in dataset.splits.items()
    }  # fmt: skip


def test_a_folder_per_label(tmp_path: Path) -> None:
    write(tmp_path, "dry lake/1.png", "river/2.png", "river/day 3/4.JPG")
    dataset = load_dataset(f"folder:{tmp_path}")
    assert dataset.source == f"folder:{tmp_path}" and dataset.label_names == ("dry lake", "river")
    assert read(dataset) == {"all": {
        f"{tmp_path}/dry lake/1.png": ["dry lake"], f"{tmp_path}/river/2.png": ["river"],
        f"{tmp_path}/river/day 3/4.JPG": ["river"],
    }}  # fmt: skip


@pytest.mark.parametrize("train", ["train", "Training"])
def test_splits_of_labels(tmp_path: Path, train: str) -> None:
    write(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", "valid/cat/1.png", "odd/dog/5.png")
    assert read(load_folder(tmp_path)) == {
        "train": {f"{tmp_path}/{train}/cat/1.png": ["cat"],
                  f"{tmp_path}/{train}/dog/2.png": ["dog"]},
        "val": {f"{tmp_path}/valid/cat/1.png": ["cat"]},
        "odd": {f"{tmp_path}/odd/dog/5.png": ["dog"]},
    }  # fmt: skip


def test_a_label_that_is_named_like_a_split(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "plane/2.png")
    assert load_folder(tmp_path).label_names == ("plane", "train")


def test_one_name_under_several_labels_is_one_picture(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/1.png")
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "train/dog/1.png")
    assert read(load_folder(tmp_path)) == {
        "train": {f"{tmp_path}/train/cat/1.png": ["cat", "dog"],
                  f"{tmp_path}/train/dog/2.png": ["dog"]},
        "val": {f"{tmp_path}/val/cat/1.png": ["cat"]},
    }  # fmt: skip


def test_pictures_of_one_name_that_differ_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png")
    with pytest.warns(UserWarning, match="1 images differ in content .* the first: 'cat/1.png'"):
        assert len(load_folder(tmp_path)) == 2


def test_what_is_no_labelled_picture(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/._1.png", "cat/.hidden/2.png", "__MACOSX/cat/1.png", "x.png")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").write_bytes(b"x")
    problems = Problems()
    with pytest.warns(
        UserWarning, match="1 images are in no folder of a label, the first: 'x.png'"
    ):
        dataset = load_folder(tmp_path, problems=problems)
    assert read(dataset) == {"all": {f"{tmp_path}/cat/1.png": ["cat"]}}
    assert problems.notes == [
        f"{tmp_path}: 1 files are no images by their suffix, the first: 'cat/notes.txt'"
    ]


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".PNG", ".Jfif"])
def test_suffixes(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / f"1{suffix}").write_bytes(b"not looked at")
    assert len(load_folder(tmp_path)) == 1


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "cat/1.png")
    write(tmp_path / "outside", "2.png", "deep/3.png")
    (root / "dog").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "again").symlink_to(root / "dog")  # it leads into itself
    with pytest.raises(DataError, match="got dog which links to .*outside: follow_links allows it"):
        load_folder(root)
    dataset = load_dataset(f"folder:{root}", follow_links=True)
    assert sorted(path.name for path in dataset.image_paths or ()) == ["1.png", "2.png", "3.png"]
    (root / "dog").unlink()
    (root / "cat" / "notes.txt").symlink_to(tmp_path / "outside" / "2.png")  # no picture's name
    assert len(load_folder(root)) == 1
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "again").unlink()
    with pytest.warns(
        UserWarning, match="1 images are in no folder of a label, the first: '2.png'"
    ):
        assert len(load_folder(tmp_path / "link")) == 1


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere must be a folder with a folder of images per lab"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold images as LABEL/NAME.jpg or SPLIT/LABEL/NAME"):
        load_folder(tmp_path)
    write(tmp_path, "x/cat/1.png", "y/dog/1.png")
    with pytest.raises(DataError, match="folders train, val or test of these, got folders in 'x'"):
        load_folder(tmp_path)
    write(tmp_path, "val/cat/1.png", "valid/cat/1.png")
    with pytest.raises(DataError, match="one name for a split, got 'val' and 'valid', which both"):
        load_folder(tmp_path)


def test_a_stray_picture_beside_the_labels_of_a_split(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/stray.png", "test/unlabelled.png")
    message = "2 images are in no folder of a label, the first: 'test/unlabelled.png'"
    with pytest.warns(UserWarning, match=message):
        dataset = load_folder(tmp_path)
    assert read(dataset) == {"train": {f"{tmp_path}/train/cat/1.png": ["cat"]}}


def test_a_folder_below_that_cannot_be_listed(public_folder: Path) -> None:
    write(public_folder, "cow/1.png", "sky/2.png")
    for name in ("cow/more", "sea", ".hidden"):
        (public_folder / name).mkdir()
        (public_folder / name).chmod(0)
    spec = f"folder:{public_folder}"
    with as_nobody():
        with pytest.raises(DataError, match=f"^{public_folder}/.*cannot be listed: Permission den"):
            load_dataset(spec)
        message = f"{public_folder}: 2 folders were left out, the first: .* cannot be listed: Perm"
        with pytest.warns(UserWarning, match=message):
            dataset = load_dataset(spec, on_bad_image="skip")
        report = check_source(spec)
    assert [path.name for path in dataset.image_paths or ()] == ["1.png", "2.png"]
    assert len(report.problems) == 2 and report.records == 2


def test_a_root_that_cannot_be_listed(public_folder: Path) -> None:
    (public_folder / "a").mkdir()
    (public_folder / "a").chmod(0)
    with as_nobody(), pytest.raises(DataError, match="a cannot be listed: Permission denied"):
        load_dataset(f"folder:{public_folder / 'a'}", on_bad_image="skip")


def test_a_link_in_a_circle_is_no_file(tmp_path: Path) -> None:
    write(tmp_path, "cow/1.png")
    (tmp_path / "cow" / "2.png").symlink_to(tmp_path / "cow" / "2.png")
    for follow in (False, True):
        dataset = load_folder(tmp_path, follow_links=follow)
        assert [path.name for path in dataset.image_paths or ()] == ["1.png"]
