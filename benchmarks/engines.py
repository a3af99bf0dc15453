"""JPEG files to labels, by engine: `python -m benchmarks.engines --images FOLDER --out FILE.json`.

FOLDER holds photographs, which are written anew at the sizes that are measured. All of one part
takes turns, on the CPU, a thread per core; figures are medians of the turns, images per second.

- photographs of 500 pixels through the animals model, beside timm's own loop: two worker processes
  that decode, channels last;
- backbones with random weights: `predict`, beside the engine alone on images in memory;
- photographs of 12 megapixels, decoded at full size and by JPEG drafts, and the labels of both;
- feature extraction beside `predict`;
- label sets of the engines against torch's.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
from PIL import Image
from torch import Tensor, nn

import cnnrnn
from benchmarks.conftest import processor
from cnnrnn import Dataset, Head, ModelConfig
from cnnrnn.config import Backend, Precision
from cnnrnn.data.images import IMAGE_SUFFIXES, decode_image, to_tensor
from cnnrnn.labels import LabelSpace
from cnnrnn.machine.devices import has_bf16, usable_cores
from cnnrnn.machine.files import write_whole
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.backbones import make_backbone
from cnnrnn.network.engines import BackboneRunner
from cnnrnn.network.features import compute_features
from cnnrnn.prediction.result import Prediction

CPU = torch.device("cpu")
BATCH = 64
RANDOM = ("resnet50", "convnext_tiny", "vit_small_patch16_224")
WAYS: tuple[tuple[Backend, Precision], ...] = (
    ("torch", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("torch", "bf16"),
    ("openvino", "bf16"),
)  # fmt: skip


def ways() -> list[tuple[Backend, Precision]]:
    """The engines and precisions that this machine has."""
    return [way for way in WAYS if way[1] == "fp32" or has_bf16(CPU)]


def photographs(
    source: Sequence[Path], folder: Path, count: int, side: int, landscape: bool = False
) -> list[Path]:
    """Write photographs of a larger side, some of them several times."""
    folder.mkdir()
    made = []
    for i, file in zip(range(count), itertools.cycle(source), strict=False):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        size = (side, side * 3 // 4)
        if not landscape:
            scale = side / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
        made.append(folder / f"{i:04}.jpg")
        image.resize(size, Image.Resampling.BICUBIC).save(made[-1], quality=90)
    return made


def by_turns(ways: dict[str, Callable[[], int]], turns: int) -> dict[str, float]:
    """Return images per second of each way: medians over turns, after a first one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for turn in range(turns + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            counts[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: counts[name] / statistics.median(found) for name, found in seconds.items()}


class Files(torch.utils.data.Dataset[Tensor]):
    """Pictures as timm's loader reads them: PIL, timm's transform of the model."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def timm_loop(network: nn.Module, width: int, files: Sequence[Path]) -> int:
    """Run timm's usual loop: loader with two workers, channels last, a sigmoid at the end."""
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    classifier = nn.Linear(width, 20)
    loader = torch.utils.data.DataLoader(Files(files, transform), BATCH, num_workers=2)
    found = 0
    with torch.inference_mode():
        for images in loader:
            features = network(images.contiguous(memory_format=torch.channels_last))
            found += len(classifier(features).sigmoid() > 0.5)
    return found


def random_model(name: str) -> CNNRNN:
    """Return a model with random weights over a backbone of timm."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=name, pretrained=False, trunk_dim=0)
    backbone = make_backbone(config)
    labels = LabelSpace.given(tuple(f"label {i}" for i in range(80)))
    head = Head.from_config(config, len(labels), backbone.feature_dim)
    head.max_labels = 8
    return CNNRNN(config, labels, head, backbone).eval()


def engine_alone(model: CNNRNN, images: list[Tensor], way: tuple[Backend, Precision]) -> int:
    """Run a batch per thread on images in memory."""
    assert model.backbone is not None
    run = BackboneRunner(model.backbone, CPU, backend=way[0], precision=way[1])
    run.prepare(len(images))
    threads = torch.get_num_threads()
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        found = sum(map(len, pool.map(run, batches)))
    torch.set_num_threads(threads)
    return found


def predicted(model: CNNRNN, files: Sequence[Path], way: tuple[Backend, Precision]) -> int:
    """Run `predict`."""
    return len(model.predict(list(files), backend=way[0], precision=way[1], batch_size=BATCH))


def named(way: tuple[Backend, Precision]) -> str:
    """Name a way in the results."""
    return " ".join(way)


def agreement(
    model: CNNRNN, files: Sequence[Path], way: tuple[Backend, Precision], of: Precision
) -> dict[str, int]:
    """Count the images whose set is torch's; of the others those that tie within 1e-4."""
    expected = model.predict(list(files), backend="torch", precision=of)
    found = model.predict(list(files), backend=way[0], precision=way[1])
    equal = ties = 0
    for a, b in zip(found, expected, strict=True):
        equal += set(a.labels) == set(b.labels)
        if set(a.labels) != set(b.labels):
            near = [p for p in b.paths[1:] if abs(p[1] - b.paths[0][1]) < 1e-4]
            ties += any(set(p[0]) == set(a.labels) for p in near)
    return {"images": len(files), "equal": equal, "ties": ties}


def files_to_labels(model: CNNRNN, files: Sequence[Path], turns: int) -> dict[str, float]:
    """Time `predict` of the animals model by engine, and timm's loop."""
    assert model.backbone is not None
    network = copy.deepcopy(model.backbone.network).to(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], int]] = {
        "timm": partial(timm_loop, network, model.feature_dim, files)
    }
    for way in ways():
        predicted(model, files[:2], way)  # exports, and what a first run costs
        runs[named(way)] = partial(predicted, model, files, way)
    return by_turns(runs, turns)


