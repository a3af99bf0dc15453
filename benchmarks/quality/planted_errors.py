"""How well wrong labels are found: errors are planted in a data set and then looked for.

    python -m benchmarks.quality.planted_errors --out planted_errors.json features:corel16k.npz

A tenth of the labels is dropped, and five false ones are added for every hundred, drawn by label
frequency. Every record is scored by models that were trained without it, on the labels with the
errors: the path model, by the log-odds of its set with and without each label, and an independent
classifier on the same trunk and records, by its own log-odds. Measured is the average precision of
the dropped labels among all that are absent, and of the false ones among all that are there.
docs/data.md has what was found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.comparison.baselines import (
    Training,
    network_outputs,
    product_log_probs,
    train_independent,
)
from cnnrnn.comparison.chains import ProbabilisticChain, train_chain
from cnnrnn.comparison.dependencies import train_dependencies
from cnnrnn.data import Dataset
from cnnrnn.data.dataset import csr
from cnnrnn.data.splits import stratified_folds, with_fixed_splits
from cnnrnn.inspection.flips import flipped_log_probs
from cnnrnn.training.batches import Split
from cnnrnn.training.run import train

METHODS = ("path model", "independent", "chain term", "linear chain", "dependency network")
"""The path model, its opponent, the independent scores that the path model has inside, and two that
know other labels too: a probabilistic chain, and each label given all the others."""

Matrix = npt.NDArray[np.bool_]


def planted(
    labels: Matrix, dropped: float, added: float, rng: np.random.Generator
) -> tuple[Matrix, Matrix, Matrix]:
    """Plant errors in label sets.

    Args:
        labels: [n, L].
        dropped: share of the labels that are taken out, each as likely as any other.
        added: false labels over all labels; a label is as likely to be added as it is frequent.
        rng: draws them.

    Returns:
        The labels with the errors, where a label was dropped, and where one was added: [n, L] each.
    """
    there = np.flatnonzero(labels)
    out = rng.choice(there, round(dropped * len(there)), replace=False)
    # The largest of log(weight) + Gumbel noise are a draw by weight without replacement.
    with np.errstate(divide="ignore"):
        keys = np.log(labels.sum(0)) + rng.gumbel(size=labels.shape)
    keys[labels] = -np.inf
    count = round(added * len(there))
    into = np.argpartition(-keys.ravel(), count)[:count] if count else np.zeros(0, dtype=np.int64)
    is_dropped, is_added = np.zeros_like(labels), np.zeros_like(labels)
    is_dropped.flat[out] = True
    is_added.flat[into] = True
    return (labels & ~is_dropped) | is_added, is_dropped, is_added


def with_labels(dataset: Dataset, labels: Matrix) -> Dataset:
    """Return a dataset whose records have other labels [n, L], all in one split."""
    pointers, indices = csr([np.flatnonzero(row).tolist() for row in labels])
    records = {"all": np.arange(len(dataset))}
    return dataset.with_changes(label_indptr=pointers, label_indices=indices, splits=records)


@torch.no_grad()
def chain_odds(chain: ProbabilisticChain, features: Tensor, targets: Tensor) -> Tensor:
    """Return log P(set with the label) - log P(set without it) by a chain: [n, L] float64."""
    scores = chain(features, targets)
    influence = chain.influence()
    odds = torch.zeros(targets.shape, dtype=torch.float64)
    signs = torch.where(targets, 1.0, -1.0)
    given = product_log_probs(scores, targets)
    for label in range(targets.shape[1]):
        turned = targets.clone()
        turned[:, label] = ~turned[:, label]
        # The label's own logit stays, those of later labels lose or gain its influence.
        other = scores - signs[:, label, None] * influence[:, label]
        odds[:, label] = signs[:, label] * (given - product_log_probs(other, turned))
    return odds


def cross_fitted(
    dataset: Dataset, folds: int, config: TrainConfig, keep: dict[str, Any]
) -> dict[str, Tensor]:
    """Score every label of every record by models that did not see the record.

    Returns:
        By method, [n, L] log-odds that the label is there; columns as in the dataset.
    """
    n, L = len(dataset), len(dataset.label_names)
    odds = {name: torch.zeros(n, L, dtype=torch.float64) for name in METHODS}
    seconds = dict.fromkeys(("training", "judging", "training independent"), 0.0)
    for held in stratified_folds(dataset, folds, config.seed):
        others = np.setdiff1d(np.arange(n), held)
        rest = dataset.select(others).with_changes(splits={"all": np.arange(len(others))})
        data = with_fixed_splits(rest, config)
        scored = dataset.select(held)
        assert scored.features is not None
        features = torch.from_numpy(scored.features)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            model = train(data, Path(folder), ModelConfig(), SearchConfig(), config).model
        seconds["training"] += time.process_time() - began
        began = time.process_time()
        columns = torch.tensor(model.label_space.source_index)
        targets = scored.label_matrix()[:, columns]
        given, flipped = flipped_log_probs(model.head, features, targets)
        sign = torch.where(targets, 1.0, -1.0)
        seconds["judging"] += time.process_time() - began
        inverse = columns.argsort()
        odds["path model"][held] = ((given[:, None] - flipped) * sign)[:, inverse]
        with torch.no_grad():
            _, label_scores = model.head.embed_with_label_scores(features)
        assert label_scores is not None
        odds["chain term"][held] = label_scores.double()[:, inverse]

        parts = [
            Split(part, part.label_matrix(), torch.from_numpy(part.features))
            for part in (data.split("train"), data.split("val"))
            if part.features is not None
        ]
        training = Training(parts[0], parts[1], ModelConfig(), config)
        began = time.process_time()
        network = train_independent(training, "bce").eval()
        seconds["training independent"] += time.process_time() - began
        odds["independent"][held] = network_outputs(network, features).double()

        targets = scored.label_matrix()
        chain = train_chain(training).eval()
        odds["linear chain"][held] = chain_odds(chain, features, targets)
        others_given = train_dependencies(training, "network").eval()
        with torch.no_grad():
            odds["dependency network"][held] = others_given(features, targets).double()
    keep["CPU seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    return odds


def average_precision(odds: Tensor, labels: Matrix, dropped: Matrix, added: Matrix) -> list[float]:
    """Return the AP of dropped labels among those absent, and of false ones among those there."""
    from sklearn.metrics import average_precision_score

    values = odds.numpy()
    found = []
    for errors, pairs, sign in ((dropped, ~labels, 1), (added, labels, -1)):
        some = errors.any()
        found.append(
            float(average_precision_score(errors[pairs], sign * values[pairs])) if some else np.nan
        )
    return found


def measure(
    dataset: Dataset, dropped: float, added: float, folds: int, seed: int, scores: Path | None
) -> dict[str, Any]:
    """Plant errors, cross-fit both methods and measure how well each finds the errors."""
    truth = dataset.label_matrix().numpy()
    labels, is_dropped, is_added = planted(truth, dropped, added, np.random.default_rng(seed))
    figures: dict[str, Any] = {
        "records": len(truth), "labels": truth.shape[1], "dropped": int(is_dropped.sum()),
        "absent": int((~labels).sum()), "added": int(is_added.sum()), "present": int(labels.sum()),
    }  # fmt: skip
    odds = cross_fitted(
        with_labels(dataset, labels), folds, TrainConfig(seed=seed, device="cpu"), figures
    )
    if scores is not None:
        arrays = {name.replace(" ", "_"): value.numpy() for name, value in odds.items()}
        np.savez(scores, labels=labels, dropped=is_dropped, added=is_added, **arrays)
    for name, values in odds.items():
        missing, false = average_precision(values, labels, is_dropped, is_added)
        figures[name] = {"AP of dropped": missing, "AP of added": false}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", help="as --data of cnnrnn train; feature vectors")
    parser.add_argument("--out", type=Path, required=True, help="JSON; goes on where it stopped")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--dropped", type=float, default=0.1)
    parser.add_argument("--added", type=float, default=0.05)
    parser.add_argument("--scores", type=Path, help="folder for the log-odds themselves")
    options = parser.parse_args()
    results: list[dict[str, Any]] = (
        json.loads(options.out.read_text()) if options.out.exists() else []
    )
    for source in options.sources:
        dataset = load_dataset(source)
        name = Path(source.partition(":")[2]).stem
        for seed in map(int, options.seeds.split(",")):
            case = {"source": name, "seed": seed, "folds": options.folds,
                    "dropped": options.dropped, "added": options.added}  # fmt: skip
            if any(case.items() <= result.items() for result in results):
                continue
            scores = options.scores and options.scores / f"{name}-{seed}.npz"
            figures = measure(dataset, options.dropped, options.added, options.folds, seed, scores)
            results.append(case | {"figures": figures})
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(results[-1]), flush=True)
        print(table(results, {name: name}), flush=True)


def table(results: list[dict[str, Any]], sources: dict[str, str]) -> str:
    """Lay figures out as Markdown: per cent, mean and standard error over seeds.

    `sources`: those to show, and what they are called.
    """
    measures = ("AP of dropped", "AP of added")
    header = [f"{title}: {what}" for title in sources.values() for what in ("dropped", "added")]
    lines = ["| average precision | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for method in METHODS:
        cells = []
        for source in sources:
            own = [r["figures"][method] for r in results if r["source"] == source]
            for measured in measures:
                values = [100 * figures[measured] for figures in own]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
                spread = "" if error is None else f" ± {error:.1f}"
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
