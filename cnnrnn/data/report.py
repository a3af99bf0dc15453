"""Reads a whole source, images included: what is in it, and everything that is wrong with it."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cnnrnn.config import MAX_PIXELS
from cnnrnn.data import load_dataset
from cnnrnn.data.dataset import WRITE_ZERO, Dataset, ImageSource
from cnnrnn.data.files import Problems
from cnnrnn.data.images import BadImageError, decoded, image_digest
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.machine.words import listed

CO_OCCURRENCE_LABELS = 1000
"""Pairs are counted among this many labels, the most frequent ones."""
VISITED_PREFIXES = 1000
SHOWN_DUPLICATES = 20
SHOWN_PROBLEMS = 3
"""Of a kind."""
_BLOCK = 8192  # records whose label matrix is made at once


@dataclass(frozen=True)
class SplitCounts:
    """How large a split is.

    Attributes:
        records: in the split.
        without_labels: records with an empty label set.
        mean_labels: labels per record.
        most_labels: labels of the largest set.
    """

    records: int
    without_labels: int
    mean_labels: float
    most_labels: int


@dataclass(frozen=True)
class Pair:
    """Two labels and in how many records both occur, the more frequent first."""

    first: str
    second: str
    records: int


@dataclass(frozen=True)
class PrefixSharing:
    """How far the label sets share prefixes when their labels go by frequency.

    Attributes:
        steps: labels of all records, which is the steps of all paths.
        distinct: different prefixes, the empty one not counted.
        visited_share: share of the steps that the 1,000 most visited prefixes serve.
    """

    steps: int
    distinct: int
    visited_share: float


@dataclass(frozen=True)
class SourceReport:
    """What a source holds and what is wrong with it.

    Attributes:
        source: the spec.
        problems: one sentence each, naming file and record.
        kinds: of each problem; those of one kind differ in record and value only.
        warnings: what was left out by rule, or looks wrong.
        notes: how the source was read, where that is not plain.
        records: read without a problem so far as labels go; unreadable images are among them.
        splits: name to counts.
        label_counts: name to records that have it, most frequent first.
        unknown_labels: (record, label) pairs that are neither present nor absent.
        set_sizes: size of a label set to records that have it.
        pairs: the labels that occur together most often.
        prefixes: sharing of label prefixes, over all records.
        duplicates: names of records with the same content, in groups.
        duplicates_across_splits: groups that have a record in one split only and a copy of it
            in another split only.
        duplicates_with_other_labels: groups whose records differ in labels.
        unreadable: images that cannot be read.
    """

    source: str
    problems: list[str]
    warnings: list[str]
    notes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    records: int = 0
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    label_counts: dict[str, int] = field(default_factory=dict)
    unknown_labels: int = 0
    set_sizes: dict[int, int] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    prefixes: PrefixSharing | None = None
    duplicates: list[list[str]] = field(default_factory=list)
    duplicates_across_splits: int = 0
    duplicates_with_other_labels: int = 0
    unreadable: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return asdict(self)

    def lines(self, labels: int = 20, every: bool = False) -> list[str]:
        """Return the report as lines of text.

        Args:
            labels: how many labels and pairs to show.
            every: show every problem and group of duplicates, not the first few of a kind.
        """
        lines = [f"{self.source}: {self.records:,} records, {len(self.label_counts):,} labels"]
        if self.records:
            lines += self._split_lines() + self._label_lines(labels) + self._content_lines(every)
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += self._problem_lines(len(self.problems) if every else SHOWN_PROBLEMS)
        count = len(self.problems)
        lines.append(f"{f'{count:,}' if count else 'no'} problem{'' if count == 1 else 's'}")
        return lines

    def _split_lines(self) -> list[str]:
        width = max(map(len, [*self.splits, "split"])) + 2
        lines = [f"{'split':<{width}}{'records':>10}{'without labels':>16}{'mean':>7}{'most':>6}"]
        lines += [
            f"{name:<{width}}{c.records:>10,}{c.without_labels:>16,}{c.mean_labels:>7.2f}"
            f"{c.most_labels:>6}"
            for name, c in self.splits.items()
        ]
        sizes = ", ".join(f"{size}: {count:,}" for size, count in self.set_sizes.items())
        return [*lines, f"records by size of the label set: {sizes}"]

    def _label_lines(self, labels: int) -> list[str]:
        lines = ["labels and records that have them:"]
        width = max(map(len, self.label_counts)) + 2
        lines += [
            f"  {name:<{width}}{count:>10,}{100 * count / self.records:>8.2f} %"
            for name, count in list(self.label_counts.items())[:labels]
        ]
        if len(self.label_counts) > labels:
            lines.append(f"  and {len(self.label_counts) - labels:,} more")
        absent = sum(count == 0 for count in self.label_counts.values())
        if absent:
            lines.append(f"labels that no record has: {absent:,}")
        if self.unknown_labels:
            lines.append(f"labels neither present nor absent in a record: {self.unknown_labels:,}")
        if self.pairs:
            lines.append("labels that occur together most often:")
        lines += [
            f"  {pair.first} + {pair.second}: {pair.records:,}, "
            f"{100 * pair.records / self.label_counts[pair.first]:.1f} % of the first, "
            f"{100 * pair.records / self.label_counts[pair.second]:.1f} % of the second"
            for pair in self.pairs[:labels]
        ]
        assert self.prefixes is not None
        return [
            *lines,
            f"label prefixes by frequency: {self.prefixes.distinct:,} different ones for "
            f"{self.prefixes.steps:,} steps, the {VISITED_PREFIXES:,} most visited serve "
            f"{100 * self.prefixes.visited_share:.1f} %",
        ]

    def _problem_lines(self, shown: int) -> list[str]:
        """Return the first problems of each kind, and how many more there are."""
        of_kind: dict[str, list[str]] = {}
        for kind, problem in zip(self.kinds, self.problems, strict=True):
            of_kind.setdefault(kind, []).append(problem)
        lines = []
        for problems in of_kind.values():
            lines += [f"problem: {problem}" for problem in problems[:shown]]
            if len(problems) > shown:
                lines.append(
                    f"  and {len(problems) - shown:,} more of this kind, {len(problems):,} in all "
                    "(--all lists them)"
                )
        return lines

    def _content_lines(self, every: bool) -> list[str]:
        copies = sum(len(group) - 1 for group in self.duplicates)
        lines = [
            f"duplicates: {copies:,} records repeat the content of another, in "
            f"{len(self.duplicates):,} groups; {self.duplicates_across_splits:,} groups across "
            f"splits, {self.duplicates_with_other_labels:,} with different labels"
        ]
        shown = len(self.duplicates) if every else SHOWN_DUPLICATES
        lines += [
            f"  {' = '.join(group)}" if every or len(group) <= 4
            else f"  {' = '.join(group[:4])} = ..."
            for group in self.duplicates[:shown]
        ]  # fmt: skip
        if len(self.duplicates) > shown:
            lines.append(f"  and {len(self.duplicates) - shown:,} more groups")
        return [*lines, f"unreadable images: {self.unreadable:,}"]


def check_source(
    spec: str,
    *,
    images: str | Path | None = None,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int = 0,
    pairs: int = 20,
    progress: Progress = no_progress,
) -> SourceReport:
    """Read a whole source and report on it.

    Args:
        spec: as for `load_dataset`.
        images: image folder, as for `load_dataset`.
        follow_links: as for `load_dataset`.
        max_pixels: as for `load_dataset`.
        workers: processes that decode images; 0 decodes in this one.
        pairs: how many pairs of labels to report.
        progress: told how many images are done.

    Returns:
        The report; what is wrong with the source is in it and not raised.

    Raises:
        ModuleNotFoundError: the source needs an extra that is not installed.
    """
    problems = Problems(keep=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = None
        with problems.part():
            dataset = load_dataset(
                spec, images=images, follow_links=follow_links, max_pixels=max_pixels,
                problems=problems,
            )  # fmt: skip
    notes = [str(warning.message) for warning in caught]
    if dataset is None:
        return SourceReport(spec, problems.messages, notes, problems.notes, problems.kinds)
    digests = _read_contents(dataset, workers, problems, progress)
    groups = _groups(digests)
    member = _memberships(dataset)
    _check_overlap(dataset, member, problems)
    order = np.argsort(-dataset.label_counts(), kind="stable")
    counts = dataset.label_counts()
    sizes = np.bincount(np.diff(dataset.label_indptr))
    if never := dataset.never_absent():
        notes.append(f"no record is known to lack {listed(never)}; {WRITE_ZERO}")
    unknown = dataset.unknown_indices
    return SourceReport(
        source=spec,
        problems=problems.messages,
        warnings=notes,
        notes=problems.notes,
        kinds=problems.kinds,
        records=len(dataset),
        splits={name: _split_counts(dataset, rows) for name, rows in dataset.splits.items()},
        label_counts={dataset.label_names[i]: int(counts[i]) for i in order},
        unknown_labels=0 if unknown is None else len(unknown),
        set_sizes={size: int(count) for size, count in enumerate(sizes) if count},
        pairs=_frequent_pairs(dataset, order[:CO_OCCURRENCE_LABELS], pairs),
        prefixes=prefix_sharing(dataset, order),
        duplicates=[[dataset.record_name(i) for i in group] for group in groups],
        duplicates_across_splits=sum(_is_across_splits(member[group]) for group in groups),
        duplicates_with_other_labels=sum(
            len({dataset.labels(i).tobytes() for i in group}) > 1 for group in groups
        ),
        unreadable=0 if dataset.images is None else digests.count(None),
    )


def _split_counts(dataset: Dataset, records: npt.NDArray[np.int64]) -> SplitCounts:
    sizes = np.diff(dataset.label_indptr)[records]
    if not len(sizes):
        return SplitCounts(0, 0, 0.0, 0)
    return SplitCounts(len(sizes), int((sizes == 0).sum()), float(sizes.mean()), int(sizes.max()))


def _frequent_pairs(dataset: Dataset, labels: npt.NDArray[np.int64], most: int) -> list[Pair]:
    """Return the pairs of `labels` that occur together most often."""
    together = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    column = np.full(len(dataset.label_names), -1, dtype=np.int64)
    column[labels] = np.arange(len(labels))
    for start in range(0, len(dataset), _BLOCK):
        pointers = dataset.label_indptr[start : start + _BLOCK + 1]
        columns = column[dataset.label_indices[pointers[0] : pointers[-1]]]
        rows = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))[columns >= 0]
        block = torch.zeros(len(pointers) - 1, len(labels))
        block[torch.from_numpy(rows), torch.from_numpy(columns[columns >= 0])] = 1
        together += (block.T @ block).long()  # exact: counts of a block are far below 2^24
    counts = together.triu(1).flatten()
    best = counts.sort(descending=True, stable=True).indices[:most].tolist()
    names = [dataset.label_names[i] for i in labels]
    return [
        Pair(names[pair // len(names)], names[pair % len(names)], int(counts[pair]))
        for pair in best
        if counts[pair]
    ]


def prefix_sharing(dataset: Dataset, order: npt.NDArray[np.int64]) -> PrefixSharing:
    """Count the label prefixes of all records.

    Args:
        dataset: gives the label sets.
        order: [L] label indices in path order.
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    records = np.repeat(np.arange(len(dataset)), np.diff(dataset.label_indptr))
    ranks = rank[dataset.label_indices]
    ranks = ranks[np.lexsort((ranks, records))]
    starts, sizes = dataset.label_indptr[:-1], np.diff(dataset.label_indptr)
    parent = np.zeros(len(dataset), dtype=np.int64)  # of each record, among those one step shorter
    visits = []
    for step in range(int(sizes.max(initial=0))):
        longer = sizes > step
        keys = parent[longer] * len(order) + ranks[starts[longer] + step]
        _, nodes, counts = np.unique(keys, return_inverse=True, return_counts=True)
        parent[longer] = nodes
        visits.append(counts)
    all_visits = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *visits]))[::-1]
    steps = int(sizes.sum())
    share = float(all_visits[:VISITED_PREFIXES].sum() / steps) if steps else 0.0
    return PrefixSharing(steps, len(all_visits), share)


