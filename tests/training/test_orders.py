"""Label orders: what moves when labels are numbered anew, and training in each order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cnnrnn import ModelConfig, SearchConfig, TrainConfig, load_dataset
from cnnrnn.evaluation import evaluate
from cnnrnn.labels import first_label_space, increasing_paths
from cnnrnn.machine.files import weights_digest
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.network.head import Head
from cnnrnn.network.losses import binary_cross_entropy, sequence_loss
from cnnrnn.training.batches import Split
from cnnrnn.training.log import Log
from cnnrnn.training.loop import Stage, Validation, run_stage
from cnnrnn.training.optimizers import make_optimizer
from cnnrnn.training.orders import label_ease, permute_labels
from cnnrnn.training.run import train

MODEL = ModelConfig(trunk_dim=0, joint_dim=16, hidden_dim=16, input_dropout=0.0,
                    hidden_dropout=0.0, joint_dropout=0.0)  # fmt: skip
QUICK = TrainConfig(
    feature_rms=0.0,
    warm_epochs=1,
    epochs=3,
    batch_size=32,
    learning_rate=3e-2,
    device="cpu",
    ema_decay=0.0,
    finish_epochs=0,
)
UNIQUE = SearchConfig(beam_size=4, order="unique")
INCREASING = SearchConfig(beam_size=4)
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def data(tmp_path):
    """The rarer a label the better its feature shows it; the most frequent one is noise."""
    random = np.random.default_rng(0)
    labels = random.random((300, 5)) < [0.2, 0.55, 0.3, 0.4, 0.25]
    noise = np.array([0.0, 4.0, 0.3, 0.6, 0.1])
    features = np.where(labels, 1.0, -1.0) + noise * random.standard_normal((300, 5))
    split = np.array(["train"] * 7 + ["val"] * 2 + ["test"])[np.arange(300) % 10]
    np.savez(tmp_path / "data.npz", features=features.astype(np.float32), labels=labels,
             label_names=np.array(NAMES), split=split)  # fmt: skip
    return load_dataset(f"features:{tmp_path / 'data.npz'}")


def test_the_first_label_space_of_each_order():
    counts = np.array([3, 7, 3, 0, 7])
    names = {
        order: first_label_space(NAMES, counts, TrainConfig(label_order=order, seed=5)).names
        for order in ("frequency", "easiest", "shuffled", "rare", "given", "random")
    }
    assert names["frequency"] == names["easiest"] == names["shuffled"]
    assert names["frequency"] == ("bee", "eel", "ant", "cat", "dog")
    assert names["rare"] == ("dog", "ant", "cat", "bee", "eel")
    assert names["given"] == NAMES
    assert sorted(names["random"]) == sorted(NAMES)
    others = {
        first_label_space(NAMES, counts, TrainConfig(label_order="random", seed=seed)).names
        for seed in range(10)
    }
    assert len(others) > 5


def test_label_ease_by_hand():
    marginals = torch.tensor([[0.5, 0.1, 0.0, 0.9], [0.25, 0.2, 0.3, 0.9]])
    targets = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    expected = [np.log(0.125) / 2, np.log(0.2), np.log(1e-7), -np.inf]
    torch.testing.assert_close(
        label_ease(marginals, targets), torch.tensor(expected, dtype=torch.float64)
    )
    assert label_ease(torch.zeros(0, 3), torch.zeros(0, 3) > 0).tolist() == [-np.inf] * 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "paper"])
def test_named_labels_score_the_same_in_another_order(cell, tied):
    torch.manual_seed(0)
    head = Head(7, 3, joint_dim=5, hidden_dim=4, cell=cell, score_bias=cell == "lstm",
                tied_embedding=tied).double()  # fmt: skip
    if head.score_bias is not None:
        nn.init.normal_(head.score_bias)
    features = torch.randn(6, 3, dtype=torch.float64)
    paths = torch.tensor([[3, 1, 6], [0, -1, -1], [-1, -1, -1], [2, 5, -1], [6, 0, 4], [1, 1, 1]])
    before, _ = head(features, paths)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permute_labels(head, order)
    renamed = torch.cat([order.argsort(), torch.tensor([-1])])[paths]  # -1 is the last
    after, _ = head(features, renamed)
    torch.testing.assert_close(after[:, :, :7], before[:, :, order])
    torch.testing.assert_close(after[:, :, 7], before[:, :, 7])


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_training_goes_on_as_if_nothing_had_moved(optimizer):
    """Where nothing depends on the order, a run with a change of order equals one without."""
    config = TrainConfig(optimizer=optimizer, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    targets = torch.rand(20, 6, generator=generator) < 0.4
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    inverse = torch.cat([order.argsort(), torch.tensor([-1])])
    trained = []
    for moves in (False, True):
        torch.manual_seed(0)
        head = Head(6, 3, joint_dim=5, hidden_dim=4, chain_term=True, tied_embedding=False).double()
        steps = make_optimizer([{"params": list(head.parameters()), "lr": 1e-2}], config)
        for step in range(8):
            paths, present = increasing_paths(targets), targets
            if moves and step == 4:
                permute_labels(head, order, steps)
            if moves and step >= 4:
                paths, present = inverse[paths], targets[:, order]
            hidden = head.trunk(features)
            independent = binary_cross_entropy(head.label_classifier(hidden), present)
            classifier, head.label_classifier = head.label_classifier, None
            scores, _ = head(features, paths)  # without the chain term, which knows the order
            head.label_classifier = classifier
            steps.zero_grad()
            (sequence_loss(scores, paths, "unique") + independent).mean().backward()
            steps.step()
        trained.append(head)
    permute_labels(trained[0], order)
    for still, moved in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(moved, still)


def digest(folder):
    return weights_digest(load_checkpoint(folder).state_dict().items())


def test_easiest_first_is_learned_and_kept(tmp_path, data):
    config = replace(QUICK, warm_epochs=4, epochs=5, label_order="easiest")
    result = train(data, tmp_path / "run", MODEL, INCREASING, config)
    by_frequency = first_label_space(NAMES, data.split("train").label_counts(), config)
    assert by_frequency.names[0] == "bee" and result.model.labels[-1] == "bee"
    for part in ("best", "last"):
        loaded = load_checkpoint(tmp_path / "run" / part)
        assert loaded.labels == result.model.labels
        assert tuple(data.label_names[i] for i in loaded.label_space.source_index) == loaded.labels
    measured = evaluate(load_checkpoint(tmp_path / "run"), data.split("val"))
    assert measured.metrics["path"] == pytest.approx(result.metrics["path"])
    assert measured.metrics["path"]["O-F1"] > 0.8


def test_easiest_first_gives_the_same_bits_and_settles(tmp_path, data):
    config = replace(QUICK, epochs=4, label_order="easiest")
    for name, changes in (("one", {}), ("two", {}), ("never", {"reorder_epochs": 0}),
                          ("always", {"reorder_epochs": 9})):  # fmt: skip
        train(data, tmp_path / name, MODEL, INCREASING, replace(config, **changes))
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "never")
    train(data, tmp_path / "frequency", MODEL, INCREASING,
          replace(config, label_order="frequency"))  # fmt: skip
    assert digest(tmp_path / "never") == digest(tmp_path / "frequency")
    # No order is learned after the last epoch, when nothing could be trained in it.
    assert digest(tmp_path / "always") == digest(tmp_path / "one")


@pytest.mark.parametrize("order", ["rare", "random", "shuffled"])
def test_training_in_another_order(tmp_path, data, order):
    search = UNIQUE if order == "shuffled" else INCREASING
    config = replace(QUICK, label_order=order, epochs=4)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(data, tmp_path / name, MODEL, search, replace(config, seed=seed))
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "three")
    counts = data.split("train").label_counts()
    model = load_checkpoint(tmp_path / "one")
    assert model.label_space == first_label_space(NAMES, counts, config)
    assert evaluate(model, data.split("val")).metrics["path"]["O-F1"] > 0.7


def test_shuffled_paths_need_a_search_that_goes_down(tmp_path, data):
    message = (
        "search.order must be unique or free for label_order shuffled, got increasing; pass "
        "--search.order unique"
    )
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "run", MODEL, INCREASING, replace(QUICK, label_order="shuffled"))
    assert not (tmp_path / "run").exists()


def test_another_module_begins_the_search_for_the_best_epoch_anew(data):
    """Merits of two orders are not compared, nor does patience run across a change."""
    merits = [5.0, 9.0, 1.0, 3.0, 2.0, 2.0, 2.0, 7.0]
    module = nn.Linear(5, 1)
    seen = []

    def validate():
        seen.append(module.weight.detach().clone())
        return Validation(merits[len(seen) - 1], {})

    bests = []
    stage = Stage("path", 8, module, [{"params": list(module.parameters()), "lr": 1e-2}],
                  lambda batch: module(batch.inputs)[:, 0], validate,
                  lambda validation, best: bests.append(best),
                  lambda epoch, optimizer: epoch == 2)  # fmt: skip
    part = data.split("train")
    split = Split(part, part.label_matrix(), torch.from_numpy(part.features))
    best = run_stage(stage, split, replace(QUICK, patience=3), device=torch.device("cpu"),
                     generator=torch.Generator().manual_seed(0), log=Log(None))  # fmt: skip
    assert best.merit == 3.0
    assert bests == [True, True, True, True, False, False, False]
    assert torch.equal(module.weight, seen[3])


def test_the_options_of_orders_are_checked():
    with pytest.raises(ValueError, match="label_order must be one of frequency, rare, given, "
                                         "random, easiest, shuffled, got 'alphabet'"):  # fmt: skip
        TrainConfig(label_order="alphabet")
    with pytest.raises(ValueError, match="reorder_epochs must be at least 0, got -1"):
        TrainConfig(reorder_epochs=-1)
