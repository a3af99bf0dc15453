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
from cnnrnn.decisions import decision_metrics, infer
from cnnrnn.features import cached_features
from cnnrnn.fit import Batch, Log, Split, Stage, Validation, resolve_device, run_stage
from cnnrnn.losses import binary_cross_entropy, softmax_cross_entropy
from cnnrnn.metrics import best_k, best_threshold, multilabel_metrics
from cnnrnn.model import Trunk
from cnnrnn.train import independent_validation, train, training_splits

Loss = Literal["bce", "softmax"]
METHODS = ("CNN-RNN", "binary cross-entropy", "softmax")


class IndependentClassifier(nn.Module):
    """A trunk with one score per label: features [B, F] to scores [B, L]."""

    def __init__(self, config: ModelConfig, num_labels: int, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk(
            feature_dim, config.trunk_dim, config.input_dropout, config.hidden_dropout
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
        own: metrics of the sets by the method's own stopping.
        at_3: metrics of the sets of at most (path) or exactly (others) three labels.
    """

    method: str
    seed: int
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
        mean_ap = multilabel_metrics(scores, val_split.targets)["mAP"]
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
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train CNN-RNN, binary cross-entropy and softmax on one set of features; measure on `test`.

    Threshold, k and mixing weight are chosen on the validation split.

    Args:
        dataset: feature vectors with `train`, `val` and `test` splits.
        out: folder for the path model's runs.
        model_config: the head; all methods share trunk and dropout.
        search_config: of the path model.
        config: the recipe; its seed is replaced by each of `seeds`.
        seeds: one run of every method each.
        say: gets one line per method and seed.

    Returns:
        A row per method and seed.
    """
    rows: list[Row] = []
    train_data, val_data = training_splits(dataset, config)
    train_split, val_split, test_split = (
        Split(data, data.label_matrix(), torch.as_tensor(data.features))
        for data in (train_data, val_data, dataset.split("test"))
    )
    assert test_split.features is not None

    def report(method: str, seed: int, own: dict[str, float], at_3: dict[str, float]) -> None:
        rows.append(Row(method, seed, own, at_3))
        say(f"seed {seed}, {method}: O-F1 {own['O-F1']:.4f}, exact match {own['exact-match']:.4f}")

    for seed in seeds:
        seeded = replace(config, seed=seed)
        model = train(dataset, out / f"seed-{seed}", model_config, search_config, seeded).model
        targets = model.label_space.from_source(test_split.targets, dataset.label_names)
        inference = infer(model.head, test_split.features.to(model.device), model.search)
        metrics = decision_metrics(inference, targets, model.calibration, k=3)
        report("CNN-RNN", seed, metrics["path"], metrics["path@3"])

        bce = train_independent(train_split, val_split, "bce", model_config, seeded)
        cut, _ = best_threshold(predicted_scores(bce, val_split, "bce"), val_split.targets)
        scores = predicted_scores(bce, test_split, "bce")
        own = multilabel_metrics(scores, test_split.targets, threshold=cut)
        report(
            "binary cross-entropy", seed, own, multilabel_metrics(scores, test_split.targets, k=3)
        )

        softmax = train_independent(train_split, val_split, "softmax", model_config, seeded)
        k, _ = best_k(predicted_scores(softmax, val_split, "softmax"), val_split.targets)
        scores = predicted_scores(softmax, test_split, "softmax")
        own = multilabel_metrics(scores, test_split.targets, k=k)
        report("softmax", seed, own, multilabel_metrics(scores, test_split.targets, k=3))
    return rows
