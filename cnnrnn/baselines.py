"""The paper's comparison methods on the same features, tuned the same way as the path model.

A baseline is the same trunk with one score per label. It gets both stages that the path model
gets: the second restarts at the lower learning rate of the path model's trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cnnrnn.backbones import Backbone
from cnnrnn.config import ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import Dataset
from cnnrnn.decisions import decision_metrics, infer, mean_average_precision
from cnnrnn.features import cached_features
from cnnrnn.fit import Batch, Log, Split, Stage, Validation, resolve_device, run_stage
from cnnrnn.losses import binary_cross_entropy, softmax_cross_entropy
from cnnrnn.metrics import best_k, best_threshold, multilabel_metrics
from cnnrnn.model import Trunk
from cnnrnn.train import TrainResult, independent_validation, train, training_splits

Loss = Literal["bce", "softmax"]
METHODS = ("CNN-RNN", "binary cross-entropy", "softmax")


class IndependentClassifier(nn.Module):
    """A trunk with one score per label: features [B, F] to scores [B, L]."""

    def __init__(self, config: ModelConfig, num_labels: int, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk(
            feature_dim,
            config.trunk_dim,
            config.input_dropout,
            config.hidden_dropout,
            config.trunk_skip,
        )
        self.classifier = nn.Linear(self.trunk.output_dim, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """Return one score per label, before sigmoid or softmax."""
        scores: Tensor = self.classifier(self.trunk(features))
        return scores


@dataclass(frozen=True)
class Row:
    """One method's figures on the test split, for one seed.

    Attributes:
        method: one of `METHODS`.
        seed: of initial weights, order and dropout.
        learning_rate: the one chosen on validation data.
        own: metrics of the sets by the method's own stopping.
        at_3: metrics of the sets of at most (path) or exactly (others) three labels.
    """

    method: str
    seed: int
    learning_rate: float
    own: dict[str, float]
    at_3: dict[str, float]


def train_independent(
    train_split: Split,
    val_split: Split,
    loss: Loss,
    model_config: ModelConfig,
    config: TrainConfig,
    *,
    log: Log | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> IndependentClassifier:
    """Train a baseline in two stages, each with early stopping on O-F1 plus mAP.

    Args:
        train_split: training features.
        val_split: validation features.
        loss: `bce`, binary cross-entropy per label, or `softmax` over all labels.
        model_config: trunk and dropout.
        config: the recipe; epochs of the second stage are those of the path model's.
        log: gets one record per epoch.
        say: gets one line per epoch.
    """
    assert train_split.features is not None and val_split.features is not None
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    model = IndependentClassifier(
        model_config, train_split.targets.shape[1], train_split.features.shape[1]
    ).to(device)
    per_image = binary_cross_entropy if loss == "bce" else softmax_cross_entropy

    @torch.no_grad()
    def validate() -> Validation:
        scores = predicted_scores(model, val_split, loss)
        if loss == "bce":
            return independent_validation(scores, val_split.targets)
        # Softmax decides by k: judge it by what it will be used for.
        _, of1 = best_k(scores, val_split.targets)
        mean_ap = mean_average_precision(scores, val_split.targets)
        return Validation(of1 + mean_ap, {"O-F1": of1, "mAP": mean_ap})

    def batch_loss(batch: Batch) -> Tensor:
        return per_image(model(batch.inputs), batch.targets)

    generator = torch.Generator().manual_seed(config.seed)
    stages = (
        ("first", config.warm_epochs or config.epochs, 1.0),
        ("second", config.epochs if config.warm_epochs else 0, config.warm_scale),
    )
    for name, epochs, scale in stages:
        if epochs:
            group = {"params": list(model.parameters()), "lr": config.learning_rate * scale}
            stage = Stage(f"{loss} {name}", epochs, model, [group], batch_loss, validate)
            run_stage(
                stage, train_split, config,
                device=device, generator=generator, log=log or Log(None), say=say,
            )  # fmt: skip
    return model


@torch.no_grad()
def predicted_scores(model: IndependentClassifier, split: Split, loss: Loss) -> Tensor:
    """Return probabilities [n, L] on the CPU: per label, or over all labels."""
    assert split.features is not None
    device = next(model.parameters()).device
    scores = torch.cat(
        [model(part.to(device)).float().cpu() for part in split.features.split(4096)]
    )
    return scores.sigmoid() if loss == "bce" else scores.softmax(1)


def frozen_features(dataset: Dataset, backbone: Backbone, folder: Path) -> Dataset:
    """Return a dataset of pictures as one of feature vectors, computed once and kept in `folder`.

    Args:
        dataset: pictures, all readable.
        backbone: where its weights are decides the device.
        folder: holds the feature cache.
    """
    device = next(backbone.parameters()).device
    features = cached_features(backbone, dataset, folder, device=device).values.numpy()
    return replace(dataset, features=features, image_paths=None, boxes=None)


def compare(
    dataset: Dataset,
    out: Path,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (1e-3, 3e-3),
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train CNN-RNN, binary cross-entropy and softmax on one set of features; measure on `test`.

    Each method gets the same grid of learning rates and keeps the one whose own decision has the
    best O-F1 on the validation split; threshold and k are chosen there too.

    Args:
        dataset: feature vectors with `train`, `val` and `test` splits.
        out: folder for the path model's runs.
        model_config: the head; all methods share trunk and dropout.
        search_config: of the path model.
        config: the recipe; its seed and learning rate are replaced.
        seeds: one row of every method each.
        learning_rates: the grid that every method searches.
        say: gets one line per method and seed.

    Returns:
        A row per method and seed.
    """
    train_data, val_data = training_splits(dataset, config)
    splits = tuple(
        Split(data, data.label_matrix(), torch.as_tensor(data.features))
        for data in (train_data, val_data, dataset.split("test"))
    )
    rows = []
    for seed in seeds:
        for method in METHODS:
            tried: list[tuple[float, Row]] = []
            for rate in learning_rates:
                tuned = replace(config, seed=seed, learning_rate=rate)
                if method == "CNN-RNN":
                    run = out / f"seed-{seed}-rate-{rate:g}"
                    model = train(dataset, run, model_config, search_config, tuned)
                    tried.append(_measure_path_model(model, splits[2], seed, rate))
                else:
                    tried.append(_measure_independent(method, splits, model_config, tuned))
            row = max(tried, key=lambda pair: pair[0])[1]
            rows.append(row)
            say(
                f"seed {seed}, {method} (learning rate {row.learning_rate:g}): "
                f"O-F1 {row.own['O-F1']:.4f}, exact match {row.own['exact-match']:.4f}"
            )
    return rows


