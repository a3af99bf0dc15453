"""Exported files whose metadata is mutated at random: they open and run, or are refused at once."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnnrnn import OnnxModelError, OnnxPredictor
from tests.export.models import F, L
from tests.model.test_checkpoint_mutations import mutated_json, mutated_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SECONDS = 10


def with_texts(proto: Any, texts: dict[str, bytes], file: Path) -> Path:
    """Write a copy of a file with other metadata, whatever the bytes are."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.metadata_props[:]
    data = copy.SerializeToString()
    for key, value in texts.items():  # StringStringEntryProto by hand: protobuf takes text alone
        entry = b"\x0a" + sized(key.encode()) + b"\x12" + sized(value)
        data += b"\x72" + sized(entry)  # field 14 of ModelProto
    file.write_bytes(data)
    return file


def sized(data: bytes) -> bytes:
    """Return bytes behind their number, as protobuf writes it."""
    length, varint = len(data), b""
    while length >= 128:
        varint += bytes([length % 128 + 128])
        length //= 128
    return varint + bytes([length]) + data


def refusal(file: Path, search: str) -> str:
    with pytest.raises(OnnxModelError) as error:
        OnnxPredictor(file, search=search, threads=1)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000 and str(file) in message
    return message


@pytest.fixture(scope="module")
def proto(head_file):
    return onnx.load(head_file("increasing"))


@pytest.fixture(scope="module")
def texts(proto) -> dict[str, bytes]:
    return {prop.key: prop.value.encode() for prop in proto.metadata_props}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels", b'["a\xff"]', "utf-8"),
        ("labels", b"[" * 100_000, "nested too deeply"),
        ("labels", b'["a", "b", "c", "d", "e", 6]', "labels must be str, got 6"),
        ("labels", b'["a", "b", "c", "d", "e", "e"]', "label names must be distinct"),
        ("labels", b'["a", "b", "c", "d", "e", "\\ud800"]', "valid text"),
        ("labels", b'["a", "b", "c", "d", "e"]', "must be a permutation of 5"),
        ("source_index", b"[0, 1, 2, 3, 4, 9]", "must be a permutation of 6"),
        ("max_known", b"-1", "max_known must be at least 0"),
        ("max_known", b"1" + b"0" * 30, "max_known must be less than 2^63"),
        ("max_known", b"NaN", "numbers must be finite"),
        ("input", b'"pixels"', "input must be"),
        ("input", b'"uint8"', "preprocessing must be dict"),
        ("cnnrnn_format", b"9" * 5000, "4300"),
    ],
    ids=range(13),
)
def test_metadata_that_is_wrong(proto, texts, tmp_path, key, value, message):
    file = with_texts(proto, texts | {key: value}, tmp_path / "model.onnx")
    for search in ("onnx", "native"):
        assert message in refusal(file, search)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("search", "max_labels", 10**12, "max_labels must be in 0..65536"),
        ("search", "max_labels", 4, "labels of the graph must be int64 [None, 4, 4]"),
        ("search", "max_labels", None, "search.max_labels must be int"),
        ("search", "beam_size", 5, "of the graph must be"),
        ("search", "algorithm", "exact", "search.algorithm must be beam"),
        ("calibration", "threshold", float("inf"), "numbers must be finite"),
        ("calibration", "label_thresholds", [0.5] * 5, "label_thresholds must be 6 numbers"),
        ("calibration", "uncalibrated", [6], "uncalibrated must be labels in 0..5"),
        ("calibration", "min_labels", 7, "min_labels must be in 0..6"),
    ],
)
def test_fields_that_are_wrong(proto, texts, tmp_path, part, field, value, message):
    values = json.loads(texts[part]) | {field: value}
    changed = texts | {part: json.dumps(values).encode()}
    assert message in refusal(with_texts(proto, changed, tmp_path / "model.onnx"), "onnx")


def test_a_graph_that_is_not_as_the_metadata_says(proto, texts, tmp_path):
    file = with_texts(proto, texts | {"cnnrnn_format": b"3"}, tmp_path / "model.onnx")
    assert "the graph must have forbidden, found" in refusal(file, "onnx")
    for change, message in (
        (lambda graph: graph.output.pop(3), "the graph must have marginals, found"),
        (lambda graph: setattr(graph.input[0], "name", "pixels"), "cannot be opened|have features"),
    ):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        change(copy.graph)
        file = with_texts(copy, texts, tmp_path / "model.onnx")
        with pytest.raises(OnnxModelError, match=message):
            OnnxPredictor(file, threads=1)


def mutated(texts: dict[str, bytes], choose: random.Random) -> dict[str, bytes]:
    """Change one text of the metadata, or remove it."""
    import base64

    key = choose.choice(sorted(texts))
    kind = choose.random()
    if kind < 0.1:
        return {k: v for k, v in texts.items() if k != key}
    if kind < 0.2:
        at = choose.randrange(len(texts[key]) + 1)
        return texts | {key: texts[key][:at] + b"\xff" + texts[key][at:]}
    if key == "head":
        data = mutated_weights(base64.b64decode(texts[key]), choose)
        return texts | {key: base64.b64encode(data)}
    if key == "content_hash":
        return texts | {key: texts[key][:-1]}
    whole = mutated_json(json.dumps({key: json.loads(texts[key])}), choose)
    return texts | {key: whole.partition(b":")[2].strip()[:-1]}


@pytest.mark.parametrize("search", ["onnx", "native"])
def test_mutated_metadata(proto, texts, tmp_path, search, pytestconfig):
    features = torch.linspace(-1, 1, F)[None]
    outcomes: Counter[str] = Counter()
    file = tmp_path / "model.onnx"
    for seed in range(pytestconfig.getoption("mutations") // 2):
        choose = random.Random(f"{search} {seed}")
        with_texts(proto, mutated(texts, choose), file)
        started = time.process_time()
        try:
            predictor = OnnxPredictor(file, search=search, threads=1)
        except OnnxModelError as error:
            message = str(error)
            assert "\n" not in message and message.isprintable() and len(message) < 1000, seed
            assert str(file) in message, seed
            outcomes["refused"] += 1
        else:
            assert len(predictor.labels) == L
            for decide in ("path", "label_thresholds", "k"):
                prediction = predictor.predict_features(features, decide=decide)[0]
                assert np.isfinite(list(prediction.scores.values())).all(), seed
            outcomes["runs"] += 1
        assert time.process_time() - started < SECONDS, seed
    print(f"\n{search}: {dict(outcomes)}")
    assert outcomes["refused"] and outcomes["runs"]
