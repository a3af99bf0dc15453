"""What a deployed model takes: `python -m benchmarks.deployment --out results/deployment.json`.

A ResNet-50 (random weights, 224 x 224 uint8 images in memory) under a head of 80 labels,
N = 8, T = 18, marginals included, on the CPU, at batches of 1, 8 and 64:

- torch, eager and compiled: backbone, projection, compiled search;
- ONNX Runtime, the whole graph;
- ONNX Runtime up to the embedding, then the compiled search;

each beside its backbone alone. All take turns, so that what disturbs one disturbs all, and shares
are medians of a turn's ratios. Random weights give all images nearly the same feature, so torch's
searches read features of a trained head's held-out images (heads.py) instead, after a warm-up on
others; what the graph in ONNX Runtime takes does not depend on values.

Then `predict` over a folder of JPEG files, beside decoding alone and the backbone alone on tensors
that lie in memory: in each a thread per core, and a batch per thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.conftest import processor
from benchmarks.search.heads import trained_head
from cnnrnn import Head, ModelConfig, OnnxPredictor, SearchConfig, beam_search, export_onnx
from cnnrnn.data.images import decode_image, normalize, to_tensor
from cnnrnn.labels import LabelSpace
from cnnrnn.machine.devices import usable_cores
from cnnrnn.machine.threads import mapped_in_order
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.backbones import Backbone, make_backbone
from cnnrnn.prediction.predictor import TorchModel

SEARCH = SearchConfig(beam_size=8, max_labels=18)
TURNS = {1: 60, 8: 20, 64: 5}
WARM_IMAGES = 16_000
L = 80


class Normalised(nn.Module):
    """Backbone of uint8 images [B, S, S, 3], as the exported graph begins."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(normalize(images.permute(0, 3, 1, 2), self.backbone.preprocessing))


