"""The next question to ask of an image: is this label there?

Letters: n images, L labels, N label sets that the search returns.

What an image's label set is, has a distribution, and the set decides the answer about every label.
So the entropy that an answer takes from that distribution, on average over both answers, is the
entropy of the answer itself: that of a coin with the label's probability given all that is known.
The best question is the label whose probability is nearest to one half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.config import SearchConfig
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.prediction.decisions import with_known
from cnnrnn.prediction.result import Prediction
from cnnrnn.search.inference import Inference

Choose = Callable[[Tensor, Tensor], Tensor]
"""Scores [n, L] and evidence [n, L] to the label that each image is asked about, [n] int64."""


def question_gains(scores: Tensor, evidence: Tensor) -> Tensor:
    """Return how much entropy the answer about each label is expected to take away, in nats.

    Args:
        scores: [n, L] probability that a label is there, given the evidence; NaN where no label set
            fits it.
        evidence: [n, L] int8: 1 present, -1 absent, 0 unknown.

    Returns:
        [n, L] in 0..log 2; 0 of known labels and where the probability is NaN.
    """
    p = scores.nan_to_num(0.0).clamp(0, 1)
    gains = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    return gains.masked_fill(evidence != 0, 0.0)


def most_telling(scores: Tensor, evidence: Tensor) -> Tensor:
    """Return the unknown label of each image whose answer is expected to tell most: [n] int64."""
    gains = question_gains(scores, evidence)
    return gains.masked_fill(evidence != 0, -1.0).argmax(1)


class Question(NamedTuple):
    """A label to ask about.

    Attributes:
        label: its name.
        score: probability that it is there, given what is known.
        gain: entropy that the answer is expected to take away, in bits: 1 for an even chance.
    """

    label: str
    score: float
    gain: float


def next_questions(
    prediction: Prediction, count: int = 1, least_gain: float = 0.01
) -> list[Question]:
    """Return the labels to ask of an image next, the most telling first.

    Each is the best question if it were the only one; after an answer predict again, with what is
    known by then.

    Args:
        prediction: of `predict` with `known` and `absent`; its marginals are of labels given these.
        count: at most so many.
        least_gain: labels that are nearly certain are left out, whose answers tell less than this,
            in bits: by default those above 0.999 and below 0.001.
    """
    marginals = prediction.marginals
    names, scores = list(marginals), torch.tensor(list(marginals.values()), dtype=torch.float64)
    gains = question_gains(scores, torch.zeros_like(scores)) / math.log(2)
    best = gains.argsort(descending=True, stable=True)[:count].tolist()
    telling = [i for i in best if gains[i] > least_gain]
    return [Question(names[i], float(scores[i]), float(gains[i])) for i in telling]


class Certainty(NamedTuple):
    """How certain label sets are after some questions, on average over images.

    Attributes:
        questions: how many were answered.
        exact: share of the images whose best set is the true one.
        wrong: labels that are wrong in the best set.
        probability: of the best set given the answers, as the model sees it.
        entropy: of the sets that the search returns, given the answers, in nats.
    """

    questions: int
    exact: float
    wrong: float
    probability: float
    entropy: float


@torch.no_grad()
def ask(
    model: CNNRNN | Ensemble,
    features: Tensor,
    targets: Tensor,
    questions: int,
    *,
    choose: Choose = most_telling,
    search: SearchConfig | None = None,
) -> list[Certainty]:
    """Ask questions of labelled images, answer them truly, and see how certain their sets become.

    Args:
        model: in eval mode.
        features: [n, F].
        targets: [n, L] bool, columns in the order of `model.labels`.
        questions: how many each image is asked, one after another, at most L.
        choose: which label comes next.
        search: the model's own by default; paths may be as long as the largest set.

    Returns:
        One row before any question, then one after each.
    """
    L = len(model.labels)
    if not 0 <= questions <= L:
        raise ValueError(f"questions must be in 0..{L}, got {questions}")
    search = search or model.search
    largest = int(targets.sum(1).max()) if len(targets) else 0
    search = replace(search, max_labels=max(model.longest_path(search), largest))
    targets = targets.cpu()
    evidence = torch.zeros(targets.shape, dtype=torch.int8)
    rows = []
    for asked in range(questions + 1):
        found = model.infer(features.to(model.device), search, evidence)
        rows.append(_certainty(asked, found, targets))
        if asked < questions:
            label = choose(found.mixed(0.0), evidence)[:, None]
            answers = torch.where(targets.gather(1, label), 1, -1).to(torch.int8)
            evidence.scatter_(1, label, answers)
    return rows


def _certainty(asked: int, found: Inference, targets: Tensor) -> Certainty:
    wrong = (with_known(found.sets, found) != targets).sum(1).double()
    shares, best = [], []
    for result in found.search:
        log_probs = result.log_probs.double().cpu()
        total = log_probs.logsumexp(1) if result.log_evidence is None else result.log_evidence.cpu()
        shares.append(log_probs.softmax(1).nan_to_num(0.0))
        best.append((log_probs[:, 0] - total).exp().nan_to_num(0.0))
    of_sets = torch.cat(shares)
    figures = (
        (wrong == 0).double(), wrong, torch.cat(best), -torch.xlogy(of_sets, of_sets).sum(1),
    )  # fmt: skip
    return Certainty(asked, *(float(figure.mean()) for figure in figures))
