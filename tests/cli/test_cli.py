"""The command line, each command from end to end."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cnnrnn.cli import main
from cnnrnn.config import DECISIONS
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.search import agreement

TINY = ["--model.backbone=small", "--model.pretrained=false", "--model.image-size=16",
        "--model.trunk_dim=8", "--model.joint-dim=8", "--model.hidden_dim=8", "--device=cpu",
        "--warm-epochs=1", "--epochs=2", "--batch_size=16"]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=30, val=15, test=11, image_size=32)
    return root


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """The folder of a training run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", f"scenes:{scenes}", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    file = tmp_path_factory.mktemp("features") / "data.npz"
    labels = np.random.default_rng(0).random((60, 3)) < 0.4
    np.savez(file, features=labels + 0.0, labels=labels, label_names=np.array(["a", "b", "c"]))
    return file


def test_train_writes_the_run(run, capsys):
    assert {p.name for p in run.iterdir()} == {
        "best", "last", "features", "log.jsonl", "state.safetensors", "config.yaml", ".lock"
    }  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["epochs"] == 2 and config["model"]["joint_dim"] == 8
    assert config["search"]["beam_size"] == 8 and config["optimizer"] == "adamw"
    assert "preset" not in config
    assert load_checkpoint(run).config.image_size == 16


def test_train_prints_a_table_and_reports_to_stderr(features, tmp_path, capsys):
    arguments = ["train", "--data", f"features:{features}", "--out", str(tmp_path), *TINY]
    assert main([*arguments, "--val-fraction", "0.3"]) == 0
    out, err = capsys.readouterr()
    assert "validation, 3 labels: 18 images" in out
    assert f"best checkpoint: {tmp_path / 'best'}" in out
    for word in (
        "path",
        "threshold",
        "label thresholds",
        "path@3",
        "top@3",
        "O-F1",
        "MAP@10",
        "exact-match",
    ):
        assert word in out
    assert "train images 42" in err and "path   2" in err


def test_the_saved_config_repeats_the_run(features, tmp_path):
    arguments = ["--data", f"features:{features}", *TINY]
    assert main(["train", "--out", str(tmp_path / "one"), *arguments]) == 0
    again = ["--config", str(tmp_path / "one" / "config.yaml"), "--out", str(tmp_path / "two")]
    assert main(["train", *again]) == 0
    one, two = (load_checkpoint(tmp_path / name / "last").state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (
        yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("one", "two")
    )
    assert first | {"out": second["out"]} == second


def test_config_file_with_overrides(features, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({
        "data": f"features:{features}", "epochs": 1, "warm_epochs": 0, "learning_rate": 0.5,
        "model": {"joint_dim": 5, "hidden_dim": 3}, "search": {"beam_size": 2}, "device": "cpu",
    }))  # fmt: skip
    arguments = ["--config", str(file), "--model.joint-dim=6", "--out", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["model"]["joint_dim"], config["model"]["hidden_dim"]) == (6, 3)
    assert (config["epochs"], config["learning_rate"], config["search"]["beam_size"]) == (1, 0.5, 2)
    assert load_checkpoint(tmp_path / "run").head.joint_dim == 6


LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS.encode(), "options must be without aliases, got *a0, line 2"),
        (b"out: &a [*a]", "options must be without aliases, got *a, line 1"),
        (b"out: " + b"[" * 300 + b"]" * 300, "options must be nested at most 20 deep, got more"),
        (b"out: " + b"[" * 100_000, "nest"),
        (b"out: a" + b"\n#" * 3_000_000, "must have at most 1,048,576 characters, got more"),
        (b"out: a" + b"\n#" * 1_000_000, "must have at most 1,048,576 characters, got more"),
        (b"out: caf\xe9", "line 1: text must be utf-8, got byte 0xe9"),
        (b"out: a\0b", "control characters are not allowed"),
        (b"out: [", "must hold options as YAML or JSON: while parsing a flow node"),
        (b"[1, 2]", "must hold options, each with its name, found none"),
        (b"", "must hold options, each with its name, found none"),
        (None, "must be a file, found a folder"),
        (os.mkfifo, "must be a file, found something that is not a file"),
    ],
    ids=range(13),
)
def test_a_config_file_that_is_none_is_refused_at_once(tmp_path, capsys, content, message):
    file = tmp_path / "options.yaml"
    if content is None:
        file.mkdir()
    elif callable(content):
        content(file)
    else:
        file.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(file)])
    assert time.perf_counter() - started < 5
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {file}") and message in last


