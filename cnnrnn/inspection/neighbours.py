"""Which labels are near one another in the joint space of labels and images.

The paper shows two such tables: the labels nearest to a label, here `nearest_labels`, and those
nearest to an image, `Prediction.neighbours`. docs/labels.md says what nearness means and does not.
"""

from __future__ import annotations

from typing import Any

from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.joint_space import label_vectors, nearest


def require_one_space(model: Any) -> CNNRNN:
    """Return a model that has one joint space at hand.

    Raises:
        ValueError: it is an ensemble, whose members have one each, or an exported file.
    """
    if isinstance(model, CNNRNN):
        return model
    if isinstance(model, Ensemble):
        raise ValueError(
            "nearest labels need a single model, got an ensemble: each of its members has a space "
            "of its own, such as members/0 in its folder"
        )
    raise ValueError(
        "nearest labels need a model that torch runs, got an exported file: load the checkpoint "
        "that it was made from"
    )


def nearest_labels(model: CNNRNN | Ensemble, count: int = 5) -> dict[str, list[tuple[str, float]]]:
    """Return the labels nearest to each label, by the cosine of the rows that score them.

    Args:
        model: a single model; an ensemble has a space for each member, in `ensemble.models`.
        count: how many; all others where there are fewer.

    Returns:
        For each label, in path order, the names and cosines of others, nearest first.

    Raises:
        ValueError: `count` is below 1, or the model has no joint space of its own.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    single = require_one_space(model)
    vectors = label_vectors(single.head)
    cosines, indices = nearest(vectors, vectors, count, are_labels=True)
    names = single.labels
    return {
        name: [(names[i], cosine) for i, cosine in zip(near, own, strict=True)]
        for name, near, own in zip(names, indices.tolist(), cosines.tolist(), strict=True)
    }
