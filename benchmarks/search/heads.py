"""Trained heads to benchmark, with features of images that they have not seen.

Features are random projections of sampled label sets under Gaussian noise. A head is trained by
`cnnrnn.training` when it is first asked for, which takes minutes, and kept in `benchmarks/.cache/`.
`python -m benchmarks.search.heads` trains all four ahead of time; under pytest, `-s` shows
progress.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.search.label_sets import sample_label_sets
from cnnrnn import Head, ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import Dataset
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.training.run import train

CACHE = Path(__file__).resolve().parents[1] / ".cache"
VERSION = 1  # raise it when a change to the package's training should reach the kept heads

TRAIN_IMAGES = 20_000
VAL_IMAGES = 2_000
HELD_OUT_IMAGES = 32_768  # half of them to fill the prefix table, half to time
FEATURE_DIM = 128
SIGNAL = 2.6  # distance of an image with a label from one without, in standard deviations of noise
SEED = 0

Configs = tuple[ModelConfig, SearchConfig, TrainConfig]

SEARCH = SearchConfig(beam_size=4, max_labels=8)
EPOCHS = {80: 8, 1000: 5}
WARM_EPOCHS = 40
QUICK_EPOCHS = 2
QUICK_WARM_EPOCHS = 6


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A trained head and images that it was not trained on.

    Attributes:
        head: in eval mode, on the CPU; its labels are the columns of `sets`.
        sets: [HELD_OUT_IMAGES, L] bool, the images' true label sets.
        all_features: [HELD_OUT_IMAGES, F] float32.
    """

    head: Head
    sets: Tensor
    all_features: Tensor

    def features(self, images: slice | range) -> Tensor:
        """Return features [n, F] of held-out images, numbered from 0."""
        if isinstance(images, range):
            return self.all_features[torch.tensor(images, dtype=torch.int64)]
        return self.all_features[images]


def _print(line: str) -> None:
    print(line, flush=True)


@cache
def trained_head(
    num_labels: int,
    chain_term: bool,
    quick: bool = False,
    say: Callable[[str], None] = _print,
) -> TrainedHead:
    """Return a trained head, from the cache where it is there.

    Args:
        num_labels: L, 80 or 1,000.
        chain_term: whether it has the chain term.
        quick: trained for a few epochs alone.
        say: gets lines about a training.

    Raises:
        ValueError: when there is no recipe for `num_labels`.
    """
    if num_labels not in EPOCHS:
        raise ValueError(
            f"num_labels must be one of {', '.join(map(str, EPOCHS))}, got {num_labels}"
        )
    sets, features = _images(num_labels)
    configs = _configs(num_labels, chain_term, quick)
    place = _place(num_labels, chain_term, sets, configs)
    if not place.is_dir():
        _train(sets, features, configs, place, say)
    held_out = slice(TRAIN_IMAGES + VAL_IMAGES, None)
    return TrainedHead(
        load_checkpoint(place).head,
        torch.from_numpy(sets[held_out]),
        torch.from_numpy(features[held_out]),
    )


def is_trained(num_labels: int, chain_term: bool) -> bool:
    """Whether the cache holds that head, so that `trained_head` takes seconds."""
    configs = _configs(num_labels, chain_term, quick=False)
    return _place(num_labels, chain_term, _images(num_labels)[0], configs).is_dir()


def _place(num_labels: int, chain_term: bool, sets: np.ndarray, configs: Configs) -> Path:
    """Return the cache folder of a head: what it was made from is in the name."""
    digest = hashlib.sha256(np.packbits(sets).tobytes())
    digest.update(repr((VERSION, sets.shape, FEATURE_DIM, SIGNAL, SEED, configs)).encode())
    kind = "chain" if chain_term else "plain"
    return CACHE / f"{num_labels}-{kind}-{digest.hexdigest()[:16]}"


def _images(num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample training, validation and held-out images: sets [n, L] bool, features [n, F]."""
    count = TRAIN_IMAGES + VAL_IMAGES + HELD_OUT_IMAGES
    sets = sample_label_sets(count, num_labels, SEED)
    rng = np.random.default_rng(SEED)
    projection = rng.standard_normal((num_labels, FEATURE_DIM), dtype=np.float32)
    projection *= SIGNAL / FEATURE_DIM**0.5
    noise = rng.standard_normal((count, FEATURE_DIM), dtype=np.float32)
    return sets, sets.astype(np.float32) @ projection + noise


def _configs(num_labels: int, chain_term: bool, quick: bool) -> Configs:
    model = ModelConfig(
        trunk_dim=0,
        hidden_dim=512,
        chain_term=chain_term,
        input_dropout=0.0,
        joint_dropout=0.1,
    )
    training = TrainConfig(
        learning_rate=3e-3,
        batch_size=128,
        warm_epochs=QUICK_WARM_EPOCHS if quick else WARM_EPOCHS,
        epochs=QUICK_EPOCHS if quick else EPOCHS[num_labels],
        finish_epochs=0,
        patience=100,
        schedule="one_cycle",
        ema_decay=0.0,
        label_order="given",
        device="cpu",
        seed=SEED,
    )
    return model, SEARCH, training


def _train(
    sets: np.ndarray,
    features: np.ndarray,
    configs: Configs,
    target: Path,
    say: Callable[[str], None],
) -> None:
    """Train on the first images and keep the best epoch as checkpoint folder `target`."""
    seen = slice(TRAIN_IMAGES + VAL_IMAGES)
    rows, labels = np.nonzero(sets[seen])
    dataset = Dataset.from_arrays(
        source="sampled label sets",
        label_names=tuple(f"label {i}" for i in range(sets.shape[1])),
        label_indptr=np.searchsorted(rows, np.arange(seen.stop + 1)),
        label_indices=labels.astype(np.int32),
        splits={
            "train": np.arange(TRAIN_IMAGES),
            "val": np.arange(TRAIN_IMAGES, seen.stop),
        },
        features=features[seen],
    )

    def tell(line: str) -> None:
        say(f"[{target.name}] {line}")

    tell("a head is trained once, and kept for later runs")
    CACHE.mkdir(exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        trained = train(dataset, Path(folder), *configs, say=tell)
        trained.model.save(target)
    tell(f"trained in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for num_labels in EPOCHS:
        for chain_term in (True, False):
            trained_head(num_labels, chain_term)
