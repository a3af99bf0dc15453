"""What it is worth to tell training that labels are unknown, against taking them as absent.

    python -m benchmarks.quality.unknown_labels --out unknown.json features:animals.npz

Each source needs a test split. So many of the pairs of training or validation image and label are
hidden at random; test images keep all. docs/training.md has the table of what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.data import Dataset
from cnnrnn.data.splits import with_fixed_splits
from cnnrnn.prediction.decisions import decision_metrics
from cnnrnn.training.run import train
from tests.training.hidden import hide

HIDDEN = (0.0, 0.2, 0.5)
TAKEN_AS: tuple[Literal["absent", "unknown"], ...] = ("absent", "unknown")
MEASURES = ("NLL", "O-F1", "mAP", "path O-F1", "path exact")


def measure(dataset: Dataset, config: TrainConfig) -> dict[str, float]:
    """Train the default recipe and measure it on the test split."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = train(dataset, Path(folder), ModelConfig(), SearchConfig(), config).model
    seconds = time.perf_counter() - began
    test = dataset.split("test")
    assert test.features is not None
    features = torch.from_numpy(test.features).to(model.device)
    targets = model.label_space.from_source(test.label_matrix(), test.label_names)
    metrics = decision_metrics(model.infer(features), targets, model.calibration)
    return {
        "NLL": float(model.set_nll(features, targets).mean()),
        "O-F1": metrics["threshold"]["O-F1"],
        "mAP": metrics["threshold"]["mAP"],
        "path O-F1": metrics["path"]["O-F1"],
        "path exact": metrics["path"]["exact-match"],
        "label_thresholds O-F1": metrics["label_thresholds"]["O-F1"],
        "labels true": metrics["path"]["mean-labels-true"],
        "labels on the best path": metrics["path"]["mean-labels-predicted"],
        "seconds": seconds,
    }


def table(results: Sequence[dict[str, Any]], sources: Mapping[str, str]) -> str:
    """Lay out results as Markdown: mean ± standard error over seeds, in % or nats.

    Args:
        results: of all sources.
        sources: names of data files to what the table calls them.
    """
    lines = ["| | hidden, taken as | " + " | ".join(MEASURES) + " |"]
    lines.append("|---" * (len(MEASURES) + 2) + "|")
    for source, share, taken_as in itertools.product(sources, HIDDEN, TAKEN_AS):
        wanted = (source, share, taken_as)
        rows = [r["test"] for r in results if (r["source"], r["hidden"], r["taken as"]) == wanted]
        if rows:
            title = f"{100 * share:g} %, {taken_as}" if share else "none"
            cells = (_cell(name, [row[name] for row in rows]) for name in MEASURES)
            name = "" if share else sources[source]
            lines.append(f"| {name} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, values: Sequence[float]) -> str:
    factor, digits = (1, 2) if name == "NLL" else (100, 1)
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {factor * error:.{digits}f}"


def main() -> None:
    """Measure every source, write each result as it comes, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    done = {(r["source"], r["hidden"], r["taken as"], r["seed"]) for r in results}
    names = {Path(source.partition(":")[2]).stem: source for source in arguments.sources}
    for (name, source), seed in itertools.product(names.items(), range(arguments.seeds)):
        config = TrainConfig(seed=seed)
        whole = with_fixed_splits(load_dataset(source), config)
        for share, taken_as in itertools.product(HIDDEN, TAKEN_AS):
            if (share or taken_as == "unknown") and (name, share, taken_as, seed) not in done:
                test = measure(hide(whole, share, taken_as, seed), config)
                results.append({"source": name, "hidden": share, "taken as": taken_as,
                                "seed": seed, "test": test})  # fmt: skip
                arguments.out.write_text(json.dumps(results, indent=1))
    print(table(results, {name: name for name in names}))


if __name__ == "__main__":
    main()
