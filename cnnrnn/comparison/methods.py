"""The methods of a comparison by name, and which of them are run."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from cnnrnn.comparison.baselines import OBJECTIVES, TIMM_LOSSES, TIMM_WITH_LOSSES, Loss
from cnnrnn.comparison.classical import (
    fit_cca,
    fit_classifier_chain,
    fit_linear_svm,
    fit_low_rank_completion,
    fit_nearest_neighbours,
)
from cnnrnn.comparison.fitting import (
    RATES,
    Fit,
    Method,
    classical,
    independent,
    label_combinations,
    label_dependencies,
    learned_metric,
    path_model,
    probabilistic_chain,
    with_cooccurrence,
)
from cnnrnn.config import CompareConfig, ModelConfig, SearchConfig

BY_SCIKIT_LEARN = ("knn", "cca", "svm", "chains")
"""Methods that need scikit-learn."""


def _network(name: str, rows: tuple[str, ...], fit: Fit, *, by_k: bool = False) -> Method:
    """A method whose learning rate is tuned."""
    return Method(name, rows, "learning_rate", RATES, fit, by_k)


def _independent(
    name: str, title: str, loss: Loss, *, linear: bool = False, joint: bool = False
) -> Method:
    """A method that is a network with one score per label."""
    fit = independent(loss, linear=linear, joint=joint)
    return _network(name, (title,), fit, by_k=OBJECTIVES[loss].by_k)


def _two_rows(title: str, best: str = "best path") -> tuple[str, str]:
    return f"{title}, {best}", f"{title}, thresholded"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _network("cnn-rnn", _two_rows("CNN-RNN"), path_model()),
        _network("cnn-rnn-plain", _two_rows("CNN-RNN plain"), path_model(plain=True)),
        _network("no-rnn", _two_rows("no RNN"), path_model(recurrence=False)),
        _independent("bce", "binary cross-entropy", "bce"),
        _independent("bce-linear", "binary cross-entropy, linear", "bce", linear=True),
        _independent("softmax", "softmax", "softmax"),
        _independent("softmax-linear", "softmax, linear", "softmax", linear=True),
        _independent("warp", "WARP", "warp"),
        _independent("warp-linear", "WARP, linear", "warp", linear=True),
        _independent("squared", "squared error", "squared"),
        _independent("asl", "asymmetric loss", "asl"),
        _independent("poly", "Poly-1 loss", "poly"),
        _independent("two-way", "two-way loss", "two-way"),
        _independent("zlpr", "ZLPR loss", "zlpr"),
        _independent("db", "distribution-balanced loss", "db"),
        _independent("joint-embedding", "joint embedding", "warp", joint=True),
        _network("pcc", _two_rows("probabilistic chain", "best set"), probabilistic_chain),
        _network("cooccurrence", ("binary cross-entropy and co-occurrence",), with_cooccurrence),
        _network(
            "dependency-network", ("conditional dependency network",), label_dependencies("network")
        ),
        _network("crf", ("pairwise CRF",), label_dependencies("crf")),
        _network("combinations", _two_rows("label combinations", "best set"), label_combinations),
        classical(
            "knn", "nearest neighbours", "neighbours", (30, 100, 10, 300, 3), fit_nearest_neighbours
        ),
        _network("metric", ("metric learning",), learned_metric),
        classical(
            "cca", "CCA, nearest neighbours", "ridge", (1.0, 0.1, 10.0, 0.01, 100.0), fit_cca
        ),
        classical(
            "completion",
            "low-rank completion",
            "rank",
            (64, 128, 32, 256, 16),
            fit_low_rank_completion,
        ),
        classical("svm", "linear SVM", "C", (1.0, 0.1, 10.0, 0.01, 100.0), fit_linear_svm),
        classical(
            "chains", "classifier chain", "C", (1.0, 10.0, 100.0, 0.1, 1000.0), fit_classifier_chain
        ),
        Method("ensemble-bce", ("binary cross-entropy, ensemble",), base="bce"),
        Method("ensemble-cnn-rnn", _two_rows("CNN-RNN, ensemble"), base="cnn-rnn"),
    )
}
"""Every method of the comparison by its name on the command line."""


def chosen_methods(
    compare_config: CompareConfig, model_config: ModelConfig, search_config: SearchConfig
) -> list[Method]:
    """Return the methods that a comparison runs, in the order of `METHODS`.

    By default all that differ: without a hidden layer there is nothing but linear ones, and
    without a chain term nothing but the plain path model. An ensemble of path models needs a
    search in which a label set has one path.

    Raises:
        ValueError: a name is unknown, or an ensemble's own method is not among them.
        ModuleNotFoundError: one of them needs scikit-learn or a newer timm than is installed.
    """
    wanted = compare_config.methods
    if wanted is None:
        left_out = {
            name for name in METHODS if name.endswith("-linear") and not model_config.trunk_dim
        }
        if not model_config.chain_term:
            left_out.add("cnn-rnn-plain")
        if search_config.order != "increasing":
            left_out.add("ensemble-cnn-rnn")
        wanted = tuple(name for name in METHODS if name not in left_out)
    if search_config.order != "increasing" and "ensemble-cnn-rnn" in wanted:
        raise ValueError(
            "search.order must be increasing for method ensemble-cnn-rnn, so that a label set has "
            f"one path, got {search_config.order}"
        )
    for name in wanted:
        if name not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {name!r}")
        base = METHODS[name].base
        if base is not None and base not in wanted:
            raise ValueError(
                f"method {name} is made of {base}, which must be among the methods, got "
                f"{', '.join(wanted)}"
            )
    methods = [method for name, method in METHODS.items() if name in wanted]
    by_scikit_learn = [method.name for method in methods if method.name in BY_SCIKIT_LEARN]
    if by_scikit_learn and find_spec("sklearn") is None:
        raise ModuleNotFoundError(
            f"{', '.join(by_scikit_learn)} come from scikit-learn, which is not installed: run "
            '`pip install "cnnrnn[vision]"`, or leave them out of the methods'
        )
    by_timm = [method.name for method in methods if method.name in TIMM_LOSSES]
    if by_timm and (found := _timm_version()) < TIMM_WITH_LOSSES:
        raise ModuleNotFoundError(
            f"{', '.join(by_timm)} need timm {_dotted(TIMM_WITH_LOSSES)} or newer, got "
            f"{_dotted(found) if found else 'none'}: run `pip install --upgrade "
            '"cnnrnn[vision]"`, or leave them out of the methods'
        )
    return methods


def _timm_version() -> tuple[int, ...]:
    """Return the installed timm's release, empty where there is none."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", version("timm"))[:3])
    except PackageNotFoundError:
        return ()


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
