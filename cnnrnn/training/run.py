"""Training: the sequence loss over label paths, beside the chain term's binary cross-entropy.

Stage `path` trains everything at once, stage `finish` continues from its best epoch at a lower
learning rate. With `warm_epochs` a stage `warm` comes first and trains backbone (unless frozen),
trunk and chain term with binary cross-entropy alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrnn.config import Calibration, ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.dataset import WRITE_ZERO
from cnnrnn.data.splits import training_splits
from cnnrnn.labels import first_label_space
from cnnrnn.machine.devices import resolve_device
from cnnrnn.machine.distributed import ALONE, Ranks
from cnnrnn.machine.files import weights_digest
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.machine.words import listed
from cnnrnn.model.checkpoint import FEATURES_ONLY, CheckpointError, read_options
from cnnrnn.model.classifier import CNNRNN, load_backbone, load_checkpoint
from cnnrnn.network.backbones import Backbone, make_backbone
from cnnrnn.network.features import cached_features
from cnnrnn.network.head import Head
from cnnrnn.prediction.decisions import (
    USUAL_SHRINKAGE,
    calibrate,
    calibrate_known,
    decision_metrics,
)
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.inference import Inference, infer
from cnnrnn.training.batches import Split
from cnnrnn.training.log import Log, require_tensorboard
from cnnrnn.training.loop import Stage, run_stage
from cnnrnn.training.orders import require_search_order
from cnnrnn.training.recipe import (
    FINISH,
    ReadSplit,
    finishing_stage,
    label_shares,
    path_stage,
    read_split,
    reorder_labels,
    search_split,
    start_at_frequencies,
    starts_trained,
    warm_stage,
)
from cnnrnn.training.resume import (
    STATE_FILE,
    ResumeError,
    TrainingState,
    read_state,
    remove_partial_files,
    require_same_run,
    run_identity,
    save_state,
)

VANISHED = 1e-6
"""If all recurrent weights are smaller, the state carries nothing from label to label."""


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
        dataset: images or feature vectors with label sets. Without a split to validate on a
            share of the training images is held out.
        out: folder for the run; created if missing.
        model_config: the architecture; backbone options do not matter for feature vectors.
        search_config: the search, whose order is also the order of training paths.
        config: the recipe.
        prepare_head: called with the new head, whose weights it may set and freeze; a resumed run
            must be given the same.
        resume: resume after the last epoch that the run in `out` finished, or start if there is
            none. The result is that of a run that was never stopped.
        on_start: called once data and options are checked, before anything is written.
        say: gets a line per epoch and per notable fact.
        progress: shows progress within an epoch.
        ranks: the processes that train together, each of which calls this; only the first writes
            and calls `on_start`, `say` and `progress`.

    Raises:
        DataError: the data lacks a usable training split.
        ValueError: the options leave nothing to train, or do not fit the data.
        NonFiniteLossError: the loss stopped being finite.
        ResumeError: the run in `out` was started with other options or other data.
        LostProcessError: another process of the run ended.
        ModuleNotFoundError: an option needs an extra that is not installed.
    """
    _require_options(model_config, search_config, config)
    if not ranks.first:
        say, progress = (lambda line: None), no_progress
    torch.manual_seed(config.seed)
    device = resolve_device(config.device) if ranks.size == 1 else ranks.device
    train_data, val_data = training_splits(dataset, config)
    _check_known(train_data, val_data)
    model = _new_model(train_data, model_config, search_config, config, prepare_head, ranks)
    ranks.start_alike(model.to(device))

    identity = _identity(model, train_data, val_data, config, ranks)
    state = _former_state(out, identity, ranks) if resume else None
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        remove_partial_files(out)
    training, val = (
        _read_split(part, model, config, device, out, progress, ranks)
        for part in (train_data, val_data)
    )
    _fit_to_data(model, training, config)
    if ranks.first:
        on_start()
        if state is None:
            (out / STATE_FILE).unlink(missing_ok=True)
    log = Log(
        out / "log.jsonl" if ranks.first else None,
        out / "tensorboard" if config.tensorboard and ranks.first else None,
        None if state is None else state.values["log"],
    )
    facts = _facts(model, training, val)
    if state is None:
        log.write({"stage": "data", **facts})
    say("  ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if model.backbone is not None and model.backbone.origin:
        say(model.backbone.origin)

    generator = torch.Generator().manual_seed(config.seed)
    if not ranks.first:  # each draws its own dropout
        torch.manual_seed((config.seed + ranks.rank) % 2**63)
    run = _Run(model, training, val, config, out, ranks, log, identity, generator)
    stages, validation = run.stages(), None
    if state is not None:
        stages = run.restore(state, stages)
        say(f"resumed after epoch {state.values['epoch']} of stage {state.values['stage']}")
    at = state
    for stage in stages:
        validation = run_stage(
            stage, training, config, device=device, generator=generator, log=log, say=say,
            progress=progress, best=validation if stage.name == FINISH else None, start=at,
            keep=partial(run.keep, stage),
        )  # fmt: skip
        at = None
    if not config.epochs:
        run.save_without_paths(resumed=state is not None)
    return run.result()


def _require_options(
    model_config: ModelConfig, search_config: SearchConfig, config: TrainConfig
) -> None:
    """Fail if the options leave nothing to train, or need what is not installed."""
    if config.tensorboard:
        require_tensorboard()
    if not config.epochs and not _warms_up(model_config, config):
        raise ValueError(
            "nothing to train: epochs is 0, and a warm stage needs warm_epochs above 0 and "
            f"model.chain_term true, got {config.warm_epochs} and {model_config.chain_term}"
        )
    require_search_order(config, search_config)


def _warms_up(model_config: ModelConfig, config: TrainConfig) -> bool:
    return model_config.chain_term and config.warm_epochs > 0


def _new_model(
    data: Dataset,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
    prepare_head: Callable[[Head], None],
    ranks: Ranks,
) -> CNNRNN:
    """Return the model that training starts from, for the labels and inputs of training data."""
    space = first_label_space(data.label_names, data.label_counts(), config)
    backbone: Backbone | None = None
    if data.features is not None:
        model_config = replace(model_config, backbone=FEATURES_ONLY)
        feature_dim = data.features.shape[1]
    else:
        with ranks.first_goes_ahead():  # it may download
            backbone = initial_backbone(model_config, config)
        feature_dim = backbone.feature_dim
    head = Head.from_config(model_config, len(space), feature_dim)
    if head.label_classifier is not None:
        columns = list(space.source_index)
        unknown = data.unknown_matrix()[:, columns] if data.has_unknown else None
        start_at_frequencies(head.label_classifier, data.label_matrix()[:, columns], unknown)
    prepare_head(head)
    return CNNRNN(model_config, space, head, backbone, search_config)


def _check_known(train_data: Dataset, val_data: Dataset) -> None:
    """Fail if unknown labels leave nothing to learn from; warn if they leave labels so.

    Raises:
        DataError: no training image has an absent label, or no label of any validation image is
            known.
    """
    if val_data.has_unknown and val_data.unknown_matrix().all():
        raise DataError(
            f"{val_data.source} has no validation image of which a label is known; val_split names "
            "another split"
        )
    never = train_data.never_absent()
    if len(never) == len(train_data.label_names):
        raise DataError(
            f"{train_data.source} has no training image that is known to lack a label; {WRITE_ZERO}"
        )
    if never:
        warnings.warn(
            f"{train_data.source} has no training image that is known to lack {listed(never)}: "
            f"nothing says when such a label is absent; {WRITE_ZERO}",
            stacklevel=4,
        )


def _identity(
    model: CNNRNN, train_data: Dataset, val_data: Dataset, config: TrainConfig, ranks: Ranks
) -> dict[str, Any]:
    """Return what a run to resume must have in common, after checking it is so in all processes."""
    frozen = model.backbone if model.config.freeze_backbone else None
    identity = run_identity(train_data, val_data, frozen, model.config, model.search, config)
    if ranks.bytes_from_first(text := json.dumps(identity).encode()) != text:
        raise ValueError(
            f"process {ranks.rank} must have the data and options of process 0, got different ones"
        )
    return identity


def _former_state(out: Path, identity: dict[str, Any], ranks: Ranks) -> TrainingState | None:
    """Return the state that the run in `out` left, None if there is none."""
    if (out / "members").is_dir():
        raise ResumeError(
            f"{out} holds an ensemble's run: --members must be as at its start, got none"
        )
    state = _stored_state(out / STATE_FILE, ranks)
    if state is not None:
        require_same_run(state.values["identity"], identity, out)
    return state


def _fit_to_data(model: CNNRNN, training: Split, config: TrainConfig) -> None:
    """Set what the model derives from training data before the first step."""
    head = model.head
    if training.features is not None:
        head.trunk.fit_scale(training.features, config.feature_rms)
    head.max_labels = max(_most_labels(training), model.search.min_labels, 1)
    resolve_max_labels(head, model.search)  # fails now rather than after the first stage


def _most_labels(split: Split) -> int:
    """Return how many labels an image has at most, of the unknown ones as many as are expected."""
    present = split.targets.sum(1)
    if split.unknown is None:
        return int(present.max())
    shares = label_shares(split.targets, split.unknown)
    parts = split.unknown.split(8192)
    expected = torch.cat([part.to(shares.dtype) @ shares for part in parts])
    return int((present + expected).max().round())


def _facts(model: CNNRNN, training: Split, val: Split) -> dict[str, Any]:
    unknown = sum(int(s.unknown.sum()) for s in (training, val) if s.unknown is not None)
    pairs = (len(training) + len(val)) * len(model.labels)
    return {
        "train_images": len(training),
        "val_images": len(val),
        "train_images_without_labels": int((training.targets.sum(1) == 0).sum()),
        "labels": len(model.labels),
        "labels_without_training_images": int((training.dataset.label_counts() == 0).sum()),
        "longest_path": model.head.max_labels,
        **({"unknown": f"{100 * unknown / pairs:.3g} %"} if unknown else {}),
        "device": str(model.device),
    }


@dataclass(frozen=True, eq=False)
class _Run:
    """A training in progress.

    Attributes:
        model: what is trained.
        training: its images.
        val: the images that the best epoch is chosen on.
        config: the recipe.
        out: the run's folder.
        ranks: the processes that share it.
        log: of epochs.
        identity: what a run that resumes this one must have in common.
        generator: draws the order of images.
    """

    model: CNNRNN
    training: Split
    val: Split
    config: TrainConfig
    out: Path
    ranks: Ranks
    log: Log
    identity: dict[str, Any]
    generator: torch.Generator

    def stages(self) -> list[Stage]:
        """Return the stages of the recipe, in turn."""
        model, config, stages = self.model, self.config, []
        if _warms_up(model.config, config):
            stages.append(warm_stage(model, self.val, config))
        if config.epochs:
            path = path_stage(model, self.training, self.val, config, self.ranks, self.save)
            stages.append(path)
            if config.finish_epochs:
                stages.append(finishing_stage(path, config))
        return stages

    def restore(self, state: TrainingState, stages: list[Stage]) -> list[Stage]:
        """Restore everything but the weights from a state; return the stages that remain."""
        model = self.model
        calibration = state.values["calibration"]
        model.calibration = read_options(Calibration, "calibration", calibration)
        now = model.label_space.source_index
        order = torch.tensor([now.index(label) for label in state.values["label order"]])
        reorder_labels(model, order, self.training, self.val)  # the weights come in that order
        _restore_random_state(state.tensors, self.generator, model.device, self.ranks)
        return stages[[stage.name for stage in stages].index(state.values["stage"]) :]

    def keep(self, stage: Stage, state: TrainingState) -> None:
        """Write the state of a stage after an epoch."""
        values = {"identity": self.identity, "stage": stage.name, "log": self.log.position(),
                  "calibration": asdict(self.model.calibration),
                  "label order": self.model.label_space.source_index, **state.values}  # fmt: skip
        random = _random_state(self.generator, self.model.device, self.ranks)
        if self.ranks.first:
            save_state(self.out / STATE_FILE, TrainingState(values, state.tensors | random))

    def save(self, inference: Inference, read: ReadSplit, best: bool) -> None:
        """Write the checkpoints of an epoch; the best one is calibrated."""
        if best:
            self.model.calibration = calibrate(
                inference, read.targets, self._in_training(), USUAL_SHRINKAGE, read.unknown
            )
        if self.ranks.first:
            if best:
                self.model.save(self.out / "best")
            self.model.save(self.out / "last")

    def save_without_paths(self, resumed: bool) -> None:
        """Write the checkpoints of a run with the warm stage alone."""
        saved = resumed and self.ranks.first and _is_saved(self.model, self.out / "last")
        if not self.ranks.first_says(saved):
            self.save(*search_split(self.model, self.val, self.config), best=True)

    def result(self) -> TrainResult:
        """Calibrate and measure the best epoch, and warn if nothing was learned."""
        model = self.model
        trained = model.head.recurrence.weight_hh.requires_grad  # `prepare_head` may freeze it
        if self.ranks.first:
            model = load_checkpoint(self.out / "best").to(model.device)
        features, targets, unknown = read_split(model, self.val, self.config)
        inference = infer(model.head, features, model.search)
        kept, had_counts = model.calibration, model.head.cooccurrence is not None
        model.head.count_cooccurrence(self.training.targets, self.training.unknown)
        model.calibration = calibrate_known(
            model.head,
            features,
            targets,
            model.search,
            calibrate(inference, targets, self._in_training(), unknown=unknown),
            unknown=unknown,
        )
        if self.ranks.first:
            has_new_counts = model.head.cooccurrence is not None and not had_counts
            if model.calibration != kept or has_new_counts:  # a run that had ended has these
                model.save(self.out / "best")
            recurrent = model.head.recurrence.weight_hh.detach()
            warn_if_not_learned(inference.sets, targets, recurrent if trained else None)
        metrics = decision_metrics(inference, targets, model.calibration, 3, unknown)
        return TrainResult(model, metrics)

    def _in_training(self) -> Tensor:
        return self.training.targets.any(0)  # [L], in the order that labels have by now


def warn_if_not_learned(sets: Tensor, targets: Tensor, recurrent: Tensor | None) -> None:
    """Warn if training ended in a model that predicts nothing, or whose recurrence vanished.

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
            stacklevel=4,
        )
    if recurrent is not None and float(recurrent.abs().max()) < VANISHED:
        warnings.warn(
            f"the recurrent weights have vanished (none above {VANISHED:g}): what follows a label "
            "no longer depends on those before it. Lower --weight_decay, or try another "
            "--learning_rate",
            stacklevel=4,
        )


def _is_saved(model: CNNRNN, folder: Path) -> bool:
    """Tell whether a folder holds a model's weights, as that of a finished run does."""
    try:
        saved = load_checkpoint(folder)
    except CheckpointError:
        return False
    return weights_digest(saved.state_dict().items()) == weights_digest(model.state_dict().items())


def _stored_state(file: Path, ranks: Ranks) -> TrainingState | None:
    """Return the state that process 0 finds, in every process; None if there is none."""
    if not ranks.first_says(file.exists()):
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


def initial_backbone(model_config: ModelConfig, config: TrainConfig) -> Backbone:
    """Return the backbone that training starts from: `init_backbone`'s, or the one named.

    Raises:
        ValueError: `init_backbone` holds another backbone than the model's.
    """
    if config.init_backbone is None:
        if model_config.freeze_backbone and not starts_trained(model_config, config):
            warnings.warn(
                f"backbone {model_config.backbone} is frozen with random weights; pass "
                "--model.freeze_backbone false to train it, or --init_backbone CHECKPOINT",
                stacklevel=4,
            )
        return make_backbone(model_config)
    if Path(config.init_backbone).is_file():
        return make_backbone(replace(model_config, weights=config.init_backbone))
    source = load_backbone(config.init_backbone)
    if source is None or source.name != model_config.backbone:
        raise ValueError(
            f"init_backbone {config.init_backbone} holds backbone "
            f"{None if source is None else source.name}, the model's is {model_config.backbone}"
        )
    source.origin = f"backbone {source.name}: from {config.init_backbone}"
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
    unknown: Tensor | None = None
    if data.has_unknown:
        unknown = model.label_space.from_source(data.unknown_matrix(), data.label_names)
    if data.features is not None:
        vectors = torch.from_numpy(data.features)
        return Split(data, targets, vectors, ranks=ranks, unknown=unknown)
    assert model.backbone is not None
    if not model.config.freeze_backbone:
        return Split(data, targets, None, model.backbone.preprocessing, ranks, unknown)
    folder = Path(config.feature_cache) if config.feature_cache else out / "features"
    features = cached_features(
        model.backbone, data, folder, device=device, batch_size=config.batch_size,
        workers=config.workers or None, on_bad_image=config.on_bad_image, progress=progress,
        ranks=ranks,
    )  # fmt: skip
    kept = features.kept
    return Split(
        data.select(kept), targets[kept], features.values, ranks=ranks,
        unknown=None if unknown is None else unknown[kept],
    )  # fmt: skip
