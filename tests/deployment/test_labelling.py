"""Labelling that is stopped at any moment and resumed: the rows of an undisturbed run, in order."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrnn import CNNRNN, BadImageError, Head, ModelConfig, Prediction, SearchConfig
from cnnrnn.api import DEMO_MODEL
from cnnrnn.cli import main
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.deployment import labelling
from cnnrnn.deployment.labelling import Images, LabellingError, label_files
from cnnrnn.deployment.rows import FORMS, Csv, JsonLines, Parquet, RowOptions, form_of, record_of
from cnnrnn.labels import LabelSpace
from cnnrnn.machine.lock import InUseError, alone_in

LABELS = ("sky", "sea", "a;b", 'say "x"', "é")
ALL = RowOptions("all", 2, 1)
IDENTITY = {"weights": "abc", "decide": "path"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    head = Head(len(LABELS), 4, chain_term=True)
    config = ModelConfig(backbone="features")
    return CNNRNN(config, LabelSpace.given(LABELS), head, None, SearchConfig()).eval()


@pytest.fixture(scope="module")
def predictions(model):
    generator = torch.Generator().manual_seed(1)
    return model.predict_features(5 * torch.randn(64, 4, generator=generator))


class Labeller:
    """Predicts by a file's content, a number, and counts."""

    def __init__(self, predictions, stop_after=None):
        self.predictions, self.stop_after = predictions, stop_after
        self.seen: list[str] = []

    def __call__(self, images, positions):
        assert len(images) == len(positions)
        for image in images:
            if self.stop_after is not None and len(self.seen) >= self.stop_after:
                raise KeyboardInterrupt
            path = image if isinstance(image, str) else image.path
            self.seen.append(path)
            try:
                number = int(Path(path).read_text())
            except (OSError, ValueError) as error:
                yield Prediction(path, f"{path} cannot be read: {error}")
            else:
                yield replace(self.predictions[number % 64], source=path)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{i:03d}.jpg" for i in range(57)] + ["x'y.jpg", 'x"y.jpg', "x,y\n.jpg", "é.jpg"]
    for i, name in enumerate(names):
        (folder / name).write_text(str(7 * i))
    (folder / os.fsdecode(b"z\xff.jpg")).write_text("3")
    return sorted(str(file) for file in folder.iterdir())


def undisturbed(files, predictions, tmp_path, form="jsonl", options=ALL):
    out = tmp_path / f"whole.{form}"
    label_files(files, Labeller(predictions), out, FORMS[form](options, LABELS), IDENTITY)
    assert not out.with_name(f".{out.name}.labelling").exists()
    return out.read_bytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [RowOptions(), ALL], ids=["labels", "all"])
def test_rows_are_what_was_predicted(files, predictions, tmp_path, form, options):
    whole = undisturbed(files, predictions, tmp_path, form, options)
    (tmp_path / "copy").write_bytes(whole)
    rows = FORMS[form](options, LABELS)
    read = list(rows.read(tmp_path / "copy"))
    assert len(read) == len(files)
    for file, (image, error, row) in zip(files, read, strict=True):
        text = file if form != "parquet" else file.replace("\udcff", "\\xff")
        assert image == text and error is None
        expected = replace(predictions[int(Path(file).read_text()) % 64], source=file)
        assert row == rows.row(record_of(expected, options)) or form == "parquet"
        if form == "parquet":
            assert row["labels"] == expected.labels
            scores = dict(row["scores"])
            wanted = expected.scores
            assert set(scores) == (set(LABELS) if options.scores == "all" else set(row["labels"]))
            assert all(abs(scores[name] - wanted[name]) < 1e-5 for name in scores)


def test_a_record_has_what_was_asked_for(predictions):
    p = max(predictions, key=lambda p: len(p.labels))
    assert set(record_of(p, RowOptions())) == {"image", "labels", "log_prob", "scores"}
    record = record_of(p, RowOptions("all", 2, 3))
    assert list(record["scores"]) == list(LABELS)
    assert [set(s["labels"]) for s in record["sets"]] == [set(s) for s, _ in p.sets[:2]]
    assert record["sets"][0]["labels"] == sorted(record["sets"][0]["labels"], key=LABELS.index)
    assert [n["label"] for n in record["neighbours"]] == [n for n, _ in p.neighbours(3)]
    assert record_of(Prediction("a", "bad"), ALL) == {"image": "a", "error": "bad"}


