"""The stages of a training: what each trains, its loss, and how its best epoch is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
from cnnrnn.training.loop import Stage, Validation
from cnnrnn.training.orders import aligned_paths, label_ease, own_steps, permute_labels

FINISH = "finish"
"""Name of the last stage."""


NLL_WEIGHT = 0.1
"""A nat of log-likelihood weighs as much as ten points of O-F1, mAP or exact match."""


@torch.no_grad()
def start_at_frequencies(classifier: nn.Linear, targets: Tensor) -> None:
    """Let a label's probability start at its share of the training images.

    From one half it would take whole epochs to fall, and its gradient would dominate.

    Args:
        classifier: one output per label, to be read through a sigmoid.
        targets: [n, L] bool of the training images.
    """
    share = (targets.sum(0) + 0.5) / (len(targets) + 1)
    classifier.bias.copy_(share.logit())


def _features(model: CNNRNN, inputs: Tensor) -> Tensor:
    """Features of a batch: the inputs themselves, or the backbone's of images."""
    return inputs if inputs.dim() == 2 else model.features(inputs).float()


def warm_stage(model: CNNRNN, val: Split, config: TrainConfig) -> Stage:
    """Return the stage that trains backbone, trunk and chain term as a classifier."""
    classifier = model.head.label_classifier
    assert classifier is not None

    def loss(batch: Batch) -> Tensor:
        scores = classifier(model.head.trunk(_features(model, batch.inputs)))
        return binary_cross_entropy(scores, batch.targets)

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
        return independent_validation(joined, val.targets[records])

    modules = [model.head.trunk, classifier]
    groups = [_group(modules, config.learning_rate)]
    if _trains_backbone(model):
        scale = config.backbone_scale if starts_trained(model.config, config) else 1.0
        groups.append(_group([model.backbone], config.learning_rate * scale))
    return Stage("warm", config.warm_epochs, model, groups, loss, validate)


def independent_validation(scores: Tensor, targets: Tensor) -> Validation:
    """Judge independent scores [n, L] in 0..1 by O-F1 at the best threshold plus mAP."""
    _, of1 = best_threshold(scores, targets)
    mean_ap = mean_average_precision(scores, targets)
    return Validation(of1 + mean_ap, {"O-F1": of1, "mAP": mean_ap})


def path_stage(
    model: CNNRNN,
    training: Split,
    val: Split,
    config: TrainConfig,
    ranks: Ranks,
    save: Callable[[Inference, Tensor, bool], None],
) -> Stage:
    """Return the stage that trains label paths and all else; `save` keeps its epochs."""
    head, order = model.head, model.search.order
    last: list[tuple[Inference, Tensor]] = []

    def loss(batch: Batch) -> Tensor:
        features = _features(model, batch.inputs)
        if config.loss == "sequence":
            paths = increasing_paths(batch.targets)
            if config.label_order == "shuffled":
                paths = shuffled_paths(paths, torch.default_generator)  # this process's own
            scores, label_scores = head(features, paths)
            losses = sequence_loss(scores, paths, order)
        else:
            scores, prefixes, label_scores = own_steps(head, features, batch.targets.sum(1))
            paths = aligned_paths(scores, prefixes, batch.targets, config.loss)
            losses = sequence_loss(scores, paths, order, prefixes)
        if label_scores is not None and config.aux_weight:
            losses = losses + config.aux_weight * binary_cross_entropy(label_scores, batch.targets)
        return losses

    def validate() -> Validation:
        features, targets = split_features(model, val, config)
        last[:] = [(infer(model.head, features, model.search), targets)]
        nll = float(model.set_nll(features, targets).mean())
        return path_validation(*last[0], nll, config)

    def relearn_order(epoch: int, optimizer: torch.optim.Optimizer) -> bool:
        if config.label_order != "easiest" or epoch > config.reorder_epochs:
            return False
        inference, targets = search_split(model, training, config)
        ease = label_ease(inference.marginals, targets)
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
        split.targets.copy_(split.targets[:, order])


def path_validation(
    inference: Inference, targets: Tensor, nll: float, config: TrainConfig
) -> Validation:
    """Judge a path model, as `best_by` says.

    Args:
        inference: of the validation images.
        targets: [n, L] bool.
        nll: mean -log P(true set) of those images.
        config: `best_by` names the merit. O-F1 and mAP are of the half-and-half mixture.
    """
    scores = inference.mixed(0.5)
    _, of1 = best_threshold(scores, targets)
    mean_ap = mean_average_precision(scores, targets)
    path = multilabel_metrics(inference.sets, targets)
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
def search_split(model: CNNRNN, split: Split, config: TrainConfig) -> tuple[Inference, Tensor]:
    """Search a split; also return the targets of the images that could be read."""
    features, targets = split_features(model, split, config)
    return infer(model.head, features, model.search), targets


@torch.no_grad()
def split_features(model: CNNRNN, split: Split, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Return what the head reads of a split [n, F], and the targets of the images read [n, L]."""
    model.eval()
    features, records = split.over_batches(
        lambda batch: _features(model, batch.inputs).float(), config, model.device
    )
    return features, split.targets[records]


def _group(modules: list[Any], learning_rate: float) -> dict[str, Any]:
    return {"params": [p for m in modules for p in m.parameters()], "lr": learning_rate}


def _trains_backbone(model: CNNRNN) -> bool:
    return model.backbone is not None and not model.config.freeze_backbone


def starts_trained(model_config: ModelConfig, config: TrainConfig) -> bool:
    """Tell whether the backbone that training starts from has been trained before."""
    pretrained = model_config.pretrained and model_config.backbone != "small"
    return pretrained or config.init_backbone is not None
