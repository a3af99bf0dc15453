"""Labels many small files by the command line: what a resumable run costs, and what kills change.

    python -m benchmarks.labelling --files 20000

Scenes of 64 pixels by the demo model, in torch. Prints seconds, seconds of CPU time and peak memory
of each run, by turns with the same predictions on standard output, and whether a run that was
killed three times wrote the bytes of one that was not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cnnrnn.api import DEMO_MODEL
from cnnrnn.data.sources.scenes import write_scenes

DISTINCT = 1000
FEW = 2000
KILLS = (0.3, 0.35, 0.3)  # of an undisturbed run's time


def link_files(scenes: Path, folder: Path, count: int) -> None:
    """Make `count` files of the scenes, under names of their own."""
    for number in range(count):
        home = folder / f"{number // 1000:03}"
        home.mkdir(parents=True, exist_ok=True)
        os.link(scenes / f"{number % DISTINCT + 1:06}.png", home / f"{number:06}.png")


def predict(*words: str, kill_after: float | None = None) -> float:
    """Run `cnnrnn predict`, print what it took and return seconds."""
    command = [sys.executable, "-m", "cnnrnn", "predict", *words, "--model", str(DEMO_MODEL),
               "--backend", "torch"]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process.pid, signal.SIGKILL)  # it is waited for below, ended or not
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    how = "killed" if os.WIFSIGNALED(status) else f"status {os.waitstatus_to_exitcode(status)}"
    print(
        f"{' '.join(words):<60} {how}, {seconds:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of "
        f"CPU time, {used.ru_maxrss / 1024:.0f} MB",
        flush=True,
    )
    return seconds


def main() -> None:
    """Run all, in a folder that goes at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder / "scenes", train=0, val=0, test=DISTINCT, seed=0)
        os.chdir(folder)
        link_files(folder / "scenes" / "test", folder / "few", FEW)
        link_files(folder / "scenes" / "test", folder / "many", options.files)
        predict("few", "--out", "few.jsonl")
        predict("many", "--format", "jsonl")
        seconds = predict("many", "--out", "whole.jsonl", "--resume")
        predict("many", "--format", "jsonl")
        for share in KILLS:
            predict("many", "--out", "killed.jsonl", "--resume", kill_after=share * seconds)
        predict("many", "--out", "killed.jsonl", "--resume")
        same = Path("whole.jsonl").read_bytes() == Path("killed.jsonl").read_bytes()
        print(f"the same bytes: {same}")
        predict("many", "--out", "killed.jsonl", "--resume")
        sys.exit(not same)


if __name__ == "__main__":
    main()
