"""A killed run goes on: the same bits as one that was never stopped, and nothing unreadable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import cnnrnn
from cnnrnn import Dataset, load_dataset
from cnnrnn.cli import main
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.machine.lock import InUseError
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.training.ensemble import train_ensemble
from cnnrnn.training.log import Log
from cnnrnn.training.resume import (
    STATE_FILE,
    ResumeError,
    TrainingState,
    data_digest,
    read_state,
    save_state,
)
from cnnrnn.training.run import train
from tests.nobody import as_nobody
from tests.training.test_training import MODEL, QUICK, SEARCH, SMALL, digest, records, separable

posix = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


class Stop(Exception):
    """Ends a run from within."""


def stop_after(count):
    """A `say` that raises at the line of the given epoch, counted over both stages."""
    lines = []

    def say(line):
        lines.append(line)
        if sum(line.startswith(("warm", "path", "finish")) for line in lines) == count:
            raise Stop

    return say


def without_times(out):
    drop = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in drop} for r in records(out)]


def same(one, two):
    """Both checkpoints are equal to the bit, and so is the log but for times."""
    for part in ("best", "last"):
        assert digest(one / part) == digest(two / part)
        texts = [(run / part / "config.json").read_text() for run in (one, two)]
        assert texts[0] == texts[1]
    assert without_times(one) == without_times(two)


@pytest.fixture
def data(tmp_path):
    return separable(tmp_path / "data.npz")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=40, val=20, test=1, image_size=32)
    return root


DROPOUT = replace(MODEL, joint_dropout=0.3, input_dropout=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.9, "schedule": "cosine", "accumulate": 2},
        {"optimizer": "rmsprop", "schedule": "one_cycle"},
        {"schedule": "step", "step_epochs": 2, "warm_epochs": 0},
        {"epochs": 0, "warm_epochs": 4},
        {"patience": 1, "epochs": 6, "learning_rate": 0.1},
        {"label_order": "easiest", "ema_decay": 0.9, "epochs": 6, "warm_epochs": 0},
        {"label_order": "shuffled"},
        {"finish_epochs": 3, "ema_decay": 0.9, "warm_epochs": 0},
        {"loss": "pla"},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_a_run_stopped_in_every_epoch_ends_as_one_that_was_not(tmp_path, data, options):
    config = replace(QUICK, **options)
    ordered = config.loss == "sequence" and config.label_order != "shuffled"
    search = SEARCH if ordered else replace(SEARCH, order="unique")
    train(data, tmp_path / "whole", DROPOUT, search, config)
    out = tmp_path / "pieces"
    for count in range(1, 20):
        try:
            train(data, out, DROPOUT, search, config, resume=True, say=stop_after(2))
        except Stop:
            torch.rand(count)  # what was drawn in between does not matter
            continue
        break
    assert count > 2
    same(tmp_path / "whole", out)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures(tmp_path, scenes, frozen, workers):
    pytest.importorskip("torchvision")
    data = load_dataset(f"scenes:{scenes}")
    model = replace(SMALL, freeze_backbone=frozen, joint_dropout=0.2)
    config = replace(QUICK, warm_epochs=1, epochs=2, batch_size=16, workers=workers)
    train(data, tmp_path / "whole", model, SEARCH, replace(config, workers=0))
    for count in (2, 2, 9):
        try:
            train(data, tmp_path / "pieces", model, SEARCH, config, resume=True,
                  say=stop_after(count))  # fmt: skip
        except Stop:
            continue
    same(tmp_path / "whole", tmp_path / "pieces")


def modified(out):
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("options", [{}, {"epochs": 0}])
def test_a_finished_run_does_nothing_but_report(tmp_path, data, options):
    out = tmp_path / "run"
    config = replace(QUICK, **options)
    first = train(data, out, MODEL, SEARCH, config, resume=True)  # a missing folder: it starts
    before, lines = modified(out), []
    again = train(data, out, MODEL, SEARCH, config, resume=True, say=lines.append)
    assert modified(out) == before
    assert again.metrics == first.metrics
    assert len(lines) == 2 and lines[1].startswith("resumed after epoch ")


def test_an_empty_folder_starts(tmp_path, data):
    (tmp_path / "run").mkdir()
    train(data, tmp_path / "run", MODEL, SEARCH, QUICK, resume=True)
    train(data, tmp_path / "other", MODEL, SEARCH, QUICK)
    same(tmp_path / "run", tmp_path / "other")


def test_without_resume_a_run_begins_anew(tmp_path, data):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, QUICK, say=stop_after(4))
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, replace(QUICK, seed=1), say=stop_after(1))
    assert [r["epoch"] for r in records(out)[1:]] == [1]
    train(data, out, MODEL, SEARCH, replace(QUICK, seed=1), resume=True)  # of the second run
    train(data, tmp_path / "whole", MODEL, SEARCH, replace(QUICK, seed=1))
    same(tmp_path / "whole", out)


def test_other_options_are_named(tmp_path, data):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, QUICK, say=stop_after(2))
    before = modified(out)
    with pytest.raises(ResumeError) as error:
        train(data, out, replace(MODEL, joint_dim=8), replace(SEARCH, beam_size=2),
              replace(QUICK, learning_rate=0.5, epochs=2), resume=True)  # fmt: skip
    assert str(error.value) == (
        f"the run in {out} can resume only as it was started: epochs must be 3, got 2; "
        "learning_rate must be 0.01, got 0.5; model.joint_dim must be 16, got 8; "
        "search.beam_size must be 4, got 2. Leave --resume out to start over"
    )
    assert modified(out) == before
    free = replace(QUICK, workers=1, feature_cache=str(tmp_path / "cache"), device="auto")
    train(data, out, MODEL, SEARCH, free, resume=True)


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(tmp_path, data):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, QUICK, say=stop_after(2))
    stored = read_state((out / STATE_FILE).read_bytes(), "state")
    del stored.values["identity"]["options"]["model.weights"]
    del stored.values["identity"]["options"]["clip_norm"]
    save_state(out / STATE_FILE, stored)
    with pytest.raises(ResumeError, match=r"clip_norm must be 5\.0, got 1\.0"):
        train(data, out, MODEL, SEARCH, replace(QUICK, clip_norm=1.0), resume=True)
    train(data, out, MODEL, SEARCH, QUICK, resume=True)


def test_pictures_of_a_run_from_before_drafts_are_decoded_at_full_size(tmp_path, scenes):
    data = load_dataset(f"scenes:{scenes}")
    out, model = tmp_path / "run", replace(SMALL, freeze_backbone=True)
    with pytest.raises(Stop):
        train(data, out, model, SEARCH, QUICK, say=stop_after(2))
    stored = read_state((out / STATE_FILE).read_bytes(), "state")
    del stored.values["identity"]["options"]["model.jpeg_draft"]
    save_state(out / STATE_FILE, stored)
    with pytest.raises(ResumeError, match="model.jpeg_draft must be false, got true"):
        train(data, out, model, SEARCH, QUICK, resume=True)
    train(data, out, replace(model, jpeg_draft=False), SEARCH, QUICK, resume=True)


def test_other_data_is_refused(tmp_path, data):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, QUICK, say=stop_after(2))
    features = data.features.copy()
    features[-2] += 1  # a record of val
    with pytest.raises(ResumeError, match="as it was started: validation data must be the same"):
        train(data.with_changes(features=features), out, MODEL, SEARCH, QUICK, resume=True)
    fewer = data.with_changes(splits=data.splits | {"train": data.splits["train"][1:]})
    with pytest.raises(ResumeError, match="training data must be the same, got different ones"):
        train(fewer, out, MODEL, SEARCH, QUICK, resume=True)


def test_pictures_of_other_sizes_are_other_data(tmp_path, scenes):
    import shutil

    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    out, config = tmp_path / "run", replace(QUICK, warm_epochs=0, augment=False)
    with pytest.raises(Stop):
        train(load_dataset(f"scenes:{root}"), out, SMALL, SEARCH, config, say=stop_after(2))
    picture = sorted(root.glob("train/*.png"))[0]
    picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(ResumeError, match="training data must be the same"):
        train(load_dataset(f"scenes:{root}"), out, SMALL, SEARCH, config, resume=True)


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_epochs_may_grow_where_the_schedule_does_not_know_them(tmp_path, data, schedule):
    config = replace(QUICK, schedule=schedule, step_epochs=2)
    out = tmp_path / "run"
    train(data, out, DROPOUT, SEARCH, config)
    train(data, out, DROPOUT, SEARCH, replace(config, epochs=5), resume=True)
    train(data, tmp_path / "whole", DROPOUT, SEARCH, replace(config, epochs=5))
    same(tmp_path / "whole", out)


def test_epochs_may_not_grow_under_cosine(tmp_path, data):
    config = replace(QUICK, schedule="cosine")
    train(data, tmp_path / "run", MODEL, SEARCH, config)
    with pytest.raises(ResumeError, match="epochs must be 3, got 5"):
        train(data, tmp_path / "run", MODEL, SEARCH, replace(config, epochs=5), resume=True)


def test_a_state_that_is_none(tmp_path, data):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / STATE_FILE
    save_state(file, TrainingState({"a": 1}, {"b": torch.ones(2)}))
    whole = file.read_bytes()
    assert read_state(whole, "x").values == {"a": 1}
    for broken in (b"", b"no state", whole[:20], whole[:-1], b"\xff" * 8 + whole[8:]):
        file.write_bytes(broken)
        with pytest.raises(ResumeError, match=f"{STATE_FILE} must hold a training state"):
            train(data, tmp_path / "run", MODEL, SEARCH, QUICK, resume=True)
    file.write_bytes(whole.replace(b'"format":"2"', b'"format":"3"'))
    with pytest.raises(ResumeError, match="has format 3, this release reads 1 to 2"):
        train(data, tmp_path / "run", MODEL, SEARCH, QUICK, resume=True)


def test_a_flipped_bit_anywhere_in_a_state_is_found(tmp_path, data):
    out, rng = tmp_path / "run", np.random.default_rng(0)
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, QUICK, say=stop_after(3))
    whole = (out / STATE_FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for kind in ("header", "tensors"):
        places = rng.integers(*((0, header) if kind == "header" else (header, len(whole))), 300)
        for place in places.tolist():
            broken = bytearray(whole)
            broken[place] ^= 1 << int(rng.integers(8))
            with pytest.raises(ResumeError, match=r"^the state (is damaged|must hold|has format)"):
                read_state(bytes(broken), "the state")
    (out / STATE_FILE).write_bytes(bytes(broken))
    with pytest.raises(ResumeError, match=f"{STATE_FILE} is damaged.*Leave --resume out"):
        train(data, out, MODEL, SEARCH, QUICK, resume=True)


def test_a_state_of_the_format_without_checksums_is_checked_as_far_as_that_goes(tmp_path, data):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(data, out, MODEL, SEARCH, QUICK, say=stop_after(3))
    kept = read_state((out / STATE_FILE).read_bytes(), "state")

    def write(values, tensors):
        header = {"format": "1", "state": json.dumps(values)}
        safetensors.torch.save_file(tensors, out / STATE_FILE, metadata=header)

    flat = {name: tensor.flatten() for name, tensor in kept.tensors.items()}
    optimizer = {
        name: tensor.flatten() if name.endswith("exp_avg") else tensor
        for name, tensor in kept.tensors.items()
    }
    double = kept.tensors | {"model.0": kept.tensors["model.0"].double()}
    fewer = {name: tensor for name, tensor in kept.tensors.items() if name != "best.1"}
    for values, tensors in (
        (kept.values, flat), (kept.values, optimizer), (kept.values, double),
        (kept.values, fewer), (kept.values | {"stage": "none"}, kept.tensors),
        (kept.values | {"identity": 3}, kept.tensors),
        (kept.values | {"label order": ["a"]}, kept.tensors),
        ({k: v for k, v in kept.values.items() if k != "calibration"}, kept.tensors),
        ({k: v for k, v in kept.values.items() if k != "log"}, kept.tensors),
        (kept.values | {"groups": []}, kept.tensors), (kept.values | {"epoch": "x"}, kept.tensors),
    ):  # fmt: skip
        write(values, tensors)
        with pytest.raises(ResumeError, match="does not fit its run"):
            train(data, out, MODEL, SEARCH, QUICK, resume=True)
    write(*kept)
    train(data, out, MODEL, SEARCH, QUICK, resume=True)
    train(data, tmp_path / "whole", MODEL, SEARCH, QUICK)
    same(tmp_path / "whole", out)


def test_two_trainings_do_not_share_a_folder(tmp_path, data):
    config = replace(QUICK, warm_epochs=0, epochs=1)
    said = []

    def meanwhile(line):
        if line.startswith("path"):
            for resume in (False, True):
                with pytest.raises(InUseError, match="is in use by training, process") as error:
                    train(data, tmp_path / "run", MODEL, SEARCH, config, resume=resume)
                said.append(str(error.value))

    train(data, tmp_path / "run", MODEL, SEARCH, config, say=meanwhile)
    assert len(said) == 2 and f"process {os.getpid()} on" in said[0]
    train(data, tmp_path / "run", MODEL, SEARCH, config, resume=True)


def test_nothing_is_pickled(tmp_path, data):
    train(data, tmp_path / "run", MODEL, SEARCH, QUICK)
    stored = read_state((tmp_path / "run" / STATE_FILE).read_bytes(), "state")
    assert json.loads(json.dumps(stored.values)) == stored.values
    assert {"random.cpu", "random.order", "model.0", "best.0"} <= stored.tensors.keys()
    assert stored.values["stage"] == "path" and stored.values["epoch"] == 3


def test_the_log_is_cut_to_the_state(tmp_path):
    file = tmp_path / "log.jsonl"
    log = Log(file)
    log.write({"a": 1})
    position = log.position()
    log.write({"a": 2})
    assert position < log.position() == len(file.read_bytes())
    Log(file, position=position).write({"a": 3})
    assert [json.loads(line)["a"] for line in file.open()] == [1, 3]
    Log(file, position=10**6)  # lost: what is there stays
    assert len(file.read_text().splitlines()) == 2


def test_tensorboard_goes_on(tmp_path, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(QUICK, warm_epochs=1, tensorboard=True)
    for count in (3, 9):
        try:
            train(data, tmp_path / "run", MODEL, SEARCH, config, resume=True,
                  say=stop_after(count))  # fmt: skip
        except Stop:  # before the state of this epoch, whose figures are written again
            continue
    for stage, epochs in (("warm", [1]), ("path", [1, 2, 3])):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload()
        assert [s.step for s in events.Scalars("loss")] == epochs


# Kills

# A process that imports once starts a run per kill, so that many kills take little time. It kills
# half of them at any moment and half shortly after they began to write a checkpoint or a state.
KILLS = """
import json, os, random, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import torchvision.transforms.v2, safetensors.torch
from cnnrnn import Dataset, load_dataset
from cnnrnn.training import resume as state, run as module
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from tests.training.test_resume import DROPOUT, QUICK, SEARCH, SMALL, same
from tests.training.test_training import separable

