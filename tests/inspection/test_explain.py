"""Explanations: deconvolution by hand, occlusion and integrated gradients against what is known."""

from __future__ import annotations

import io
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import cnnrnn
from benchmarks.quality.faithfulness import box_figures, scores_lost
from cnnrnn import BadImageError, Ensemble, ModelConfig, Preprocessing, SearchConfig
from cnnrnn.cli import main
from cnnrnn.inspection.deconvolution import deconvolvable
from cnnrnn.inspection.explain import Method, PathScores
from cnnrnn.inspection.explain_figure import overlaid
from cnnrnn.labels import LabelSpace
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.backbones import Backbone, make_backbone
from cnnrnn.network.head import Head

SIDE = 16
NAMES = ("sky", "sea", "boat", "gull")
FORM = Preprocessing(SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Pixels(nn.Module):
    """Reads chosen pixels: feature i is the sum over the colours of pixel i."""

    def __init__(self, *places: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = zip(*places, strict=True)

    def forward(self, images):
        return images[:, :, list(self.rows), list(self.columns)].sum(1)


def make_model(network=None, *, seed=0, order="increasing", chain_term=True, **options):
    """A random head on a network, whose path has some labels."""
    torch.manual_seed(seed)
    backbone = (
        make_backbone(ModelConfig(backbone="small", pretrained=False, image_size=SIDE))
        if network is None
        else Backbone("made for a test", network, FORM)
    )
    config = ModelConfig(
        backbone="small", trunk_dim=0, joint_dim=6, hidden_dim=5, chain_term=chain_term, **options
    )
    head = Head.from_config(config, len(NAMES), backbone.feature_dim)
    for parameter in head.parameters():
        parameter.data *= 2
    search = SearchConfig(order=order)
    return CNNRNN(config, LabelSpace.given(NAMES), head, backbone, search).eval()


def picture(width=SIDE, height=SIDE, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Deconvolution


def test_a_deconvolution_is_the_one_computed_by_hand():
    """Two layers at one place: 1, -2 and 3 of a pixel; then 1, 1 and -1 of those."""
    first, second = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([[1.0, 1.0, -1.0]])
    x = torch.tensor([[2.0]], requires_grad=True)
    y = deconvolvable(lambda x: (x * first).relu() @ second.T, x, "two layers")
    assert y.item() == 2 - 6  # relu(2), relu(-4), relu(6)
    (arrived,) = torch.autograd.grad(y, x)
    # The signal 1, 1, -1 loses its -1 at the ReLUs; the closed ReLU of -2 passes its 1.
    assert arrived.item() == 1 * 1 + 1 * -2
    (gradient,) = torch.autograd.grad(((x * first).relu() @ second.T).sum(), x)
    assert gradient.item() == 1 * 1 - 1 * 3


def test_a_pool_returns_to_where_its_maximum_was():
    x = torch.tensor([[[[1.0, 5.0], [3.0, 2.0]]]], requires_grad=True)
    y = deconvolvable(lambda x: functional.max_pool2d(x, 2).relu().flatten(1), x, "a pool")
    (arrived,) = torch.autograd.grad(y.sum(), x)
    assert arrived.flatten().tolist() == [0, 1, 0, 0]


RELUS = {
    "module": nn.ReLU(), "module in place": nn.ReLU(inplace=True), "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(), "torch": torch.relu, "torch in place": torch.relu_,
    "functional": functional.relu, "clamp": lambda x: x.clamp(min=0),
    "functional in place": lambda x: functional.relu(x, True),
    "clamp_min": lambda x: x.clamp_min(0),
}  # fmt: skip


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_every_way_to_write_a_relu_is_replaced(relu):
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)

    def network(x):
        inner = x * 1
        outer = relu(inner)
        assert (outer is inner) == (float(inner.detach().min()) == 0)  # in place or not, as without
        return outer

    y = deconvolvable(network, x, "one ReLU")
    assert y.tolist() == [[0, 2]]
    (arrived,) = torch.autograd.grad(y, x, torch.tensor([[1.0, -1.0]]))
    assert arrived.tolist() == [[1, 0]]


def test_what_reads_a_tensor_after_a_relu_in_place_gets_the_rectified_one():
    def network(x):
        inner = x * 1
        inner.relu_()
        return inner + inner[:, :1].relu_()

    x = torch.tensor([[-3.0, 2.0]], requires_grad=True)
    y = deconvolvable(network, x, "shortcut")
    assert y.tolist() == [[0, 2]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[3, 1]]


def count_relus(network, images):
    with torch.no_grad():
        from cnnrnn.inspection.deconvolution import _Rules

        with _Rules() as rules:
            found = network(images)
    return found, dict(rules.found)


def test_every_relu_of_the_small_network_is_found_and_features_stay():
    backbone = make_model().backbone
    images = torch.randn(2, 3, SIDE, SIDE)
    found, counted = count_relus(backbone, images)
    assert counted == {"relu": 4 + 2 * 2}  # four stages, two residual blocks that use the method
    torch.testing.assert_close(found, backbone(images).detach(), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "resnet10t"])
def test_timm_networks_are_taken_or_refused_by_their_activations(name):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    side = 160 if "vit" in name else 32
    images = torch.randn(1, 3, side, side, requires_grad=True)
    modules = {type(module).__name__ for module in network.modules()}
    if "ReLU" in modules:
        features = deconvolvable(network, images, name)
        torch.testing.assert_close(features, network(images))
        (arrived,) = torch.autograd.grad(features.sum(), images, retain_graph=True)
        (gradient,) = torch.autograd.grad(network(images).sum(), images)
        assert not torch.allclose(arrived, gradient)
    else:
        with pytest.raises(ValueError, match=f"backbone {name} has (silu|gelu)"):
            deconvolvable(network, images, name)


class Activated(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), *layers)

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize(
    ("layers", "has"),
    [
        ((nn.SiLU(),), "has silu"), ((nn.GELU(),), "has gelu"), ((nn.ReLU6(),), "has relu6"),
        ((nn.Hardswish(), nn.ReLU()), "has ReLUs beside hardswish"), ((), "has no ReLU"),
        ((nn.Sigmoid(),), "has no ReLU"),
    ],
)  # fmt: skip
def test_other_backbones_are_refused_by_name(layers, has):
    model = make_model(Activated(*layers))
    with pytest.raises(ValueError, match=f"backbone made for a test {has}"):
        cnnrnn.explain(picture(), model, path=["sea"])
    assert cnnrnn.explain(picture(), model, path=["sea"], method="occlusion").maps.isfinite().all()


