"""The stages of a training: what each trains, its loss, and how its best epoch is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnrnn.config import ModelConfig, TrainConfig
from cnnrnn.labels import increasing_paths, shuffled_paths
from cnnrnn.machine.distributed import Ranks
from cnnrnn.metrics import best_threshold, multilabel_metrics
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.losses import binary_cross_entropy, sequence_loss
from cnnrnn.prediction.decisions import mean_average_precision
from cnnrnn.search.inference import Inference, infer
from cnnrnn.training.batches import Batch, Split
from cnnrnn.training.completion import completed
from cnnrnn.training.loop import Stage, Validation
from cnnrnn.training.orders import aligned_paths, label_ease, own_steps, permute_labels

FINISH = "finish"
"""Name of the last stage."""


NLL_WEIGHT = 0.1
"""A nat of log-likelihood weighs as much as ten points of O-F1, mAP or exact match."""


@torch.no_grad()
def start_at_frequencies(
    classifier: nn.Linear, targets: Tensor, unknown: Tensor | None = None
) -> None:
    """Let a label's probability start at its share of the training images where it is known.

    From one half it would take whole epochs to fall, and its gradient would dominate.

    Args:
        classifier: one output per label, to be read through a sigmoid.
        targets: [n, L] bool of the training images.
        unknown: [n, L] bool, labels that are neither present nor absent.
    """
    classifier.bias.copy_(label_shares(targets, unknown).logit())


def label_shares(targets: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Return each label's share of the images where it is known, within (0, 1): [L].

    Args:
        targets: [n, L] bool.
        unknown: [n, L] bool, labels that are neither present nor absent.
    """
    if unknown is None:
        return (targets.sum(0) + 0.5) / (len(targets) + 1)
    known = (~unknown).sum(0)
    known = torch.where(known > 0, known, len(targets))  # nothing is known: as if it were absent
    return (targets.sum(0) + 0.5) / (known + 1)


class ReadSplit(NamedTuple):
    """The n images of a split that could be read.

    Attributes:
        features: [n, F] on the model's device.
        targets: [n, L] bool, columns in path order.
        unknown: [n, L] bool, labels that are neither present nor absent, or None without any.
    """

    features: Tensor
    targets: Tensor
    unknown: Tensor | None


def _features(model: CNNRNN, inputs: Tensor) -> Tensor:
    """Features of a batch: the inputs themselves, or the backbone's of images."""
    return inputs if inputs.dim() == 2 else model.features(inputs).float()


def warm_stage(model: CNNRNN, val: Split, config: TrainConfig) -> Stage:
    """Return the stage that trains backbone, trunk and chain term as a classifier."""
    classifier = model.head.label_classifier
    assert classifier is not None

    def loss(batch: Batch) -> Tensor:
        scores = classifier(model.head.trunk(_features(model, batch.inputs)))
        return binary_cross_entropy(scores, batch.targets, batch.unknown)

    @torch.no_grad()
    def validate() -> Validation:
        scores, records = val.over_batches(
            lambda batch: classifier(model.head.trunk(_features(model, batch.inputs))).float(),
            config,
            model.device,
        )
        joined = scores.sigmoid().cpu()
        if not joined.isfinite().all():
            raise ValueError(
                "the scores of the validation images are no longer finite in stage warm; "
                "lower learning_rate"
            )
        return independent_validation(joined, *val.truth(records))

    modules = [model.head.trunk, classifier]
    groups = [_group(modules, config.learning_rate)]
    if _trains_backbone(model):
        scale = config.backbone_scale if starts_trained(model.config, config) else 1.0
        groups.append(_group([model.backbone], config.learning_rate * scale))
    return Stage("warm", config.warm_epochs, model, groups, loss, validate)


def independent_validation(
    scores: Tensor, targets: Tensor, unknown: Tensor | None = None
) -> Validation:
    """Judge independent scores [n, L] in 0..1 by O-F1 at the best threshold plus mAP."""
    _, of1 = best_threshold(scores, targets, unknown=unknown)
    mean_ap = mean_average_precision(scores, targets, unknown)
    return Validation(of1 + mean_ap, {"O-F1": of1, "mAP": mean_ap})


