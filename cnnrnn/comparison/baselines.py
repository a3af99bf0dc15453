"""The comparison methods: other losses, other heads, and scikit-learn's, on the same features.

A neural baseline is the path model's trunk with one score per label. It is trained as the path
model is: a second stage goes on from the best epoch of the first at a lower learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
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
    by_k: bool = False,
    metric: Literal["O-F1", "C-F1", "exact-match"] = "O-F1",
) -> Cut:
    """Choose the threshold, or with `by_k` the threshold or k, that is best on validation data.

    A threshold is tried with and without the rule that a set has at least one label. Of equally
    good cuts k is taken, then the one with that rule.

    Args:
        scores: [n, L] of the validation images.
        targets: [n, L] bool.
        by_k: also try every k, which goes by O-F1 or exact match alone.
        metric: what to maximise.
    """
    cuts = []
    if by_k:
        assert metric != "C-F1"
        k, value = best_k(scores, targets, metric)
        cuts.append(Cut(value, k=k))
    for min_labels in (1, 0):
        threshold, value = best_threshold(scores, targets, metric, min_labels)
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


def train_independent(
    train_split: Split,
    val_split: Split,
    loss: Loss,
    model_config: ModelConfig,
    config: TrainConfig,
    *,
    network: type[IndependentClassifier] | type[JointEmbedding] = IndependentClassifier,
    log: Log | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> IndependentClassifier | JointEmbedding:
    """Train a baseline in two stages, each with early stopping on O-F1 plus mAP.

    Args:
        train_split: training features.
        val_split: validation features; O-F1 is at the best cut of the loss, see `choose_cut`.
        loss: a key of `OBJECTIVES`.
        model_config: trunk, dropout and joint width.
        config: the recipe; epochs of the second stage are those of the path model's.
        network: what is trained.
        log: gets one record per epoch.
        say: gets one line per epoch.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the scores did.
    """
    assert train_split.features is not None and val_split.features is not None
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    model = network(model_config, train_split.targets.shape[1], train_split.features.shape[1]).to(
        device
    )
    model.trunk.fit_scale(train_split.features, config.feature_rms)
    objective = OBJECTIVES[loss]
    if objective.starts_at_frequencies and isinstance(model, IndependentClassifier):
        start_at_frequencies(model.classifier, train_split.targets)
    loss_of = objective.loss(train_split.targets.to(device))

    def validate() -> Validation:
        scores = predicted_scores(model, val_split, loss)
        if not scores.isfinite().all():
            raise DivergedError(
                f"the scores of the validation images are no longer finite under loss {loss}; "
                "lower learning_rate"
            )
        of1 = choose_cut(scores, val_split.targets, objective.by_k).value
        mean_ap = mean_average_precision(scores, val_split.targets)
        return Validation(of1 + mean_ap, {"O-F1": of1, "mAP": mean_ap})

    def batch_loss(batch: Batch) -> Tensor:
        return loss_of(model(batch.inputs), batch.targets)

    train_in_two_stages(loss, model, batch_loss, validate, train_split, config, log=log, say=say)
    return model


def train_in_two_stages(
    name: str,
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    validate: Callable[[], Validation],
    train_split: Split,
    config: TrainConfig,
    *,
    log: Log | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train a module with the epochs of the path model, and restore its best epoch.

    Args:
        name: for messages and the log.
        model: trained in place.
        loss: [B] losses of a batch.
        validate: measures the module, in eval mode.
        train_split: training features.
        config: the recipe; its seed draws the order of the images.
        log: gets one record per epoch.
        say: gets one line per epoch.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    device = next(model.parameters()).device
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
                stage, train_split, config,
                device=device, generator=generator, log=log or Log(None), say=say, best=best,
            )  # fmt: skip


@torch.no_grad()
def network_outputs(model: nn.Module, features: Tensor) -> Tensor:
    """Return what a network gives for feature vectors [n, F]: [n, L] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).float().cpu() for part in features.split(4096)])


def predicted_scores(model: nn.Module, split: Split, loss: Loss) -> Tensor:
    """Return scores [n, L] on the CPU, read as the loss means them."""
    assert split.features is not None
    return OBJECTIVES[loss].read(network_outputs(model, split.features))


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