def test_options_of_a_part_come_from_no_worse_a_file(tmp_path, capsys):
    file = tmp_path / "model.yaml"
    for content, message in (
        (LAUGHS.encode(), "options must be without aliases"),
        (b"backbone: caf\xe9", "files of options must be UTF-8, got byte 0xe9"),
    ):
        file.write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--data", "coco:x", "--out", "y", "--model", str(file)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "optimizer"), [("ours", "adamw"), ("paper", "rmsprop")])
def test_the_printed_configuration_is_the_presets(preset, optimizer, capsys):
    words = ["--data", "coco:x", "--out", "y", "--preset", preset, "--search.min-labels", "3"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words, "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["optimizer"] == optimizer
    assert config["search"]["min_labels"] == 3


@pytest.mark.parametrize("place", ["option", "equals", "config"])
def test_the_papers_preset_sets_defaults(features, tmp_path, place):
    (tmp_path / "options.yaml").write_text("preset: paper\nmodel:\n  hidden_dim: 9\n")
    words = {"option": ["--preset", "paper", "--model.hidden_dim=9"],
             "equals": ["--preset=paper", "--model.hidden_dim=9"],
             "config": ["--config", str(tmp_path / "options.yaml")]}[place]  # fmt: skip
    arguments = ["--data", f"features:{features}", "--out", str(tmp_path / "run")]
    assert main(["train", *arguments, *words, "--epochs=1", "--device=cpu"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["optimizer"] == "rmsprop" and config["weight_decay"] == 1e-4
    assert config["model"]["cell"] == "paper" and config["model"]["hidden_dim"] == 9
    assert config["search"]["order"] == "free" and config["search"]["end_takes_slot"] is True
    head = load_checkpoint(tmp_path / "run").head
    assert not [name for name, _ in head.named_parameters() if "bias" in name]


def test_the_papers_preset_on_pictures(scenes, tmp_path):
    """VGG-16's own architecture with random weights, on pictures as small as it takes."""
    pytest.importorskip("timm")
    root = tmp_path / "scenes"
    write_scenes(root, train=4, val=3, test=0, image_size=32)
    arguments = ["train", "--data", f"scenes:{root}", "--out", str(tmp_path / "run"),
                 "--preset=paper", "--model.pretrained=false", "--model.image_size=32",
                 "--epochs=1", "--device=cpu"]  # fmt: skip
    assert main(arguments) == 0
    description = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert (description["feature_dim"], description["model"]["backbone"]) == (4096, "vgg16")
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert (record["stage"], record["epoch"]) == ("path", 1)
    shutil.rmtree(tmp_path / "run")  # a gigabyte


def test_dashes_are_underscores(run, scenes, capsys):
    arguments = ["evaluate", "--data", f"scenes:{scenes}", "--model", str(run), "--device=cpu"]
    assert main([*arguments, "--batch-size=3", "--beam-size", "2"]) == 0
    dashed = capsys.readouterr().out
    assert main([*arguments, "--batch_size=3", "--beam_size", "2"]) == 0
    assert capsys.readouterr().out == dashed


def test_evaluate_writes_table_json_and_csv(run, scenes, tmp_path, capsys):
    arguments = [
        "evaluate",
        "--data",
        f"scenes:{scenes}",
        "--model",
        str(run),
        "--device=cpu",
        "--json",
        str(tmp_path / "all.json"),
        "--per-label",
        str(tmp_path / "all.csv"),
    ]
    model = load_checkpoint(run)
    rare = [model.labels[i] for i in model.calibration.uncalibrated]
    assert 2 < len(rare) < len(model.labels)
    assert main([*arguments, "--k=2"]) == 0
    out = capsys.readouterr().out
    assert f"scenes:{scenes}, test: 11 images" in out
    named = f"{len(rare)} of {len(model.labels)} labels are too rare for a threshold of their own"
    assert named in out and ", ".join(rare[:10]) in out
    assert f"and {len(rare) - 10} more" in out if len(rare) > 10 else "more" not in out

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    metrics = json.loads((tmp_path / "all.json").read_text(), parse_constant=refuse)
    assert metrics.keys() == {*DECISIONS, "path@2", "top@2", "NLL"}
    assert f"NLL of the whole true set: {metrics['NLL']:.3f} nats per image" in out
    assert metrics["label_thresholds"]["uncalibrated"] == rare
    assert metrics["path"]["images"] == 11 and 0 <= metrics["threshold"]["O-F1"] <= 1
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [next(iter(row.values())) for row in rows] == list(model.labels)
    assert [row["label"] for row in rows if row["calibrated"] == "0"] == rare


def test_evaluate_with_revealed_labels(run, scenes, tmp_path, capsys):
    arguments = ["evaluate", "--data", f"scenes:{scenes}", "--model", str(run), "--device=cpu"]
    assert main([*arguments, "--reveal=1", f"--json={tmp_path / 'all.json'}"]) == 0
    out = capsys.readouterr().out
    metrics = json.loads((tmp_path / "all.json").read_text())
    assert f"labels that are not known, of {metrics['1 known']['images']} images" in out
    for known in ("none known", "1 known"):
        (row,) = (line for line in out.splitlines() if line.startswith(f"{known} "))
        shown = [f"{100 * metrics[known][m]:.1f}" for m in ("example-AP", "label-mAP", "O-F1")]
        assert row.split()[2:] == shown
    assert main([*arguments, "--reveal=0"]) == 1
    assert "--reveal" in capsys.readouterr().err
    assert main([*arguments, "--reveal=99"]) == 1
    assert "more than 99 labels to reveal 99" in capsys.readouterr().err


def test_evaluate_with_min_labels(run, scenes, tmp_path):
    for least in (0, 2):
        file = tmp_path / f"{least}.json"
        arguments = ["evaluate", "--data", f"scenes:{scenes}", "--model", str(run), "--split=all"]
        options = ["--device=cpu", f"--min-labels={least}", f"--json={file}"]
        assert main([*arguments, *options]) == 0
        metrics = json.loads(file.read_text())
        assert all(metrics[decision]["mean-labels-predicted"] >= least for decision in DECISIONS)


def test_evaluate_every_split_and_a_missing_one(run, scenes, capsys):
    arguments = ["evaluate", "--data", f"scenes:{scenes}", "--model", str(run), "--device=cpu"]
    assert main([*arguments, "--split=all"]) == 0
    assert "56 images" in capsys.readouterr().out
    assert main([*arguments, "--split=holdout"]) == 1
    assert "has no split 'holdout', expected one of: test, train, val" in capsys.readouterr().err


def test_json_has_null_for_what_is_not_defined(features, tmp_path):
    file = tmp_path / "no_positives.npz"
    np.savez(file, features=np.zeros((2, 3)), labels=np.zeros((2, 3)),
             label_names=np.array(["a", "b", "c"]))  # fmt: skip
    arguments = ["train", "--data", f"features:{features}", "--out", str(tmp_path / "run"), *TINY]
    assert main(arguments) == 0
    arguments = ["--data", f"features:{file}", "--model", str(tmp_path / "run"), "--split=all"]
    assert main(["evaluate", *arguments, "--device=cpu", f"--json={tmp_path / 'm.json'}"]) == 0
    text = (tmp_path / "m.json").read_text()
    assert "NaN" not in text and json.loads(text)["path"]["mAP"] is None


def pictures(scenes):
    return sorted(scenes.glob("test/*.png"))


def predict(run, *words):
    return main(["predict", *map(str, words), "--model", str(run), "--device=cpu"])


def test_predict_as_a_table(run, scenes, capsys):
    assert predict(run, scenes / "test") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in pictures(scenes)]
    expected = load_checkpoint(run).predict(scenes / "test")
    for line, prediction in zip(lines, expected, strict=True):
        assert all(name in line for name in prediction.labels)
        assert ("(no labels)" in line) == (not prediction.labels)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_predict_for_programs(run, scenes, tmp_path, capsys, form):
    words = [*pictures(scenes)[:2], scenes / "test", "--format", form, "--top-k=2"]
    assert predict(run, *words) == 0
    out = capsys.readouterr().out
    assert predict(run, *words, "--out", tmp_path / "file") == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "file").read_text().split() == out.split()
    expected = load_checkpoint(run).predict(
        [*pictures(scenes)[:2], scenes / "test"], top_k=2, device="cpu"
    )
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        found = [(r["image"], [x for x in r["labels"].split(";") if x]) for r in rows]
        assert all(float(r["log_prob"]) <= 0 and not r["error"] for r in rows)
    else:
        rows = [json.loads(line) for line in out.splitlines()]
        found = [(r["image"], r["labels"]) for r in rows]
        assert all(r["scores"].keys() == set(r["labels"]) for r in rows)
    assert found == [(p.source, p.labels) for p in expected]


def test_predict_with_known_labels(run, scenes, tmp_path, capsys):
    first, second = pictures(scenes)[:2]
    tags = first.parent / "tags.csv"  # a tag list to be completed
    tags.write_text(f"image,labels\n{second.name},boat;sun\n", encoding="utf-8")
    words = [first, second, "--known=sky", "--absent", "sea", "--format=jsonl"]
    try:
        assert predict(run, *words, "--known-from", f"csv:{tags}") == 0
        out, err = capsys.readouterr()
        assert err == f"csv:{tags} names 1 of 2 images\n"
        assert predict(run, first, "--known=sky", f"--known-from=csv:{tags}") == 1
        assert "must name some of the 1 images, got none of" in capsys.readouterr().err
    finally:
        tags.unlink()
    found = [set(json.loads(line)["labels"]) for line in out.splitlines()]
    assert {"sky"} <= found[0] and {"sky", "boat", "sun"} <= found[1]
    assert not any("sea" in labels for labels in found)
    expected = load_checkpoint(run).predict(
        [first, second], known=[["sky"], ["sky", "boat", "sun"]], absent=["sea"]
    )
    assert found == [set(prediction.labels) for prediction in expected]
    assert predict(run, first, "--known=yeti") == 1
    assert "known must hold labels of the model, got 'yeti'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table", "csv", "jsonl"])
