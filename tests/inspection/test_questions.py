"""The next question: what an answer tells, against enumeration of all sets; asking; the command."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrnn
from cnnrnn import Ensemble, Prediction, SearchConfig
from cnnrnn.cli import main
from cnnrnn.config import Calibration
from cnnrnn.inspection.questions import ask, most_telling, next_questions, question_gains
from tests.inspection.test_suspects import NAMES, all_sets, make_model, records

WIDE = SearchConfig(beam_size=16, marginal_places=64)  # finds each of the 32 sets of 5 labels
UNMIXED = Calibration(mix_weight=0.0, known_mix_weight=0.0)
# All sets in the order of `all_sets`, bit l for label l.
SETS = torch.tensor(list(itertools.product([0, 1], repeat=5))).bool()[
    :, range(4, -1, -1)
]  # by bits


def certain_model(seed):
    model = make_model(seed, search=WIDE)
    model.calibration = UNMIXED
    return model


def entropy(p):
    return -torch.xlogy(p, p).sum(-1)


def conditional(probabilities, evidence):
    """P(set | image, evidence) of all 32 sets: [n, 32]."""
    fits = ((evidence[:, None] == 0) | ((evidence[:, None] == 1) == SETS)).all(2)
    kept = probabilities * fits
    return kept / kept.sum(1, keepdim=True)


@torch.no_grad()
def probabilities_of(model, features):
    model.head.double()
    found = all_sets(model.head, features.double()).exp()
    model.head.float()
    return found


def test_the_gain_is_how_much_entropy_an_answer_takes_on_average():
    model = make_model(4)
    features, _ = records(30, 5)
    evidence = torch.zeros(30, 5, dtype=torch.int8)
    evidence[10:, 2] = 1
    evidence[20:, 0] = -1
    given = conditional(probabilities_of(model, features), evidence)
    marginals = given @ SETS.double()
    gains = question_gains(marginals, evidence)
    for label in range(5):
        expected = entropy(given)
        for there in (True, False):
            share = given[:, SETS[:, label] == there].sum(1)
            rest = given[:, SETS[:, label] == there] / share.clamp(min=1e-300)[:, None]
            expected = expected - share * entropy(rest)
        torch.testing.assert_close(gains[:, label], expected)
    assert (gains[10:, 2] == 0).all() and (gains[20:, 0] == 0).all()
    assert not (most_telling(marginals, evidence)[10:] == 2).any()


def test_the_gain_where_nothing_is_to_be_asked():
    evidence = torch.tensor([[0, 0, 1, -1]], dtype=torch.int8)
    gains = question_gains(torch.tensor([[0.5, torch.nan, 1.0, 0.5]]), evidence)
    torch.testing.assert_close(gains, torch.tensor([[math.log(2), 0, 0, 0]]))
    none_left = torch.tensor([[1, 1, 0, 1]], dtype=torch.int8)
    assert most_telling(torch.full((1, 4), torch.nan), none_left).tolist() == [2]


def test_asking_is_followed_by_enumeration():
    """The search finds all sets here, so that every figure is known."""
    model = certain_model(6)
    features, targets = records(25, 5, seed=2)
    probabilities = probabilities_of(model, features)
    evidence = torch.zeros(25, 5, dtype=torch.int8)
    rows = ask(model, features, targets, 5)
    assert [row.questions for row in rows] == list(range(6))
    for row in rows:
        given = conditional(probabilities, evidence)
        best = SETS[given.argmax(1)]
        assert row.exact == pytest.approx(float((best == targets).all(1).double().mean()))
        assert row.wrong == pytest.approx(float((best != targets).sum(1).double().mean()))
        assert row.probability == pytest.approx(float(given.max(1).values.mean()), abs=1e-4)
        largest = given.sort(1, descending=True).values[:, :16]
        expected = entropy(largest / largest.sum(1, keepdim=True)).mean()
        assert row.entropy == pytest.approx(float(expected), abs=1e-3)
        if row.questions < 5:
            label = most_telling(given @ SETS.double(), evidence)[:, None]
            evidence.scatter_(1, label, targets.gather(1, label).to(torch.int8) * 2 - 1)
    assert rows[-1][1:] == pytest.approx((1.0, 0.0, 1.0, 0.0), abs=1e-4)
    assert rows[0].exact < rows[2].exact < 1


def test_another_order_of_questions():
    model = certain_model(6)
    features, targets = records(10, 5)
    asked = []

    def in_turn(scores, evidence):
        label = (evidence == 0).int().argmax(1)
        asked.append(label.tolist())
        return label

    rows = ask(model, features, targets, 3, choose=in_turn)
    assert asked == [[label] * 10 for label in range(3)] and len(rows) == 4


def test_sets_longer_than_the_longest_path_and_ensembles():
    features, targets = records(12, 5)
    models = [make_model(seed, search=replace(WIDE, max_labels=2)) for seed in range(2)]
    for model in (models[0], Ensemble(models).eval()):
        assert int(targets.sum(1).max()) == 5
        rows = ask(model, features, targets, 5)
        assert (rows[-1].exact, rows[-1].wrong) == (1.0, 0.0)
        assert all(0 <= row.probability <= 1 + 1e-5 for row in rows)


@pytest.mark.parametrize("questions", [-1, 6])
def test_too_few_or_too_many_questions(questions):
    with pytest.raises(ValueError, match=rf"questions must be in 0..5, got {questions}"):
        ask(make_model(0), *records(3, 5), questions)


def test_the_next_questions_of_a_prediction():
    model = certain_model(3)
    features, _ = records(6, 5)
    known = [[], ["sea"], ["sea"], ["sky", "cow"], [], []]
    absent = [[], [], ["boat"], [], ["sun"], []]
    predictions = model.predict_features(features, known=known, absent=absent)
    evidence = torch.zeros(6, 5, dtype=torch.int8)
    for image in range(6):
        for names, value in ((known[image], 1), (absent[image], -1)):
            for name in names:
                evidence[image, model.labels.index(name)] = value
    given = conditional(probabilities_of(model, features), evidence)
    gains = question_gains(given @ SETS.double(), evidence)
    for image, prediction in enumerate(predictions):
        found = next_questions(prediction, 5, least_gain=0)
        settled = {*known[image], *absent[image]}
        assert {q.label for q in found} == {*NAMES} - settled
        order = gains[image].argsort(descending=True)[: len(found)].tolist()
        assert [q.label for q in found] == [model.labels[i] for i in order]
        assert [q.gain for q in found] == pytest.approx(
            [float(gains[image, i]) / math.log(2) for i in order], abs=1e-4
        )
        assert next_questions(prediction) == found[:1]
        telling = [q for q in found if q.gain > 0.9]
        assert next_questions(prediction, 5, least_gain=0.9) == telling


def test_an_image_that_cannot_be_read_has_no_question():
    assert next_questions(Prediction("a.jpg", "is broken"), 3) == []


# The command, on the demo model


@pytest.fixture
def photo(tmp_path):
    """Of a few random squares: the demo model doubts."""
    pixels = np.random.default_rng(1).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_command(photo, capsys):
    given = ["--known", "sky", "--known", "field", "--absent", "road"]
    words = ["suggest", str(photo), "--device=cpu", "--questions", "2", *given]
    assert main([*words, "--format", "jsonl"]) == 0
    record = json.loads(capsys.readouterr().out)
    (prediction,) = cnnrnn.predict([photo], known=["sky", "field"], absent=["road"], device="cpu")
    expected = next_questions(prediction, 2)
    assert len(expected) == 2
    assert record["labels"] == prediction.labels and {"sky", "field"} <= {*record["labels"]}
    assert [q["label"] for q in record["questions"]] == [q.label for q in expected]
    assert [q["gain"] for q in record["questions"]] == pytest.approx([q.gain for q in expected])
    assert main(words) == 0
    asked = ", ".join(f"{q.label} {q.score:.2f}" for q in expected)
    labels = ", ".join(prediction.labels)
    assert capsys.readouterr().out == f"{str(photo):<40}  {labels}; ask: {asked}\n"


def test_what_the_command_refuses_or_skips(photo, tmp_path, capsys):
    assert main(["suggest", str(photo), "--questions", "0"]) == 1
    assert "--questions must be at least 1, got 0" in capsys.readouterr().err
    assert main(["suggest", str(photo), "--known", "unicorn", "--device=cpu"]) == 1
    assert "known must hold labels of the model, got 'unicorn'" in capsys.readouterr().err
    (tmp_path / "b.png").write_bytes(b"no picture")
    for form in ("table", "jsonl"):
        words = ["suggest", str(tmp_path), "--on-bad-image", "skip", "--device=cpu"]
        assert main([*words, "--format", form]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 2 and "b.png" in out.splitlines()[1]
        assert out.count("ask") + out.count("questions") == 1 and "1 images" in err


def test_the_command_takes_known_labels_from_a_table(photo, tmp_path, capsys):
    (tmp_path / "tags.csv").write_text("image,labels\na.png,sky;field\n")
    words = ["suggest", str(photo), "--device=cpu", "--questions=1", "--format=jsonl"]
    assert main([*words, "--known_from", f"csv:{tmp_path / 'tags.csv'}", "--known", "car"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"sky", "field", "car"} <= {*record["labels"]}
    assert record["questions"][0]["label"] not in ("sky", "field", "car")
