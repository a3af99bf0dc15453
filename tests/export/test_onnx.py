"""Exported files: what is in them, and that ONNX Runtime gives the reference's answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import cnnrnn
from cnnrnn import OnnxModelError, OnnxPredictor, SearchConfig, export_onnx
from cnnrnn.api import DEMO_MODEL
from cnnrnn.config import DECISIONS, Calibration
from cnnrnn.data.images import normalize
from cnnrnn.export import onnx as onnx_module
from cnnrnn.network import onnx_files
from cnnrnn.network.head import ImageEmbedding
from tests.export.models import HEADS, F, L, by_reference, head_model, picture_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BATCHES = (0, 1, 2, 7, 65)


@pytest.fixture(scope="module")
def exported(head_file):
    """A function that opens the file of a model of `HEADS`."""

    def open_exported(name, search="onnx"):
        return OnnxPredictor(head_file(name), search=search, threads=1)

    return open_exported


def assert_same(found, expected):
    assert torch.equal(found["labels"], expected.labels)
    assert torch.equal(found["lengths"], expected.lengths)
    options = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(found["log_probs"], expected.log_probs, **options)
    torch.testing.assert_close(found["marginals"], expected.marginals(), **options)
    torch.testing.assert_close(found["log_evidence"], expected.log_evidence, **options)


@pytest.mark.parametrize("name", HEADS)
def test_the_reference_and_both_searches_agree(exported, name):
    model, whole, compiled = HEADS[name], exported(name), exported(name, "compiled")
    generator = torch.Generator().manual_seed(0)  # of others some paths tie but for rounding
    for batch in BATCHES:
        features = torch.randn(batch, F, generator=generator)
        expected = by_reference(model, features)
        found = whole.run(features)
        assert_same(found, expected)
        inference = compiled.infer(features)
        assert torch.equal(inference.search[0].labels, expected.labels)
        torch.testing.assert_close(inference.marginals, found["marginals"], rtol=1e-5, atol=1e-5)
        mixed = model.infer(features).mixed(0.25)
        torch.testing.assert_close(found["scores"], mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_nan_touches_no_other_image_and_is_reported(exported, name):
    model, whole = HEADS[name], exported(name)
    features = torch.randn(9, F)
    features[4, 2] = torch.nan
    assert_same(whole.run(features), by_reference(model, features))
    for predictor in (whole, exported(name, "compiled")):
        with pytest.raises(cnnrnn.NonFiniteError) as error:
            predictor.predict_features(features)
        assert error.value.images == [4]


def test_at_least_so_many_labels(exported):
    name = "increasing"
    model, whole = HEADS[name], exported(name)
    features = torch.randn(7, F)
    for least in (0, 1, 3):
        assert_same(
            whole.run(features, min_labels=least), by_reference(model, features, min_labels=least)
        )
    with pytest.raises(ValueError, match=r"min_labels \(4\) must not exceed max_labels \(3\)"):
        whole.predict_features(features, min_labels=4)


@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "loop"])
def test_ties_go_to_the_lower_path_and_label(tied_file, loop):
    model, file = tied_file(loop)
    features = torch.randn(3, F)
    expected = by_reference(model, features)
    found = OnnxPredictor(file, threads=1).run(features)
    assert torch.equal(found["labels"], expected.labels)
    assert expected.labels[0, :, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 0]


def test_the_demo_model_gives_the_labels_of_torch(demo_file):
    model = cnnrnn.load(DEMO_MODEL)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (65, 64, 64, 3), dtype=np.uint8)
    expected = model.predict(pictures)
    for search in ("onnx", "compiled"):
        predictor = OnnxPredictor(demo_file, search=search, threads=1)
        assert predictor.predict([]) == []
        for decide in ("path", "threshold"):
            found = predictor.predict(pictures, decide=decide)
            theirs = expected if decide == "path" else model.predict(pictures, decide=decide)
            assert [p.labels for p in found] == [p.labels for p in theirs]
        for mine, theirs in zip(predictor.predict(pictures), expected, strict=True):
            assert mine.log_prob == pytest.approx(theirs.log_prob, abs=2e-4)
            assert mine.scores == pytest.approx(theirs.scores, abs=2e-4)
            assert [labels for labels, _ in mine.paths[:2]] == [
                labels for labels, _ in theirs.paths[:2]
            ]


# Files


def test_a_file_is_checked_complete_and_describes_itself(pictures_file):
    proto = onnx.load(pictures_file)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    assert proto.ir_version == 10
    beside = pictures_file.with_name(f"{pictures_file.stem}.labels.json")
    assert sorted(pictures_file.parent.iterdir()) == sorted([pictures_file, beside])
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {
        "images": ["batch", 16, 16, 3],
        "min_labels": [],
        "evidence": ["rows", L],
        "labels": ["batch", 4, 3],
        "lengths": ["batch", 4],
        "log_probs": ["batch", 4],
        "marginals": ["batch", L],
        "log_evidence": ["batch"],
        "scores": ["batch", L],
        "joint": ["batch", 8],
        "label_scores": ["batch", L],
    }
    model = picture_model()
    assert b"graph.py" not in proto.SerializeToString()  # no traces of the exporter's machine
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    assert json.loads(metadata["labels"]) == list(model.labels)
    assert json.loads(metadata["preprocessing"])["image_size"] == 16
    lists = {"label_thresholds": [], "uncalibrated": [], "set_nll": []}
    calibration = asdict(model.calibration) | lists
    assert json.loads(metadata["calibration"]) == calibration
    assert json.loads(metadata["search"])["max_labels"] == 3
    assert json.loads(metadata["max_known"]) == 4
    assert len(metadata["content_hash"]) == 64
    described = json.loads(beside.read_text(encoding="utf-8"))
    assert described.pop("content_hash") == metadata["content_hash"]
    assert described == {
        name: json.loads(value)
        for name, value in metadata.items()
        if name not in ("head", "content_hash")
    }
    used = {name for node in proto.graph.node for name in node.input}
    unused = {tensor.name for tensor in proto.graph.initializer} - used
    assert unused <= {"min_labels", "evidence"}


def test_the_label_part_of_the_gates_is_a_table(pictures_file):
    graph = onnx.load(pictures_file).graph
    shapes = {tuple(tensor.dims) for tensor in graph.initializer}
    assert (L + 2, 4 * 8) in shapes  # a row of gates per label
    assert (8, 8 * 4) in shapes or (8 * 4, 8) in shapes  # the recurrent weight
    of_weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    operators = [node.op_type for node in graph.node]
    products = [node for node in graph.node if node.op_type == "MatMul"]
    # Two per step after the first, scores and gates, and one of images and first scores.
    assert len([node for node in products if node.input[1] in of_weights]) < 10
    assert "Loop" not in operators


def test_the_content_hash_is_of_weights_and_options(pictures_file):
    model = head_model(SearchConfig(beam_size=2, max_labels=1))
    search = model.search
    hashes = [
        onnx_module._metadata(model, "features", "float32", False, search, 4)["content_hash"]
        for _ in range(2)
    ]
    with torch.no_grad():
        model.head.label_embedding[0, 0] += 1
    changed = onnx_module._metadata(model, "features", "float32", False, search, 4)
    fewer = onnx_module._metadata(model, "features", "float32", False, search, 3)
    assert hashes[0] == hashes[1]
    assert len({hashes[0], changed["content_hash"], fewer["content_hash"]}) == 3
    metadata = {prop.key: prop.value for prop in onnx.load(pictures_file).metadata_props}
    assert OnnxPredictor(pictures_file).content_hash == metadata["content_hash"]


def test_float16_keeps_the_labels_of_clear_cases(tmp_path, pictures_file):
    export_onnx(picture_model(), tmp_path / "half.onnx", precision="float16")
    pictures = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    whole, half = OnnxPredictor(pictures_file), OnnxPredictor(tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.7 * pictures_file.stat().st_size
    for known in ([], ["label 3"]):
        found, expected = (one.predict(pictures, known=known) for one in (half, whole))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.scores == pytest.approx(theirs.scores, abs=0.02)
            lead = theirs.paths[0][1] - theirs.paths[1][1]
            assert mine.labels == theirs.labels or lead < 0.05


def test_normalised_pictures_of_any_size(tmp_path):
    model = picture_model()
    export_onnx(model, tmp_path / "any.onnx", input_kind="float", dynamic_size=True, loop=True)
    predictor = OnnxPredictor(tmp_path / "any.onnx")
    assert predictor.input_kind == "float"
    for height, width in ((16, 16), (24, 40)):
        images = torch.rand(3, 3, height, width)
        normal = normalize(images, model.backbone.preprocessing)
        with torch.no_grad():
            features = model.features(normal)
        evidence = torch.zeros(3, L, dtype=torch.int8)
        evidence[0, 2], evidence[1, 4] = 1, -1
        for known in (None, evidence):
            found = predictor.run(normal, evidence=known)
            expected = by_reference(model, features, known)
            assert torch.equal(found["labels"], expected.labels)
            torch.testing.assert_close(found["log_probs"], expected.log_probs, rtol=1e-4, atol=1e-4)
    floats = torch.rand(3, 3, 16, 16)
    assert [p.labels for p in predictor.predict(floats)] == [
        p.labels for p in model.predict(floats)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_kind": "uint8"}, "input_kind must be features for a model without a backbone"),
        ({"input_kind": "jpeg"}, "input_kind must be one of uint8, float, features, got 'jpeg'"),
        ({"precision": "int8"}, "precision must be float32 or float16, got 'int8'"),
        ({"dynamic_size": True}, "dynamic_size is of pictures; the input is feature vectors"),
        ({"search": SearchConfig(max_labels=0)}, "max_labels must be at least 1 to export, got 0"),
        ({"max_known": -1}, "max_known must be at least 0, got -1"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(HEADS["increasing"], tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_is_refused(tmp_path):
    ensemble = cnnrnn.Ensemble([HEADS["increasing"], HEADS["increasing"]])
    with pytest.raises(ValueError, match="an ensemble cannot be exported"):
        export_onnx(ensemble, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be an ONNX file of cnnrnn export, found nothing there"),
        (b"", "cannot be opened by ONNX Runtime"),
        (b"no model at all", "cannot be opened by ONNX Runtime"),
    ],
)
def test_what_is_no_model(tmp_path, content, message):
    file = tmp_path / "model.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OnnxModelError, match=message):
        OnnxPredictor(file)
    if content is not None:
        with pytest.raises(OnnxModelError, match="must be an ONNX model of cnnrnn|cannot be open"):
            OnnxPredictor(file, search="compiled")


def test_a_model_that_others_wrote(tmp_path, pictures_file):
    proto = onnx.load(pictures_file)
    spoilt = [prop for prop in proto.metadata_props if prop.key == "calibration"][0]
    spoilt.value = '{"threshold": "high"}'
    onnx.save(proto, tmp_path / "spoilt.onnx")
    with pytest.raises(OnnxModelError, match="must be written by cnnrnn.export_onnx.*calibration"):
        OnnxPredictor(tmp_path / "spoilt.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(OnnxModelError, match="must be written by cnnrnn.export_onnx"):
        OnnxPredictor(tmp_path / "bare.onnx")


def with_metadata(file, changed, **values):
    """Write a copy of a file with other metadata, each value as JSON."""
    proto = onnx.load(file)
    for prop in proto.metadata_props:
        if prop.key in values:
            prop.value = json.dumps(values[prop.key])
    onnx.save(proto, changed)
    return changed


def test_files_of_other_formats(tmp_path, pictures_file):
    old = {"threshold": 0.4, "mix_weight": 0.25, "label_thresholds": [], "k": 2}
    third = Path(__file__).with_name("format3.onnx")
    first = with_metadata(third, tmp_path / "1.onnx", cnnrnn_format=1, calibration=old)
    assert OnnxPredictor(first).calibration == Calibration(0.4, 0.25, k=2)
    second = with_metadata(pictures_file, tmp_path / "2.onnx", calibration=old)
    with pytest.raises(OnnxModelError, match="missing or unknown: known_mix_weight, min_labels"):
        OnnxPredictor(second)
    later = with_metadata(pictures_file, tmp_path / "6.onnx", cnnrnn_format=6)
    with pytest.raises(OnnxModelError, match="has format 6, this release reads 1 to 5; upgrade"):
        OnnxPredictor(later)


@pytest.mark.parametrize("search", ["onnx", "compiled"])
def test_sets_have_the_files_least_number_of_labels(tmp_path, pictures_file, search):
    calibration = asdict(Calibration(2.0, 0.25, (2.0,) * L, 1, min_labels=2))
    file = with_metadata(pictures_file, tmp_path / "two.onnx", calibration=calibration)
    predictor = OnnxPredictor(file, search=search)
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    for decide in DECISIONS:
        assert all(len(p.labels) >= 2 for p in predictor.predict(images, decide=decide))
    assert not any(
        p.labels for p in predictor.predict(images, decide="label_thresholds", min_labels=0)
    )


def test_a_file_cut_short(tmp_path, pictures_file):
    data = pictures_file.read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.onnx").write_bytes(data[: int(len(data) * share)])
        for search in ("onnx", "compiled"):
            with pytest.raises(OnnxModelError):
                OnnxPredictor(tmp_path / "cut.onnx", search=search)


def test_no_image_at_all(exported):
    """ONNX Runtime itself, which `run` does not ask then."""
    for name in HEADS:
        session = exported(name)._session
        found = session.run(None, {"features": np.zeros((0, F), np.float32)})
        assert [len(output) for output in found] == [0] * len(found)


def test_weights_beside_a_file_that_would_be_too_large(tmp_path, monkeypatch):
    model, file = HEADS["increasing"], tmp_path / "model.onnx"
    described, features = tmp_path / "model.labels.json", torch.randn(3, F)
    expected = by_reference(model, features)
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 100)
    sizes = []
    for _ in range(2):
        export_onnx(model, file, loop=True)
        assert sorted(tmp_path.iterdir()) == [described, file, tmp_path / "model.onnx.data"]
        sizes.append((tmp_path / "model.onnx.data").stat().st_size)
        assert_same(OnnxPredictor(file, threads=1).run(features), expected)
    assert sizes[0] == sizes[1] > 0
    monkeypatch.undo()
    export_onnx(model, file, loop=True)
    assert sorted(tmp_path.iterdir()) == [described, file]


def test_a_spoilt_head_is_a_spoilt_file(tmp_path, pictures_file):
    proto = onnx.load(pictures_file)
    next(prop for prop in proto.metadata_props if prop.key == "head").value = "AAAA"
    onnx.save(proto, tmp_path / "spoilt.onnx")
    with pytest.raises(OnnxModelError, match="must be written by cnnrnn.export_onnx"):
        OnnxPredictor(tmp_path / "spoilt.onnx", search="compiled")


def test_the_embedding_is_an_output(exported):
    model, features = HEADS["increasing"], torch.randn(4, F)
    found = exported("increasing").run(features, outputs=["joint", "label_scores"])
    with torch.no_grad():
        embedding, label_scores = model.head.embed_with_label_scores(features)
    assert isinstance(embedding, ImageEmbedding)
    torch.testing.assert_close(found["joint"], embedding.joint, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["label_scores"], label_scores, rtol=1e-5, atol=1e-5)
