"""The probabilistic classifier chain: labels one after another, linear in those before.

Letters: n images, B of one slice, F features, L labels, S sets that are followed at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.comparison.baselines import (
    DivergedError,
    Training,
    product_log_probs,
    train_in_two_stages,
)
from cnnrnn.config import ModelConfig
from cnnrnn.network.head import Trunk
from cnnrnn.network.losses import binary_cross_entropy
from cnnrnn.training.batches import Batch
from cnnrnn.training.loop import Validation
from cnnrnn.training.recipe import start_at_frequencies

BEAM = 16
SAMPLES = 64
SETS_AT_ONCE = 1 << 22  # values of label sets held while a chain is followed: 16 MB


class LabelsGiven(nn.Module):
    """A trunk whose label scores are linear in other labels of the image.

    Args:
        config: trunk and dropout.
        num_labels: L.
        feature_dim: F.
    """

    def __init__(self, config: ModelConfig, num_labels: int, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk.from_config(config, feature_dim)
        self.classifier = nn.Linear(self.trunk.output_dim, num_labels)
        self.given = nn.Parameter(torch.zeros(num_labels, num_labels))

    def influence(self) -> Tensor:
        """Return A [L, L]: what label j, present, adds to the score of label l."""
        raise NotImplementedError

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the logit of each label given those that it reads.

        Args:
            features: [B, F].
            targets: [B, L] bool.

        Returns:
            [B, L], columns as in `targets`.
        """
        scores: Tensor = self.classifier(self.trunk(features))
        return scores + functional.linear(targets.to(scores.dtype), self.influence())


