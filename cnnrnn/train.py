"""Training: the sequence loss over label paths, beside the chain term's binary cross-entropy.

Stage `path` trains everything at once, stage `finish` goes on from its best epoch at a lower
learning rate. With `warm_epochs` a stage `warm` comes first and trains backbone (unless frozen),
trunk and chain term with binary cross-entropy alone.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnnrnn.backbones import Backbone, make_backbone
from cnnrnn.classifier import (
    CNNRNN,
    FEATURES_ONLY,
    CheckpointError,
    load_checkpoint,
    read_options,
    weights_digest,
)
from cnnrnn.config import Calibration, ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.splits import stratified_split
from cnnrnn.decisions import (
    USUAL_SHRINKAGE,
    Inference,
    calibrate,
    decision_metrics,
    infer,
    mean_average_precision,
)
from cnnrnn.distributed import ALONE, Ranks
from cnnrnn.features import cached_features
from cnnrnn.fit import (
    Batch,
    Log,
    Split,
    Stage,
    Validation,
    require_tensorboard,
    resolve_device,
    run_stage,
)
from cnnrnn.labels import increasing_paths, shuffled_paths
from cnnrnn.losses import binary_cross_entropy, sequence_loss
from cnnrnn.metrics import best_threshold, multilabel_metrics
from cnnrnn.model import Head
from cnnrnn.orders import (
    aligned_paths,
    first_label_space,
    label_ease,
    own_steps,
    permute_labels,
    require_search_order,
)
from cnnrnn.progress import Progress, no_progress
from cnnrnn.search.engine import resolve_max_labels
from cnnrnn.state import (
    STATE_FILE,
    ResumeError,
    State,
    read_state,
    remove_partial_files,
    require_same_run,
    run_identity,
    save_state,
)

FINISH = "finish"
"""Name of the last stage."""

NLL_WEIGHT = 0.1
"""A nat of log-likelihood weighs as much as ten points of O-F1, mAP or exact match."""
VANISHED = 1e-6
"""Recurrent weights that are all smaller say nothing of a path."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        model: the best epoch's model, in eval mode, calibrated on the validation split.
        metrics: of every decision on the validation split.
    """

    model: CNNRNN
    metrics: dict[str, dict[str, float]]


def train(
    dataset: Dataset,
    out: Path,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
    *,
    prepare_head: Callable[[Head], None] = lambda head: None,
    resume: bool = False,
    on_start: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train a model on the splits of a dataset that the config names.

    Writes `best/` and `last/` checkpoints, `log.jsonl` and, after each epoch, the training state
    to `out`.

    Args:
        dataset: pictures or feature vectors with label sets. Without a split to validate on a
            share of the training images is held out.
        out: folder for the run; made when missing.
        model_config: the architecture; backbone options do not matter for feature vectors.
        search_config: the search, whose order is also the order of training paths.
        config: the recipe.
        prepare_head: called with the new head, whose weights it may set and freeze; a resumed run
            must be given the same.
        resume: go on after the last epoch that the run in `out` finished; start where there is
            none. The result is that of a run that was never stopped.
        on_start: called once data and options have proved to fit, before anything is written.
        say: gets a line per epoch and per notable fact.
        progress: shows progress within an epoch.
        ranks: the processes that train together, each of which calls this; the first alone writes,
            and calls `on_start`, `say` and `progress`.

    Raises:
        DataError: the data lacks a usable training split.
        ValueError: the options leave nothing to train, or do not fit the data.
        NonFiniteLossError: the loss stopped being finite.
        ResumeError: the run in `out` was started with other options or other data.
        LostProcessError: another process of the run ended.
        ModuleNotFoundError: an option needs an extra that is not installed.
    """
    if config.tensorboard:
        require_tensorboard()
    warms_up = model_config.chain_term and config.warm_epochs > 0
    if not config.epochs and not warms_up:
        raise ValueError(
            "nothing to train: epochs is 0, and a warm stage needs warm_epochs above 0 and "
            f"model.chain_term true, got {config.warm_epochs} and {model_config.chain_term}"
        )
    require_search_order(config, search_config)
    if not ranks.first:
        say, progress = (lambda line: None), no_progress
    torch.manual_seed(config.seed)
    device = resolve_device(config.device) if ranks.size == 1 else ranks.device
    train_data, val_data = training_splits(dataset, config)
    counts = train_data.label_counts()
    space = first_label_space(dataset.label_names, counts, config)
    backbone: Backbone | None = None
    if dataset.features is not None:
        model_config = replace(model_config, backbone=FEATURES_ONLY)
        feature_dim = dataset.features.shape[1]
    else:
        with ranks.first_goes_ahead():  # it may download
            backbone = initial_backbone(model_config, config)
        feature_dim = backbone.feature_dim
    head = Head.from_config(model_config, len(space), feature_dim)
    if head.label_classifier is not None:
        in_path_order = train_data.label_matrix()[:, list(space.source_index)]
        start_at_frequencies(head.label_classifier, in_path_order)
    prepare_head(head)
    model = CNNRNN(model_config, space, head, backbone, search_config).to(device)
    ranks.start_alike(model)

    state_file = out / STATE_FILE
    frozen = backbone if model_config.freeze_backbone else None
    identity = run_identity(train_data, val_data, frozen, model_config, search_config, config)
    if ranks.bytes_from_first(text := json.dumps(identity).encode()) != text:
        raise ValueError(
            f"process {ranks.rank} must have the data and options of process 0, got others"
        )
    if resume and (out / "members").is_dir():
        raise ResumeError(
            f"{out} holds an ensemble's run: --members must be as it was started, got none"
        )
    state = _stored_state(state_file, ranks) if resume else None
    if state is not None:
        require_same_run(state.values["identity"], identity, out)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        remove_partial_files(out)
    train_split, val_split = (
        _read_split(part, model, config, device, out, progress, ranks)
        for part in (train_data, val_data)
    )
    if train_split.features is not None:
        head.trunk.fit_scale(train_split.features, config.feature_rms)
    head.max_labels = max(int(train_split.targets.sum(1).max()), search_config.min_labels, 1)
    resolve_max_labels(head, search_config)  # fails now rather than after the first stage
    if ranks.first:
        on_start()
        if state is None:
            state_file.unlink(missing_ok=True)
    log = Log(
        out / "log.jsonl" if ranks.first else None,
        out / "tensorboard" if config.tensorboard and ranks.first else None,
        None if state is None else state.values["log"],
    )
    facts = {
        "train_images": len(train_split),
        "val_images": len(val_split),
        "train_images_without_labels": int((train_split.targets.sum(1) == 0).sum()),
        "labels": len(space),
        "labels_without_training_images": int((counts == 0).sum()),
        "longest_path": head.max_labels,
        "device": str(device),
    }
    if state is None:
        log.write({"stage": "data", **facts})
    say("  ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))

    def in_training() -> Tensor:
        return train_split.targets.any(0)  # [L], in the order that labels have by now

    def save(inference: Inference, targets: Tensor, best: bool) -> None:
        if best:
            model.calibration = calibrate(inference, targets, in_training(), USUAL_SHRINKAGE)
        if ranks.first:
            if best:
                model.save(out / "best")
            model.save(out / "last")

    generator = torch.Generator().manual_seed(config.seed)
    if not ranks.first:  # each draws its own dropout
        torch.manual_seed((config.seed + ranks.rank) % 2**63)
    stages = []
    if warms_up:
        stages.append(_warm_stage(model, val_split, config))
    if config.epochs:
        path = _path_stage(model, train_split, val_split, config, ranks, save)
        stages.append(path)
        if config.finish_epochs:
            stages.append(_finishing(path, config))

    def keep(stage: Stage, state: State) -> None:
        values = {"identity": identity, "stage": stage.name, "log": log.position(),
                  "calibration": asdict(model.calibration),
                  "label order": model.label_space.source_index, **state.values}  # fmt: skip
        random = _random_state(generator, device, ranks)
        if ranks.first:
            save_state(state_file, State(values, state.tensors | random))

    if state is not None:
        at = [stage.name for stage in stages].index(state.values["stage"])
        stages = stages[at:]
        calibration = state.values["calibration"]
        model.calibration = read_options(Calibration, "calibration", calibration)
        now = model.label_space.source_index
        order = torch.tensor([now.index(label) for label in state.values["label order"]])
        _reorder_labels(model, order, train_split, val_split)  # the weights come in that order
        _restore_random_state(state.tensors, generator, device, ranks)
        say(f"resumed after epoch {state.values['epoch']} of stage {state.values['stage']}")
    validation, resumed = None, state is not None
    for stage in stages:
        validation = run_stage(
            stage, train_split, config, device=device, generator=generator, log=log, say=say,
            progress=progress, best=validation if stage.name == FINISH else None, start=state,
            keep=partial(keep, stage),
        )  # fmt: skip
        state = None
    if not config.epochs:
        saved = resumed and ranks.first and _is_saved(model, out / "last")
        if ranks.numbers_from_first([saved]) == [0]:
            save(*_infer(model, val_split, config), best=True)
    if ranks.first:
        model = load_checkpoint(out / "best").to(device)
    inference, targets = _infer(model, val_split, config)
    kept, model.calibration = model.calibration, calibrate(inference, targets, in_training())
    if ranks.first:
        if model.calibration != kept:  # a run that had ended has this one
            model.save(out / "best")
        recurrent = model.head.recurrence.weight_hh.detach()
        trained = head.recurrence.weight_hh.requires_grad  # `prepare_head` may have frozen it
        warn_if_not_learned(inference.sets, targets, recurrent if trained else None)
    return TrainResult(model, decision_metrics(inference, targets, model.calibration, k=3))


def warn_if_not_learned(sets: Tensor, targets: Tensor, recurrent: Tensor | None) -> None:
    """Warn where training has ended in a model that names nothing, or whose recurrence is gone.

    Args:
        sets: [n, L] bool of the best paths of the validation images.
        targets: [n, L] bool.
        recurrent: [4H, H] the trained weights from state to state; None where they are frozen.
    """
    if targets.any() and not sets.any():
        warnings.warn(
            f"the best path of all {len(sets)} validation images is empty: the label paths were "
            "not learned. Train longer (--epochs, --patience), try another --learning_rate, or let "
            "--search.min_labels forbid empty sets",
            stacklevel=3,
        )
    if recurrent is not None and float(recurrent.abs().max()) < VANISHED:
        warnings.warn(
            f"the recurrent weights have vanished (none above {VANISHED:g}): what follows a label "
            "no longer depends on those before it. Lower --weight_decay, or try another "
            "--learning_rate",
            stacklevel=3,
        )


@torch.no_grad()
def start_at_frequencies(classifier: nn.Linear, targets: Tensor) -> None:
    """Let a label's probability start at its share of the training images.

    From one half it would take whole epochs to come down, and its gradient would drown the rest.

    Args:
        classifier: one output per label, to be read through a sigmoid.
        targets: [n, L] bool of the training images.
    """
    share = (targets.sum(0) + 0.5) / (len(targets) + 1)
    classifier.bias.copy_(share.logit())


def _is_saved(model: CNNRNN, folder: Path) -> bool:
    """Tell whether a folder holds a model's weights, as that of a finished run does."""
    try:
        saved = load_checkpoint(folder)
    except CheckpointError:
        return False
    return weights_digest(saved.state_dict().items()) == weights_digest(model.state_dict().items())


def _stored_state(file: Path, ranks: Ranks) -> State | None:
    """Read the state that process 0 finds, everywhere; None where there is none."""
    there = ranks.first and file.exists()
    if ranks.numbers_from_first([there]) == [0]:
        return None
    return read_state(ranks.bytes_from_first(file.read_bytes() if ranks.first else b""), str(file))


def _random_state(
    generator: torch.Generator, device: torch.device, ranks: Ranks
) -> dict[str, Tensor]:
    """Return the state of what training draws from: order and augmentation, dropout [R, ...]."""
    states = {"random.order": generator.get_state(),
              "random.cpu": ranks.gather(torch.get_rng_state()[None])}  # fmt: skip
    if device.type == "cuda":
        states["random.cuda"] = ranks.gather(torch.cuda.get_rng_state(device)[None])
    return states


def _restore_random_state(
    tensors: dict[str, Tensor], generator: torch.Generator, device: torch.device, ranks: Ranks
) -> None:
    generator.set_state(tensors["random.order"])
    if ranks.rank >= len(tensors["random.cpu"]):
        return  # more processes than before: this one begins with its own seed
    torch.set_rng_state(tensors["random.cpu"][ranks.rank].clone())  # crashes on a view
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"][ranks.rank].clone(), device)


def training_splits(dataset: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Return the training and validation records, a share held out where no split is left for it.

    The share is stratified: of every label about the same share is held out, as the seed decides.

    Raises:
        DataError: a split is missing or empty, or training and validation share records.
    """
    if config.train_split is None and dataset.splits and not {"train", "all"} & {*dataset.splits}:
        raise DataError(
            f"{dataset.source} has no split named train, only {', '.join(sorted(dataset.splits))}; "
            "name another with train_split"
        )
    train_name = config.train_split or ("train" if "train" in dataset.splits else "all")
    val_name = config.val_split or ("val" if "val" in dataset.splits else None)
    data = dataset.split(train_name)
    if val_name is not None:
        val = dataset.split(val_name)
        if not len(val):
            raise DataError(
                f"the {val_name} split of {dataset.source} is empty; nothing to validate on"
            )
        shared = np.intersect1d(dataset.splits[train_name], dataset.splits[val_name])
        if not len(shared):
            return _training_records(data, config), val
        if config.train_split is None or config.val_split is not None:
            raise DataError(
                f"training and validation records must differ, got {len(shared)} in both "
                f"{train_name} and {val_name} of {dataset.source}, the first "
                f"{dataset.record_name(int(shared[0]))}; name other splits with train_split and "
                "val_split"
            )
    held_out = round(len(data) * config.val_fraction)
    if not 0 < held_out < len(data):
        raise DataError(
            f"{dataset.source} has no val split"
            + (f" apart from {train_name}" if val_name else "")
            + f", and val_fraction {config.val_fraction} of "
            f"{len(data)} training images leaves nothing to validate on or to train on"
        )
    rest, held = stratified_split(data, held_out, config.seed)
    return _training_records(data.select(rest), config), data.select(held)


def with_fixed_splits(dataset: Dataset, config: TrainConfig) -> Dataset:
    """Return a dataset whose splits `train` and `val` are those of `training_splits`.

    The images that a training holds out follow its seed; so that several trainings hold out the
    same ones, they are named once. Other splits but `all` stay.
    """
    numbered = replace(dataset, rows=np.arange(len(dataset)))
    train_part, val_part = training_splits(numbered, config)
    others = {name: records for name, records in dataset.splits.items() if name != "all"}
    return replace(dataset, splits={**others, "train": train_part.rows, "val": val_part.rows})


def _training_records(data: Dataset, config: TrainConfig) -> Dataset:
    if config.empty == "drop":
        data = data.select((data.label_matrix().sum(1) > 0).nonzero()[:, 0].numpy())
    if not len(data):
        raise DataError(f"{data.source} has no training images (empty: {config.empty})")
    return data


def initial_backbone(model_config: ModelConfig, config: TrainConfig) -> Backbone:
    """Return the backbone that training starts from: `init_backbone`'s, or the one named.

    Raises:
        ValueError: `init_backbone` holds another backbone than the model's.
    """
    if config.init_backbone is None:
        if model_config.freeze_backbone and not _starts_trained(model_config, config):
            warnings.warn(
                f"backbone {model_config.backbone} is frozen with random weights; pass "
                "--model.freeze_backbone false to train it, or --init_backbone CHECKPOINT",
                stacklevel=3,
            )
        return make_backbone(model_config)
    source = load_checkpoint(config.init_backbone).backbone
    if source is None or source.name != model_config.backbone:
        raise ValueError(
            f"init_backbone {config.init_backbone} holds backbone "
            f"{None if source is None else source.name}, the model's is {model_config.backbone}"
        )
    size = model_config.image_size
    if size is not None:
        source.preprocessing = replace(source.preprocessing, image_size=size)
    return source


def _read_split(
    data: Dataset,
    model: CNNRNN,
    config: TrainConfig,
    device: torch.device,
    out: Path,
    progress: Progress,
    ranks: Ranks,
) -> Split:
    targets = model.label_space.from_source(data.label_matrix(), data.label_names)
    if data.features is not None:
        return Split(data, targets, torch.from_numpy(data.features), ranks=ranks)
    assert model.backbone is not None
    if not model.config.freeze_backbone:
        return Split(data, targets, None, model.backbone.preprocessing, ranks)
    folder = Path(config.feature_cache) if config.feature_cache else out / "features"
    features = cached_features(
        model.backbone,
        data,
        folder,
        device=device,
        batch_size=config.batch_size,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        progress=progress,
        ranks=ranks,
    )
    return Split(data.select(features.kept), targets[features.kept], features.values, ranks=ranks)


def _features(model: CNNRNN, inputs: Tensor) -> Tensor:
    """Features of a batch: the inputs themselves, or the backbone's of pictures."""
    return inputs if inputs.dim() == 2 else model.features(inputs).float()


def _warm_stage(model: CNNRNN, val: Split, config: TrainConfig) -> Stage:
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
        scale = config.backbone_scale if _starts_trained(model.config, config) else 1.0
        groups.append(_group([model.backbone], config.learning_rate * scale))
    return Stage("warm", config.warm_epochs, model, groups, loss, validate)


def independent_validation(scores: Tensor, targets: Tensor) -> Validation:
    """Judge independent scores [n, L] in 0..1 by O-F1 at the best threshold plus mAP."""
    _, of1 = best_threshold(scores, targets)
    mean_ap = mean_average_precision(scores, targets)
    return Validation(of1 + mean_ap, {"O-F1": of1, "mAP": mean_ap})


def _path_stage(
    model: CNNRNN,
    training: Split,
    val: Split,
    config: TrainConfig,
    ranks: Ranks,
    save: Callable[[Inference, Tensor, bool], None],
) -> Stage:
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
        features, targets = _split_features(model, val, config)
        last[:] = [(infer(model.head, features, model.search), targets)]
        nll = float(model.set_nll(features, targets).mean())
        return path_validation(*last[0], nll, config)

    def relearn_order(epoch: int, optimizer: torch.optim.Optimizer) -> bool:
        if config.label_order != "easiest" or epoch > config.reorder_epochs:
            return False
        inference, targets = _infer(model, training, config)
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
        trained = warm or _starts_trained(model.config, config)
        groups.append(_group([model.backbone], rate * (config.backbone_scale if trained else 1.0)))
    return Stage(
        "path", config.epochs, model, groups, loss, validate,
        lambda validation, best: save(*last[0], best), relearn_order,
    )  # fmt: skip


def _finishing(path: Stage, config: TrainConfig) -> Stage:
    """Return the stage that goes on from the best epoch of the paths' at lower learning rates."""
    groups = [{**group, "lr": group["lr"] * config.finish_scale} for group in path.groups]
    return Stage(
        FINISH, config.finish_epochs, path.module, groups, path.loss, path.validate, path.on_epoch
    )


def _reorder(
    model: CNNRNN, order: Tensor, optimizer: torch.optim.Optimizer, *splits: Split
) -> bool:
    """Put a model and the targets of its splits into another label order [L]; False for its own."""
    if torch.equal(order, torch.arange(len(order))):
        return False
    permute_labels(model.head, order, optimizer)
    _reorder_labels(model, order, *splits)
    return True


def _reorder_labels(model: CNNRNN, order: Tensor, *splits: Split) -> None:
    """Put the names of a model and the targets of its splits into another label order [L]."""
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
        config: names what the merit is. O-F1 and mAP are of the half-and-half mixture.
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
def _infer(model: CNNRNN, split: Split, config: TrainConfig) -> tuple[Inference, Tensor]:
    """Search a split; returns the targets of the images that could be read besides."""
    features, targets = _split_features(model, split, config)
    return infer(model.head, features, model.search), targets


@torch.no_grad()
def _split_features(model: CNNRNN, split: Split, config: TrainConfig) -> tuple[Tensor, Tensor]:
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


def _starts_trained(model_config: ModelConfig, config: TrainConfig) -> bool:
    pretrained = model_config.pretrained and model_config.backbone != "small"
    return pretrained or config.init_backbone is not None
