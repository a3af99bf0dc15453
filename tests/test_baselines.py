"""The comparison: every method on the same features, each tuned on validation data alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnnrnn.baselines import METHODS, IndependentClassifier, compare, train_independent
from cnnrnn.config import ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import Dataset, load_dataset
from cnnrnn.fit import Split

HEAD = ModelConfig(trunk_dim=0, hidden_dim=16, joint_dim=16, input_dropout=0.0, joint_dropout=0.0)
QUICK = TrainConfig(device="cpu", warm_epochs=25, epochs=15, batch_size=32)


@pytest.fixture
def separable(tmp_path) -> Dataset:
    """Each label is the sign of one feature; the third goes with the first."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 6)).astype(np.float32)
    features += np.sign(features) * 0.5
    labels = features[:, :4] > 0
    labels[:, 2] = labels[:, 0]
    split = np.array(["train"] * 400 + ["val"] * 100 + ["test"] * 100)
    file = tmp_path / "features.npz"
    np.savez(file, features=features, labels=labels, label_names=list("abcd"), split=split)
    return load_dataset(f"features:{file}")


def test_every_method_learns_a_separable_problem(separable, tmp_path):
    lines = []
    rows = compare(
        separable,
        tmp_path / "runs",
        HEAD,
        SearchConfig(beam_size=4),
        QUICK,
        seeds=(0,),
        learning_rates=(1e-2, 1e-6),
        say=lines.append,
    )
    assert [row.method for row in rows] == list(METHODS)
    assert len(lines) == 3
    by_method = {row.method: row for row in rows}
    assert by_method["CNN-RNN"].own["O-F1"] > 0.97
    assert by_method["CNN-RNN"].own["exact-match"] > 0.9
    assert by_method["binary cross-entropy"].own["O-F1"] > 0.97
    # Softmax must name the same number of labels everywhere, and set sizes differ here.
    assert by_method["softmax"].own["O-F1"] < by_method["binary cross-entropy"].own["O-F1"]
    assert all(row.learning_rate == 1e-2 for row in rows)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_a_baseline_is_restored_to_its_best_epoch(separable, loss):
    data = [separable.split(name) for name in ("train", "val")]
    train, val = (Split(d, d.label_matrix(), torch.as_tensor(d.features)) for d in data)
    said = []
    model = train_independent(train, val, loss, HEAD, QUICK, say=said.append)
    assert isinstance(model, IndependentClassifier)
    assert not model.training
    assert any(line.startswith(f"{loss} second") for line in said)
    with torch.no_grad():
        scores = model(val.features)
    assert ((scores[:, 0] > scores[:, 0].median()) == val.targets[:, 0]).float().mean() > 0.8


def test_k_and_threshold_are_chosen_on_validation_data(tmp_path):
    """One label in every training and validation image, three in every test image."""
    rng = np.random.default_rng(1)
    one = np.eye(4, dtype=bool)[rng.integers(4, size=300)]
    labels = np.concatenate([one, ~np.eye(4, dtype=bool)[rng.integers(4, size=60)]])
    features = np.where(labels, 1.0, -1.0) + 0.1 * rng.normal(size=labels.shape)
    split = np.array(["train"] * 200 + ["val"] * 100 + ["test"] * 60)
    file = tmp_path / "features.npz"
    np.savez(file, features=features.astype(np.float32), labels=labels,
             label_names=list("abcd"), split=split)  # fmt: skip
    rows = compare(
        load_dataset(f"features:{file}"), tmp_path / "runs", HEAD, SearchConfig(beam_size=4),
        QUICK, seeds=(0,), learning_rates=(1e-2,),
    )  # fmt: skip
    softmax = next(row for row in rows if row.method == "softmax")
    assert softmax.own["mean-labels-predicted"] == 1.0
    assert softmax.at_3["mean-labels-predicted"] == 3.0
