"""The neural methods of the comparison: other losses, and other heads, on the same features.

A neural baseline is the path model's trunk with one score per label. It is trained as the path
model is: a second stage goes on from the best epoch of the first at a lower learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.comparison.losses import (
    asymmetric_loss,
    softmax_cross_entropy,
    squared_error,
    warp_loss,
)
from cnnrnn.config import ModelConfig, TrainConfig
from cnnrnn.machine.devices import resolve_device
from cnnrnn.metrics import at_least, best_k, best_threshold, threshold_sets, top_k_sets
from cnnrnn.network.head import Head, Trunk
from cnnrnn.network.losses import binary_cross_entropy
from cnnrnn.network.recurrence import LSTMRecurrence
from cnnrnn.prediction.decisions import mean_average_precision
from cnnrnn.training.batches import Batch, Split
from cnnrnn.training.log import Log
from cnnrnn.training.loop import Stage, Validation, run_stage
from cnnrnn.training.recipe import start_at_frequencies

Loss = Literal["bce", "softmax", "warp", "squared", "asl", "poly", "two-way", "zlpr", "db"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""[B, L] scores and [B, L] bool targets to [B] losses."""
Scorer = Callable[[Tensor], Tensor]
"""Scores of feature vectors: [n, F] to [n, L], both on the CPU."""

SHUT = -1e4
"""A gate's bias at which its sigmoid is 0, whatever a label adds."""


class DivergedError(ValueError):
    """The scores of a baseline are no longer finite."""


@dataclass(frozen=True)
class Objective:
    """What a loss is, and how its scores are read.

    Attributes:
        loss: makes the loss for training targets [n, L] bool, on the device of the batches.
        read: [n, L] outputs of the network to what is ranked and cut.
        by_k: the scores are compared within an image, so that a number of labels per image is
            tried besides a threshold.
        starts_at_frequencies: a label's score starts at its log-odds in training, as the chain
            term's does.
    """

    loss: Callable[[Tensor], LossFunction]
    read: Callable[[Tensor], Tensor]
    by_k: bool = False
    starts_at_frequencies: bool = False


def _plain(loss: LossFunction) -> Callable[[Tensor], LossFunction]:
    """Return a loss that is the same for all training targets."""
    return lambda targets: loss


def _poly(targets: Tensor) -> LossFunction:
    from timm.loss import PolyBinaryCrossEntropy

    loss = PolyBinaryCrossEntropy(reduction="none")
    return lambda scores, present: loss(scores, present).sum(1)


def _two_way(targets: Tensor) -> LossFunction:
    """One loss of the whole batch, as it compares images too: each image bears it."""
    from timm.loss import TwoWayLoss

    loss = TwoWayLoss()
    return lambda scores, present: loss(scores, present).expand(len(scores))


def _zlpr(targets: Tensor) -> LossFunction:
    from timm.loss import ZlprLoss

    loss: LossFunction = torch.vmap(ZlprLoss())
    return loss


def _distribution_balanced(targets: Tensor) -> LossFunction:
    from timm.loss import DistributionBalancedLoss

    loss = DistributionBalancedLoss(targets.sum(0), max(len(targets), 2), reduction="none")
    loss.to(targets.device)
    return lambda scores, present: loss(scores, present).sum(1)


OBJECTIVES: dict[Loss, Objective] = {
    "bce": Objective(_plain(binary_cross_entropy), torch.sigmoid, starts_at_frequencies=True),
    "softmax": Objective(
        _plain(softmax_cross_entropy), lambda scores: scores.softmax(1), by_k=True
    ),
    "warp": Objective(_plain(warp_loss), lambda scores: scores, by_k=True),
    "squared": Objective(_plain(squared_error), lambda scores: scores),
    "asl": Objective(_plain(asymmetric_loss), torch.sigmoid, starts_at_frequencies=True),
    "poly": Objective(_poly, torch.sigmoid, starts_at_frequencies=True),
    "two-way": Objective(_two_way, lambda scores: scores, by_k=True),
    "zlpr": Objective(_zlpr, torch.sigmoid, by_k=True, starts_at_frequencies=True),
    "db": Objective(_distribution_balanced, torch.sigmoid, starts_at_frequencies=True),
}