def test_the_average_is_that_of_the_recurrent_part_and_changes_with_the_prefix():
    model = make_model()
    found = cnnrnn.explain(picture(), model, path=["sea", "gull"])
    assert [step.name for step in found.steps] == ["before the first label", "after sea",
                                                   "after gull"]  # fmt: skip
    assert [step.label for step in found.steps] == [None] * 3
    assert "recurrent part alone" in found.explained
    embedding = model(features_input(found))
    state = model.head.extend(torch.tensor([model.head.start]), model.head.initial_state(1))
    scores = model.head.score(state[0], embedding)[0, : len(NAMES)]
    assert found.steps[0].score == pytest.approx(scores.mean().item(), abs=1e-5)
    assert not torch.allclose(found.maps[0], found.maps[1], rtol=1e-3)
    with torch.no_grad():
        model.head.label_classifier.weight.mul_(7)  # the chain term's part of the scores
    torch.testing.assert_close(cnnrnn.explain(picture(), model, path=["sea", "gull"]).maps,
                               found.maps)  # fmt: skip
    alone = cnnrnn.explain(picture(), make_model(chain_term=False), path=["sea"])
    assert alone.explained == "deconvolution of the average of the label nodes"
    same = cnnrnn.explain(picture(), make_model(activation="identity"), path=["sea"])
    assert "no step differs" in same.explained
    torch.testing.assert_close(same.maps[0], same.maps[1])


def features_input(found):
    """The normalised input [1, 3, S, S] of an explanation by the small network."""
    from cnnrnn.data.images import normalize

    return normalize(found.image[None], make_model().backbone.preprocessing)


# Conditional scores


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_a_conditional_score_is_the_log_odds_of_the_searchs_own_distribution(order):
    model = make_model(order=order)
    image = picture()
    found = cnnrnn.explain(image, model, path=["sky", "boat"], method="occlusion")
    assert [step.label for step in found.steps] == ["sky", "boat", "END"]
    embedding = model(features_input(found))
    state = model.head.initial_state(1)
    last = -1
    for row, step in zip([model.head.start, 0, 2], found.steps, strict=True):
        state = model.head.extend(torch.tensor([row]), state)
        scores = (model.head.score(state[0], embedding) + embedding.label_logits)[0].double()
        allowed = torch.ones(len(NAMES) + 1, dtype=torch.bool)
        if order == "increasing":
            allowed[: last + 1] = False
        elif order == "unique" and last >= 0:
            allowed[[0, 2][: len(step.prefix)]] = False
        target = len(NAMES) if step.label == "END" else NAMES.index(step.label)
        if order == "increasing" and target < len(NAMES):
            allowed[:target] = False  # none of those in between comes
        p = scores.masked_fill(~allowed, -torch.inf).softmax(0)[target]
        assert step.score == pytest.approx((p / (1 - p)).log().item(), abs=1e-3)
        last = target


