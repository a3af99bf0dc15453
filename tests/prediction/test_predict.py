"""Prediction: kinds of input, order, streaming, bad images, options and views of the result."""

from __future__ import annotations

import copy
import gc
import io
import math
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrnn
from cnnrnn import BadImageError, DataError, ModelConfig, SearchConfig
from cnnrnn.api import DEMO_MODEL, predict_features
from cnnrnn.config import Calibration
from cnnrnn.labels import LabelSpace
from cnnrnn.metrics import best_k
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.backbones import make_backbone
from cnnrnn.network.head import Head
from cnnrnn.prediction.decisions import calibrate, decided_sets
from cnnrnn.search import NonFiniteError
from cnnrnn.search.inference import infer, mixed_scores

NAMES = ("sky", "sea", "boat", "cow", "buoy")
SIDE = 16


def make_model(chain_term=True, order="increasing", feature_dim=None):
    """A random model whose answers depend on the picture."""
    torch.manual_seed(2)
    config = ModelConfig(backbone="small", image_size=SIDE, trunk_dim=0, joint_dim=8, hidden_dim=8,
                         chain_term=chain_term)  # fmt: skip
    backbone = None if feature_dim else make_backbone(config)
    head = Head.from_config(config, len(NAMES), feature_dim or backbone.feature_dim)
    head.max_labels = 3
    with torch.no_grad():
        head.image_projection.weight.mul_(8)
        head.label_embedding.mul_(3)
        if chain_term:
            head.label_classifier.weight.mul_(8)
    search = SearchConfig(beam_size=6, order=order)
    return CNNRNN(config, LabelSpace.given(NAMES), head, backbone, search, Calibration(0.4, 0.25))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def arrays():
    """Seventeen pictures [17, S, S, 3] that the model tells apart."""
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (17, 1, 1, 3))
    noise = random.integers(-60, 61, (17, SIDE, SIDE, 3))
    return (base + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path, arrays):
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for i, array in enumerate(arrays):
        name = f"{i:02d}.png" if i < 10 else f"more/{i:02d}.PNG"
        Image.fromarray(array).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def answers(predictions):
    return [(p.labels, round(p.log_prob, 4)) for p in predictions]


def test_the_model_tells_the_pictures_apart(model, arrays):
    found = {str(p.labels) for p in model.predict(arrays)}
    assert len(found) > 3  # else the tests below compare constants


def test_every_kind_of_input_gives_the_same_answer(model, arrays, folder):
    expected = answers(model.predict(arrays))
    pictures = [Image.fromarray(array) for array in arrays]
    channels_first = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    files = sorted(folder.rglob("*.[pP]*"))
    kinds = {
        "folder": folder,
        "folder by name": str(folder),
        "paths": files,
        "names": [str(file) for file in files],
        "PIL images": pictures,
        "arrays": list(arrays),
        "uint8 tensor": channels_first,
        "float tensor": channels_first / 255,
        "double tensor": channels_first.double() / 255,
        "tensors": list(channels_first),
        "tuple of batches": (arrays[:3], channels_first[3:]),
        "mixture": [files[0], pictures[1], arrays[2], channels_first[3], channels_first[4] / 255,
                    [pictures[5], arrays[6:]]],
        "not contiguous": np.ascontiguousarray(arrays[:, :, ::-1])[:, :, ::-1],
        "generator": (array for array in arrays),
    }  # fmt: skip
    for kind, images in kinds.items():
        assert answers(model.predict(images)) == expected, kind
    singles = [folder / "00.png", str(folder / "00.png"), pictures[0], arrays[0],
               channels_first[0], channels_first[0] / 255]  # fmt: skip
    for image in singles:
        assert answers(cnnrnn.predict(image, model)) == expected[:1]


def test_pictures_of_another_size_and_mode_are_brought_to_the_models(model, arrays):
    large = [Image.fromarray(array).resize((37, 53), Image.Resampling.NEAREST) for array in arrays]
    from_pil = model.predict(large)
    for image, mode in ((large[0], "RGBA"), (large[0], "RGBX")):
        assert answers(model.predict(image.convert(mode))) == answers(from_pil[:1])
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in large]
    assert answers(model.predict(tensors)) == answers(from_pil)
    floats = model.predict([tensor / 255 for tensor in tensors])  # resized without rounding
    for one, other in zip(from_pil, floats, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=0.2)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_order_is_kept_across_batches(model, arrays, batch_size):
    expected = [answers(model.predict(array))[0] for array in arrays]
    predictions = model.predict(arrays, batch_size=batch_size)
    assert answers(predictions) == expected
    assert [p.source for p in predictions] == [str(i) for i in range(17)]