folder, kills = Path(sys.argv[2]), int(sys.argv[4])
features = separable(folder / "data.npz")
scenes = load_dataset("scenes:" + sys.argv[3])
pictures = replace(QUICK, warm_epochs=1, epochs=2, batch_size=16)
cases = {
    "features": (features, DROPOUT, replace(QUICK, ema_decay=0.9, schedule="cosine")),
    "frozen": (scenes, replace(SMALL, freeze_backbone=True, joint_dropout=0.2), pictures),
    "trained": (scenes, replace(SMALL, joint_dropout=0.2), replace(pictures, ema_decay=0.5)),
    "workers": (scenes, SMALL, replace(pictures, workers=2)),
}

def start(case, out, notify=None):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if notify is not None:
            def told(function):
                def call(*arguments):
                    os.write(notify, b"w")
                    function(*arguments)
                return call
            module.save_state = told(module.save_state)
            CNNRNN.save = told(CNNRNN.save)
        data, model, config = cases[case]
        module.train(data, out, model, SEARCH, config, resume=True)
        status = 0
    finally:
        os._exit(status)

moments = random.Random(int(sys.argv[5]))
report = {"kills": 0, "in saving": 0, "runs": 0, "before the first state": 0}
seconds = {}
for case in cases:
    began = time.perf_counter()
    assert os.waitpid(start(case, folder / f"{case}-whole"), 0)[1] == 0
    seconds[case] = time.perf_counter() - began