def feature_extraction(model: CNNRNN, files: Sequence[Path], turns: int) -> dict[str, float]:
    """Time the extraction of features beside `predict`."""
    backbone = model.backbone
    assert backbone is not None
    data = Dataset(images=list(files), labels=[[]] * len(files))

    def extract() -> int:
        found = compute_features(backbone, data, device=CPU, backend="onnx", batch_size=BATCH)
        return len(found.kept)

    way: tuple[Backend, Precision] = ("onnx", "fp32")
    return by_turns({"predict": partial(predicted, model, files, way), "features": extract}, turns)


def large_files(model: CNNRNN, files: Sequence[Path], turns: int) -> dict[str, float]:
    """Time pictures of 12 megapixels at full size and by drafts; count those with equal sets."""
    backbone = model.backbone
    assert backbone is not None
    stated = backbone.preprocessing

    def predict(drafts: bool) -> list[Prediction]:
        backbone.preprocessing = replace(stated, jpeg_draft=drafts)
        return model.predict(list(files), backend="onnx")

    speeds = by_turns(
        {"full": lambda: len(predict(False)), "drafts": lambda: len(predict(True))}, turns
    )
    both = zip(predict(False), predict(True), strict=True)
    same = sum(set(a.labels) == set(b.labels) for a, b in both)
    backbone.preprocessing = stated
    return speeds | {"images": len(files), "equal sets": same}


def random_backbone(name: str, files: Sequence[Path], turns: int) -> dict[str, Any]:
    """Time `predict` beside the engine alone, and compare label sets."""
    model = random_model(name)
    assert model.backbone is not None
    form = model.backbone.preprocessing
    some = files[: 4 * BATCH]
    images = [to_tensor(decode_image(f, preprocessing=form), form) for f in some]
    runs: dict[str, Callable[[], int]] = {}
    for way in ways():
        predicted(model, some[:2], way)
        runs[f"{named(way)}, predict"] = partial(predicted, model, some, way)
        runs[f"{named(way)}, alone"] = partial(engine_alone, model, images, way)
    return {
        "speed": by_turns(runs, turns),
        "sets": {
            named(way): agreement(model, files[:500], way, "fp32")
            for way in ways()
            if way[0] != "torch" and way[1] == "fp32"
        },
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    source = sorted(f for f in options.images.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    results: dict[str, Any] = {
        "processor": processor(), "cores": usable_cores(), "torch": torch.__version__,
    }  # fmt: skip

    def keep(name: str, found: Any) -> None:
        results[name] = found
        print(name, found, flush=True)
        text = json.dumps(results, indent=1) + "\n"
        write_whole(options.out, lambda file: file.write_text(text, encoding="utf-8"))

    animals = cnnrnn.load("animals")
    assert isinstance(animals, CNNRNN)
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(source, Path(folder) / "500", 512, 500)
        keep("files to labels", files_to_labels(animals, files, options.turns))
        keep("feature extraction", feature_extraction(animals, files, options.turns))
        large = photographs(source, Path(folder) / "4000", 100, 4000, landscape=True)
        keep("12 megapixels", large_files(animals, large, options.turns - 1))
        sets = {
            named(way): agreement(animals, files[:500], way, way[1])
            for way in ways()
            if way[0] != "torch"
        }
        if has_bf16(CPU):
            of_torch = agreement(animals, files[:500], ("torch", "bf16"), "fp32")
            sets["torch bf16 beside its fp32"] = of_torch
        keep("sets", sets)
        found = {}
        for name in RANDOM:
            found[name] = random_backbone(name, files, options.turns - 1)
            keep("backbones", found)


if __name__ == "__main__":
    main()