def _read_contents(
    dataset: Dataset, workers: int, problems: Problems, progress: Progress
) -> list[bytes | None]:
    """Return a digest of each record's content, None where its image cannot be read."""
    if dataset.images is None:
        if dataset.features is None:
            return []
        return [hashlib.blake2b(row.data, digest_size=16).digest() for row in dataset.features]
    digests: list[bytes | None] = []
    with progress("images", len(dataset)) as advance:
        for digest, reason in _inspect_all(dataset.images, workers, dataset.max_pixels):
            if reason is not None:
                record = f"record {dataset.rows[len(digests)]} of {dataset.source}"
                image = dataset.images[len(digests)]
                path, place = (image, record) if isinstance(image, Path) else (record, None)
                problems.add(str(BadImageError(path, reason, place)), f"unreadable, {reason}")
            digests.append(digest)
            advance(1)
    return digests


Content = tuple[bytes | None, str | None]


def _inspect_all(images: Sequence[ImageSource], workers: int, max_pixels: int) -> Iterator[Content]:
    inspect = partial(_inspect, max_pixels=max_pixels)
    if workers < 1:
        yield from map(inspect, images)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(inspect, images, chunksize=64)


def _inspect(image: ImageSource, max_pixels: int) -> Content:
    """Decode an image; return the digest of its content, or what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd EXIF blocks
            with decoded(image, name="image", max_pixels=max_pixels):
                pass
        return image_digest(image), None
    except BadImageError as error:
        return None, error.reason
    except OSError as error:
        return None, str(error.strerror)


def _groups(digests: Sequence[bytes | None]) -> list[list[int]]:
    """Return the records with the same digest, where there are several."""
    records: dict[bytes, list[int]] = {}
    for record, digest in enumerate(digests):
        if digest is not None:
            records.setdefault(digest, []).append(record)
    return [group for group in records.values() if len(group) > 1]


def _memberships(dataset: Dataset) -> npt.NDArray[np.bool_]:
    """Return which splits each record is in, bool [n, S]."""
    member = np.zeros((len(dataset), len(dataset.splits)), dtype=bool)
    for split, records in enumerate(dataset.splits.values()):
        member[records, split] = True
    return member


def _check_overlap(dataset: Dataset, member: npt.NDArray[np.bool_], problems: Problems) -> None:
    """Name two splits that share records, unless one holds the other as trainval does train."""
    sizes = member.sum(0)
    for (i, first), (j, second) in itertools.combinations(enumerate(dataset.splits), 2):
        shared = np.flatnonzero(member[:, i] & member[:, j])
        if len(shared) and len(shared) != min(sizes[i], sizes[j]):
            problems.add(
                f"{dataset.source}: splits {first} and {second} must not share records unless one "
                f"holds the other, got {len(shared):,} in both, the first of them "
                f"{dataset.record_name(int(shared[0]))}"
            )


def _is_across_splits(member: npt.NDArray[np.bool_]) -> bool:
    """Tell whether one record is in a split without another, and that in a split without it.

    Args:
        member: [m, S] of records with the same content.
    """
    without = member.T.astype(np.float32) @ ~member > 0  # [S, S] in one split, not in the other
    return bool((without & without.T).any())
