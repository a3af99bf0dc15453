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
from torch.nn import functional

from cnnrnn.config import OnBadImage
from cnnrnn.data import Dataset
from cnnrnn.data.splits import stratified_folds, training_splits
from cnnrnn.evaluation import in_columns, model_columns, model_features
from cnnrnn.labels import PAD, forbidden_labels, increasing_paths
from cnnrnn.machine.files import write_whole
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble, mixture_log_probs
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import NonFiniteError
from cnnrnn.training.resume import Recipe, data_digest, stored_recipe
from cnnrnn.training.run import train

VALUES_AT_ONCE = 1 << 23
"""Scores and states held while sets are scored: 32 MB in float32."""
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
    _require_increasing(recipe.search.order)
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
        data = replace(dataset.select(numbers), features=features.values.numpy())
    found = []
    for fold, held in enumerate(stratified_folds(data, folds, config.seed), 1):
        rest = np.setdiff1d(np.arange(len(data)), held)
        say(f"fold {fold} of {folds}: trained on {len(rest):,} records, {len(held):,} are judged")
        others = replace(data.select(rest), splits={"all": np.arange(len(rest))})
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


class _Judged(NamedTuple):
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
) -> _Judged:
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
    return _Judged(numbers, label, is_present, found, int(counts[0]), int(counts[1]))


def _ranked(dataset: Dataset, found: Sequence[_Judged], cut: float) -> Suspects:
    """Join suspects and rank them; of equal ones the first record and label goes first."""
    columns = [torch.cat(column) for column in list(zip(*found, strict=True))[:4]]
    by_label = (columns[0] * len(dataset.label_names) + columns[1]).argsort()
    records, labels, present, odds = (column[by_label] for column in columns)
    order = torch.where(present, odds, -odds).argsort(stable=True)
    return Suspects(
        dataset, records[order], labels[order], present[order], odds[order], cut,
        sum(part.judged_present for part in found), sum(part.judged_absent for part in found),
    )  # fmt: skip


def _require_increasing(order: str) -> None:
    if order != "increasing":
        raise ValueError(
            "search.order must be increasing to judge labels, so that a label set has one path, "
            f"got {order}"
        )


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


