"""The examples label image files of every kind as the package does."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image

import cnnrnn
from cnnrnn.config import Preprocessing
from cnnrnn.data.images import decode_image, to_tensor
from cnnrnn.data.sources.scenes import draw_scene
from tests.export.programs import JAVASCRIPT, ROOT, need_node

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PILLOW = int(PIL.__version__.partition(".")[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One scene as files of every kind, wide ones and tall ones."""
    folder = tmp_path_factory.mktemp("kinds")
    scene = draw_scene(np.random.default_rng(3), 160).image.crop((0, 20, 160, 130))
    grey = scene.convert("L")
    palette = scene.convert("P", palette=Image.Palette.ADAPTIVE)
    random = np.random.default_rng(0)
    alpha = Image.fromarray(random.integers(0, 256, (110, 160), dtype=np.uint8))
    clear = scene.copy()
    clear.putalpha(alpha)
    deep = np.asarray(grey, np.uint16) * 257
    deep = (deep // 2 + random.integers(0, 300, deep.shape)).astype(np.uint16)
    pictures = {
        "rgb.png": scene, "rgb.jpg": scene, "rgb.webp": scene, "rgb.tif": scene, "rgb.gif": palette,
        "palette.png": palette, "grey.png": grey, "grey.jpg": grey, "bits.png": scene.convert("1"),
        "rgba.png": clear, "rgba.webp": clear, "la.png": clear.convert("LA"),
        "grey16.png": Image.fromarray(deep), "grey16.tif": Image.fromarray(deep),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(folder / name)
    palette.save(folder / "clear palette.png", transparency=bytes(range(256)))
    scene.save(folder / "clear colour.png", transparency=scene.getpixel((5, 5)))
    for orientation in range(1, 9):
        tag = Image.Exif()
        tag[ExifTags.Base.Orientation] = orientation
        scene.save(folder / f"exif {orientation}.jpg", exif=tag)
        scene.save(folder / f"exif {orientation}.png", exif=tag)
    return sorted(map(str, folder.iterdir()))


def printed(command, **options):
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# Python


def only(*distributions, at):
    """Make a folder with these distributions and what they require, as links; no others."""
    wanted, seen = list(distributions), set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for entry in {Path(str(f)).parts[0] for f in distribution.files or ()} - {".."}:
            target = Path(str(distribution.locate_file(entry)))
            if entry != "__pycache__" and target.exists() and not (at / entry).exists():
                (at / entry).symlink_to(target)
        for requirement in distribution.requires or ():
            if ";" not in requirement:
                wanted.append(requirement.split(">")[0].split("<")[0].split("=")[0].strip())
    return at


def test_the_python_example_needs_no_torch(demo_file, files, tmp_path):
    runtime = next(
        name for name in ("onnxruntime-gpu", "onnxruntime")
        if any(d.metadata["Name"] == name for d in importlib.metadata.distributions())
    )  # fmt: skip
    packages = only(runtime, "numpy", "pillow", at=tmp_path)
    environment = {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c"]
    there = subprocess.run([*command, "import torch"], env=environment, capture_output=True)
    assert there.returncode, "torch is in what should be without it"
    program = str(ROOT / "examples" / "predict_onnx.py")
    lines = printed([sys.executable, "-S", program, str(demo_file), *files], env=environment)
    expected = [f"{p.source} {p.labels}" for p in cnnrnn.predict(files)]
    assert [line.rpartition(" ")[0] for line in lines] == expected
    assert len(set(expected)) > 1


def test_the_python_example_decodes_drafts(tmp_path):
    model = cnnrnn.load()
    model.backbone.preprocessing = replace(model.backbone.preprocessing, jpeg_draft=True)
    cnnrnn.export_onnx(model, tmp_path / "model.onnx", loop=True)
    scenes = [draw_scene(np.random.default_rng(seed), 500).image for seed in range(4)]
    files = [str(tmp_path / f"{i}.jpg") for i in range(4)]
    for file, scene, width in zip(files, scenes, (500, 463, 301, 129), strict=True):
        tag = Image.Exif()
        tag[ExifTags.Base.Orientation] = 6
        scene.resize((width, 400)).save(file, exif=tag)
    program = str(ROOT / "examples" / "predict_onnx.py")
    lines = printed([sys.executable, program, str(tmp_path / "model.onnx"), *files])
    for line, prediction in zip(lines, model.predict(files), strict=True):
        before, _, log_prob = line.rpartition(" ")
        assert before == f"{prediction.source} {prediction.labels}"
        assert float(log_prob) == pytest.approx(prediction.log_prob, abs=2e-3)


# JavaScript

PIXELS = """
const { readSquare } = await import(process.argv[1]);
const [side, interpolation, ...files] = process.argv.slice(2);
for (const file of files) {
  const pixels = await readSquare(file, Number(side), interpolation);
  console.log(Buffer.from(pixels).toString("base64"));
}
"""


@pytest.mark.parametrize("side", [64, 100, 224])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_in_javascript_are_those_of_the_package(files, side, interpolation):
    need_node()
    command = ["node", "--input-type=module", "-e", PIXELS, str(JAVASCRIPT / "pictures.mjs")]
    lines = printed([*command, str(side), interpolation, *files])
    preprocessing = Preprocessing(image_size=side, interpolation=interpolation)
    # Before 13, Pillow resized the width of tall images first, too.
    most = 0 if PILLOW >= 13 else 8
    for file, line in zip(files, lines, strict=True):
        found = np.frombuffer(base64.b64decode(line), np.uint8).reshape(side, side, 3)
        expected = to_tensor(decode_image(file), preprocessing).permute(1, 2, 0).numpy()
        assert abs(found.astype(int) - expected).max() <= most, file


@pytest.mark.parametrize("decide", ["path", "threshold", "label_thresholds"])
def test_the_javascript_example_gives_the_labels_of_predict(demo_file, files, decide):
    need_node()
    program = str(JAVASCRIPT / "predict.mjs")
    lines = printed(["node", program, str(demo_file), *files, "--decide", decide])
    for line, prediction in zip(lines, cnnrnn.predict(files, decide=decide), strict=True):
        source, _, rest = line.partition(" [")
        labels, _, log_prob = f"[{rest}".rpartition(" ")
        assert source == prediction.source and json.loads(labels) == prediction.labels
        if decide == "path":
            assert float(log_prob) == pytest.approx(prediction.log_prob, abs=2e-4)
