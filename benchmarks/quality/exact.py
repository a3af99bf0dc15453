"""What the exact search proves, how right conditional marginals are, what candidates cover.

    python -m benchmarks.quality.exact RUN SOURCE [RUN SOURCE ...] --out exact.json

Of each trained model, on the test split of its source: how many prefixes the exact search scores,
how many images it certifies, its time against the beam's, how many best sets the beam misses; the
share of test images whose true set is among `Prediction.candidates`; and, over labels of which few
enough are kept to enumerate all sets, how far conditional marginals are from the truth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrnn import CNNRNN, SearchConfig, load, load_dataset
from cnnrnn.data import Dataset
from cnnrnn.machine.files import write_whole
from cnnrnn.reveal import reveal
from cnnrnn.search import beam_search, best_sets

BEAM = SearchConfig(beam_size=8)
ENUMERATED = 12  # labels
REPEATS = 7
LISTED = 1000  # candidates


def test_features(model: CNNRNN, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [n, F] and targets [n, L] in the model's path order."""
    test = dataset.split("test")
    assert test.features is not None
    targets = model.label_space.from_source(test.label_matrix(), test.label_names)
    return torch.from_numpy(test.features), targets


def seconds(search: Any) -> float:
    """Return the median time of a call with kept states, of this thread alone."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.thread_time()
        search()
        times.append(time.thread_time() - began)
    return float(np.median(times[1:]))


@torch.no_grad()
def measure_exact(model: CNNRNN, features: torch.Tensor) -> dict[str, float]:
    """Measure the exact search for the best set against the beam."""
    embedding = model.head.embed(features)
    T = model.head.max_labels
    found = best_sets(model.head, embedding, count=1, max_labels=T, max_expansions=200)
    eight = best_sets(model.head, embedding, count=8, max_labels=T, max_expansions=200)
    expansions = found.expansions.double()
    proved = found.proved >= 1
    figures = {
        "images": len(features),
        "labels": model.head.num_labels,
        "certified": float(proved.double().mean()),
        "expansions, median": float(expansions.median()),
        "expansions, 99 %": float(expansions.quantile(0.99)),
        "expansions, most": float(expansions.max()),
        "expansions for 8 sets, median": float(eight.expansions.double().median()),
        "certified 8 sets": float((eight.proved >= 8).double().mean()),
    }
    for N in (1, 4, 8):
        beam = beam_search(model.head, embedding, SearchConfig(beam_size=N, max_labels=T))
        below = beam.log_probs[:, 0] < found.log_probs[:, 0] - 1e-5
        figures[f"best set missed by a beam of {N}"] = float((below & proved).double().mean())
    beam_time = seconds(
        lambda: beam_search(model.head, embedding, SearchConfig(beam_size=8, max_labels=T))
    )
    for name, count in (("best set", 1), ("8 sets", 8)):
        exact_time = seconds(
            lambda count=count: best_sets(model.head, embedding, count=count, max_labels=T)
        )
        figures[f"time of the {name} over a beam of 8"] = exact_time / beam_time
    return figures


@torch.no_grad()
def measure_marginals(model: CNNRNN, features: torch.Tensor, targets: torch.Tensor) -> Any:
    """Measure conditional marginals with all but a few labels known to be absent.

    The most frequent labels are asked about and one of the true ones among them is revealed, so
    that all sets can be scored.
    """
    asked = targets.sum(0).argsort(descending=True, stable=True)[:ENUMERATED].sort().values
    images, drawn = reveal(targets[:, asked], 1)
    images, drawn = images[:300], drawn[:300]
    evidence = torch.full((len(images), targets.shape[1]), -1, dtype=torch.int8)
    evidence[:, asked] = drawn
    embedding = model.head.embed(features[images])
    T = min(model.head.max_labels, len(asked))
    every = best_sets(
        model.head, embedding,
        count=2 ** len(asked), max_labels=T, max_expansions=10**6, evidence=evidence,
    )  # fmt: skip
    assert every.ended.all() or len(asked) < 1
    weights = (every.log_probs - every.log_probs[:, :1]).exp().double()
    truth = torch.zeros(targets[images].shape, dtype=torch.float64)
    for b, i in itertools.product(range(len(images)), range(weights.shape[1])):
        length = int(every.lengths[b, i])
        if length and weights[b, i] > 0:
            truth[b, every.labels[b, i, :length]] += weights[b, i]
    truth /= weights.sum(1, keepdim=True)
    errors = {}
    for places in (8, 16, 64):
        search = SearchConfig(beam_size=8, max_labels=T, marginal_places=places)
        found = beam_search(model.head, embedding, search, marginals=True, evidence=evidence)
        error = (found.marginals().double() - truth).abs()[:, asked][drawn == 0]
        errors[str(places)] = {"mean": float(error.mean()), "most": float(error.max())}
    return {"images": len(images), "labels": len(asked), "places": errors}


def measure_candidates(model: CNNRNN, features: torch.Tensor, targets: torch.Tensor) -> Any:
    """Measure how often the true set is among the candidates, and how many those are.

    Of all images by the log-probability of the true set, without a limit; then the lists of at most
    `LISTED` sets of 300 images drawn at random, in which the true set must be just where it is
    improbable enough.
    """
    nll = model.set_nll(features, targets)
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:300]
    predictions = model.predict_features(features[rows])
    figures = {}
    for percent in (50, 80, 90):
        inside = nll <= model.calibration.set_nll[percent - 1]
        lists = [prediction.candidates(percent / 100, limit=LISTED) for prediction in predictions]
        for row, found in zip(rows.tolist(), lists, strict=True):
            names = frozenset(np.array(model.labels)[targets[row].numpy()].tolist())
            listed = any(names == labels for labels, _ in found)
            close = abs(nll[row] - model.calibration.set_nll[percent - 1]) < 1e-3
            assert listed == bool(inside[row]) or close or not found.complete
        figures[str(percent / 100)] = {
            "covered": float(inside.double().mean()),
            "complete": float(np.mean([found.complete for found in lists])),
            "complete of 64": float(
                np.mean([found.complete and len(found) <= 64 for found in lists])
            ),
            "sets, median": float(np.median([len(found) for found in lists])),
        }
    return figures


def main() -> None:
    """Measure the models named and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", metavar="RUN SOURCE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("a source must follow each run")
    torch.set_num_threads(1)
    results = []
    for run, source in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        model = load(run)
        assert isinstance(model, CNNRNN)
        features, targets = test_features(model, load_dataset(source))
        result = {
            "source": Path(source).stem,
            "exact": measure_exact(model, features),
            "marginals": measure_marginals(model, features, targets),
            "candidates": measure_candidates(model, features, targets),
        }
        print(json.dumps(result, indent=1), flush=True)
        results.append(result)
    text = json.dumps(results, indent=1) + "\n"
    write_whole(options.out, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