@torch.no_grad()
def flip_log_odds(model: CNNRNN | Ensemble, features: Tensor, targets: Tensor) -> Tensor:
    """Return the log-odds of each label of each record, given the record's other labels.

    Args:
        model: in eval mode.
        features: [n, F].
        targets: [n, L] bool, columns in the order of `model.labels`.

    Returns:
        [n, L] float64 on the CPU, log P(set with the label | image) - log P(set without it |
        image), in nats; of an ensemble, of its members' mean probabilities.

    Raises:
        ValueError: the model's paths go in another order than `increasing`, so that a set has more
            than one.
        NonFiniteError: records whose scores are not finite.
    """
    members = model.models if isinstance(model, Ensemble) else [model]
    found = []
    for member in members:
        _require_increasing(member.search.order)
        position = {name: column for column, name in enumerate(member.labels)}
        own = torch.tensor([position[name] for name in model.labels])  # each label's column there
        given, flipped = flipped_log_probs(
            member.head, features.to(member.device), targets[:, own.argsort()]
        )
        found.append(torch.cat([given[:, None], flipped[:, own]], 1))
    log_probs = mixture_log_probs(found)
    bad = (~log_probs.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        raise NonFiniteError(bad.tolist(), len(features))
    sign = torch.where(targets.cpu(), 1.0, -1.0)
    return sign * (log_probs[:, :1] - log_probs[:, 1:])


@torch.no_grad()
def flipped_log_probs(
    head: Head, features: Tensor, targets: Tensor, values_at_once: int = VALUES_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Return log P(set | image) of each record's label set, and of it with each label turned.

    Along the path that training takes, as `search.inference.set_nll`. A set that differs in label l
    shares the path up to l: a record of k labels takes its k+1 steps once, and for each label only
    those after it, 1 + k/2 on average. Records go in the order of their sets, so that many share
    prefixes, each of which is one recurrent state.

    Args:
        head: in eval mode, trained on increasing paths.
        features: [n, F] on the head's device.
        targets: [n, L] bool, columns in path order.
        values_at_once: bounds the memory; the result does not depend on it but for rounding.

    Returns:
        [n] of the sets as they are and [n, L] of those with the label taken out where it is
        present, put in where it is absent; float64 on the CPU.
    """
    if targets.shape != (len(features), head.num_labels):
        raise ValueError(
            f"targets must be [{len(features)}, {head.num_labels}], got {list(targets.shape)}"
        )
    n, L = targets.shape
    given = torch.zeros(n, dtype=torch.float64)
    flipped = torch.zeros(n, L, dtype=torch.float64)
    longest = int(targets.sum(1).max()) + 1 if n else 1
    images_at_once = max(1, values_at_once // (3 * (longest + 1) * (L + 1)))
    for part in _by_set(targets).split(images_at_once):
        embedding = head.embed(features[part.to(features.device)])
        own = targets[part].to(features.device)
        of_sets, of_flips = _flips_of(head, embedding, own, values_at_once)
        given[part], flipped[part] = of_sets.cpu(), of_flips.cpu()
    return given, flipped


def _by_set(targets: Tensor) -> Tensor:
    """Return the records [n] in an order in which equal and similar label sets stand together."""
    paths = increasing_paths(targets.cpu())
    order = torch.arange(len(paths))
    for step in reversed(range(paths.shape[1])):
        order = order[paths[order, step].argsort(stable=True)]
    return order


def _flips_of(
    head: Head, embedding: ImageEmbedding, targets: Tensor, values_at_once: int
) -> tuple[Tensor, Tensor]:
    """Score the sets of some images [B, L] and all that differ in one label: [B] and [B, L]."""
    B, L = targets.shape
    steps = _path_log_probs(head, embedding, targets)  # [B, T+1, L+1]
    sizes = targets.sum(1, keepdim=True)
    path = functional.pad(increasing_paths(targets), (0, 2), value=PAD)
    path = path.masked_fill(path == PAD, L)  # [B, T+2], END after the labels
    taken = steps.gather(2, path[:, :-1, None])[:, :, 0].double()
    positions = torch.arange(taken.shape[1], device=targets.device)
    taken = taken.masked_fill(positions > sizes, 0)
    before = functional.pad(taken.cumsum(1), (1, 0))  # [B, T+2] of the first 0, 1, ... steps
    below = targets.cumsum(1) - targets.long()  # [B, L] labels of the set below each label
    # Where the label is there, the label after it comes in its place; else it comes itself.
    follows = torch.where(
        targets, path.gather(1, below + 1), torch.arange(L, device=targets.device)
    )
    rows = torch.arange(B, device=targets.device)[:, None]
    flipped = before.gather(1, below) + steps[rows, below, follows].double()

    left = sizes - below + torch.where(targets, -1, 1)  # [B, L] steps after the flip, END's too
    width = L + 1 + 6 * head.hidden_dim  # scores of a step; gates, output and cell of a state
    at_once = max(1, values_at_once // width)
    image, label = (left > 0).nonzero(as_tuple=True)
    counts = left[image, label].cumsum(0)
    first = 0
    while first < len(image):
        held = counts[first - 1] if first else 0
        last = max(first + 1, int(torch.searchsorted(counts, held + at_once, right=True)))
        some = slice(first, last)
        flipped[image[some], label[some]] += _after_flip(
            head, embedding, targets, image[some], label[some], below
        )
        first = last
    return before[:, -1], flipped


def _path_log_probs(head: Head, embedding: ImageEmbedding, targets: Tensor) -> Tensor:
    """Return the log-probability of every label after each prefix of the sets: [B, T+1, L+1]."""
    paths = increasing_paths(targets)
    scores = head.score_paths(embedding, paths)
    forbidden = forbidden_labels(paths, head.num_labels, "increasing")
    return scores.masked_fill(forbidden, -torch.inf).log_softmax(2)


def _after_flip(
    head: Head,
    embedding: ImageEmbedding,
    targets: Tensor,
    image: Tensor,
    label: Tensor,
    below: Tensor,
) -> Tensor:
    """Return the log-probability [P] of what follows the label that is turned, END included.

    Args:
        head: scores steps.
        embedding: of B images.
        targets: [B, L] bool.
        image: [P] whose set is changed.
        label: [P] which label is turned.
        below: [B, L] how many labels of the set are below each label.
    """
    L = head.num_labels
    sets = targets[image]
    pairs = torch.arange(len(image), device=image.device)
    sets[pairs, label] = ~sets[pairs, label]
    paths = increasing_paths(sets)
    positions = torch.arange(paths.shape[1] + 1, device=paths.device)
    sizes = (paths != PAD).sum(1, keepdim=True)
    wanted = (positions > below[image, label][:, None]) & (positions <= sizes)
    rows = head.score_steps(embedding, paths, wanted, image)  # [M, L+1]
    last = functional.pad(paths, (1, 0), value=PAD)[wanted]  # [M]
    following = functional.pad(paths, (0, 1), value=PAD)
    following = following.masked_fill(following == PAD, L)[wanted]
    columns = torch.arange(L + 1, device=rows.device)
    rows.masked_fill_((columns <= last[:, None]) & (columns < L), -torch.inf)
    chosen = rows.gather(1, following[:, None])[:, 0].double() - rows.logsumexp(1).double()
    of_path = wanted.nonzero(as_tuple=True)[0]
    return chosen.new_zeros(len(image)).index_add_(0, of_path, chosen)
