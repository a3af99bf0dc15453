"""Each label given all others: the conditional dependency network and the pairwise CRF.

Both are trained on the true labels of the others and asked by Gibbs sampling, with the labels that
are known held fixed.

Letters: n images, B of one slice, F features, L labels, C Markov chains per image.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cnnrnn.comparison.baselines import Training
from cnnrnn.comparison.chains import SETS_AT_ONCE, LabelsGiven, train_given_labels
from cnnrnn.config import ModelConfig

CHAINS = 16
BURN_IN = 10
SWEEPS = 20
"""Of all labels in turn, after those of the burn-in."""


class DependencyNetwork(LabelsGiven):
    """P(label l | x, all other labels) = sigmoid(w_l . trunk(x) + b_l + sum over j of A_lj y_j).

    A has zeros on its diagonal. Where it is free, this is a conditional dependency network (Guo and
    Gu, IJCAI 2011): the labels' conditionals need not belong to one distribution, and what the
    sampler converges to may depend on the order of its steps. Where it is symmetric, they are those
    of the pairwise CRF P(set | x) ~ exp(sum_l f_l y_l + sum_{l<j} A_lj y_l y_j), from which the
    sampler draws; the loss is then its pseudo-likelihood (Besag 1975).

    Args:
        config: trunk and dropout.
        num_labels: L.
        feature_dim: F.
        symmetric: A is symmetric.
    """

    def __init__(
        self, config: ModelConfig, num_labels: int, feature_dim: int, *, symmetric: bool
    ) -> None:
        super().__init__(config, num_labels, feature_dim)
        self.symmetric = symmetric

    def influence(self) -> Tensor:
        """Return A [L, L]: what label j, present, adds to the score of label l."""
        A = self.given + self.given.T if self.symmetric else self.given
        return A - A.diag().diag()

    @torch.no_grad()
    def marginals(
        self,
        features: Tensor,
        evidence: Tensor | None = None,
        chains: int = CHAINS,
        sweeps: int = SWEEPS,
        seed: int = 0,
    ) -> Tensor:
        """Estimate each label's probability given the known ones, by Gibbs sampling.

        The chains start from the sets of the known labels. The estimate is the mean over chains
        and sweeps of the label's probability given all others, from which it is then drawn.

        Args:
            features: [n, F].
            evidence: [n, L] int8, see `cnnrnn.reveal`; None where nothing is known.
            chains: C, for each image.
            sweeps: through all labels, after `BURN_IN`.
            seed: of the draws.

        Returns:
            [n, L] on the CPU; 1 and 0 of the known labels.
        """
        device, L = self.given.device, self.classifier.out_features
        if evidence is None:
            evidence = torch.zeros(len(features), L, dtype=torch.int8)
        influence = self.influence()
        columns = influence.T.contiguous()
        generator = torch.Generator(device).manual_seed(seed)
        step = max(1, SETS_AT_ONCE // (chains * L))
        parts = []
        for some, told in zip(features.split(step), evidence.split(step), strict=True):
            known = told.to(device).T.repeat_interleave(chains, 1)  # [L, B * C], as sets and total
            sets = (known == 1).to(influence.dtype)
            alone = self.classifier(self.trunk(some.to(device))).repeat_interleave(chains, 0)
            logits = (alone + sets.T @ columns).contiguous()  # [B * C, L]: few rows change at once
            total = torch.zeros_like(sets)
            for sweep in range(BURN_IN + sweeps):
                for label in range(L):
                    p = logits[:, label].sigmoid()
                    if sweep >= BURN_IN:
                        total[label] += p
                    drawn = torch.rand(p.shape, generator=generator, device=device) < p
                    change = (drawn.to(p.dtype) - sets[label]) * (known[label] == 0)
                    changed = change.nonzero()[:, 0]
                    sets[label] += change
                    logits.index_add_(0, changed, change[changed, None] * columns[label])
            found = (total / sweeps).view(L, -1, chains).mean(2).T
            told = told.to(device)
            parts.append(torch.where(told == 0, found, (told > 0).to(found.dtype)).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, L)


def train_dependencies(training: Training, kind: Literal["network", "crf"]) -> DependencyNetwork:
    """Train a dependency network or a pairwise CRF on the true labels of the others.

    The loss is binary cross-entropy summed over labels, each given all others as they truly are,
    which is -log of the pseudo-likelihood. The best epoch has the least on validation data.

    Args:
        training: what on, and how.
        kind: `network` for a free A, `crf` for a symmetric one.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the loss on validation data did.
    """
    torch.manual_seed(training.config.seed)
    L, F = training.num_labels, training.feature_dim
    model = DependencyNetwork(training.model_config, L, F, symmetric=kind == "crf")
    train_given_labels(kind, model, training, "pseudo-NLL")
    return model
