"""Ctrl-C and SIGTERM at any moment of any command: it ends soon, and a run goes on after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.conftest import ROOT
from tests.reliability.jobs import jobs
from tests.reliability.test_full_disk import same_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals, and forks")

LONGEST = 2.0
"""Seconds from a signal to the end of the process."""
DAILY = ("train", "predict")

DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import torchvision, onnx, onnxscript, sklearn.linear_model, pycocotools.coco  # once, for all
import captum.attr, jinja2, matplotlib.figure, cnnrnn.cli
from tests.reliability.jobs import ended, jobs, started

sources, folder, name, tries = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def begun(out):
    return started(jobs(sources, out)[name], folder / "said")

for whole in ("first", "whole"):
    (folder / whole).mkdir()
    began = time.perf_counter()  # the first one has more to load
    assert ended(begun(folder / whole)) == 0, (folder / "said").read_text()
    usual = time.perf_counter() - began
moments = random.Random(name)
for number in range(tries):
    out = folder / str(number)
    out.mkdir()
    which = signal.SIGTERM if number % 2 else signal.SIGINT
    child = begun(out)
    time.sleep(usual * (0.3 if tries == 1 else moments.uniform(0.02, 0.98)))
    os.kill(child, which)
    sent = time.perf_counter()
    status = ended(child)
    seconds = time.perf_counter() - sent
    said = (folder / "said").read_text()
    kept = (".lock", ".labels.jsonl.labelling")
    hidden = [str(file) for file in out.rglob(".*") if file.name not in kept]
    again = ended(begun(out))
    print(json.dumps([int(which), seconds, status, said, hidden, again,
                      (folder / "said").read_text()]))
"""


@pytest.mark.parametrize("name", jobs(Path(), Path()))
def test_signals(sources: Path, tmp_path: Path, pytestconfig: pytest.Config, name: str) -> None:
    attacks = pytestconfig.getoption("attacks")
    if not attacks and name not in DAILY:
        pytest.skip("tried with --attacks")
    tries = 5 if attacks else 1
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(sources), str(tmp_path), name, str(tries)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    slowest, cut_short = 0.0, 0
    for number, line in enumerate(run.stdout.splitlines()):
        which, seconds, status, said, hidden, again, said_again = json.loads(line)
        slowest = max(slowest, seconds)
        # It may have ended meanwhile; before it has begun, a signal ends it as any process.
        assert status in (128 + which, 0) or (status == -which and not said), (status, said)
        if status > 0:
            cut_short += 1
            how = "terminated" if which == 15 else "interrupted"
            assert said.splitlines()[-1].startswith(f"cnnrnn: {how}"), said
            assert "Traceback" not in said
        assert not hidden
        is_complete = name == "scenes" and "must be a new or empty folder" in said_again
        assert again == 0 or is_complete, said_again
        same_files(tmp_path / "whole", tmp_path / str(number))
    print(f"{name}: {cut_short} of {tries} cut short, the slowest ended in {slowest:.2f} s")
    assert cut_short and slowest < LONGEST
