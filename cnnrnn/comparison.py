"""The comparison: every method on the same features and splits, in one table.

Whatever a method chooses (its setting, epoch, threshold, k), it chooses on the validation split;
the test split is looked at once per method and seed. docs/comparison.md says what each method is.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnnrnn.backbones import Backbone
from cnnrnn.baselines import (
    OBJECTIVES,
    IndependentClassifier,
    JointEmbedding,
    Loss,
    Scorer,
    choose_cut,
    fit_classifier_chain,
    fit_linear_svm,
    fit_nearest_neighbours,
    predicted_scores,
    remove_recurrence,
    train_independent,
)
from cnnrnn.classifier import CNNRNN, load_checkpoint, weights_digest
from cnnrnn.comparison_results import Results, Row, markdown_table, write_whole
from cnnrnn.config import CompareConfig, ModelConfig, OnBadImage, SearchConfig, TrainConfig
from cnnrnn.data import DataError, Dataset
from cnnrnn.decisions import Inference, best_common_sets, infer, mean_average_precision
from cnnrnn.features import cached_features
from cnnrnn.fit import Split, resolve_device
from cnnrnn.metrics import best_threshold, multilabel_metrics
from cnnrnn.progress import Progress, no_progress
from cnnrnn.train import path_validation, train, training_splits

RATE_FACTORS = (1.0, 3.0, 10.0, 0.3, 30.0)
"""Learning rates that are tried, over the recipe's; as in all grids, the first ones of it."""
PENALTIES = (1.0, 0.1, 10.0, 0.01, 100.0)
NEIGHBOURS = (30, 100, 10, 300, 3)


class Scored(NamedTuple):
    """What a method says of n images: scores [n, L] that rank, and sets [n, L] or None for a cut.

    Columns are in the order of the data source.
    """

    scores: Tensor
    sets: Tensor | None = None


@dataclass(frozen=True)
class Fitted:
    """A method fitted with one setting.

    Attributes:
        merit: on validation data, by the method's own decision; the larger is chosen.
        predict: a split to what each of the method's rows says of it.
    """

    merit: float
    predict: Callable[[Split], list[Scored]]


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        name: on the command line.
        rows: its rows of the table; a method that decides in two ways has two.
        setting: what is tuned, or None where nothing is.
        fit: fits it: the comparison, the setting's value, seed and folder for weights; None of an
            ensemble.
        by_k: a number of labels per image is tried besides a threshold.
        seeded: a seed matters; else it runs once, under the first.
        base: the method that it is an ensemble of, or None.
    """

    name: str
    rows: tuple[str, ...]
    setting: str | None = None
    fit: Callable[[Comparison, float, int, Path], Fitted] | None = None
    by_k: bool = False
    seeded: bool = True
    base: str | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What every method is given.

    Attributes:
        dataset: feature vectors with exactly the splits `train`, `val` and `test`.
        train: its training split, columns in the order of the source.
        val: the same of validation.
        test: the same of test.
        model_config: the head; all neural methods share trunk and dropout.
        search_config: of the path models.
        config: the recipe; seed and learning rate are replaced.
        compare_config: seeds, methods, settings, members.
        out: holds results and weights.
    """

    dataset: Dataset
    train: Split
    val: Split
    test: Split
    model_config: ModelConfig
    search_config: SearchConfig
    config: TrainConfig
    compare_config: CompareConfig
    out: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        """What must be the same for results to belong together, as flat JSON values."""
        return _description(self)

    @cached_property
    def key(self) -> str:
        """A digest of the description."""
        return hashlib.sha256(json.dumps(self.description).encode()).hexdigest()

    def weights(self, method: str, seed: int, setting: float) -> Path:
        """Return the folder of a training's weights."""
        return self.out / "weights" / f"{method}-seed-{seed}-{setting:g}"