def test_the_chain_terms_conditional_score_is_its_classifiers():
    """Alone, it takes labels for independent: what comes before or after does not matter."""
    model = make_model()
    with torch.no_grad():
        model.head.label_embedding.zero_()
        model.head.score_bias.zero_()
    features = torch.randn(3, model.feature_dim)
    v = model.head.label_classifier(features)
    found = PathScores(model, ("sky", "boat"), None, average=False)(features)
    torch.testing.assert_close(found[:, :2], v[:, [0, 2]], atol=1e-4, rtol=1e-4)


def test_a_label_is_explained_where_it_may_come():
    model = make_model()
    found = cnnrnn.explain(picture(), model, path=["sky", "boat"], label="sea", method="occlusion")
    assert [(step.prefix, step.label) for step in found.steps] == [((), "sea"), (("sky",), "sea")]
    one = cnnrnn.explain(picture(), model, path=["sky", "boat"], label="boat",
                         method="label_deconvolution")  # fmt: skip
    assert [step.prefix for step in one.steps] == [(), ("sky",)]
    assert one.explained == "deconvolution of a label's conditional score, in nats"
    assert all(np.isnan(step.baseline) for step in one.steps)
    following = cnnrnn.explain(picture(), model, path=["sky", "boat"], method="label_deconvolution")
    assert [step.label for step in following.steps] == ["sky", "boat", "END"]
    torch.testing.assert_close(following.maps[1], one.maps[1])
    average = cnnrnn.explain(picture(), model, path=["sky", "boat"])
    assert not torch.allclose(following.maps[:2], average.maps[:2], rtol=0.1)


def test_nothing_follows_the_last_label():
    found = cnnrnn.explain(picture(), make_model(), path=["gull"], method="occlusion")
    assert [step.label for step in found.steps] == ["gull"]
    assert len(cnnrnn.explain(picture(), make_model(), path=["gull"]).steps) == 2


def test_the_path_is_the_best_one_given_what_is_known():
    model = make_model()
    image = picture()
    assert cnnrnn.explain(image, model).path == model.predict(image)[0].paths[0][0]
    told = cnnrnn.explain(image, model, known=["boat"], absent=["sky"])
    assert told.path == model.predict(image, known=["boat"], absent=["sky"])[0].paths[0][0]
    assert "boat" in told.path and "sky" not in told.path
    assert cnnrnn.explain(image, model, path=["gull", "sky"]).path == ("sky", "gull")
    free = make_model(order="free")
    assert cnnrnn.explain(image, free, path=["gull", "sky"]).path == ("gull", "sky")


# Occlusion and integrated gradients


def test_occlusion_finds_the_one_pixel_that_is_read():
    model = make_model(Pixels((5, 11)))
    found = cnnrnn.explain(picture(), model, path=["sea"], method="occlusion", window=1)
    for step, values in zip(found.steps, found.maps, strict=True):
        assert values[5, 11] == pytest.approx(step.score - step.baseline, abs=1e-4)
        values[5, 11] = 0
        assert not values.any()
    wide = cnnrnn.explain(picture(), model, path=["sea"], method="occlusion", window=4)
    rows, columns = wide.maps[0].nonzero().T
    assert {5, 11} <= {*rows.tolist(), *columns.tolist()}
    assert rows.min() >= 2 and rows.max() <= 8 and columns.min() >= 8 and columns.max() <= 14


def test_integrated_gradients_add_up_to_the_difference_from_the_mean_colour():
    model = make_model(Pixels((5, 11), (0, 3)), activation="tanh")
    found = cnnrnn.explain(picture(seed=3), model, path=["sky", "boat"],
                           method="integrated_gradients")  # fmt: skip
    assert len(found.steps) == 3
    for step, values in zip(found.steps, found.maps, strict=True):
        assert float(values.sum()) == pytest.approx(step.score - step.baseline, abs=1e-3)
        rest = values.clone()
        rest[5, 11] = rest[0, 3] = 0
        assert not rest.any()
        grey = model.backbone(torch.zeros(1, 3, SIDE, SIDE))
        baseline = PathScores(model, ("sky", "boat"), None, average=False)(grey)[0]
        assert step.baseline in [pytest.approx(value, abs=1e-5) for value in baseline.tolist()]


