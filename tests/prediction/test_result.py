"""`Prediction` as a dictionary, and pickled."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from tests.prediction.test_decisions import NAMES, L, feature_model, features
from tests.prediction.test_predict import make_model


def test_a_dictionary_is_what_the_command_line_writes_and_json_can_hold():
    model = feature_model()
    plain, given = (
        model.predict_features(features(3), **options)[1]
        for options in ({}, {"known": [NAMES[0]], "absent": NAMES[1:]})
    )
    record = plain.to_dict()
    assert record == {
        "image": "1", "labels": plain.labels, "log_prob": plain.log_prob,
        "scores": {name: plain.scores[name] for name in plain.labels},
    }  # fmt: skip
    assert plain.to_dict(all_scores=True)["scores"] == plain.scores
    assert given.to_dict()["labels"] == [NAMES[0]]
    for prediction in (plain, given):
        text = json.dumps(prediction.to_dict(all_scores=True), allow_nan=False)
        assert json.loads(text) == prediction.to_dict(all_scores=True)


def test_a_pickle_holds_its_own_image_alone():
    model = feature_model()
    known = [[], [NAMES[2]], []] * 200
    predictions = model.predict_features(features(600), known=known)
    for row in (0, 1, 599):
        whole = predictions[row]
        data = pickle.dumps(whole)
        assert len(data) < 5000
        for alone in (pickle.loads(data), copy.copy(whole), copy.deepcopy(whole)):
            assert repr(alone) == repr(whole)
            assert (alone.labels, alone.scores) == (whole.labels, whole.scores)
            assert (alone.paths, alone.sets) == (whole.paths, whole.sets)
            assert (alone.log_prob, alone.mass) == (whole.log_prob, whole.mass)
            with pytest.raises(ValueError, match="a prediction that was not pickled"):
                alone.candidates()
    assert len(predictions[0].scores) == L


def test_an_image_that_could_not_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (found,) = make_model().predict([tmp_path / "a.png"], on_bad_image="skip")
    again = pickle.loads(pickle.dumps(found))
    assert again.to_dict() == found.to_dict() == {"image": found.source, "error": found.error}