@pytest.mark.parametrize("form", FORMS)
def test_stopped_and_resumed_it_is_as_if_undisturbed(files, predictions, tmp_path, form):
    whole = undisturbed(files, predictions, tmp_path, form)
    out, rows = tmp_path / f"out.{form}", FORMS[form](ALL, LABELS)
    seen = []
    for stop in (0, 1, 23, 17, None):
        labeller = Labeller(predictions, stop)
        try:
            label_files(
                files, labeller, out, rows, IDENTITY, resume=True, batch_size=4, part_rows=5
            )
        except KeyboardInterrupt:
            assert not out.exists()
            labeller.seen = labeller.seen[: len(labeller.seen) // 4 * 4]  # whole batches are kept
        seen += labeller.seen
    assert out.read_bytes() == whole
    assert seen == files  # each once, and every run begins with a whole batch


def test_a_complete_run_is_not_repeated(files, predictions, tmp_path):
    for form in FORMS:
        out, rows = tmp_path / f"out.{form}", FORMS[form](ALL, LABELS)
        label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
        whole = out.read_bytes()
        again = Labeller(predictions)
        summary = label_files(files, again, out, rows, IDENTITY, resume=True)
        assert again.seen == [] and summary.labelled == 0
        assert out.read_bytes() == whole
        assert "labelled before" in summary.lines(out)[0]


def test_without_resume_a_stopped_run_starts_over(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    with pytest.raises(KeyboardInterrupt):
        label_files(files, Labeller(predictions, 30), out, rows, IDENTITY, batch_size=1)
    other = {**IDENTITY, "decide": "k"}
    label_files(files, again := Labeller(predictions), out, rows, other)
    assert again.seen == files
    assert [file.name for file in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("form", FORMS)
def test_new_and_changed_files_alone_are_labelled(files, predictions, tmp_path, form):
    out, rows = tmp_path / f"out.{form}", FORMS[form](ALL, LABELS)
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    os.unlink(files[4])
    Path(files[9]).write_text("33333")
    os.utime(files[12], ns=(1, 1))
    new = str(Path(files[0]).with_name("005b.jpg"))
    Path(new).write_text("20")
    now = sorted([*files[:4], *files[5:], new])
    now.reverse()  # another order of the files, too
    labeller = Labeller(predictions)
    summary = label_files(now, labeller, out, rows, IDENTITY, resume=True, part_rows=2)
    assert sorted(labeller.seen) == sorted([new, files[9], files[12]])
    assert (summary.images, summary.labelled) == (len(now), 3)
    assert out.read_bytes() == undisturbed(now, predictions, tmp_path, form)


def test_what_could_not_be_read_is_named_and_tried_again(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(RowOptions(), LABELS)
    bad = files[3:25]
    kept = {file: Path(file).read_text() for file in bad}
    for file in bad:
        Path(file).write_text("no number")
    folder = BadImageError("/locked", "a folder that cannot be listed")
    paths = [*files, folder, "/not/there.jpg"]
    summary = label_files(paths, Labeller(predictions), out, rows, IDENTITY, resume=True)
    lines = summary.lines(out)
    assert summary.bad == 24 and lines[1] == "24 could not be read, the first 10:"
    assert len(lines) == 12 and bad[0] in lines[2]
    errors = [json.loads(line).get("error") for line in out.read_text("utf-8", "surrogateescape")
              .splitlines()]  # fmt: skip
    assert sum(error is not None for error in errors) == 24
    for file, text in kept.items():
        Path(file).write_text(text)
    labeller = Labeller(predictions)
    summary = label_files(paths, labeller, out, rows, IDENTITY, resume=True)
    assert labeller.seen == [*bad, "/locked", "/not/there.jpg"] and summary.bad == 2


def test_a_file_named_twice_is_labelled_once(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    twice, labeller = [files[5], *files], Labeller(predictions)
    label_files(twice, labeller, out, rows, IDENTITY)
    assert [image for image, _, _ in rows.read(out)] == twice
    assert labeller.seen == [files[5], *files[:5], *files[6:]]


@pytest.mark.parametrize("step", range(8))
def test_stopped_while_the_end_is_written(files, predictions, tmp_path, monkeypatch, step):
    """Every move of a file is a moment to stop at; what was there before stays until the last."""
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    label_files(files[:30], Labeller(predictions), out, rows, IDENTITY, resume=True)
    before = out.read_bytes()
    whole = undisturbed(files, predictions, tmp_path)
    moves, real = 0, os.replace

    def replace_until(source, target):
        nonlocal moves
        if moves == step:
            raise KeyboardInterrupt
        moves += 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_until)
    stopped = False
    try:
        label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True, part_rows=20)
    except KeyboardInterrupt:
        stopped = True
    assert stopped or moves < 8
    assert out.read_bytes() == (before if stopped else whole)
    monkeypatch.undo()
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    assert out.read_bytes() == whole
    assert not list(out.with_name(".out.jsonl.labelling").glob("part*"))


@pytest.mark.skipif(os.name != "posix", reason="kills a fork")
def test_killed_at_any_moment(files, predictions, tmp_path, pytestconfig):
    whole = undisturbed(files, predictions, tmp_path)
    rows, moments = JsonLines(ALL, LABELS), random.Random(0)
    for number in range(4 * pytestconfig.getoption("kills")):
        out = tmp_path / f"{number}.jsonl"
        for _ in range(3):
            child = os.fork()
            if not child:
                size, least = 1 + number % 3, moments.randint(1, 20)
                label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True,
                            batch_size=size, part_rows=least)  # fmt: skip
                os._exit(0)
            time.sleep(moments.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if out.exists():
                assert out.read_bytes() == whole
        label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
        assert out.read_bytes() == whole
        shutil.rmtree(out.with_name(f".{out.name}.labelling"))


def test_what_does_not_fit_is_refused(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    run = label_files
    with pytest.raises(KeyboardInterrupt):
        run(files, Labeller(predictions, 5), out, rows, IDENTITY, batch_size=2)
    with pytest.raises(LabellingError, match="weights was 'abc' and is 'def'"):
        run(files, Labeller(predictions), out, rows, {**IDENTITY, "weights": "def"}, resume=True)
    run(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    text = out.read_text("utf-8", "surrogateescape")
    out.write_text(text.replace("sky", "skies"), "utf-8", "surrogateescape")
    with pytest.raises(LabellingError, match="was changed or removed since it was written"):
        run(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    run(files, again := Labeller(predictions), out, rows, IDENTITY)  # starts over
    assert again.seen == files
    with pytest.raises(LabellingError, match="what it was made from is not known"):
        run(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    folder = tmp_path / ".other.jsonl.labelling"
    folder.mkdir()
    (folder / "run.json").write_text('{"format": 99}')
    with pytest.raises(LabellingError, match="must describe a labelling in format 1"):
        run(files, Labeller(predictions), tmp_path / "other.jsonl", rows, IDENTITY, resume=True)


def test_rows_of_unknown_origin_are_not_used(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    with pytest.raises(KeyboardInterrupt):
        label_files(files, Labeller(predictions, 9), out, rows, IDENTITY, batch_size=1)
    (tmp_path / ".out.jsonl.labelling" / "run.json").unlink()
    label_files(files, again := Labeller(predictions), out, rows, IDENTITY, resume=True)
    assert again.seen == files


def test_a_changed_result_is_refused_after_a_stop_too(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    label_files(files[:9], Labeller(predictions), out, rows, IDENTITY, resume=True)
    with pytest.raises(KeyboardInterrupt):
        label_files(files, Labeller(predictions, 5), out, rows, IDENTITY, resume=True)
    out.write_text("mine\n")
    with pytest.raises(LabellingError, match="was changed or removed"):
        label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    assert out.read_text() == "mine\n"


def test_an_image_that_is_told_something_else_is_labelled_again(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    told = ["sky"] * len(files)
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True, told=told)
    told[4] = "sea"
    again = Labeller(predictions)
    label_files(files, again, out, rows, IDENTITY, resume=True, told=told)
    assert again.seen == [files[4]]


def test_names_that_are_no_text_in_parquet(files, predictions, tmp_path):
    name = next(file for file in files if "\udcff" in file)
    Path(name).write_text("no number")
    out, rows = tmp_path / "out.parquet", Parquet(ALL, LABELS)
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    ((image, error, _),) = [row for row in rows.read(out) if row[1] is not None]
    assert image == name.replace("\udcff", "\\xff") and image in error
    Path(name).write_text("3")
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    label_files(files, again := Labeller(predictions), out, rows, IDENTITY, resume=True)
    assert again.seen == []


def test_one_process_at_a_time(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    with alone_in(tmp_path / ".out.jsonl.labelling", "labelling"):
        with pytest.raises(InUseError, match="in use by labelling"):
            label_files(files, Labeller(predictions), out, rows, IDENTITY)


def test_reading_a_table_leaves_the_limit_of_others(files, predictions, tmp_path):
    out, rows, limit = tmp_path / "out.csv", Csv(ALL, LABELS), csv.field_size_limit()
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    label_files(files, Labeller(predictions), out, rows, IDENTITY, resume=True)
    assert csv.field_size_limit() == limit


def test_long_options_are_cut_in_messages(files, predictions, tmp_path):
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    label_files(files, Labeller(predictions), out, rows, {"labels": ["a"] * 9999}, resume=True)
    with pytest.raises(LabellingError) as error:
        label_files(files, Labeller(predictions), out, rows, {"labels": []}, resume=True)
    assert len(str(error.value).replace(str(tmp_path), "")) < 400


def test_no_files_make_an_empty_table(tmp_path, predictions):
    for form in FORMS:
        out = tmp_path / f"none.{form}"
        summary = label_files([], Labeller(predictions), out, FORMS[form](ALL, LABELS), IDENTITY)
        assert summary.images == 0 and list(FORMS[form](ALL, LABELS).read(out)) == []


def test_images_are_a_view():
    images = Images(["a", "b", "c", "d"], np.array([3, 1, 0]))
    assert list(images) == ["d", "b", "a"] and len(images) == 3
    assert list(images[1:]) == ["b", "a"] and images[-1] == "a"


def test_a_suffix_names_the_form():
    assert form_of("a.PARQUET", "table") == "parquet"
    assert form_of("a.txt", "table") == "table"
    assert isinstance(FORMS["csv"](ALL, LABELS), Csv) and FORMS["parquet"] is Parquet


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelling") / "scenes"
    write_scenes(folder, train=2, val=2, test=40, seed=5)
    return folder / "test"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_command_writes_the_same_to_a_file(scenes, tmp_path, capsys, form):
    command = ["predict", str(scenes), "--model", str(DEMO_MODEL), "--scores", "all", "--sets", "2"]
    assert main([*command, "--format", form]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / f"labels.{form}"
    assert main([*command, "--out", str(out)]) == 0
    assert out.read_bytes().decode() == printed
    assert f"{out}: 40 images" in capsys.readouterr().err


def test_the_command_resumes(scenes, tmp_path, capsys):
    out = tmp_path / "labels.parquet"
    command = ["predict", str(scenes), "--model", str(DEMO_MODEL), "--out", str(out), "--resume"]
    assert main(command) == 0
    first = out.read_bytes()
    assert main(command) == 0
    assert "40 images, 40 of them labelled before" in capsys.readouterr().err
    assert out.read_bytes() == first
    assert main([*command, "--decide", "threshold"]) == 1
    assert "decide was 'path' and is 'threshold'" in capsys.readouterr().err
    for words, said in (
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", str(tmp_path / "a.txt")], "--resume needs --out"),
        (["--format", "parquet"], "Parquet needs --out"),
        (["--out", str(tmp_path)], "--out must name a file, got the folder"),
        (["--sets", "2"], "--sets needs --format"),
        (["--scores", "all"], "--scores needs --format"),
    ):
        assert main(["predict", str(scenes), "--model", str(DEMO_MODEL), *words]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_the_command_writes_to_links_and_pipes(scenes, tmp_path, capsys):
    command = ["predict", str(scenes), "--model", str(DEMO_MODEL), "--format", "jsonl"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    real, link, pipe = tmp_path / "real.jsonl", tmp_path / "link.jsonl", tmp_path / "pipe"
    real.write_text("former")
    link.symlink_to(real)
    assert main([*command, "--out", str(link)]) == 0
    assert link.is_symlink() and real.read_text() == printed
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit(pipe.read_text)
        assert main([*command, "--out", str(pipe)]) == 0
        assert text.result() == printed
    assert pipe.is_fifo()


def test_an_error_says_that_what_is_labelled_is_kept(scenes, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(scenes, images)
    (images / "~.png").write_text("no image")
    command = ["predict", str(images), "--model", str(DEMO_MODEL), "--batch-size", "8", "--out"]
    assert main([*command, str(tmp_path / "l.jsonl")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "~.png must be a readable image" in said[-2] and "--resume goes on" in said[-1]


def test_known_labels_stay_with_their_images(scenes, tmp_path, capsys):
    """Of the images that are left after a stop, too."""
    images = sorted(scenes.glob("*.png"))
    tags = scenes / "tags.csv"
    tags.write_text("image,labels\n" + "".join(f"{f.name},{('boat', 'car')[i % 2]}\n"
                                                for i, f in enumerate(images)))  # fmt: skip
    out = tmp_path / "labels.jsonl"
    command = ["predict", str(scenes), "--model", str(DEMO_MODEL), "--out", str(out), "--resume",
               "--known-from", f"csv:{tags}"]  # fmt: skip
    assert main(command) == 0
    whole = out.read_bytes()
    os.utime(images[7])  # this one alone is labelled again, in a batch of one: other last digits
    assert main(command) == 0
    again = [json.loads(line)["labels"] for line in out.read_text().splitlines()]
    assert again == [json.loads(line)["labels"] for line in whole.decode().splitlines()]
    rows = [json.loads(line) for line in whole.decode().splitlines()]
    assert all(("boat", "car")[i % 2] in row["labels"] for i, row in enumerate(rows))
    assert "39 of them labelled before" in capsys.readouterr().err


def test_pyarrow_is_named_where_it_is_lacking(predictions, tmp_path, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"Parquet needs pyarrow: .*cnnrnn\[parquet\]"):
        out = tmp_path / "out.parquet"
        label_files(files, Labeller(predictions), out, Parquet(ALL, LABELS), IDENTITY)


def test_a_part_is_written_after_a_while(files, predictions, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "PART_SECONDS", -1.0)
    out, rows = tmp_path / "out.jsonl", JsonLines(ALL, LABELS)
    counts = []
    folder = tmp_path / ".out.jsonl.labelling"
    label_files(files, Labeller(predictions), out, rows, IDENTITY, batch_size=1,
                each=lambda p: counts.append(len(list(folder.glob("part-*")))))  # fmt: skip
    assert counts == list(range(len(files)))


def test_sidecars_of_the_command(scenes, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(scenes, images)
    files = sorted(images.glob("*.png"))[:3]
    (images / f"{files[1].name}.xmp").write_text("no XML")
    command = ["predict", *map(str, files), "--model", str(DEMO_MODEL), "--sidecar"]
    assert main([*command, "xmp", "--out", str(tmp_path / "l.csv")]) == 1
    assert f"{files[1].name}.xmp" in capsys.readouterr().err
    assert main([*command, "xmp", "--on-bad-image", "skip", "--out", str(tmp_path / "l.csv")]) == 0
    assert "1 sidecars were left as they are, the first: " in capsys.readouterr().err
    assert (images / f"{files[1].name}.xmp").read_text() == "no XML"
    assert main([*command, "txt", "--exclude", "sky"]) == 0
    capsys.readouterr()
    rows = {image: cells[1] for image, _, cells in Csv(RowOptions(), ()).read(tmp_path / "l.csv")}
    for file in files:
        labels = [label for label in rows[str(file)].split(";") if label]
        text = file.with_suffix(".txt")
        written = text.read_text().splitlines() if text.exists() else []
        assert written == [label for label in labels if label != "sky"]
        if file != files[1] and labels:
            xmp = (images / f"{file.name}.xmp").read_text()
            assert re.findall("<rdf:li>(.*)</rdf:li>", xmp) == labels
    for wrong, said in ((["--exclude", "sky"], "--exclude needs --sidecar"),
                        (["--sidecar", "txt", "--exclude", "yeti"], "got yeti")):  # fmt: skip
        assert main([*command[:-1], *wrong]) == 1
        assert said in capsys.readouterr().err