names = list(cases)
outs = {}
while report["kills"] < kills:
    case = names[report["kills"] % len(names)]
    out = outs.setdefault(case, folder / f"{case}-{report['runs']}")
    reader, writer = os.pipe()
    in_saving = moments.random() < 0.5
    child = start(case, out, writer)
    os.close(writer)
    if in_saving:  # at its n-th save, somewhere in it
        for _ in range(moments.randint(1, 5)):
            if not os.read(reader, 1):
                break
        time.sleep(moments.uniform(0, 0.02))
    else:
        time.sleep(moments.uniform(0, seconds[case]))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(reader)
    if os.WIFSIGNALED(status):
        report["kills"] += 1
        report["in saving"] += in_saving
    else:
        assert status == 0, status
    file = out / state.STATE_FILE
    report["before the first state"] += not file.exists()
    if file.exists():
        kept = state.read_state(file.read_bytes(), str(file))
        if kept.values["stage"] == "path":
            load_checkpoint(out)
    if not os.WIFSIGNALED(status):
        same(folder / f"{case}-whole", out)
        report["runs"] += 1
        shutil.rmtree(outs.pop(case))
for case, out in outs.items():
    assert os.waitpid(start(case, out), 0)[1] == 0
    same(folder / f"{case}-whole", out)
    assert [file.name for file in out.glob(".*")] == [".lock"], list(out.glob(".*"))
    report["runs"] += 1
