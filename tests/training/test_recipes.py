"""The two recipes, the default and the paper's, learn label sets that depend on one another."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.comparison.baselines import remove_recurrence
from cnnrnn.network.head import Head, Trunk
from cnnrnn.search.inference import set_nll
from cnnrnn.training.optimizers import decoupled_rmsprop
from cnnrnn.training.recipe import path_validation
from cnnrnn.training.run import train, warn_if_not_learned

NAMES = ("sky", "sea", "boat", "gull", "road", "car", "lamp", "tree")
KINDS = (("sky", "sea", "boat"), ("sky", "sea", "gull"), ("sky", "sea"), ("road", "car", "lamp"),
         ("sky", "road", "car"), ("tree", "road"), ("sky", "tree"), ("tree",))  # fmt: skip
SHARES = (0.2, 0.1, 0.2, 0.1, 0.15, 0.1, 0.1, 0.05)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Views: one of a few kinds of label sets each, now and then a label changed; weak features."""
    random = np.random.default_rng(0)
    kinds = np.array([[name in kind for name in NAMES] for kind in KINDS])
    labels = kinds[random.choice(len(KINDS), 1600, p=SHARES)] ^ (random.random((1600, 8)) < 0.02)
    features = labels @ random.standard_normal((8, 24)) * 2 + 9 * random.standard_normal((1600, 24))
    path = tmp_path_factory.mktemp("views") / "views.npz"
    np.savez(path, features=features.astype(np.float32), labels=labels, label_names=np.array(NAMES),
             split=np.array(["train"] * 1000 + ["val"] * 300 + ["test"] * 300))  # fmt: skip
    return load_dataset(f"features:{path}")


def measured(views, result):
    """Share of test images with a best path that is not empty, its O-F1, and the NLL."""
    test = views.split("test")
    model = result.model
    targets = model.label_space.from_source(test.label_matrix(), test.label_names)
    features = torch.from_numpy(test.features)
    sets = model.infer(features).sets
    correct = (sets & targets).sum()
    of1 = float(2 * correct / (sets.sum() + targets.sum()))
    return float(sets.any(1).float().mean()), of1, float(model.set_nll(features, targets).mean())


def independent_nll(views):
    """NLL of the shares of the labels, whatever the image: what nothing learned comes to."""
    shares = views.split("train").label_matrix().double().mean(0)
    targets = views.split("test").label_matrix().double()
    return float(-(targets * shares.log() + (1 - targets) * (1 - shares).log()).sum(1).mean())


def test_the_default_recipe_learns(tmp_path, views):
    result = train(views, tmp_path / "run", ModelConfig(), SearchConfig(),
                   TrainConfig(device="cpu"))  # fmt: skip
    some, of1, nll = measured(views, result)
    assert some > 0.9 and of1 > 0.65
    assert nll < independent_nll(views) - 1.3


