"""Draw recall against box area: CNN-RNN beside binary cross-entropy on the same features.

    python examples/recall_by_area.py --demo demo --out recall_by_area.png

Reads what `make demo` left: its test scenes with their boxes, and the heads of its comparison,
which were trained on one set of features and tuned alike. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import cnnrnn
from cnnrnn.comparison import frozen_features
from cnnrnn.comparison.baselines import IndependentClassifier
from cnnrnn.data import Dataset
from cnnrnn.evaluation import ObjectRecall, object_recall
from cnnrnn.metrics import threshold_sets
from demo import HEAD

# Two labels share each of these drawings: only what else is in the image tells which it is.
CONTEXT_ONLY = ("star", "plane", "buoy", "mailbox", "gull", "sheep")
EDGES = np.array([0, 4, 8, 12, 16, 24, 32, 64])  # pixels of a 64 x 64 image
# Rows of the comparison that are drawn, what they are called here, and their colours.
METHODS = {
    "CNN-RNN, best path": ("CNN-RNN, best path", "#7aa5e0"),
    "CNN-RNN, thresholded": ("CNN-RNN, thresholded", "#1f4e9c"),
    "binary cross-entropy": ("binary cross-entropy, thresholded", "#c46a17"),
}
COLOURS = dict(METHODS.values())


def predicted_sets(row: dict[str, Any], weights: Path, test: Dataset) -> torch.Tensor:
    """Return the label sets [n, L] of one row of the comparison, in the data's column order."""
    assert test.features is not None
    features = torch.from_numpy(test.features)
    (rate,) = row["setting"].values()
    folder = weights / f"{row['method']}-seed-{row['seed']}-{rate:g}"
    if row["method"] == "cnn-rnn":
        model = cnnrnn.load(folder)
        column = {name: i for i, name in enumerate(model.labels)}
        found = model.infer(features)
        sets = found.sets
        if "threshold" in row["decision"]:
            scores = found.mixed(model.calibration.mix_weight)
            sets = threshold_sets(scores, row["decision"]["threshold"])
        return sets[:, [column[name] for name in test.label_names]]
    classifier = IndependentClassifier(HEAD, len(test.label_names), features.shape[1])
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        scores = classifier.eval()(features).sigmoid()
    return threshold_sets(scores, row["decision"]["threshold"])


def mean_and_error(values: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error over seeds, per column."""
    array = np.array(values)
    return array.mean(0), array.std(0, ddof=1) / len(array) ** 0.5


def main() -> None:
    """Measure, print the figures and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `make demo`")
    parser.add_argument("--out", type=Path, default=Path("recall_by_area.png"))
    options = parser.parse_args()
    try:
        import matplotlib
    except ModuleNotFoundError:
        parser.error("matplotlib is missing: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scenes = cnnrnn.load_dataset(f"scenes:{options.demo / 'scenes'}")
    backbone = cnnrnn.load(options.demo / "backbone").backbone
    assert backbone is not None
    test = frozen_features(scenes, backbone, options.demo / "features").split("test")
    pictures = scenes.split("test")
    targets = pictures.label_matrix()
    results = json.loads((options.demo / "compare" / "results.json").read_text(encoding="utf-8"))
    small = [scenes.label_names.index(name) for name in CONTEXT_ONLY]
    by_area: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    by_label: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    precision: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    for row in results["results"]:
        if row["title"] not in METHODS:
            continue
        name, _ = METHODS[row["title"]]
        sets = predicted_sets(row, options.demo / "compare" / "weights", test)
        recall = object_recall(sets, pictures)
        by_area[name].append(_by_area(recall, small))
        by_label[name].append([float(recall.found[recall.labels == i].float().mean())
                               for i in small])  # fmt: skip
        right = (sets & targets)[:, small].sum(0) / sets[:, small].sum(0).clamp(min=1)
        precision[name].append(right.tolist())

    figure, (left, right_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for shift, (name, colour) in zip((-0.27, 0, 0.27), COLOURS.items(), strict=True):
        mean, error = mean_and_error(by_area[name])
        bins = [f"{a}–{b}" for a, b in zip(EDGES, EDGES[1:], strict=False)]
        shown = ~np.isnan(mean)
        left.errorbar(np.arange(len(bins))[shown], 100 * mean[shown], 100 * error[shown],
                      color=colour, marker="o", capsize=3, label=name)  # fmt: skip
        left.set_xticks(range(len(bins)), bins, rotation=30)
        mean, error = mean_and_error(by_label[name])
        right_axes.bar(np.arange(len(small)) + shift, 100 * mean, 0.25, yerr=100 * error,
                       color=colour, capsize=2, label=name)  # fmt: skip
        at, _ = mean_and_error(precision[name])
        print(f"{name:34} recall    " + "  ".join(
            f"{label} {100 * m:.1f} ± {100 * e:.1f}"
            for label, m, e in zip(CONTEXT_ONLY, mean, error, strict=True)))  # fmt: skip
        cells = (f"{label} {100 * m:.1f}" for label, m in zip(CONTEXT_ONLY, at, strict=True))
        print(f"{'':34} precision " + "  ".join(cells))
        overall = [np.mean(values) for values in by_label[name]]
        print(f"{'':34} mean recall {100 * np.mean(overall):.1f}")
    left.set(xlabel="area of the largest box, pixels of a 64 x 64 picture", ylabel="recall, %",
             title="Small objects that only context tells apart")  # fmt: skip
    right_axes.set_xticks(range(len(small)), CONTEXT_ONLY)
    right_axes.set(ylabel="recall, %", title="The same, label by label", ylim=(0, 100))
    left.set_ylim(75, 101)
    left.legend(loc="lower right")
    for axes in (left, right_axes):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=110)
    print(f"drawn: {options.out}")


def _by_area(recall: ObjectRecall, labels: list[int]) -> list[float]:
    """Return the recall of some labels' objects between each two `EDGES`; NaN for none."""
    of_labels = torch.isin(recall.labels, torch.tensor(labels))
    values = []
    for least, most in zip(EDGES, EDGES[1:], strict=False):
        inside = of_labels & (recall.areas >= least) & (recall.areas < most)
        values.append(float(recall.found[inside].float().mean()))
    return values


if __name__ == "__main__":
    main()
