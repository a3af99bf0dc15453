"""Long-tailed, correlated label sets whose prefixes are shared as those of COCO 2014 are.

An image draws a scene, a number of labels, and then that many different labels with the scene's
weights. A scene favours its labels by a power law over an order of its own, so that labels
co-occur; a small background weight lets every label turn up anywhere; label 0 is likely in every
scene, as a person is. The parameters were fitted by random search to published summary figures of
COCO's label sets (`COCO_2014`); no label set of it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LabelSets = npt.NDArray[np.bool_]  # [n, L], columns in path order
FITTED_LABELS = 80
STRUCTURE_SEED = 80  # of the scenes; `seed` draws images from them
IMAGES_AT_ONCE = 4096


@dataclass(frozen=True)
class LabelSetModel:
    """Parameters of the sampler, fitted at 80 labels.

    With L labels there are `scenes * sqrt(L / 80)` scenes, popularity decays over l / L, and the
    size of a set is stretched by a random factor of mean `(L / 80) ** size_growth`: there are 2.9
    labels per image at 80, 5.6 at 1,000.

    Attributes:
        small_sizes: shares of images with 0, 1 and 2 labels.
        size_ratio: share of images with k + 1 labels over that with k, from k = 3 on.
        largest_size: at 80 labels.
        size_growth: exponent of the size of sets in the number of labels.
        scenes: number of scenes.
        scene_decay: exponent of the scenes' shares over their rank.
        popularity_decay: of log-popularity from the first label to the last.
        popularity_power: exponent of popularity over label index + 1.
        focus: exponent of a scene's weights over its own order of labels.
        focus_offset: added to the position in that order; a larger one flattens the top.
        background: share of a scene's weight that is spread over all labels.
        background_power: exponent of popularity in that share.
        first_label: mean over scenes of label 0's log-weight; all others weigh 1 together.
        first_label_spread: its standard deviation.
    """

    small_sizes: tuple[float, float, float] = (0.009, 0.204, 0.303)
    size_ratio: float = 0.58
    largest_size: int = 18
    size_growth: float = 0.26
    scenes: int = 30
    scene_decay: float = 0.616
    popularity_decay: float = 1.219
    popularity_power: float = 0.2746
    focus: float = 2.941
    focus_offset: float = 2.846
    background: float = 0.01676
    background_power: float = 0.1449
    first_label: float = -1.331
    first_label_spread: float = 0.258


MODEL = LabelSetModel()


class PrefixStatistics(NamedTuple):
    """How label sets share the prefixes of their increasing paths.

    A path visits each of its prefixes once: the empty one, which counts as a prefix, up to the
    whole set, from which END follows.

    Attributes:
        mean_labels: labels per image.
        singletons: share of images with exactly one label.
        path_steps: labels and ENDs of all paths, which is also the number of visits.
        distinct: number of different prefixes.
        visits: [distinct] int64 visits of each prefix, most visited first.
        first_images: [distinct] int64 first image that visits each prefix, ascending.
    """

    mean_labels: float
    singletons: float
    path_steps: int
    distinct: int
    visits: npt.NDArray[np.int64]
    first_images: npt.NDArray[np.int64]

    def share_of_most_visited(self, count: int) -> float:
        """Return the share of visits that the `count` most visited prefixes serve."""
        return float(self.visits[:count].sum() / self.path_steps)

    def distinct_after(self, images: int) -> int:
        """Return the number of different prefixes of the first `images` images."""
        return int(np.searchsorted(self.first_images, images))


class PublishedFigures(NamedTuple):
    """Summary figures of a data set's label sets; attributes as in `PrefixStatistics`."""

    images: int
    mean_labels: float
    singletons: float
    path_steps: int
    distinct: int
    share_of_most_visited: dict[int, float]
    distinct_after: dict[int, int]


COCO_2014 = PublishedFigures(
    images=122_218,
    mean_labels=2.93,
    singletons=0.206,
    path_steps=479_845,
    distinct=40_128,
    share_of_most_visited={1_000: 0.83, 10_000: 0.93},
    distinct_after={1_000: 1_151, 4_000: 3_360, 16_000: 9_311, 32_000: 15_520, 64_000: 25_458},
)


