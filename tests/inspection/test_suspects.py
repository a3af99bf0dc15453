"""Wrong labels: scores against enumeration of all sets, ranking, folds, and what is refused."""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cnnrnn import Ensemble, ModelConfig, NonFiniteError, SearchConfig, TrainConfig
from cnnrnn.cli import main
from cnnrnn.data import DataError, Dataset, load_dataset
from cnnrnn.data.dataset import csr
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.data.splits import training_splits
from cnnrnn.inspection import suspects
from cnnrnn.inspection.flips import flip_log_odds, flipped_log_probs
from cnnrnn.inspection.suspects import (
    cross_fitted_suspects,
    find_suspects,
    seen_in_training,
)
from cnnrnn.labels import LabelSpace
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.network.head import Head
from cnnrnn.training.ensemble import train_ensemble
from cnnrnn.training.resume import STATE_FILE, ResumeError, TrainingState, save_state, stored_recipe
from cnnrnn.training.run import train

MODEL = ModelConfig(backbone="features", trunk_dim=8, joint_dim=6, hidden_dim=5)
SEARCH = SearchConfig(beam_size=4)
NAMES = ("sky", "sea", "boat", "cow", "sun")


def make_model(seed, names=NAMES, config=MODEL, feature_dim=7, search=SEARCH):
    """A random model, whose labels depend on one another and stand in an order of their own."""
    torch.manual_seed(seed)
    head = Head.from_config(config, len(names), feature_dim)
    for parameter in head.parameters():
        parameter.data *= 2
    space = LabelSpace.random(names, torch.Generator().manual_seed(seed))
    return CNNRNN(config, space, head, None, search).eval()


def records(count, num_labels, seed=0, feature_dim=7):
    """Features and label sets, the empty and the full one among them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, num_labels, generator=generator) < 0.4
    targets[:2] = torch.tensor([[False], [True]])
    return torch.randn(count, feature_dim, generator=generator), targets


def all_sets(head, features):
    """log P of each of the 2^L sets of images, followed label by label: [n, 2^L] float64.

    Bit l of a column is label l.
    """
    embedding = head.embed(features)
    L = head.num_labels
    found = torch.zeros(len(features), 2**L, dtype=torch.float64)
    for bits in itertools.product([0, 1], repeat=L):
        path = [label for label in range(L) if bits[label]]
        state = head.extend(torch.tensor([head.start]), head.initial_state(1))
        total = torch.zeros(len(features), dtype=torch.float64)
        for last, following in zip([-1, *path], [*path, L], strict=True):
            if last >= 0:
                state = head.extend(torch.tensor([last]), state)
            scores = head.score(state[0], embedding)
            if embedding.label_logits is not None:
                scores = scores + embedding.label_logits
            total += scores[:, last + 1 :].log_softmax(1)[:, following - last - 1]
        found[:, sum(bit << label for label, bit in enumerate(bits))] = total
    return found


def odds_by_enumeration(log_probs, targets):
    """Log-odds of each label given the record's others: [n, L], from all sets [n, 2^L]."""
    L = targets.shape[1]
    weights = 2 ** torch.arange(L)
    found = []
    for label in range(L):
        sets = targets.clone()
        answers = []
        for answer in (True, False):
            sets[:, label] = answer
            answers.append(log_probs.gather(1, (sets.long() @ weights)[:, None])[:, 0])
        found.append(answers[0] - answers[1])
    return torch.stack(found, 1)


# Scores


@pytest.mark.parametrize("num_labels", [1, 2, 7])
@pytest.mark.parametrize("cell", ["lstm", "paper"])
@pytest.mark.parametrize("chain_term", [False, True])
def test_odds_are_those_of_an_enumeration(num_labels, cell, chain_term):
    config = replace(MODEL, cell=cell, chain_term=chain_term)
    model = make_model(3, tuple("abcdefg"[:num_labels]), config)
    model.head.double()
    features, targets = records(23, num_labels)
    features = features.double()
    with torch.no_grad():
        log_probs = all_sets(model.head, features)
    torch.testing.assert_close(log_probs.logsumexp(1), torch.zeros(23).double())
    found = flip_log_odds(model, features, targets)
    torch.testing.assert_close(found, odds_by_enumeration(log_probs, targets))
    if num_labels == 7:  # not what the label's odds are without the others
        present = torch.tensor([[s >> label & 1 for label in range(7)] for s in range(128)]).bool()
        alone = torch.stack([
            log_probs[:, present[:, i]].logsumexp(1) - log_probs[:, ~present[:, i]].logsumexp(1)
            for i in range(7)
        ], 1)  # fmt: skip
        assert (found - alone).abs().max() > 0.1


