"""A disk that gets full at any byte: one sentence, nothing half written, and the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnnrnn.model.classifier import load_checkpoint
from tests.reliability.conftest import ROOT

POINTS = {"train": 8, "compare": 3, "evaluate": 2, "predict": 2, "scenes": 2, "export": 2,
          "train frozen": 1}  # fmt: skip

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc and LD_PRELOAD"
)

DRIVER = """
import ctypes, json, os, sys
from contextlib import contextmanager
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.reliability.jobs import ended, jobs, started

sources, folder, counts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
PLENTY = 1 << 40

@contextmanager
def disk(out, room):
    os.environ["FULL_DISK"], os.environ["FULL_DISK_BYTES"] = str(out), str(room)
    yield
    written = ctypes.c_longlong.in_dll(ctypes.CDLL(None), "full_disk_written").value
    (folder / "written").write_text(str(written))

def run(name, room, out):
    status = ended(started(jobs(sources, out)[name], folder / "said", disk(out, room)))
    return status, (folder / "said").read_text()

report = []
for name, points in counts.items():
    whole = folder / f"{name} whole"
    whole.mkdir()
    status, said = run(name, PLENTY, whole)
    assert status == 0, said
    written = sum(f.stat().st_size for f in whole.rglob("*") if f.is_file())
    if name != "export":  # which is a process of its own
        written = int((folder / "written").read_text())
    for point in range(points):
        out = folder / f"{name} {point}"
        out.mkdir()
        room = 1 + int(written * (point + 0.5) / points)
        status, said = run(name, room, out)
        kept = (".lock", ".labels.jsonl.labelling")
        hidden = [str(f) for f in out.rglob(".*") if f.name not in kept]
        again, said_again = run(name, PLENTY, out)
        report.append([name, room, status, said, hidden, again, said_again, str(whole), str(out)])
print(json.dumps(report))
"""


def test_a_full_disk(sources: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    library = tmp_path / "full_disk.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(ROOT / "tests" / "reliability" / "full_disk.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    points = POINTS if pytestconfig.getoption("attacks") else {"train": 2, "evaluate": 1}
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(sources), str(tmp_path), json.dumps(points)],
        cwd=ROOT, env=os.environ | {"LD_PRELOAD": str(library)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for name, room, status, said, hidden, again, said_again, whole, out in json.loads(run.stdout):
        print(f"{name}, {room:,} bytes: {said.splitlines()[-1]}")
        assert status == 1 and "Traceback" not in said, said
        last = said.splitlines()[-1]
        assert last.startswith("cnnrnn: error: ") and last.endswith(": No space left on device")
        assert out in last and not hidden
        assert again == 0, said_again
        same_files(Path(whole), Path(out))


def same_files(whole: Path, out: Path) -> None:
    """Require that a folder has what another has, but for times, and models of the same weights."""
    timed = ("log.jsonl", "results.json")
    for file in whole.rglob("*"):
        other = out / file.relative_to(whole)
        assert other.exists(), other
        if file.name == "config.json" and (file.parent / "model.safetensors").exists():
            first, second = load_checkpoint(file.parent), load_checkpoint(other.parent)
            pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        elif file.suffix in (".json", ".csv", ".jsonl", ".png") and file.name not in timed:
            assert file.read_bytes() == other.read_bytes(), other
