"""The label space: names, frequency order, label sets and the paths that represent them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn.config import Order, TrainConfig

PAD = -1


@dataclass(frozen=True)
class LabelSpace:
    """Label names in path order, and where each stood in the data it came from.

    Attributes:
        names: [L] label names; index 0 comes first on a training path.
        source_index: [L] position of each name in the data source's own order.
    """

    names: tuple[str, ...]
    source_index: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that names are distinct and positions are a permutation."""
        if len(set(self.names)) != len(self.names):
            raise ValueError("label names must be distinct")
        if sorted(self.source_index) != list(range(len(self.names))):
            raise ValueError(
                f"source_index must be a permutation of {len(self.names)} positions, "
                f"got {list(self.source_index)[:10]}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def given(cls, names: tuple[str, ...]) -> LabelSpace:
        """Keep the order of the data source."""
        return cls(names, tuple(range(len(names))))

    @classmethod
    def by_frequency(cls, names: tuple[str, ...], counts: np.ndarray) -> LabelSpace:
        """Order labels by frequency, most frequent first; ties by position in the source.

        Args:
            names: [L] label names in the source's order.
            counts: [L] images that carry each label in the training split.
        """
        order = np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")
        return cls(tuple(names[i] for i in order), tuple(int(i) for i in order))

    @classmethod
    def rarest_first(cls, names: tuple[str, ...], counts: np.ndarray) -> LabelSpace:
        """Order labels by frequency, rarest first; arguments and ties as in `by_frequency`."""
        return cls.by_frequency(names, -np.asarray(counts, dtype=np.int64))

    @classmethod
    def random(cls, names: tuple[str, ...], generator: torch.Generator) -> LabelSpace:
        """Draw one order from a generator on the CPU."""
        return cls.given(names).permuted(torch.randperm(len(names), generator=generator).tolist())

    def permuted(self, order: Sequence[int]) -> LabelSpace:
        """Return the space whose label i is this one's label `order[i]`."""
        return LabelSpace(
            tuple(self.names[i] for i in order), tuple(self.source_index[i] for i in order)
        )

    def from_source(self, targets: Tensor, source_names: tuple[str, ...]) -> Tensor:
        """Reorder the columns of a data source's label matrix into path order.

        Args:
            targets: [n, L] label matrix in the source's order.
            source_names: [L] the source's label names; the same names may come in another order.

        Returns:
            [n, L] the same matrix with columns in path order.

        Raises:
            ValueError: when the source's names are not this space's names.
        """
        position = {name: i for i, name in enumerate(source_names)}
        known = set(self.names)
        missing = [name for name in self.names if name not in position]
        unknown = [name for name in source_names if name not in known]
        if missing or unknown:
            raise ValueError(
                f"the data's {len(source_names)} labels are not the model's {len(self)}: "
                f"missing {missing[:5]}, unknown {unknown[:5]}"
            )
        return targets[:, [position[name] for name in self.names]]


def increasing_paths(targets: Tensor) -> Tensor:
    """Turn label sets into paths that go up in label index.

    Args:
        targets: [B, L] bool, columns in path order.

    Returns:
        [B, T] int64 label indices padded with -1, T the size of the largest set.
    """
    sizes = targets.sum(1)
    longest = int(sizes.max()) if len(targets) else 0
    paths = torch.full((len(targets), longest), PAD, dtype=torch.int64, device=targets.device)
    rows, columns = targets.nonzero(as_tuple=True)
    starts = sizes.cumsum(0) - sizes
    paths[rows, torch.arange(len(rows), device=rows.device) - starts[rows]] = columns
    return paths


def shuffled_paths(paths: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle the labels of each path.

    Args:
        paths: [B, T] int64 label indices padded with -1.
        generator: on the CPU.

    Returns:
        [B, T] the same labels, padding last.
    """
    keys = torch.rand(paths.shape, generator=generator).to(paths.device)
    return paths.gather(1, keys.masked_fill(paths == PAD, torch.inf).argsort(1))


class PrefixTrie(NamedTuple):
    """The distinct prefixes of a batch's paths, shorter ones first; node 0 is the empty prefix.

    Attributes:
        nodes: [B, T+1] each path's prefixes, from the empty one to the whole path; -1 past the end.
        labels: for each length from 1 on, [n] the last labels of its prefixes.
        parents: for each length from 1 on, [n] which prefix of one label less each of them extends,
            numbered among those of that length, ascending.
    """

    nodes: Tensor
    labels: tuple[Tensor, ...]
    parents: tuple[Tensor, ...]


def prefix_trie(paths: Tensor) -> PrefixTrie:
    """Find the prefixes that a batch's paths share: [B, T] labels padded with -1."""
    nodes = functional.pad(torch.full_like(paths, -1), (1, 0))
    at = paths.new_zeros(len(paths))  # each path's prefix among those of its length
    alive = torch.arange(len(paths), device=paths.device)
    first, count = 0, 1
    width = int(paths.max()) + 1 if paths.numel() else 1
    labels, parents = [], []
    for step in range(paths.shape[1]):
        alive = alive[paths[alive, step] != PAD]
        if not len(alive):
            break
        keys = at[alive] * width + paths[alive, step]
        distinct, of_path = keys.unique(return_inverse=True)
        first, count = first + count, len(distinct)
        nodes[alive, step + 1] = first + of_path
        at[alive] = of_path
        labels.append(distinct % width)
        parents.append(distinct // width)
    return PrefixTrie(nodes, tuple(labels), tuple(parents))


def path_sets(labels: Tensor, num_labels: int) -> Tensor:
    """Turn padded paths into label sets.

    Args:
        labels: [..., T] int64 label indices padded with -1.
        num_labels: L.

    Returns:
        [..., L] bool.
    """
    padded = torch.zeros(*labels.shape[:-1], num_labels + 1, dtype=torch.bool, device=labels.device)
    padded.scatter_(-1, labels.masked_fill(labels == PAD, num_labels), True)
    return padded[..., :num_labels]


def forbidden_labels(paths: Tensor, num_labels: int, order: Order) -> Tensor:
    """Return what may not follow each prefix of each path: [B, T] -> [B, T+1, L+1] bool."""
    B, T = paths.shape
    if order == "increasing":
        labels = torch.arange(num_labels + 1, device=paths.device)
        last = functional.pad(paths, (1, 0), value=-1)  # [B, T+1]
        forbidden = labels <= last[:, :, None]
    else:
        forbidden = torch.zeros(B, T + 1, num_labels + 1, dtype=torch.bool, device=paths.device)
        if order == "unique":
            columns = paths.masked_fill(paths == PAD, num_labels)
            forbidden[:, 1:].scatter_(2, columns[:, :, None], True)
            for t in range(1, T + 1):
                forbidden[:, t] |= forbidden[:, t - 1]
    forbidden[:, :, num_labels] = False
    return forbidden


def first_label_space(
    names: tuple[str, ...], counts: np.ndarray, config: TrainConfig
) -> LabelSpace:
    """Return the label space that training starts with.

    Args:
        names: [L] label names in the source's order.
        counts: [L] training images that carry each label.
        config: names the label order; its seed draws `random`.
    """
    if config.label_order == "given":
        return LabelSpace.given(names)
    if config.label_order == "rare":
        return LabelSpace.rarest_first(names, counts)
    if config.label_order == "random":
        return LabelSpace.random(names, torch.Generator().manual_seed(config.seed))
    return LabelSpace.by_frequency(names, counts)


def check_unknown(unknown: Tensor, targets: Tensor) -> None:
    """Check unknown labels against the labels that are present, on one device.

    Raises:
        ValueError: they differ in shape, are not bool, or a label is both.
    """
    if unknown.shape != targets.shape or unknown.dtype != torch.bool:
        raise ValueError(
            f"unknown must be [n, L] bool like targets {list(targets.shape)}, got "
            f"{list(unknown.shape)} {unknown.dtype}"
        )
    for row, label in (unknown & targets).nonzero()[:1].tolist():
        raise ValueError(f"a label must not be true and unknown, got label {label} in row {row}")


def as_evidence(targets: Tensor, unknown: Tensor) -> Tensor:
    """Return what is known of label sets as evidence: [n, L] int8, see `check_evidence`.

    Args:
        targets: [n, L] bool, labels that are present.
        unknown: [n, L] bool, labels that are neither present nor absent.

    Raises:
        ValueError: as of `check_unknown`.
    """
    check_unknown(unknown, targets)
    return (targets.to(torch.int8) * 2 - 1).masked_fill(unknown, 0)


def check_evidence(
    evidence: Tensor, images: int, num_labels: int, most: int, limit: str = "max_labels"
) -> None:
    """Check what is known of images' labels, as csrc/bindings.cpp does for the compiled search.

    Args:
        evidence: to be [1 or B, L] int8: 1 present, -1 absent, 0 unknown.
        images: B.
        num_labels: L.
        most: how many labels of an image can be present: T, which a path can hold, or fewer.
        limit: what messages call that number.

    Raises:
        ValueError: for another shape or type, other values, and more present labels than that.
    """
    L = num_labels
    if evidence.dim() != 2 or evidence.shape[1] != L or evidence.shape[0] not in (1, images):
        raise ValueError(f"evidence must be [1 or {images}, {L}], got {list(evidence.shape)}")
    if evidence.dtype != torch.int8:
        raise ValueError(f"evidence must be int8, got {evidence.dtype}")
    for image, label in ((evidence < -1) | (evidence > 1)).nonzero()[:1].tolist():
        raise ValueError(
            "evidence must be 1 (present), -1 (absent) or 0 (unknown), got "
            f"{int(evidence[image, label])} for label {label} of image {image}"
        )
    present = (evidence == 1).sum(1)
    for image in (present > most).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"image {image} has {present[image]} labels known to be present, "
            f"more than {limit} ({most})"
        )