def make_model(backbone_name: str) -> CNNRNN:
    """A model with the recurrence of the trained head over a backbone of random weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone_name, pretrained=False, trunk_dim=0, hidden_dim=512, chain_term=True
    )
    backbone = make_backbone(config)
    head = Head.from_config(config, L, backbone.feature_dim)
    weights = trained_head(L, True).head.state_dict()
    searched = {
        name: value for name, value in weights.items()
        if not name.startswith(("image_projection", "label_classifier"))
    }  # fmt: skip
    head.load_state_dict(searched, strict=False)
    assert SEARCH.max_labels is not None
    head.max_labels = SEARCH.max_labels
    labels = LabelSpace.given([f"label {i}" for i in range(L)])
    return CNNRNN(config, labels, head, backbone, SEARCH).eval()


class Searches:
    """The compiled search of images that it has not seen, warm."""

    def __init__(self) -> None:
        self.trained = trained_head(L, True)
        self.next = WARM_IMAGES
        self(WARM_IMAGES, first=0)

    @torch.no_grad()
    def __call__(self, batch: int, first: int | None = None) -> None:
        if first is None:
            first = self.next
            self.next += batch
        features = self.trained.features(slice(first, first + batch))
        beam_search(self.trained.head, self.trained.head.embed(features), SEARCH, marginals=True)


def onnx_session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def contestants(model: CNNRNN, folder: Path, threads: int) -> dict[str, Callable[[Tensor], Any]]:
    """Name what is timed; each takes images [B, S, S, 3]."""
    assert model.backbone is not None
    backbone = Normalised(model.backbone).eval()
    compiled = torch.compile(backbone)
    searches = Searches()
    whole, alone = folder / "whole.onnx", folder / "backbone.onnx"
    export_onnx(model, whole)
    side = model.backbone.preprocessing.image_size
    torch.onnx.export(
        backbone, (torch.zeros(2, side, side, 3, dtype=torch.uint8),), alone, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=20,
    )  # fmt: skip
    predictor = OnnxPredictor(whole, threads=threads)
    embedding = OnnxPredictor(whole, search="native", threads=threads)
    session = onnx_session(alone, threads)
    name = session.get_inputs()[0].name

    def then_search(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def both(images: Tensor) -> None:
            run(images)
            searches(len(images))

        return both

    def by_session(images: Tensor) -> Any:
        return session.run(None, {name: images.numpy()})

    return {
        "torch, backbone": backbone,
        "torch": then_search(backbone),
        "torch.compile, backbone": compiled,
        "torch.compile": then_search(compiled),
        "ONNX Runtime, backbone": by_session,
        "ONNX Runtime, whole graph": predictor.run,
        "ONNX Runtime and CPU search": then_search(embedding.run),
        "search": lambda images: searches(len(images)),
    }


ALONE = {
    "torch": "torch, backbone",
    "torch.compile": "torch.compile, backbone",
    "ONNX Runtime, whole graph": "ONNX Runtime, backbone",
    "ONNX Runtime and CPU search": "ONNX Runtime, backbone",
}


@torch.no_grad()
def latencies(timed: dict[str, Callable[[Tensor], Any]], side: int) -> list[dict[str, Any]]:
    """Time every contestant at every batch size, by turns."""
    rows = []
    random = np.random.default_rng(0)
    for batch, turns in TURNS.items():
        images = torch.from_numpy(random.integers(0, 256, (batch, side, side, 3), dtype=np.uint8))
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for turn in range(-1, turns):
            for name, run in timed.items():
                began = time.perf_counter()
                run(images)
                if turn >= 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
        for name, own in seconds.items():
            p50 = statistics.median(own)
            row = {"what": name, "batch": batch, "images_per_second": batch / p50,
                   "p50_ms": 1e3 * p50, "p99_ms": 1e3 * float(np.quantile(own, 0.99)),
                   "turns": turns}  # fmt: skip
            if name in ALONE:
                ratios = [a / b for a, b in zip(own, seconds[ALONE[name]], strict=True)]
                row["over_backbone"] = statistics.median(ratios)
            if name == "search":
                shares = [s / (s + b) for s, b in zip(own, seconds["torch, backbone"], strict=True)]
                row["share_of_torch"] = statistics.median(shares)
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}"
                            for k, v in row.items()), flush=True)  # fmt: skip
    return rows


def throughput(model: CNNRNN, folder: Path, pictures: int, turns: int) -> dict[str, Any]:
    """Time predict over files beside its parts, by turns."""
    assert model.backbone is not None
    preprocessing = model.backbone.preprocessing
    files = write_pictures(folder, pictures)
    cores = usable_cores()
    running = TorchModel(model, model.search)
    tensors = [to_tensor(decode_image(file), preprocessing) for file in files]

    def in_threads(work: Callable[[Any], Any], items: list[Any]) -> None:
        one = partial(torch.set_num_threads, 1)
        with ThreadPoolExecutor(cores, initializer=one) as pool:
            for _ in mapped_in_order(work, items, pool, ahead=128):
                pass
        torch.set_num_threads(cores)

    def decoding() -> None:
        in_threads(lambda file: to_tensor(decode_image(file), preprocessing), files)

    def backbone() -> None:
        starts = list(range(0, len(tensors), 64))
        in_threads(lambda at: running.features(tensors[at : at + 64]), starts)

    def predicting() -> None:
        assert len(model.predict(files, workers=cores)) == len(files)

    seconds: dict[str, list[float]] = {"decoding": [], "backbone": [], "predict": []}
    for turn in range(-1, turns):
        for name, run in (("decoding", decoding), ("backbone", backbone), ("predict", predicting)):
            began = time.perf_counter()
            run()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    # With every core busy in both, decoding and the backbone's work add up: the bound of predict.
    shares = [
        (decode + run) / whole
        for decode, run, whole in zip(
            seconds["decoding"], seconds["backbone"], seconds["predict"], strict=True
        )
    ]
    row: dict[str, Any] = {
        name: len(files) / statistics.median(own) for name, own in seconds.items()
    }
    row |= {"backbone_name": model.config.backbone, "of_bound": statistics.median(shares),
            "pictures": len(files), "turns": turns, "threads": cores}  # fmt: skip
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in row.items()), flush=True)  # fmt: skip
    return row


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of 640 x 480 pixels, smooth as photographs are, of some 60 KB each."""
    random = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = folder / f"{number:04}.jpg"
        Image.fromarray(noisy).save(file, quality=85)
        files.append(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--threads", type=int, default=1, help="of the latencies")
    parser.add_argument("--pictures", type=int, default=256, help="of the ResNet-50's folder")
    parser.add_argument(
        "--only",
        choices=["latencies", "throughput"],
        help="measure one part again, in the same file",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts: dict[str, list[dict[str, Any]]] = {}
    if options.only is not None:
        former = json.loads(options.out.read_text(encoding="utf-8"))
        parts = {part: former[part] for part in ("latencies", "throughput")}
    model = make_model("resnet50")
    assert model.backbone is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "throughput":
            timed = contestants(model, folder, options.threads)
            parts["latencies"] = latencies(timed, model.backbone.preprocessing.image_size)
        if options.only != "latencies":
            torch.set_num_threads(usable_cores())
            parts["throughput"] = [
                throughput(model, folder, options.pictures, turns=3),
                throughput(make_model("small"), folder, 16 * options.pictures, turns=5),
            ]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    result = {
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__,
                    "onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "threads": options.threads,
        **parts,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
