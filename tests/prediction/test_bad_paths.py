"""Paths that name no picture, or none that may be read: each is a bad image in its place."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnrnn import BadImageError, DataError
from cnnrnn.cli import main
from cnnrnn.data.images import BadImageWarning
from cnnrnn.prediction.inputs import folder_images
from tests.nobody import as_nobody
from tests.prediction.test_predict import make_model


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.predict([np.zeros((4, 4, 3), np.uint8), b"no picture"], on_bad_image="skip")  # imports
    return model


@pytest.fixture
def pictures(public_folder: Path) -> list[Path]:
    """Three that are told apart."""
    random = np.random.default_rng(0)
    files = [public_folder / f"{i}.png" for i in range(3)]
    for file in files:
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file)
    return files


def secret_file(folder: Path) -> Path:
    file = folder / "secret.png"
    Image.new("RGB", (8, 8)).save(file)
    file.chmod(0)
    return file


def in_secret_folder(folder: Path) -> Path:
    (folder / "secret").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "secret" / "a.png")
    (folder / "secret").chmod(0)
    return folder / "secret" / "a.png"


def secret_folder(folder: Path) -> Path:
    return in_secret_folder(folder).parent


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def loop(folder: Path) -> Path:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder / "loop.png"


def bound_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s.png"))
    return folder / "s.png"


PATHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file without rights": (secret_file, "Permission denied"),
    "a file in a folder without rights": (in_secret_folder, "Permission denied"),
    "a folder without rights": (secret_folder, "a folder that cannot be listed: Permission denied"),
    "a long name": (lambda folder: folder / ("x" * 300 + ".png"), "File name too long"),
    "a long path": (lambda folder: folder / ("x/" * 3000), "File name too long"),
    "a NUL": (lambda folder: folder / "a\0b.png", "embedded null byte"),
    "a loop": (loop, "Too many levels of symbolic links"),
    "below a loop": (lambda folder: loop(folder) / "a.png", "Too many levels of symbolic links"),
    "below a file": (lambda folder: folder / "0.png" / "a.png", "Not a directory"),
    "nothing": (lambda folder: folder / "gone.png", "no such file"),
    "a pipe": (pipe, "something that is not a file"),
    "a socket": (bound_socket, "something that is not a file"),
    "a device": (lambda folder: Path("/dev/zero"), "something that is not a file"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", PATHS)
def test_a_bad_path_is_skipped_in_its_place(model, pictures, kind, workers):
    make, reason = PATHS[kind]
    bad = make(pictures[0].parent)
    alone = model.predict(pictures)
    with as_nobody():
        found = model.predict(
            [pictures[0], bad, str(bad), *pictures[1:]], on_bad_image="skip", workers=workers,
            batch_size=2,
        )  # fmt: skip
        assert [p.source for p in found] == [str(p) for p in (pictures[0], bad, bad, *pictures[1:])]
        with pytest.raises(BadImageError) as caught:
            model.predict([pictures[0], bad], workers=workers)
    message = f"{bad} must be a readable image, found: {reason}"
    assert [p.error for p in found] == [None, message, message, None, None]
    assert str(caught.value) == message
    for one, other in zip([found[0], *found[3:]], alone, strict=True):
        assert one.labels == other.labels
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def test_a_path_that_cannot_be_listed_by_itself(model, public_folder):
    folder = secret_folder(public_folder)
    with as_nobody():
        for mode in ("error", "skip"):
            with pytest.raises(BadImageError, match="secret must .*cannot be listed: Permission"):
                model.predict(folder, on_bad_image=mode)


def test_folders_below_that_cannot_be_listed_are_named(model, pictures):
    folder = pictures[0].parent
    for name in ("b", "c"):
        (folder / name).mkdir()
        (folder / name).chmod(0)
    (folder / ".hidden").mkdir()
    (folder / ".hidden").chmod(0)  # holds no pictures in any case
    with as_nobody():
        with pytest.raises(BadImageError, match=f"{folder}/[bc] must .*: Permission denied"):
            model.predict(folder)
        with pytest.warns(BadImageWarning) as caught:
            found = model.predict([folder], on_bad_image="skip")
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"2 folders in {folder} were left out, the first: ")
    assert [p.source for p in found] == [str(file) for file in pictures]
    assert not any(p.error for p in found)


@pytest.mark.filterwarnings("ignore::cnnrnn.data.images.BadImageWarning")
def test_what_a_folder_holds_under_a_pictures_name_is_answered(model, pictures):
    """Of a folder whose files may not even be looked at, too."""
    folder = pictures[0].parent
    bad = [pipe(folder), loop(folder), bound_socket(folder)]
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "4.png").mkdir()  # a folder
    (folder / "link").symlink_to(folder)  # is not followed
    expected = sorted([*pictures, *bad, folder / "gone.png"])
    found = model.predict(folder, on_bad_image="skip")
    assert [p.source for p in found] == [str(file) for file in expected]
    assert [p.error is None for p in found] == [file in pictures for file in expected]
    folder.chmod(0o744)  # may be listed, not entered
    with as_nobody():
        if os.geteuid() == 0:
            pytest.skip("no way to lose rights here")
        found = model.predict(folder, on_bad_image="skip")
    assert len(found) == len(expected) and all(p.error for p in found)


def test_a_picture_that_is_gone_when_its_turn_comes(model, pictures):
    def source() -> Iterator[Path]:
        for file in folder_images(pictures[0].parent):
            pictures[1].unlink(missing_ok=True)
            yield file

    found = model.predict(source(), on_bad_image="skip")
    assert [p.error is None for p in found] == [True, False, True]
    assert found[1].error == f"{pictures[1]} must be a readable image, found: no such file"


def test_nested_lists_and_iterators_keep_their_places(model, pictures):
    folder = secret_folder(pictures[0].parent)
    with as_nobody():
        for images in ([[pictures[0], [folder]], pictures[1]], iter([pictures[0], folder, folder])):
            found = model.predict(images, on_bad_image="skip")
            assert len(found) == 3 and [p.error is None for p in found][:2] == [True, False]


def test_an_empty_folder_is_still_an_error(model, public_folder):
    with pytest.raises(DataError, match="holds no pictures"):
        model.predict(public_folder, on_bad_image="skip")


def test_the_command_goes_on(pictures, capsys):
    folder = pictures[0].parent
    (folder / "below").mkdir()
    (folder / "below").chmod(0)
    words = ["predict", str(folder), str(secret_file(folder)), "x" * 300, "--format=jsonl"]
    assert main([*words, "--device=cpu", "--on-bad-image=skip"]) == 0  # imports
    capsys.readouterr()
    tags = folder / "tags.csv"
    tags.write_text("image,labels\n0.png,sky\n")
    with as_nobody(), warnings.catch_warnings():
        warnings.simplefilter("always")
        command = [*words, "--device=cpu", "--on-bad-image=skip", f"--known-from=csv:{tags}"]
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert main([*words, "--device=cpu"]) == 1
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 6 and ["error" in row for row in rows] == [False] * 3 + [True] * 3
    assert err.count("1 folders in") == 1 and "3 images could not be read" in err
    assert capsys.readouterr().err.startswith("cnnrnn: error: ")
