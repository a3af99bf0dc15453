"""How each method of a comparison is fitted, and what it says of a split."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from cnnrnn.comparison.baselines import (
    OBJECTIVES,
    IndependentClassifier,
    JointEmbedding,
    Loss,
    Scorer,
    Training,
    choose_cut,
    network_outputs,
    predicted_scores,
    product_log_probs,
    remove_recurrence,
    train_independent,
)
from cnnrnn.comparison.chains import ProbabilisticChain, train_chain
from cnnrnn.comparison.classical import (
    FittedChain,
    LowRankCompletion,
)
from cnnrnn.comparison.combinations import (
    MOST_COMBINATIONS,
    LabelCombinations,
    common_combinations,
    train_combinations,
)
from cnnrnn.comparison.cooccurrence import fit_cooccurrence
from cnnrnn.comparison.dependencies import DependencyNetwork, train_dependencies
from cnnrnn.comparison.metric import NeighbourMetric, train_metric
from cnnrnn.config import CompareConfig, ModelConfig, SearchConfig, TrainConfig, flat_options
from cnnrnn.data import Dataset
from cnnrnn.machine.devices import resolve_device
from cnnrnn.machine.files import weights_digest, write_whole
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.prediction.decisions import mean_average_precision
from cnnrnn.search.inference import Inference
from cnnrnn.training.batches import Split
from cnnrnn.training.recipe import path_validation
from cnnrnn.training.run import train

RATES = (1.0, 3.0, 10.0, 0.3, 30.0)
"""Learning rates that are tried, over the recipe's. As of every grid, the first ones are."""


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
        set_log_probs: a split to log P(the whole true set) of its images, [n] float64; None of a
            method that gives sets no probability.
        is_bound: `set_log_probs` are at most as high as the true ones.
        scores_given: a split and evidence [n, L] int8 about its images to scores [n, L] of the
            labels that are not known; None of a method that cannot be told of any.
    """

    merit: float
    predict: Callable[[Split], list[Scored]]
    set_log_probs: Callable[[Split], Tensor] | None = None
    is_bound: bool = False
    scores_given: Callable[[Split, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        name: on the command line.
        rows: its rows of the table; a method that decides in two ways has two.
        setting: what is tuned; "" of an ensemble.
        values: the setting's values, most likely first; learning rates over the recipe's.
        fit: fits it; None of an ensemble.
        by_k: a number of labels per image is tried besides a threshold.
        seeded: a seed matters; else it runs once, under the first.
        base: the method that it is an ensemble of, or None.
    """

    name: str
    rows: tuple[str, ...]
    setting: str = ""
    values: tuple[float, ...] = ()
    fit: Fit | None = None
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

    def grid(self, method: Method) -> list[float]:
        """Return the values of a method's setting that are tried."""
        values = method.values[: self.compare_config.settings]
        if method.setting != "learning_rate":
            return list(values)
        return [float(f"{self.config.learning_rate * value:g}") for value in values]

    def weights(self, method: str, seed: int, setting: float) -> Path:
        """Return the folder of a training's weights."""
        return self.out / "weights" / f"{method}-seed-{seed}-{setting:g}"


Fit: TypeAlias = Callable[[Comparison, float, int, Path], Fitted]
"""Fits a method: the comparison, the setting's value, seed and folder for weights."""


def _description(comparison: Comparison) -> dict[str, Any]:
    """Return what must be the same for results to belong together, as flat JSON values."""
    splits = (comparison.train, comparison.val, comparison.test)
    tensors = [
        (str(i), t) for i, s in enumerate(splits) for t in (s.features, s.targets, s.unknown)
    ]
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
    elsewhere = (
        "seed",
        "device",
        "workers",
        "backend",
        "init_backbone",
        "feature_cache",
        "on_bad_image",
        "model.jpeg_draft",  # the features are compared
    )
    options = flat_options(
        comparison.model_config, comparison.search_config, comparison.config, leave_out=elsewhere
    )
    return described | options


