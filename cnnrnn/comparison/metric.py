"""Metric learning for nearest neighbours: a linear map in which neighbours tell labels.

Letters: n images, B of a batch, R reference images, F features, L labels, D width of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnnrnn.comparison.baselines import (
    DivergedError,
    Training,
    network_outputs,
    train_in_two_stages,
)
from cnnrnn.config import ModelConfig
from cnnrnn.machine.devices import resolve_device
from cnnrnn.network.head import Trunk
from cnnrnn.training.batches import Batch, Split
from cnnrnn.training.loop import Validation
from cnnrnn.training.recipe import independent_validation

REFERENCES = 1024
"""Training images that those of a batch are compared with in training."""
SMOOTHING = 0.01
"""Weight of a label's share of the training images beside the neighbours' votes, in the loss."""


class NeighbourMetric(nn.Module):
    """Labels of the training images, weighted by their distance under a learned linear map.

    The probability of a label is sum_j w_j y_jl with w = softmax over j of -|Mx - Mx_j|^2: the soft
    neighbours of neighbourhood component analysis (Goldberger et al., NIPS 2004), fitted to the
    likelihood of the labels that they vote for as in TagProp (Guillaumin et al., ICCV 2009).

    Args:
        config: input dropout, and the joint width as D.
        training: the training images; not part of the state.
    """

    def __init__(self, config: ModelConfig, training: Split) -> None:
        super().__init__()
        feature_dim = training.vectors.shape[1]
        self.trunk = Trunk(feature_dim, 0, config.input_dropout, 0.0)
        self.projection = nn.Linear(feature_dim, config.joint_dim, bias=False)
        self.features: Tensor
        self.targets: Tensor
        self.register_buffer("features", training.vectors, persistent=False)
        self.register_buffer("targets", training.targets.float(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the vote of all training images: [B, F] to [B, L] in 0..1."""
        everything = torch.arange(len(self.features), device=features.device)
        none = torch.full((len(features),), -1, device=features.device)
        return self.votes(features, none, everything)

    def votes(self, features: Tensor, records: Tensor, references: Tensor) -> Tensor:
        """Return the vote of some training images.

        Args:
            features: [B, F].
            records: [B] which training image each is, -1 of none; it has no vote on itself.
            references: [R] the training images that vote.

        Returns:
            [B, L] in 0..1.
        """
        own = self.projection(self.trunk(features))
        others = self.projection(self.trunk(self.features[references]))
        squares = own.square().sum(1, keepdim=True) - 2 * own @ others.T + others.square().sum(1)
        itself = records[:, None] == references
        weights = (-squares).masked_fill(itself, -1e9).softmax(1)
        votes: Tensor = weights @ self.targets[references]
        return votes


def train_metric(training: Training) -> NeighbourMetric:
    """Learn the map by the binary cross-entropy of the votes, each image left out of its own.

    The best epoch has the largest O-F1 plus mAP of the votes of all training images.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the votes did.
    """
    config, val = training.config, training.val
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    model = NeighbourMetric(training.model_config, training.train)
    n = len(training.train)
    share = ((model.targets.sum(0) + 0.5) / (n + 1)).to(device)
    generator = torch.Generator().manual_seed(config.seed)

    def validate() -> Validation:
        votes = network_outputs(model, val.vectors)
        if not votes.isfinite().all():
            raise DivergedError("the votes are no longer finite; lower learning_rate")
        return independent_validation(votes, val.targets, val.unknown)

    def batch_loss(batch: Batch) -> Tensor:
        drawn = torch.randperm(n, generator=generator)[:REFERENCES]
        votes = model.votes(batch.inputs, batch.records.to(device), drawn.to(device)).float()
        p = (1 - SMOOTHING) * votes.clamp(0, 1) + SMOOTHING * share
        return -torch.where(batch.targets, p, 1 - p).log().sum(1)

    train_in_two_stages("metric", model, batch_loss, validate, training)
    return model