def fit_nearest_neighbours(train_split: Split, neighbours: int) -> Scorer:
    """Score a label by its share among the nearest training images, by Euclidean distance.

    Args:
        train_split: features and targets.
        neighbours: how many; at most the training images there are.
    """
    from sklearn.neighbors import NearestNeighbors

    assert train_split.features is not None
    k = min(neighbours, len(train_split))
    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train_split.features.numpy())
    targets = train_split.targets.numpy().astype(np.float32)

    def score(features: Tensor) -> Tensor:
        parts = [
            index.kneighbors_graph(part.numpy()) @ targets / k  # [n, train] sparse
            for part in features.split(4096)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    return score


def fit_linear_svm(train_split: Split, C: float) -> Scorer:
    """Fit scikit-learn's `LinearSVC` (squared hinge) for each label; scores are its margins.

    Features are divided by the mean norm of the training features, so that C means the same
    whatever their scale. A label that all or none of the training images have gets +-infinity.

    Args:
        train_split: features and targets.
        C: weight of the errors beside the norm of the weights.
    """
    from sklearn.svm import LinearSVC

    features, scale = _scaled(train_split)
    wide = features.astype(np.float64)  # what liblinear computes with, converted once
    num_labels = train_split.targets.shape[1]
    weights = np.zeros((num_labels, features.shape[1]))
    bias = np.full(num_labels, np.inf)
    bias[~train_split.targets.any(0).numpy()] = -np.inf
    for label in _learnable(train_split):
        machine = LinearSVC(C=C, dual=False, tol=1e-3).fit(
            wide, train_split.targets[:, label].numpy()
        )
        weights[label], bias[label] = machine.coef_[0], machine.intercept_[0]

    def score(features: Tensor) -> Tensor:
        margins = features.numpy() / scale @ weights.T + bias
        return torch.from_numpy(margins.astype(np.float32))

    return score


@dataclass(frozen=True, eq=False)
class FittedChain:
    """A fitted chain of logistic regressions.

    Attributes:
        chain: scikit-learn's, or None where no label varies.
        learnable: the labels in it.
        scale: features are divided by it.
        shares: [L] share of the training images that have each label; (c + 1/2) / (n + 1) of c
            among n, so that nothing is impossible.
        constant: [L] float32, 1 for a label that all training images have.
    """

    chain: Any
    learnable: list[int]
    scale: np.float32
    shares: Tensor
    constant: npt.NDArray[np.float32]

    def __call__(self, features: Tensor) -> Tensor:
        """Return probabilities [n, L], each given the labels predicted before it."""
        scores = np.tile(self.constant, (len(features), 1))
        if self.chain is not None and len(features):
            scores[:, self.learnable] = self.chain.predict_proba(features.numpy() / self.scale)
        return torch.from_numpy(scores)

    def set_log_probs(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return log P(the whole set), each label given the true ones before it.

        A label that is not in the chain has its share of the training images as probability.

        Args:
            features: [n, F].
            targets: [n, L] bool.

        Returns:
            [n] float64.
        """
        logits = self.shares.logit().expand(len(features), -1).clone()
        if self.chain is not None and len(features):
            scaled = features.numpy() / self.scale
            labels = [self.learnable[i] for i in self.chain.order_]
            before = targets[:, labels].numpy().astype(np.float32)
            for i, (label, machine) in enumerate(zip(labels, self.chain.estimators_, strict=True)):
                read = np.concatenate([scaled, before[:, :i]], axis=1)
                logits[:, label] = torch.from_numpy(machine.decision_function(read))
        return product_log_probs(logits, targets)


def fit_classifier_chain(train_split: Split, C: float) -> FittedChain:
    """Fit scikit-learn's `ClassifierChain` of logistic regressions, most frequent label first.

    Read et al. (Machine Learning, 2011): each label's classifier reads the features and the labels
    before it, which in prediction are those already predicted. Features are scaled as for
    `fit_linear_svm`. A label that all or none of the training images have is not in the chain, its
    probability is 1 or 0.

    Args:
        train_split: features and targets.
        C: weight of the errors beside the norm of the weights.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multioutput import ClassifierChain

    features, scale = _scaled(train_split)
    targets = train_split.targets
    learnable = _learnable(train_split)
    counts = targets.sum(0)[learnable]
    constant = targets.all(0).numpy().astype(np.float32)
    chain = None
    if len(learnable):
        order = counts.argsort(descending=True, stable=True).tolist()
        logistic = LogisticRegression(C=C, tol=1e-5, max_iter=1000)
        chain = ClassifierChain(logistic, order=order)
        chain.fit(features, targets[:, learnable].numpy().astype(np.float32))

    shares = (targets.sum(0).double() + 0.5) / (len(targets) + 1)
    return FittedChain(chain, learnable, scale, shares, constant)


def _scaled(split: Split) -> tuple[npt.NDArray[np.float32], np.float32]:
    """Return features of mean norm 1, and what they were divided by."""
    assert split.features is not None
    features = split.features.numpy()
    mean = np.linalg.norm(features, axis=1).mean()
    scale = np.float32(mean if mean > 0 else 1.0)
    return (features / scale).astype(np.float32), scale


def _learnable(split: Split) -> list[int]:
    """Return the labels that some training images have and some lack."""
    some = split.targets.any(0) & ~split.targets.all(0)
    return some.nonzero()[:, 0].tolist()
