"""Training in two processes on the CPU, held against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrnn.cli import main
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.machine.distributed import ALONE, Ranks
from cnnrnn.machine.files import weights_digest
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.training.resume import STATE_FILE, read_state
from tests.training.test_training import records, separable

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs gloo",
)
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
    [str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip


def digest(folder):
    return weights_digest(load_checkpoint(folder).state_dict().items())


def write_data(folder):
    folder.mkdir()
    separable(folder / "data.npz")
    write_scenes(folder / "scenes", train=40, val=20, test=1, image_size=32)
    write_scenes(folder / "damaged", train=29, val=2, test=1, image_size=32)
    for number in (1, 5, 6, 7, 8, 9, 10, 20):
        (folder / "damaged" / "train" / f"{number:06d}.png").write_bytes(b"no picture")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one and of two processes, with the same cases in both."""
    pytest.importorskip("pycocotools")
    pytest.importorskip("torchvision")
    root = tmp_path_factory.mktemp("runs")
    folders = {1: root / "one", 2: root / "two"}
    for size, folder in folders.items():
        write_data(folder)
        launcher = [sys.executable] if size == 1 else TORCHRUN
        process = subprocess.run(
            [*launcher, "-m", "tests.training.two_processes", str(folder)],
            capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-4000:]
    return folders


def found(folder, case, rank=0):
    return json.loads((folder / f"{case}-{rank}.json").read_text())


def close(one, two, part):
    first, second = (load_checkpoint(run / part).state_dict() for run in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "many_options", "lonely_image", "frozen"])
def test_two_processes_equal_one(runs, case):
    for part in ("best", "last"):
        close(runs[1] / case, runs[2] / case, part)
    one, two = (records(runs[size] / case) for size in (1, 2))
    for first, second in zip(one, two, strict=True):
        for name in first.keys() - {"seconds", "images_per_second"}:
            expected = first[name]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert second[name] == expected
    digests = [found(runs[2], case, rank)["digest"] for rank in (0, 1)]
    assert digests[0] == digests[1] == digest(runs[2] / case / "best")


def test_features_in_shares_are_those_of_one_process(runs):
    one, two = (sorted((runs[size] / "frozen" / "features").glob("*.npz")) for size in (1, 2))
    assert len(one) == len(two) == 2
    values = []
    for files in (one, two):
        stored = [np.load(file) for file in files]
        values.append(sorted((s["values"].tobytes(), s["kept"].tobytes()) for s in stored))
    assert values[0] == values[1]
    for rank in (0, 1):
        result = found(runs[2], "frozen", rank)
        assert result["again"]["digest"] == result["digest"]


