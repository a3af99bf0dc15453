"""`CNNRNN`: backbone, head, label names and decisions in one module that is saved and loaded."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnnrnn.config import Calibration, ModelConfig, SearchConfig, SearchDevice
from cnnrnn.labels import LabelSpace
from cnnrnn.model.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    CheckpointError,
    find_checkpoint,
    read_calibration,
    read_description,
    read_options,
    read_preprocessing,
    read_search,
    replace_folder,
    require_format,
    require_one_per_label,
    typed,
    write_description,
)
from cnnrnn.network.backbones import Architecture, Backbone, Stored, make_backbone
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.prediction.predictor import TorchPredictor
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.inference import Inference, infer, set_nll

FIRST_WITH_DRAFTS = 6
"""The first format whose preprocessing says whether JPEG files are decoded at a smaller size."""
FIRST_WITH_WEIGHTS = 5
"""The first format that names a file of the backbone's weights, and its architecture."""


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

        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
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
        raise CheckpointError(f"{file} does not describe a model: {error}") from error


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
            raise ValueError(f"architecture must have name and arguments, got {architecture}")
        architecture = Architecture(
            typed("architecture.name", architecture["name"], str),
            typed("architecture.arguments", architecture["arguments"], dict),
        )
    preprocessing = read_preprocessing(
        description["preprocessing"], drafts=description["format"] >= FIRST_WITH_DRAFTS
    )
    return Stored(preprocessing, architecture)


def load_backbone(path: str | Path) -> Backbone | None:
    """Read the backbone of a checkpoint and nothing else of it.

    Args:
        path: as of `load_checkpoint`.

    Returns:
        The backbone on the CPU, in eval mode; None of a model of feature vectors.

    Raises:
        CheckpointError: the folder is missing or incomplete, or its parts do not fit together.
    """
    from safetensors import SafetensorError, safe_open

    folder = find_checkpoint(path)
    description = _read_config(folder / CONFIG_FILE)
    try:
        config = read_options(ModelConfig, "model", description["model"])
        if description["preprocessing"] is None:
            return None
        backbone = make_backbone(config, _stored_backbone(description))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a backbone: {error}"
        ) from error
    prefix = "backbone."
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            backbone.load_state_dict({n[len(prefix) :]: file.get_tensor(n) for n in names})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit its backbone: {reason}"
        ) from error
    return backbone.eval()


def _build(folder: Path, description: dict[str, Any], given: Backbone | None = None) -> CNNRNN:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = read_options(ModelConfig, "model", description["model"])
        labels = LabelSpace(
            tuple(typed("labels", description["labels"], list[str])),
            tuple(typed("source_index", description["source_index"], list[int])),
        )
        search = read_search(description["search"], description["format"])
        calibration = read_calibration(description["calibration"], description["format"])
        require_one_per_label(calibration, len(labels))
        feature_dim = typed("feature_dim", description["feature_dim"], int)
        head = Head.from_config(config, len(labels), feature_dim)
        head.max_labels = typed("max_labels", description["max_labels"], int)
        if head.max_labels < 0:
            raise ValueError(f"max_labels must be at least 0, got {head.max_labels}")
        backbone = given
        if given is not None and (given.name, given.feature_dim) != (config.backbone, feature_dim):
            raise ValueError(
                f"backbone must be {config.backbone} with {feature_dim} features, got {given.name} "
                f"with {given.feature_dim}"
            )
        if given is None and description["preprocessing"] is not None:
            backbone = make_backbone(config, _stored_backbone(description))
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a size beyond memory
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a model: {error}"
        ) from error
    model = CNNRNN(config, labels, head, backbone, search, calibration)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        if description["format"] == 1:  # had no scaling of features
            weights.setdefault("head.trunk.feature_scale", head.trunk.feature_scale)
        if given is not None:
            if any(name.startswith("backbone.") for name in weights):
                raise RuntimeError("it has a backbone of its own, and another was given")
            weights |= {f"backbone.{k}": v for k, v in given.state_dict().items()}
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not hold the weights of the model that "
            f"{CONFIG_FILE} describes: {reason}"
        ) from error
    return model.eval()
