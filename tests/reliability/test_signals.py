"""Ctrl-C and SIGTERM at any moment of any command: it ends soon, and a run goes on after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.conftest import ROOT
from tests.reliability.test_full_disk import same_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals, and forks")

LONGEST = 2.0
"""Seconds from a signal to the end of the process."""

DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import torchvision, onnx, onnxscript, sklearn.linear_model, pycocotools.coco  # once, for all
import captum.attr, jinja2, matplotlib.figure
from tests.reliability.jobs import ended, jobs, started

sources, folder, tries = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
moments = random.Random(0)
report = []
for name in jobs(sources, folder) if tries > 1 else ("train", "predict"):
    whole = folder / f"{name} whole"
    whole.mkdir()
    status = ended(started(jobs(sources, whole)[name], folder / "said"))
    assert status == 0, (folder / "said").read_text()
    again = folder / f"{name} again"
    again.mkdir()
    began = time.perf_counter()  # the first one had more to load
    assert ended(started(jobs(sources, again)[name], folder / "said")) == 0
    usual = time.perf_counter() - began
    for number in range(tries):
        out = folder / f"{name} {number}"
        out.mkdir()
        which = signal.SIGTERM if number % 2 else signal.SIGINT
        child = started(jobs(sources, out)[name], folder / "said")
        after = usual * moments.uniform(0.02, 0.98)
        time.sleep(after)
        os.kill(child, which)
        sent = time.perf_counter()
        status = ended(child)
        seconds = time.perf_counter() - sent
        said = (folder / "said").read_text()
        kept = (".lock", ".labels.jsonl.labelling")
        hidden = [str(f) for f in out.rglob(".*") if f.name not in kept]
        again = ended(started(jobs(sources, out)[name], folder / "said"))
        report.append([name, int(which), after, seconds, status, said, hidden, again,
                       (folder / "said").read_text(), str(whole), str(out)])
print(json.dumps(report))
"""


def test_signals(sources: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    tries = 5 if pytestconfig.getoption("attacks") else 1
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(sources), str(tmp_path), str(tries)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    slowest: dict[str, float] = {}
    cut_short = 0
    for (
        name,
        which,
        after,
        seconds,
        status,
        said,
        hidden,
        again,
        said_again,
        whole,
        out,
    ) in json.loads(run.stdout):
        slowest[name] = max(seconds, slowest.get(name, 0))
        # It may have ended meanwhile; before it has begun, SIGTERM ends it as any process.
        assert status in (128 + which, 0) or (status == -15 and not said), (name, status, said)
        cut_short += status > 0
        if status > 0:
            assert "Traceback" not in said, (name, after, said)
            how = "terminated" if which == 15 else "interrupted"
            assert said.splitlines()[-1].startswith(f"cnnrnn: {how}"), said
        assert not hidden
        assert again == 0, said_again
        same_files(Path(whole), Path(out))
    print(f"{cut_short} of {len(json.loads(run.stdout))} cut short, slowest:", end=" ")
    assert cut_short
    print({name: round(seconds, 2) for name, seconds in slowest.items()})
    assert max(slowest.values()) < LONGEST
