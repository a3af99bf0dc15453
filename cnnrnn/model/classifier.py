"""`CNNRNN`: backbone, head, label names and decisions in one module that is saved and loaded."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnrnn.config import MAX_PATH, Calibration, ModelConfig, SearchConfig, SearchDevice
from cnnrnn.data.files import reason, short
from cnnrnn.labels import LabelSpace
from cnnrnn.model.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    CheckpointError,
    Form,
    as_stored,
    find_checkpoint,
    forms,
    read_calibration,
    read_description,
    read_labels,
    read_options,
    read_preprocessing,
    read_search,
    read_weights,
    replace_folder,
    require_format,
    require_one_per_label,
    typed,
    write_description,
)
from cnnrnn.network.backbones import Architecture, Backbone, Stored, make_backbone, without_values
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.prediction.predictor import TorchPredictor
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.inference import Inference, infer, set_nll

FIRST_WITH_DRAFTS = 6
"""The first format whose preprocessing says whether JPEG files are decoded at a smaller size."""
FIRST_WITH_WEIGHTS = 5
"""The first format that names a file of the backbone's weights, and its architecture."""
FEATURE_SCALE = "head.trunk.feature_scale"
NO_MODEL = (TypeError, ValueError, RuntimeError, OverflowError)
"""What a description of no model raises; the last two are torch's, for sizes out of its reach."""


