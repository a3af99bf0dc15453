"""Training: the sequence loss over label paths, beside the chain term's binary cross-entropy.

Stage `path` trains everything at once, stage `finish` continues from its best epoch at a lower
learning rate. With `warm_epochs` a stage `warm` comes first and trains backbone (unless frozen),
trunk and chain term with binary cross-entropy alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrnn.config import Calibration, ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import Dataset
from cnnrnn.data.splits import training_splits
from cnnrnn.machine.devices import resolve_device
from cnnrnn.machine.distributed import ALONE, Ranks
from cnnrnn.machine.files import weights_digest
from cnnrnn.machine.lock import alone_in
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.model.checkpoint import CheckpointError, read_options
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.network.head import Head
from cnnrnn.prediction.decisions import (
    USUAL_SHRINKAGE,
    calibrate,
    calibrate_known,
    decision_metrics,
)
from cnnrnn.search.inference import Inference, infer
from cnnrnn.training.batches import Split
from cnnrnn.training.log import Log, require_tensorboard
from cnnrnn.training.loop import Stage, run_stage
from cnnrnn.training.orders import require_search_order
from cnnrnn.training.recipe import (
    FINISH,
    ReadSplit,
    finishing_stage,
    path_stage,
    read_split,
    reorder_labels,
    search_split,
    warm_stage,
)
from cnnrnn.training.resume import (
    STATE_FILE,
    ResumeError,
    TrainingState,
    read_state,
    remove_partial_files,
    require_int,
    require_same_run,
    run_identity,
    save_state,
)
from cnnrnn.training.start import (
    check_known,
    fit_to_data,
    labelled_split,
    new_model,
    run_facts,
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
        ResumeError: the run in `out` was started with other options or other data, or its state
            is damaged.
        InUseError: another process trains in `out`.
        LostProcessError: another process of the run ended.
        ModuleNotFoundError: an option needs an extra that is not installed.
    """
    _require_options(model_config, search_config, config)
    if not ranks.first:
        say, progress = (lambda line: None), no_progress
    torch.manual_seed(config.seed)
    device = resolve_device(config.device) if ranks.size == 1 else ranks.device
    train_data, val_data = training_splits(dataset, config)
    check_known(train_data, val_data)
    model = new_model(train_data, model_config, search_config, config, prepare_head, ranks)
    ranks.start_alike(model.to(device))

    identity = _identity(model, train_data, val_data, config, ranks)
    with alone_in(out, "training") if ranks.first else nullcontext():
        state = _former_state(out, identity, ranks) if resume else None
        if ranks.first:
            remove_partial_files(out)
        training, val = (
            labelled_split(part, model, config, device, out, progress, ranks)
            for part in (train_data, val_data)
        )
        fit_to_data(model, training, config)
        if ranks.first:
            on_start()
            if state is None:
                (out / STATE_FILE).unlink(missing_ok=True)
        log = Log(
            out / "log.jsonl" if ranks.first else None,
            out / "tensorboard" if config.tensorboard and ranks.first else None,
            None if state is None else state.values["log"],
        )
        facts = run_facts(model, training, val)
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
            with _told_as_resume_error(out):
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
    if state is None:
        return None
    with _told_as_resume_error(out):
        require_same_run(state.values["identity"], identity, out)
        require_int(state.values, "log")
    return state


@contextmanager
def _told_as_resume_error(out: Path) -> Iterator[None]:
    """Say of a state that lacks something, or has something else there, that it does not fit."""
    try:
        yield
    except ResumeError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ResumeError(
            f"{out / STATE_FILE} does not fit its run: {type(error).__name__} {error}. Leave "
            "--resume out to start over"
        ) from error


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