def test_sources_of_files_are_their_paths_in_order(model, folder):
    found = [p.source for p in model.predict([folder / "03.png", folder])]
    assert found[0] == str(folder / "03.png")
    assert found[1:] == sorted(str(p) for p in folder.rglob("*.[pP][nN]*"))


@pytest.mark.parametrize(
    "nothing",
    [[], (), np.empty((0, 9, 9, 3), np.uint8), torch.empty(0, 3, 9, 9), iter(()), [[], []]],
    ids=["list", "tuple", "array", "tensor", "iterator", "nested"],
)
def test_no_images_no_predictions(model, nothing):
    assert model.predict(nothing) == []


def test_a_stream_reads_one_batch_ahead(model, arrays):
    taken = []

    def camera():
        position = 0
        while True:
            taken.append(position)
            yield arrays[position % 17]
            position += 1

    stream = cnnrnn.predict_iter(camera(), model, batch_size=4)
    assert taken == []
    first = [next(stream)]
    assert len(taken) == 4
    first += [next(stream) for _ in range(3)]
    assert len(taken) == 4
    first.append(next(stream))
    assert len(taken) == 8
    assert answers(first) == answers(model.predict(arrays[:5]))


def test_device(model, arrays, device):
    predictions = make_model().predict(arrays, device=str(device))
    assert [p.labels for p in predictions] == [p.labels for p in model.predict(arrays)]


def test_a_model_that_trains_is_put_in_eval_mode(arrays, model):
    training = make_model().train()
    assert answers(training.predict(arrays)) == answers(model.predict(arrays))


def test_a_checkpoint_folder_stands_for_its_model(tmp_path, model, arrays):
    model.save(tmp_path / "run" / "best")
    for name in (tmp_path / "run" / "best", str(tmp_path / "run")):
        assert answers(cnnrnn.predict(arrays, name, device="cpu")) == answers(model.predict(arrays))


def test_one_picture_that_comes_twice_is_loaded_once(model, tmp_path, arrays):
    Image.fromarray(arrays[0]).resize((300, 200)).save(tmp_path / "a.jpg")
    for _ in range(5):
        lazy = Image.open(tmp_path / "a.jpg")
        found = model.predict([lazy] * 8, workers=8)
        assert len({p.log_prob for p in found}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_what_came_before_an_error_is_answered(model, arrays, tmp_path, workers):
    def source():
        yield from arrays[:10]
        raise KeyError("no more")

    found = []
    with pytest.raises(KeyError, match="no more"):
        for prediction in cnnrnn.predict_iter(source(), model, batch_size=4, workers=workers):
            found.append(prediction)
    assert answers(found) == answers(model.predict(arrays[:10]))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = []
    with pytest.raises(BadImageError, match="broken.png"):
        images = [*arrays[:7], tmp_path / "broken.png", *arrays[7:]]
        for prediction in cnnrnn.predict_iter(images, model, batch_size=4, workers=workers):
            found.append(prediction)
    assert answers(found) == answers(model.predict(arrays[:7]))


def test_workers_change_nothing_and_leave_no_thread(model, arrays):
    before = threading.active_count()
    for workers in (0, 1, 3):
        found = model.predict(list(arrays), workers=workers, batch_size=5)
        assert answers(found) == answers(model.predict(arrays))
    stream = cnnrnn.predict_iter(list(arrays), model, workers=3, batch_size=2)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        model.predict(arrays, workers=-1)


def test_batches_in_several_threads_come_in_order(model, arrays):
    """With two threads of torch two batches are computed at once, each on one."""
    expected = answers(model.predict(arrays, workers=0))
    running, at_once = [], []
    own = model.infer

    def watched(*arguments):
        running.append(torch.get_num_threads())
        at_once.append(len(running))
        time.sleep(0.02)
        found = own(*arguments)
        assert running.pop() == 1
        return found

    torch.set_num_threads(2)
    try:
        model.infer = watched
        assert answers(model.predict(list(arrays), workers=3, batch_size=2)) == expected
        assert max(at_once) == 2
        assert torch.get_num_threads() == 2
        stream = cnnrnn.predict_iter(list(arrays), model, workers=2, batch_size=2)
        next(stream)
        stream.close()
        assert torch.get_num_threads() == 2
    finally:
        del model.infer
        torch.set_num_threads(1)


def test_a_compiled_backbone_is_compiled_once_and_let_go(model, arrays):
    copied = copy.deepcopy(model)
    expected = model.predict(arrays)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        found = copied.predict(arrays, compiled=True)
    frames = torch._dynamo.utils.counters["frames"]
    assert 1 <= frames["ok"] <= 2  # the second one for any number of pictures
    assert [p.labels for p in found] == [p.labels for p in expected]
    gone = weakref.ref(copied.backbone)
    del copied, found
    gc.collect()
    assert gone() is None


def test_half_precision_and_compiled_backbones(model, arrays):
    expected = model.predict(arrays)
    for precision in ("bf16", "auto"):
        for mine, theirs in zip(model.predict(arrays, precision=precision), expected, strict=True):
            assert mine.scores == pytest.approx(theirs.scores, abs=0.05)
    compiled = model.predict(arrays, compiled=True)
    for mine, theirs in zip(compiled, expected, strict=True):
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)
    with pytest.raises(ValueError, match="precision must be fp32, bf16 or auto, got 'fp8'"):
        model.predict(arrays, precision="fp8")