def test_predict_goes_on_past_bad_pictures(run, scenes, tmp_path, capsys, form):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    words = [pictures(scenes)[0], tmp_path / "bad.png", pictures(scenes)[1], "--format", form]
    assert predict(run, *words, "--on-bad-image=skip") == 0
    out, err = capsys.readouterr()
    assert out.count("no image in a known format") == 1
    assert out.count("000001.png") == out.count("000002.png") == 1
    assert err == "cnnrnn: warning: 1 images could not be read\n"
    assert predict(run, *words) == 1
    assert capsys.readouterr().err.startswith(f"cnnrnn: error: {tmp_path / 'bad.png'} must be a r")


def test_a_file_name_that_begins_with_dashes(run, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures(scenes)[0], "--my-picture.png")
    assert main(["predict", "--model", str(run), "--device=cpu", "--", "--my-picture.png"]) == 0
    assert "--my-picture.png" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["table", "csv", "jsonl"])
def test_a_file_name_that_is_no_text(run, scenes, tmp_path, form):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        shutil.copy(pictures(scenes)[0], os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert predict(run, os.fsdecode(name), "--format", form, "--out", tmp_path / "out") == 0
    assert name in (tmp_path / "out").read_bytes()
    process = subprocess.run(
        [sys.executable, "-m", "cnnrnn", "predict", name, "--model", run, "--device=cpu",
         "--format", form],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert process.returncode == 0 and name in process.stdout, process.stderr


def test_scenes_and_data_it_makes(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    arguments = ["--train=3", "--val=2", "--test=0", "--image-size=32", "--seed=7"]
    assert main(["scenes", "--out", str(tmp_path / "new"), *arguments]) == 0
    assert capsys.readouterr().out == f"5 images in {tmp_path / 'new'}\n"
    assert len(list((tmp_path / "new").rglob("*.png"))) == 5
    assert main(["scenes", "--out", str(tmp_path / "new"), *arguments]) == 1
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_check(capsys, monkeypatch):
    from cnnrnn.cli import installation as check

    status = main(["check"])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "extra [vision]" in out and "GPU: " in out
    assert status == (1 if "problem:" in out else 0)
    state = torch.get_rng_state()
    monkeypatch.setattr(check, "_version", lambda p: None if p == "torchvision" else "1")
    assert main(["check"]) == 1
    problem = "problem: extra [vision] is incomplete, without torchvision: run `pip install"
    assert problem in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)


def test_check_names_a_search_that_is_wrong(capsys, monkeypatch):
    right = agreement.native_search

    def wrong(*arguments):
        result, nonfinite = right(*arguments)
        result.log_probs[0, 0] += 1
        return result, nonfinite

    monkeypatch.setattr(agreement, "native_search", wrong)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert (
        "problem: the CPU search disagrees with the reference (log_probs[0, 0] is -1.686, n" in out
    )


def test_help_and_version(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("train", "evaluate", "predict", "scenes", "check"))
    for words in (["--version"], ["train", "--help"], ["predict", "--help"]):
        with pytest.raises(SystemExit) as leaving:
            main(words)
        assert leaving.value.code == 0
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--data=features:nothing.npz", "--model=nothing"], "is not a checkpoint"),
        (["train", "--data=features:nothing.npz"], "nothing.npz must be an .npz file, found no"),
        (["train", "--data=pictures"], "data must be one of coco:ROOT"),
        (["train", "--data={features}", "--device=cuda:99"], "device must exist, got 'cuda:99'"),
        (["train", "--data={features}", "--learning_rate=-1"], "learning_rate must be > 0, got -1"),
        (["train", "--data={features}", "--search.beam-size=17"], "beam_size must be in 1..16"),
        (["predict", "nothing.png", "--model={run}"], "nothing.png must be a readable image"),
        (["predict", "nothing.png", "--model={run}", "--top-k=0"], "top_k must be at least 1"),
        (["evaluate", "--data={features}", "--split=all", "--model={run}"], "among the model's"),
    ],
)
def test_errors_are_one_sentence(run, features, tmp_path, capsys, words, message):
    words = [word.format(features=f"features:{features}", run=run) for word in words]
    out = [f"--out={tmp_path / 'out'}"] if words[0] == "train" else []
    assert main([*words, *out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cnnrnn: error: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "words", [["fly"], ["train"], ["predict"], ["train", "--epochs=many", "--data=a", "--out=b"],
              ["predict", "a.png", "--format=xml"], ["train", "--data=a", "--out=b", "--typo=1"]],
)  # fmt: skip
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert "error" in capsys.readouterr().err


def test_warnings_are_shown_as_sentences_and_the_hook_is_put_back(run, scenes, tmp_path, capsys):
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    (root / "test" / "000002.png").write_bytes(b"no picture")
    before = warnings.showwarning
    arguments = ["evaluate", "--data", f"scenes:{root}", "--model", str(run), "--device=cpu"]
    assert main([*arguments, "--on-bad-image=skip"]) == 0
    out, err = capsys.readouterr()
    assert "test: 10 images" in out
    assert err.startswith("cnnrnn: warning: 1 of 11 images were left out") and err.count("\n") == 1
    assert warnings.showwarning is before


def test_module_in_a_process(run, scenes, features):
    command = [sys.executable, "-m", "cnnrnn"]
    first = subprocess.run(
        [*command, "predict", str(pictures(scenes)[0]), "--model", str(run), "--device=cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert first.returncode == 0 and first.stdout.startswith(str(pictures(scenes)[0]))
    assert first.stderr == ""
    wrong = subprocess.run([*command, "predict", "nothing.png", "--model", str(run)],
                           capture_output=True, text=True)  # fmt: skip
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_reader_that_leaves_ends_quietly(run, scenes, command):
    words = (["predict", *map(str, pictures(scenes) * 3), "--batch-size=1"]
             if command == "predict" else ["evaluate", "--data", f"scenes:{scenes}"])  # fmt: skip
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cnnrnn", *words, "--model", str(run), "--device=cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered,
    )  # fmt: skip
    if command == "predict":
        assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_every_command_that_reads_pictures_takes_max_pixels(run, scenes, tmp_path, capsys):
    picture = str(pictures(scenes)[0])
    with Image.open(picture) as image:
        pixels = image.width * image.height
    small, data = f"--max-pixels={pixels - 1}", f"scenes:{scenes}"
    commands = [
        ["predict", picture, "--model", str(run), "--device=cpu"],
        ["suggest", picture, "--model", str(run), "--device=cpu"],
        ["evaluate", "--data", data, "--model", str(run), "--device=cpu"],
        ["train", "--data", data, "--out", str(tmp_path / "run"), *TINY],
        ["compare", "--data", data, "--out", str(tmp_path / "table"), "--methods=cnn-rnn", *TINY],
    ]
    for words in commands:
        assert main([*words, small]) == 1, words
        assert (
            f"pixels, more than {pixels - 1:,}: max_pixels allows more" in capsys.readouterr().err
        )
    assert main(["data", "check", data, small]) == 1
    assert "unreadable images: 56" in capsys.readouterr().out
    assert main([*commands[0], f"--max-pixels={pixels}"]) == 0
    assert main([*commands[0], "--max-pixels=0"]) == 1
    assert "max_pixels must be at least 1, got 0" in capsys.readouterr().err
