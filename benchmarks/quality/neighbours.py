"""What is near in the joint space: labels that occur together, and the labels of an image?

    python -m benchmarks.quality.neighbours --out neighbours.json features:coco.npz

Each source needs a test split. A model is trained on it by each recipe. Of labels: the share of
each label's three nearest among the ten, and the three, that occur with it most strongly in the
training split, by the correlation of the two labels over images and by lift, P(both) / P(one)
P(other); and among those that occur in like company, whose correlations with all other labels are
most alike. Of test images: how often the nearest label is one of the image's, beside the most
frequent label and the model's best score. docs/labels.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn import CNNRNN, Dataset, ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.data.splits import with_fixed_splits
from cnnrnn.inspection.neighbours import nearest_labels
from cnnrnn.network.joint_space import image_vectors, label_vectors, nearest
from cnnrnn.training.run import train

RECIPES = {
    "the default recipe": (ModelConfig(), SearchConfig(), TrainConfig),
    "the paper's preset": (ModelConfig.paper(), SearchConfig.paper(), TrainConfig.paper),
}
NEAREST = 3
STRONGEST = (10, 3)
FEW = 5  # labels of fewer training images are left out
SHOWN = 12
SHOWN_NEAREST = 5


def correlation(targets: Tensor) -> Tensor:
    """Return the correlation of two labels over images: [n, L] bool to [L, L]."""
    centred = targets.double() - targets.double().mean(0)
    covariance = centred.T @ centred
    scale = covariance.diagonal().clamp(min=1e-12).sqrt()
    return covariance / (scale[:, None] * scale)


def lift(targets: Tensor) -> Tensor:
    """Return P(both) / P(one) P(other), with half an image more for both: [n, L] to [L, L]."""
    both = targets.double().T @ targets.double()
    counts = both.diagonal()
    return (both + 0.5) / (counts[:, None] * counts / len(targets) + 0.5)


def company(correlations: Tensor) -> Tensor:
    """Return how alike two labels' correlations with all others are: [L, L] to their cosines.

    A label's correlations with itself and with the other of the two are left out.
    """
    own = torch.eye(len(correlations), dtype=torch.bool)
    others = correlations.masked_fill(own, 0)
    squares = (others.square().sum(1) - others.square()).clamp(min=1e-12)  # without the other one
    return others @ others.T / (squares * squares.T).sqrt()


def share(cosines: Tensor, strength: Tensor, strongest: int) -> float:
    """Return how many of each label's nearest are among the strongest: [K, K] both."""
    own = torch.eye(len(cosines), dtype=torch.bool)
    near = cosines.masked_fill(own, -torch.inf).topk(NEAREST, 1).indices
    strong = strength.masked_fill(own, -torch.inf).topk(strongest, 1).indices
    return float((near[:, :, None] == strong[:, None]).any(2).double().mean())


def of_labels(model: CNNRNN, targets: Tensor) -> dict[str, Any]:
    """Compare nearness of labels with how they occur together.

    Args:
        model: in eval mode.
        targets: [n, L] bool of the training split, columns in path order.
    """
    often = (targets.sum(0) >= FEW).nonzero()[:, 0]
    correlations = correlation(targets)[often][:, often]
    strengths = {
        "correlation": correlations,
        "lift": lift(targets)[often][:, often],
        "company": company(correlations),
    }
    embeddings = {"scores": label_vectors(model.head)}
    if model.head.input_embedding is not None:
        embeddings["input"] = model.head.input_embedding.detach()
    shares = {}
    for name, rows in embeddings.items():
        unit = functional.normalize(rows[often].double(), dim=1)
        shares[name] = {
            by: {str(k): share(unit @ unit.T, strength, k) for k in STRONGEST}
            for by, strength in strengths.items()
        }
    chance = {str(k): k / (len(often) - 1) for k in STRONGEST}
    return {"labels": len(often), "chance": chance, "shares": shares}


def of_images(model: CNNRNN, features: Tensor, targets: Tensor, train: Tensor) -> dict[str, float]:
    """Return how often the first label by each rule is one of the image's.

    Args:
        model: in eval mode.
        features: [n, F] of test images.
        targets: [n, L] bool, theirs.
        train: [m, L] bool of the training split.
    """
    labelled = targets.any(1)
    features, targets = features[labelled], targets[labelled]
    with torch.no_grad():
        joint = model.head.embed(features).joint
    rows = label_vectors(model.head)
    firsts = {
        "h(U_I I)": nearest(image_vectors(model.head, joint), rows, 1)[1],
        "U_I I": nearest(joint, rows, 1)[1],
        "the most frequent label": train.sum(0).argmax().expand(len(targets), 1),
        "the best score": model.infer(features).mixed(model.calibration).argmax(1)[:, None],
    }
    return {name: float(targets.gather(1, i).double().mean()) for name, i in firsts.items()}