print(json.dumps(report))
"""


@posix
def test_kills_at_any_moment(tmp_path, scenes, request):
    pytest.importorskip("torchvision")
    kills = request.config.getoption("--kills")
    here = str(Path(__file__).resolve().parents[2])
    process = subprocess.run(
        [sys.executable, "-c", KILLS, here, str(tmp_path), str(scenes), str(kills), "0"],
        capture_output=True, text=True, timeout=120 + 10 * kills,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == kills and report["runs"] >= 4


@posix
def test_the_command_killed_and_resumed(tmp_path):
    labels = np.random.default_rng(0).random((400, 5)) < 0.4
    np.savez(tmp_path / "data.npz", features=labels + 0.0, labels=labels,
             label_names=np.array(list("abcde")))  # fmt: skip
    words = ["train", "--data", f"features:{tmp_path / 'data.npz'}", "--device=cpu",
             "--warm-epochs=1", "--epochs=5", "--finish-epochs=4", "--patience=9",
             "--batch_size=64",
             "--model.trunk-dim=8", "--model.hidden-dim=8"]  # fmt: skip
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cnnrnn", *words, "--out", str(out), "--resume"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other numbers round otherwise
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | threads)
    while not process.stderr.readline().startswith("path   2"):
        assert process.poll() is None
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    load_checkpoint(out)
    assert main([*words, "--out", str(out), "--resume", "--learning-rate=7"]) == 1
    assert main([*words, "--out", str(out), "--resume"]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    same(tmp_path / "whole", out)
    assert "resume" not in (out / "config.yaml").read_text()


def test_an_ensemble_and_a_single_model_are_not_mixed_up(tmp_path, data):
    quick = replace(QUICK, warm_epochs=0, epochs=1)
    orders = ("frequency", "rare")
    train(data, tmp_path / "one", MODEL, SEARCH, quick)
    with pytest.raises(ResumeError, match="holds a single model's run: --members must be left out"):
        train_ensemble(data, tmp_path / "one", MODEL, SEARCH, quick, orders, resume=True)
    train_ensemble(data, tmp_path / "two", MODEL, SEARCH, quick, orders)
    with pytest.raises(ResumeError, match="holds an ensemble's run"):
        train(data, tmp_path / "two", MODEL, SEARCH, quick, resume=True)
    again = train_ensemble(data, tmp_path / "two", MODEL, SEARCH, quick, orders, resume=True)
    assert again.model.labels == cnnrnn.load(tmp_path / "two").labels


def test_a_learned_order_may_not_get_more_epochs_while_it_is_learned(tmp_path, data):
    config = replace(QUICK, warm_epochs=0, epochs=2, label_order="easiest", reorder_epochs=2)
    train(data, tmp_path / "run", MODEL, SEARCH, config)
    with pytest.raises(ResumeError, match="epochs must be 2, got 4"):
        train(data, tmp_path / "run", MODEL, SEARCH, replace(config, epochs=4), resume=True)


def test_the_identity_of_data_says_nothing_of_who_reads_it(public_folder):
    file = public_folder / "a" / "a.png"
    file.parent.mkdir()
    file.write_bytes(b"a picture")
    data = Dataset([file], [["x"]])
    assert data_digest(data) == data_digest(data.with_changes(max_pixels=1))
    file.parent.chmod(0)
    with as_nobody():
        digest = data_digest(data)
    file.parent.chmod(0o755)
    file.unlink()
    assert data_digest(data) == digest  # as a picture that is not there
