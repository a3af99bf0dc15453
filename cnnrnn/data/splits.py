"""Splits a dataset's records in two parts with about the same share of every label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cnnrnn.data.dataset import Dataset

NOWHERE, REST, HELD_OUT = -1, 0, 1


def stratified_split(
    dataset: Dataset, held_out: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold records out by iterative stratification (Sechidis et al., ECML PKDD 2011).

    The rarest label goes first: each of its records goes to the part that lacks more of that label,
    and counts there for its other labels too. To have no label is one label more. Beyond the paper,
    a label of two records or more asks for at least one in each part, and both sizes are exact.

    Args:
        dataset: n records.
        held_out: how many to hold out, 0 to n.
        seed: decides the order in which records are looked at.

    Returns:
        Record numbers of the rest and of those held out, ascending: [n - held_out] and [held_out].

    Raises:
        ValueError: `held_out` is more than n.
    """
    n = len(dataset)
    if not 0 <= held_out <= n:
        raise ValueError(f"held_out must be in 0..{n}, got {held_out}")
    sizes = np.diff(dataset.label_indptr)
    bare = dataset.label_indptr[:-1][sizes == 0]
    labels = np.insert(dataset.label_indices, bare, len(dataset.label_names))
    ends = np.maximum(sizes, 1).cumsum()
    starts = ends - np.maximum(sizes, 1)
    counts = np.bincount(labels, minlength=len(dataset.label_names) + 1)

    wanted = np.zeros((2, len(counts)))
    wanted[HELD_OUT] = counts * (held_out / max(n, 1))
    several = counts > 1
    wanted[HELD_OUT, several] = wanted[HELD_OUT, several].clip(1, counts[several] - 1)
    wanted[REST] = counts - wanted[HELD_OUT]
    room = [n - held_out, held_out]

    place = np.random.default_rng(seed).permutation(n)
    records = np.repeat(np.arange(n), ends - starts)
    records_of = np.split(records[np.lexsort((place[records], labels))], counts.cumsum()[:-1])
    part = np.full(n, NOWHERE)
    left = np.where(counts > 0, counts, np.inf)
    while left.min() < np.inf:
        label = int(left.argmin())
        for record in records_of[label]:
            if part[record] != NOWHERE:
                continue
            lacks_more = HELD_OUT if wanted[HELD_OUT, label] > wanted[REST, label] else REST
            to = lacks_more if room[lacks_more] else 1 - lacks_more
            own = labels[starts[record] : ends[record]]
            part[record] = to
            room[to] -= 1
            wanted[to, own] -= 1
            left[own] -= 1
        left[left == 0] = np.inf
    return (part == REST).nonzero()[0], (part == HELD_OUT).nonzero()[0]
