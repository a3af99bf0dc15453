"""Label combinations: the label sets of the training images as the classes of a softmax.

Letters: n images, F features, L labels, C combinations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.comparison.baselines import (
    DivergedError,
    Training,
    network_outputs,
    train_in_two_stages,
)
from cnnrnn.config import ModelConfig
from cnnrnn.network.head import Trunk
from cnnrnn.training.batches import Batch
from cnnrnn.training.loop import Validation
from cnnrnn.training.recipe import independent_validation

MOST_COMBINATIONS = 4096


def common_combinations(targets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the most frequent of the distinct label sets of training images, and their counts.

    Args:
        targets: [n, L] bool.
        most: so many at most.

    Returns:
        [C, L] bool, the most frequent first, of equally frequent ones in the order of `unique`;
        and [C] int64.
    """
    sets, counts = targets.unique(dim=0, return_counts=True)
    kept = counts.argsort(descending=True, stable=True)[:most]
    return sets[kept], counts[kept]


class LabelCombinations(nn.Module):
    """A softmax over whole label sets: features [B, F] to scores [B, C].

    As the label powerset method, with the most frequent sets alone (Read, Pfahringer and Holmes,
    ICDM 2008, prune so). Training images whose set is not among them teach nothing.

    Args:
        config: trunk and dropout.
        combinations: [C, L] bool.
        feature_dim: F.
    """

    def __init__(self, config: ModelConfig, combinations: Tensor, feature_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk.from_config(config, feature_dim)
        self.classifier = nn.Linear(self.trunk.output_dim, len(combinations))
        self.combinations: Tensor
        self.register_buffer("combinations", combinations)

    def forward(self, features: Tensor) -> Tensor:
        """Return one score per combination, before the softmax."""
        scores: Tensor = self.classifier(self.trunk(features))
        return scores

    def classes_of(self, targets: Tensor) -> Tensor:
        """Return the combination that each label set [n, L] is: [n] int64, -1 of none."""
        all_sets = torch.cat([self.combinations.cpu(), targets.cpu()])
        numbers = all_sets.unique(dim=0, return_inverse=True)[1]
        C = len(self.combinations)
        of_number = torch.full((len(all_sets),), -1).scatter_(0, numbers[:C], torch.arange(C))
        return of_number[numbers[C:]]

    def marginals(self, features: Tensor, evidence: Tensor | None = None) -> Tensor:
        """Return each label's probability given the known ones, exactly.

        The combinations that agree with what is known keep their probabilities, over their sum.
        Where none does, those stay that disagree in the fewest labels.

        Args:
            features: [n, F].
            evidence: [n, L] int8, see `cnnrnn.reveal`; None where nothing is known.

        Returns:
            [n, L] on the CPU; 1 and 0 of the known labels.
        """
        scores, has = network_outputs(self, features), self.combinations.cpu().float()
        if evidence is None:
            return scores.softmax(1) @ has
        present, absent = (evidence == 1).float(), (evidence == -1).float()
        wrong = present @ (1 - has).T + absent @ has.T  # [n, C] whole numbers
        fewest = wrong.amin(1, keepdim=True)
        found = scores.masked_fill(wrong > fewest, -torch.inf).softmax(1) @ has
        return torch.where(evidence == 0, found, (evidence > 0).to(found.dtype))

    def best_sets(self, features: Tensor) -> Tensor:
        """Return the most probable combination of each image: [n, L] bool on the CPU."""
        return self.combinations.cpu()[network_outputs(self, features).argmax(1)]


def train_combinations(training: Training) -> LabelCombinations:
    """Train a softmax over label sets, with early stopping on O-F1 plus mAP of its marginals.

    Raises:
        NonFiniteLossError: the loss stopped being finite.
        DivergedError: the scores did.
    """
    targets, val = training.train.targets, training.val
    torch.manual_seed(training.config.seed)
    combinations, counts = common_combinations(targets, MOST_COMBINATIONS)
    model = LabelCombinations(training.model_config, combinations, training.feature_dim)
    with torch.no_grad():
        model.classifier.bias.copy_((counts / counts.sum()).log())
    classes = model.classes_of(targets)

    def validate() -> Validation:
        marginals = model.marginals(val.vectors)
        if not marginals.isfinite().all():
            raise DivergedError(
                "the probabilities of the label combinations are no longer finite; lower "
                "learning_rate"
            )
        return independent_validation(marginals, val.targets, val.unknown)

    def batch_loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(
            model(batch.inputs).float(),
            classes[batch.records].to(batch.inputs.device),
            ignore_index=-1,
            reduction="none",
        )

    train_in_two_stages("combinations", model, batch_loss, validate, training)
    return model
