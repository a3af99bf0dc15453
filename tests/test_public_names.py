"""The public names and the signatures that scripts rely on."""

from __future__ import annotations

import inspect

import pytest

import cnnrnn


@pytest.mark.parametrize("name", sorted(set(cnnrnn.__all__) - {"__version__"}))
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(cnnrnn, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'predictt'"):
        cnnrnn.predictt  # noqa: B018


def test_signatures_that_scripts_rely_on():
    head = list(inspect.signature(cnnrnn.Head).parameters)
    assert head[:7] == [
        "num_labels", "feature_dim", "joint_dim", "hidden_dim", "cell", "activation", "chain_term"
    ]  # fmt: skip
    search = list(inspect.signature(cnnrnn.beam_search).parameters)
    assert search[:5] == ["head", "image_embedding", "config", "implementation", "marginals"]
    predict = inspect.signature(cnnrnn.predict).parameters
    assert list(predict)[:2] == ["images", "model"]
    assert predict["top_k"].kind is predict["beam_size"].kind is inspect.Parameter.KEYWORD_ONLY


def test_head_parameters_have_their_documented_names_and_shapes():
    L, F, D, H = 5, 7, 3, 4
    shapes = {
        name: list(value.shape)
        for name, value in cnnrnn.Head(L, F, D, H, chain_term=True).named_parameters()
    }
    assert shapes["label_embedding"] == [L + 2, D]
    assert shapes["score_bias"] == [L + 1]
    assert shapes["image_projection.weight"] == [D, F]
    assert shapes["output_projection.weight"] == [D, H]
    assert shapes["recurrence.weight_ih"] == [4 * H, D]
    assert shapes["recurrence.weight_hh"] == [4 * H, H]
    paper = cnnrnn.Head.from_config(cnnrnn.ModelConfig.paper(), L, F)
    assert not [name for name, _ in paper.named_parameters() if "bias" in name]