def _measure_path_model(
    trained: TrainResult, test: Split, seed: int, rate: float
) -> tuple[float, Row]:
    """Return the O-F1 of the best path on validation data, and the figures on test data."""
    assert test.features is not None
    model = trained.model
    targets = model.label_space.from_source(test.targets, test.dataset.label_names)
    inference = infer(model.head, test.features.to(model.device), model.search)
    metrics = decision_metrics(inference, targets, model.calibration, k=3)
    row = Row("CNN-RNN", seed, rate, metrics["path"], metrics["path@3"])
    return trained.metrics["path"]["O-F1"], row


def _measure_independent(
    method: str, splits: tuple[Split, ...], model_config: ModelConfig, config: TrainConfig
) -> tuple[float, Row]:
    """Train a baseline; its threshold or k is chosen on validation data. Returns as above."""
    train_split, val_split, test_split = splits
    loss: Loss = "softmax" if method == "softmax" else "bce"
    model = train_independent(train_split, val_split, loss, model_config, config)
    val_scores = predicted_scores(model, val_split, loss)
    scores = predicted_scores(model, test_split, loss)
    if loss == "softmax":
        k, val_of1 = best_k(val_scores, val_split.targets)
        own = multilabel_metrics(scores, test_split.targets, k=k)
    else:
        threshold, val_of1 = best_threshold(val_scores, val_split.targets)
        own = multilabel_metrics(scores, test_split.targets, threshold=threshold)
    at_3 = multilabel_metrics(scores, test_split.targets, k=3)
    return val_of1, Row(method, config.seed, config.learning_rate, own, at_3)
