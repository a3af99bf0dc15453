"""Checkpoints mutated at random: they load and predict, or say in a sentence what is wrong."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnrnn import NonFiniteError, SearchConfig
from cnnrnn.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError
from cnnrnn.model.classifier import CNNRNN, load_backbone
from cnnrnn.model.ensemble import Ensemble, load_model
from tests.data.test_mutations import PIECES
from tests.model.test_checkpoint import make_model

SECONDS = 5
MEGABYTES = 300
FEATURES = torch.linspace(-1, 1, 7)[None]

# Written as they are where JSON has a string of that number.
RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000, "-" + "9" * 30, "1e308", "-0.0",
    "[" * 300 + "]" * 300, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '"\\ud800"',
    '{"a": 1, "a": 2}', "[" + "0," * 100_000 + "0]", '"' + "x" * 100_000 + '"',
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 17, 1000, 65_535, 65_536, 10**6, 2**31, 2**62, 2**63, 10**30,
    0.5, 1.5, 1e-300, 1e30, "", "a", "small", "paper", "lstm", "tanh", "free", "unique", "exact",
    "literal", "a\nb", "\x1b[2J", "é", [], [0], [1, 1], ["a"], [0.5] * 4, {}, {"a": 1}, "features",
    "resnet18", "vit_tiny_patch16_224", "hf-hub:a/b", "local-dir:/", "../..", "members/0",
    {"name": "resnet18", "arguments": {}},
    {"name": "vit_tiny_patch16_224", "arguments": {"depth": 60_000}},
    {"name": "resnet18", "arguments": {"layers": [60_000] * 4}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON, the whole not counted."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [found for key, part in inner for found in [(*path, key), *places(part, (*path, key))]]


def mutated_json(text: str, choose: random.Random) -> bytes:
    """Replace, remove, add or rename values of JSON; some of it is none afterwards."""
    description = json.loads(text)
    raw: list[str] = []
    for _ in range(choose.choice([1, 1, 1, 2])):
        there = places(description)
        if not there:
            break
        *parents, last = choose.choice(there)
        place = description
        for key in parents:
            place = place[key]
        kind = choose.choice(["value", "value", "raw", "scale", "remove", "rename", "grow"])
        if kind == "remove":
            del place[last]
        elif kind == "rename" and isinstance(place, dict):
            place[choose.choice([last.upper(), last + "\0", "members"])] = place.pop(last)
        elif kind == "scale" and isinstance(place[last], (int, float)):
            place[last] = place[last] * choose.choice([-1, 2, 1000, 10**9])
        elif kind == "grow" and isinstance(place[last], (list, str)):
            place[last] = place[last] * choose.choice([2, 50])
        elif kind == "raw":
            place[last] = f"RAW{len(raw)}"
            raw.append(choose.choice(RAW))
        else:
            place[last] = choose.choice(VALUES)
    data = json.dumps(description)
    for number, piece in enumerate(raw):
        data = data.replace(f'"RAW{number}"', piece)
    return spoilt(data.encode(), choose) if choose.random() < 0.2 else data.encode()


def spoilt(data: bytes, choose: random.Random) -> bytes:
    """Cut bytes, or put others in."""
    start = choose.randrange(len(data) + 1)
    kind = choose.choice(["cut", "insert", "delete", "flip"])
    if kind == "cut":
        return data[:start]
    if kind == "insert":
        return data[:start] + choose.choice(PIECES) + data[start:]
    if kind == "delete" or start == len(data):
        return data[:start] + data[start + choose.randrange(1, 40) :]
    return data[:start] + bytes([data[start] ^ 1 << choose.randrange(8)]) + data[start + 1 :]


def mutated_weights(data: bytes, choose: random.Random) -> bytes:
    """Change what a safetensors file says of its tensors, or their values."""
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = choose.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    kind = choose.choice([
        "type", "shape", "offsets", "remove", "rename", "add", "value", "value", "bytes", "twice",
        "length",
    ])  # fmt: skip
    if kind == "type":
        entry["dtype"] = choose.choice(["F16", "BF16", "F64", "I32", "I64", "C64", "BOOL", "X", 1])
        if choose.random() < 0.5 and entry["dtype"] in ("F16", "BF16"):
            entry["shape"] = [2, *entry["shape"]]
    elif kind == "shape":
        entry["shape"] = choose.choice([
            [], [0], [10**9, 0], [10**12, 10**12], [-1], [1, *entry["shape"]],
            entry["shape"][::-1], [2 * side for side in entry["shape"]], "x",
        ])  # fmt: skip
    elif kind == "offsets":
        entry["data_offsets"] = choose.choice([
            [0, end], [start, end + 4], [start, 2**63], [-4, end], [end, start], [start], [0, 4],
        ])  # fmt: skip
    elif kind == "remove":
        del header[name]
    elif kind == "rename":
        header[choose.choice(["", "head." * 9, "backbone.x", name + ".1", "é"])] = header.pop(name)
    elif kind == "add":
        header["head.more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(values)] * 2}
        if choose.random() < 0.7:
            header["head.more"]["data_offsets"][1] += 4
            values += bytes(4)
    elif kind == "value" and end > start:
        at = start + choose.randrange((end - start) // 4 or 1) * 4
        number = choose.choice([float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 0.0])
        values = values[:at] + torch.tensor(number).numpy().tobytes() + values[at + 4 :]
    text = json.dumps(header).encode()
    if kind == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    length = len(text)
    if kind == "length":
        length = choose.choice([0, length - 1, length + 1, 2**40, 2**64 - 1])
    whole = length.to_bytes(8, "little") + text + values
    return spoilt(whole, choose) if kind == "bytes" else whole


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    features = make_model(feature_dim=7)
    targets = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    features.head.count_cooccurrence(targets)
    members = [make_model(feature_dim=7, seed=seed) for seed in range(2)]
    for member in members:
        member.search = SearchConfig(beam_size=4)
    models: dict[str, CNNRNN | Ensemble] = {
        "features": features,
        "pictures": make_model(),
        "ensemble": Ensemble(members).eval(),
    }
    for name, model in models.items():
        model.save(root / name)
    return {name: root / name for name in models}


def outcome(folder: Path) -> str:
    """Load a checkpoint as everyone does, and predict."""
    started = time.process_time()
    message = None
    try:
        model = load_model(folder)
        if (folder / WEIGHTS_FILE).exists():
            load_backbone(folder)
    except CheckpointError as error:
        message = str(error)
    assert time.process_time() - started < SECONDS
    if message is not None:
        assert "\n" not in message and message.isprintable() and len(message) < 1000
        assert str(folder) in message
        return "refused"
    for value in model.state_dict().values():
        assert value.isfinite().all()
    features = FEATURES if model.feature_dim == 7 else torch.ones(1, model.feature_dim)
    try:
        for decide in ("path", "threshold", "label_thresholds", "k"):
            prediction = model.predict_features(features, decide=decide)[0]
            assert all(0 <= score <= 1 for score in prediction.scores.values())
            assert set(prediction.labels) <= set(model.labels)
            json.dumps(prediction.to_dict(), allow_nan=False).encode()
    except NonFiniteError:
        return "not finite"
    assert time.process_time() - started < SECONDS
    return "predicts"


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@pytest.mark.parametrize("which", ["config", "weights"])
def test_mutated_checkpoints(
    folders: dict[str, Path], which: str, pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.getoption("mutations")
    count = count if which == "config" else 3 * count // 4
    outcomes: Counter[str] = Counter()
    before = peak_megabytes()
    for seed in range(count):
        choose = random.Random(f"{which} {seed}")
        folder = folders[choose.choice(list(folders))]
        name = CONFIG_FILE if which == "config" else WEIGHTS_FILE
        file = choose.choice(sorted(folder.rglob(name)))
        whole = file.read_bytes()
        if which == "config":
            file.write_bytes(mutated_json(whole.decode(), choose))
        else:
            file.write_bytes(mutated_weights(whole, choose))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                outcomes[outcome(folder)] += 1
        except BaseException as error:
            error.add_note(f"seed {which} {seed}, {file}")
            raise
        finally:
            file.write_bytes(whole)
    print(f"\n{which}: {count} checkpoints, {dict(outcomes)}")
    assert outcomes["refused"] and outcomes["predicts"]
    assert peak_megabytes() - before < MEGABYTES
