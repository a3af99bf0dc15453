"""How fast label sets become certain when a person answers questions: is this label there?

    python -m benchmarks.quality.questions --out questions.json features:corel16k.npz

Each source needs a test split. A model is trained on it by the default recipe, and each test image
is asked about one label after another, answered truly; after each answer the rest is predicted
anew, given all answers. Measured is the share of images whose set is right. The labels are those
that tell most (`cnnrnn.inspection.questions`), or another order: of an independent classifier's
doubts, by frequency, or at random. The independent classifier itself, on the same trunk, is asked
by its own doubts, with the threshold that is best for exact match on validation data; an answer
tells it nothing of other labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.comparison.baselines import Training, choose_cut, network_outputs, train_independent
from cnnrnn.data import Dataset
from cnnrnn.data.splits import with_fixed_splits
from cnnrnn.inspection.questions import Choose, ask, most_telling
from cnnrnn.training.batches import Split
from cnnrnn.training.run import train

ALONE = "independent classifier, its own doubts"
IMAGES = 2000


def answered(targets: Tensor, label: Tensor) -> Tensor:
    """Return the true answers about one label of each image: [n, L], [n, 1] to int8 [n, 1]."""
    return torch.where(targets.gather(1, label), 1, -1).to(torch.int8)


def ask_alone(scores: Tensor, targets: Tensor, threshold: float, questions: int) -> list[float]:
    """Return the share of exact sets of an independent classifier after each question.

    Args:
        scores: [n, L] probabilities.
        targets: [n, L] bool.
        threshold: a label is taken from this probability on, where it was not asked about.
        questions: how many are asked, those nearest to one half first.
    """
    evidence = torch.zeros(targets.shape, dtype=torch.int8)
    shares = []
    for _ in range(questions + 1):
        sets = ((scores >= threshold) & (evidence == 0)) | (evidence == 1)
        shares.append(float((sets == targets).all(1).double().mean()))
        label = most_telling(scores, evidence)[:, None]
        evidence.scatter_(1, label, answered(targets, label))
    return shares


def measure(dataset: Dataset, questions: int, seed: int) -> dict[str, list[float]]:
    """Train on a dataset and ask questions of its test images: by method, exact after each."""
    config = TrainConfig(seed=seed, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = train(dataset, Path(folder), ModelConfig(), SearchConfig(), config).model
    parts = []
    for part in (dataset.split(name) for name in ("train", "val", "test")):
        targets = model.label_space.from_source(part.label_matrix(), part.label_names)
        assert part.features is not None
        parts.append(Split(part, targets, torch.from_numpy(part.features)))
    network = train_independent(Training(parts[0], parts[1], ModelConfig(), config), "bce").eval()
    features, targets = parts[2].features[:IMAGES], parts[2].targets[:IMAGES]
    scores = network_outputs(network, features).sigmoid()
    on_val = network_outputs(network, parts[1].features).sigmoid()
    cut = choose_cut(on_val, parts[1].targets, metric="exact-match")
    assert cut.threshold is not None
    ranks = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed))
    orders: dict[str, Choose] = {
        "the label that tells most": most_telling,
        "the independent classifier's doubts": lambda _, known: most_telling(scores, known),
        "the most frequent label": lambda _, known: (known != 0).int().argmin(1),
        "a label at random": lambda _, known: ranks.masked_fill(known != 0, -1).argmax(1),
    }
    found = {
        f"path model, {name}": [
            row.exact for row in ask(model, features, targets, questions, choose=choose)
        ]
        for name, choose in orders.items()
    }
    return found | {ALONE: ask_alone(scores, targets, cut.threshold, questions)}


def table(results: list[dict[str, Any]], source: str, shown: tuple[int, ...]) -> str:
    """Lay one source's figures out as Markdown: exact match in per cent, mean over seeds.

    `shown`: after how many questions.
    """
    own = [r["exact"] for r in results if r["source"] == source]
    lines = [
        "| exact sets after questions | " + " | ".join(map(str, shown)) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for method in own[0]:
        cells = []
        for count in shown:
            values = [100 * exact[method][count] for exact in own]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            cells.append(
                f"{statistics.mean(values):.1f}" + ("" if error is None else f" ± {error:.1f}")
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", help="as --data of cnnrnn train; feature vectors")
    parser.add_argument("--out", type=Path, required=True, help="JSON; goes on where it stopped")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--questions", type=int, default=10)
    options = parser.parse_args()
    results: list[dict[str, Any]] = (
        json.loads(options.out.read_text()) if options.out.exists() else []
    )
    for source in options.sources:
        dataset = with_fixed_splits(load_dataset(source), TrainConfig())
        name = Path(source.partition(":")[2]).stem
        for seed in map(int, options.seeds.split(",")):
            if any(r["source"] == name and r["seed"] == seed for r in results):
                continue
            exact = measure(dataset, options.questions, seed)
            results.append({"source": name, "seed": seed, "exact": exact})
            options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results, name, (0, 1, 2, 3, 5, options.questions)), flush=True)


if __name__ == "__main__":
    main()
