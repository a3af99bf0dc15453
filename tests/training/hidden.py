"""Data of which a share of the labels is hidden."""

from __future__ import annotations

from typing import Literal

import numpy as np

from cnnrnn.data import Dataset


def hide(
    dataset: Dataset, share: float, taken_as: Literal["absent", "unknown"], seed: int
) -> Dataset:
    """Hide labels of all images but the test split's.

    Args:
        dataset: every label of it is known.
        share: of the pairs of image and label, 0 to 1.
        taken_as: `unknown`, or `absent`, as if nobody knew that they are hidden.
        seed: of the pairs.
    """
    if not share:
        return dataset
    present = dataset.label_matrix().numpy()
    hidden = np.random.default_rng(seed).random(present.shape) < share
    hidden[dataset.splits["test"]] = False
    left = present & ~hidden
    pointers = {name: np.concatenate([[0], np.cumsum(matrix.sum(1))])
                for name, matrix in (("label", left), ("unknown", hidden))}  # fmt: skip
    changed = dataset.with_changes(
        label_indptr=pointers["label"], label_indices=np.nonzero(left)[1].astype(np.int32)
    )
    if taken_as == "absent":
        return changed
    return changed.with_changes(
        unknown_indptr=pointers["unknown"], unknown_indices=np.nonzero(hidden)[1].astype(np.int32)
    )
