"""What each part of the training recipe contributes: the recipe, and variants with one change.
The same for the order of labels, losses without one, and the paper's preset.

    python -m benchmarks.quality.recipe --out recipe.json features:scene.npz features:corel5k.npz

Each source needs a test split. Mixing weight, thresholds and epochs are chosen on validation data,
as always. docs/training.md and docs/orders.md have the tables of what was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.comparison.baselines import remove_recurrence
from cnnrnn.config import DECISIONS
from cnnrnn.data import Dataset
from cnnrnn.data.splits import with_fixed_splits
from cnnrnn.metrics import best_threshold, multilabel_metrics
from cnnrnn.network.head import Head
from cnnrnn.prediction.decisions import decision_metrics
from cnnrnn.training.run import train

MEASURES = ("NLL", "path O-F1", "path exact", "O-F1", "C-F1", "mAP")
IN_NATS = ("NLL",)
OF_DECISION = ("O-F1", "C-F1", "exact-match", "example-F1")


@dataclass(frozen=True)
class Variant:
    """A change of the recipe.

    Attributes:
        name: row of the table.
        train: options of `TrainConfig` that differ.
        model: the same of `ModelConfig`.
        search: the same of `SearchConfig`.
        mix_weight: of the chain term's own scores, in place of the one chosen.
        from_zero: the chain term starts at probabilities of one half.
        no_recurrence: the state after a label depends on that label alone.
        paper: a change of the paper's preset, not of the recipe.
    """

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    mix_weight: float | None = None
    from_zero: bool = False
    no_recurrence: bool = False
    paper: bool = False


VARIANTS = (
    Variant("the recipe"),
    Variant("marginals alone, nothing mixed in", mix_weight=0.0),
    Variant("chain term alone, no paths", mix_weight=1.0),
    Variant(
        "the embedding that scores labels read by the recurrence too",
        model={"tied_embedding": True},
    ),
    Variant("the recurrence sees the last label alone", no_recurrence=True),
    Variant("features as they are", train={"feature_rms": 0.0}),
    Variant("features of size 1", train={"feature_rms": 1.0}),
    Variant("the best epoch by NLL alone", train={"best_by": "nll"}),
    Variant("the best epoch by decisions alone", train={"best_by": "decisions"}),
    Variant("less dropout in the joint space", model={"joint_dropout": 0.1}),
    Variant("binary cross-entropy alone first, in a stage of its own", train={"warm_epochs": 40}),
    Variant("not finished at a lower rate", train={"finish_epochs": 0}),
    Variant("weights not averaged", train={"ema_decay": 0.0}),
    Variant("chain term from one half", from_zero=True),
    Variant("no skip past the hidden layer", model={"trunk_skip": False}),
    Variant("no auxiliary loss", train={"aux_weight": 0.0}),
    Variant("no chain term", model={"chain_term": False}),
    Variant("paths in any order of labels: unique", search={"order": "unique"}),
    Variant("rarest label first", train={"label_order": "rare"}),
    Variant("predicted label alignment", train={"loss": "pla"}, search={"order": "unique"}),
    Variant("minimal loss alignment", train={"loss": "mla"}, search={"order": "unique"}),
)
ORDERS = (
    Variant("in the source's order", train={"label_order": "given"}),
    Variant("in a random order", train={"label_order": "random"}),
    Variant("easiest label first", train={"label_order": "easiest"}),
    Variant("shuffled", train={"label_order": "shuffled"}, search={"order": "unique"}),
    *(
        Variant(
            f"no chain term, {name}", train={"label_order": order}, model={"chain_term": False},
            search={"order": "unique" if order == "shuffled" else "increasing"},
        )
        for name, order in (
            ("rarest label first", "rare"), ("in the source's order", "given"),
            ("in a random order", "random"), ("easiest label first", "easiest"),
            ("shuffled", "shuffled"),
        )
    ),
)  # fmt: skip
PRESETS = (
    Variant("the paper's preset", paper=True),
    Variant("the paper's preset, an LSTM for its cell", paper=True, model={"cell": "lstm"},
            train={"recurrent_scale": 1.0}),
)  # fmt: skip
# The rows of docs/orders.md, and what they are there.
OF_ORDERS = {
    "the recipe": "most frequent label first (the default)",
    **{name: name for name in (
        "rarest label first", "in the source's order", "in a random order", "easiest label first",
        "shuffled", "predicted label alignment", "minimal loss alignment",
    )},
    "no chain term": "no chain term, most frequent label first",
    **{v.name: v.name for v in ORDERS if v.name.startswith("no chain term")},
}  # fmt: skip


def _prepared(head: Head, variant: Variant) -> None:
    """Make a new head the variant's."""
    if variant.no_recurrence:
        remove_recurrence(head)
    if variant.from_zero and head.label_classifier is not None:
        torch.nn.init.zeros_(head.label_classifier.bias)