def path_stage(
    model: CNNRNN,
    training: Split,
    val: Split,
    config: TrainConfig,
    ranks: Ranks,
    save: Callable[[Inference, ReadSplit, bool], None],
) -> Stage:
    """Return the stage that trains label paths and all else; `save` keeps its epochs."""
    head, order = model.head, model.search.order
    last: list[tuple[Inference, ReadSplit]] = []

    def loss(batch: Batch) -> Tensor:
        features = _features(model, batch.inputs)
        targets = batch.targets
        if batch.unknown is not None:
            targets = completed(head, features, targets, batch.unknown, order)
        if config.loss == "sequence":
            paths = increasing_paths(targets)
            if config.label_order == "shuffled":
                paths = shuffled_paths(paths, torch.default_generator)  # this process's own
            scores, label_scores = head(features, paths)
            losses = sequence_loss(scores, paths, order)
        else:
            scores, prefixes, label_scores = own_steps(head, features, targets.sum(1))
            paths = aligned_paths(scores, prefixes, targets, config.loss)
            losses = sequence_loss(scores, paths, order, prefixes)
        if label_scores is not None and config.aux_weight:
            independent = binary_cross_entropy(label_scores, batch.targets, batch.unknown)
            losses = losses + config.aux_weight * independent
        return losses

    def validate() -> Validation:
        read = read_split(model, val, config)
        inference = infer(model.head, read.features, model.search)
        last[:] = [(inference, read)]
        nll = float(model.set_nll(*read).mean())
        return path_validation(inference, read.targets, nll, config, read.unknown)

    def relearn_order(epoch: int, optimizer: torch.optim.Optimizer) -> bool:
        if config.label_order != "easiest" or epoch > config.reorder_epochs:
            return False
        inference, read = search_split(model, training, config)
        ease = label_ease(inference.marginals, read.targets)
        order = ranks.from_first(ease.argsort(descending=True, stable=True))
        return _reorder(model, order, optimizer, training, val)

    warm = bool(config.warm_epochs) and head.label_classifier is not None
    shared = [module for module in (head.trunk, head.label_classifier) if module is not None]
    recurrent = head.recurrence.weight_hh
    apart = {id(recurrent), *(id(p) for module in shared for p in module.parameters())}
    rest = [p for p in head.parameters() if id(p) not in apart]
    rate = config.learning_rate
    groups = [
        {"params": rest, "lr": rate},
        {"params": [recurrent], "lr": rate * config.recurrent_scale},
        _group(shared, rate * (config.warm_scale if warm else 1.0)),
    ]
    if _trains_backbone(model):
        trained = warm or starts_trained(model.config, config)
        groups.append(_group([model.backbone], rate * (config.backbone_scale if trained else 1.0)))
    return Stage(
        "path", config.epochs, model, groups, loss, validate,
        lambda validation, best: save(*last[0], best), relearn_order,
    )  # fmt: skip


def finishing_stage(path: Stage, config: TrainConfig) -> Stage:
    """Return the stage that continues from the path stage's best epoch at lower learning rates."""
    groups = [{**group, "lr": group["lr"] * config.finish_scale} for group in path.groups]
    return Stage(
        FINISH, config.finish_epochs, path.module, groups, path.loss, path.validate, path.on_epoch
    )


def _reorder(
    model: CNNRNN, order: Tensor, optimizer: torch.optim.Optimizer, *splits: Split
) -> bool:
    """Bring a model and its splits' targets into label order [L]; False if they are in it."""
    if torch.equal(order, torch.arange(len(order))):
        return False
    permute_labels(model.head, order, optimizer)
    reorder_labels(model, order, *splits)
    return True


def reorder_labels(model: CNNRNN, order: Tensor, *splits: Split) -> None:
    """Bring a model's label names and its splits' targets into another label order [L]."""
    model.label_space = model.label_space.permuted(order.tolist())
    for split in splits:
        for matrix in (split.targets, split.unknown):
            if matrix is not None:
                matrix.copy_(matrix[:, order])


def path_validation(
    inference: Inference,
    targets: Tensor,
    nll: float,
    config: TrainConfig,
    unknown: Tensor | None = None,
) -> Validation:
    """Judge a path model, as `best_by` says.

    Args:
        inference: of the validation images.
        targets: [n, L] bool.
        nll: mean -log P(true set) of those images.
        config: `best_by` names the merit. O-F1 and mAP are of the half-and-half mixture.
        unknown: [n, L] bool, labels that are neither present nor absent; `nll` is then of what is
            known.
    """
    scores = inference.mixed(0.5)
    _, of1 = best_threshold(scores, targets, unknown=unknown)
    mean_ap = mean_average_precision(scores, targets, unknown)
    path = multilabel_metrics(inference.sets, targets, unknown=unknown)
    figures = {
        "NLL": nll,
        "O-F1": of1,
        "mAP": mean_ap,
        "path O-F1": path["O-F1"],
        "path exact": path["exact-match"],
    }
    merit = of1 + mean_ap + path["exact-match"]
    if config.loss == "sequence" and config.best_by != "decisions":
        likelihood = -nll if math.isfinite(nll) else -math.inf
        merit = likelihood if config.best_by == "nll" else merit + NLL_WEIGHT * likelihood
    return Validation(merit, figures)


@torch.no_grad()
def search_split(model: CNNRNN, split: Split, config: TrainConfig) -> tuple[Inference, ReadSplit]:
    """Search a split; also return what was read of it."""
    read = read_split(model, split, config)
    return infer(model.head, read.features, model.search), read


@torch.no_grad()
def read_split(model: CNNRNN, split: Split, config: TrainConfig) -> ReadSplit:
    """Return what the head reads of a split, and the labels of the images that could be read."""
    model.eval()
    features, records = split.over_batches(
        lambda batch: _features(model, batch.inputs).float(), config, model.device
    )
    return ReadSplit(features, *split.truth(records))


def _group(modules: list[Any], learning_rate: float) -> dict[str, Any]:
    return {"params": [p for m in modules for p in m.parameters()], "lr": learning_rate}


def _trains_backbone(model: CNNRNN) -> bool:
    return model.backbone is not None and not model.config.freeze_backbone


def starts_trained(model_config: ModelConfig, config: TrainConfig) -> bool:
    """Tell whether the backbone that training starts from has been trained before."""
    pretrained = model_config.pretrained and model_config.backbone != "small"
    return pretrained or model_config.weights is not None or config.init_backbone is not None