TIMM_LOSSES: tuple[Loss, ...] = ("poly", "two-way", "zlpr", "db")
"""The losses that are timm's."""
TIMM_WITH_LOSSES = (1, 0, 31)
"""The first release of timm that has them."""


@dataclass(frozen=True)
class Cut:
    """How scores become label sets: the k best of an image, or those from a threshold on.

    Attributes:
        value: the measure that it was chosen by, on the data that it was chosen on.
        k: labels per image, or None.
        threshold: smallest score of a label that is taken, or None.
        min_labels: sets of fewer labels take their best-scored ones besides.
    """

    value: float
    k: int | None = None
    threshold: float | None = None
    min_labels: int = 0

    def sets(self, scores: Tensor) -> Tensor:
        """Return the label sets of scores [n, L]: [n, L] bool."""
        if self.k is not None:
            return top_k_sets(scores, self.k)
        assert self.threshold is not None
        return at_least(threshold_sets(scores, self.threshold), scores, self.min_labels)


def choose_cut(
    scores: Tensor,
    targets: Tensor,
    unknown: Tensor | None = None,
    *,
    by_k: bool = False,
    metric: Literal["O-F1", "C-F1", "exact-match"] = "O-F1",
) -> Cut:
    """Choose the threshold, or with `by_k` the threshold or k, that is best on validation data.

    A threshold is tried with and without the rule that a set has at least one label. Of equally
    good cuts k is taken, then the one with that rule.

    Args:
        scores: [n, L] of the validation images.
        targets: [n, L] bool.
        unknown: [n, L] bool, labels that are neither present nor absent.
        by_k: also try every k, which goes by O-F1 or exact match alone.
        metric: what to maximise.
    """
    cuts = []
    if by_k:
        assert metric != "C-F1"
        k, value = best_k(scores, targets, metric, unknown)
        cuts.append(Cut(value, k=k))
    for min_labels in (1, 0):
        threshold, value = best_threshold(scores, targets, metric, min_labels, unknown)
        cuts.append(Cut(value, threshold=threshold, min_labels=min_labels))
    return max(cuts, key=lambda cut: cut.value)


