"""Saving and loading: round trips, every kind of damage, and a process killed while it saves."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cnnrnn import Head, ModelConfig, SearchConfig
from cnnrnn.config import Calibration
from cnnrnn.labels import LabelSpace
from cnnrnn.machine.files import weights_digest
from cnnrnn.model.checkpoint import CheckpointError
from cnnrnn.model.classifier import CNNRNN, load_backbone, load_checkpoint
from cnnrnn.network.backbones import make_backbone

NAMES = ("sky", "sea", "bòat", "cow")
CONFIG = ModelConfig(backbone="small", pretrained=False, image_size=16, trunk_dim=8, joint_dim=4,
                     hidden_dim=6)  # fmt: skip


def make_model(config=CONFIG, names=NAMES, seed=0, feature_dim=None):
    """A small random model; with `feature_dim` one that reads feature vectors."""
    torch.manual_seed(seed)
    backbone = None if feature_dim else make_backbone(config)
    head = Head.from_config(config, len(names), feature_dim or backbone.feature_dim)
    head.max_labels = 3
    space = LabelSpace.by_frequency(names, np.arange(len(names)))
    search = SearchConfig(beam_size=5, order="unique")
    return CNNRNN(
        config, space, head, backbone, search,
        Calibration(0.3, 0.25, (0.1, 0.2, 0.3, 0.4), 2, 1, (3,)),
    ).eval()  # fmt: skip


def pictures(count=5):
    return np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    make_model().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "paper"])
def test_round_trip_predicts_the_same(tmp_path, cell, tied):
    model = make_model(replace(CONFIG, cell=cell, score_bias=cell == "lstm", tied_embedding=tied))
    assert (model.head.input_embedding is None) is tied
    model.save(tmp_path / "deep" / "model")
    loaded = load_checkpoint(tmp_path / "deep" / "model")
    assert not loaded.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert loaded.config == model.config and loaded.label_space == model.label_space
    assert loaded.search == model.search and loaded.calibration == model.calibration
    assert loaded.head.max_labels == 3
    assert loaded.backbone.preprocessing == model.backbone.preprocessing
    for before, after in zip(
        model.predict(pictures()), loaded.predict(pictures(), device="cpu"), strict=True
    ):
        assert (before.paths, before.scores) == (after.paths, after.scores)


def test_round_trip_without_a_backbone(tmp_path):
    model = make_model(feature_dim=7)
    model.save(tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    features = torch.randn(3, 7)
    assert loaded.backbone is None
    assert [p.paths for p in loaded.predict_features(features)] == [
        p.paths for p in model.predict_features(features)
    ]


def test_a_run_folder_stands_for_its_best(tmp_path):
    make_model().save(tmp_path / "best")
    assert load_checkpoint(tmp_path).labels == make_model().labels


def test_the_folder_holds_two_plain_files(folder):
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]
    json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for file in folder.iterdir():
        data = file.read_bytes()
        assert data[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")  # zip, pickle
    header_length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + header_length])


def test_saving_again_replaces(folder):
    other = make_model(seed=1)
    other.save(folder)
    digest = weights_digest(load_checkpoint(folder).state_dict().items())
    assert digest == weights_digest(other.state_dict().items())
    assert os.listdir(folder.parent) == ["model"]


def test_save_into_an_empty_folder(tmp_path):
    make_model(feature_dim=2).save(tmp_path)
    assert load_checkpoint(tmp_path).head.feature_dim == 2


def test_save_to_a_relative_path_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(feature_dim=2).save("model")
    assert load_checkpoint("model").head.feature_dim == 2


def test_save_leaves_a_folder_of_other_files_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and holds no checkpoint; not replaced"):
        make_model().save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="thesis.tex is a file, not a folder"):
        make_model().save(tmp_path / "thesis.tex")


def test_a_save_that_fails_leaves_no_trace(folder, monkeypatch):
    import safetensors.torch

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    before = weights_digest(load_checkpoint(folder).state_dict().items())
    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_model(seed=1).save(folder)
    assert os.listdir(folder.parent) == ["model"]
    assert weights_digest(load_checkpoint(folder).state_dict().items()) == before


def test_a_save_after_a_kill_between_the_moves_keeps_the_former_until_the_end(folder, monkeypatch):
    former = folder.parent / ".model.former"
    folder.rename(former)  # what a process killed between the two moves leaves
    load_checkpoint(folder)

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(folder), "rename", killed)
        make_model(seed=1).save(folder)
    load_checkpoint(folder)
    make_model(seed=1).save(folder)
    assert os.listdir(folder.parent) == ["model"]


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "nothing")
    assert f"{tmp_path / 'nothing'} is not a checkpoint" in str(error.value)
    assert "config.json" in str(error.value)


def refuses(folder, file):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert str(folder / file) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_truncated_config(folder):
    text = (folder / "config.json").read_bytes()
    for length in (0, 1, len(text) // 3, len(text) // 2, len(text) - 3):
        (folder / "config.json").write_bytes(text[:length])
        assert "is not valid JSON" in refuses(folder, "config.json")


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"9" * 10_000])
def test_config_that_is_no_json(folder, content):
    (folder / "config.json").write_bytes(content)
    refuses(folder, "config.json")


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{}"])
def test_config_of_another_kind(folder, content):
    (folder / "config.json").write_text(content)
    assert "it is not a checkpoint of cnnrnn" in refuses(folder, "config.json")


def changed(folder, *path, value=None, remove=False):
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    *parents, last = path
    place = description
    for key in parents:
        place = place[key]
    if remove:
        del place[last]
    else:
        place[last] = value
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")


def test_every_missing_key_is_named(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    description = json.loads(text)
    paths = [(key,) for key in description]
    for key, value in description.items():
        paths += [(key, inner) for inner in value] if isinstance(value, dict) else []
    assert len(paths) > 25
    for path in paths:
        changed(folder, *path, remove=True)
        assert path[-1] in refuses(folder, "config.json")
        (folder / "config.json").write_text(text, encoding="utf-8")


def test_every_value_of_another_type_is_refused(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    description = json.loads(text)
    paths = [(key,) for key in description]
    for key, value in description.items():
        paths += [(key, inner) for inner in value] if isinstance(value, dict) else []
    for path in paths:
        for wrong in ("yes", {"a": 1}, [1], 1.5j):
            good = description[path[0]] if len(path) == 1 else description[path[0]][path[1]]
            wrong = 1.5 if wrong == 1.5j else wrong
            fits = isinstance(good, float) and wrong == 1.5
            numbers = (("calibration", "uncalibrated"), ("calibration", "set_nll"))
            fits = fits or (path in numbers and wrong == [1])
            if fits or path == ("model", "backbone"):
                continue
            if path == ("model", "weights") and wrong == "yes":
                continue
            changed(folder, *path, value=wrong)
            refuses(folder, "config.json")
            (folder / "config.json").write_text(text, encoding="utf-8")
    load_checkpoint(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("labels",), "abcd"),
        (("labels",), ["a", "b", "c", 4]),
        (("labels",), ["a", "b", "c", "c"]),
        (("labels",), []),
        (("source_index",), [0, 1, 2]),
        (("source_index",), [0, 1, 2, 3.0]),
        (("max_labels",), -1),
        (("search", "beam_size"), 17),
        (("search", "beam_size"), True),
        (("search", "order"), "sideways"),
        (("calibration", "threshold"), None),
        (("calibration", "label_thresholds"), [0.5]),
        (("calibration", "label_thresholds"), ["a", "b", "c", "d"]),
        (("calibration", "k"), 0),
        (("calibration", "min_labels"), -1),
        (("calibration", "uncalibrated"), [0, 4]),
        (("calibration", "set_nll"), [2.0, 1.0]),
        (("calibration", "known_mix_weight"), 1.5),
        (("search", "marginal_places"), 65),
        (("model", "score_bias"), "no"),
        (("model", "joint_dim"), 4.0),
        (("model", "hidden_dim"), 10**13),
        (("model", "unheard_of"), 1),
        (("preprocessing", "mean"), [0.5, 0.5]),
        (("preprocessing", "image_size"), 0),
        (("preprocessing", "std"), [0.0, 1.0, 1.0]),
    ],
)
def test_values_that_describe_no_model(folder, path, value):
    changed(folder, *path, value=value)
    assert "does not describe a model" in refuses(folder, "config.json")


def test_another_format(folder):
    for other in (7, 0):
        changed(folder, "format", value=other)
        assert f"has format {other}, this release reads 1 to 6; upgrade cnnrnn" in refuses(
            folder, "config.json"
        )


def test_format_1_has_a_tied_embedding(tmp_path):
    model = make_model(replace(CONFIG, tied_embedding=True), feature_dim=7)
    folder = tmp_path / "model"
    model.save(folder)
    changed(folder, "model", "tied_embedding", remove=True)
    assert "tied_embedding" in refuses(folder, "config.json")  # of format 2
    changed(folder, "format", value=1)
    loaded = load_checkpoint(folder)
    assert loaded.config.tied_embedding and loaded.head.input_embedding is None
    features = torch.randn(3, 7)
    assert [p.paths for p in loaded.predict_features(features)] == [
        p.paths for p in model.predict_features(features)
    ]
    loaded.save(folder)  # as format 2
    assert load_checkpoint(folder).config == model.config


def test_format_5_decodes_at_full_size(tmp_path):
    model = make_model(CONFIG)
    assert model.backbone.preprocessing.jpeg_draft
    folder = tmp_path / "model"
    model.save(folder)
    changed(folder, "preprocessing", "jpeg_draft", remove=True)
    assert "jpeg_draft" in refuses(folder, "config.json")  # of format 6
    changed(folder, "format", value=5)
    assert not load_checkpoint(folder).backbone.preprocessing.jpeg_draft


def test_format_2_lacks_what_is_of_known_labels(tmp_path):
    model = make_model(CONFIG, feature_dim=7)
    folder = tmp_path / "model"
    model.save(folder)
    added = {"search": ("marginal_places", "algorithm", "max_expansions"),
             "calibration": ("known_mix_weight", "set_nll")}  # fmt: skip
    for part, names in added.items():
        for name in names:
            changed(folder, part, name, remove=True)
    assert "marginal_places" in refuses(folder, "config.json")  # of format 3
    changed(folder, "format", value=2)
    loaded = load_checkpoint(folder)
    assert (loaded.search, loaded.calibration) == (model.search, model.calibration)


def test_weights_of_the_other_kind_of_embedding_are_refused(tmp_path):
    for tied in (False, True):
        folder = tmp_path / str(tied)
        make_model(replace(CONFIG, tied_embedding=tied), feature_dim=7).save(folder)
        changed(folder, "model", "tied_embedding", value=not tied)
        assert "input_embedding" in refuses(folder, "model.safetensors")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "hidden_dim"), 65_536, r"weight must be F32 [4, 65536], got F32 [4, 6]"),
        (("model", "joint_dim"), 65_536, "must be F32 [65536], got F32 [4]"),
        (("model", "trunk_dim"), 65_536, "must be F32"),
        (("feature_dim",), 10**9, "feature_dim must be 256, as backbone 'small' gives"),
        (("feature_dim",), 2**62, "does not describe a model: Storage size"),
        (("preprocessing", "image_size"), 60_000, "image_size must be in 1..4096, got 60000"),
        (("max_labels",), 10**12, "max_labels must be in 0..65536"),
        (("search", "max_labels"), 10**12, "max_labels must be in 0..65536"),
        (("search", "min_labels"), 4, "must not exceed max_labels (3)"),
        (("calibration", "threshold"), float("nan"), "numbers must be finite, got NaN"),
        (("calibration", "set_nll"), [1e999], "numbers must be finite, got Infinity"),
        (("calibration", "k"), 10**30, "calibration.k must be less than 2^63"),
        (("calibration", "min_labels"), 5, "calibration.min_labels must be in 0..4"),
        (("labels",), ["a", "b", "c", "\ud800"], "labels must have a name that is valid text"),
        (("labels",), ["a", "b", "c", "d\n"], "without control characters"),
        (("labels",), ["a", "b", "c", ""], "labels must have a non-empty string as name"),
        (("labels",), [f"{i}" for i in range(10**6)], "must be a permutation of 1000000"),
        (("labels",), "x" * 10**7, "labels must be list"),
    ],
    ids=range(18),
)
def test_sizes_that_the_file_does_not_hold_take_no_memory(folder, path, value, message):
    """5 GB and 40 s, where modules of that size were made first."""
    changed(folder, *path, value=value)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10
    assert str(folder) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "vit_tiny_patch16_224", "arguments": {"depth": 60_000}},
        {"name": "vit_tiny_patch16_224", "arguments": {"embed_dim": 49_152}},
        {"name": "resnet18", "arguments": {"layers": [60_000] * 4}},
        {"name": "resnet18", "arguments": {"layers": [2] * 10_000}},
        {"name": "resnet18", "arguments": {"block": "x"}},
        {"name": "resnet18", "arguments": {"layers": 3}},
        {"name": "resnet18", "arguments": {"in_chans": 4}},
        {"name": "vit_gigantic_patch14_224", "arguments": {}},
    ],
    ids=range(8),
)
def test_networks_that_the_file_does_not_hold(folder, architecture):
    pytest.importorskip("timm")
    changed(folder, "model", "backbone", value="hf-hub:someone/network")
    changed(folder, "architecture", value=architecture)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (load_checkpoint, load_backbone):
        start = time.process_time()
        with pytest.raises(CheckpointError) as error:
            load(folder)
        assert time.process_time() - start < 30
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


def rewritten(folder, change):
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["head.trunk.1.weight", "backbone.network.1.running_var", "head.score_bias"]
)
def test_weights_that_are_not_finite_are_refused_by_name(folder, name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    rewritten(folder, change)
    found = refuses(folder, "model.safetensors")
    assert f"{name} must be finite, got 1 of" in found
    if name.startswith("backbone"):
        with pytest.raises(CheckpointError, match="must be finite"):
            load_backbone(folder)


def test_large_weights_are_finite(folder):
    """Their sum is not."""
    rewritten(folder, lambda tensors: tensors["head.trunk.1.weight"].fill_(3e38))
    assert load_checkpoint(folder).head.trunk[1].weight.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "word"),
    [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float64, "F64"),
     (torch.int32, "I32"), (torch.complex64, "C64")],
)  # fmt: skip
def test_weights_of_another_type_are_refused_by_name(folder, dtype, word):
    name = "head.image_projection.weight"
    rewritten(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    found = refuses(folder, "model.safetensors")
    assert re.search(rf"{name} must be F32 \[4, 264\], got {word} \[4, 264\]", found)


def test_a_model_of_another_type_is_stored_as_float32(tmp_path):
    model = make_model(feature_dim=7)
    for other in (model.double(), model.half()):
        other.save(tmp_path / "model")
        loaded = load_checkpoint(tmp_path / "model")
        for name, value in other.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value.float())


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_weights_that_are_no_file(folder, kind):
    file = folder / "model.safetensors"
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    refuses(folder, "model.safetensors")


def test_config_text_that_json_would_take(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    for changed_text, message in (
        (text.replace('"format"', '"format": 6, "format"'), "keys of an object must be unique"),
        ('{"a":' * 900 + "1" + "}" * 900, "it is not a checkpoint"),
        (text + " " * (1 << 26), "must have at most 67,108,864 bytes, got more"),
    ):
        (folder / "config.json").write_text(changed_text, encoding="utf-8")
        assert message in refuses(folder, "config.json")


def test_a_path_too_long_is_no_checkpoint():
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load_checkpoint(path)


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 5, 8, header // 2, header, (header + len(data)) // 2, len(data) - 1):
        weights.write_bytes(data[:length])
        refuses(folder, "model.safetensors")
    weights.write_bytes(b"\xff" * 8 + data[8:])
    refuses(folder, "model.safetensors")
    weights.unlink()
    refuses(folder, "model.safetensors")


@pytest.mark.parametrize(
    "other",
    [
        {"names": (*NAMES, "horse")},
        {"config": replace(CONFIG, hidden_dim=7)},
        {"config": replace(CONFIG, cell="paper")},
        {"config": replace(CONFIG, chain_term=False)},
        {"feature_dim": 256},
    ],
    ids=["labels", "hidden_dim", "cell", "chain_term", "backbone"],
)
def test_weights_of_another_model(folder, tmp_path, other):
    make_model(**other).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    assert "does not hold the weights of the model" in refuses(folder, "model.safetensors")


def test_a_calibration_of_format_1_allows_empty_sets(folder):
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("min_labels", "uncalibrated"):
        del description["calibration"][name]
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    assert "min_labels, uncalibrated" in refuses(folder, "config.json")
    changed(folder, "format", value=1)
    read = load_checkpoint(folder).calibration
    assert read == Calibration(0.3, 0.25, (0.1, 0.2, 0.3, 0.4), 2)
    assert (read.min_labels, read.uncalibrated) == (0, ())


def test_digest_sees_values_names_shapes_and_types():
    base = weights_digest([("a", torch.ones(2, 3))])
    assert base == weights_digest([("a", torch.ones(3, 2).t())])
    for other in (("b", torch.ones(2, 3)), ("a", torch.ones(3, 2)),
                  ("a", torch.ones(2, 3).int()), ("a", torch.ones(2, 3) + 1e-7)):  # fmt: skip
        assert weights_digest([other]) != base
    assert weights_digest([("a", torch.empty(0)), ("b", torch.tensor(1))])


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cnnrnn import CNNRNN, Head, ModelConfig
from cnnrnn.labels import LabelSpace
config = ModelConfig(backbone="small", trunk_dim=0, joint_dim=8, hidden_dim=8)
model = CNNRNN(config, LabelSpace.given(("a", "b")), Head.from_config(config, 2, 5), None)
while True:
    for value in (1.0, 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save(sys.argv[1])
        print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, pytestconfig):
    # One process imports once and forks a saver per round, so that many kills take seconds.
    count = 40 if pytestconfig.getoption("attacks") else 10
    rounds = """
import os, random, signal, subprocess, sys, time
source = sys.argv[2]
import cnnrnn, torch, safetensors.torch
from cnnrnn import CNNRNN
from cnnrnn.model.classifier import load_checkpoint
torch.set_num_threads(1)
moments = random.Random(0)
for _ in range(int(sys.argv[3])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w")
        exec(source, {"__name__": "saver"})
    os.close(writer)
    os.read(reader, 6)  # the first save is done
    time.sleep(moments.uniform(0, 0.02))
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(reader)
    values = {float(v) for p in load_checkpoint(sys.argv[1]).parameters() for v in p.flatten()}
    assert values in ({1.0}, {2.0}), values
print("whole")
"""
    run = subprocess.run(
        [sys.executable, "-c", rounds, str(tmp_path / "model"), SAVE_FOR_EVER, str(count)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.stdout.strip() == "whole", run.stderr