@pytest.mark.parametrize("values_at_once", [1, 700, 40_000])
def test_scores_do_not_depend_on_how_much_is_held_at_once(values_at_once, device):
    model = make_model(1)
    features, targets = records(61, 5)
    one = flipped_log_probs(model.head, features, targets)
    model.to(device)
    other = flipped_log_probs(model.head, features.to(device), targets, values_at_once)
    for found, expected in zip(other, one, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_ensemble_has_the_odds_of_its_mean_probabilities():
    models = [make_model(seed) for seed in range(3)]
    assert len({model.labels for model in models}) == 3
    ensemble = Ensemble(models).eval()
    features, targets = records(17, 5)
    of_members = []
    for model in models:
        model.head.double()
        columns = [model.labels.index(name) for name in ensemble.labels]
        by_bit = [sum((s >> i & 1) << columns[i] for i in range(5)) for s in range(32)]
        with torch.no_grad():
            of_members.append(all_sets(model.head, features.double())[:, by_bit])
        model.head.float()
    expected = odds_by_enumeration(torch.stack(of_members).exp().mean(0).log(), targets)
    found = flip_log_odds(ensemble, features, targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_records():
    model = make_model(0)
    assert flip_log_odds(model, torch.zeros(0, 7), torch.zeros(0, 5).bool()).shape == (0, 5)


def test_shared_steps_are_scored_once(monkeypatch):
    """A label set of k labels takes its k+1 steps once, each change only those after it."""
    scored = []
    score_steps = Head.score_steps

    def counting(self, *arguments):
        rows = score_steps(self, *arguments)
        scored.append(len(rows))
        return rows

    monkeypatch.setattr(Head, "score_steps", counting)
    model = make_model(0)
    targets = torch.tensor([[0, 1, 0, 1, 0]]).bool()
    flip_log_odds(model, torch.zeros(1, 7), targets[:, [NAMES.index(n) for n in model.labels]])
    own = targets[0, [NAMES.index(name) for name in model.labels]].tolist()
    after = [sum(own[label + 1 :]) + (not own[label]) for label in range(5)]
    # Taken out, the label before the last leaves what follows it, put in, END comes after it too.
    assert scored == [3, sum(after)]


# Data sets


def dataset_of(targets, features, names=NAMES, unknown=None, **others):
    pointers, indices = csr([np.flatnonzero(row).tolist() for row in targets.numpy()])
    parts = {}
    if unknown is not None:
        parts = dict(zip(("unknown_indptr", "unknown_indices"),
                         csr([np.flatnonzero(row).tolist() for row in unknown.numpy()]),
                         strict=True))  # fmt: skip
    return Dataset.from_arrays(
        "features:here.npz", names, pointers, indices, features=features.numpy(), **parts, **others
    )


def test_suspects_are_ranked_and_written(tmp_path):
    model = make_model(5)
    features, targets = records(40, 5)
    unknown = ~targets & (torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.2)
    dataset = dataset_of(targets, features, unknown=unknown)
    columns = [model.labels.index(name) for name in NAMES]
    in_path_order = targets[:, [NAMES.index(name) for name in model.labels]]
    odds = flip_log_odds(model, features, in_path_order)[:, columns]
    for cut in (0.0, 1.5, -2.0):
        expected = []
        for record, label in itertools.product(range(40), range(5)):
            present, value = bool(targets[record, label]), float(odds[record, label])
            suspicion = -value if present else value
            if suspicion >= cut and not unknown[record, label]:
                answers = ("present", "absent") if present else ("absent", "present")
                row = (f"row {record} of here.npz", NAMES[label], *answers)
                expected.append((-suspicion, record, label, row, value))
        found = find_suspects(model, dataset, cut=cut)
        assert [tuple(suspect)[:4] for suspect in found] == [e[3] for e in sorted(expected)]
        assert found.judged_present == int(targets.sum())
        assert found.judged_absent == int((~targets & ~unknown).sum())
        wrong = sum(e[3][2] == "present" for e in expected)
        assert 0 < wrong < len(expected)
        assert (
            f"{wrong} of {int(targets.sum())} labels that are there look wrong, "
            f"{len(expected) - wrong} of {int((~targets & ~unknown).sum())} that are not look "
            "missing"
        ) in found.summary()
        file = tmp_path / "suspects.csv"
        found.write(file)
        with file.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        assert header == ["image", "label", "given", "suggested", "log_odds"]
        assert [tuple(row[:4]) for row in rows] == [e[3] for e in sorted(expected)]
        values = [float(row[4]) for row in rows]
        assert values == pytest.approx([e[4] for e in sorted(expected)], rel=1e-4, abs=1e-4)
        assert list(tmp_path.iterdir()) == [file]  # nothing half written is left


def test_blocks_of_records_make_no_difference(monkeypatch):
    model = make_model(5)
    features, targets = records(40, 5)
    dataset = dataset_of(targets, features)
    one = find_suspects(model, dataset)
    monkeypatch.setattr(suspects, "PAIRS_AT_ONCE", 35)
    other = find_suspects(model, dataset)
    assert [tuple(s)[:4] for s in other] == [tuple(s)[:4] for s in one]
    assert (other.judged_present, other.judged_absent) == (one.judged_present, one.judged_absent)


def test_labels_that_the_data_lacks_count_as_absent():
    model = make_model(2)
    features, targets = records(20, 5)
    targets[:, [1, 3]] = False  # sea and cow
    whole = find_suspects(model, dataset_of(targets, features), cut=-100)
    names = ("sun", "sky", "boat")
    fewer = find_suspects(model, dataset_of(targets[:, [4, 0, 2]], features, names), cut=-100)
    expected = [suspect for suspect in whole if suspect.label in names]
    assert [s[:4] for s in fewer] == [s[:4] for s in expected]
    assert [s.log_odds for s in fewer] == pytest.approx([s.log_odds for s in expected], abs=1e-5)


# Planted errors

PAIR = ("plate", "fork", "tree", "lamp")
FAST = TrainConfig(epochs=8, finish_epochs=0, batch_size=16, learning_rate=3e-2, device="cpu",
                   val_fraction=0.2, ema_decay=0.0)  # fmt: skip
HEAD = ModelConfig(backbone="features", trunk_dim=0, joint_dim=16, hidden_dim=16,
                   input_dropout=0.0, hidden_dropout=0.0, joint_dropout=0.0)  # fmt: skip


def table_settings(count=300):
    """Plate and fork always come together and cannot be seen; tree is seen, lamp is chance."""
    random = np.random.default_rng(0)
    targets = random.random((count, 4)) < [0.4, 0.0, 0.4, 0.3]
    targets[:, 1] = targets[:, 0]
    features = random.standard_normal((count, 3))
    features[:, 0] = np.where(targets[:, 2], 2.0, -2.0)
    return torch.from_numpy(features).float(), torch.from_numpy(targets)


def test_cross_fitted_models_find_planted_errors(tmp_path, monkeypatch):
    """Of a pair that always comes together, one dropped and one added label stand out."""
    features, targets = table_settings()
    with_pair, without = (int((targets[:, 0] == there).nonzero()[7]) for there in (True, False))
    targets[with_pair, 1] = False
    targets[without, 1] = True
    dataset = dataset_of(targets, features, PAIR)
    seen, judged = [], []
    train_once, judge = suspects.train, suspects._judged

    def training(data, *arguments, **options):
        seen.append(set(data.rows.tolist()))
        return train_once(data, *arguments, **options)

    def judging(model, data, features, numbers, *arguments):
        torch.testing.assert_close(features, torch.from_numpy(data.features[numbers]))
        judged.append(set(numbers.tolist()))
        return judge(model, data, features, numbers, *arguments)

    monkeypatch.setattr(suspects, "train", training)
    monkeypatch.setattr(suspects, "_judged", judging)
    model = make_model(0, PAIR, HEAD, feature_dim=3)
    recipe = suspects.Recipe(HEAD, SEARCH, FAST, "")
    lines = []
    found = cross_fitted_suspects(model, dataset, recipe, 2, device="cpu", say=lines.append)

    first = list(found)[:4]
    assert {(s.image, s.label, s.suggested) for s in first if s.label == "fork"} == {
        (f"row {with_pair} of here.npz", "fork", "present"),
        (f"row {without} of here.npz", "fork", "absent"),
    }
    assert {s.label for s in first} <= {"plate", "fork"}
    assert len(seen) == len(judged) == 2
    everything = set(range(300))
    for own, rest in zip(judged, seen, strict=True):
        assert len(own) == 150 and own | rest == everything and not own & rest
    assert set.union(*judged) == everything
    assert sum(line.startswith("fold") for line in lines) == 2


# What a run was trained on


def trained_run(folder, dataset, **options):
    config = replace(FAST, epochs=1, val_fraction=0.25, **options)
    train(dataset, folder, HEAD, SEARCH, config)
    return config


def test_the_recipe_and_the_training_records_of_a_run(tmp_path):
    features, targets = table_settings(60)
    splits = {"train": np.arange(0, 50), "test": np.arange(50, 60)}
    dataset = dataset_of(targets, features, PAIR, splits=splits)
    config = trained_run(tmp_path / "run", dataset, seed=3, label_order="rare")
    training, _ = training_splits(dataset, config)
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        recipe = stored_recipe(folder)
        assert (recipe.model, recipe.search) == (HEAD, SEARCH)
        assert recipe.train == replace(config, device="auto")  # a device is not the run's
        assert seen_in_training(folder, dataset).tolist() == training.rows.tolist()
    assert len(training.rows) == 38
    targets[4, 0] = ~targets[4, 0]
    assert not len(seen_in_training(tmp_path / "run", dataset_of(targets, features, PAIR)))
    assert not len(seen_in_training(tmp_path, dataset))


def test_the_training_records_of_an_ensemble(tmp_path):
    features, targets = table_settings(60)
    dataset = dataset_of(targets, features, PAIR, splits={"all": np.arange(60)})
    config = replace(FAST, epochs=1, val_fraction=0.25)
    train_ensemble(dataset, tmp_path, HEAD, SEARCH, config, ["frequency", "rare"])
    training, _ = training_splits(dataset, config)
    for folder in (tmp_path, tmp_path / "best"):
        assert seen_in_training(folder, dataset).tolist() == training.rows.tolist()


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(ResumeError, match="must be the folder of a run of one model"):
        stored_recipe(tmp_path)
    for values in ({}, {"identity": {}}, {"identity": {"options": {"epochs": "many"}}},
                   {"identity": {"options": {"head.size": 1}}}):  # fmt: skip
        save_state(tmp_path / STATE_FILE, TrainingState(values, {}))
        with pytest.raises(ResumeError, match=r"does not say what its run was started with"):
            stored_recipe(tmp_path)


# The command


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A features: file with two splits, and a run on it."""
    folder = tmp_path_factory.mktemp("settings")
    features, targets = table_settings(120)
    np.savez(
        folder / "data.npz", features=features.numpy(), labels=targets.numpy(),
        label_names=np.array(PAIR), split=np.array(["train", "test"])[np.arange(120) % 3 // 2],
    )  # fmt: skip
    trained_run(folder / "run", load_dataset(f"features:{folder / 'data.npz'}"))
    return folder


def check(settings, *options):
    return main(["data", "check", f"features:{settings / 'data.npz'}", *map(str, options)])


def test_the_command_warns_of_records_that_were_trained_on(settings, tmp_path, capsys):
    file = tmp_path / "suspects.csv"
    assert check(settings, "--model", settings / "run", "--suspects", file, "--device=cpu") == 0
    out, err = capsys.readouterr()
    assert "no problems\nsuspects, log-odds of the other answer at least 0: " in out
    assert "was trained on 60 of the 120 records" in err
    rows = list(csv.DictReader(file.open(newline="")))
    counts = [int(x) for x in re.search(r"(\d+) of \d+ lab.* wrong, (\d+) of", out).groups()]
    assert sum(counts) == len(rows) > 0
    assert all(row["image"] == f"row {row['image'].split()[1]} of {settings / 'data.npz'}"
               for row in rows)  # fmt: skip

    options = ("--split", "test", "--cut", "-1", "--device=cpu", "--suspects", file)
    assert check(settings, "--model", settings / "run" / "best", *options) == 0
    out, err = capsys.readouterr()
    assert "trained on" not in err and "at least -1: " in out
    rows = list(csv.DictReader(file.open(newline="")))
    assert {int(row["image"].split()[1]) % 3 for row in rows} == {2}


def test_the_command_trains_folds(settings, tmp_path, capsys):
    options = ("--model", settings / "run", "--suspects", tmp_path / "s.csv", "--device=cpu")
    assert check(settings, *options, "--folds", "3") == 0
    out, err = capsys.readouterr()
    assert err.count("fold ") == 3 and "80 records, 40 are judged" in err
    assert "trained on" in err and "was trained on" not in err
    assert (tmp_path / "s.csv").exists() and "suspects, " in out
    assert list(tmp_path.iterdir()) == [tmp_path / "s.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suspects", "{}/s.csv"], "--suspects needs --model, got none"),
        (["--model", "{run}"], "--model needs --suspects, got none"),
        (["--folds", "2"], "--folds needs --suspects and --model, got none"),
        (["--split", "test"], "--split needs --suspects and --model, got none"),
        (["--model", "{run}", "--suspects", "{}/none/s.csv"], "must be in a folder that exists"),
        (["--model", "{run}", "--suspects", "{}/s.csv", "--folds", "1"],
         "--folds must be at least 2, got 1"),
        (["--model", "{run}", "--suspects", "{}/s.csv", "--folds", "121"],
         "folds must be in 2..120 for 120 records, got 121"),
        (["--model", "{run}", "--suspects", "{}/s.csv", "--split", "dev"], "has no split 'dev'"),
        (["--model", "{}", "--suspects", "{}/s.csv"], "is not a checkpoint"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(settings, tmp_path, capsys, options, message):
    words = [word.format(tmp_path, run=settings / "run") for word in options]
    assert check(settings, *words, "--device=cpu") == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("cnnrnn: error")]
    assert message in line
    assert not list(tmp_path.rglob("*.csv"))


def test_folds_need_the_run_of_one_model(settings, tmp_path, capsys):
    model = load_checkpoint(settings / "run")
    model.save(tmp_path / "alone")
    Ensemble([model, model]).save(tmp_path / "two")
    for name, message in (("alone", "must be the folder of a run"), ("two", "is an ensemble")):
        options = ("--suspects", tmp_path / "s.csv", "--folds", "2", "--device=cpu")
        assert check(settings, "--model", tmp_path / name, *options) == 1
        assert message in capsys.readouterr().err
    assert check(settings, "--model", tmp_path / "two", *options[:2], "--device=cpu") == 0


def test_models_and_data_that_do_not_fit(settings):
    features, targets = records(20, 5)
    dataset = dataset_of(targets, features)
    for order in ("unique", "free"):
        model = make_model(0, search=SearchConfig(order=order))
        with pytest.raises(ValueError, match=f"must be increasing to judge labels.*got {order}"):
            find_suspects(model, dataset)
        recipe = suspects.Recipe(MODEL, model.search, FAST, "")
        with pytest.raises(ValueError, match=f"must be increasing to judge labels.*got {order}"):
            cross_fitted_suspects(model, dataset, recipe, 2)
    model = make_model(0)
    with pytest.raises(DataError, match="must have labels that are among the model's 5"):
        find_suspects(model, dataset_of(targets, features, ("sky", "sea", "boat", "cow", "ox")))
    with pytest.raises(DataError, match="must hold vectors of 7 features.*got 6"):
        find_suspects(model, dataset_of(targets, features[:, :6]))
    with pytest.raises(ValueError, match=r"targets must be \[20, 5\], got \[20, 4\]"):
        flipped_log_probs(model.head, features, targets[:, :4])
    with pytest.raises(ValueError, match=r"folds must be in 2..20 for 20 records, got 1"):
        cross_fitted_suspects(model, dataset, suspects.Recipe(MODEL, SEARCH, FAST, ""), 1)


def test_records_whose_scores_are_not_finite_are_named(monkeypatch):
    monkeypatch.setattr(suspects, "PAIRS_AT_ONCE", 50)  # blocks of ten
    features, targets = records(30, 5)
    features[13] = 3e38
    with pytest.raises(NonFiniteError) as caught:
        find_suspects(make_model(0), dataset_of(targets, features))
    assert caught.value.images == [13]


# Pictures


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=30, val=10, test=4, image_size=32)
    return root


@pytest.mark.parametrize("frozen", [True, False])
def test_pictures(scenes, tmp_path, capsys, frozen):
    """A frozen backbone's features are kept in the run; one that was trained is trained anew."""
    config = replace(FAST, epochs=1, val_fraction=0.25)
    model = replace(HEAD, backbone="small", pretrained=False, image_size=16, freeze_backbone=frozen)
    with pytest.warns(UserWarning) if frozen else pytest.MonkeyPatch.context():
        train(load_dataset(f"scenes:{scenes}"), tmp_path / "run", model, SEARCH, config)
    before = len(list((tmp_path / "run").glob("features/*")))
    for fold in ([], ["--folds", "2"]):
        words = ["data", "check", f"scenes:{scenes}", "--model", str(tmp_path / "run"),
                 "--suspects", str(tmp_path / "s.csv"), "--device=cpu", *fold]  # fmt: skip
        assert main(words) == 0
        rows = list(csv.DictReader((tmp_path / "s.csv").open(newline="")))
        assert rows and all(row["image"].endswith(".png") for row in rows)
    assert len(list((tmp_path / "run").glob("features/*"))) == before + 1
    capsys.readouterr()
