"""Count the instructions of the CUDA search, without a GPU.

    python -m benchmarks.search.instructions

Runs what nvcc makes of the kernels, PTX, on the CPU (tests/kernels/ptx) and counts how often a warp
issues an instruction, with every state at hand, on the trained heads of heads.py; N = 4, T = 5.
Writes benchmarks/results/instructions.json; `python -m benchmarks.tables
benchmarks/results/cpu.json` puts it into docs/performance.md. `--functions` prints where the
instructions are.

A GPU's own instructions differ from PTX by some moves and address computations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.search.heads import trained_head
from tests.kernels.emulation import emulated
from tests.kernels.ptx import on_ptx

ROOT = Path(__file__).resolve().parents[2]
N, T = 4, 5
CASES = [(80, False, "fast"), (80, False, "exact"), (80, True, "fast"), (1000, False, "fast"),
         (1000, False, "exact")]  # fmt: skip
# On one multiprocessor: a batch that fills it, whose warps take eight images each, and one that
# does not, whose warps take four.
BATCHES = {"large": 64, "small": 32}
PRODUCTS = ("mma", "fma")


def count(
    search: on_ptx.PtxSearch, num_labels: int, chain_term: bool, precision: str, batch: int
) -> tuple[dict[str, Any], list[tuple[on_ptx.ptx.Line, int]]]:
    """Search a batch for the second time; return its figures and each instruction's count."""
    trained = trained_head(num_labels, chain_term)
    with torch.no_grad():
        images = trained.head.embed(trained.features(slice(batch)))
    head = emulated.EmulatedHead(search.emulator, trained.head, prefix_bytes=1 << 28)
    options = (images.joint, images.label_logits, N, T, 0, "increasing", False, "n_best", False)
    expected = head.beam_search(*options, precision=precision)
    search.counts.clear()
    with search:
        found = head.beam_search(*options, precision=precision)
    assert (found[0] != expected[0]).flatten(1).any(1).float().mean() <= 0.05  # ties
    (lines,) = search.counts.values()  # of the one launch
    issued = sum(n for _, n in lines)
    opcode = re.compile(r"(?:@!?%p\d+\s+)?(\w+)")
    products = sum(n for line, n in lines if opcode.match(line.text)[1] in PRODUCTS)  # type: ignore[index]
    return {"L": num_labels, "chain_term": chain_term, "precision": precision,
            "instructions": issued / batch, "products": products / batch,
            "paths_scored": found[5][0] / batch}, lines  # fmt: skip


def main() -> None:
    """Count every case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", action="store_true", help="of the first case, and no file")
    by_function = parser.parse_args().functions
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        search = on_ptx.PtxSearch(emulated.build(Path(folder)), Path(folder))
    search.emulator.set_multiprocessors(1)
    for case in CASES:
        for size, batch in BATCHES.items():
            row, lines = count(search, *case, batch)
            rows.append({"batch": size, **row})
            print(json.dumps(rows[-1]), flush=True)
            if by_function:
                for name, issued in on_ptx.by_function(lines).most_common(30):
                    print(f"{issued / batch:9.1f} {name}")
                return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", nvcc)
    results = {
        "commit": commit.stdout.strip(), "date": str(datetime.date.today()),
        "nvcc": release[1] if release else "unknown", "cases": rows,
    }  # fmt: skip
    target = ROOT / "benchmarks" / "results" / "instructions.json"
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
