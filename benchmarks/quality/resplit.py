"""How much a difference between two methods depends on the split.

    python -m benchmarks.quality.resplit features:corel5k.npz --out resplit.json --splits 8

Redraws the training, validation and test records of a source, as many of each as it has, and
trains two methods of `cnnrnn compare` on every draw. Prints the paired differences of the tests,
mean and standard error over draws, in points. docs/comparison.md has what was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.comparison import compare
from cnnrnn.config import CompareConfig
from cnnrnn.data import Dataset

MEASURES = ("O-F1", "C-F1 own", "mAP", "exact match")


def redrawn(dataset: Dataset, seed: int) -> Dataset:
    """Return the dataset with its records redistributed to splits of the same sizes."""
    records = np.random.default_rng(seed).permutation(len(dataset))
    ends = np.cumsum([len(rows) for rows in dataset.splits.values()])
    parts = np.split(records, ends[:-1])
    return dataset.with_changes(
        splits={name: np.sort(p) for name, p in zip(dataset.splits, parts, strict=True)}
    )


def figures(dataset: Dataset, methods: tuple[str, str], settings: int) -> list[dict[str, float]]:
    """Train the two methods, and return their figures by their own thresholds or cuts."""
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(
            dataset, Path(folder), ModelConfig(), SearchConfig(), TrainConfig(device="cpu"),
            CompareConfig(seeds=(0,), methods=methods, settings=settings),
        )  # fmt: skip
    found = []
    for method in methods:
        row = [row for row in rows if row.method == method][-1]  # the thresholded one
        found.append(
            {"O-F1": row.own["O-F1"], "C-F1 own": row.own_c_f1, "mAP": row.own["mAP"],
             "exact match": row.own["exact-match"]}
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "source", help="as --data of cnnrnn compare; feature vectors, all in splits"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON; resumes where it stopped")
    parser.add_argument("--splits", type=int, default=8, help="draws")
    parser.add_argument(
        "--methods", default="cnn-rnn,bce", help="the second is taken off the first"
    )
    parser.add_argument("--settings", type=int, default=1, help="as of cnnrnn compare")
    options = parser.parse_args()
    first, second = options.methods.split(",")
    dataset = load_dataset(options.source)
    done: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for seed in range(len(done), options.splits):
        found = figures(redrawn(dataset, seed), (first, second), options.settings)
        done.append({"draw": seed, first: found[0], second: found[1]})
        options.out.write_text(json.dumps(done, indent=1) + "\n")
        shown = "  ".join(f"{m} {100 * (found[0][m] - found[1][m]):+.1f}" for m in MEASURES)
        print(f"draw {seed}: {shown}", flush=True)
    for measure in MEASURES:
        differences = [100 * (draw[first][measure] - draw[second][measure]) for draw in done]
        error = statistics.stdev(differences) / len(done) ** 0.5 if len(done) > 1 else 0.0
        print(f"{measure}: {first} over {second} {statistics.mean(differences):+.2f} ± {error:.2f}")


if __name__ == "__main__":
    main()
