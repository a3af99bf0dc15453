"""What a training starts from: its model with a backbone's weights, and its splits as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrnn.config import ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.dataset import WRITE_ZERO
from cnnrnn.labels import first_label_space
from cnnrnn.machine.distributed import Ranks
from cnnrnn.machine.progress import Progress
from cnnrnn.machine.words import listed
from cnnrnn.model.checkpoint import FEATURES_ONLY
from cnnrnn.model.classifier import CNNRNN, load_backbone
from cnnrnn.network.backbones import Backbone, make_backbone
from cnnrnn.network.features import cached_features
from cnnrnn.network.head import Head
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.training.batches import Split
from cnnrnn.training.recipe import label_shares, start_at_frequencies, starts_trained


def new_model(
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


def check_known(train_data: Dataset, val_data: Dataset) -> None:
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
    form = replace(source.preprocessing, jpeg_draft=model_config.jpeg_draft)
    size = model_config.image_size
    source.preprocessing = form if size is None else replace(form, image_size=size)
    return source


def labelled_split(
    data: Dataset,
    model: CNNRNN,
    config: TrainConfig,
    device: torch.device,
    out: Path,
    progress: Progress,
    ranks: Ranks,
) -> Split:
    """Return a part of the data in the model's order of labels, with features of a frozen backbone.

    These are read from the feature cache, or computed and kept there.
    """
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
        model.backbone, data, folder, device=device, backend=config.backend,
        batch_size=config.batch_size, workers=config.workers or None,
        on_bad_image=config.on_bad_image, progress=progress, ranks=ranks,
    )  # fmt: skip
    kept = features.kept
    return Split(
        data.select(kept), targets[kept], features.values, ranks=ranks,
        unknown=None if unknown is None else unknown[kept],
    )  # fmt: skip


def fit_to_data(model: CNNRNN, training: Split, config: TrainConfig) -> None:
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


def run_facts(model: CNNRNN, training: Split, val: Split) -> dict[str, Any]:
    """Return what the first line of the log says of a run."""
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
