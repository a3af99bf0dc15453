"""The probabilistic classifier chain: labels one after another, linear in those before.

Letters: n images, B of one slice, F features, L labels, S sets that are followed at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.comparison.baselines import DivergedError, product_log_probs, train_in_two_stages
from cnnrnn.config import ModelConfig, TrainConfig
from cnnrnn.machine.devices import resolve_device
from cnnrnn.network.head import Trunk
from cnnrnn.network.losses import binary_cross_entropy
from cnnrnn.training.batches import Batch, Split
from cnnrnn.training.log import Log
from cnnrnn.training.loop import Validation
from cnnrnn.training.recipe import start_at_frequencies

BEAM = 16
SAMPLES = 64
SETS_AT_ONCE = 1 << 22  # values of label sets held while a chain is followed: 16 MB


class ProbabilisticChain(nn.Module):
    """A trunk whose label scores are linear in the labels that come earlier in the chain.

    Dembczynski et al. (ICML 2010): P(set | x) is the product over labels l of
    sigmoid(w_l . trunk(x) + b_l + sum over earlier j of A_lj y_j), which sums to 1 over all sets.

    Args:
        config: trunk and dropout.
        order: [L] int64, the labels as the chain takes them.
        feature_dim: F.
    """

    def __init__(self, config: ModelConfig, order: Tensor, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk.from_config(config, feature_dim)
        self.classifier = nn.Linear(self.trunk.output_dim, len(order))
        self.given = nn.Parameter(torch.zeros(len(order), len(order)))
        self.order: Tensor
        self.register_buffer("order", order)

    def influence(self) -> Tensor:
        """Return A [L, L]: what label j, present, adds to the score of label l after it."""
        place = self.order.argsort()
        return self.given * (place < place[:, None])

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the logit of each label given the true ones before it.

        Args:
            features: [B, F].
            targets: [B, L] bool.

        Returns:
            [B, L], columns as in `targets`.
        """
        scores: Tensor = self.classifier(self.trunk(features))
        return scores + functional.linear(targets.to(scores.dtype), self.influence())

    def set_log_probs(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return log P(the whole set | features), exactly: [n] float64 on the CPU.

        Args:
            features: [n, F].
            targets: [n, L] bool.
        """
        device = self.given.device
        with torch.no_grad():
            parts = [
                product_log_probs(self(some.to(device), present.to(device)), present.to(device))
                for some, present in zip(features.split(4096), targets.split(4096), strict=True)
            ]
        return torch.cat(parts).cpu()

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
        for scores in self._sliced(features, beam):
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
        for scores in self._sliced(features, samples):
            B, L = scores.shape
            sets = scores.new_zeros(B, samples, L)
            found = torch.zeros_like(scores)
            for label in self.order.tolist():
                p = (scores[:, label, None] + sets @ influence[label]).sigmoid()
                found[:, label] = p.mean(1)
                sets[:, :, label] = torch.bernoulli(p, generator=generator)
            parts.append(found.cpu())
        return torch.cat(parts)

    def _sliced(self, features: Tensor, sets: int) -> list[Tensor]:
        """Return scores without other labels [B, L], in slices that bound memory."""
        device, L = self.given.device, len(self.order)
        step = max(1, SETS_AT_ONCE // (sets * L))
        return [self.classifier(self.trunk(x.to(device))) for x in features.split(step)]


def train_chain(
    train_split: Split,
    val_split: Split,
    model_config: ModelConfig,
    config: TrainConfig,
    *,
    network: type[ProbabilisticChain] = ProbabilisticChain,
    log: Log | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ProbabilisticChain:
    """Train a probabilistic chain, most frequent label first, by teacher forcing.

    The loss is binary cross-entropy summed over labels, each given the true ones before it, which
    is -log P(the true set). The best epoch is the one with the least on validation data.

    Args:
        train_split: training features.
        val_split: validation features.
        model_config: trunk and dropout.
        config: the recipe; epochs of the second stage are those of the path model's.
        network: what is trained; one with other influences has another loss.
        log: gets one record per epoch.
        say: gets one line per epoch.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the loss on validation data did.
    """
    assert train_split.features is not None and val_split.features is not None
    features, targets = val_split.features, val_split.targets
    torch.manual_seed(config.seed)
    order = train_split.targets.sum(0).argsort(descending=True, stable=True)
    model = network(model_config, order, train_split.features.shape[1])
    model.trunk.fit_scale(train_split.features, config.feature_rms)
    start_at_frequencies(model.classifier, train_split.targets)
    model.to(resolve_device(config.device))

    def validate() -> Validation:
        nll = -float(model.set_log_probs(features, targets).mean())
        if not nll < float("inf"):
            raise DivergedError(
                "the chain's probabilities of the validation sets are no longer finite; lower "
                "learning_rate"
            )
        return Validation(-nll, {"NLL": nll})

    def batch_loss(batch: Batch) -> Tensor:
        return binary_cross_entropy(model(batch.inputs, batch.targets), batch.targets)

    train_in_two_stages("chain", model, batch_loss, validate, train_split, config, log=log, say=say)
    return model
