"""Labels that are probably wrong: what a model expects of each label, given all the others.

Letters: n records, L labels, T the largest label set, M scored steps.

The suspicion of a label of a record is log P(set with its answer turned | image) less
log P(set as it is | image): two label sets, each scored along its one path, no search. An
independent classifier judges a label by the image alone; here the record's other labels count too.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnrnn.config import OnBadImage
from cnnrnn.data import Dataset
from cnnrnn.data.splits import stratified_folds, training_splits
from cnnrnn.evaluation import in_columns, model_columns, model_features
from cnnrnn.inspection.flips import flip_log_odds, require_increasing
from cnnrnn.machine.files import write_whole
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.features import Features
from cnnrnn.search import NonFiniteError
from cnnrnn.training.resume import Recipe, data_digest, stored_recipe
from cnnrnn.training.run import train

PAIRS_AT_ONCE = 1 << 24
"""Labels of records that are judged before those that look right are forgotten: 128 MB."""


class Suspect(NamedTuple):
    """A label of a record that a model would answer otherwise.

    Attributes:
        image: the record's image file, or `row i of FILE`.
        label: its name.
        given: `present` or `absent`, what the data says.
        suggested: the other one.
        log_odds: log P(set with the label | image) - log P(set without it | image), in nats, the
            record's other labels as they are.
    """

    image: str
    label: str
    given: str
    suggested: str
    log_odds: float


@dataclass(frozen=True, eq=False)
class Suspects:
    """The labels of a data set that look wrong, most suspicious first.

    Attributes:
        dataset: the n records that were judged.
        records: [m] int64, record of each suspect.
        labels: [m] int64, its label, in the order of the dataset.
        present: [m] bool, what the data says.
        log_odds: [m] float64 that the label is there, see `Suspect`.
        cut: a label is suspect from these log-odds of the other answer on, in nats.
        judged_present: how many labels that are there were judged.
        judged_absent: how many that are not.
    """

    dataset: Dataset
    records: Tensor
    labels: Tensor
    present: Tensor
    log_odds: Tensor
    cut: float
    judged_present: int
    judged_absent: int

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Suspect]:
        """Go through the suspects, most suspicious first."""
        columns = (self.records, self.labels, self.present, self.log_odds)
        for record, label, present, odds in zip(*(c.tolist() for c in columns), strict=True):
            answers = ("present", "absent") if present else ("absent", "present")
            name = self.dataset.label_names[label]
            yield Suspect(self.dataset.record_name(record), name, *answers, odds)

    def summary(self) -> str:
        """Say how many labels look wrong, in one line."""
        wrong = int(self.present.sum())
        return (
            f"suspects, log-odds of the other answer at least {self.cut:g}: "
            f"{wrong:,} of {self.judged_present:,} labels that are there look wrong, "
            f"{len(self) - wrong:,} of {self.judged_absent:,} that are not look missing"
        )

    def write(self, file: Path) -> None:
        """Write the suspects as CSV, whole or not at all; the columns are those of `Suspect`."""

        def write(part: Path) -> None:
            # A file name may be bytes that are no text: they leave as they came.
            with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
                rows = csv.writer(stream, lineterminator="\n")
                rows.writerow(Suspect._fields)
                rows.writerows((*suspect[:-1], f"{suspect.log_odds:.6g}") for suspect in self)

        write_whole(file, write)


def find_suspects(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    *,
    cut: float = 0.0,
    features: Features | None = None,
    cache: Path | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
) -> Suspects:
    """Find the labels of a data set that a model would answer otherwise, given all the others.

    A model expects what it was trained on: for records of its training split use
    `cross_fitted_suspects`.

    Args:
        model: where its weights are decides the device; its search's order is `increasing`.
        dataset: images, or feature vectors for a model without a backbone; its label names are
            among the model's, in any order. A label of the model that it lacks counts as absent, as
            does one that is unknown in a record; neither is ever suspect.
        cut: a label is suspect from these log-odds of the other answer on, in nats: at 0 where the
            other answer is as probable. Below 0 more are.
        features: what `model_features` returns of the dataset; None computes them.
        cache: folder that keeps features of images; None for none.
        batch_size: images per batch.
        workers: threads that decode.
        on_bad_image: `skip` leaves unreadable images out and warns with their count.
        progress: told how many records are done.

    Raises:
        DataError: the data is not of the kind that the model reads, or has other labels.
        ValueError: the model's paths go in another order.
        NonFiniteError: records whose scores are not finite.
    """
    if features is None:
        features = model_features(
            model, dataset, cache=cache, batch_size=batch_size, workers=workers,
            on_bad_image=on_bad_image, progress=progress,
        )  # fmt: skip
    judged = _judged(model, dataset, features.values, features.kept, cut, progress)
    return _ranked(dataset, [judged], cut)


def cross_fitted_suspects(
    model: CNNRNN,
    dataset: Dataset,
    recipe: Recipe,
    folds: int,
    *,
    cut: float = 0.0,
    cache: Path | None = None,
    device: str = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
) -> Suspects:
    """Find suspects by models that did not see the record: K are trained, on K-1 folds each.

    Args:
        model: its frozen backbone makes the features of all folds; one that was trained has seen
            the records, and is trained anew for each fold.
        dataset: as in `find_suspects`; its splits do not matter.
        recipe: how the models are trained; of each fold's training records a share is held out to
            choose the epoch.
        folds: K, at least 2; the seed of the recipe deals the records.
        cut: as in `find_suspects`.
        cache: as in `find_suspects`.
        device: where the models are trained.
        batch_size: as in `find_suspects`.
        workers: as in `find_suspects`.
        on_bad_image: as in `find_suspects`.
        say: gets a line per fold, and those of its training.
        progress: as in `find_suspects`.

    Raises:
        ValueError: the options do not fit, or as in `find_suspects` and `train`.
    """
    require_increasing(recipe.search.order)
    config = replace(
        recipe.train, train_split=None, val_split=None, device=device, workers=workers or 0,
        on_bad_image=on_bad_image,
    )  # fmt: skip
    data, numbers = dataset, np.arange(len(dataset))
    if model.backbone is None or model.config.freeze_backbone:
        features = model_features(
            model, dataset, cache=cache, batch_size=batch_size, workers=workers,
            on_bad_image=on_bad_image, progress=progress,
        )  # fmt: skip
        numbers = features.kept
        data = dataset.select(numbers).with_changes(features=features.values.numpy())
    found = []
    for fold, held in enumerate(stratified_folds(data, folds, config.seed), 1):
        rest = np.setdiff1d(np.arange(len(data)), held)
        say(f"fold {fold} of {folds}: trained on {len(rest):,} records, {len(held):,} are judged")
        others = data.select(rest).with_changes(splits={"all": np.arange(len(rest))})
        with tempfile.TemporaryDirectory() as folder:
            fitted = train(
                others, Path(folder), recipe.model, recipe.search, config, say=say,
                progress=progress,
            ).model  # fmt: skip
        features = model_features(
            fitted, data.select(held), batch_size=batch_size, workers=workers,
            on_bad_image=on_bad_image, progress=progress,
        )  # fmt: skip
        records = numbers[held[features.kept]]
        found.append(_judged(fitted, dataset, features.values, records, cut, progress))
    return _ranked(dataset, found, cut)


class _JudgedLabels(NamedTuple):
    """Suspects in no order, as in `Suspects`, and how many labels were judged."""

    records: Tensor
    labels: Tensor
    present: Tensor
    log_odds: Tensor
    judged_present: int
    judged_absent: int


def _judged(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    features: Tensor,
    records: npt.NDArray[np.int64],
    cut: float,
    progress: Progress,
) -> _JudgedLabels:
    """Judge some records of a dataset, whose features [m, F] are given, by a model."""
    model.eval()
    columns = model_columns(model, dataset)
    parts, counts = [], torch.zeros(2, dtype=torch.int64)
    size = max(1, PAIRS_AT_ONCE // len(model.labels))
    with progress("suspects", len(records)) as advance:
        for first in range(0, len(records), size):
            own = records[first : first + size]
            part = dataset.select(own)
            present = part.label_matrix()
            targets = in_columns(present, columns, len(model.labels))
            try:
                odds = flip_log_odds(model, features[first : first + size], targets)[:, columns]
            except NonFiniteError as error:
                bad = [int(own[image]) for image in error.images]
                raise NonFiniteError(bad, len(dataset)) from None
            known = ~part.unknown_matrix()
            counts += torch.stack([(present & known).sum(), (~present & known).sum()])
            suspect = (torch.where(present, -odds, odds) >= cut) & known
            record, label = suspect.nonzero(as_tuple=True)
            numbers = torch.from_numpy(own)[record]
            parts.append((numbers, label, present[record, label], odds[record, label]))
            advance(len(own))
    none = torch.zeros(0, dtype=torch.int64)
    parts.append((none, none, none.bool(), none.double()))
    numbers, label, is_present, found = map(torch.cat, zip(*parts, strict=True))
    return _JudgedLabels(numbers, label, is_present, found, int(counts[0]), int(counts[1]))


def _ranked(dataset: Dataset, found: Sequence[_JudgedLabels], cut: float) -> Suspects:
    """Join suspects and rank them; of equal ones the first record and label goes first."""
    columns = [torch.cat(column) for column in list(zip(*found, strict=True))[:4]]
    by_label = (columns[0] * len(dataset.label_names) + columns[1]).argsort()
    records, labels, present, odds = (column[by_label] for column in columns)
    order = torch.where(present, odds, -odds).argsort(stable=True)
    return Suspects(
        dataset, records[order], labels[order], present[order], odds[order], cut,
        sum(part.judged_present for part in found), sum(part.judged_absent for part in found),
    )  # fmt: skip


def seen_in_training(run: Path, dataset: Dataset) -> npt.NDArray[np.int64]:
    """Return the numbers in the source of the records that a run was trained on.

    Args:
        run: its folder, or the checkpoint in it.
        dataset: all records of a source, with its splits.

    Returns:
        [m] int64, `Dataset.rows` of the training records. None where the folder does not say, or
        the run was on other data, as data is whose labels were changed since.
    """
    for folder in (run, run / "members" / "0", run.parent / "members" / "0"):
        try:
            recipe = stored_recipe(folder)
            records, _ = training_splits(dataset, recipe.train)
        except ValueError:  # no run's folder, or its data had other splits
            continue
        if data_digest(records) == recipe.training_data:
            return records.rows
    return np.zeros(0, dtype=np.int64)
