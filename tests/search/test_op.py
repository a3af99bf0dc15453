"""The registered op under opcheck, torch.compile and torch.export."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor, library

from cnnrnn.config import SearchConfig
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import SearchResult, beam_search
from cnnrnn.search.packed import head_parameters
from tests.search.replay import random_embedding, random_head, run_compiled

CONFIG = SearchConfig(beam_size=3, max_labels=4)


def head_of(seed: int, **options: object) -> Head:
    return random_head(
        torch.Generator().manual_seed(seed), 20, joint_dim=8, hidden_dim=12, **options
    )


def arguments(head: Head, embedding: ImageEmbedding, marginals: bool = False) -> tuple[object, ...]:
    return (
        embedding.joint, embedding.label_logits,
        *(None if tensor is None else tensor.detach() for tensor in head_parameters(head)),
        head.cell, head.activation, CONFIG.beam_size, 4, CONFIG.min_labels, CONFIG.order,
        CONFIG.end_takes_slot, CONFIG.stop, marginals, head.cache_generation, head.prefix_bytes,
    )  # fmt: skip


def images(head: Head, count: int, seed: int = 0, label_logits: bool = False) -> ImageEmbedding:
    return random_embedding(torch.Generator().manual_seed(seed), head, count, label_logits)


def assert_same(outputs: tuple[Tensor, ...], expected: SearchResult) -> None:
    assert torch.equal(outputs[0], expected.labels)
    assert torch.equal(outputs[1], expected.lengths)
    assert torch.equal(outputs[2], expected.log_probs)


@pytest.mark.parametrize(
    "options", [{"tied_embedding": False}, {"cell": "paper", "score_bias": False}]
)
@pytest.mark.parametrize("label_logits", [False, True])
@pytest.mark.parametrize("marginals", [False, True])
@pytest.mark.parametrize("batch", [0, 5])
def test_the_op_is_what_torch_takes_it_for(options, label_logits, marginals, batch):
    head = head_of(1, **options)
    inputs = arguments(head, images(head, batch, label_logits=label_logits), marginals)
    library.opcheck(torch.ops.cnnrnn.beam_search.default, inputs)


@pytest.mark.parametrize("marginals", [False, True])
def test_the_op_returns_what_the_public_call_does(marginals):
    head = head_of(2, tied_embedding=False)
    embedding = images(head, 7, label_logits=True)
    outputs = torch.ops.cnnrnn.beam_search(*arguments(head, embedding, marginals))
    expected = beam_search(head, embedding, CONFIG, marginals=marginals)
    assert_same(outputs, expected)
    if marginals:
        assert torch.equal(outputs[3], expected.marginals())
    else:
        assert outputs[3].shape == (7, 0)


@pytest.mark.parametrize("marginals", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_op_takes_evidence(marginals, rows):
    head = head_of(3)
    embedding = images(head, 5, label_logits=True)
    evidence = torch.zeros(rows, 20, dtype=torch.int8)
    evidence[:, 3], evidence[0, 7] = 1, -1
    inputs = arguments(head, embedding, marginals)
    options = {"evidence": evidence, "marginal_places": 20}
    library.opcheck(torch.ops.cnnrnn.beam_search.default, inputs, options)
    outputs = torch.ops.cnnrnn.beam_search(*inputs, **options)
    wide = replace(CONFIG, marginal_places=20)
    expected = beam_search(head, embedding, wide, marginals=marginals, evidence=evidence)
    assert_same(outputs, expected)
    assert outputs[4].shape == ((5,) if marginals else (0,))
    if marginals:
        assert torch.equal(outputs[3], expected.marginals())
        assert torch.equal(outputs[4], expected.log_evidence)


class GivenPaths(torch.nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, joint: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = beam_search(
            self.head, ImageEmbedding(joint), CONFIG, marginals=True, evidence=evidence
        )
        assert found.log_evidence is not None
        return found.labels, found.marginals(), found.log_evidence


def test_evidence_is_an_input_of_compiled_and_exported_programs():
    head = head_of(4)
    joint = images(head, 6).joint
    evidence = torch.zeros(6, 20, dtype=torch.int8)
    evidence[:, 2] = 1
    module = GivenPaths(head).eval()
    expected = module(joint, evidence)
    exported = torch.export.export(module, (joint, evidence)).module()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for program in (exported, compiled):
        for given in (evidence, -evidence):
            for mine, theirs in zip(program(joint, given), module(joint, given), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert (expected[0] == 2).any(2).all()


class FeaturesToPaths(torch.nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> SearchResult:
        return beam_search(self.head, self.head.embed(features), CONFIG)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_compiled_as_one_graph(tied):
    head = head_of(3, chain_term=True, tied_embedding=tied)
    compiled = torch.compile(FeaturesToPaths(head), fullgraph=True, backend="aot_eager")
    for batch in (4, 9):
        features = torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))
        result = compiled(features)
        assert isinstance(result, SearchResult)
        expected = beam_search(head, head.embed(features), CONFIG)
        assert_same((result.labels, result.lengths, result.log_probs), expected)


@torch.no_grad()
def test_compiled_in_other_precisions():
    head = head_of(3).double()
    embedding = images(head, 4).to("cpu", torch.float64)
    search = torch.compile(
        lambda joint: beam_search(head, ImageEmbedding(joint), CONFIG).log_probs,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(search(embedding.joint), beam_search(head, embedding, CONFIG).log_probs)


@torch.no_grad()
def test_exported_with_a_free_batch():
    class Tensors(FeaturesToPaths):
        def forward(self, features: Tensor) -> tuple[Tensor, ...]:
            result = super().forward(features)
            return result.labels, result.lengths, result.log_probs

    head = head_of(4, chain_term=True, tied_embedding=False)
    program = torch.export.export(
        Tensors(head), (torch.randn(5, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert "cnnrnn.beam_search" in str(program.graph)
    for batch in (1, 5, 17):
        features = torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))
        assert_same(program.module()(features), beam_search(head, head.embed(features), CONFIG))


@torch.no_grad()
def test_changed_weights_are_seen():
    head = head_of(5, tied_embedding=False)
    embedding = images(head, 6)
    op = torch.ops.cnnrnn.beam_search
    op(*arguments(head, embedding))
    for parameter in (
        head.label_embedding, head.input_embedding, head.recurrence.weight_hh,
        head.recurrence.bias_ih,
    ):  # fmt: skip
        parameter.mul_(-1.5)
        assert_same(op(*arguments(head, embedding)), beam_search(head, embedding, CONFIG))
    head.input_embedding.data.mul_(-2.0)  # torch does not count this
    head.clear_cache()
    assert_same(op(*arguments(head, embedding)), beam_search(head, embedding, CONFIG))


def test_an_input_embedding_of_another_shape_is_refused():
    head = head_of(5, tied_embedding=False)
    head.input_embedding = torch.nn.Parameter(torch.zeros(21, 8))
    with pytest.raises(ValueError, match=r"input_embedding must be .*\[22, 8\].*\[21, 8\]"):
        torch.ops.cnnrnn.beam_search(*arguments(head, images(head, 2)))


def test_weights_at_an_address_that_others_had_are_not_mistaken_for_them():
    head = head_of(8, tied_embedding=False)
    embedding = images(head, 3)
    memory = [None if t is None else t.detach().numpy().copy() for t in head_parameters(head)]
    options = arguments(head, embedding)[2 + len(memory) :]
    for _ in range(2):
        weights = [None if values is None else torch.from_numpy(values) for values in memory]
        outputs = torch.ops.cnnrnn.beam_search(
            embedding.joint, embedding.label_logits, *weights, *options
        )
        with torch.no_grad():
            for parameter, values in zip(head_parameters(head), weights, strict=True):
                if parameter is not None and values is not None:
                    parameter.copy_(values)
        assert torch.equal(outputs[2], run_compiled(head, embedding, CONFIG, 4)[2])
        del weights
        assert memory[0] is not None
        memory[0] *= -2.0  # other tensors will lie here, with a count of no edits as well


def test_weights_made_in_inference_mode_are_never_kept():
    with torch.inference_mode():
        head = head_of(6)
        embedding = images(head, 4)
        for _ in range(2):
            outputs = torch.ops.cnnrnn.beam_search(*arguments(head, embedding))
            assert torch.equal(outputs[2], run_compiled(head, embedding, CONFIG, 4)[2])
            head.label_embedding.mul_(-1.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_call_it():
    head = head_of(7)
    embedding = images(head, 10)
    expected = torch.ops.cnnrnn.beam_search(*arguments(head, embedding))
    child = os.fork()
    if child == 0:
        outputs = torch.ops.cnnrnn.beam_search(*arguments(head, embedding))
        os._exit(0 if all(map(torch.equal, outputs, expected)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_precision_that_is_not_there_is_refused():
    head = head_of(3)
    inputs = arguments(head, images(head, 2))
    message = "precision must be one of exact, fast, got 'half'|precision must be exact or fast"
    with pytest.raises(ValueError, match=message):
        torch.ops.cnnrnn.beam_search(*inputs, "half")
    with pytest.raises(ValueError, match=message):
        beam_search(head, images(head, 2), CONFIG, precision="half")
    exact = torch.ops.cnnrnn.beam_search(*inputs, "exact")
    fast = torch.ops.cnnrnn.beam_search(*inputs, "fast")  # on the CPU, the same
    assert torch.equal(exact[2], fast[2])