@pytest.mark.parametrize("cell", ["paper", "lstm"])
def test_the_papers_recipe_learns(tmp_path, views, cell):
    config = replace(TrainConfig.paper(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(views, tmp_path / "run", replace(ModelConfig.paper(), cell=cell),
                       SearchConfig.paper(), config)  # fmt: skip
    some, of1, nll = measured(views, result)
    assert some > 0.9 and of1 > 0.64
    assert nll < independent_nll(views) - 0.8
    assert result.model.head.recurrence.weight_hh.abs().max() > 1e-3


def test_a_model_that_names_nothing_warns(tmp_path, views):
    targets = torch.ones(3, 8, dtype=torch.bool)
    with pytest.warns(UserWarning, match="the best path of all 3 validation images is empty"):
        warn_if_not_learned(torch.zeros_like(targets), targets, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_not_learned(targets, targets, None)
        warn_if_not_learned(torch.zeros_like(targets), torch.zeros_like(targets), None)
    untaught = TrainConfig(device="cpu", epochs=1, finish_epochs=0, learning_rate=1e-9)
    with pytest.warns(UserWarning, match="is empty: the label paths were not learned"):
        model = replace(ModelConfig(), chain_term=False, score_bias=True)
        train(views, tmp_path / "run", model, SearchConfig(), untaught, prepare_head=_only_end)


def _only_end(head):
    with torch.no_grad():
        head.score_bias[head.end] = 100.0


def test_vanished_recurrent_weights_warn(tmp_path, views):
    quick = TrainConfig(device="cpu", epochs=1, finish_epochs=0)
    options = (ModelConfig(), SearchConfig(), quick)
    with pytest.warns(UserWarning, match="recurrent weights have vanished.*--weight_decay"):
        gone = replace(quick, learning_rate=1e-12)
        train(views, tmp_path / "gone", *options[:2], gone, prepare_head=_no_recurrence)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(views, tmp_path / "frozen", *options, prepare_head=remove_recurrence)


def _no_recurrence(head):
    with torch.no_grad():
        head.recurrence.weight_hh.zero_()


def test_weight_decay_does_not_depend_on_the_gradient():
    weights = [torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64)) for _ in "ab"]
    ours = decoupled_rmsprop([{"params": [weights[0]], "lr": 0.1}], decay=0.5, momentum=0.9)
    plain = torch.optim.RMSprop([weights[1]], lr=0.1, momentum=0.9)
    for gradient in ([1.0, 1e-9], [0.5, -1e-9]):
        for weight in weights:
            weight.grad = torch.tensor(gradient, dtype=torch.float64)
        ours.step()
        with torch.no_grad():
            weights[1].mul_(1 - 0.1 * 0.5)
        plain.step()
        torch.testing.assert_close(weights[0], weights[1])
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    ours.step()
    hook.remove()
    assert len(steps) == 1  # though a plain one was made, which torch's hooks know as well
    weights[0].grad = None
    before = weights[0].detach().clone()
    ours.step()
    torch.testing.assert_close(weights[0].detach(), before)


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0])
def test_features_of_any_size_train_alike(size):
    features = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) + 0.5
    torch.manual_seed(1)
    trunk = Trunk(7, 4, 0.0, 0.0, skip=True)
    trunk.fit_scale(features * size, 0.25)
    hidden = trunk(features * size)
    torch.testing.assert_close(hidden[:, 4:].square().mean().sqrt(), torch.tensor(0.25))
    trunk.fit_scale(features, 0.25)
    torch.testing.assert_close(trunk(features), hidden)


def test_features_that_are_all_zero_keep_their_scale():
    trunk = Trunk(3, 0, 0.0, 0.0)
    trunk.fit_scale(torch.zeros(5, 3), 0.25)
    assert trunk.feature_scale == 1
    trunk.fit_scale(torch.zeros(0, 3), 0.25)
    assert trunk.feature_scale == 1


@pytest.mark.parametrize("chain_term", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_probabilities_of_all_sets_sum_to_one(chain_term, tied):
    torch.manual_seed(0)
    L = 6
    head = Head(L, 5, joint_dim=8, hidden_dim=8, chain_term=chain_term, tied_embedding=tied)
    head = head.double().eval()
    features = torch.randn(3, 5, dtype=torch.float64) * 3
    sets = torch.tensor(list(itertools.product([False, True], repeat=L)))
    for image in features:
        nll = set_nll(head, image.expand(len(sets), -1), sets, "increasing")
        torch.testing.assert_close((-nll).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_what_makes_an_epoch_the_best(views, tmp_path):
    result = train(views, tmp_path / "run", ModelConfig(), SearchConfig(),
                   TrainConfig(device="cpu", epochs=1, finish_epochs=0))  # fmt: skip
    val = views.split("val")
    targets = result.model.label_space.from_source(val.label_matrix(), val.label_names)
    found = result.model.infer(torch.from_numpy(val.features))

    def merit(nll, **options):
        return path_validation(found, targets, nll, TrainConfig(**options)).merit

    assert merit(2.0) == pytest.approx(merit(1.0) - 0.1)
    assert merit(2.0, best_by="nll") == -2.0
    decisions = merit(2.0, best_by="decisions")
    assert decisions == merit(7.0, best_by="decisions") == pytest.approx(merit(0.0))
    assert merit(2.0, loss="pla") == decisions  # its paths have orders of their own
    assert merit(math.nan) == merit(math.inf, best_by="nll") == -math.inf