def sample_label_sets(num_images: int, num_labels: int = FITTED_LABELS, seed: int = 0) -> LabelSets:
    """Draw label sets of images, the same for the same arguments.

    Args:
        num_images: n.
        num_labels: L, at least 2.
        seed: of the images; the scenes depend on L alone.

    Returns:
        [n, L] bool, most frequent label first.

    Raises:
        ValueError: when a size is too small.
    """
    if num_images < 0:
        raise ValueError(f"num_images must be at least 0, got {num_images}")
    if num_labels < 2:
        raise ValueError(f"num_labels must be at least 2, got {num_labels}")
    shares, log_weights = _scenes(num_labels)
    rng = np.random.default_rng(seed)
    scenes = rng.choice(len(shares), size=num_images, p=shares)
    sizes = _set_sizes(rng, num_images, num_labels)
    sets = np.zeros((num_images, num_labels), dtype=np.bool_)
    for start in range(0, num_images, IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        # The k largest of log-weight + Gumbel noise are k draws without replacement.
        noise = rng.standard_exponential((len(sizes[rows]), num_labels))
        keys = log_weights[scenes[rows]] - np.log(noise)
        sets[rows] = _largest(keys, sizes[rows])
    order = np.argsort(-sets.sum(0), kind="stable")
    return sets[:, order]


def prefix_statistics(sets: LabelSets) -> PrefixStatistics:
    """Count the prefixes of the increasing paths of label sets.

    Args:
        sets: [n, L] bool, columns in path order, n at least 1.
    """
    images, num_labels = sets.shape
    labels = np.nonzero(sets)[1]
    sizes = sets.sum(1)
    starts = np.cumsum(sizes) - sizes
    prefix = np.zeros(images, dtype=np.int64)  # the prefix that each path has reached
    distinct, visits, first_images = 1, [np.array([images])], [np.array([0])]
    for step in range(int(sizes.max())):
        longer = np.flatnonzero(sizes > step)
        extensions = prefix[longer] * num_labels + labels[starts[longer] + step]
        _, first, reached, count = np.unique(
            extensions, return_index=True, return_inverse=True, return_counts=True
        )
        prefix[longer] = distinct + reached
        distinct += len(first)
        visits.append(count)
        first_images.append(longer[first])
    return PrefixStatistics(
        mean_labels=float(sizes.mean()),
        singletons=float((sizes == 1).mean()),
        path_steps=int(sizes.sum()) + images,
        distinct=distinct,
        visits=np.sort(np.concatenate(visits))[::-1],
        first_images=np.sort(np.concatenate(first_images)),
    )


def _scenes(num_labels: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the scenes' shares [S] and their labels' log-weights [S, L]."""
    rng = np.random.default_rng(STRUCTURE_SEED)
    count = max(1, round(MODEL.scenes * math.sqrt(num_labels / FITTED_LABELS)))
    index = np.arange(num_labels)
    popularity = np.exp(-MODEL.popularity_decay * index / num_labels)
    popularity *= (index + 1.0) ** -MODEL.popularity_power
    position = rng.random((count, num_labels)).argsort(axis=1)
    focused = popularity * (position + MODEL.focus_offset) ** -MODEL.focus
    spread = popularity**MODEL.background_power
    focused[:, 0] = spread[0] = 0.0
    weights = (1 - MODEL.background) * focused / focused.sum(1, keepdims=True)
    weights += MODEL.background * spread / spread.sum()
    weights[:, 0] = np.exp(
        MODEL.first_label + MODEL.first_label_spread * rng.standard_normal(count)
    )
    shares = np.arange(1.0, count + 1) ** -MODEL.scene_decay
    return shares / shares.sum(), np.log(weights)


def _set_sizes(rng: np.random.Generator, count: int, num_labels: int) -> npt.NDArray[np.int64]:
    """Draw the number of labels of each image: [count]."""
    tail = MODEL.size_ratio ** np.arange(MODEL.largest_size - 2)
    tail *= (1 - sum(MODEL.small_sizes)) / tail.sum()
    shares = np.concatenate([MODEL.small_sizes, tail])
    scale = (num_labels / FITTED_LABELS) ** MODEL.size_growth
    sizes = rng.choice(len(shares), size=count, p=shares)
    # A factor of mean `scale` that differs between images: one factor for all would leave gaps.
    stretched = np.rint(sizes * (1 + 2 * (scale - 1) * rng.random(count))).astype(np.int64)
    return np.clip(stretched, 0, min(num_labels, round(MODEL.largest_size * scale)))


def _largest(keys: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> LabelSets:
    """Mark the `counts[i]` largest keys of each row: [m, L] -> [m, L] bool."""
    most = max(int(counts.max()), 1)
    candidates = np.argpartition(-keys, most - 1, axis=1)[:, :most]
    order = np.argsort(-np.take_along_axis(keys, candidates, axis=1), axis=1)
    candidates = np.take_along_axis(candidates, order, axis=1)
    marked = np.zeros(keys.shape, dtype=np.bool_)
    np.put_along_axis(marked, candidates, np.arange(most) < counts[:, None], axis=1)
    return marked
