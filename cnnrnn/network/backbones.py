"""Image networks: a small one in plain torch, and every model of timm by its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnnrnn.config import MAX_WIDTH, ModelConfig, Preprocessing
from cnnrnn.data.files import reason, short
from cnnrnn.network.download import hub_address, is_reachable
from cnnrnn.network.weights import load_weights

HUB, LOCAL = "hf-hub:", "local-dir:"
ELSEWHERE = (HUB, LOCAL)
"""How names begin that lead to a network which timm's list does not have."""
MOST_CALLS = 100_000
"""Calls of torch in which a network is built and run once: three times those of timm's largest."""
MOST_IN_LIST = 64
"""Entries of a list, such as of stages, that a checkpoint's network is built from."""

SMALL_IMAGE_SIZE = 64
SMALLEST_IMAGE_SIZE = 16  # four stages halve it
SMALL_WIDTHS = (16, 32, 64, 128)
SMALL_RESIDUAL_FROM = 64  # in narrower stages the resolution makes a block expensive


class DownloadError(OSError):
    """Pretrained weights cannot be downloaded."""


class Backbone(nn.Module):
    """A network from normalised images to feature vectors.

    Attributes:
        name: `small` or timm's name.
        feature_dim: F, found by a trial forward pass where it is not given.
        preprocessing: what turns a decoded image into its input.
        architecture: what timm builds it from, where its name leads elsewhere; else None.
        origin: a sentence that says which weights it was given, or "".
        trainings: how often it was put in training mode, after which its weights may be others.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        preprocessing: Preprocessing,
        architecture: Architecture | None = None,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.preprocessing = preprocessing
        self.architecture = architecture
        self.origin = ""
        self.trainings = 0
        self.feature_dim = self._trial_feature_dim() if feature_dim is None else feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, F] of normalised images [B, 3, S, S]."""
        features: Tensor = self.network(images)
        return features

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, or eval mode."""
        self.trainings += mode
        return super().train(mode)

    @torch.no_grad()
    def _trial_feature_dim(self) -> int:
        side = self.preprocessing.image_size
        was_training = self.network.training
        output = self.network.eval()(torch.zeros(1, 3, side, side))
        self.network.train(was_training)
        if output.dim() != 2:
            raise ValueError(
                f"backbone {self.name} must give features [B, F], got {list(output.shape)}"
            )
        return int(output.shape[1])


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_norm(self.first(x)).relu()
        return torch.relu(x + self.second_norm(self.second(inner)))


class _AverageAndMax(nn.Module):
    """Pools [B, C, H, W] to [B, 2C]: the maximum keeps objects of a few pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def small_network() -> nn.Sequential:
    """Return the network of the demo model: four pooled stages, 0.5 million weights.

    The first layers keep full resolution and pooling takes the maximum, because what matters may
    be a few pixels wide.
    """
    layers: list[nn.Module] = []
    previous = 3
    for width in SMALL_WIDTHS:
        layers += [
            nn.Conv2d(previous, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        if width >= SMALL_RESIDUAL_FROM:
            layers.append(_ResidualBlock(width))
        previous = width
    return nn.Sequential(*layers, _AverageAndMax())


class Architecture(NamedTuple):
    """What timm builds a network from, where the name of a backbone leads elsewhere.

    Attributes:
        name: of timm's model.
        arguments: of its constructor, as JSON can hold them.
    """

    name: str
    arguments: dict[str, Any]


class Stored(NamedTuple):
    """What a checkpoint says of its backbone.

    Attributes:
        preprocessing: of its images.
        architecture: of a backbone whose name leads elsewhere, or None.
        feature_dim: F, where it is known.
    """

    preprocessing: Preprocessing
    architecture: Architecture | None = None
    feature_dim: int | None = None


class _WithoutValues(TorchFunctionMode):
    """Counts calls of torch, in this thread alone, and raises a ValueError after too many.

    Nothing is drawn: torch draws tensors without values in Python, after an import of seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise ValueError("it has more layers than any network")
        if function is Tensor.normal_:
            return args[0]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Build networks whose weights have shapes and types alone: they take no memory.

    Raises:
        ValueError: a network has more layers than any.
    """
    with torch.device("meta"), _WithoutValues():
        yield


def make_backbone(config: ModelConfig, stored: Stored | None = None) -> Backbone:
    """Build the backbone that a `ModelConfig` names.

    Args:
        config: `backbone`, `pretrained`, `weights` and `image_size` are read.
        stored: what a checkpoint says of it, whose weights follow: nothing is downloaded or read.

    Raises:
        ModuleNotFoundError: a timm backbone without the `vision` extra.
        WeightsError: `weights` cannot be read, or do not fit.
        DownloadError: pretrained weights, or what a name leads to, cannot be downloaded.
        ValueError: timm knows no such model.
    """
    if config.backbone == "small":
        own = Preprocessing(config.image_size or SMALL_IMAGE_SIZE, jpeg_draft=config.jpeg_draft)
        form = own if stored is None else stored.preprocessing
        if form.image_size < SMALLEST_IMAGE_SIZE:
            raise ValueError(
                f"image_size must be at least {SMALLEST_IMAGE_SIZE} for backbone small, got "
                f"{form.image_size}"
            )
        backbone = Backbone("small", small_network(), form, feature_dim=2 * SMALL_WIDTHS[-1])
    elif stored is None:
        backbone = _timm_backbone(config, None)
    else:
        backbone = _stored_backbone(config, stored)
    if stored is None and config.weights is not None:
        backbone.origin = load_weights(backbone.network, config.weights, config.backbone)
    return backbone


def _stored_backbone(config: ModelConfig, stored: Stored) -> Backbone:
    """Build what a checkpoint describes, which a network's own code may find no sense in."""
    try:
        return _timm_backbone(config, stored)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(
            f"backbone {short(config.backbone)} cannot be built: {reason(error)}"
        ) from error


def _timm_backbone(config: ModelConfig, stored: Stored | None) -> Backbone:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"backbone {config.backbone!r} comes from timm: "
            'run `pip install "cnnrnn[vision]"`, or use backbone="small"'
        ) from error
    elsewhere = config.backbone.startswith(ELSEWHERE)
    size = config.image_size
    architecture = None if stored is None else stored.architecture
    if stored is not None and elsewhere != (architecture is not None):
        raise ValueError(
            f"backbone {short(config.backbone)} must come with an architecture if its name leads "
            f"elsewhere, got {short(architecture)}"
        )
    if architecture is not None:
        _check_arguments(architecture)
        network = timm.create_model(
            architecture.name, pretrained=False, num_classes=0, **architecture.arguments
        )
    else:
        if not elsewhere and not timm.is_model(config.backbone):
            close = ", ".join(timm.list_models(f"*{config.backbone[:6]}*")[:5])
            raise ValueError(
                f"backbone must be small or the name of a timm model, or begin with "
                f"{' or '.join(ELSEWHERE)}, got {short(config.backbone)}"
                + (f"; timm has {close}" if close else "")
            )
        fixed = None if elsewhere else timm.get_pretrained_cfg(config.backbone)
        resized = size is not None and fixed is not None and fixed.fixed_input_size
        options = {"img_size": size} if resized else {}
        pretrained = config.pretrained and stored is None and config.weights is None
        network = _created(config.backbone, pretrained, options)
        if elsewhere:
            arguments = dict(network._model_args)  # as timm keeps them for checkpoints of its own
            arguments.pop("num_classes", None)
            architecture = Architecture(str(network.pretrained_cfg["architecture"]), arguments)
            _check_arguments(architecture)
    data = resolve_model_data_config(network)
    preprocessing = Preprocessing(
        image_size=size or int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bicubic" if data["interpolation"] == "bicubic" else "bilinear",
        jpeg_draft=config.jpeg_draft,
    )
    if stored is None:
        return Backbone(config.backbone, network, preprocessing, architecture)
    return Backbone(
        config.backbone, network, stored.preprocessing, architecture, stored.feature_dim
    )


def _created(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """Let timm build a network; fail in seconds where something cannot be downloaded."""
    import timm

    if pretrained or name.startswith(HUB):
        _require_download(name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except OSError as error:  # what the libraries of downloads raise
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, FileNotFoundError) and name.startswith(LOCAL):
            raise ValueError(f"backbone {name} must be a folder of timm's: {reason}") from error
        raise DownloadError(f"{_undownloadable(name)}: {reason}") from error


def _require_download(name: str) -> None:
    """Fail if the hub does not answer and nothing of what it would be asked for is kept here."""
    import timm

    if name.startswith(LOCAL):
        return
    if name.startswith(HUB):
        repository: str | None = name.partition(":")[2]
        address = hub_address()
    else:
        pretrained = timm.get_pretrained_cfg(name)
        repository = None if pretrained is None else pretrained.hf_hub_id
        address = hub_address() if repository or pretrained is None else pretrained.url or ""
    if not address or (repository and _is_kept(repository)) or is_reachable(address):
        return
    raise DownloadError(f"{_undownloadable(name)}: {address} does not answer")


def _is_kept(repository: str) -> bool:
    """Tell whether weights of a repository of the hub are in its cache."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


def _undownloadable(name: str) -> str:
    if name.startswith(HUB):
        return (
            f"backbone {name} cannot be downloaded. {LOCAL}FOLDER takes a network from a folder, "
            "and --init_backbone from another checkpoint"
        )
    return (
        f"the pretrained weights of backbone {name} cannot be downloaded. --model.weights FILE "
        "takes them from a file, --init_backbone from another checkpoint, and --model.pretrained "
        "false starts from random ones"
    )


def _check_arguments(architecture: Architecture) -> None:
    """Refuse arguments that are not the network's own, or that JSON cannot hold.

    They may come from a file of somebody else, and timm's `create_model` reads files.
    """
    import timm

    if not timm.is_model(architecture.name):
        raise ValueError(
            f"architecture must be the name of a timm model, got {short(architecture.name)}"
        )
    own = inspect.signature(timm.create_model).parameters.keys() | {"features_only", "device"}
    for name, value in architecture.arguments.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        plain = len(parts) <= MOST_IN_LIST and all(map(_is_plain, parts))
        if name in own or name.startswith("pretrained") or not plain:
            raise ValueError(
                f"backbone {architecture.name} must not be built with {short(name)}={short(value)}"
            )


def _is_plain(value: object) -> bool:
    """Tell whether a value is one that JSON can hold, and a number one that a network can have."""
    if isinstance(value, (int, float)):
        return abs(value) <= MAX_WIDTH
    return value is None or isinstance(value, str)
