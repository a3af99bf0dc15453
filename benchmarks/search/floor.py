"""The arithmetic that a search cannot do without, and the time it takes at this core's peak.

What is counted are vector instructions of the widest instruction set, as csrc/kernels writes them:

- per row (a live path that is scored): the joint projection's sum and activation, 2 D / lanes;
- per vector of label scores: D multiply-adds for U_l x, and for softmax and selection
  `SOFTMAX_INSTRUCTIONS`: adding the label logits 3, largest 1, e^x 22 with its sum, threshold 4;
- per prefix that was extended for the first time: 4 H H multiply-adds, over lanes;
- per prefix state that was made: 4 H additions, the cell, counted below, and D H multiply-adds.

With increasing paths a row needs the vectors from its last label on. The peak is the measured rate
of multiply-adds (peak.cpp): the floor takes every instruction for one of those and nothing for
memory, branches, selection among survivors, or Python.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from cnnrnn import _C
from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search.packed import packed_head

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
FLAGS = {
    "avx512": ["-mavx512f", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
CELL_FUNCTION_INSTRUCTIONS = 30  # a sigmoid or tanh: e^x 25, a division and its sums
SOFTMAX_INSTRUCTIONS = {True: 30, False: 27}  # with label logits, without


class WorkPerImage(NamedTuple):
    """What the search of one image needs, on average."""

    rows: float  # live paths scored
    vectors: float  # vectors of label scores
    instructions: float  # vector instructions, states not counted
    bytes: float  # read and written: U_o o per row, embedding, logits, results


@cache
def peak() -> float:
    """Measure multiply-adds per second of one core, in vectors of the widest instruction set."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None  # the package was compiled here
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        flags = FLAGS[_C.instruction_sets()[0]]
        subprocess.run([compiler, "-O3", *flags, str(source), "-o", str(program)], check=True)
        return float(subprocess.run([program], check=True, capture_output=True).stdout)


def work(
    head: Head, embedding: ImageEmbedding, config: SearchConfig, max_labels: int
) -> WorkPerImage:
    """Count the work of an image, from the decisions of a search of a batch."""
    B, D, L, T = len(embedding), head.joint_dim, head.num_labels, max_labels
    N = config.beam_size
    lanes = LANES[_C.instruction_sets()[0]]
    with torch.no_grad():
        trace = packed_head(head).beam_search(
            embedding.joint, embedding.label_logits, N, T, config.min_labels, config.order,
            config.end_takes_slot, config.stop, False, True,
        )[4]  # fmt: skip
    assert trace is not None and config.order == "increasing"
    live = trace[:, : T - 1]  # of the last step: length T, END follows without a score
    labels = live[..., 1][live[..., 0] >= 0]
    per_row = -(-(L + 1) // lanes)
    rows = B + len(labels)
    vectors = B * per_row + int(
        (per_row - torch.div(labels + 1, lanes, rounding_mode="floor")).sum()
    )
    has_logits = embedding.label_logits is not None
    instructions = vectors * (D + SOFTMAX_INSTRUCTIONS[has_logits]) + rows * 2 * D / lanes
    moved = rows * 4 * D + B * (4 * D + has_logits * 4 * (L + 1) + N * (8 * T + 8 + 4))
    return WorkPerImage(rows / B, vectors / B, instructions / B, moved / B)


def state_instructions(head: Head, states: float, parents: float) -> float:
    """Count the vector instructions of making states, and the products of their parents."""
    H, D = head.hidden_dim, head.joint_dim
    per_unit = 4 + 5 * CELL_FUNCTION_INSTRUCTIONS + 4
    return (states * H * (per_unit + D) + parents * 4 * H * H) / LANES[_C.instruction_sets()[0]]
