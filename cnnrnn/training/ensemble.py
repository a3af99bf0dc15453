"""Training an ensemble: its members one after another, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cnnrnn.config import LabelOrder, ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import Dataset
from cnnrnn.data.splits import training_splits, with_fixed_splits
from cnnrnn.labels import LabelSpace
from cnnrnn.machine.lock import alone_in
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.features import cached_features
from cnnrnn.prediction.decisions import decision_metrics
from cnnrnn.training.resume import STATE_FILE, ResumeError
from cnnrnn.training.run import train


@dataclass(frozen=True)
class EnsembleResult:
    """A finished training of an ensemble.

    Attributes:
        model: the members' best epochs, in eval mode, calibrated on the validation split.
        metrics: of every decision on the validation split.
    """

    model: Ensemble
    metrics: dict[str, dict[str, float]]


def train_ensemble(
    dataset: Dataset,
    out: Path,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
    label_orders: Sequence[LabelOrder],
    *,
    resume: bool = False,
    on_start: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
) -> EnsembleResult:
    """Train members one after another on one feature cache and write the ensemble as `out/best`.

    Each member is its own training run in `out/members/N`. All train and validate on the same
    images, and the ensemble's threshold is chosen on the validation split.

    Args, besides those that are as in `train`:
        model_config: the architecture; a backbone must be frozen.
        search_config: the search, of order `increasing`.
        config: the recipe; member i trains with its seed plus i.
        label_orders: one per member, in place of the recipe's.
        resume: resumes every member.

    Raises:
        ValueError: the options cannot make an ensemble, or as in `train`.
        InUseError: another process trains in `out`.
    """
    if not label_orders:
        raise ValueError("an ensemble must have at least 1 member, got 0 label orders")
    if search_config.order != "increasing" or "shuffled" in label_orders:
        raise ValueError(
            "an ensemble needs increasing paths: search.order must be increasing and no "
            f"label order shuffled, got {search_config.order} and {', '.join(label_orders)}"
        )
    if dataset.features is None and not model_config.freeze_backbone:
        raise ValueError(
            "an ensemble shares a frozen backbone: model.freeze_backbone must be true, got false"
        )
    with alone_in(out, "the training of an ensemble"):
        if resume and (out / STATE_FILE).exists():
            raise ResumeError(
                f"{out} holds a single model's run: --members must be left out, got "
                f"{len(label_orders)}"
            )
        dataset = with_fixed_splits(dataset, config)
        config = replace(config, train_split=None, val_split=None)
        cache = config.feature_cache or str(out / "features")
        models: list[CNNRNN] = []
        for i, order in enumerate(label_orders):
            member = replace(config, seed=config.seed + i, label_order=order, feature_cache=cache)
            if i and dataset.features is None:  # also if the first one's weights are random
                member = replace(member, init_backbone=str(out / "members" / "0"))
            say(f"member {i + 1} of {len(label_orders)}: label order {order}, seed {member.seed}")
            trained = train(
                dataset, out / "members" / str(i), model_config, search_config, member,
                resume=resume, on_start=lambda: None if models else on_start(), say=say,
                progress=progress,
            )  # fmt: skip
            models.append(trained.model)
        ensemble, space = Ensemble(models).eval(), models[0].label_space
        result = _calibrated(ensemble, space, dataset, config, Path(cache), progress)
        result.model.save(out / "best")
    return result


def _calibrated(
    ensemble: Ensemble,
    space: LabelSpace,
    dataset: Dataset,
    config: TrainConfig,
    cache: Path,
    progress: Progress,
) -> EnsembleResult:
    """Choose an ensemble's decisions on the validation split, and measure them there."""
    training, val = training_splits(dataset, config)
    targets = space.from_source(val.label_matrix(), val.label_names)
    unknown: torch.Tensor | None = None
    if val.has_unknown:
        unknown = space.from_source(val.unknown_matrix(), val.label_names)
    trained = torch.from_numpy(training.label_counts() > 0)[None]
    trained = space.from_source(trained, training.label_names)[0]
    if val.features is not None:
        features = torch.from_numpy(val.features)
    else:
        assert ensemble.backbone is not None
        cached = cached_features(
            ensemble.backbone, val, cache, device=ensemble.device,
            backend=config.backend, batch_size=config.batch_size, workers=config.workers or None,
            on_bad_image=config.on_bad_image, progress=progress,
        )  # fmt: skip
        features, targets = cached.values, targets[cached.kept]
        unknown = None if unknown is None else unknown[cached.kept]
    ensemble.calibrate(features, targets, trained, unknown)
    inference = ensemble.infer(features.to(ensemble.device))
    metrics = decision_metrics(inference, targets, ensemble.calibration, 3, unknown)
    return EnsembleResult(ensemble, metrics)