# Bad images


@pytest.fixture
def broken(folder):
    """The folder with picture 01 cut short and 02 gone from a list of three."""
    data = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(data[: len(data) // 2])
    return [folder / "00.png", folder / "01.png", folder / "missing.png", folder / "03.png"]


def test_a_bad_image_stops(model, broken):
    with pytest.raises(BadImageError, match="01.png must be a readable image, found: "):
        model.predict(broken)
    with pytest.raises(BadImageError, match="missing.png must be a readable image, found: no such"):
        model.predict(broken[2])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_bad_image_is_skipped_in_its_place(model, broken, batch_size):
    predictions = model.predict(broken, on_bad_image="skip", batch_size=batch_size)
    good = model.predict([broken[0], broken[3]])
    assert [p.source for p in predictions] == [str(path) for path in broken]
    assert answers([predictions[0], predictions[3]]) == answers(good)
    for bad in predictions[1:3]:
        assert bad.source in bad.error
        assert (bad.labels, bad.scores, bad.paths, bad.sets) == ([], {}, [], [])
        assert math.isnan(bad.log_prob)
        assert "error=" in repr(bad)
    assert predictions[0].error is None


def test_only_bad_images(model, broken):
    predictions = model.predict(broken[1:3], on_bad_image="skip")
    assert len(predictions) == 2 and all(p.error for p in predictions)


def test_a_pil_image_is_decoded_late_and_may_turn_out_bad(model, arrays, folder):
    data = (folder / "01.png").read_bytes()
    images = [arrays[0], Image.open(io.BytesIO(data[: len(data) // 2])), arrays[2]]
    predictions = model.predict(images, on_bad_image="skip")
    assert [p.error is None for p in predictions] == [True, False, True]
    images[1] = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(BadImageError, match="image 1 must be a readable image, found: "):
        model.predict(images)
    for odd in (Image.new("F", (4, 4)), Image.new("RGB", (0, 4))):
        with pytest.raises(BadImageError, match="image 0 must be a readable image, found: "):
            model.predict(odd)


def test_an_empty_folder(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no pictures"):
        model.predict(tmp_path / "empty")


@pytest.mark.parametrize("images", [None, 3, bytearray(b"x"), {"a": 1}, {"a.png"}, object()])
def test_other_types_are_refused(model, images):
    with pytest.raises(TypeError) as error:
        model.predict(images)
    assert str(error.value) == (
        "images must be a path, a folder, bytes or an open file, a PIL image, an array, a tensor, "
        f"or a list of these, got {type(images).__name__}"
    )


@pytest.mark.parametrize("odd", [None, 3, bytearray(b"x"), {"a": 1}])
def test_an_item_of_another_type_is_named_by_position(model, arrays, odd):
    with pytest.raises(TypeError) as error:
        model.predict([arrays[0], arrays[1:3], odd])
    assert str(error.value) == (
        "image 3 must be a path, bytes or an open file, a PIL image, an array or a tensor, "
        f"got {type(odd).__name__}"
    )


def test_bytes_and_open_files(model, folder):
    files = sorted(folder.glob("*.png"))[:2]
    expected = model.predict(files)
    data = [file.read_bytes() for file in files]
    with open(files[0], "rb") as first, open(files[1], "rb") as second:
        second.read(10)  # read from its start all the same
        given = [data, [first, second], [io.BytesIO(one) for one in data], [first, first, second]]
        for images in given:
            found = model.predict(images)
            for one, other in zip(found, [expected[0]] * (len(found) - 2) + expected, strict=True):
                assert one.scores == pytest.approx(other.scores) and one.labels == other.labels
        assert [p.source for p in model.predict([first, data[1]])] == ["0", "1"]
        assert len(model.predict(first)) == len(model.predict(data[0])) == 1
    with pytest.raises(BadImageError, match="image 1 must be a readable image, found: no image in"):
        model.predict([data[0], b"no picture"])
    assert model.predict([b"no picture"], on_bad_image="skip")[0].error is not None


def test_droppings_are_no_pictures(model, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("._a.png", ".hidden/b.png", "__MACOSX/c.png", ".ipynb_checkpoints/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    assert [p.source for p in model.predict(tmp_path)] == [str(tmp_path / "a.png")]


def test_arrays_and_tensors_of_another_shape_or_type(model):
    u8 = np.uint8
    for array, shown in (
        (np.zeros((4, 4), u8), "[4, 4] of uint8"),
        (np.zeros((4, 4, 4), u8), "[4, 4, 4] of uint8"),
        (np.zeros((3, 8, 8), u8), "[3, 8, 8] of uint8"),
        (np.zeros((0, 4, 3), u8), "[0, 4, 3] of uint8"),
        (np.zeros((4, 4, 3), np.float32), "[4, 4, 3] of float32"),
        (np.zeros((1, 1, 4, 4, 3), u8), "[1, 1, 4, 4, 3] of uint8"),
        (np.array(3, u8), "[] of uint8"),
    ):
        with pytest.raises(ValueError) as error:
            model.predict(array)
        message = f"image 0 must be an array [H, W, 3] of uint8 RGB, got {shown}"
        assert str(error.value) == message
    for tensor, message in (
        (torch.zeros(4, 4), "must be a tensor [3, H, W], got [4, 4]"),
        (torch.zeros(8, 8, 3), "must be a tensor [3, H, W], got [8, 8, 3]"),
        (torch.zeros(3, 0, 8), "must be a tensor [3, H, W], got [3, 0, 8]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "must be uint8 or float in 0..1, got torch.int6"),
        (torch.full((3, 8, 8), 255.0), "must be float in 0..1, got values from 255 to 255"),
        (torch.full((3, 8, 8), -0.5), "must be float in 0..1, got values from -0.5 to -0.5"),
        (torch.full((3, 8, 8), math.nan), "must be float in 0..1, got values from nan to nan"),
    ):
        with pytest.raises(ValueError) as error:
            model.predict([torch.zeros(3, 8, 8), tensor])
        assert f"image 1 {message}" in str(error.value)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"beam_size": 0}, "beam_size must be in 1..16, got 0"),
        ({"beam_size": 17}, "beam_size must be in 1..16, got 17"),
        ({"min_labels": -1}, "min_labels must be at least 0, got -1"),
        ({"min_labels": 4}, "min_labels (4) must not exceed max_labels (3)"),
        (
            {"decide": "vote"},
            "decide must be one of path, threshold, label_thresholds, k, f1, got 'vote'",
        ),
        ({"threshold": math.nan}, "threshold must be a finite number, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be error or skip, got 'ignore'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_options_are_checked(model, arrays, options, message):
    with pytest.raises(ValueError) as error:
        model.predict(arrays, **options)
    assert str(error.value) == message


def test_a_model_without_backbone_reads_no_images(arrays):
    with pytest.raises(ValueError, match=r"use model.predict_features\(features\)"):
        make_model(feature_dim=7).predict(arrays)


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
def test_top_k_keeps_the_best_scored_of_the_set(model, arrays, top_k):
    whole, cut = model.predict(arrays), model.predict(arrays, top_k=top_k)
    for before, after in zip(whole, cut, strict=True):
        best = sorted(before.labels, key=lambda name: -before.scores[name])[:top_k]
        assert after.labels == [name for name in NAMES if name in best]
        assert after.paths == before.paths


@pytest.mark.parametrize("least", [0, 1, 3])
def test_min_labels(arrays, least):
    for order in ("increasing", "unique"):
        for prediction in make_model(order=order).predict(arrays, min_labels=least):
            for path, _ in prediction.paths:
                # An increasing path that has reached the last label has nowhere else to go.
                assert len(path) >= least or (order == "increasing" and path[-1] == NAMES[-1])


def test_without_min_labels_paths_may_be_shorter(arrays):
    assert min(len(p.labels) for p in make_model(order="unique").predict(arrays)) < 3


def test_threshold_decisions(model, arrays):
    by_calibration = model.predict(arrays, decide="threshold")
    for prediction in by_calibration:
        assert prediction.labels == [n for n in NAMES if prediction.scores[n] >= 0.4]
    for prediction in model.predict(arrays, threshold=0.7):
        assert prediction.labels == [n for n in NAMES if prediction.scores[n] >= 0.7]
    assert all(p.labels == list(NAMES) for p in model.predict(arrays, threshold=0.0))
    assert not any(p.labels for p in model.predict(arrays, threshold=1.5))
    cut = model.predict(arrays, threshold=0.0, top_k=2)
    assert {len(p.labels) for p in cut} == {2}


def test_decisions_by_each_labels_threshold_and_by_k(model, arrays):
    cuts = dict(zip(NAMES, torch.linspace(0.2, 0.6, len(NAMES)).tolist(), strict=True))
    model.calibration = Calibration(0.4, 0.25, tuple(cuts.values()), k=2)
    for prediction in model.predict(arrays, decide="label_thresholds"):
        assert prediction.labels == [n for n in NAMES if prediction.scores[n] >= cuts[n]]
    for prediction in model.predict(arrays, decide="k"):
        best = sorted(NAMES, key=lambda n: -prediction.scores[n])[:2]
        assert prediction.labels == [n for n in NAMES if n in best]
    model.calibration = Calibration(0.4, 0.25)  # one that was never calibrated label by label
    common = model.predict(arrays, decide="threshold")
    for one, other in zip(model.predict(arrays, decide="label_thresholds"), common, strict=True):
        assert one.labels == other.labels


def test_beam_size(model, arrays):
    assert {len(p.paths) for p in model.predict(arrays, beam_size=1)} == {1}
    assert {len(p.paths) for p in model.predict(arrays, beam_size=6)} == {6}


# Views


@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_views_agree(arrays, order):
    for prediction in make_model(order=order).predict(arrays):
        (first, log_prob), *_ = prediction.paths
        assert log_prob == prediction.log_prob
        assert prediction.labels == [name for name in NAMES if name in first]
        log_probs = [p for _, p in prediction.paths]
        assert log_probs == sorted(log_probs, reverse=True)
        sums = {}
        for path, p in prediction.paths:
            sums[frozenset(path)] = sums.get(frozenset(path), 0.0) + math.exp(p)
        assert dict(prediction.sets) == pytest.approx(sums)
        assert len(prediction.sets) == len(sums)
        probabilities = [p for _, p in prediction.sets]
        assert probabilities == sorted(probabilities, reverse=True)
        if order == "increasing":
            assert len(prediction.sets) == len(prediction.paths)
        assert list(prediction.scores) == list(NAMES)
        assert all(0 <= score <= 1 for score in prediction.scores.values())


def test_orders_of_a_set_meet_in_some_picture(arrays):
    merged = [len(p.paths) - len(p.sets) for p in make_model(order="unique").predict(arrays)]
    assert max(merged) > 0


def test_repr_shows_labels_and_not_the_batch(model, arrays):
    prediction = model.predict(arrays[0])[0]
    assert repr(prediction) == (
        f"Prediction('0', labels={prediction.labels}, log_prob={prediction.log_prob:.4f})"
    )
    assert prediction in [prediction]  # comparing compares no tensors


def test_scores_mix_marginals_with_the_chain_term(model, arrays):
    features = torch.randn(5, model.head.feature_dim)
    with torch.no_grad():
        embedding, own = model.head.embed_with_label_scores(features)
    marginals = cnnrnn.beam_search(model.head, embedding, model.search, marginals=True).marginals()
    logits = 0.75 * marginals.clamp(1e-7, 1 - 1e-7).logit() + 0.25 * own
    found = [list(p.scores.values()) for p in model.predict_features(features)]
    torch.testing.assert_close(torch.tensor(found), logits.sigmoid())


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_mixing_by_hand(weight):
    marginals, own = torch.tensor([[0.2, 0.9, 0.0]]), torch.tensor([[1.0, -2.0, 0.5]])
    mixed = mixed_scores(marginals, own, weight)
    expected = {0.0: marginals, 1.0: own.sigmoid()}.get(weight)
    if expected is None:
        odds = (torch.tensor([[0.2, 0.9, 1e-7]]) / torch.tensor([[0.8, 0.1, 1 - 1e-7]])) ** 0.75
        odds = odds * (0.25 * own).exp()
        expected = odds / (1 + odds)
    torch.testing.assert_close(mixed, expected)
    assert torch.equal(mixed_scores(marginals, None, weight), marginals)


def test_calibration_chooses_what_separates():
    # Labels are the sign of the chain term's own score: mixing it in with weight 1 is perfect.
    torch.manual_seed(0)
    head = make_model(feature_dim=7).head.eval()
    features = torch.randn(200, 7)
    inference = infer(head, features, SearchConfig(beam_size=2))
    targets = inference.label_scores > 0
    calibration = calibrate(inference, targets)
    sets = inference.mixed(calibration.mix_weight) >= calibration.threshold
    assert torch.equal(sets, targets)
    by_label = decided_sets(
        "label_thresholds", inference, inference.mixed(calibration.mix_weight), calibration
    )
    assert torch.equal(by_label, targets)
    assert calibration.k == best_k(inference.mixed(calibration.mix_weight), targets)[0]
    plain = infer(make_model(False, feature_dim=7).head.eval(), features, SearchConfig())
    assert calibrate(plain, targets).mix_weight == 0.0


# Feature vectors


@pytest.mark.parametrize("count", [0, 1, 17])
def test_predict_features(count):
    model = make_model(feature_dim=7)
    features = torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    predictions = model.predict_features(features)
    assert [p.source for p in predictions] == [str(i) for i in range(count)]
    assert answers(predict_features(features.numpy().astype(np.float64), model)) == answers(
        predictions
    )
    for row, prediction in enumerate(predictions):
        assert answers(model.predict_features(features[row : row + 1])) == answers([prediction])


def test_features_of_another_width():
    with pytest.raises(ValueError, match=r"features must be \[B, 7\], got \[2, 6\]"):
        make_model(feature_dim=7).predict_features(torch.zeros(2, 6))


def test_searches_longer_than_a_slice(monkeypatch):
    model = make_model(feature_dim=7)
    features = torch.randn(17, 7, generator=torch.Generator().manual_seed(0))
    whole = [(answers([p]), p.scores) for p in model.predict_features(features)]
    monkeypatch.setattr("cnnrnn.search.inference.SEARCH_BATCH", 5)
    sliced = model.predict_features(features)
    for prediction, (answer, scores) in zip(sliced, whole, strict=True):
        assert answers([prediction]) == answer
        assert prediction.scores == pytest.approx(scores, abs=1e-5)
        assert [path for path, _ in prediction.paths][0] == tuple(prediction.labels)
    features[[6, 16]] = math.inf
    with pytest.raises(NonFiniteError, match=r"1 of 17 images .* \(index 6\)"):
        model.predict_features(features)


def test_weights_that_are_not_finite_name_the_images(arrays, folder):
    broken = make_model()
    with torch.no_grad():
        broken.head.image_projection.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite for 2 images .*00.png.*01.png.*check its wei"):
        broken.predict([folder / "00.png", folder / "01.png"])


# Whole processes

NO_NETWORK = """
import sys
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        raise AssertionError(f"{event} {arguments}")
sys.addaudithook(audit)
import numpy
import cnnrnn
picture = numpy.zeros((20, 20, 3), numpy.uint8)
predictions = cnnrnn.predict([picture, picture], sys.argv[1] if sys.argv[1:] else None)
assert len(predictions) == 2
for module in ("timm", "torchvision", "pycocotools"):
    assert module not in sys.modules, module
print("quiet")
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


def test_prediction_opens_no_connection(tmp_path, model):
    model.save(tmp_path / "model")
    run = run_python(NO_NETWORK, tmp_path / "model")
    assert run.stdout.strip() == "quiet", run.stderr


@pytest.mark.skipif(not DEMO_MODEL.is_dir(), reason="this checkout has no demo model")
def test_the_demo_model(capsys):
    run = run_python(NO_NETWORK)
    assert run.stdout.strip() == "quiet", run.stderr
    assert run.stderr.count("no model named, so the demo model answers") == 1
    model = cnnrnn.load()
    assert "sky" in model.labels and model.backbone.name == "small"
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 5_000_000


def test_a_search_option_of_the_model_is_its_own(model, arrays):
    other = make_model()
    other.search = replace(other.search, min_labels=2)
    assert min(len(p.labels) for p in other.predict(arrays)) >= 2
    assert model.search.min_labels == 0
