"""Weights of image networks from files, and backbones whose names lead elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import time

import numpy as np
import pytest
import torch

from cnnrnn import ModelConfig, SearchConfig, TrainConfig
from cnnrnn.labels import LabelSpace
from cnnrnn.model.checkpoint import CheckpointError
from cnnrnn.model.classifier import CNNRNN, load_backbone, load_checkpoint
from cnnrnn.network import backbones, download
from cnnrnn.network.backbones import DownloadError, make_backbone, small_network
from cnnrnn.network.head import Head
from cnnrnn.network.weights import WeightsError, fitted, load_weights, read_weights
from cnnrnn.training.start import initial_backbone

SMALL = ModelConfig(backbone="small", pretrained=False, image_size=32, trunk_dim=0, joint_dim=8,
                    hidden_dim=8)  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    return small_network()


def other_network():
    torch.manual_seed(1)
    return small_network()


def same(one, two):
    left, right = one.state_dict(), two.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {f"module._orig_mod.{name}": value for name, value in weights.items()},
        lambda weights: {f"model.{name}": value for name, value in weights.items()},
        lambda weights: {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda weights: {"model": weights, "optimizer": {"state": {}}},
        lambda weights: {
            "state_dict": {name: value * 0 for name, value in weights.items()},
            "state_dict_ema": weights,
        },
        lambda weights: {**weights, "fc.weight": torch.zeros(3, 256), "fc.bias": torch.zeros(3)},
    ],
)
def test_what_trainings_write_is_read(network, wrap, tmp_path):
    torch.save(wrap(other_network().state_dict()), tmp_path / "model_best.pth.tar")
    said = load_weights(network, tmp_path / "model_best.pth.tar", "small")
    assert same(network, other_network())
    assert said.startswith("backbone small: all ") and "model_best.pth.tar" in said
    assert ("(fc.weight, fc.bias left out)" in said) == ("left out" in said)


def test_safetensors_are_read(network, tmp_path):
    from safetensors.torch import save_file

    save_file(other_network().state_dict(), tmp_path / "weights.safetensors")
    load_weights(network, tmp_path / "weights.safetensors", "small")
    assert same(network, other_network())


def test_other_names_in_the_same_order_fit(network):
    kinds = other_network().state_dict()
    renamed = {f"stage{i}.{name.rpartition('.')[2]}": value
               for i, (name, value) in enumerate(kinds.items())}  # fmt: skip
    found = fitted(network, renamed | {"head.weight": torch.zeros(5, 5)}, "x")
    network.load_state_dict(found.tensors, strict=False)
    assert same(network, other_network()) and found.left_out == ("head.weight",)
    names = list(renamed)
    swapped = [names.index(name) for name in ("stage1.weight", "stage2.bias")]
    names[swapped[0]], names[swapped[1]] = names[swapped[1]], names[swapped[0]]
    with pytest.raises(WeightsError, match="0 of 40 tensors fit"):  # equal shapes, other parts
        fitted(network, {name: renamed[name] for name in names}, "x")


def test_torchvision_names_fit_timm():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    source = torchvision.models.resnet18(weights=None).eval()
    network = timm.create_model("resnet18", num_classes=0).eval()
    found = fitted(network, source.state_dict(), "x")
    network.load_state_dict(found.tensors, strict=False)
    assert found.left_out == ("fc.weight", "fc.bias")
    source.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), source(images), atol=1e-5, rtol=1e-4)
    vgg = torchvision.models.vgg11(weights=None).state_dict()  # renamed by timm's own function
    converted = fitted(timm.create_model("vgg11", num_classes=0), vgg, "x").tensors
    assert converted["pre_logits.fc1.weight"].shape == (4096, 512, 7, 7)


def test_a_poor_fit_is_refused_with_the_first_mismatches(network, tmp_path):
    weights = other_network().state_dict()
    weights["0.weight"] = torch.zeros(16, 1, 3, 3)
    del weights["1.bias"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        load_weights(network, tmp_path / "w.pth", "small")
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'w.pth'} must hold the weights of small: 38 of 40 tensors")
    assert "0.weight [16, 3, 3, 3] is [16, 1, 3, 3]; 1.bias [16] is missing" in text
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w["1.running_var"].fill_(torch.nan),
            "1.running_var must be finite, got 16",
        ),
        (
            lambda w: w["0.weight"].view(-1)[5:7].fill_(torch.inf),
            "0.weight must be finite, got 2",
        ),
        (
            lambda w: w.update({"1.bias": torch.full((16,), 1e300, dtype=torch.float64)}),
            "got 16 of",
        ),
        (lambda w: w.update({"1.bias": torch.zeros(16, dtype=torch.int32)}), "got torch.int32"),
        (lambda w: w.update({"1.bias": torch.zeros(16, dtype=torch.complex64)}), "got torch.compl"),
        (lambda w: w.update({"1.bias": torch.zeros(16).to_sparse()}), "plain tensors"),
        (lambda w: w.update({"1.bias": torch.zeros(16, device="meta")}), "plain tensors"),
    ],
    ids=range(7),
)
def test_weights_that_are_no_numbers_are_refused_by_name(network, tmp_path, change, message):
    weights = other_network().state_dict()
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(network, tmp_path / "w.pth", "small")
    assert str(tmp_path / "w.pth") in str(error.value) and message in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_weights_fit(network, tmp_path, dtype):
    source = other_network().to(dtype)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(network, tmp_path / "w.pth", "small")
    assert torch.equal(network.state_dict()["0.weight"], source.state_dict()["0.weight"].float())


def test_broken_files_are_refused_whatever_is_broken(tmp_path):
    generator = np.random.default_rng(0)
    weights = {"a.weight": torch.randn(4, 4), "a.bias": torch.zeros(4)}
    forms = []
    for zipped in (True, False):
        torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        forms.append((tmp_path / "w.pth").read_bytes())
    refused = 0
    for number in range(300):
        broken = bytearray(forms[number % 2])
        for position in generator.integers(0, len(broken), 1 + number % 8):
            broken[position] = generator.integers(256)
        if number % 3 == 0:
            del broken[generator.integers(len(broken)) :]
        (tmp_path / "w.pth").write_bytes(broken)
        try:
            read_weights(tmp_path / "w.pth")
        except WeightsError:
            refused += 1
    assert refused > 100  # others are broken in a number alone


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(os.urandom(500))
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(os.urandom(500))
    for name in ("evil.pth", "noise.pth", "empty.pth", "noise.safetensors", "none.pth"):
        with pytest.raises(WeightsError, match=f"{name} must be a"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "made").exists()
    for value, found in ([1, 2], "list"), ({}, "dict"), ({"a": 1}, "int for 'a'"):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=f"must hold a state dict.*{found}"):
            read_weights(tmp_path / "other.pth")


def test_options_name_files(tmp_path):
    file = tmp_path / "small.pth"
    torch.save(other_network().state_dict(), file)
    by_option = make_backbone(ModelConfig(backbone="small", weights=str(file)))
    assert same(by_option.network, other_network()) and str(file) in by_option.origin
    started = initial_backbone(SMALL, TrainConfig(init_backbone=str(file)))
    assert same(started.network, other_network()) and started.preprocessing.image_size == 32


def saved_model(folder, backbone, config):
    head = Head.from_config(config, 3, backbone.feature_dim)
    model = CNNRNN(config, LabelSpace.given(("a", "b", "c")), head, backbone, SearchConfig())
    model.save(folder)
    return model


def test_a_checkpoints_head_is_not_read(tmp_path):
    from safetensors.torch import load_file, save_file

    model = saved_model(tmp_path / "model", make_backbone(SMALL), SMALL)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    save_file(kept, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "model")
    assert same(load_backbone(tmp_path / "model"), model.backbone)
    started = initial_backbone(SMALL, TrainConfig(init_backbone=str(tmp_path / "model")))
    assert same(started, model.backbone) and "from" in started.origin
    save_file({"backbone.x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match="it lacks backbone.network.0.weight"):
        load_backbone(tmp_path / "model")


def timm_folder(folder):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    torch.manual_seed(2)
    network = timm.create_model("test_vit", num_classes=7, img_size=64)
    save_for_hf(network, folder, model_args={"img_size": 64})
    return network


def test_a_folder_of_timm_and_its_checkpoint_without_it(tmp_path):
    network = timm_folder(tmp_path / "vit")
    name = f"local-dir:{tmp_path / 'vit'}"
    config = ModelConfig(backbone=name, trunk_dim=0, joint_dim=8, hidden_dim=8)
    backbone = make_backbone(config).eval()
    weights = backbone.network.state_dict()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in weights.items())
    assert backbone.architecture.name == "test_vit"
    assert list(backbone.architecture.arguments["img_size"]) == [64, 64]
    model = saved_model(tmp_path / "model", backbone, config).eval()
    shutil.rmtree(tmp_path / "vit")
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.config.backbone == name and loaded.backbone.architecture == backbone.architecture
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.features(images), model.features(images))
    with pytest.raises(ValueError, match="must be a folder of timm's"):
        make_backbone(config)


def test_arguments_that_are_not_the_networks_own_are_refused(tmp_path):
    timm_folder(tmp_path / "vit")
    config = ModelConfig(backbone=f"local-dir:{tmp_path / 'vit'}", trunk_dim=0)
    saved_model(tmp_path / "model", make_backbone(config), config)
    file = tmp_path / "model" / "config.json"
    text = file.read_text()
    for name, value in (("checkpoint_path", "/etc/passwd"), ("pretrained", True),
                        ("pretrained_cfg", {}), ("block_fn", {"a": 1})):  # fmt: skip
        description = json.loads(text)
        description["architecture"]["arguments"][name] = value
        file.write_text(json.dumps(description))
        with pytest.raises(CheckpointError, match=f"must not be built with '{name}'="):
            load_checkpoint(tmp_path / "model")


def test_opening_a_checkpoint_asks_no_hub(tmp_path, monkeypatch):
    timm_folder(tmp_path / "vit")
    config = ModelConfig(backbone=f"local-dir:{tmp_path / 'vit'}", trunk_dim=0)
    saved_model(tmp_path / "model", make_backbone(config), config)
    monkeypatch.setattr(backbones, "_created", lambda *args: pytest.fail("timm was asked"))
    load_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    text = file.read_text()
    for changes, message in (
        ({"architecture": None}, "must come with an architecture"),
        ({"architecture": {"name": "hf-hub:a/b", "arguments": {}}}, "the name of a timm model"),
        ({"architecture": {"name": "local-dir:/x", "arguments": {}}}, "the name of a timm model"),
    ):
        file.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "model")


def test_a_missing_download_fails_at_once_and_says_what_else_there_is(monkeypatch):
    pytest.importorskip("timm")
    asked = []
    monkeypatch.setattr(backbones, "is_reachable", lambda address: asked.append(address))
    monkeypatch.setattr(backbones, "_is_kept", lambda repository: False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    for name, others in (
        ("resnet18", ("--model.weights FILE", "--model.pretrained false")),
        ("resnet50.a1_in1k", ("--model.weights FILE", "--model.pretrained false")),
        ("hf-hub:timm/resnet18.a1_in1k", ("local-dir:FOLDER",)),
    ):
        with pytest.raises(DownloadError) as error:
            make_backbone(ModelConfig(backbone=name))
        text = str(error.value)
        assert f"backbone {name} cannot be downloaded" in text and "--init_backbone" in text
        assert all(other in text for other in others) and "hub.example does not answer" in text
    assert asked == ["https://hub.example"] * 3
    make_backbone(ModelConfig(backbone="resnet18", pretrained=False, image_size=32))
    assert len(asked) == 3


def test_hosts_are_asked_for_seconds_only(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert download.is_reachable(f"http://127.0.0.1:{port}/path")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert download.is_reachable("https://nowhere.invalid")  # the proxy answers
        monkeypatch.delenv("https_proxy")
    began = time.monotonic()
    assert not download.is_reachable(f"http://127.0.0.1:{port}/path")
    assert not download.is_reachable("https://nowhere.invalid", seconds=1.0)
    assert time.monotonic() - began < 5
