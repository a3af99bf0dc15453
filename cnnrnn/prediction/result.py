"""`Prediction`, and how label sets are decided for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrnn.config import Calibration
from cnnrnn.labels import PAD
from cnnrnn.machine.words import without_nan
from cnnrnn.network.joint_space import image_vectors, label_vectors, nearest
from cnnrnn.prediction.decisions import Decided, DecisionOptions, decide
from cnnrnn.search import best_sets
from cnnrnn.search.inference import Inference


class Candidates(list[tuple[frozenset[str], float]]):
    """Label sets with their probabilities, most probable first; see `Prediction.candidates`.

    Attributes:
        complete: no set was left out.
    """

    def __init__(self, sets: list[tuple[frozenset[str], float]], complete: bool) -> None:
        super().__init__(sets)
        self.complete = complete


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy what belongs to this image alone; it has no `candidates` any more."""
        batch = None if self._batch is None else self._batch.alone(self._row)
        return Prediction, (self.source, self.error, self._names, batch)

    def to_dict(self, all_scores: bool = False) -> dict[str, Any]:
        """Return what JSON can hold: `image`, `labels`, `log_prob` and `scores`, or `error`.

        Args:
            all_scores: of every label, not of the predicted ones alone.

        Returns:
            Numbers that are not finite are None.
        """
        if self.error is not None:
            return {"image": self.source, "error": self.error}
        scores, labels = self.scores, self.labels
        record: dict[str, Any] = without_nan(
            {
                "image": self.source,
                "labels": labels,
                "log_prob": self.log_prob,
                "scores": {name: scores[name] for name in (scores if all_scores else labels)},
            }
        )
        return record

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
        calibrated weight. An ensemble's is the mean of its members'. Where labels are known they
        are conditional on that: known labels have 1 and 0, and all others NaN if no label set that
        the model holds possible fits.
        """
        if self._batch is None:
            return {}
        return dict(zip(self._names, self._batch.scores[self._row].tolist(), strict=True))

    @property
    def marginals(self) -> dict[str, float]:
        """Each label's probability by the label paths alone, with nothing mixed in; see `scores`.

        Of an ensemble they are the scores.
        """
        if self._batch is None:
            return {}
        mixed = self._batch.inference.alone(self._row).mixed(0.0)[0]
        return dict(zip(self._names, mixed.tolist(), strict=True))

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
        """Probability of all label sets that the search found, those beyond `.sets` included.

        It is the share of the model's distribution that was seen: near 1, labels are as probable as
        their scores say; where it is small, they may be more probable. Where labels are known, only
        sets that fit are counted, so this is a lower bound of the probability of what is known. For
        an ensemble, and a file of an earlier release in ONNX Runtime, it is the probability of
        `.sets`. NaN for an image that could not be read.
        """
        if self._batch is None:
            return float("nan")
        result, row = self._batch.inference.result_of(self._row)
        if result.log_evidence is not None:
            return math.exp(float(result.log_evidence[row]))
        return sum(probability for _, probability in self.sets)

    def candidates(self, coverage: float = 0.9, limit: int = 64) -> Candidates:
        """Return label sets that hold the true one with a probability of at least `coverage`.

        Split-conformal on log P(set): every set at least as probable as `coverage` of validation
        images' true sets were. It holds for an image drawn like those, on average over images; with
        labels that you chose to tell (`known`, `absent`), or images of another kind, it is no
        promise.

        Args:
            coverage: above 0 and below 1; validation data of n images can promise n / (n + 1).
            limit: at most this many sets, the most probable ones.

        Returns:
            Pairs of label set and probability, most probable first; `.complete` is False where
            `limit`, or the work that it allows (100 prefixes a set), left sets out.

        Raises:
            ValueError: the model was not calibrated for it, is an ensemble or an exported file, or
                has another order than `increasing`; the image could not be read; the prediction
                was pickled or copied.
        """
        if self._batch is None:
            raise ValueError(f"{self.source} could not be read: {self.error}")
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be above 0 and below 1, got {coverage}")
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        levels = self._batch.set_nll
        inference = self._batch.inference
        if inference.embedded is None or not levels:
            raise ValueError(
                "candidates need a single model of order increasing, calibrated by a training of "
                "this release, and a prediction that was not pickled"
            )
        level = math.ceil(100 * coverage - 1e-9)
        if level > len(levels):
            raise ValueError(
                f"coverage must be at most {len(levels) / 100} for what was calibrated on so few "
                f"validation images, got {coverage}"
            )
        head, embedding = inference.embedding_of(self._row)
        evidence = inference.evidence
        found = best_sets(
            head,
            embedding,
            count=limit + 1,
            least=-levels[level - 1] - 1e-4,  # the search's rounding
            max_expansions=100 * (limit + 1),
            evidence=None if evidence is None else evidence[self._row : self._row + 1],
        )
        proved = min(limit, int(found.proved[0]))
        sets = [
            (frozenset(self._names[i] for i in labels if i != PAD), math.exp(log_prob))
            for labels, log_prob in zip(
                found.labels[0, :proved].tolist(), found.log_probs[0, :proved].tolist(), strict=True
            )
        ]
        return Candidates(sets, complete=bool(found.ended[0]))

    def neighbours(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the labels nearest to the image in the joint space, by cosine, nearest first.

        They are those whose rows U_l point where the image's own part of the score, h(U_I I), does.
        They are no predictions, and what is known of labels does not matter to them.

        Args:
            count: how many; all labels where there are fewer.

        Returns:
            Names with cosines in -1..1.

        Raises:
            ValueError: the model is an ensemble or an exported file; the image could not be read;
                the prediction was pickled or copied.
        """
        if self._batch is None:
            raise ValueError(f"{self.source} could not be read: {self.error}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if self._batch.inference.embedded is None:
            raise ValueError(
                "neighbours need a single model that torch runs, and a prediction that was not "
                "pickled"
            )
        head, embedding = self._batch.inference.embedding_of(self._row)
        image = image_vectors(head, embedding.joint)
        (cosines,), (indices,) = nearest(image, label_vectors(head), count)
        return [
            (self._names[i], cosine)
            for i, cosine in zip(indices.tolist(), cosines.tolist(), strict=True)
        ]

    def _repr_html_(self) -> str:
        """Show the picture, its labels and their scores in a notebook."""
        from cnnrnn.prediction.html import notebook_html

        return notebook_html(self)

    def _paths(self) -> tuple[Tensor, Tensor]:
        assert self._batch is not None
        result, row = self._batch.inference.result_of(self._row)
        return result.labels[row], result.log_probs[row]


def decided_predictions(
    inference: Inference,
    labels: tuple[str, ...],
    calibration: Calibration,
    options: DecisionOptions,
) -> list[Prediction]:
    """Return the predictions of feature vectors, named by their rows."""
    decided = decide(inference, calibration, options)
    return [Prediction(str(row), None, labels, decided, row) for row in range(len(decided.sets))]