def path_model(*, plain: bool = False, recurrence: bool = True) -> Fit:
    """Return how a path model is fitted.

    Args:
        plain: no chain term; the epochs of a warm stage go to the sequence loss.
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
        unknown: Tensor | None = None
        if comparison.val.unknown is not None:
            unknown = model.label_space.from_source(
                comparison.val.unknown, comparison.dataset.label_names
            )
        nll = float(model.set_nll(comparison.val.vectors, targets, unknown).mean())
        return Fitted(
            path_validation(found, targets, nll, comparison.config, unknown).merit,
            lambda split: _read_paths(
                comparison,
                model.labels,
                found if split is comparison.val else _found(model, split),
                model.calibration.mix_weight,
            ),
            lambda split: _path_log_probs(comparison, model, split),
            is_bound=model.search.order != "increasing",
            scores_given=_path_scores_given(comparison, model),
        )

    return fit


def _loaded(comparison: Comparison, folder: Path) -> CNNRNN:
    return load_checkpoint(folder).to(resolve_device(comparison.config.device)).eval()


def _found(model: CNNRNN, split: Split) -> Inference:
    return model.infer(split.vectors.to(model.device))


def _path_log_probs(comparison: Comparison, model: CNNRNN | Ensemble, split: Split) -> Tensor:
    columns = [comparison.dataset.label_names.index(name) for name in model.labels]
    return -model.set_nll(split.vectors, split.targets[:, columns])


def _read_paths(
    comparison: Comparison, labels: Sequence[str], found: Inference, mix_weight: float
) -> list[Scored]:
    """Return best paths, then mixed marginals, of what was found in the order of `labels`."""
    column = {name: i for i, name in enumerate(labels)}
    columns = [column[name] for name in comparison.dataset.label_names]
    scores = found.mixed(mix_weight)[:, columns]
    return [Scored(scores, found.sets[:, columns]), Scored(scores)]


def _path_scores_given(
    comparison: Comparison, model: CNNRNN | Ensemble
) -> Callable[[Split, Tensor], Tensor]:
    """Return what a path model says given evidence; where no path was found, given none."""
    names = comparison.dataset.label_names
    to_model = [names.index(name) for name in model.labels]
    to_source = [model.labels.index(name) for name in names]

    def scores_given(split: Split, evidence: Tensor) -> Tensor:
        features = split.vectors.to(model.device)
        found = model.infer(features, None, evidence[:, to_model])
        scores = found.mixed(model.calibration)
        lost = scores.isnan().any(1)
        if lost.any():
            scores[lost] = model.infer(features[lost.to(features.device)]).mixed(model.calibration)
        return scores[:, to_source]

    return scores_given


def path_ensemble(comparison: Comparison, folders: Sequence[Path]) -> Fitted:
    """Return the ensemble of the path models whose weights are in `folders`."""
    ensemble = Ensemble([_loaded(comparison, folder) for folder in folders]).eval()

    def predict(split: Split) -> list[Scored]:
        found = ensemble.infer(split.vectors.to(ensemble.device))
        return _read_paths(comparison, ensemble.labels, found, 0.0)

    def set_log_probs(split: Split) -> Tensor:
        return _path_log_probs(comparison, ensemble, split)

    return Fitted(
        0.0, predict, set_log_probs, scores_given=_path_scores_given(comparison, ensemble)
    )


def _training(comparison: Comparison, rate: float, seed: int) -> Training:
    config = replace(comparison.config, seed=seed, learning_rate=rate)
    return Training(comparison.train, comparison.val, comparison.model_config, config)


def independent(loss: Loss, *, linear: bool = False, joint: bool = False) -> Fit:
    """Return how a network with one score per label is fitted.

    Args:
        loss: it is trained with.
        linear: without the hidden layer.
        joint: scores are inner products in the joint space.
    """
    network = JointEmbedding if joint else IndependentClassifier

    def fit(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
        training = _training(comparison, rate, seed)
        if linear:
            without = replace(training.model_config, trunk_dim=0)
            training = replace(training, model_config=without)
        model = network(training.model_config, training.num_labels, training.feature_dim)
        _train_or_load(
            comparison, folder, model, lambda: train_independent(training, loss, network)
        )

        def set_log_probs(split: Split) -> Tensor:
            return product_log_probs(network_outputs(model, split.vectors), split.targets)

        return cut_scores(
            comparison,
            lambda split: predicted_scores(model, split, loss),
            OBJECTIVES[loss].by_k,
            set_log_probs if loss == "bce" else None,
        )

    return fit


def probabilistic_chain(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
    """Fit the probabilistic chain; its best sets, then its marginals."""
    training = _training(comparison, rate, seed)
    order = torch.arange(training.num_labels)  # the trained one is read from the file
    model = ProbabilisticChain(training.model_config, order, training.feature_dim)
    _train_or_load(comparison, folder, model, lambda: train_chain(training))

    def predict(split: Split) -> list[Scored]:
        scores = model.marginals(split.vectors)
        return [Scored(scores, model.best_sets(split.vectors)), Scored(scores)]

    def set_log_probs(split: Split) -> Tensor:
        return model.set_log_probs(split.vectors, split.targets)

    def scores_given(split: Split, evidence: Tensor) -> Tensor:
        return model.marginals_given(split.vectors, evidence)

    return Fitted(
        float(set_log_probs(training.val).mean()), predict, set_log_probs, scores_given=scores_given
    )


def label_dependencies(
    kind: Literal["network", "crf"],
) -> Fit:
    """Return how a dependency network or a pairwise CRF is fitted."""

    def fit(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
        training = _training(comparison, rate, seed)
        L, F = training.num_labels, training.feature_dim
        model = DependencyNetwork(training.model_config, L, F, symmetric=kind == "crf")
        _train_or_load(comparison, folder, model, lambda: train_dependencies(training, kind))
        return _by_marginals(comparison, model)

    return fit


def label_combinations(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
    """Fit the label combinations; the most probable one, then marginals."""
    training = _training(comparison, rate, seed)
    sets, _ = common_combinations(training.train.targets, MOST_COMBINATIONS)
    model = LabelCombinations(training.model_config, sets, training.feature_dim)
    _train_or_load(comparison, folder, model, lambda: train_combinations(training))
    fitted = _by_marginals(comparison, model)

    def predict(split: Split) -> list[Scored]:
        (cut,) = fitted.predict(split)
        return [Scored(cut.scores, model.best_sets(split.vectors)), cut]

    return replace(fitted, predict=predict)


def _by_marginals(comparison: Comparison, model: DependencyNetwork | LabelCombinations) -> Fitted:
    """Return a method that cuts its marginals, and has them given known labels too."""

    def scores_given(split: Split, evidence: Tensor | None) -> Tensor:
        return model.marginals(split.vectors, evidence)

    cut = cut_scores(comparison, lambda split: scores_given(split, None))
    return replace(cut, scores_given=scores_given)


def with_cooccurrence(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
    """Return the independent classifier `bce`, whose weights it shares, told of known labels."""
    alone = independent("bce")(comparison, rate, seed, comparison.weights("bce", seed, rate))

    def log_odds(split: Split) -> Tensor:
        (found,) = alone.predict(split)
        return found.scores.double().logit()

    counted = fit_cooccurrence(comparison.train, log_odds(comparison.val), comparison.val)
    return replace(
        alone,
        scores_given=lambda split, evidence: counted.scores(log_odds(split), evidence),
    )


def learned_metric(comparison: Comparison, rate: float, seed: int, folder: Path) -> Fitted:
    """Fit the learned metric; its votes are scores."""
    training = _training(comparison, rate, seed)
    model = NeighbourMetric(training.model_config, training.train)
    _train_or_load(comparison, folder, model, lambda: train_metric(training))

    def scores(split: Split) -> Tensor:
        return network_outputs(model, split.vectors)

    return cut_scores(comparison, scores)


def _train_or_load(
    comparison: Comparison, folder: Path, model: nn.Module, train: Callable[[], nn.Module]
) -> None:
    """Give a module the weights in a folder, which are trained where they are not there yet."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    if not _is_done(comparison, folder):
        trained = train().state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in trained.items()}
        write_whole(file, lambda part: save_file(weights, part))
        _set_done(comparison, folder)
    model.load_state_dict(load_file(file))
    model.to(resolve_device(comparison.config.device)).eval()


