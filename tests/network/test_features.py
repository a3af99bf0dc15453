"""The cache of a frozen backbone's features: when it is read, and when it must not be."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cnnrnn.config import ModelConfig, Preprocessing
from cnnrnn.data import BadImageError, Dataset
from cnnrnn.network.backbones import Backbone, make_backbone
from cnnrnn.network.features import cached_features, compute_features

COUNT = 5


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "pictures").mkdir()
    random = np.random.default_rng(0)
    paths = []
    for i in range(COUNT):
        paths.append(tmp_path / "pictures" / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(paths[-1])
    labels = np.arange(COUNT, dtype=np.int32) % 2
    return Dataset.from_arrays(
        "test", ("a", "b"), np.arange(COUNT + 1), labels, images=tuple(paths)
    )  # fmt: skip


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    return Backbone("tiny", network, Preprocessing(image_size=8)).eval()


@pytest.fixture
def cached(tmp_path, dataset, backbone):
    """Calls `cached_features` and counts the pictures that went through the backbone."""
    seen = []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))

    def call(dataset=dataset, backbone=backbone, **options):
        seen.clear()
        options = {"device": torch.device("cpu"), "batch_size": 2} | options
        return cached_features(backbone, dataset, tmp_path / "cache", **options), sum(seen)

    return call


def only_file(tmp_path):
    (file,) = (tmp_path / "cache").iterdir()
    return file


def test_second_call_reads(tmp_path, dataset, backbone, cached):
    computed, pictures = cached()
    assert pictures == COUNT
    assert computed.kept.tolist() == list(range(COUNT))
    file = only_file(tmp_path)
    again, pictures = cached()
    assert pictures == 0
    torch.testing.assert_close(again.values, computed.values, rtol=0, atol=0)
    assert again.kept.tolist() == computed.kept.tolist()
    assert only_file(tmp_path) == file  # no partial file beside it


def test_values_are_the_backbones(dataset, backbone, cached, device):
    direct = compute_features(backbone, dataset, device=device, batch_size=COUNT)
    backbone.to("cpu")
    torch.testing.assert_close(cached()[0].values, direct.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_images(backbone, dataset, cached, workers):
    for _ in range(2):
        features, pictures = cached(dataset.select([]), workers=workers)
        assert features.values.shape == (0, backbone.feature_dim) and not len(features.kept)
        assert pictures == 0


def test_a_changed_picture_computes_again(dataset, cached):
    before, _ = cached()
    Image.new("RGB", (20, 20), "red").save(dataset.image_paths[3])
    after, pictures = cached()
    assert pictures == COUNT
    changed = (before.values != after.values).any(1).nonzero()[:, 0].tolist()
    assert changed == [3]


def test_the_time_of_change_counts(dataset, cached):
    cached()
    os.utime(dataset.image_paths[0], ns=(1, 1))
    assert cached()[1] == COUNT


def test_other_records_or_another_order_compute_again(dataset, cached):
    features, _ = cached()
    backwards, pictures = cached(dataset.select([4, 3, 2, 1, 0]))
    assert pictures == COUNT
    torch.testing.assert_close(backwards.values, features.values.flip(0))
    assert cached(dataset.select([0, 1]))[1] == 2


def test_other_preprocessing_computes_again(backbone, cached):
    cached()
    backbone.preprocessing = replace(backbone.preprocessing, mean=(0.5, 0.5, 0.5))
    assert cached()[1] == COUNT


@pytest.mark.parametrize("part", ["parameters", "buffers"])
def test_other_weights_compute_again(backbone, cached, part):
    cached()
    with torch.no_grad():
        next(getattr(backbone, part)()).view(-1)[0] += 1e-3
    assert cached()[1] == COUNT


def damaged(tmp_path, cached, content):
    file = only_file(tmp_path)
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="its features are computed again") as caught:
        result = cached()
    assert str(file) in str(caught[0].message)
    return result


def test_a_truncated_file_is_found_out(tmp_path, cached):
    computed, _ = cached()
    data = only_file(tmp_path).read_bytes()
    for length in (0, 1, 30, len(data) // 2, len(data) - 1):
        again, pictures = damaged(tmp_path, cached, data[:length])
        assert pictures == COUNT
        torch.testing.assert_close(again.values, computed.values)
    assert cached()[1] == 0


def test_a_flipped_byte_is_found_out_or_does_no_harm(tmp_path, cached):
    computed, _ = cached()
    data = only_file(tmp_path).read_bytes()
    found = 0
    for position in range(0, len(data), 29):
        for mask in (0xFF, 0x01):
            flipped = bytearray(data)
            flipped[position] ^= mask
            only_file(tmp_path).write_bytes(flipped)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again, pictures = cached()
            assert (pictures > 0) == bool(caught)  # computed again with a warning, or read
            found += pictures > 0
            torch.testing.assert_close(again.values, computed.values, rtol=0, atol=0)
            assert again.kept.tolist() == computed.kept.tolist()
    assert found > len(data) / 29  # the rest are bytes that zip does not use


def test_other_arrays_under_the_right_name_are_found_out(tmp_path, cached):
    computed, _ = cached()
    file = only_file(tmp_path)
    with np.load(file) as stored:
        arrays = dict(stored)
    wrong = [
        ("values", arrays["values"][:, ::-1]),
        ("values", arrays["values"].view(np.int32)),
        ("values", arrays["values"][:-1]),
        ("kept", arrays["kept"][::-1]),
        ("kept", arrays["kept"] * 1.0),
        ("key", np.array("another")),
    ]
    for name, value in wrong:
        np.savez(file, **arrays | {name: value})
        assert damaged(tmp_path, cached, file.read_bytes())[1] == COUNT
    np.savez(file, values=arrays["values"])
    assert damaged(tmp_path, cached, file.read_bytes())[1] == COUNT
    np.save(tmp_path / "array.npy", arrays["values"])
    assert damaged(tmp_path, cached, (tmp_path / "array.npy").read_bytes())[1] == COUNT


def test_skip_keeps_features_with_their_records(dataset, backbone, cached):
    good, _ = cached()
    data = dataset.image_paths[1].read_bytes()
    dataset.image_paths[1].write_bytes(data[: len(data) // 2])
    kept = [0, 2, 3, 4]
    with pytest.warns(UserWarning, match="1 of 5 images were left out"):
        features, pictures = cached(on_bad_image="skip")
    assert (features.kept.tolist(), pictures) == (kept, 4)
    torch.testing.assert_close(features.values, good.values[kept])

    with pytest.warns(UserWarning, match="1 of 5 images were left out when") as caught:
        again, pictures = cached(on_bad_image="skip")
    assert "1.png" in str(caught[0].message)
    assert (again.kept.tolist(), pictures) == (kept, 0)
    torch.testing.assert_close(again.values, features.values, rtol=0, atol=0)

    # Asked to stop at bad pictures, what skipping left in the cache is not enough.
    with pytest.raises(BadImageError, match="1.png"):
        cached()

    dataset.image_paths[1].write_bytes(data)  # mended: the change is seen
    mended, pictures = cached(on_bad_image="skip")
    assert (mended.kept.tolist(), pictures) == ([0, 1, 2, 3, 4], 5)


def test_a_missing_picture_that_appears_is_seen(dataset, cached):
    data = dataset.image_paths[2].read_bytes()
    dataset.image_paths[2].unlink()
    with pytest.warns(UserWarning, match="1 of 5"):
        assert cached(on_bad_image="skip")[0].kept.tolist() == [0, 1, 3, 4]
    dataset.image_paths[2].write_bytes(data)
    assert cached(on_bad_image="skip")[0].kept.tolist() == [0, 1, 2, 3, 4]


def test_a_path_that_is_no_text(tmp_path, dataset, cached):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    try:
        os.link(dataset.image_paths[0], path)
    except OSError:
        pytest.skip("this file system takes no such name")
    odd = dataset.with_changes(images=(type(tmp_path)(path), *dataset.image_paths[1:]))
    assert cached(odd)[1] == COUNT
    assert cached(odd)[1] == 0


def test_progress_counts_every_picture(dataset, cached):
    from contextlib import nullcontext

    done, told = [], []

    def progress(description, total):
        told.append((description, total))
        return nullcontext(done.append)

    dataset.image_paths[1].write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of 5"):
        cached(on_bad_image="skip", progress=progress)
    assert told == [("features", COUNT)]
    assert sum(done) == COUNT


def test_a_larger_max_pixels_is_not_answered_from_the_cache(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    data = Dataset([tmp_path / "a.png", tmp_path / "b.png"], [["x"], []], max_pixels=600)
    backbone = make_backbone(ModelConfig(backbone="small", image_size=16))
    options = {"device": torch.device("cpu"), "on_bad_image": "skip"}
    with pytest.warns(UserWarning, match="1 of 2 images were left out"):
        assert len(cached_features(backbone, data, tmp_path, **options).kept) == 1
    more = data.with_changes(max_pixels=1600)
    assert len(cached_features(backbone, more, tmp_path, **options).kept) == 2
