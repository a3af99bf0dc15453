"""`predict --html` and `--neighbours`: what they add, and what they leave as it was."""

from __future__ import annotations

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from cnnrnn import Ensemble
from cnnrnn.cli import main
from tests.prediction.test_html import Page, requires_nothing
from tests.prediction.test_predict import make_model

FORMS = ["table", "csv", "jsonl"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    make_model().save(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures, one of whose names is no text, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c'\"<.png", os.fsdecode(b"\xff.png")):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def predict(run, pictures, *words):
    command = ["predict", str(pictures), "--model", str(run), "--device=cpu"]
    return main([*command, "--on-bad-image=skip", *map(str, words)])


@pytest.mark.parametrize("form", FORMS)
def test_neighbours_in_every_form(run, pictures, tmp_path, form):
    plain, more = tmp_path / "plain", tmp_path / "more"
    assert predict(run, pictures, "--format", form, "--out", plain) == 0
    assert predict(run, pictures, "--format", form, "--out", more, "--neighbours=2") == 0
    expected = make_model().predict(pictures, on_bad_image="skip")
    near = [None if p.error else p.neighbours(2) for p in expected]
    first, second = (
        file.read_text(encoding="utf-8", errors="surrogateescape") for file in (plain, more)
    )
    if form == "jsonl":
        records = [json.loads(line) for line in second.splitlines()]
        for record, own in zip(records, near, strict=True):
            found = record.pop("neighbours", None)
            assert found == (
                own and [{"label": name, "cosine": round(c, 4)} for name, c in own]
            )  # fmt: skip
        assert records == [json.loads(line) for line in first.splitlines()]
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(second)))
        names = [";".join(name for name, _ in own or ()) for own in near]
        assert [row.pop("neighbours") for row in rows] == names
        assert rows == list(csv.DictReader(io.StringIO(first)))
    else:
        for line, former, own in zip(second.splitlines(), first.splitlines(), near, strict=True):
            added = "; near: " + ", ".join(f"{name} {c:.2f}" for name, c in own) if own else ""
            assert line == former + added


@pytest.mark.parametrize("form", FORMS)
def test_a_page_beside_the_rest(run, pictures, tmp_path, form):
    plain, rest, file = tmp_path / "plain", tmp_path / "rest", tmp_path / "page.html"
    assert predict(run, pictures, "--format", form, "--out", plain) == 0
    words = ("--format", form, "--out", rest, "--html", file, "--neighbours=3")
    if form == "csv":
        words = words[:-1]
    assert predict(run, pictures, *words) == 0
    if form == "csv":
        assert rest.read_bytes() == plain.read_bytes()
    page = Page(file.read_text(encoding="utf-8"))
    requires_nothing(page)
    assert page.of("h1") == [f"Predictions of {run}"]
    assert len(page.all("figure")) == 5 and len(page.all("img")) == 4
    assert sum("near: " in data for data in page.of("p")) == (0 if form == "csv" else 4)


def test_a_page_and_standard_output(run, pictures, tmp_path, capsys):
    assert predict(run, pictures / "a.png") == 0
    plain = capsys.readouterr().out
    assert predict(run, pictures / "a.png", "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out == plain and plain.count("\n") == 1
    assert (tmp_path / "page.html").exists()


def test_an_error_leaves_no_page(run, pictures, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main(["predict", str(pictures), "--model", str(run), "--html", str(file)]) == 1
    assert "must be a readable image" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_whose_disk_is_full_is_said(run, pictures, tmp_path, capsys):
    words = ("--out", "/dev/full", "--html", tmp_path / "page.html")
    assert predict(run, pictures, *words) == 1
    assert capsys.readouterr().err == "cnnrnn: error: /dev/full: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_refused_at_once(run, pictures, tmp_path, capsys):
    Ensemble([make_model(), make_model()]).save(tmp_path / "both")
    for model, words, message in (
        (run, ["--neighbours=0"], "--neighbours must be at least 1, got 0"),
        (tmp_path / "both", ["--neighbours=2"], "need a single model, got an ensemble"),
        ("m.onnx", ["--neighbours=2"], "--neighbours needs a checkpoint folder, got the exported"),
        (run, ["--html=missing/page.html"], "--html missing/page.html must be in a folder that"),
        (run, ["--html=a.html", "--out=./a.html"], "--html and --out must name two files"),
    ):
        assert predict(model, pictures, *words) == 1
        out, err = capsys.readouterr()
        assert message in err and not out
    assert predict(tmp_path / "both", pictures / "a.png", "--html", tmp_path / "page.html") == 0
