"""Time and memory of a report beside those of the predictions: `python -m benchmarks.report`.

Random feature vectors and labels, and a head of the default recipe that has not been trained: what
is computed does not depend on what it has learned. On one thread.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cnnrnn import CNNRNN, Dataset, Head, ModelConfig, SearchConfig, write_report
from cnnrnn.data.dataset import csr
from cnnrnn.labels import LabelSpace

FEATURES = 512
LABELS_AN_IMAGE = 2.9


def peak() -> float:
    """Return the process's peak memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    """Predict, then report, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--labels", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    names = tuple(f"label {i}" for i in range(options.labels))
    targets = random.random((options.images, options.labels)) < LABELS_AN_IMAGE / options.labels
    features = random.standard_normal((options.images, FEATURES)).astype(np.float32)
    indptr, indices = csr(np.flatnonzero(row) for row in targets)
    dataset = Dataset.from_arrays("random", names, indptr, indices, features=features)
    config = ModelConfig(backbone="features")
    head = Head.from_config(config, options.labels, FEATURES)
    head.max_labels = int(targets.sum(1).max())
    with torch.no_grad():  # so that paths have about as many labels as the sets
        head.label_classifier.bias.fill_(float(np.log(LABELS_AN_IMAGE / options.labels)))
    model = CNNRNN(config, LabelSpace.given(names), head, None, SearchConfig()).eval()

    began = time.perf_counter()
    model.predict_features(features)
    predicted, before = time.perf_counter() - began, peak()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(model, dataset, page)
        reported, size = time.perf_counter() - began, page.stat().st_size
    print(
        f"{options.images:,} images, {options.labels} labels: predictions {predicted:.1f} s and "
        f"{before:.2f} GB in all; report {reported:.1f} s, predictions included, and "
        f"{peak() - before:.2f} GB more; page {size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