def test_integrated_gradients_of_the_small_network_add_up():
    found = cnnrnn.explain(picture(seed=4), make_model(), path=["boat"], steps=200,
                           method="integrated_gradients")  # fmt: skip
    for step, values in zip(found.steps, found.maps, strict=True):
        whole = step.score - step.baseline
        assert float(values.sum()) == pytest.approx(whole, abs=0.02 * abs(whole) + 0.02)


@pytest.mark.parametrize("method", get_args(Method))
def test_a_call_leaves_the_model_as_it_was(method):
    model = make_model()
    model.backbone.requires_grad_(False)  # frozen, as by default
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        found = cnnrnn.explain(picture(), model, path=["sea"], method=method, steps=2)
    assert not found.maps.requires_grad and found.maps.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Images, models and options


def test_any_image_that_predict_takes(tmp_path):
    model = make_model()
    image = picture(40, 20)
    file = tmp_path / "wide.png"
    image.save(file)
    array = np.asarray(image)
    same = [file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()), image, array,
            torch.from_numpy(array.copy()).permute(2, 0, 1)]  # fmt: skip
    found = [cnnrnn.explain(one, model, path=["sea"]) for one in same]
    assert found[0].source == str(file) and found[2].source == "0"
    for one in found:
        assert one.size == (40, 20)
        assert one.maps.shape == (2, SIDE, SIDE) and one.image.shape == (3, SIDE, SIDE)
        assert torch.equal(one.maps, found[0].maps)
    real = found[0].image.float() / 255
    torch.testing.assert_close(cnnrnn.explain(real, model, path=["sea"]).maps, found[0].maps)


def test_the_demo_model_is_explained():
    found = cnnrnn.explain(picture(64, 64), path=["sky", "sea"])
    assert found.maps.shape == (3, 64, 64)
    assert "recurrent part alone" in found.explained


def test_bad_images_are_refused(tmp_path):
    model = make_model()
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(BadImageError, match="must be a readable image"):
        cnnrnn.explain(tmp_path / "text.jpg", model)
    with pytest.raises(BadImageError, match="no such file"):
        cnnrnn.explain(tmp_path / "missing.jpg", model)
    with pytest.raises(BadImageError, match="max_pixels"):
        cnnrnn.explain(picture(40, 20), model, max_pixels=100)
    with pytest.raises(TypeError, match="image 0 must be a path"):
        cnnrnn.explain([picture()], model)


