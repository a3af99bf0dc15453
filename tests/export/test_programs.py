"""Exported files give the same labels in every program that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import cnnrnn
from cnnrnn.api import DEMO_MODEL
from cnnrnn.data.sources.scenes import draw_scene
from tests.export import programs
from tests.export.models import HEADS, F, L, by_reference, picture_model
from tests.export.programs import PROGRAMS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SEEDS = {"increasing": 1, "unique, loop": 1, "free": 1, "paper, loop": 1}
"""Of the features; of others some paths tie but for rounding."""


def cases() -> Iterator[dict[str, object]]:
    """What is asked of a batch of B images: nothing more, what is known of it, a shortest path."""
    for batch in (1, 5):
        yield {"batch": batch}
        known = np.zeros((batch, L), np.int8)
        known[0, 2], known[-1, 4] = 1, -1
        yield {"batch": batch, "evidence": known}
        several = known.copy()
        several[:, 0], several[-1, [1, 3]] = -1, 1
        yield {"batch": batch, "evidence": several}
    yield {"batch": 5, "evidence": known[:1]}  # of all images alike
    for least in (0, 2):
        yield {"batch": 5, "min_labels": np.array(least)}
    yield {"batch": 5, "min_labels": np.array(2), "evidence": known}


def options_of(case):
    return {name: value for name, value in case.items() if name != "batch"}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", HEADS)
def test_paths_are_those_of_the_reference(head_file, name, program):
    model = HEADS[name]
    generator = torch.Generator().manual_seed(SEEDS[name])
    asked = list(cases())
    features = [torch.randn(case["batch"], F, generator=generator) for case in asked]
    asked.append({"batch": 5})
    features.append(torch.randn(5, F, generator=generator))
    features[-1][1, 2] = torch.nan  # of this image no other knows anything
    feeds = [{"features": x.numpy()} | options_of(case)
             for case, x in zip(asked, features, strict=True)]  # fmt: skip
    answers = PROGRAMS[program](head_file(name), feeds)
    for case, x, found in zip(asked, features, answers, strict=True):
        options = {k: torch.from_numpy(v) if v.ndim else int(v)
                   for k, v in options_of(case).items()}  # fmt: skip
        expected = by_reference(model, x, **options)
        assert found["labels"].tolist() == expected.labels.tolist(), case
        assert found["lengths"].tolist() == expected.lengths.tolist(), case
        for output, values in (
            ("log_probs", expected.log_probs),
            ("marginals", expected.marginals()),
            ("log_evidence", expected.log_evidence),
        ):
            torch.testing.assert_close(
                torch.tensor(found[output]), values, rtol=1e-5, atol=2e-5, equal_nan=True
            )


@pytest.mark.parametrize("program", ["onnx.reference", "onnxruntime-node"])
def test_ties_go_to_the_lower_path_and_label(tied_file, program):
    model, file = tied_file(True)
    features = torch.randn(3, F, generator=torch.Generator().manual_seed(0))
    found = PROGRAMS[program](file, [{"features": features.numpy()}])[0]
    assert found["labels"].tolist() == by_reference(model, features).labels.tolist()


def random_pictures(count):
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (count, 1, 1, 3))
    noise = random.integers(-60, 61, (count, 16, 16, 3))
    return (base + noise).clip(0, 255).astype(np.uint8)


def scenes(count):
    return np.stack([draw_scene(np.random.default_rng(i)).image for i in range(count)])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("which", ["unrolled", "loop"])
def test_labels_are_those_of_predict(pictures_file, demo_file, which, program):
    demo = which == "loop"
    file = demo_file if demo else pictures_file
    model = cnnrnn.load(DEMO_MODEL) if demo else picture_model()
    # The file's banks have N places, where predict takes more of images of which labels are known.
    model.search = replace(model.search, marginal_places=model.search.beam_size)
    pictures = scenes(6) if demo else random_pictures(6)
    names = list(model.labels)
    known = np.zeros((6, len(names)), np.int8)
    known[0, 2], known[3, :2], known[4, 1] = 1, -1, 1
    given = {
        "known": [[names[i] for i in np.flatnonzero(row == 1)] for row in known],
        "absent": [[names[i] for i in np.flatnonzero(row == -1)] for row in known],
    }
    asked = [
        ({"images": pictures}, {}),
        ({"images": pictures[1:2]}, {}),
        ({"images": pictures, "evidence": known}, given),
        ({"images": pictures, "min_labels": np.array(3)}, {"min_labels": 3}),
    ]
    answers = PROGRAMS[program](file, [feed for feed, _ in asked])
    for (feed, options), found in zip(asked, answers, strict=True):
        predictions = model.predict(feed["images"], **options)
        for i, prediction in enumerate(predictions):
            path = found["labels"][i, 0, : found["lengths"][i, 0]]
            assert [names[label] for label in path] == prediction.labels, options
            assert found["log_probs"][i, 0] == pytest.approx(prediction.log_prob, abs=1e-4)
            scores = dict(zip(names, found["scores"][i].tolist(), strict=True))
            assert scores == pytest.approx(prediction.scores, abs=1e-4)


# What the files must be like for it


def values_of(graph):
    """Shape and name of all that a graph and its loops compute, as far as it is fixed."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        yield value.name, [dim.dim_value for dim in dims if dim.HasField("dim_value")]
    for tensor in graph.initializer:
        yield tensor.name, list(tensor.dims)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from values_of(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR:
                yield node.output[0], list(attribute.t.dims)


@pytest.mark.parametrize("name", [*HEADS, "pictures", "demo"])
def test_no_dimension_is_empty(head_file, pictures_file, demo_file, name):
    """Programs differ in what a dimension of 0 is."""
    file = {"pictures": pictures_file, "demo": demo_file}.get(name) or head_file(name)
    proto = onnx.shape_inference.infer_shapes(onnx.load(file))
    shapes = list(values_of(proto.graph))
    assert len(shapes) > 150 and not [name for name, shape in shapes if 0 in shape]


# What programs do not do


@pytest.mark.parametrize("program", ["openvino", "onnxruntime-node"])
def test_defaults_are_constants(head_file, monkeypatch, program):
    """In a file as it is exported what is known is ignored, without an error."""
    monkeypatch.setattr(programs, "without_defaults", lambda file, names: file.read_bytes())
    features = np.zeros((1, F), np.float32)
    known = np.array([[0, 0, -1, 0, 0, 1]], np.int8)
    feeds = [{"features": features}, {"features": features, "evidence": known}]
    run = PROGRAMS[program]
    if program == "openvino":
        with pytest.raises(RuntimeError, match="evidence"):
            run(head_file("increasing"), feeds)
        return
    without, given = run(head_file("increasing"), feeds)
    assert given["marginals"].tolist() == without["marginals"].tolist()


def test_openvino_finds_other_paths_of_equal_scores(head_file):
    """It reads TopK as one that may put equal scores in any order; the scores are the same."""
    name = "paper, loop"  # a ReLU cell that forgets makes equal paths
    feeds = [
        {"features": torch.randn(5, F, generator=torch.Generator().manual_seed(seed)).numpy()}
        for seed in range(6)
    ]
    for feed, found in zip(feeds, programs.in_openvino(head_file(name), feeds), strict=True):
        expected = by_reference(HEADS[name], torch.from_numpy(feed["features"]))
        scores = torch.from_numpy(found["log_probs"])
        torch.testing.assert_close(scores, expected.log_probs, rtol=1e-5, atol=2e-5)
        gaps = expected.log_probs.diff(dim=1).abs()
        clear = (gaps > 1e-4)[:, 0]  # the best path has no equal
        best = torch.from_numpy(found["labels"])[:, 0]
        assert clear.any() and torch.equal(best[clear], expected.labels[clear, 0])


def test_openvino_takes_no_empty_batch(head_file):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(head_file("increasing"), "CPU")
    with pytest.raises(RuntimeError, match="intel_cpu"):
        compiled({"features": np.zeros((0, F), np.float32)})
