"""Runs a comparison: splits, tuning, ensembles, measuring.

Whatever a method chooses (its setting, epoch, threshold, k), it chooses on the validation split;
the test split is looked at once per method and seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnnrnn.comparison.baselines import DivergedError, choose_cut
from cnnrnn.comparison.fitting import (
    Comparison,
    Fitted,
    Method,
    Scored,
    cut_scores,
    path_ensemble,
)
from cnnrnn.comparison.methods import METHODS, chosen_methods
from cnnrnn.comparison.results import Results, Row, markdown_table
from cnnrnn.config import Backend, CompareConfig, ModelConfig, OnBadImage, SearchConfig, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.data.splits import with_fixed_splits
from cnnrnn.machine.files import write_whole
from cnnrnn.machine.lock import alone_in
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.metrics import multilabel_metrics
from cnnrnn.model.ensemble import mixture_log_probs
from cnnrnn.network.backbones import Backbone
from cnnrnn.network.features import cached_features
from cnnrnn.reveal import metrics_of_others, reveal
from cnnrnn.search import NonFiniteError
from cnnrnn.training.batches import Split
from cnnrnn.training.loop import NonFiniteLossError

REVEALED = 1
"""True labels of an image that are known, in the column of known labels."""


def frozen_features(
    dataset: Dataset,
    backbone: Backbone,
    folder: Path,
    *,
    backend: Backend = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
) -> Dataset:
    """Return a dataset of pictures as one of feature vectors, computed once and kept in `folder`.

    Args:
        dataset: pictures.
        backbone: where its weights are decides the device.
        folder: holds the feature cache.
        backend: what runs the backbone, see `BackboneRunner`.
        batch_size: pictures per step.
        workers: threads that decode pictures; one per core by default, up to 8.
        on_bad_image: `skip` leaves unreadable pictures out of the dataset.
        progress: told how many pictures are done.
    """
    device = next(backbone.parameters()).device
    features = cached_features(
        backbone, dataset, folder, device=device, backend=backend, batch_size=batch_size,
        workers=workers, on_bad_image=on_bad_image, progress=progress,
    )  # fmt: skip
    position = np.full(len(dataset), -1)
    position[features.kept] = np.arange(len(features.kept))
    splits = {
        name: position[records][position[records] >= 0] for name, records in dataset.splits.items()
    }
    return dataset.select(features.kept).with_changes(
        splits=splits,
        features=features.values.numpy(),
        images=None,
        boxes=None,
    )


def compare(
    dataset: Dataset,
    out: Path,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
    compare_config: CompareConfig | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train every method on one set of features and measure it on the `test` split.

    Writes results.json, table.md and weights to `out`.

    Each method tries equally many settings of its own hyperparameter and keeps the one whose own
    decision has the best O-F1 plus mAP on the validation split. Each method and seed that is done
    is kept in `out`/results.json, and a second call goes on from there.

    Args:
        dataset: feature vectors with a `test` split; where there is no `val` split, a share of
            the training images is held out, the same for all.
        out: folder for results and weights; made when missing.
        model_config: the head; all neural methods share trunk and dropout.
        search_config: of the path models.
        config: the recipe; its seed draws the held-out images, its learning rate is the grid's
            first.
        compare_config: seeds, methods, settings and members; `CompareConfig()` by default.
        say: gets one line per method and seed.

    Returns:
        The rows of every method and seed, methods in the order of `METHODS`.

    Raises:
        DataError: the data has no features or lacks a usable split.
        ValueError: a method is unknown or lacks what it is made of, or `out` holds the results of
            other options or other data.
        InUseError: another process compares in `out`.
    """
    compare_config = compare_config or CompareConfig()
    methods = chosen_methods(compare_config, model_config, search_config)
    comparison = _comparison(dataset, out, model_config, search_config, config, compare_config)
    with alone_in(out, "a comparison"):
        results = Results(out / "results.json", comparison.description)
        for method, seed in _schedule(methods, compare_config):
            members = _members(method, seed, compare_config)
            if (method.name, seed) in results and (
                method.base is None or results.rows(method.name, seed)[0].setting == members
            ):
                continue
            _run_method(comparison, method, seed, members, results, say)
    rows = [
        row
        for method in methods
        for title in method.rows
        for scheduled, seed in _schedule([method], compare_config)
        for row in results.rows(scheduled.name, seed)
        if row.title == title
    ]
    table = markdown_table(rows) + "\n"
    write_whole(out / "table.md", lambda file: file.write_text(table, encoding="utf-8"))
    return rows


