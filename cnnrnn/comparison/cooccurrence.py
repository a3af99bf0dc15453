"""Known labels for independent classifiers: log-odds of co-occurrence, weighted on validation data.

Letters: n images, L labels.
"""

from __future__ import annotations

from torch import Tensor

from cnnrnn.network.cooccurrence import CoOccurrence
from cnnrnn.reveal import metrics_of_others, reveal
from cnnrnn.training.batches import Split

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SMOOTHINGS = (0.3, 1.0, 3.0, 10.0, 30.0)


def fit_cooccurrence(train: Split, val_logits: Tensor, val: Split, seed: int = 0) -> CoOccurrence:
    """Choose smoothing and a weight of what is added, by example-AP with one label revealed.

    Args:
        train: its labels are counted.
        val_logits: [m, L] log-odds of the validation images by an independent classifier.
        val: validation images; where none has two labels, weight and smoothing are 1.
        seed: of the labels that are revealed.
    """
    images, evidence = reveal(val.targets, 1, seed)
    logits, (targets, unknown) = val_logits[images], val.truth(images)
    best, found = -1.0, CoOccurrence.counted(train.targets, 1.0, train.unknown)
    for smoothing in SMOOTHINGS if len(images) else ():
        counted = CoOccurrence.counted(train.targets, smoothing, train.unknown)
        for weight in WEIGHTS:
            weighted = CoOccurrence(weight * counted.present, weight * counted.absent)
            scores = weighted.scores(logits, evidence)
            value = metrics_of_others(scores, targets, evidence, threshold=0.0, unknown=unknown)[
                "example-AP"
            ]
            if value > best:
                best, found = value, weighted
    return found