def tables_of(model: CNNRNN, targets: Tensor) -> list[dict[str, Any]]:
    """Return a dozen labels from frequent to rare, with what is near and what occurs with them."""
    often = (targets.sum(0) >= FEW).nonzero()[:, 0].tolist()
    strength = correlation(targets)
    near = nearest_labels(model, len(model.labels))
    known = {model.labels[i] for i in often}
    found = []
    for place in torch.linspace(0, len(often) - 1, SHOWN).round().int().tolist():
        i = often[place]
        others = [j for j in often if j != i]
        strong = sorted(others, key=lambda j, i=i: -float(strength[i, j]))[:SHOWN_NEAREST]
        name = model.labels[i]
        found.append(
            {
                "label": name,
                "nearest": [
                    [other, round(cosine, 2)] for other, cosine in near[name] if other in known
                ][:SHOWN_NEAREST],
                "strongest": [model.labels[j] for j in strong],
            }
        )
    return found


def measure(dataset: Dataset, recipe: str, seed: int) -> dict[str, Any]:
    """Train on a dataset and measure what is near."""
    config, search, make = RECIPES[recipe]
    options = replace(make(), seed=seed, device="cpu")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = train(dataset, Path(folder), config, search, options).model.eval()
    seconds = round(time.perf_counter() - began)
    parts = [dataset.split(name) for name in ("train", "test")]
    own, other = (
        model.label_space.from_source(part.label_matrix(), part.label_names) for part in parts
    )
    assert parts[1].features is not None
    return {
        "images": [len(part) for part in parts],
        **of_labels(model, own),
        "first label": of_images(model, torch.from_numpy(parts[1].features), other, own),
        "nearest": tables_of(model, own),
        "training seconds": seconds,
    }


def _mean(values: Iterable[float]) -> str:
    numbers = list(values)
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None
    return f"{statistics.mean(numbers):.2f}" + ("" if error is None else f" ± {error:.2f}")


def table(results: list[dict[str, Any]], sources: dict[str, str]) -> str:
    """Lay the shares out as Markdown: a row per source and recipe, mean over seeds."""

    def cell(rows: list[dict[str, Any]], embedding: str, by: str, strongest: int) -> str:
        if any(embedding not in row["shares"] for row in rows):
            return "–"
        return _mean(row["shares"][embedding][by][str(strongest)] for row in rows)

    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "seeds": lambda rows: str(len(rows)),
        "ten strongest": lambda rows: cell(rows, "scores", "correlation", 10),
        "by lift": lambda rows: cell(rows, "scores", "lift", 10),
        "ten in like company": lambda rows: cell(rows, "scores", "company", 10),
        "the same, input embedding": lambda rows: cell(rows, "input", "company", 10),
        "chance": lambda rows: _mean([rows[0]["chance"]["10"]]),
        "three in like company": lambda rows: cell(rows, "scores", "company", 3),
        "chance, three": lambda rows: _mean([rows[0]["chance"]["3"]]),
    }
    return _rows(results, sources, columns)


def image_table(results: list[dict[str, Any]], sources: dict[str, str]) -> str:
    """Lay out how often the first label is one of the image's: a row per source and recipe."""
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        name: lambda rows, name=name: _mean(row["first label"][name] for row in rows)
        for name in results[0]["first label"]
    }
    return _rows(results, sources, columns)


def _rows(
    results: list[dict[str, Any]],
    sources: dict[str, str],
    columns: dict[str, Callable[[list[dict[str, Any]]], str]],
) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for source, title in sources.items():
        for recipe in RECIPES:
            own = [r for r in results if (r["source"], r["recipe"]) == (source, recipe)]
            if own:
                cells = " | ".join(column(own) for column in columns.values())
                lines.append(f"| {title}, {recipe} | {cells} |")
    return "\n".join(lines)


def names_table(results: list[dict[str, Any]], source: str, recipe: str) -> str:
    """Lay out a dozen labels of the first seed, with their nearest and their strongest."""
    own = next(r for r in results if (r["source"], r["recipe"]) == (source, recipe))
    lines = ["| label | nearest, with cosine | strongest correlation |", "|---|---|---|"]
    for row in own["nearest"]:
        strong = row["strongest"]
        near = ", ".join(
            f"{f'**{name}**' if name in strong else name} {cosine:.2f}"
            for name, cosine in row["nearest"]
        )
        lines.append(f"| {row['label']} | {near} | {', '.join(strong)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", help="as --data of cnnrnn train; feature vectors")
    parser.add_argument("--out", type=Path, required=True, help="JSON; goes on where it stopped")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    options = parser.parse_args()
    results: list[dict[str, Any]] = (
        json.loads(options.out.read_text()) if options.out.exists() else []
    )
    for source in options.sources:
        dataset = with_fixed_splits(load_dataset(source), TrainConfig())
        name = Path(source.partition(":")[2]).stem
        for recipe in options.recipes.split(","):
            for seed in map(int, options.seeds.split(",")):
                key = {"source": name, "recipe": recipe, "seed": seed}
                if any(key.items() <= r.items() for r in results):
                    continue
                results.append(key | measure(dataset, recipe, seed))
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[-1]["shares"], results[-1]["first label"], flush=True)


if __name__ == "__main__":
    main()