def _run_method(
    comparison: Comparison,
    method: Method,
    seed: int,
    members: dict[str, float],
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Fit a method, or make an ensemble of members, measure it and keep its rows."""
    began = time.perf_counter()
    if method.base is None:
        setting, fitted = _tuned(comparison, method, seed, results, say)
    else:
        setting, fitted = members, _ensemble(comparison, method, seed, results)
    on_test = fitted.predict(comparison.test)
    judged = [
        _judge(comparison, method.by_k, val, test)
        for val, test in zip(fitted.predict(comparison.val), on_test, strict=True)
    ]
    known = _judge_others(comparison, fitted, on_test[0].scores)  # all its rows rank alike
    nll = _test_nll(comparison, fitted)
    seconds = round(time.perf_counter() - began, 2)
    rows = [
        Row(
            method.name, title, seed, setting, *figures, nll, fitted.is_bound, seconds, *known,
        )
        for title, figures in zip(method.rows, judged, strict=True)
    ]  # fmt: skip
    results.add(rows)
    chosen = "".join(f", {name} {value:g}" for name, value in setting.items())
    own = judged[0].own
    say(
        f"seed {seed}, {method.name}{chosen}: O-F1 {own['O-F1']:.4f}, mAP {own['mAP']:.4f}, "
        f"exact match {own['exact-match']:.4f}, {seconds:.0f} s"
    )


def _comparison(
    dataset: Dataset,
    out: Path,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
    compare_config: CompareConfig,
) -> Comparison:
    if dataset.features is None:
        raise DataError(
            f"{dataset.source} must hold feature vectors to compare on, got pictures: "
            "frozen_features makes them"
        )
    dataset = compared_splits(dataset, config, compare_config.test_split)
    splits = tuple(dataset.splits)
    config = replace(config, train_split=None, val_split=None)
    train_split, val_split, test_split = (
        Split(
            part,
            part.label_matrix(),
            torch.as_tensor(part.features),
            unknown=part.unknown_matrix() if part.has_unknown else None,
        )
        for part in (dataset.split(name) for name in splits)
    )
    return Comparison(
        dataset, train_split, val_split, test_split, model_config, search_config, config,
        compare_config, out,
    )  # fmt: skip


def compared_splits(dataset: Dataset, config: TrainConfig, test_split: str) -> Dataset:
    """Return a dataset whose splits are `train`, `val` and `test`, with no record in two of them.

    Args:
        dataset: has the split `test_split`, from which nothing else is taken.
        config: names the other splits, or the share that is held out.
        test_split: name of the split to test on.

    Raises:
        DataError: a split is missing or empty, or two share a record.
    """
    test = dataset.splits.get(test_split, ())
    if not len(test):
        found = ", ".join(f"{name} {len(rows)}" for name, rows in dataset.splits.items())
        raise DataError(
            f"{dataset.source} must have a {test_split} split with images to compare on, got "
            f"{found}; name another with test_split"
        )
    for option, name in (("train_split", config.train_split), ("val_split", config.val_split)):
        if name == test_split:
            raise DataError(
                f"{option} must be another split than test_split, got {name!r} for both"
            )
    others = {name: records for name, records in dataset.splits.items() if name != test_split}
    fixed = with_fixed_splits(dataset.with_changes(splits=others), config).splits
    for name in ("train", "val"):
        shared = np.intersect1d(fixed[name], test)
        if len(shared):
            raise DataError(
                f"{name} and test images must differ, got {len(shared)} in both, the first "
                f"{dataset.record_name(int(shared[0]))}; name other splits"
            )
    splits = {"train": fixed["train"], "val": fixed["val"], "test": np.asarray(test)}
    return dataset.with_changes(splits=splits)


def _schedule(
    methods: Sequence[Method], compare_config: CompareConfig
) -> Iterator[tuple[Method, int]]:
    """Yield methods and seeds in the order they run: seed by seed, ensembles last."""
    seeds = compare_config.seeds
    for seed in seeds:
        for method in methods:
            if method.base is None and (method.seeded or seed == seeds[0]):
                yield method, seed
    for method in methods:
        if method.base is not None:
            for group in ensemble_seeds(compare_config):
                yield method, group[0]


def ensemble_seeds(compare_config: CompareConfig) -> list[tuple[int, ...]]:
    """Return the seeds of each ensemble's members.

    The seeds of the comparison in groups of M; where there are fewer than M of them, one group
    that is filled up with the seeds after the largest.
    """
    seeds, members = compare_config.seeds, compare_config.members
    missing = members - len(seeds)
    if missing > 0:
        return [(*seeds, *range(max(seeds) + 1, max(seeds) + 1 + missing))]
    return [seeds[i : i + members] for i in range(0, len(seeds) - members + 1, members)]


def _members(method: Method, seed: int, compare_config: CompareConfig) -> dict[str, float]:
    """Return the seeds of an ensemble's members as its setting; nothing of other methods."""
    if method.base is None:
        return {}
    group = next(group for group in ensemble_seeds(compare_config) if group[0] == seed)
    return {f"member {i}": member for i, member in enumerate(group, 1)}


def _tuned(
    comparison: Comparison,
    method: Method,
    seed: int,
    results: Results,
    say: Callable[[str], None],
) -> tuple[dict[str, float], Fitted]:
    """Fit a method with its best setting, which the first seed has chosen where it is done."""
    assert method.fit is not None
    options = comparison.compare_config
    first = (method.name, options.seeds[0])
    if seed != options.seeds[0] and first in results and not options.tune_each_seed:
        values = [results.rows(*first)[0].setting[method.setting]]
    else:
        values = comparison.grid(method)
    best: tuple[float, Fitted] | None = None
    for value in values:
        folder = comparison.weights(method.name, seed, value)
        try:
            fitted = method.fit(comparison, value, seed, folder)
        except (NonFiniteLossError, NonFiniteError, DivergedError) as error:
            if best is None and value == values[-1]:
                raise
            say(f"seed {seed}, {method.name}: {method.setting} {value:g} is left out: {error}")
            continue
        if best is None or fitted.merit > best[1].merit:
            best = value, fitted
    assert best is not None
    return {method.setting: best[0]}, best[1]


def _ensemble(comparison: Comparison, method: Method, seed: int, results: Results) -> Fitted:
    """Make an ensemble; members that no seed has trained are trained."""
    assert method.base is not None
    base = METHODS[method.base]
    assert base.fit is not None
    first = comparison.compare_config.seeds[0]
    seeds = (int(member) for member in _members(method, seed, comparison.compare_config).values())
    folders, members = [], []
    for member in seeds:
        tuned_by = member if (base.name, member) in results else first
        value = results.rows(base.name, tuned_by)[0].setting[base.setting]
        folders.append(comparison.weights(base.name, member, value))
        members.append(base.fit(comparison, value, member, folders[-1]))
    if len(base.rows) == 2:
        return path_ensemble(comparison, folders)

    def mean_scores(split: Split) -> Tensor:
        return torch.stack([member.predict(split)[0].scores for member in members]).mean(0)

    def set_log_probs(split: Split) -> Tensor:
        return mixture_log_probs([m.set_log_probs(split) for m in members if m.set_log_probs])

    return cut_scores(
        comparison, mean_scores, base.by_k, set_log_probs if members[0].set_log_probs else None
    )


def _test_nll(comparison: Comparison, fitted: Fitted) -> float:
    """Return the mean of -log P(true set) over the test images without unknown labels, in nats."""
    if fitted.set_log_probs is None:
        return math.nan
    log_probs = fitted.set_log_probs(comparison.test)
    unknown = comparison.test.unknown
    return -float((log_probs if unknown is None else log_probs[~unknown.any(1)]).mean())


def _judge_others(
    comparison: Comparison, fitted: Fitted, scores: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the labels other than one true label of each test image that has two or more.

    Args:
        comparison: test images and labels; the draw is the same for all methods and seeds.
        fitted: the method.
        scores: [n, L] of the test images, with nothing known.

    Returns:
        Metrics with nothing known, and with that label known; empty where there are none.
    """
    test = comparison.test
    images, evidence = reveal(test.targets, REVEALED)
    if not len(images):
        return {}, {}
    targets, unknown = test.truth(images)
    some = replace(test, targets=targets, features=test.vectors[images], unknown=unknown)
    others = metrics_of_others(scores[images], targets, evidence, unknown=unknown)
    if fitted.scores_given is None:
        return others, {}
    given = fitted.scores_given(some, evidence)
    return others, metrics_of_others(given, targets, evidence, unknown=unknown)


class _DecisionFigures(NamedTuple):
    """The part of a `Row` that is measured of one decision."""

    decision: dict[str, float]
    own: dict[str, float]
    at_3: dict[str, float]
    own_c_f1: float
    own_exact: float


def _judge(comparison: Comparison, by_k: bool, val: Scored, test: Scored) -> _DecisionFigures:
    """Choose the cuts on validation data, then measure them on the test split."""
    targets, unknown = comparison.test.targets, comparison.test.unknown
    of_val = val.scores, comparison.val.targets, comparison.val.unknown

    def measured(sets: Tensor, k: int | None = None) -> dict[str, float]:
        return multilabel_metrics(sets, targets, scores=test.scores, k=k, unknown=unknown)

    if test.sets is not None:
        own, at_3 = measured(test.sets), measured(test.sets, k=3)
        return _DecisionFigures({"path": 1}, own, at_3, math.nan, math.nan)
    cut = choose_cut(*of_val, by_k=by_k)
    decision: dict[str, float] = {"k": cut.k} if cut.k is not None else {}
    if cut.threshold is not None:
        decision = {"threshold": cut.threshold, "min_labels": cut.min_labels}
    for_c_f1 = choose_cut(*of_val, metric="C-F1")
    for_exact = choose_cut(*of_val, by_k=True, metric="exact-match")
    return _DecisionFigures(
        decision,
        measured(cut.sets(test.scores)),
        multilabel_metrics(test.scores, targets, k=3, unknown=unknown),
        measured(for_c_f1.sets(test.scores))["C-F1"],
        measured(for_exact.sets(test.scores))["exact-match"],
    )
