"""The training and validation records, and stratified splits and folds."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from cnnrnn.config import TrainConfig
from cnnrnn.data import DataError
from cnnrnn.data.dataset import Dataset

NOWHERE, REST, HELD_OUT = -1, 0, 1


def stratified_split(
    dataset: Dataset, held_out: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold records out by iterative stratification (Sechidis et al., ECML PKDD 2011).

    The rarest label comes first: each of its records goes to the part that lacks more of that
    label, and counts there for its other labels too. Having no label counts as a label. Beyond the
    paper, a label of two records or more wants at least one in each part, and both sizes are exact.

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


def stratified_folds(dataset: Dataset, folds: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Deal the records to folds of one size, with about the same share of every label in each.

    One fold after another is held out from the records that are left, by `stratified_split`.

    Args:
        dataset: n records.
        folds: K, 2 to n.
        seed: decides the order in which records are looked at.

    Returns:
        K arrays of record numbers, ascending; each record is in one.

    Raises:
        ValueError: `folds` is below 2 or above n.
    """
    n = len(dataset)
    if not 2 <= folds <= n:
        raise ValueError(f"folds must be in 2..{n} for {n} records, got {folds}")
    left, parts = np.arange(n), []
    for still in range(folds, 1, -1):
        rest, held = stratified_split(dataset.select(left), len(left) // still, seed)
        parts.append(left[held])
        left = left[rest]
    return [*parts, left]


def training_splits(dataset: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Return the training and validation records; without a validation split, a share is held out.

    The share is stratified: it holds about the same share of every label; the seed decides which.

    Raises:
        DataError: a split is missing or empty, or training and validation share records.
    """
    train_name, val_name = _names_of_splits(dataset, config)
    data = dataset.split(train_name)
    if val_name is not None:
        val = dataset.split(val_name)
        if not len(val):
            raise DataError(
                f"the {val_name} split of {dataset.source} is empty; nothing to validate on"
            )
        shared = np.intersect1d(dataset.splits[train_name], dataset.splits[val_name])
        if not len(shared):
            return _training_records(data, config), val
        if config.train_split is None or config.val_split is not None:
            raise DataError(
                f"training and validation records must differ, got {len(shared)} in both "
                f"{train_name} and {val_name} of {dataset.source}, the first "
                f"{dataset.record_name(int(shared[0]))}; name other splits with train_split and "
                "val_split"
            )
    held_out = round(len(data) * config.val_fraction)
    if not 0 < held_out < len(data):
        raise DataError(
            f"{dataset.source} has no val split"
            + (f" apart from {train_name}" if val_name else "")
            + f", and val_fraction {config.val_fraction} of "
            f"{len(data)} training images leaves nothing to validate on or to train on"
        )
    rest, held = stratified_split(data, held_out, config.seed)
    return _training_records(data.select(rest), config), data.select(held)


def _names_of_splits(dataset: Dataset, config: TrainConfig) -> tuple[str, str | None]:
    """Return the split to train on, and the one to validate on or None.

    Raises:
        DataError: there is no such split.
    """
    if config.train_split is None and dataset.splits and not {"train", "all"} & {*dataset.splits}:
        raise DataError(
            f"{dataset.source} has no split named train, only {', '.join(sorted(dataset.splits))}; "
            "name another with train_split"
        )
    train_name = config.train_split or ("train" if "train" in dataset.splits else "all")
    val_name = config.val_split or ("val" if "val" in dataset.splits else None)
    return (
        dataset.split_name(train_name), None if val_name is None else dataset.split_name(val_name)
    )  # fmt: skip


def describe_splits(dataset: Dataset, config: TrainConfig) -> str:
    """Return a sentence that says what `training_splits` uses each split for.

    Warns of splits other than `test` that hold records which are not used.
    """
    train_name, val_name = _names_of_splits(dataset, config)
    train = dataset.splits[train_name]
    used, validating = train, f"{100 * config.val_fraction:g} % of its records"
    if val_name is not None and not len(np.intersect1d(train, dataset.splits[val_name])):
        used = np.concatenate([train, dataset.splits[val_name]])
        validating = f"{val_name} ({len(dataset.splits[val_name]):,})"
    text = f"training on {train_name} ({len(train):,} records), validating on {validating}"
    unused = [n for n, records in dataset.splits.items() if len(np.setdiff1d(records, used))]
    if "test" in unused:
        text += f"; test ({len(dataset.splits['test']):,}) is left for `cnnrnn evaluate`"
        unused.remove("test")
    if unused:
        listed = ", ".join(f"{name} ({len(dataset.splits[name]):,})" for name in unused)
        warnings.warn(
            f"{dataset.source}: training does not use the split{'s' * (len(unused) > 1)} {listed}; "
            "train_split and val_split name others",
            stacklevel=2,
        )
    return text


def with_fixed_splits(dataset: Dataset, config: TrainConfig) -> Dataset:
    """Return a dataset whose splits `train` and `val` are those of `training_splits`.

    The held-out images depend on the seed; with fixed splits several trainings hold out the same
    ones. Other splits except `all` stay.
    """
    numbered = dataset.with_changes(rows=np.arange(len(dataset)))
    train_part, val_part = training_splits(numbered, config)
    others = {name: records for name, records in dataset.splits.items() if name != "all"}
    return dataset.with_changes(splits={**others, "train": train_part.rows, "val": val_part.rows})


def _training_records(data: Dataset, config: TrainConfig) -> Dataset:
    if config.empty == "drop":
        may_have_labels = (data.label_matrix() | data.unknown_matrix()).any(1)
        data = data.select(may_have_labels.nonzero()[:, 0].numpy())
    if not len(data):
        raise DataError(f"{data.source} has no training images (empty: {config.empty})")
    return data
