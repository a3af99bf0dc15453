"""The head against the paper's equations written out, and the backbones."""

from __future__ import annotations

import pytest
import torch

from cnnrnn.config import ModelConfig
from cnnrnn.labels import increasing_paths, prefix_trie
from cnnrnn.network.backbones import make_backbone
from cnnrnn.network.head import Dropout, Head, ImageEmbedding, chain_logits
from cnnrnn.network.recurrence import LSTMRecurrence, PaperRecurrence, prefix_outputs

CELLS = ["lstm", "paper"]
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda x: x}


def make_head(cell="lstm", activation="relu", chain_term=False, **options):
    torch.manual_seed(0)
    head = Head(5, 3, 4, 6, cell, activation, chain_term, **options).double().eval()
    with torch.no_grad():
        if head.score_bias is not None:
            head.score_bias.normal_()
    return head


@pytest.mark.parametrize("chain_term", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_teacher_forcing_is_the_recurrence_step_by_step(tied, cell, activation, chain_term):
    head = make_head(cell, activation, chain_term, tied_embedding=tied)
    read = head.label_embedding if tied else head.input_embedding
    features = torch.randn(3, 3, dtype=torch.float64)
    paths = torch.tensor([[0, 3, 4], [2, -1, -1], [-1, -1, -1]])
    scores, label_scores = head(features, paths)
    assert scores.shape == (3, 4, 6)
    for row, path in enumerate(paths.tolist()):
        r = o = torch.zeros(6, dtype=torch.float64)
        image = head.image_projection.weight @ features[row] + head.image_projection.bias
        for step, label in enumerate([head.num_labels + 1, *[p for p in path if p >= 0]]):
            r, o = cell_step(head, cell, r, o, read[label])
            x = ACTIVATIONS[activation](head.output_projection.weight @ o + image)
            expected = head.label_embedding[:6] @ x + head.score_bias
            if chain_term:
                expected = expected + chain_logits(label_scores[row : row + 1])[0]
            torch.testing.assert_close(scores[row, step], expected)


# Shared from the start, shared in part, a whole path within another, the same path twice, none.
SHARED = torch.tensor([[0, 1, 2], [0, 1, 4], [0, -1, -1], [3, -1, -1], [0, 1, 2], [-1, -1, -1]])
PATHS = {
    "shared": SHARED,
    "random": increasing_paths(torch.rand(31, 5, generator=torch.Generator().manual_seed(0)) < 0.6),
    "one": torch.tensor([[4, 0, 0, 3, -1]]),
    "all empty": torch.full((3, 2), -1),
    "T 0": torch.full((3, 0), -1),
    "B 0": torch.full((0, 3), -1),
}


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("cell", CELLS)
def test_sharing_prefixes_changes_neither_value_nor_gradient(cell, paths):
    head = make_head(cell, chain_term=True).train()
    features = torch.randn(len(paths), 3, dtype=torch.float64)
    found = head(features, paths)[0]
    weights = torch.randn_like(found)
    parameters = dict(head.named_parameters())
    gradients = torch.autograd.grad((found * weights).sum(), list(parameters.values()))

    embedding = head.embed(features)
    expected = torch.zeros_like(found)
    total = 0 * sum(parameter.sum() for parameter in parameters.values())
    for image, path in enumerate(paths.tolist()):
        state = head.extend(torch.tensor([head.start]), head.initial_state(1))
        for step, label in enumerate([*[p for p in path if p >= 0], None]):
            score = head.score(state[0], type(embedding)(embedding.joint[image : image + 1]))
            row = score[0] + embedding.label_logits[image]
            expected[image, step] = row.detach()
            total = total + (row * weights[image, step]).sum()
            if label is not None:
                state = head.extend(torch.tensor([label]), state)
    expected_gradients = torch.autograd.grad(total, list(parameters.values()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for name, *both in zip(parameters, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(
            *both, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_teacher_forcing_by_finite_differences(cell):
    head = make_head(cell)
    features = torch.randn(len(SHARED), 3, dtype=torch.float64)
    names, values = zip(*head.named_parameters(), strict=True)

    def scores(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, named, (features, SHARED))[0]

    assert torch.autograd.gradcheck(scores, values)


@pytest.mark.parametrize("cell", CELLS)
def test_prefix_outputs_under_autocast(cell, device):
    torch.manual_seed(0)
    head = Head(5, 3, joint_dim=16, hidden_dim=32, cell=cell).to(device)
    parameters = [head.label_embedding, *head.recurrence.parameters()]
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            trie = prefix_trie(PATHS["random"].to(device))
            outputs = prefix_outputs(head.recurrence, head.label_embedding, head.start, trie)
        gradients = torch.autograd.grad(outputs.square().sum(), parameters)
        results.append([outputs.detach(), *gradients])
    for narrow, full in zip(*reversed(results), strict=True):
        assert narrow.dtype == torch.float32
        assert 0 < float((narrow - full).norm()) < 0.02 * float(full.norm())


def cell_step(head, cell, r, o, w):
    recurrence = head.recurrence
    if cell == "lstm":
        gates = recurrence.weight_ih @ w + recurrence.bias_ih + recurrence.weight_hh @ o
        i, f, g, out = (gates + recurrence.bias_hh).chunk(4)
        r = f.sigmoid() * r + i.sigmoid() * g.tanh()
        return r, out.sigmoid() * r.tanh()
    # Equation 1, with the paper's r for the cell.
    U_w, U_r = recurrence.weight_ih.chunk(4), recurrence.weight_hh.chunk(4)
    x, i, f, g = (torch.relu(U_r[n] @ r + U_w[n] @ w) for n in range(4))
    r = f * r + i * x
    return r, r * g


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("count", [0, 1, 17])
@torch.no_grad()
def test_one_step_of_each_cell(cell, count):
    head = make_head(cell)
    labels, state = torch.randint(0, 7, (count,)), torch.randn(2, count, 6, dtype=torch.float64)
    outputs, cells = head.extend(labels, (state[0], state[1]))
    for row in range(count):
        w = head.label_embedding[labels[row]]
        r, o = cell_step(head, cell, state[1, row], state[0, row], w)
        torch.testing.assert_close((outputs[row], cells[row]), (o, r))


@torch.no_grad()
def test_lstm_is_torchs_lstm_over_a_whole_path():
    torch.manual_seed(0)
    ours, theirs = LSTMRecurrence(4, 6), torch.nn.LSTM(4, 6, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(theirs, f"{name}_l0").copy_(getattr(ours, name))
    inputs = torch.randn(5, 7, 4)
    expected, (last_output, last_cell) = theirs(inputs)
    state = (torch.zeros(5, 6), torch.zeros(5, 6))
    for step in range(7):
        gates = ours.input_gates(inputs[:, step]) + state[0] @ ours.weight_hh.t()
        i, f, g, o = gates.chunk(4, dim=1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        state = ours.step(inputs[:, step], state)
        torch.testing.assert_close(state[0], expected[:, step])
        torch.testing.assert_close(state, (o.sigmoid() * cell.tanh(), cell))
    torch.testing.assert_close(state, (last_output[0], last_cell[0]))


@torch.no_grad()
def test_steps_of_an_image_do_not_depend_on_its_batch_or_padding():
    head = make_head(chain_term=True)
    features = torch.randn(2, 3, dtype=torch.float64)
    together, _ = head(features, torch.tensor([[1, -1, -1, -1], [0, 1, 2, 4]]))
    alone, _ = head(features[:1], torch.tensor([[1]]))
    torch.testing.assert_close(together[:1, :2], alone)


@pytest.mark.parametrize(("batch", "length"), [(0, 0), (0, 3), (1, 0), (7, 0)])
def test_forward_of_empty_batches_and_paths(batch, length):
    paths = torch.full((batch, length), -1)
    scores, label_scores = make_head(chain_term=True)(torch.zeros(batch, 3).double(), paths)
    assert scores.shape == (batch, length + 1, 6)
    assert label_scores.shape == (batch, 5)


@pytest.mark.parametrize("num_labels", [1, 2, 6])
def test_chain_logits_are_the_next_label_of_independent_labels(num_labels):
    v = 3 * torch.randn(1, num_labels, dtype=torch.float64)
    logits = chain_logits(v)
    p = v[0].sigmoid().tolist()
    for last in range(-1, num_labels):
        expected, none_so_far = [], 1.0
        for label in range(last + 1, num_labels):
            expected.append(none_so_far * p[label])
            none_so_far *= 1 - p[label]
        expected.append(none_so_far)  # no label after `last`: END
        found = logits[0, last + 1 :].softmax(0)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_chain_logits_keep_at_least_float32():
    assert chain_logits(torch.zeros(0, 3)).shape == (0, 4)
    v = 4 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = chain_logits(v.double())
    assert chain_logits(v.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(chain_logits(v).double(), expected, rtol=1e-5, atol=1e-5)


def test_head_scores_stay_in_float64():
    scores, _ = make_head()(torch.zeros(1, 3).double(), torch.zeros(1, 1, dtype=torch.int64))
    assert scores.dtype == torch.float64


def test_parameter_names_and_shapes():
    L, F, D, H = 5, 3, 4, 6
    shapes = {name: tuple(p.shape) for name, p in Head(L, F, D, H).named_parameters()}
    assert shapes == {
        "label_embedding": (L + 2, D),
        "score_bias": (L + 1,),
        "image_projection.weight": (D, F),
        "image_projection.bias": (D,),
        "output_projection.weight": (D, H),
        "recurrence.weight_ih": (4 * H, D),
        "recurrence.weight_hh": (4 * H, H),
        "recurrence.bias_ih": (4 * H,),
        "recurrence.bias_hh": (4 * H,),
    }
    more = dict(Head(L, F, D, H, chain_term=True, trunk_dim=7).named_parameters())
    assert tuple(more["image_projection.weight"].shape) == (D, 7)
    apart = dict(Head(L, F, D, H, tied_embedding=False).named_parameters())
    assert apart.keys() - shapes.keys() == {"input_embedding"}
    assert apart["input_embedding"].shape == (L + 2, D)
    assert tuple(more["label_classifier.weight"].shape) == (L, 7)


def test_paper_preset_has_the_papers_sizes_and_no_bias():
    config = ModelConfig.paper()
    head = Head.from_config(config, num_labels=81, feature_dim=4096)
    assert not [name for name, _ in head.named_parameters() if "bias" in name]
    assert head.score_bias is None and head.label_classifier is None
    assert (head.joint_dim, head.hidden_dim, head.cell) == (64, 512, "paper")
    assert isinstance(head.recurrence, PaperRecurrence)
    assert head.joint_dropout.p == 0.5
    assert (config.backbone, config.freeze_backbone, config.pretrained) == ("vgg16", True, True)


def test_dropout_works_in_training_alone():
    torch.manual_seed(0)
    head = Head(5, 30, 40, 60, chain_term=True, trunk_dim=50, input_dropout=0.3,
                hidden_dropout=0.5, joint_dropout=0.3)  # fmt: skip
    features, paths = torch.randn(2, 30), torch.tensor([[0, 1], [2, -1]])
    first, second = head(features, paths), head(features, paths)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    head.eval()
    torch.testing.assert_close(head(features, paths), head(features, paths), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout_keeps_a_share_and_scales_it(p, dtype):
    torch.manual_seed(0)
    inputs = torch.ones(100, 101, dtype=dtype, requires_grad=True)
    dropped = Dropout(p)(inputs)
    kept = dropped != 0
    assert dropped.dtype == dtype
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=0.08 * p)
    scale = torch.tensor(1 / (1 - p) if p < 1 else 0.0, dtype=dtype)
    torch.testing.assert_close(dropped, kept * scale)
    (gradient,) = torch.autograd.grad(dropped.sum(), inputs)
    torch.testing.assert_close(gradient, dropped)


def test_joint_dropout_falls_on_both_projections():
    head = Head(2, 3, joint_dim=1000, hidden_dim=4, joint_dropout=0.5)
    image = head.embed(torch.ones(1, 3)).joint
    assert 400 < int((image == 0).sum()) < 600
    zero_image = ImageEmbedding(torch.zeros(1, 1000))
    with torch.no_grad():
        head.output_projection.weight.fill_(1.0)
        head.label_embedding.fill_(1.0)
        score = float(head.score(torch.ones(1, 4), zero_image)[0, 0])
    kept = score / 8  # 1000 sums of 4, doubled where they are kept
    assert kept == pytest.approx(round(kept)) and 400 < kept < 600


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"features must be \[B, 3\], got \["):
        make_head().embed(torch.zeros(shape).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"joint_dim": -1}, "joint_dim must be at least 1, got -1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"cell": "gru"}, "cell must be lstm or paper, got 'gru'"),
        ({"activation": "gelu"}, "activation must be relu, tanh or identity, got 'gelu'"),
    ],
)
def test_head_options_are_checked(options, message):
    with pytest.raises(ValueError) as error:
        Head(**{"num_labels": 2, "feature_dim": 3} | options)
    assert str(error.value) == message


def test_embedding_moves_both_parts():
    embedding = make_head(chain_term=True).embed(torch.zeros(2, 3).double())
    assert len(embedding) == 2
    moved = embedding.to("cpu", torch.float32)
    assert moved.joint.dtype == moved.label_logits.dtype == torch.float32
    assert ImageEmbedding(embedding.joint).to("cpu").label_logits is None


def test_small_backbone_needs_no_extra_and_sees_every_size():
    for side in (16, 64):
        config = ModelConfig(backbone="small", image_size=side)
        backbone = make_backbone(config).eval()
        with torch.no_grad():
            features = backbone(torch.zeros(2, 3, side, side))
        assert features.shape == (2, backbone.feature_dim)
        assert backbone.preprocessing.image_size == side
    assert make_backbone(ModelConfig(backbone="small")).preprocessing.image_size == 64


def test_resnet18_of_timm():
    pytest.importorskip("timm")
    config = ModelConfig(backbone="resnet18", pretrained=False, image_size=32)
    backbone = make_backbone(config).eval()
    assert backbone.feature_dim == 512
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    assert backbone.preprocessing.mean == (0.485, 0.456, 0.406)


def test_vgg16_gives_fc7():
    timm = pytest.importorskip("timm")
    from dataclasses import replace

    config = replace(ModelConfig.paper(), pretrained=False, image_size=32)
    with torch.device("meta"):  # shapes alone: 134 million weights stay unmade
        network = timm.create_model(config.backbone, num_classes=0)
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 4096)
    assert network.pre_logits.fc2.weight.shape[:2] == (4096, 4096)


def test_unknown_backbone_lists_close_names():
    pytest.importorskip("timm")
    with pytest.raises(ValueError) as error:
        make_backbone(ModelConfig(backbone="resnet51", pretrained=False))
    message = (
        "backbone must be small or the name of a timm model, or begin with hf-hub: or local-dir:"
    )
    assert f"{message}, got 'resnet51'" in str(error.value)
    assert "timm has " in str(error.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r'run `pip install "cnnrnn\[vision\]"`'):
        make_backbone(ModelConfig(backbone="resnet18", pretrained=False))


def test_a_head_with_a_skip_reads_the_feature_beside_the_hidden_layer():
    torch.manual_seed(0)
    head = Head(3, 4, joint_dim=5, hidden_dim=6, chain_term=True, trunk_dim=2, trunk_skip=True)
    features = torch.randn(7, 4)
    hidden = torch.relu(features @ head.trunk[1].weight.T + head.trunk[1].bias)
    torch.testing.assert_close(head.trunk(features), torch.cat([hidden, features], dim=1))
    assert head.label_classifier.in_features == head.image_projection.in_features == 2 + 4
    without_layer = Head(3, 4, trunk_dim=0, trunk_skip=True)
    assert torch.equal(without_layer.trunk(features), features)