def frozen_features(
    dataset: Dataset,
    backbone: Backbone,
    folder: Path,
    *,
    batch_size: int = 128,
    workers: int = 0,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
) -> Dataset:
    """Return a dataset of pictures as one of feature vectors, computed once and kept in `folder`.

    Args:
        dataset: pictures.
        backbone: where its weights are decides the device.
        folder: holds the feature cache.
        batch_size: pictures per step.
        workers: processes that decode pictures.
        on_bad_image: `skip` leaves unreadable pictures out of the dataset.
        progress: told how many pictures are done.
    """
    device = next(backbone.parameters()).device
    features = cached_features(
        backbone, dataset, folder, device=device, batch_size=batch_size, workers=workers,
        on_bad_image=on_bad_image, progress=progress,
    )  # fmt: skip
    position = np.full(len(dataset), -1)
    position[features.kept] = np.arange(len(features.kept))
    splits = {
        name: position[records][position[records] >= 0] for name, records in dataset.splits.items()
    }
    return replace(
        dataset.select(features.kept),
        splits=splits,
        features=features.values.numpy(),
        image_paths=None,
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
    """
    compare_config = compare_config or CompareConfig()
    methods = chosen_methods(compare_config, model_config)
    comparison = _comparison(dataset, out, model_config, search_config, config, compare_config)
    results = Results(out / "results.json", comparison.description)
    for method, seed in _schedule(methods, compare_config):
        if (method.name, seed) in results:
            continue
        began = time.perf_counter()
        if method.base is None:
            setting, fitted = _tuned(comparison, method, seed, results)
        else:
            setting, fitted = {}, _ensemble(comparison, method, seed, results)
        judged = [
            _judge(comparison, method.by_k, val, test)
            for val, test in zip(
                fitted.predict(comparison.val), fitted.predict(comparison.test), strict=True
            )
        ]
        seconds = round(time.perf_counter() - began, 2)
        results.add(
            [
                Row(method.name, title, seed, setting, *figures, seconds)
                for title, figures in zip(method.rows, judged, strict=True)
            ]
        )
        chosen = "".join(f", {name} {value:g}" for name, value in setting.items())
        own = judged[0].own
        say(
            f"seed {seed}, {method.name}{chosen}: O-F1 {own['O-F1']:.4f}, mAP {own['mAP']:.4f}, "
            f"exact match {own['exact-match']:.4f}, {seconds:.0f} s"
        )
    rows = [
        row
        for method in methods
        for title in method.rows
        for scheduled, seed in _schedule([method], compare_config)
        for row in results.rows(scheduled.name, seed)
        if row.title == title
    ]
    write_whole(out / "table.md", markdown_table(rows) + "\n")
    return rows


def chosen_methods(compare_config: CompareConfig, model_config: ModelConfig) -> list[Method]:
    """Return the methods that a comparison runs, in the order of `METHODS`.

    By default all that differ: without a hidden layer there is nothing but linear ones, and
    without a chain term nothing but the plain path model.

    Raises:
        ValueError: a name is unknown, or an ensemble's own method is not among them.
    """
    if compare_config.methods is None:
        same = {name for name in METHODS if name.endswith("-linear") and not model_config.trunk_dim}
        if not model_config.chain_term:
            same.add("cnn-rnn-plain")
        return [method for name, method in METHODS.items() if name not in same]
    for name in compare_config.methods:
        if name not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {name!r}")
        base = METHODS[name].base
        if base is not None and base not in compare_config.methods:
            raise ValueError(
                f"method {name} is made of {base}, which must be among the methods, got "
                f"{', '.join(compare_config.methods)}"
            )
    return [method for name, method in METHODS.items() if name in compare_config.methods]


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
    if "test" not in dataset.splits or not len(dataset.splits["test"]):
        found = ", ".join(f"{name} {len(rows)}" for name, rows in dataset.splits.items())
        raise DataError(
            f"{dataset.source} must have a test split with images to compare on, got {found}"
        )
    numbered = replace(dataset, rows=np.arange(len(dataset)))
    train_part, val_part = training_splits(numbered, config)
    splits = {"train": train_part.rows, "val": val_part.rows, "test": dataset.splits["test"]}
    dataset = replace(dataset, splits=splits)
    train_split, val_split, test_split = (
        Split(part, part.label_matrix(), torch.as_tensor(part.features))
        for part in (dataset.split(name) for name in splits)
    )
    return Comparison(
        dataset, train_split, val_split, test_split, model_config, search_config, config,
        compare_config, out,
    )  # fmt: skip


def _description(comparison: Comparison) -> dict[str, Any]:
    """Return what must be the same for results to belong together, as flat JSON values."""
    splits = (comparison.train, comparison.val, comparison.test)
    tensors = [(str(i), t) for i, s in enumerate(splits) for t in (s.features, s.targets)]
    compared = comparison.compare_config
    described: dict[str, Any] = {
        "images": [len(split) for split in splits],
        "labels": list(comparison.dataset.label_names),
        "data": weights_digest((name, t) for name, t in tensors if t is not None)[:16],
        "settings": compared.settings,
        "members": compared.members,
        "tune_each_seed": compared.tune_each_seed,
        "first seed": compared.seeds[0],
    }
    elsewhere = {"seed", "device", "workers", "init_backbone", "feature_cache", "on_bad_image"}
    for prefix, options in (
        ("", comparison.config),
        ("model.", comparison.model_config),
        ("search.", comparison.search_config),
    ):
        values = {k: v for k, v in asdict(options).items() if prefix or k not in elsewhere}
        described |= {prefix + name: value for name, value in values.items()}
    return described


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


def _tuned(
    comparison: Comparison, method: Method, seed: int, results: Results
) -> tuple[dict[str, float], Fitted]:
    """Fit a method with its best setting, which the first seed has chosen where it is done."""
    assert method.setting is not None and method.fit is not None
    options = comparison.compare_config
    first = (method.name, options.seeds[0])
    if seed != options.seeds[0] and first in results and not options.tune_each_seed:
        values = [results.rows(*first)[0].setting[method.setting]]
    else:
        values = list(_grid(method.setting, comparison.config))[: options.settings]
    best: tuple[float, Fitted] | None = None
    for value in values:
        fitted = method.fit(comparison, value, seed, comparison.weights(method.name, seed, value))
        if best is None or fitted.merit > best[1].merit:
            best = value, fitted
    assert best is not None
    return {method.setting: best[0]}, best[1]


def _grid(setting: str, config: TrainConfig) -> tuple[float, ...]:
    """Return the values of a setting that are tried, most likely first."""
    if setting == "learning_rate":
        return tuple(float(f"{config.learning_rate * factor:g}") for factor in RATE_FACTORS)
    return PENALTIES if setting == "C" else NEIGHBOURS


def _ensemble(comparison: Comparison, method: Method, seed: int, results: Results) -> Fitted:
    """Make an ensemble; members that no seed has trained are trained."""
    assert method.base is not None
    base = METHODS[method.base]
    assert base.setting is not None and base.fit is not None
    options = comparison.compare_config
    seeds = next(group for group in ensemble_seeds(options) if group[0] == seed)
    folders, members = [], []
    for member in seeds:
        tuned_by = member if (base.name, member) in results else options.seeds[0]
        value = results.rows(base.name, tuned_by)[0].setting[base.setting]
        folders.append(comparison.weights(base.name, member, value))
        members.append(base.fit(comparison, value, member, folders[-1]))
    if len(base.rows) == 2:
        return _path_ensemble(comparison, folders)

    def mean_scores(split: Split) -> Tensor:
        return torch.stack([member.predict(split)[0].scores for member in members]).mean(0)

    return _cut_scores(comparison, mean_scores, base.by_k)


class _Judged(NamedTuple):
    """The part of a `Row` that is measured."""

    decision: dict[str, float]
    own: dict[str, float]
    at_3: dict[str, float]
    own_c_f1: float


def _judge(comparison: Comparison, by_k: bool, val: Scored, test: Scored) -> _Judged:
    """Choose the cut on validation data, then measure it on the test split."""
    targets, unknown = comparison.test.targets, None
    if comparison.test.dataset.unknown_indptr is not None:
        unknown = comparison.test.dataset.unknown_matrix()
    if test.sets is not None:
        own, at_3 = (
            multilabel_metrics(test.sets, targets, scores=test.scores, k=k, unknown=unknown)
            for k in (None, 3)
        )
        return _Judged({"path": 1}, own, at_3, math.nan)
    cut = choose_cut(val.scores, comparison.val.targets, by_k)
    decision = {
        name: value
        for name, value in (("k", cut.k), ("threshold", cut.threshold))
        if value is not None
    }
    own = multilabel_metrics(
        test.scores, targets, k=cut.k, threshold=cut.threshold, unknown=unknown
    )
    at_3 = multilabel_metrics(test.scores, targets, k=3, unknown=unknown)
    for_c_f1, _ = best_threshold(val.scores, comparison.val.targets, "C-F1")
    own_c_f1 = multilabel_metrics(test.scores, targets, threshold=for_c_f1, unknown=unknown)
    return _Judged(decision, own, at_3, own_c_f1["C-F1"])


def _path_model(
    *, plain: bool = False, recurrence: bool = True
) -> Callable[[Comparison, float, int, Path], Fitted]:
    """Return how a path model is fitted.

    Args:
        plain: no chain term and no warm start; its epochs go to the sequence loss.
        recurrence: False leaves only the last label of a path.
    """

    def fit(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
        config = replace(comparison.config, seed=seed, learning_rate=rate)
        model_config = comparison.model_config
        if plain:
            epochs = config.warm_epochs + config.epochs
            config = replace(config, warm_epochs=0, epochs=epochs)
            model_config = replace(model_config, chain_term=False)
        if not _is_done(comparison, folder):
            shutil.rmtree(folder, ignore_errors=True)
            train(
                comparison.dataset, folder, model_config, comparison.search_config, config,
                prepare_head=(lambda head: None) if recurrence else remove_recurrence,
            )  # fmt: skip
            _set_done(comparison, folder)
        model = _loaded(comparison, folder)
        found = _found(model, comparison.val)
        targets = model.label_space.from_source(
            comparison.val.targets, comparison.dataset.label_names
        )
        return Fitted(path_validation(found, targets).merit, lambda split: _read_paths(
            comparison, [model], [found if split is comparison.val else _found(model, split)],
            split,
        ))  # fmt: skip

    return fit


def _loaded(comparison: Comparison, folder: Path) -> CNNRNN:
    return load_checkpoint(folder).to(resolve_device(comparison.config.device)).eval()


def _found(model: CNNRNN, split: Split) -> Inference:
    assert split.features is not None
    return infer(model.head, split.features.to(model.device), model.search)


def _read_paths(
    comparison: Comparison, models: Sequence[CNNRNN], found: Sequence[Inference], split: Split
) -> list[Scored]:
    """Return best paths, then mixed marginals, of one path model or the mean of several."""
    first = models[0]
    mixed = [
        inference.mixed(model.calibration.mix_weight)
        for model, inference in zip(models, found, strict=True)
    ]
    scores = torch.stack(mixed).mean(0)
    sets = found[0].sets
    if len(models) > 1:
        assert split.features is not None
        heads = [model.head for model in models]
        sets = best_common_sets(heads, split.features.to(first.device), found, first.search.order)
    column = {name: i for i, name in enumerate(first.labels)}
    columns = [column[name] for name in comparison.dataset.label_names]
    return [Scored(scores[:, columns], sets[:, columns]), Scored(scores[:, columns])]


def _path_ensemble(comparison: Comparison, folders: Sequence[Path]) -> Fitted:
    models = [_loaded(comparison, folder) for folder in folders]
    orders = {model.labels for model in models}
    if len(orders) > 1:
        raise ValueError(
            f"members of an ensemble must have one order of labels, got {len(orders)}: "
            "leave the method out, or choose another label_order"
        )
    return Fitted(0.0, lambda split: _read_paths(
        comparison, models, [_found(model, split) for model in models], split
    ))  # fmt: skip


def _independent(
    loss: Loss, *, linear: bool = False, joint: bool = False
) -> Callable[[Comparison, float, int, Path], Fitted]:
    """Return how a network with one score per label is fitted.

    Args:
        loss: it is trained with.
        linear: without the hidden layer.
        joint: scores are inner products in the joint space.
    """
    network = JointEmbedding if joint else IndependentClassifier

    def fit(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
        from safetensors.torch import load_file, save_file

        config = replace(comparison.config, seed=seed, learning_rate=rate)
        model_config = comparison.model_config
        if linear:
            model_config = replace(model_config, trunk_dim=0)
        file = folder / "model.safetensors"
        if not _is_done(comparison, folder):
            trained = train_independent(
                comparison.train, comparison.val, loss, model_config, config, network=network
            )
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous() for name, t in trained.state_dict().items()}, file)
            _set_done(comparison, folder)
        assert comparison.val.features is not None
        model = network(
            model_config, comparison.val.targets.shape[1], comparison.val.features.shape[1]
        )
        model.load_state_dict(load_file(file))
        model = model.to(resolve_device(config.device)).eval()
        return _cut_scores(
            comparison, lambda split: predicted_scores(model, split, loss), OBJECTIVES[loss].by_k
        )

    return fit


def _classical(
    fit_scorer: Callable[[Split, Any], Scorer],
) -> Callable[[Comparison, float, int, Path], Fitted]:
    """Return how one of scikit-learn's methods is fitted."""

    def fit(comparison: Comparison, value: float, seed: int, folder: Path) -> Fitted:
        score = fit_scorer(comparison.train, value)

        def scores(split: Split) -> Tensor:
            assert split.features is not None
            return score(split.features)

        return _cut_scores(comparison, scores)

    return fit


def _cut_scores(
    comparison: Comparison, score: Callable[[Split], Tensor], by_k: bool = False
) -> Fitted:
    """Return a method that cuts its scores, with their O-F1 plus mAP on validation data."""
    on_val = score(comparison.val)
    targets = comparison.val.targets
    merit = choose_cut(on_val, targets, by_k).of1 + mean_average_precision(on_val, targets)
    return Fitted(
        merit, lambda split: [Scored(on_val if split is comparison.val else score(split))]
    )


def _is_done(comparison: Comparison, folder: Path) -> bool:
    """Tell whether a folder holds a training of these data and options, to its end."""
    mark = folder / "done"
    return mark.exists() and mark.read_text(encoding="utf-8") == comparison.key


def _set_done(comparison: Comparison, folder: Path) -> None:
    (folder / "done").write_text(comparison.key, encoding="utf-8")


def _trained(
    name: str,
    title: str,
    loss: Loss,
    *,
    linear: bool = False,
    joint: bool = False,
) -> Method:
    """A method that is a network with one score per label."""
    fit = _independent(loss, linear=linear, joint=joint)
    return Method(name, (title,), "learning_rate", fit, by_k=OBJECTIVES[loss].by_k)


def _two_rows(title: str) -> tuple[str, str]:
    return f"{title}, best path", f"{title}, thresholded"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("cnn-rnn", _two_rows("CNN-RNN"), "learning_rate", _path_model()),
        Method("cnn-rnn-plain", _two_rows("CNN-RNN plain"), "learning_rate",
               _path_model(plain=True)),
        Method("no-rnn", _two_rows("no RNN"), "learning_rate", _path_model(recurrence=False)),
        _trained("bce", "binary cross-entropy", "bce"),
        _trained("bce-linear", "binary cross-entropy, linear", "bce", linear=True),
        _trained("softmax", "softmax", "softmax"),
        _trained("softmax-linear", "softmax, linear", "softmax", linear=True),
        _trained("warp", "WARP", "warp"),
        _trained("warp-linear", "WARP, linear", "warp", linear=True),
        _trained("squared", "squared error", "squared"),
        _trained("asl", "asymmetric loss", "asl"),
        _trained("joint-embedding", "joint embedding", "warp", joint=True),
        Method("knn", ("nearest neighbours",), "neighbours", _classical(fit_nearest_neighbours),
               seeded=False),
        Method("svm", ("linear SVM",), "C", _classical(fit_linear_svm), seeded=False),
        Method("chains", ("classifier chain",), "C", _classical(fit_classifier_chain),
               seeded=False),
        Method("ensemble-bce", ("binary cross-entropy, ensemble",), base="bce"),
        Method("ensemble-cnn-rnn", _two_rows("CNN-RNN ensemble"), base="cnn-rnn"),
    )
}  # fmt: skip
"""Every method of the comparison by its name on the command line."""
