"""The synthetic scenes: reproducible, valid COCO, and true to the rules their labels promise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnrnn.data.sources.scenes import (
    SCENE_LABELS,
    THINGS,
    Scene,
    draw_labels,
    draw_scene,
    write_scenes,
)

GROUND_KINDS = {"road", "field", "sea", "snow"}

# Stated here once more, independently of the tables that draw them: label -> what it requires.
REQUIRES: dict[str, set[str]] = {
    **{"cloud": {"sky"}, "sun": {"sky"}, "moon": {"sky", "night"}, "star": {"sky", "night"}},
    **{"plane": {"sky"}, "car": {"road"}, "truck": {"road"}, "traffic light": {"road", "car"}},
    **{"mailbox": {"road"}, "barn": {"field"}, "tractor": {"field", "barn"}, "sheep": {"field"}},
    **{"boat": {"sea"}, "sailboat": {"sea", "boat"}, "gull": {"sea", "boat"}, "buoy": {"sea"}},
    **{"umbrella": {"beach"}, "beach": {"sea"}, "skier": {"snow"}},
}
NEVER_TOGETHER = (
    *(("night", "sun"), ("night", "plane"), ("night", "beach"), ("night", "skier")),
    *(("moon", "star"), ("cloud", "star"), ("cloud", "plane"), ("sun", "plane")),
    *(("night", "sailboat"), ("night", "tractor"), ("boat", "buoy"), ("tractor", "sheep")),
    *(("traffic light", "mailbox"), ("traffic light", "truck"), ("traffic light", "tree")),
)
TWINS = (("buoy", "mailbox"), ("gull", "sheep"), ("plane", "star"), ("moon", "sun"))


def scene(index: int, image_size: int = 64) -> Scene:
    return draw_scene(np.random.default_rng([0, 0, index]), image_size)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(index) for index in range(600)]


@pytest.fixture(scope="module")
def label_sets() -> list[frozenset[str]]:
    return [draw_labels(np.random.default_rng([1, index])) for index in range(4000)]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_picture_shows_exactly_the_labels_that_were_drawn(scenes: list[Scene]) -> None:
    for index, shown in enumerate(scenes):
        labels = draw_labels(np.random.default_rng([0, 0, index]))
        assert {SCENE_LABELS[label] for label, _ in shown.boxes} == labels


@pytest.mark.parametrize("image_size", [32, 64, 101, 224])
def test_boxes_lie_inside_the_picture(image_size: int) -> None:
    for index in range(40):
        shown = scene(index, image_size)
        assert shown.image.mode == "RGB" and shown.image.size == (image_size, image_size)
        for _, (x, y, width, height) in shown.boxes:
            assert x >= 0 and y >= 0 and width >= 1 and height >= 1
            assert x + width <= image_size and y + height <= image_size


def test_box_fits_what_is_drawn() -> None:
    # A red post in a picture without other red: the box must hold its reddest pixel.
    found = 0
    for index in range(400):
        shown = scene(index, 128)
        labels = {SCENE_LABELS[label] for label, _ in shown.boxes}
        if "buoy" in labels and not labels & {"umbrella", "night"}:
            box = next(box for label, box in shown.boxes if SCENE_LABELS[label] == "buoy")
            smooth = np.asarray(shown.image.reduce(2), dtype=np.float64)
            redness = smooth[..., 0] - smooth[..., 1:].mean(axis=2)
            if "beach" in labels or redness.max() < redness.mean() + 60:
                continue  # warm sand is as red as a faint post
            y, x = np.unravel_index(redness.argmax(), redness.shape)
            assert box[0] - 1 <= 2 * x <= box[0] + box[2]
            assert box[1] - 1 <= 2 * y <= box[1] + box[3]
            assert box[2] <= 10 and box[3] <= 12
            found += 1
    assert found >= 5


def test_rules_hold(label_sets: list[frozenset[str]]) -> None:
    for labels in label_sets:
        assert labels <= set(SCENE_LABELS)
        assert len(labels & GROUND_KINDS) <= 1
        for label in labels:
            assert REQUIRES.get(label, set()) <= labels, labels
        for one, other in NEVER_TOGETHER:
            assert not {one, other} <= labels, labels
        assert not {"snow", "tree"} <= labels or "skier" in labels


def test_correlations_are_strong(label_sets: list[frozenset[str]]) -> None:
    def share(label: str, given: set[str], without: set[str] = frozenset()) -> float:
        chosen = [labels for labels in label_sets if given <= labels and not without & labels]
        return sum(label in labels for labels in chosen) / len(chosen)

    assert share("gull", {"boat"}) > 0.8
    assert share("umbrella", {"beach", "sun"}) > 0.8 > 0.3 > share("umbrella", {"beach"}, {"sun"})
    assert share("sheep", {"field", "tree"}) > 0.6 > 0.2 > share("sheep", {"field"}, {"tree"})
    assert share("mailbox", {"road", "tree"}) > 0.7 > 0.2 > share("mailbox", {"road"}, {"tree"})


def test_frequencies_have_a_long_tail(label_sets: list[frozenset[str]]) -> None:
    counts = Counter(label for labels in label_sets for label in labels)
    assert set(counts) == set(SCENE_LABELS)
    shares = sorted(count / len(label_sets) for count in counts.values())
    assert shares[-1] > 0.5
    assert 0.003 < shares[0] < 0.012
    assert 3.5 < sum(shares) < 4.3
    blank = sum(not labels for labels in label_sets) / len(label_sets)
    assert 0 < blank < 0.015


@pytest.mark.parametrize("twins", TWINS)
def test_twins_are_drawn_identically(twins: tuple[str, str]) -> None:
    one, other = (THINGS[label][0] for label in twins)
    assert one == other


@pytest.mark.parametrize("twins", TWINS)
def test_context_tells_twins_apart(twins: tuple[str, str], scenes: list[Scene]) -> None:
    index = {label: SCENE_LABELS.index(label) for label in twins}
    per_scene = [{label for label, _ in shown.boxes} for shown in scenes]
    assert all(any(i in labels for labels in per_scene) for i in index.values())
    assert not any(set(index.values()) <= labels for labels in per_scene)


def test_same_seed_writes_the_same_bytes_whatever_the_counts(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", train=4, val=3, test=2, seed=5)
    write_scenes(tmp_path / "again", train=4, val=3, test=2, seed=5)
    write_scenes(tmp_path / "more", train=7, val=4, test=2, seed=5)
    write_scenes(tmp_path / "other", train=4, val=3, test=2, seed=6)
    few, more, other = (contents(tmp_path / name) for name in ("few", "more", "other"))
    assert few == contents(tmp_path / "again")
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 9
    assert all(few[name] == more[name] for name in pictures)
    assert all(few[name] != other[name] for name in pictures)
    assert len({few[name] for name in pictures}) == 9  # no split repeats another


@pytest.mark.parametrize("image_size", [64, 48])
def test_written_files_are_valid_coco(tmp_path: Path, image_size: int) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    calls: list[tuple[int, int | None]] = []

    @contextmanager
    def told(_: str, total: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda count: calls.append((count, total))

    write_scenes(
        tmp_path / "scenes",
        train=11,
        val=5,
        test=0,
        image_size=image_size,
        progress=told,
    )
    assert calls == [(1, 16)] * 16
    for number, (split, count) in enumerate({"train": 11, "val": 5, "test": 0}.items()):
        path = tmp_path / "scenes" / "annotations" / f"instances_{split}.json"
        dataset = coco.COCO(str(path))
        names = {row["id"]: row["name"] for row in dataset.loadCats(dataset.getCatIds())}
        assert tuple(names.values()) == SCENE_LABELS
        assert 0 not in names and sorted(names) != list(range(len(names)))
        assert len(dataset.getImgIds()) == count
        for index, row in enumerate(dataset.loadImgs(dataset.getImgIds())):
            with Image.open(tmp_path / "scenes" / split / row["file_name"]) as image:
                assert image.size == (row["width"], row["height"]) == (image_size, image_size)
                drawn = draw_scene(np.random.default_rng([0, number, index]), image_size)
                assert image.tobytes() == drawn.image.tobytes()
            rows = dataset.loadAnns(dataset.getAnnIds(imgIds=row["id"]))
            written = [(names[row["category_id"]], tuple(row["bbox"])) for row in rows]
            assert written == [(SCENE_LABELS[label], box) for label, box in drawn.boxes]
            assert all(row["area"] == row["bbox"][2] * row["bbox"][3] for row in rows)
            assert all(row["iscrowd"] == 0 for row in rows)
        ids = [row["id"] for row in json.loads(path.read_text(encoding="utf-8"))["annotations"]]
        assert len(set(ids)) == len(ids)


def test_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        write_scenes(folder, train=1, val=0, test=0)
    assert contents(tmp_path) == {str(Path("scenes") / "notes.txt"): b"mine"}


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scenes").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        write_scenes(tmp_path / "scenes", train=1, val=0, test=0)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=1, val=0, test=0)
    assert (tmp_path / "train" / "000001.png").is_file()


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    written: list[int] = []

    def advance(count: int) -> None:
        written.append(count)
        if sum(written) == 3:
            raise KeyboardInterrupt

    def interrupt(_: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(advance)

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", train=5, val=0, test=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be in 32..512, got 31"):
        draw_scene(np.random.default_rng(0), 31)
    with pytest.raises(ValueError, match="val must be at least 0, got -1"):
        write_scenes(tmp_path / "scenes", val=-1)
    with pytest.raises(ValueError, match="image_size must be in 32..512, got 513"):
        write_scenes(tmp_path / "scenes", train=1, image_size=513)
    assert list(tmp_path.iterdir()) == []