class CNNRNN(nn.Module, TorchPredictor):
    """A multi-label image classifier: images in, label paths out.

    Attributes:
        config: the architecture.
        label_space: names in path order and their place in the training data.
        backbone: the image network; None for a head trained on feature vectors.
        head: scores label paths.
        search: the search that `predict` runs by default.
        calibration: what the validation split decided.
    """

    def __init__(
        self,
        config: ModelConfig,
        label_space: LabelSpace,
        head: Head,
        backbone: Backbone | None,
        search: SearchConfig | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.label_space = label_space
        self.head = head
        self.backbone = backbone
        self.search = search or SearchConfig()
        self.calibration = calibration or Calibration()

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in path order, [L]."""
        return self.label_space.names

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.label_embedding.device

    @property
    def feature_dim(self) -> int:
        """F, the width of the feature vectors that the head reads."""
        return self.head.feature_dim

    def forward(self, images: Tensor) -> ImageEmbedding:
        """Embed normalised images [B, 3, S, S] for the search."""
        return self.head.embed(self.features(images))

    def infer(
        self,
        features: Tensor,
        search: SearchConfig | None = None,
        evidence: Tensor | None = None,
        search_device: SearchDevice = "auto",
    ) -> Inference:
        """Search feature vectors [n, F]; see `TorchPredictor.infer`."""
        return infer(self.head, features, search or self.search, evidence, search_device)

    def longest_path(self, search: SearchConfig) -> int:
        """Return how many labels a path of a search can hold."""
        return resolve_max_labels(self.head, search)

    def set_nll(self, features: Tensor, targets: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Return -log P(the whole true set | image) in nats, see `search.inference.set_nll`.

        Args:
            features: [n, F].
            targets: [n, L] bool, columns in the order of `labels`.
            unknown: [n, L] bool, labels that are neither present nor absent; the probability is
                then that of what is known, estimated.

        Returns:
            [n] float64; an upper bound where `search.order` is not `increasing`.
        """
        return set_nll(self.head, features.to(self.device), targets, self.search.order, unknown)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder, whole or not at all.

        Args:
            path: the folder; a former checkpoint there is replaced.
        """
        replace_folder(path, self.write)

    def write(self, folder: Path) -> None:
        """Write a checkpoint's files into a folder that is there."""
        from safetensors.torch import save_file

        save_file(as_stored(self.state_dict()), folder / WEIGHTS_FILE)
        write_description(folder, self.description())
        # safetensors makes its file for the owner alone; the umask decides, as for the other.
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint says of the model beside its weights, as JSON."""
        return {
            "format": FORMAT,
            "model": asdict(self.config),
            "feature_dim": self.head.feature_dim,
            "labels": list(self.label_space.names),
            "source_index": list(self.label_space.source_index),
            "preprocessing": None if self.backbone is None else asdict(self.backbone.preprocessing),
            "architecture": self._architecture(),
            "max_labels": self.head.max_labels,
            "search": asdict(self.search),
            "calibration": asdict(self.calibration),
        }

    def _architecture(self) -> dict[str, Any] | None:
        if self.backbone is None or self.backbone.architecture is None:
            return None
        return self.backbone.architecture._asdict()


def load_checkpoint(path: str | Path, backbone: Backbone | None = None) -> CNNRNN:
    """Read a checkpoint folder, or the best checkpoint of a training run's folder.

    Args:
        path: a folder written by `CNNRNN.save`, or one that holds such a folder as `best`.
        backbone: the image network of a checkpoint whose weights are the head's alone.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        CheckpointError: the folder is missing or incomplete, or its parts do not fit together.
    """
    found = find_checkpoint(path)
    return _build(found, _read_config(found / CONFIG_FILE), backbone)


def read_config(path: str | Path) -> tuple[ModelConfig, Stored]:
    """Read what a checkpoint of a model of images says of its architecture and backbone.

    Raises:
        CheckpointError: the folder is missing, or does not describe such a model.
    """
    file = find_checkpoint(path) / CONFIG_FILE
    description = _read_config(file)
    try:
        config = read_options(ModelConfig, "model", description["model"])
        return config, _stored_backbone(description)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a model: {reason(error)}") from error


def _read_config(file: Path) -> dict[str, Any]:
    description = read_description(file)
    if isinstance(description, dict) and "members" in description:
        raise CheckpointError(f"{file.parent} holds an ensemble; cnnrnn.load reads it")
    expected = {"format", "model", "feature_dim", "labels", "source_index", "preprocessing",
                "architecture", "max_labels", "search", "calibration"}  # fmt: skip
    if isinstance(description, dict) and description.get("format") in range(FIRST_WITH_WEIGHTS):
        description.setdefault("architecture", None)
    if not isinstance(description, dict) or not expected <= description.keys():
        missing = sorted(expected - set(description)) if isinstance(description, dict) else "object"
        raise CheckpointError(f"{file} lacks {missing}; it is not a checkpoint of cnnrnn")
    require_format(file, description["format"])
    if isinstance(description["model"], dict):
        if description["format"] == 1:
            description["model"].setdefault("tied_embedding", True)
        if description["format"] < FIRST_WITH_WEIGHTS:
            description["model"].setdefault("weights", None)
        if description["format"] < FIRST_WITH_DRAFTS:
            description["model"].setdefault("jpeg_draft", False)
    return description


def _stored_backbone(description: dict[str, Any]) -> Stored:
    """Read what a checkpoint says of its backbone, besides its name and size."""
    architecture = description["architecture"]
    if architecture is not None:
        typed("architecture", architecture, dict)
        if architecture.keys() != {"name", "arguments"}:
            raise ValueError(
                f"architecture must have name and arguments, got {short(architecture)}"
            )
        architecture = Architecture(
            typed("architecture.name", architecture["name"], str),
            typed("architecture.arguments", architecture["arguments"], dict),
        )
    preprocessing = read_preprocessing(
        description["preprocessing"], drafts=description["format"] >= FIRST_WITH_DRAFTS
    )
    return Stored(preprocessing, architecture)


class _Parts(NamedTuple):
    """What a description says of a model, checked but for the sizes.

    Attributes:
        config: the architecture.
        labels: names and their places.
        search: that of `predict`.
        calibration: of validation data.
        feature_dim: F.
        max_labels: of the head.
        stored: the backbone that the checkpoint has, or None.
    """

    config: ModelConfig
    labels: LabelSpace
    search: SearchConfig
    calibration: Calibration
    feature_dim: int
    max_labels: int
    stored: Stored | None

    def model(self) -> CNNRNN:
        """Build the model, with new weights."""
        head = Head.from_config(self.config, len(self.labels), self.feature_dim)
        head.max_labels = self.max_labels
        backbone = None if self.stored is None else make_backbone(self.config, self.stored)
        return CNNRNN(self.config, self.labels, head, backbone, self.search, self.calibration)


def _read_parts(description: dict[str, Any]) -> _Parts:
    form = description["format"]
    labels = LabelSpace(
        read_labels(description["labels"]),
        tuple(typed("source_index", description["source_index"], list[int])),
    )
    search = read_search(description["search"], form)
    calibration = read_calibration(description["calibration"], form)
    require_one_per_label(calibration, len(labels))
    max_labels = typed("max_labels", description["max_labels"], int)
    if not 0 <= max_labels <= MAX_PATH:
        raise ValueError(f"max_labels must be in 0..{MAX_PATH}, got {max_labels}")
    return _Parts(
        read_options(ModelConfig, "model", description["model"]),
        labels,
        search,
        calibration,
        typed("feature_dim", description["feature_dim"], int),
        max_labels,
        None if description["preprocessing"] is None else _stored_backbone(description),
    )


def load_backbone(path: str | Path) -> Backbone | None:
    """Read the backbone of a checkpoint and nothing else of it.

    Args:
        path: as of `load_checkpoint`.

    Returns:
        The backbone on the CPU, in eval mode; None of a model of feature vectors.

    Raises:
        CheckpointError: the folder is missing or incomplete, or its parts do not fit together.
    """
    folder = find_checkpoint(path)
    description = _read_config(folder / CONFIG_FILE)
    try:
        config = read_options(ModelConfig, "model", description["model"])
        if description["preprocessing"] is None:
            return None
        stored = _stored_backbone(description)
        with without_values():
            outline = make_backbone(config, stored)
    except NO_MODEL as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a backbone: {reason(error)}"
        ) from error
    prefix = "backbone."
    expected = {prefix + name: form for name, form in forms(outline.float().state_dict()).items()}
    weights = read_weights(folder / WEIGHTS_FILE, expected, {}, prefix)
    backbone = make_backbone(config, stored._replace(feature_dim=outline.feature_dim))
    backbone.load_state_dict({name.removeprefix(prefix): t for name, t in weights.items()})
    return backbone.eval()


def _build(folder: Path, description: dict[str, Any], given: Backbone | None = None) -> CNNRNN:
    try:
        parts = _read_parts(description)
        backbone, feature_dim = parts.config.backbone, parts.feature_dim
        if given is not None:
            parts = parts._replace(stored=None)
            if (given.name, given.feature_dim) != (backbone, feature_dim):
                raise ValueError(
                    f"backbone must be {short(backbone)} with {feature_dim} features, got "
                    f"{given.name} with {given.feature_dim}"
                )
        with without_values():
            outline = parts.model()
        resolve_max_labels(outline.head, parts.search)
        if outline.backbone is not None and outline.backbone.feature_dim != feature_dim:
            raise ValueError(
                f"feature_dim must be {outline.backbone.feature_dim}, as backbone "
                f"{short(backbone)} gives, got {feature_dim}"
            )
    except NO_MODEL as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a model: {reason(error)}"
        ) from error
    expected, L = forms(outline.float().state_dict()), len(parts.labels)
    optional = {"head.cooccurrence": Form("F32", (L, L))}
    if description["format"] == 1:  # had no scaling of features
        optional[FEATURE_SCALE] = expected.pop(FEATURE_SCALE)
    weights = read_weights(folder / WEIGHTS_FILE, expected, optional)
    # Only now, when the file has weights of these sizes, is memory taken for them.
    if parts.stored is not None:
        parts = parts._replace(stored=parts.stored._replace(feature_dim=feature_dim))
    model = parts.model()
    weights.setdefault(FEATURE_SCALE, model.head.trunk.feature_scale)
    model.load_state_dict(weights)
    if given is not None:
        model.backbone = given
    return model.eval()
