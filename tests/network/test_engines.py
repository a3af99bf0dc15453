"""Engines of a backbone: equal features, one export, and the choice that `auto` makes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cnnrnn
from cnnrnn import Dataset, Ensemble, ModelConfig, Preprocessing
from cnnrnn.cli import main
from cnnrnn.machine import cache as cache_module
from cnnrnn.machine.cache import Cache, CacheUse
from cnnrnn.machine.devices import has_bf16
from cnnrnn.network import engines
from cnnrnn.network.backbones import Backbone, make_backbone
from cnnrnn.network.engines import BackboneRunner, EngineError
from cnnrnn.network.features import compute_features
from tests.prediction.test_predict import SIDE, make_model

pytest.importorskip("onnxscript")
CPU = torch.device("cpu")
ENGINES = [
    pytest.param("onnx", marks=pytest.mark.skipif(
        not engines._is_installed("onnx"), reason="no ONNX Runtime")),
    pytest.param("openvino", marks=pytest.mark.skipif(
        not engines._is_installed("openvino"), reason="no OpenVINO")),
]  # fmt: skip


def pictures(count, side=SIDE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def tensors(count, side=SIDE, seed=0):
    return [torch.from_numpy(p).permute(2, 0, 1).contiguous() for p in pictures(count, side, seed)]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNRNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backbones"


@pytest.fixture
def model():
    return made()


def made():
    return make_model().eval()


@pytest.fixture
def exports(monkeypatch):
    """The backbones that were exported, by name."""
    found = []
    export = BackboneRunner._export

    def counted(self, folder):
        found.append(self._backbone.name)
        return export(self, folder)

    monkeypatch.setattr(BackboneRunner, "_export", counted)
    return found


def runner(model, **options):
    return BackboneRunner(model.backbone, CPU, **options)


def said(caplog):
    """What the engines logged; torch logs what it traces."""
    return [r.getMessage() for r in caplog.records if r.name == engines.__name__]


# Equal features


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "side"), [("small", 24), ("test_resnet.r160_in1k", 64),
                                            ("test_vit.r160_in1k", 160)])  # fmt: skip
def test_an_engine_gives_the_features_of_torch(engine, name, side):
    torch.manual_seed(0)
    config = ModelConfig(backbone=name, pretrained=False, image_size=side)
    backbone = make_backbone(config).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that would show if they were left out
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    run, expected = (BackboneRunner(backbone, CPU, backend=b) for b in (engine, "torch"))
    run.prepare(None)
    assert (run.engine, expected.engine) == (engine, "torch")
    for count in (1, 3, 8):
        images = tensors(count, side)
        found = run(images)
        assert (found.dtype, found.shape) == (torch.float32, (count, backbone.feature_dim))
        torch.testing.assert_close(found, expected(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workers", [0, 2])
def test_predict_finds_the_same_sets(model, engine, workers):
    images = pictures(70)
    expected = model.predict(images, backend="torch", batch_size=16)
    found = model.predict(images, backend=engine, batch_size=16, workers=workers)
    assert [p.labels for p in found] == [p.labels for p in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-4)


@pytest.mark.skipif(not engines._is_installed("openvino"), reason="no OpenVINO")
def test_openvino_in_bf16_is_close_and_not_the_same(model):
    if not has_bf16(CPU):
        pytest.skip("this processor has no bfloat16")
    images = tensors(8)
    exact, half = runner(model, backend="torch"), runner(model, backend="openvino",
                                                         precision="bf16")  # fmt: skip
    half.prepare(None)
    difference = (half(images) - exact(images)).abs().max()
    assert 0 < difference < 0.05 * exact(images).abs().max()


@pytest.mark.parametrize("engine", ENGINES)
def test_float_images_go_through_torch(model, engine):
    run = runner(model, backend=engine)
    run.prepare(None)
    images = [image.float() / 255 for image in tensors(3)]
    torch.testing.assert_close(run(images), runner(model, backend="torch")(images), rtol=0, atol=0)
    mixed = [*tensors(2), *images]
    torch.testing.assert_close(run(mixed), runner(model, backend="torch")(mixed), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_caller_in_inference_mode(engine, empty_cache):
    images = pictures(5)
    with torch.inference_mode():
        inside = made()
        expected = [p.labels for p in inside.predict(images, backend="torch")]
        assert [p.labels for p in inside.predict(images, backend=engine)] == expected
        assert [p.labels for p in made().predict(images, backend=engine)] == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_share_an_engine(model, engine):
    run, exact = runner(model, backend=engine), runner(model, backend="torch")
    run.prepare(None)
    batches = [tensors(5, seed=seed) for seed in range(8)]
    found = [None] * len(batches)

    def work(place):
        for i in range(place, len(batches), 4):
            found[i] = run(batches[i])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, features in zip(batches, found, strict=True):
        torch.testing.assert_close(features, exact(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_feature_extraction_ensembles_and_load(model, engine, tmp_path):
    labels = [["sky"], ["sea", "boat"], [], ["cow"]]
    data = Dataset(images=[Image.fromarray(p) for p in pictures(4)], labels=labels)
    exact = cnnrnn.evaluate(data, model, backend="torch").inference.marginals
    found = cnnrnn.evaluate(data, model, backend=engine).inference.marginals
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    features = [
        compute_features(model.backbone, data, device=CPU, backend=backend).values
        for backend in ("torch", engine)
    ]
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)
    both = Ensemble([model, made()])
    both.save(tmp_path / "both")
    loaded = cnnrnn.load(tmp_path / "both", backend=engine)
    assert loaded.backend == engine
    assert "backend" not in (tmp_path / "both" / "config.json").read_text()
    expected = [p.labels for p in both.predict(pictures(20), backend="torch")]
    assert [p.labels for p in loaded.predict(pictures(20))] == expected


# One export


@pytest.mark.parametrize("engine", ENGINES)
def test_a_backbone_is_exported_once_and_said(model, engine, empty_cache, exports, caplog):
    model.predict(pictures(3), backend=engine)
    first, second = said(caplog)
    assert first.startswith("backbone small is exported for")
    assert str(empty_cache) in first
    assert second.startswith("exported in ")
    caplog.clear()
    model.predict(pictures(3), backend=engine)
    made().predict(pictures(3), backend=engine)  # the same weights
    assert (exports, said(caplog)) == (["small"], [])
    about = json.loads(next(empty_cache.glob("*/about.json")).read_text())
    assert (about["backbone"], about["image_size"]) == ("small", SIDE)
    assert Cache("backbones").use().entries == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_changed_weights_are_exported_again(model, engine, empty_cache, exports):
    images = tensors(4)
    run = runner(model, backend=engine)
    run.prepare(None)
    before = run(images)
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(2)
    run = runner(model, backend=engine)
    run.prepare(None)
    assert len(exports) == 2
    torch.testing.assert_close(run(images), runner(model, backend="torch")(images),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert (run(images) - before).abs().max() > 0.01


def scale_through_data(backbone):
    backbone.eval().train()
    for parameter in backbone.parameters():
        parameter.data.mul_(1.3)
    backbone.train().eval()


def leak(backbone):
    for module in backbone.network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU(0.5))


def shift(backbone):
    mean, std = (0.2, 0.3, 0.4), (0.7, 0.8, 0.9)
    backbone.preprocessing = replace(backbone.preprocessing, mean=mean, std=std)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [scale_through_data, leak, shift])
def test_a_model_that_computes_something_else_is_another_export(
    model, engine, change, empty_cache, exports
):
    images = tensors(4)
    run = runner(model, backend=engine)
    run.prepare(None)
    before = run(images)
    change(model.backbone)
    run, exact = runner(model, backend=engine), runner(model, backend="torch")
    run.prepare(None)
    torch.testing.assert_close(run(images), exact(images), rtol=1e-4, atol=1e-5)
    assert (run(images) - before).abs().max() > 0.01
    assert len(exports) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_changed_in_inference_mode_are_exported_again(engine, empty_cache):
    images = tensors(4)
    with torch.inference_mode():
        model = made()
        for factor in (1.0, 1.2):
            for parameter in model.backbone.parameters():
                parameter.mul_(factor)
            run, exact = runner(model, backend=engine), runner(model, backend="torch")
            run.prepare(None)
            torch.testing.assert_close(run(images), exact(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "about"])
def test_a_damaged_file_is_exported_again(model, empty_cache, exports, how):
    model.predict(pictures(2), backend="onnx")
    file = next(empty_cache.glob("*/backbone.onnx"))
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:-100])
    elif how == "gone":
        file.unlink()
    else:
        file.with_name("about.json").write_text("{")
    expected = [p.labels for p in model.predict(pictures(9), backend="torch")]
    found = made().predict(pictures(9), backend="onnx")
    assert [p.labels for p in found] == expected
    assert len(exports) == 2


def test_a_cache_that_cannot_be_written_does_not_stop_anything(
    model, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNNRNN_CACHE", str(tmp_path / "file"))
    expected = [p.labels for p in model.predict(pictures(9), backend="torch")]
    assert [p.labels for p in model.predict(pictures(9), backend="onnx")] == expected
    assert any("cannot be written" in message for message in said(caplog))
    assert [p.labels for p in model.predict(pictures(9), backend="openvino")] == expected
    other = make_model(feature_dim=3)
    other.backbone = Backbone("own", Branches(), Preprocessing(SIDE)).eval()
    for _ in range(2):
        with pytest.raises(EngineError, match="backbone own cannot be exported for ONNX Runtime: "):
            other.predict(pictures(2), backend="onnx")
    eager(monkeypatch, {"torch": 2.0, "onnx": 1.0, "openvino": 1.0})
    assert len(other.predict(pictures(100))) == 100


def test_a_cache_that_may_only_be_read_is_used(model, empty_cache, exports, monkeypatch):
    model.predict(pictures(2), backend="onnx")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module.os, "utime", refuse)
    made().predict(pictures(2), backend="onnx")
    assert exports == ["small"]
    entry = next(empty_cache.iterdir())
    assert entry.stat().st_mode & 0o077 == 0o777 & ~umask() & 0o077


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_an_open_engine_outlives_its_file(empty_cache, monkeypatch):
    """The share of a thread in a pool is opened when the file may be gone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for engine in ("onnx", "openvino"):
            model = made()
            expected = [p.labels for p in model.predict(pictures(9), backend="torch")]
            model.predict(pictures(2), backend=engine, workers=0)
            shutil.rmtree(empty_cache)
            found = model.predict(pictures(9), backend=engine, workers=2)
            assert [p.labels for p in found] == expected
    finally:
        torch.set_num_threads(threads)