def test_models_that_cannot_be_explained_are_refused():
    model = make_model()
    features = CNNRNN(model.config, model.label_space, model.head, None)
    with pytest.raises(ValueError, match="trained on feature vectors and has no backbone"):
        cnnrnn.explain(picture(), features)
    with pytest.raises(ValueError, match="got an ensemble of 2"):
        cnnrnn.explain(picture(), Ensemble([model, features]))
    with pytest.raises(ValueError, match="an exported file has none"):
        cnnrnn.explain(picture(), "model.onnx")
    with torch.no_grad():
        model.head.image_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        cnnrnn.explain(picture(), model, path=["sea"])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "attention"}, "method must be one of deconvolution, label_deconvolution"),
        ({"label": "sea"}, "label is for label_deconvolution and other methods, got 'sea'"),
        ({"window": 3}, "window is for method occlusion"),
        ({"window": 16, "method": "occlusion"}, r"window must be in 1\.\.15, got 16"),
        ({"window": 0, "method": "occlusion"}, r"window must be in 1\.\.15, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        (
            {"label": "cow", "method": "occlusion"},
            r"label must be one of the model's \(sky, sea, boat, gull\), got 'cow'",
        ),
        ({"path": ["cow"]}, "path must hold labels of the model"),
        ({"path": ["sea", "sea"]}, "path must hold each label once"),
        ({"path": ["sea"], "known": ["sky"]}, "known and absent are for the search"),
        ({"known": ["cow"]}, "known must hold labels of the model"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        cnnrnn.explain(picture(), make_model(), **options)


def test_a_path_is_a_list():
    with pytest.raises(TypeError, match="path must be a list of label names, got 'sea'"):
        cnnrnn.explain(picture(), make_model(), path="sea")


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_a_missing_extra_is_named(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs captum: pip install "cnnrnn\[explain\]"'):
        cnnrnn.explain(picture(), make_model(), path=["sea"], method=method)
    assert cnnrnn.explain(picture(), make_model(), path=["sea"]).maps.any()


# The picture and the command


def test_the_picture_has_the_images_proportions(tmp_path):
    found = cnnrnn.explain(picture(60, 20), make_model(), path=["sea"])
    found.save(tmp_path / "wide.png")
    tall = cnnrnn.explain(picture(20, 60), make_model(), path=["sea"])
    tall.save(str(tmp_path / "tall.jpg"))
    with Image.open(tmp_path / "wide.png") as wide, Image.open(tmp_path / "tall.jpg") as other:
        assert wide.format == "PNG" and other.format == "JPEG"
        assert other.height > wide.height
        assert np.asarray(wide.convert("L")).std() > 10  # something is drawn
    with pytest.raises(ValueError, match=r"name must end in one of .*png.*, got .*map\.xyz"):
        found.save(tmp_path / "map.xyz")
    with pytest.raises(OSError, match="missing"):
        found.save(tmp_path / "missing" / "map.png")


def test_a_map_is_red_where_it_is_positive_and_blue_where_negative():
    image = np.full((1, 3, 3), 0.5)
    red, blue, none = overlaid(image, np.array([[2.0, -2.0, 0.0]]))[0]
    assert red[0] > red[2] and blue[2] > blue[0]
    assert none.tolist() == [0.5] * 3
    assert overlaid(image, np.zeros((1, 3))).tolist() == image.tolist()


def test_the_command_draws_and_says_what(tmp_path, capsys):
    make_model().save(tmp_path / "run")
    picture(40, 20).save(tmp_path / "image.png")
    out = tmp_path / "attention.png"
    words = ["explain", str(tmp_path / "run"), str(tmp_path / "image.png"), "--out", str(out)]
    assert main(words + ["--path", "sea", "--path", "boat", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["before the first label", "after sea", "after boat"]
    assert lines[3].startswith(f"{out}: deconvolution of the average") and "recurrent" in lines[3]
    with Image.open(out) as drawn:
        assert drawn.width > 200
    occlusion = ["--method", "occlusion", "--label", "boat", "--known", "boat", "--device", "cpu"]
    assert main(words + occlusion) == 0
    assert "before the first label  boat " in capsys.readouterr().out


def test_the_command_fails_with_a_sentence(tmp_path, capsys):
    make_model().save(tmp_path / "run")
    picture().save(tmp_path / "image.png")
    run, image = str(tmp_path / "run"), str(tmp_path / "image.png")
    for words, error in (
        ([run, str(tmp_path / "no.png"), "--out", str(tmp_path / "a.png")], "no such file"),
        ([run, image, "--out", str(tmp_path / "no" / "a.png")], "must be in a folder that exists"),
        ([run, image, "--out", str(tmp_path / "a.xyz")], "name must end in one of"),
        (["model.onnx", image, "--out", str(tmp_path / "a.png")], "an exported file has none"),
        ([run, image, "--out", str(tmp_path / "a.png"), "--path", "cow"], "got 'cow'"),
    ):
        assert main(["explain", *words]) == 1
        assert error in capsys.readouterr().err


# The figures of docs/explain.md


def test_figures_of_a_map_are_those_counted_by_hand():
    values = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 4.0]])
    box = torch.tensor([[True, True, False], [False, False, False]])
    other = torch.tensor([[False, True, True], [False, False, False]])
    found = box_figures(values, box, [other, ~box, box])
    assert found["mass"] == pytest.approx((5 / 10) / (2 / 6))
    assert found["brightest"] == 0.5  # one of the two brightest pixels
    assert found["own"] == [1.0, 1.0]  # 4 above 0; 2.5 above 5/4; itself tells nothing
    even = box_figures(torch.zeros(2, 3), box, [other])
    assert even == {"mass": 1.0, "brightest": pytest.approx(2 / 6), "own": [0.5]}


def test_what_is_lost_is_what_greying_takes():
    model = make_model(Pixels((5, 11), (0, 3)))
    found = cnnrnn.explain(picture(), model, path=["sea"], method="occlusion")
    right, wrong = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    right[5, 11] = right[0, 3] = wrong[9, 9] = 1
    wrong[8] = 1  # a tenth of the pixels, none of those that are read
    wrong[7, :9] = 1
    lost = scores_lost(model, found.image, ["sea"], 0, {"right": right, "wrong": wrong})
    whole = found.steps[0].score - found.steps[0].baseline
    assert lost == {"right": pytest.approx(whole, abs=1e-4), "wrong": pytest.approx(0, abs=1e-5)}
