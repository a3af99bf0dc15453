"""Exported files that several modules open: writing one takes seconds."""

from __future__ import annotations

import pytest
import torch

import cnnrnn
from cnnrnn import SearchConfig, export_onnx
from cnnrnn.api import DEMO_MODEL
from tests.export.models import HEADS, head_model, picture_model


@pytest.fixture(scope="session")
def head_file(tmp_path_factory):
    """A function that writes a model of `HEADS` when it is first asked for."""
    folder = tmp_path_factory.mktemp("heads")

    def written(name):
        file = folder / f"{name}.onnx"
        if not file.exists():
            export_onnx(HEADS[name], file, loop="loop" in name)
        return file

    return written


@pytest.fixture(scope="session")
def tied_file(tmp_path_factory):
    """A function that returns a head to which all labels are alike, and its file."""
    folder = tmp_path_factory.mktemp("tied")
    model = head_model(SearchConfig(beam_size=8, order="unique"), chain_term=False)
    with torch.no_grad():
        model.head.label_embedding.zero_()
        model.head.score_bias.zero_()

    def written(loop):
        file = folder / f"{loop}.onnx"
        if not file.exists():
            export_onnx(model, file, loop=loop)
        return model, file

    return written


@pytest.fixture(scope="session")
def pictures_file(tmp_path_factory):
    """The file of `picture_model`, unrolled."""
    file = tmp_path_factory.mktemp("pictures") / "model.onnx"
    export_onnx(picture_model(), file)
    return file


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory):
    """The file of the demo model, with a loop."""
    file = tmp_path_factory.mktemp("demo") / "demo.onnx"
    export_onnx(cnnrnn.load(DEMO_MODEL), file, loop=True)
    return file