FORKED_WITHOUT_CACHE = """
import os, sys, warnings
import numpy as np
import cnnrnn
from cnnrnn.network import engines
warnings.simplefilter("ignore")
model = cnnrnn.load(backend="onnx")
images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
model.predict(images)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
(known,) = engines._all_known.values()
print(known.folder, known.folder.is_dir())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_leaves_its_parents_file(tmp_path):
    (tmp_path / "file").touch()
    run = subprocess.run([sys.executable, "-c", FORKED_WITHOUT_CACHE], capture_output=True,
                         text=True, timeout=240, env=os.environ
                         | {"CNNRNN_CACHE": str(tmp_path / "file")})  # fmt: skip
    folder, _, there = run.stdout.strip().rpartition(" ")
    assert there == "True", run.stderr
    assert not Path(folder).exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_has_its_turn_while_others_predict(engine, empty_cache):
    others = [made() for _ in range(3)]
    going = threading.Event()
    going.set()

    def work(model):
        while going.is_set():
            model.predict(pictures(2), backend="torch", workers=0)

    threads = [threading.Thread(target=work, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    done = threading.Event()

    def export():
        made().predict(pictures(2), backend=engine)
        done.set()

    exporting = threading.Thread(target=export)
    exporting.start()
    ended = done.wait(120)
    going.clear()
    for thread in (*threads, exporting):
        thread.join()
    assert ended


def test_what_holds_an_engine_can_be_copied_and_saved(model, tmp_path):
    model.predict(pictures(2), backend="onnx")
    expected = [p.labels for p in model.predict(pictures(9))]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [p.labels for p in other.predict(pictures(9), backend="onnx")] == expected
    model.save(tmp_path / "saved")


FORKED = """
import os, sys, warnings
import numpy as np, torch
import cnnrnn
warnings.simplefilter("ignore")
torch.set_num_threads(2)
model = cnnrnn.load(backend=sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
expected = [p.labels for p in model.predict(images)]
child = os.fork()
if child == 0:
    os._exit(0 if [p.labels for p in model.predict(images)] == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_process_opens_its_own(engine):
    run = subprocess.run([sys.executable, "-c", FORKED, engine], capture_output=True, text=True,
                         timeout=240)  # fmt: skip
    assert run.returncode == 0, run.stderr


# What auto does


def eager(monkeypatch, seconds):
    """Let `auto` export for any run, and find these times per pass."""
    monkeypatch.setattr(engines, "EXPORT_REPAYS_SECONDS", 0.0)
    monkeypatch.setattr(engines, "OPENING_REPAYS_SECONDS", 0.0)
    monkeypatch.setattr(engines, "FEWEST_IMAGES", 1)

    def timed(run):
        run()
        return seconds[getattr(getattr(run, "func", run), "name", "torch")]

    monkeypatch.setattr(engines, "_seconds", timed)


def after_a_batch(model, count):
    """The engine of a call of so many images, after its first batch."""
    run = runner(model)
    run.prepare(count)
    run(tensors(8))
    return run.engine


def test_few_images_stay_in_torch(model, empty_cache, exports):
    assert after_a_batch(model, 63) == "torch"
    assert after_a_batch(model, 400) == "torch"  # a tenth of a second
    assert (exports, Cache("backbones").use()) == ([], CacheUse(0, 0))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fastest_is_taken_and_remembered(model, engine, empty_cache, exports, monkeypatch):
    other = "openvino" if engine == "onnx" else "onnx"
    eager(monkeypatch, {"torch": 2.0, engine: 1.0, other: 3.0})
    assert after_a_batch(model, 100) == engine
    assert exports == ["small"]
    about = json.loads(next(empty_cache.glob("*/about.json")).read_text())
    (times,) = about["seconds per image"].values()
    assert min(times, key=times.get) == engine
    eager(monkeypatch, {"torch": 0.0, engine: 1.0, other: 1.0})
    again = runner(made())
    again.prepare(100)
    assert again.engine == engine  # as it was found, without another race
    assert after_a_batch(model, 1) == engine  # it is open


def test_torch_is_taken_where_it_is_fastest(model, empty_cache, monkeypatch):
    eager(monkeypatch, {"torch": 1.0, "onnx": 1.1, "openvino": 1.2})
    assert after_a_batch(model, 100) == "torch"


def test_what_is_in_the_cache_is_opened_for_less(model, empty_cache, exports, monkeypatch):
    model.predict(pictures(2), backend="onnx")
    assert after_a_batch(made(), 400) == "torch"  # less than a second of work
    eager(monkeypatch, {"torch": 2.0, "onnx": 1.0, "openvino": 3.0})
    monkeypatch.setattr(engines, "EXPORT_REPAYS_SECONDS", 1e9)
    assert after_a_batch(made(), 100) == "onnx"
    assert exports == ["small"]


def test_an_iterator_is_exported_for_once_torch_was_busy_for_long(
    model, empty_cache, exports, monkeypatch
):
    images = pictures(40)
    expected = [p.labels for p in model.predict(images, backend="torch")]
    eager(monkeypatch, {"torch": 2.0, "onnx": 1.0, "openvino": 1.0})
    monkeypatch.setattr(engines, "EXPORT_REPAYS_SECONDS", 1e-6)
    for workers in (None, 2):
        again = made() if workers is None else model
        found = again.predict_iter((i for i in images), batch_size=8, workers=workers)
        assert [p.labels for p in found] == expected
    assert exports == ["small"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_errs_is_not_taken(model, engine, empty_cache, monkeypatch, caplog):
    def wrong(file, threads, bf16):
        return lambda images: torch.ones(len(images), model.backbone.feature_dim)

    monkeypatch.setitem(engines._ENGINES, engine, wrong)
    with pytest.raises(EngineError, match=r"must give the features of torch for backbone small"):
        model.predict(pictures(2), backend=engine)
    other = "openvino" if engine == "onnx" else "onnx"
    eager(monkeypatch, {"torch": 1.0, engine: 0.0, other: 2.0})
    assert after_a_batch(made(), 100) == "torch"
    assert any("must give the features of torch" in message for message in said(caplog))


class Branches(nn.Module):
    """Takes a way that depends on its input, which no export can follow."""

    def forward(self, x):
        if x.sum() > 0:
            return x.mean((2, 3))
        return x.amax((2, 3))


def test_a_backbone_that_cannot_be_exported(empty_cache, monkeypatch, caplog):
    model = make_model(feature_dim=3)
    model.backbone = Backbone("own", Branches(), Preprocessing(SIDE)).eval()
    with pytest.raises(EngineError, match="backbone own cannot be exported for ONNX Runtime: "):
        model.predict(pictures(2), backend="onnx")
    eager(monkeypatch, {"torch": 2.0, "onnx": 1.0, "openvino": 1.0})
    with caplog.at_level(logging.WARNING):
        assert len(model.predict(pictures(100))) == 100
    assert any("cannot be exported" in message for message in said(caplog))


def test_options_that_do_not_fit(model, monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, torch, onnx, openvino, got"):
        model.predict(pictures(1), backend="tensorrt")
    with pytest.raises(ValueError, match="backend must be one of"):
        cnnrnn.load(backend="tensorrt")
    with pytest.raises(ValueError, match="backend onnx multiplies in fp32, got precision bf16"):
        model.predict(pictures(1), backend="onnx", precision="bf16")
    with pytest.raises(ValueError, match="compiled is of torch, got backend openvino"):
        model.predict(pictures(1), backend="openvino", compiled=True)
    with pytest.raises(ValueError, match="backend onnx runs on a CPU, got device cuda"):
        BackboneRunner(model.backbone, torch.device("cuda"), backend="onnx")
    monkeypatch.setattr(engines, "_is_installed", lambda engine: False)
    with pytest.raises(ModuleNotFoundError, match=r'needs openvino.*"cnnrnn\[openvino\]"'):
        model.predict(pictures(1), backend="openvino")
    run = runner(model)
    run.prepare(10**9)
    assert run.engine == "torch"


def test_the_command_line(tmp_path, capsys, model):
    model.save(tmp_path / "model")
    for i, picture in enumerate(pictures(3)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    answers = []
    for backend in ("torch", "onnx"):
        options = ["--format", "csv", "--model", str(tmp_path / "model"), "--backend", backend]
        assert main(["predict", *(str(tmp_path / f"{i}.png") for i in range(3)), *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    main(["check"])  # its status is of the whole installation
    assert "exported backbones: " in capsys.readouterr().out


# The cache


def write(size):
    def fill(folder):
        (folder / "data").write_bytes(b"x" * size)
        return {"size": size}

    return fill


def test_the_least_recently_used_are_evicted(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNRNN_CACHE", str(tmp_path))
    monkeypatch.setenv("CNNRNN_CACHE_GB", str(3.5 * 2**-10))  # 3.5 MB
    cache = Cache("things")
    for number, key in enumerate("abc"):
        cache.keep(key, write(2**20))
        os.utime(cache.folder / key / "about.json", (number, number))
    assert cache.find("a") is not None  # used again
    cache.keep("d", write(2**20))
    assert [cache.find(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.keep("e", write(2**23))  # larger than the bound: it alone is kept
    assert [cache.has(key) for key in "abcde"] == [False] * 4 + [True]
    assert cache.known("e")["size"] == 2**23
    cache.note("e", {"more": 1})
    assert (cache.known("e")["size"], cache.known("e")["more"]) == (2**23, 1)
    cache.note("gone", {"more": 1})
    assert cache.known("gone") == {}


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNRNN_CACHE", str(tmp_path))
    cache = Cache("things")
    for name, age in ((".partial-old", 2e5), (".partial-new", 0)):
        (cache.folder / name).mkdir(parents=True)
        now = cache_module.time.time() - age
        os.utime(cache.folder / name, (now, now))
    cache.keep("a", write(10))
    assert sorted(p.name for p in cache.folder.iterdir()) == [".partial-new", "a"]


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNRNN_CACHE", str(tmp_path))
    cache = Cache("things")

    def fail(folder):
        (folder / "data").write_bytes(b"x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.keep("a", fail)
    assert list(cache.folder.iterdir()) == []


def test_a_bound_that_is_no_number(monkeypatch):
    monkeypatch.setenv("CNNRNN_CACHE_GB", "many")
    with pytest.raises(ValueError, match="CNNRNN_CACHE_GB must be a number of gigabytes"):
        cache_module.cache_bound()
