"""Train the small model that ships in the package, and measure it on scenes of another seed.

Run by `make scenes-model`; about nine minutes on two CPU cores. Deterministic on one machine: the
same seeds, images and steps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import cnnrnn
from cnnrnn.api import DEMO_MODEL
from cnnrnn.cli import main as cnnrnn_command

TRAIN_SEED, TEST_SEED = 0, 2
BACKBONE_OPTIONS = (
    "--model.backbone small --model.freeze_backbone false --model.trunk_dim 0 "
    "--model.input_dropout 0 --warm_epochs 14 --epochs 0 --schedule one_cycle "
    "--learning_rate 5e-3 --batch_size 64 --patience 14"
)
HEAD_OPTIONS = (
    "--model.backbone small --model.trunk_dim 0 --model.input_dropout 0.1 "
    "--model.hidden_dropout 0 --model.joint_dropout 0.1"
)


def run(command: str) -> None:
    """Print a `cnnrnn` command and run it in this process."""
    print(f"\n$ cnnrnn {command}", flush=True)
    status = cnnrnn_command(shlex.split(command))
    if status:
        sys.exit(status)


def main() -> None:
    """Write the images, train backbone and head, put the model in place, measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/scenes-model"))
    parser.add_argument("--out", type=Path, default=DEMO_MODEL)
    options = parser.parse_args()
    work: Path = options.work
    data, test = work / "scenes", work / "test-scenes"
    if not data.exists():
        run(f"scenes --out {data} --seed {TRAIN_SEED} --train 12000 --val 1500 --test 1")
    if not test.exists():
        run(f"scenes --out {test} --seed {TEST_SEED} --train 1 --val 1 --test 2000")
    run(f"train --data scenes:{data} --out {work / 'backbone'} {BACKBONE_OPTIONS}")
    run(
        f"train --data scenes:{data} --out {work / 'model'} "
        f"--init_backbone {work / 'backbone'} {HEAD_OPTIONS}"
    )
    cnnrnn.load(work / "model").save(options.out)
    figures = work / "figures.json"
    run(f"evaluate --data scenes:{test} --model {options.out} --json {figures}")
    size = sum(file.stat().st_size for file in options.out.iterdir())
    metrics = json.loads(figures.read_text(encoding="utf-8"))
    print(f"{options.out}: {size / 1e6:.1f} MB, O-F1 {metrics['path']['O-F1']:.3f} on seed 2")


if __name__ == "__main__":
    main()
