"""Methods that are not networks: scikit-learn's, canonical correlations, low-rank completion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnrnn.comparison.baselines import Scorer, product_log_probs
from cnnrnn.training.batches import Split

CCA_NEIGHBOURS = 50
LABEL_WEIGHT = 3.0
"""Root of the labels' variance beside the features', in low-rank completion."""


def fit_nearest_neighbours(train_split: Split, neighbours: int) -> Scorer:
    """Score a label by its share among the nearest training images, by Euclidean distance.

    Args:
        train_split: features and targets.
        neighbours: how many; at most the training images there are.
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(neighbours, len(train_split))
    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train_split.vectors.numpy())
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


def fit_cca(train_split: Split, ridge: float) -> Scorer:
    """Find neighbours where features and labels correlate most, and score labels by their shares.

    Canonical correlation analysis (Hotelling 1936) of features and label indicators, both centred:
    directions of features are kept with their correlations as weights, and neighbours are those
    with the largest cosine.

    Args:
        train_split: features and targets.
        ridge: added to the variance of every direction, in means of the features' variances; of the
            labels likewise.
    """
    features = train_split.vectors.double()
    targets = train_split.targets.double()
    mean = features.mean(0)
    centred = features - mean, targets - targets.mean(0)
    roots = [
        torch.linalg.cholesky(_with_ridge(part.T @ part / len(part), ridge)) for part in centred
    ]
    across = centred[0].T @ centred[1] / len(features)
    half = torch.linalg.solve_triangular(roots[0], across, upper=False)
    whitened = torch.linalg.solve_triangular(roots[1], half.T, upper=False).T
    directions, correlations, _ = torch.linalg.svd(whitened, full_matrices=False)
    directions = torch.linalg.solve_triangular(roots[0].T, directions, upper=True) * correlations

    def projected(some: Tensor) -> Tensor:
        joint = (some.double() - mean) @ directions
        return torch.nn.functional.normalize(joint).float()

    score = fit_nearest_neighbours(
        replace(train_split, features=projected(train_split.vectors)), CCA_NEIGHBOURS
    )
    return lambda some: score(projected(some))


def _with_ridge(covariance: Tensor, ridge: float) -> Tensor:
    """Return a covariance with a ridge in means of its variances, or 1 where all are 0."""
    variance = float(covariance.diag().mean()) or 1.0
    return covariance + ridge * variance * torch.eye(len(covariance), dtype=covariance.dtype)


@dataclass(frozen=True, eq=False)
class LowRankCompletion:
    """The label matrix completed beside the features, at low rank.

    Attributes:
        feature_mean: [F] float64.
        label_mean: [L] float64.
        weights: [F, L] float64, of the labels on the features.
        covariance: [L, L] float64, of the labels where the features are known.
    """

    feature_mean: Tensor
    label_mean: Tensor
    weights: Tensor
    covariance: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Complete the label rows of images: [n, F] to [n, L]."""
        return (
            self.label_mean.float()
            + ((features.double() - self.feature_mean) @ self.weights).float()
        )

    def given(self, features: Tensor, evidence: Tensor) -> Tensor:
        """Complete label rows of which some entries are known too.

        Args:
            features: [n, F].
            evidence: [n, L] int8, see `cnnrnn.reveal`.

        Returns:
            [n, L]; 1 and 0 of the known labels.
        """
        completed = self(features).double()
        for row, told in zip(completed, evidence, strict=True):
            known = told.nonzero()[:, 0]
            if len(known):
                surprise = (told[known] > 0).double() - row[known]
                among = self.covariance[known][:, known]
                row += self.covariance[:, known] @ torch.linalg.solve(among, surprise)
                row[known] = (told[known] > 0).double()
        return completed.float()


def fit_low_rank_completion(train_split: Split, rank: float) -> LowRankCompletion:
    """Fit a matrix of low rank to the labels and features of the training images, side by side.

    What a new image lacks of its row is completed from what it has: matrix completion for labels
    (Goldberg et al., NIPS 2010; Cabral et al., NIPS 2011) at a fixed rank, by probabilistic
    principal components (Tipping and Bishop 1999), which need no iteration: noise of the mean
    variance that is left over takes the place of their penalty.

    Args:
        train_split: features and targets.
        rank: of the matrix without the means; as large as there are columns less one at most.
    """
    features, targets = train_split.vectors.double(), train_split.targets.double()
    L = targets.shape[1]
    means = targets.mean(0), features.mean(0)
    blocks = [targets - means[0], features - means[1]]
    sizes = [max(float(block.square().sum(1).mean()), 1e-12) ** 0.5 for block in blocks]
    scales = sizes[0] / LABEL_WEIGHT, sizes[1]
    rows = torch.cat([block / scale for block, scale in zip(blocks, scales, strict=True)], 1)
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    r = min(int(rank), len(variances) - 1)
    noise = max(float(variances[:-r].mean()), 1e-8)
    loadings = directions[:, -r:] * (variances[-r:] - noise).clamp(min=0).sqrt()
    of_labels, of_features = loadings[:L], loadings[L:]
    precision = of_features.T @ of_features + noise * torch.eye(r, dtype=torch.float64)
    weights = torch.linalg.solve(precision, of_features.T).T @ of_labels.T
    spread = of_labels @ torch.linalg.solve(precision, of_labels.T) * noise
    covariance = spread + noise * torch.eye(L, dtype=torch.float64)
    return LowRankCompletion(
        means[1], means[0], weights * scales[0] / scales[1], covariance * scales[0] ** 2
    )


def _scaled(split: Split) -> tuple[npt.NDArray[np.float32], np.float32]:
    """Return features of mean norm 1, and what they were divided by."""
    features = split.vectors.numpy()
    mean = np.linalg.norm(features, axis=1).mean()
    scale = np.float32(mean if mean > 0 else 1.0)
    return (features / scale).astype(np.float32), scale


def _learnable(split: Split) -> list[int]:
    """Return the labels that some training images have and some lack."""
    some = split.targets.any(0) & ~split.targets.all(0)
    return some.nonzero()[:, 0].tolist()