def classical(
    name: str,
    title: str,
    setting: str,
    values: tuple[float, ...],
    fit_scorer: Callable[[Split, Any], Scorer],
) -> Method:
    """A method that is no network, and needs no seed."""

    def fit(comparison: Comparison, value: float, seed: int, folder: Path) -> Fitted:
        score = fit_scorer(comparison.train, value)

        def scores(split: Split) -> Tensor:
            return score(split.vectors)

        def chain_log_probs(split: Split) -> Tensor:
            assert isinstance(score, FittedChain)
            return score.set_log_probs(split.vectors, split.targets)

        is_chain = isinstance(score, FittedChain)
        cut = cut_scores(comparison, scores, set_log_probs=chain_log_probs if is_chain else None)
        if not isinstance(score, LowRankCompletion):
            return cut
        completion = score

        def completed(split: Split, evidence: Tensor) -> Tensor:
            return completion.given(split.vectors, evidence)

        return replace(cut, scores_given=completed)

    return Method(name, (title,), setting, values, fit, seeded=False)


def cut_scores(
    comparison: Comparison,
    score: Callable[[Split], Tensor],
    by_k: bool = False,
    set_log_probs: Callable[[Split], Tensor] | None = None,
) -> Fitted:
    """Return a method that cuts its scores, with their O-F1 plus mAP on validation data."""
    on_val = score(comparison.val)
    truth = comparison.val.targets, comparison.val.unknown
    merit = choose_cut(on_val, *truth, by_k=by_k).value + mean_average_precision(on_val, *truth)
    return Fitted(
        merit,
        lambda split: [Scored(on_val if split is comparison.val else score(split))],
        set_log_probs,
    )


def _is_done(comparison: Comparison, folder: Path) -> bool:
    """Tell whether a folder holds a training of these data and options, to its end."""
    mark = folder / "done"
    return mark.exists() and mark.read_text(encoding="utf-8") == comparison.key


def _set_done(comparison: Comparison, folder: Path) -> None:
    write_whole(folder / "done", lambda file: file.write_text(comparison.key, encoding="utf-8"))
