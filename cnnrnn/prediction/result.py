"""`Prediction`, and how label sets are decided for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrnn.config import Calibration
from cnnrnn.labels import PAD
from cnnrnn.prediction.decisions import Decided, Options, decide
from cnnrnn.search.inference import Inference


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What the model says of one image; a view of its batch, nothing is copied until asked.

    Attributes:
        source: the image's path, or its position in what was passed.
        error: why the image could not be read, under `on_bad_image="skip"`; then there are no
            labels.
    """

    source: str
    error: str | None = None
    _names: tuple[str, ...] = ()
    _batch: Decided | None = None
    _row: int = 0

    def __repr__(self) -> str:
        if self._batch is None:
            return f"Prediction({self.source!r}, error={self.error!r})"
        return f"Prediction({self.source!r}, labels={self.labels}, log_prob={self.log_prob:.4f})"

    @property
    def labels(self) -> list[str]:
        """Names of the decided label set, in path order."""
        if self._batch is None:
            return []
        return [self._names[i] for i in self._batch.sets[self._row].nonzero()[:, 0].tolist()]

    @property
    def log_prob(self) -> float:
        """Log-probability of the best path; NaN for an image that could not be read."""
        return float(self._paths()[1][0]) if self._batch is not None else float("nan")

    @property
    def scores(self) -> dict[str, float]:
        """Each label's score in 0..1, to which thresholds apply.

        The probability of its paths, summed over those that the search visited and so a lower bound
        of the label's marginal, mixed in logit space with the chain term's probability at the
        calibrated weight. An ensemble's is the mean of its members'.
        """
        if self._batch is None:
            return {}
        return dict(zip(self._names, self._batch.scores[self._row].tolist(), strict=True))

    @property
    def paths(self) -> list[tuple[tuple[str, ...], float]]:
        """The N best label paths with their log-probabilities, best first."""
        if self._batch is None:
            return []
        labels, log_probs = self._paths()
        return [
            (tuple(self._names[i] for i in path if i != PAD), log_prob)
            for path, log_prob in zip(labels.tolist(), log_probs.tolist(), strict=True)
            if log_prob != -torch.inf
        ]

    @property
    def sets(self) -> list[tuple[frozenset[str], float]]:
        """Distinct label sets with their probabilities, best first; orders of one set add up."""
        if self._batch is None:
            return []
        result, row = self._batch.inference.result_of(self._row)
        return [
            (frozenset(self._names[i] for i in labels), probability)
            for labels, probability in result.label_sets(row)
        ]

    @property
    def mass(self) -> float:
        """Probability of all sets found together, that of `.sets`; NaN for an unreadable image.

        It is the share of the model's distribution that the search returned: near 1, `.sets` is all
        there is; where it is small, labels may be more probable than their scores say. For an
        ensemble it sums the geometric means of its members' probabilities.
        """
        if self._batch is None:
            return float("nan")
        return sum(probability for _, probability in self.sets)

    def _paths(self) -> tuple[Tensor, Tensor]:
        assert self._batch is not None
        result, row = self._batch.inference.result_of(self._row)
        return result.labels[row], result.log_probs[row]


def decided_predictions(
    inference: Inference, labels: tuple[str, ...], calibration: Calibration, options: Options
) -> list[Prediction]:
    """Return the predictions of feature vectors, named by their rows."""
    decided = decide(inference, calibration, options)
    return [Prediction(str(row), None, labels, decided, row) for row in range(len(decided.sets))]