class ProbabilisticChain(LabelsGiven):
    """A trunk whose label scores are linear in the labels that come earlier in the chain.

    Dembczynski et al. (ICML 2010): P(set | x) is the product over labels l of
    sigmoid(w_l . trunk(x) + b_l + sum over earlier j of A_lj y_j), which sums to 1 over all sets.

    Args:
        config: trunk and dropout.
        order: [L] int64, the labels as the chain takes them.
        feature_dim: F.
    """

    def __init__(self, config: ModelConfig, order: Tensor, feature_dim: int) -> None:
        super().__init__(config, len(order), feature_dim)
        self.order: Tensor
        self.register_buffer("order", order)

    def influence(self) -> Tensor:
        """Return A [L, L]: what label j, present, adds to the score of label l after it."""
        place = self.order.argsort()
        return self.given * (place < place[:, None])

    def set_log_probs(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return log P(the whole set | features), exactly: [n] float64 on the CPU.

        Args:
            features: [n, F].
            targets: [n, L] bool.
        """
        return given_log_probs(self, features, targets)

    @torch.no_grad()
    def best_sets(self, features: Tensor, beam: int = BEAM) -> Tensor:
        """Return the most probable set of each image that a beam search along the chain finds.

        Args:
            features: [n, F].
            beam: S, the sets that are kept after each label.

        Returns:
            [n, L] bool on the CPU.
        """
        influence = self.influence()
        parts = []
        for scores in self._scores(features, beam):
            B, L = scores.shape
            sets = scores.new_zeros(B, beam, L)
            log_probs = scores.new_full((B, beam), -torch.inf)
            log_probs[:, 0] = 0
            for label in self.order.tolist():
                logits = scores[:, label, None] + sets @ influence[label]
                absent, present = (functional.logsigmoid(x) for x in (-logits, logits))
                both = torch.cat([log_probs + absent, log_probs + present], dim=1)
                best = both.argsort(dim=1, descending=True, stable=True)[:, :beam]
                log_probs = both.gather(1, best)
                sets = sets.gather(1, (best % beam)[:, :, None].expand(-1, -1, L))
                sets[:, :, label] = (best >= beam).to(sets.dtype)
            parts.append(sets[:, 0].bool().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def marginals(self, features: Tensor, samples: int = SAMPLES, seed: int = 0) -> Tensor:
        """Estimate each label's probability from sets drawn along the chain.

        Sets are drawn label by label; the estimate is the mean over them of the label's probability
        given the labels drawn before it. The sets of a beam would give most rare labels 0.

        Args:
            features: [n, F].
            samples: S, sets drawn for each image.
            seed: of the draws.

        Returns:
            [n, L] on the CPU.
        """
        influence = self.influence()
        generator = torch.Generator(influence.device).manual_seed(seed)
        parts = []
        for scores in self._scores(features, samples):
            B, L = scores.shape
            sets = scores.new_zeros(B, samples, L)
            found = torch.zeros_like(scores)
            for label in self.order.tolist():
                p = (scores[:, label, None] + sets @ influence[label]).sigmoid()
                found[:, label] = p.mean(1)
                sets[:, :, label] = torch.bernoulli(p, generator=generator)
            parts.append(found.cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def marginals_given(
        self, features: Tensor, evidence: Tensor, samples: int = SAMPLES, seed: int = 0
    ) -> Tensor:
        """Estimate each label's probability given the known ones, by likelihood weighting.

        Sets are drawn along the chain with the known labels as they are; a set's weight is the
        probability that the chain gives those. The estimate is the weighted mean over the sets of
        the label's probability given all other labels of the set, so that the label itself is
        summed out and not drawn. It is biased by the weights' being normalised, and consistent: for
        many samples, and for any number of them where one label alone is not known, it is exact.

        Args:
            features: [n, F].
            evidence: [n, L] int8, see `cnnrnn.reveal`.
            samples: S, sets drawn for each image.
            seed: of the draws.

        Returns:
            [n, L] on the CPU; 1 and 0 of the known labels.
        """
        order = self.order
        influence = self.influence()[order][:, order]  # below: labels in the order of the chain
        generator = torch.Generator(influence.device).manual_seed(seed)
        found = torch.empty(evidence.shape)
        done = 0
        for scores in self._scores(features, samples):
            B, L = scores.shape
            known = evidence[done : done + B].to(scores.device)[:, order, None]
            sets = scores.new_zeros(B, samples, L)
            logits = torch.zeros_like(sets)
            log_weights = scores.new_zeros(B, samples)
            for i in range(L):
                given = scores[:, order[i], None] + sets @ influence[i]
                drawn = torch.bernoulli(given.sigmoid(), generator=generator)
                told = known[:, i] != 0
                sets[:, :, i] = torch.where(told, (known[:, i] > 0).to(drawn.dtype), drawn)
                signed = torch.where(known[:, i] > 0, given, -given)
                log_weights += functional.logsigmoid(signed).masked_fill(~told, 0)
                logits[:, :, i] = given
            weights, given_before = log_weights.softmax(1), logits.sigmoid()
            p = torch.empty(B, L, device=scores.device)
            for i in range(L):
                # What label i does, being there and not absent, to the probability of those after
                # it: log of (1 + (exp(A) - 1) q) for each absent one, q its probability without i.
                added, has = influence[i + 1 :, i], sets[:, :, i, None]
                factor = torch.where(has > 0, (-added).expm1(), added.expm1())
                rise = (1 - 2 * has[:, :, 0]) * (given_before[:, :, i + 1 :] * factor).log1p().sum(
                    2
                )
                odds = logits[:, :, i] + sets[:, :, i + 1 :] @ added - rise
                p[:, i] = (weights * odds.sigmoid()).sum(1)
            p = torch.where(known[:, :, 0] == 0, p, (known[:, :, 0] > 0).to(p.dtype))
            found[done : done + B, order.cpu()] = p.cpu()
            done += B
        return found

    def _scores(self, features: Tensor, sets: int) -> list[Tensor]:
        """Return scores without other labels [B, L], in slices that bound memory."""
        device, L = self.given.device, len(self.order)
        step = max(1, SETS_AT_ONCE // (sets * L))
        return [self.classifier(self.trunk(x.to(device))) for x in features.split(step)]


def train_chain(training: Training) -> ProbabilisticChain:
    """Train a probabilistic chain, most frequent label first, by teacher forcing.

    The loss is binary cross-entropy summed over labels, each given the true ones before it, which
    is -log P(the true set). The best epoch is the one with the least on validation data.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the loss on validation data did.
    """
    torch.manual_seed(training.config.seed)
    order = training.train.targets.sum(0).argsort(descending=True, stable=True)
    model = ProbabilisticChain(training.model_config, order, training.feature_dim)
    train_given_labels("chain", model, training, "NLL")
    return model


def train_given_labels(name: str, model: LabelsGiven, training: Training, measure: str) -> None:
    """Train a model that scores each label given true ones; it starts at the labels' log-odds.

    The loss is binary cross-entropy, summed over labels. The best epoch is the one with the least
    on validation data.

    Args:
        name: for messages and the log.
        model: trained in place.
        training: what on, and how.
        measure: what the loss is called in the log.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the loss on validation data did.
    """
    val = training.val
    start_at_frequencies(model.classifier, training.train.targets)

    def validate() -> Validation:
        loss = -float(given_log_probs(model, val.vectors, val.targets).mean())
        if not loss < float("inf"):
            raise DivergedError(
                f"the probabilities that the {name} gives the validation labels are no longer "
                "finite; lower learning_rate"
            )
        return Validation(-loss, {measure: loss})

    def batch_loss(batch: Batch) -> Tensor:
        return binary_cross_entropy(model(batch.inputs, batch.targets), batch.targets)

    train_in_two_stages(name, model, batch_loss, validate, training)


@torch.no_grad()
def given_log_probs(model: LabelsGiven, features: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over labels of the log-probability of each given the others it reads.

    Args:
        model: in eval mode.
        features: [n, F].
        targets: [n, L] bool.

    Returns:
        [n] float64 on the CPU.
    """
    device = next(model.parameters()).device
    parts = [
        product_log_probs(model(some.to(device), present.to(device)), present.to(device)).cpu()
        for some, present in zip(features.split(4096), targets.split(4096), strict=True)
    ]
    return torch.cat(parts)