def measure(dataset: Dataset, variant: Variant, seed: int, device: str) -> dict[str, float]:
    """Train one variant and measure it on the test split."""
    kinds = (TrainConfig, ModelConfig, SearchConfig)
    train_base, model_base, search_base = (k.paper() if variant.paper else k() for k in kinds)
    config = replace(train_base, seed=seed, device=device, **variant.train)
    model_config = replace(model_base, **variant.model)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        search = replace(search_base, **variant.search)
        model = train(
            dataset,
            Path(folder),
            model_config,
            search,
            config,
            prepare_head=partial(_prepared, variant=variant),
        ).model
    seconds = time.perf_counter() - began
    found = {}
    for name in ("val", "test"):
        part = dataset.split(name)
        targets = model.label_space.from_source(part.label_matrix(), part.label_names)
        assert part.features is not None
        found[name] = (model.infer(torch.from_numpy(part.features).to(model.device)), targets)
    inference, targets = found["test"]
    calibration = model.calibration
    if variant.mix_weight is not None and inference.label_scores is not None:
        on_val, val_targets = found["val"]
        threshold, _ = best_threshold(
            on_val.mixed(variant.mix_weight), val_targets, min_labels=calibration.min_labels
        )
        calibration = replace(calibration, mix_weight=variant.mix_weight, threshold=threshold)
    metrics = decision_metrics(inference, targets, calibration)
    on_val, val_targets = found["val"]
    for_c_f1, _ = best_threshold(on_val.mixed(calibration.mix_weight), val_targets, "C-F1")
    scores = inference.mixed(calibration.mix_weight)
    by_c_f1 = multilabel_metrics(scores, targets, threshold=for_c_f1)
    test = dataset.split("test")
    assert test.features is not None
    return {
        "NLL": float(model.set_nll(torch.from_numpy(test.features), targets).mean()),
        "path O-F1": metrics["path"]["O-F1"],
        "path exact": metrics["path"]["exact-match"],
        "O-F1": metrics["threshold"]["O-F1"],
        "C-F1": by_c_f1["C-F1"],
        "mAP": metrics["threshold"]["mAP"],
        "path not empty": float(inference.sets.any(1).float().mean()),
        "mass": float(torch.cat([r.log_probs for r in inference.search]).exp().sum(1).mean()),
        **{
            f"{decide} {name}": metrics[decide][name]
            for decide in DECISIONS
            for name in OF_DECISION
        },
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]], source: str, rows: Mapping[str, str] | None = None) -> str:
    """Lay one source's figures out as Markdown: mean and standard error over seeds, per cent, and
    nats for the NLL.

    `rows`: names of variants, and what they are called; by default the recipe's.
    """
    of_source = [r["figures"] for r in results if r["source"] == source]
    measured = [name for name in MEASURES if all(name in figures for figures in of_source)]
    lines = [f"| {source} | " + " | ".join(measured) + " |", "|---" * (len(measured) + 1) + "|"]
    for variant, shown in (rows or {v.name: v.name for v in VARIANTS}).items():
        own = [r for r in results if r["source"] == source and r["variant"] == variant]
        if not own:
            continue
        cells = []
        for name in measured:
            unit, digits = (1, 2) if name in IN_NATS else (100, 1)
            values = [unit * r["figures"][name] for r in own]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", help="as --data of cnnrnn train; feature vectors")
    parser.add_argument("--out", type=Path, required=True, help="JSON; resumes where it stopped")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", help="comma-separated parts of names; default: all")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results: list[dict[str, Any]] = (
        json.loads(options.out.read_text()) if options.out.exists() else []
    )
    done = {(r["source"], r["variant"], r["seed"]) for r in results}
    wanted = [
        v for v in (*VARIANTS, *ORDERS, *PRESETS)
        if options.variants is None or any(w in v.name for w in options.variants.split(","))
    ]  # fmt: skip
    for source in options.sources:
        dataset = with_fixed_splits(load_dataset(source), TrainConfig())
        name = Path(source.partition(":")[2]).stem
        for variant in wanted:
            for seed in map(int, options.seeds.split(",")):
                if (name, variant.name, seed) in done:
                    continue
                figures = measure(dataset, variant, seed, options.device)
                results.append(
                    {"source": name, "variant": variant.name, "seed": seed, "figures": figures,
                     "changes": {k: v for k, v in asdict(variant).items() if k != "name"}}
                )  # fmt: skip
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                shown = "  ".join(
                    f"{k} {figures[k] * (1 if k in IN_NATS else 100):.2f}" for k in MEASURES
                )
                print(f"{name}, {variant.name}, seed {seed}: {shown}", flush=True)
        print(table(results, name), table(results, name, OF_ORDERS), sep="\n\n", flush=True)


if __name__ == "__main__":
    main()