def test_a_trained_backbone_is_equal_in_all_processes(runs):
    results = [found(runs[2], "trained", rank) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["digest"] == digest(runs[2] / "trained" / "best")
    kept = read_state((runs[2] / "trained" / STATE_FILE).read_bytes(), "state")
    assert not torch.equal(*kept.tensors["random.cpu"])  # each draws its own dropout


def test_pictures_augmented_and_left_out_equal_one_process(runs):
    one, two = (found(runs[size], "pictures_without_batch_norm") for size in (1, 2))
    assert one["records"] == two["records"] and len(one["records"]) == 21
    for name in ("weights", "outputs"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
    assert found(runs[2], "pictures_without_batch_norm", 1) == two


def test_running_figures_are_the_mean_by_images(runs):
    one, two = (found(runs[size], "running_figures") for size in (1, 2))
    np.testing.assert_allclose(two["mean"], one["mean"], rtol=1e-5)  # 8 and 7 images
    assert found(runs[2], "running_figures", 1) == two and two["count"] == one["count"] == 1


def test_an_infinite_loss_in_one_process_stops_all(runs):
    messages = [found(runs[2], "infinite_loss", rank)["error"] for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "the loss is not finite in stage path, epoch 1, step" in messages[0]
    one = found(runs[1], "infinite_loss")["error"]
    assert one.replace(str(runs[1]), "") == messages[0].replace(str(runs[2]), "")


def test_process_0_decides_for_all(runs):
    for rank in (0, 1):
        assert found(runs[2], "other_figures", rank) == {"best": 0.9, "m": 0.9, "epochs": 4}


def test_stopped_and_resumed(runs):
    for part in ("best", "last"):
        assert digest(runs[2] / "resumed" / part) == digest(runs[2] / "unstopped" / part)
    assert found(runs[2], "stopped_and_resumed", 1)["stops"] == 2
    logs = [[(r["stage"], r.get("epoch"), r.get("loss")) for r in records(runs[2] / name)]
            for name in ("resumed", "unstopped")]  # fmt: skip
    assert logs[0] == logs[1]


def test_shares_cover_each_batch_once():
    batch = torch.arange(11)
    for size in (1, 2, 3, 16):
        parts = [Ranks(rank, size).share(batch) for rank in range(size)]
        assert torch.equal(torch.cat(parts), batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        dealt = [list(Ranks(rank, size).deal(batch.split(2))) for rank in range(size)]
        assert sorted(int(i) for d in dealt for part in d for i in part) == list(range(11))


def test_alone_everything_stays_as_it_is():
    rows = torch.ones(2, 3)
    assert ALONE.gather(rows) is rows and ALONE.from_first(rows) is rows
    assert ALONE.add([1.5]) == [1.5] and ALONE.bytes_from_first(b"x") == b"x"


LOST = """
import os, sys
import torch
from torch import distributed
from cnnrnn.machine.distributed import LostProcessError, Ranks
rank = 0 if os.fork() else 1
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
ranks = Ranks(rank, 2)
assert ranks.add([1.0, 2.0]) == [2.0, 4.0]
if rank:
    os._exit(1)
try:
    ranks.add([1.0])
except LostProcessError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_process_that_is_gone_is_noticed(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path / "store")],
        capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout.startswith("another process of this run ended"), process.stderr


WORDS = ["--device=cpu", "--warm-epochs=1", "--batch_size=64", "--model.trunk-dim=8",
         "--model.hidden-dim=8", "--model.joint-dim=8", "--model.input-dropout=0",
         "--model.hidden-dropout=0", "--model.joint-dropout=0"]  # fmt: skip


def torchrun(*words):
    return subprocess.Popen(
        [*TORCHRUN, "-m", "cnnrnn", "train", *WORDS, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_command_killed_and_resumed(tmp_path):
    labels = np.random.default_rng(0).random((400, 5)) < 0.4
    np.savez(tmp_path / "data.npz", features=labels + 0.0, labels=labels,
             label_names=np.array(list("abcde")))  # fmt: skip
    data = f"--data=features:{tmp_path / 'data.npz'}"
    out = tmp_path / "run"
    words = [data, f"--out={out}", "--epochs=12", "--finish-epochs=0", "--patience=12",
             "--resume"]  # fmt: skip
    process = torchrun(*words)
    while not process.stderr.readline().startswith("path   2"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    children = [p for p in Path("/proc").glob("[0-9]*") if str(out) in _command(p)]
    for child in children:  # torchrun's processes have groups of their own
        os.kill(int(child.name), signal.SIGKILL)
    load_checkpoint(out)
    stdout, stderr = torchrun(*words).communicate(timeout=120)
    assert stderr.count("resumed after epoch") == 1, stderr[-3000:]
    assert stdout.count("validation, 5 labels") == 1, stderr[-3000:]
    assert stdout.count("best checkpoint") == 1
    assert main(["train", *WORDS, data, f"--out={tmp_path / 'one'}", "--epochs=12",
                 "--finish-epochs=0",
                 "--patience=12"]) == 0  # fmt: skip
    for part in ("best", "last"):
        first, second = (load_checkpoint(tmp_path / n / part).state_dict() for n in ("one", "run"))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4)
    epochs = [(r["stage"], r.get("epoch")) for r in records(out)[1:]]
    assert epochs == [("warm", 1), *(("path", n) for n in range(1, 13))]


def _command(process):
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_an_error_in_one_process_ends_the_run(tmp_path):
    """The last picture of a batch, which process 1 reads, is broken."""
    pytest.importorskip("pycocotools")
    write_scenes(tmp_path / "scenes", train=8, val=4, test=1, image_size=32)
    (tmp_path / "scenes" / "train" / "000008.png").write_bytes(b"no picture")
    began = time.monotonic()
    process = torchrun(f"--data=scenes:{tmp_path / 'scenes'}", f"--out={tmp_path / 'run'}",
                       "--model.backbone=small", "--batch_size=4")  # fmt: skip
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 100
    assert "cnnrnn: error: process 1: " in stderr and "000008.png" in stderr