class IndependentClassifier(nn.Module):
    """A trunk with one score per label: features [B, F] to scores [B, L]."""

    def __init__(self, config: ModelConfig, num_labels: int, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk.from_config(config, feature_dim)
        self.classifier = nn.Linear(self.trunk.output_dim, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """Return one score per label, before sigmoid or softmax."""
        scores: Tensor = self.classifier(self.trunk(features))
        return scores


class JointEmbedding(nn.Module):
    """Image and labels in one space of D dimensions, as WSABIE (Weston et al., IJCAI 2011, eq. 1).

    A label's score is the inner product of its embedding and the projected image, f_l = u_l^T V x:
    features [B, F] to scores [B, L]. Weight decay stands for WSABIE's bounds on the norms.
    """

    def __init__(self, config: ModelConfig, num_labels: int, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk(
            feature_dim, config.trunk_dim, config.input_dropout, config.hidden_dropout
        )
        self.image_projection = nn.Linear(self.trunk.output_dim, config.joint_dim, bias=False)
        self.joint_dropout = nn.Dropout(config.joint_dropout)
        self.label_embedding = nn.Linear(config.joint_dim, num_labels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return one score per label."""
        joint = self.joint_dropout(self.image_projection(self.trunk(features)))
        scores: Tensor = self.label_embedding(joint)
        return scores


@dataclass(frozen=True)
class Training:
    """What a network is trained on, and how.

    Attributes:
        train: training features.
        val: validation features, which choose the best epoch.
        model_config: trunk, dropout and joint width.
        config: the recipe; epochs of the second stage are those of the path model's.
        say: gets one line per epoch.
    """

    train: Split
    val: Split
    model_config: ModelConfig
    config: TrainConfig
    say: Callable[[str], None] = lambda line: None

    @property
    def num_labels(self) -> int:
        """L."""
        return self.train.targets.shape[1]

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.train.vectors.shape[1]


def train_independent(
    training: Training,
    loss: Loss,
    network: type[IndependentClassifier] | type[JointEmbedding] = IndependentClassifier,
) -> IndependentClassifier | JointEmbedding:
    """Train a baseline on a key of `OBJECTIVES`, with early stopping on O-F1 plus mAP.

    O-F1 is at the best cut of the loss, see `choose_cut`.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the scores did.
    """
    targets, val = training.train.targets, training.val
    torch.manual_seed(training.config.seed)
    model = network(training.model_config, training.num_labels, training.feature_dim)
    objective = OBJECTIVES[loss]
    if objective.starts_at_frequencies and isinstance(model, IndependentClassifier):
        start_at_frequencies(model.classifier, targets, training.train.unknown)
    loss_of = objective.loss(targets.to(resolve_device(training.config.device)))

    def validate() -> Validation:
        scores = predicted_scores(model, val, loss)
        if not scores.isfinite().all():
            raise DivergedError(
                f"the scores of the validation images are no longer finite under loss {loss}; "
                "lower learning_rate"
            )
        of1 = choose_cut(scores, val.targets, val.unknown, by_k=objective.by_k).value
        mean_ap = mean_average_precision(scores, val.targets, val.unknown)
        return Validation(of1 + mean_ap, {"O-F1": of1, "mAP": mean_ap})

    def batch_loss(batch: Batch) -> Tensor:
        scores = model(batch.inputs)
        if loss == "bce":
            return binary_cross_entropy(scores, batch.targets, batch.unknown)
        return loss_of(scores, batch.targets)

    train_in_two_stages(loss, model, batch_loss, validate, training)
    return model


def train_in_two_stages(
    name: str,
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    validate: Callable[[], Validation],
    training: Training,
) -> None:
    """Train a module with the epochs of the path model, and restore its best epoch.

    Args:
        name: for messages and the log.
        model: trained in place, where the recipe says; has a `trunk`.
        loss: [B] losses of a batch.
        validate: measures the module, in eval mode.
        training: its seed draws the order of the images.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
    """
    config = training.config
    assert isinstance(model.trunk, Trunk)
    model.trunk.fit_scale(training.train.vectors, config.feature_rms)
    device = resolve_device(config.device)
    model.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    best = None
    stages = (
        ("first", config.warm_epochs + config.epochs, 1.0),
        ("second", config.finish_epochs, config.finish_scale),
    )
    for stage_name, epochs, scale in stages:
        if epochs:
            group = {"params": list(model.parameters()), "lr": config.learning_rate * scale}
            stage = Stage(f"{name} {stage_name}", epochs, model, [group], loss, validate)
            best = run_stage(
                stage, training.train, config,
                device=device, generator=generator, log=Log(None), say=training.say, best=best,
            )  # fmt: skip


@torch.no_grad()
def network_outputs(model: nn.Module, features: Tensor) -> Tensor:
    """Return what a network gives for feature vectors [n, F]: [n, L] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).float().cpu() for part in features.split(4096)])


def predicted_scores(model: nn.Module, split: Split, loss: Loss) -> Tensor:
    """Return scores [n, L] on the CPU, read as the loss means them."""
    return OBJECTIVES[loss].read(network_outputs(model, split.vectors))


def product_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log P(the whole set), the product over labels of what is said of each.

    Args:
        logits: [n, L] of each label's probability, on the device of `targets`.
        targets: [n, L] bool.

    Returns:
        [n] float64.
    """
    wide = logits.double()
    return functional.logsigmoid(torch.where(targets, wide, -wide)).sum(1)


def remove_recurrence(head: Head) -> None:
    """Make the recurrent state after a label a function of that label alone, and keep it so.

    The nearest to the paper's "No RNN", which has a linear layer there: training and search stay as
    they are, but what the model knows of a path is its last label. The weights from the state are
    0, the forget gate is shut, and both are frozen. Under `lstm` what is left is
    o(w) * tanh(i(w) * tanh(g(w))) of the label's embedding w, under `paper` x(w) * i(w) * g(w); the
    output projection reads it linearly.

    Args:
        head: a new head; its recurrence is changed in place.
    """
    H = head.hidden_dim
    recurrence = head.recurrence
    with torch.no_grad():
        recurrence.weight_hh.zero_()
        if isinstance(recurrence, LSTMRecurrence):
            recurrence.bias_hh.zero_()
            recurrence.bias_hh[H : 2 * H] = SHUT
            recurrence.bias_hh.requires_grad_(False)
        else:
            recurrence.weight_ih[2 * H : 3 * H] = 0  # and relu has no gradient at 0: it stays so
    recurrence.weight_hh.requires_grad_(False)
