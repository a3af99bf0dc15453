"""Image networks: a small one in plain torch, and every model of timm by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnrnn.config import ModelConfig, Preprocessing

SMALL_IMAGE_SIZE = 64
SMALLEST_IMAGE_SIZE = 16  # four stages halve it
SMALL_WIDTHS = (16, 32, 64, 128)
SMALL_RESIDUAL_FROM = 64  # in narrower stages the resolution makes a block expensive


class Backbone(nn.Module):
    """A network from normalised images to feature vectors.

    Attributes:
        name: `small` or timm's name.
        feature_dim: F, found by a trial forward pass.
        preprocessing: what turns a decoded image into its input.
    """

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.preprocessing = preprocessing
        self.feature_dim = self._trial_feature_dim()

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, F] of normalised images [B, 3, S, S]."""
        features: Tensor = self.network(images)
        return features

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


def make_backbone(config: ModelConfig, *, load_pretrained: bool = True) -> Backbone:
    """Build the backbone that a `ModelConfig` names.

    Args:
        config: `backbone`, `pretrained` and `image_size` are read.
        load_pretrained: False loads no pretrained weights, because a checkpoint's follow.

    Raises:
        ModuleNotFoundError: a timm backbone without the `vision` extra.
        ValueError: timm knows no such model.
    """
    if config.backbone == "small":
        size = config.image_size or SMALL_IMAGE_SIZE
        if size < SMALLEST_IMAGE_SIZE:
            raise ValueError(
                f"image_size must be at least {SMALLEST_IMAGE_SIZE} for backbone small, got {size}"
            )
        return Backbone("small", small_network(), Preprocessing(image_size=size))
    return _timm_backbone(config, config.pretrained and load_pretrained)


def _timm_backbone(config: ModelConfig, pretrained: bool) -> Backbone:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"backbone {config.backbone!r} comes from timm: "
            'run `pip install "cnnrnn[vision]"`, or use backbone="small"'
        ) from error
    if not timm.is_model(config.backbone):
        close = ", ".join(timm.list_models(f"*{config.backbone[:6]}*")[:5])
        raise ValueError(
            f"backbone must be small or the name of a timm model, got {config.backbone!r}"
            + (f"; timm has {close}" if close else "")
        )
    fixed = timm.get_pretrained_cfg(config.backbone)
    resized = config.image_size is not None and fixed is not None and fixed.fixed_input_size
    options: dict[str, Any] = {"img_size": config.image_size} if resized else {}
    network = timm.create_model(config.backbone, pretrained=pretrained, num_classes=0, **options)
    data = resolve_model_data_config(network)
    preprocessing = Preprocessing(
        image_size=config.image_size or int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bicubic" if data["interpolation"] == "bicubic" else "bilinear",
    )
    return Backbone(config.backbone, network, preprocessing)
