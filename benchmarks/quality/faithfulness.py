"""Whether maps of explanations show what a label's score comes from, by the boxes of scenes.

    python -m benchmarks.quality.faithfulness --out faithfulness.json --data scenes:scenes \
        --models small=scenes resnet10t=runs/resnet10t

A model explains the labels of test scenes along their true paths: those whose boxes, all together,
cover at most a quarter of the image and whose conditional score the model has above 0. Of each map,
what lies below 0 counted as 0:

- mass: the map's share in the label's boxes, over the boxes' share in the image; the median;
- brightest: the brightest pixel lies in a box; of several the share that does;
- own: the mean over the label's boxes is above that over another's in the same image;
- lost: what the score loses in nats where the brightest tenth of the pixels becomes the mean
  colour. Occlusion measures just that, square by square.

Two maps know nothing of the model: the edges of the image, and random numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnnrnn
from cnnrnn.data import Dataset, load_dataset
from cnnrnn.data.images import normalize
from cnnrnn.inspection.deconvolution import deconvolvable
from cnnrnn.inspection.explain import PathScores, explain
from cnnrnn.model.classifier import CNNRNN

LARGEST = 0.25  # share of the image that the boxes of a measured label cover at most
GREYED = 0.1
POINTS = 32  # of integrated gradients
METHODS = (
    "deconvolution, average of the label nodes", "deconvolution, the label", "occlusion",
    "integrated gradients", "edges of the image", "random numbers",
)  # fmt: skip


def edges(image: Tensor) -> Tensor:
    """How much the grey value changes at each pixel of [3, S, S]: [S, S]."""
    grey = image.float().mean(0)
    down = (grey[1:] - grey[:-1]).abs()
    right = (grey[:, 1:] - grey[:, :-1]).abs()
    found = torch.zeros_like(grey)
    found[1:] += down
    found[:-1] += down
    found[:, 1:] += right
    found[:, :-1] += right
    return found


def maps_of(
    image: Any, model: CNNRNN, path: Sequence[str], generator: torch.Generator
) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    """Explain the steps of a path: the image [3, S, S], scores [T], and by method [T, S, S]."""
    T = len(path)
    found = explain(image, model, path=path, method="occlusion")
    scores = [step.score for step in found.steps[:T]]
    maps = {"occlusion": found.maps[:T]}
    maps["integrated gradients"] = explain(
        image, model, path=path, method="integrated_gradients", steps=POINTS
    ).maps[:T]
    try:
        maps[METHODS[0]] = explain(image, model, path=path).maps[:T]
        maps[METHODS[1]] = explain(image, model, path=path, method="label_deconvolution").maps[:T]
    except ValueError as error:
        if "is for networks whose activations are ReLUs" not in str(error):
            raise
    shape = found.maps[:T].shape
    maps["edges of the image"] = edges(found.image).expand(shape)
    maps["random numbers"] = torch.rand(shape, generator=generator)
    return found.image, scores, {name: maps[name].clamp(min=0) for name in METHODS if name in maps}


@torch.no_grad()
def scores_lost(
    model: CNNRNN, image: Tensor, path: Sequence[str], step: int, maps: Mapping[str, Tensor]
) -> dict[str, float]:
    """What greying each map's brightest pixels takes from the score of a step's label.

    Args:
        model: has a backbone.
        image: uint8 [3, S, S].
        path: the whole one.
        step: of the label.
        maps: [S, S] by method.
    """
    assert model.backbone is not None
    whole = normalize(image[None], model.backbone.preprocessing)
    count = round(GREYED * image[0].numel())
    greyed = []
    for values in maps.values():
        covered = whole[0].clone().flatten(1)
        covered[:, values.flatten().topk(count).indices] = 0
        greyed.append(covered.view_as(whole[0]))
    read = PathScores(model, tuple(path[:step]), path[step], average=False)
    scores = read(model.backbone(torch.cat([whole, torch.stack(greyed)])))[:, -1]
    return dict(zip(maps, (scores[0] - scores[1:]).tolist(), strict=True))


def box_figures(values: Tensor, box: Tensor, others: Sequence[Tensor]) -> dict[str, Any]:
    """Hold a map [S, S] against the pixels [S, S] bool of a label's boxes, and of others'."""
    total, area = float(values.sum()), float(box.float().mean())
    inside = float(values[box].sum()) / total if total > 0 else area
    top = values == values.max()
    own = []
    for other in others:
        mine, theirs = box & ~other, other & ~box
        if mine.any() and theirs.any():
            a, b = float(values[mine].mean()), float(values[theirs].mean())
            own.append(0.5 + 0.5 * ((a > b) - (a < b)))
    brightest = float((top & box).sum() / top.sum())
    return {"mass": inside / area, "brightest": brightest, "own": own}


def pixels_of_boxes(dataset: Dataset, record: int, side: int) -> dict[str, Tensor]:
    """Return the pixels [S, S] bool that the boxes of each label of a record cover."""
    boxes = dataset.boxes
    assert boxes is not None
    found: dict[str, Tensor] = {}
    for i in range(boxes.indptr[record], boxes.indptr[record + 1]):
        x, y, width, height = (int(value) for value in boxes.xywh[i])
        name = dataset.label_names[boxes.label_indices[i]]
        mask = found.setdefault(name, torch.zeros(side, side, dtype=torch.bool))
        mask[y : y + height, x : x + width] = True
    return found


def labels_of(dataset: Dataset, record: int, model: CNNRNN) -> list[str]:
    """Return a record's labels in the model's path order."""
    names = {dataset.label_names[label] for label in dataset.labels(record)}
    return [name for name in model.labels if name in names]


def scene_rows(model: CNNRNN, dataset: Dataset, images: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each measured label of the first scenes that have some."""
    assert dataset.image_paths is not None and model.backbone is not None
    generator = torch.Generator().manual_seed(0)
    side = model.backbone.preprocessing.image_size
    used = 0
    for record, file in enumerate(dataset.image_paths):
        path = labels_of(dataset, record, model)
        boxes = {
            name: box
            for name, box in pixels_of_boxes(dataset, record, side).items()
            if float(box.float().mean()) <= LARGEST
        }
        if not any(name in boxes for name in path):
            continue
        if used == images:
            return
        used += 1
        image, scores, maps = maps_of(file, model, path, generator)
        for step, name in enumerate(path):
            if name not in boxes or scores[step] <= 0:
                continue
            others = [box for other, box in boxes.items() if other != name]
            lost = scores_lost(model, image, path, step, {m: maps[m][step] for m in maps})
            yield {
                "image": used, "label": name, "area": float(boxes[name].float().mean()),
                "methods": {
                    m: box_figures(maps[m][step], boxes[name], others) | {"lost": lost[m]}
                    for m in maps
                },
            }  # fmt: skip


def step_correlations(model: CNNRNN, files: Sequence[Any], paths: Sequence[list[str]]) -> Any:
    """Correlate the average's map of each step with that of the step before: medians.

    Returns:
        Of the recurrent part, and with the chain term's scores; None for a backbone without ReLUs.
    """
    assert model.backbone is not None
    found: dict[str, list[float]] = {"recurrent part": [], "with the chain term": []}
    for file, path in zip(files, paths, strict=True):
        try:
            image = explain(file, model, path=path).image
        except ValueError:
            return None
        scores = PathScores(model, tuple(path), None, average=True)
        inputs = normalize(image[None], model.backbone.preprocessing).requires_grad_()
        features = deconvolvable(model.backbone, inputs, model.backbone.name)
        logits = model.head.embed(features).label_logits
        averages = {"recurrent part": scores(features)[0]}
        if logits is not None:
            whole = averages["recurrent part"] + logits[0, : len(model.labels)].mean()
            averages["with the chain term"] = whole
        for name, values in averages.items():
            maps = [
                torch.autograd.grad(value, inputs, retain_graph=True)[0][0].norm(dim=0).flatten()
                for value in values
            ]
            if len(maps) > 1:
                correlated = torch.corrcoef(torch.stack(maps)).diagonal(1)
                found[name] += correlated.nan_to_num(1.0).tolist()
    return {name: statistics.median(values) for name, values in found.items() if values}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bring the figures of labels together: the median of mass, means of the others."""
    figures: dict[str, Any] = {}
    for method in rows[0]["methods"]:
        own = [row["methods"][method] for row in rows]
        pairs = [value for one in own for value in one["own"]]
        figures[method] = {
            "mass": statistics.median(one["mass"] for one in own),
            "mean mass": statistics.fmean(one["mass"] for one in own),
            "brightest": statistics.fmean(one["brightest"] for one in own),
            "own": statistics.fmean(pairs), "pairs": len(pairs),
            "lost": statistics.fmean(one["lost"] for one in own),
        }  # fmt: skip
    images = len({row["image"] for row in rows})
    area = statistics.fmean(row["area"] for row in rows)
    return {"labels": len(rows), "images": images, "area": area, "methods": figures}


def faithfulness_table(results: Mapping[str, Any]) -> str:
    """Lay out the figures of scenes as Markdown, a row per backbone and method."""
    lines = [
        "| backbone | map | mass in the box over its area | brightest pixel in the box, % | own "
        "box brighter than another's, % | score lost, brightest tenth greyed, nats |",
        "|---" * 6 + "|",
    ]
    for name, one in results["scenes"].items():
        for method in METHODS:
            title = f"{name} ({one['labels']} labels)" if method == METHODS[0] else ""
            if method not in one["methods"]:
                lines.append(f"| {title} | {method} | refused | – | – | – |")
                continue
            f = one["methods"][method]
            lines.append(
                f"| {title} | {method} | {f['mass']:.1f} | {100 * f['brightest']:.0f} | "
                f"{100 * f['own']:.0f} | {f['lost']:.1f} |"
            )
    return "\n".join(lines)


def correlation_table(results: Mapping[str, Any]) -> str:
    """Lay out how alike the average's maps of one step and the next are."""
    lines = ["| backbone | recurrent part | with the chain term |", "|---|---|---|"]
    for name, one in results["scenes"].items():
        if one["steps"] is not None:
            whole = one["steps"].get("with the chain term")
            cell = "has none" if whole is None else f"{whole:.4f}"
            lines.append(f"| {name} | {one['steps']['recurrent part']:.2f} | {cell} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model that the file does not have yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON; goes on where it stopped")
    parser.add_argument("--data", help="scenes:ROOT, whose test split is measured")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=MODEL")
    parser.add_argument("--images", type=int, default=60)
    options = parser.parse_args()
    results: dict[str, Any] = {"scenes": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))

    def write() -> None:
        options.out.write_text(json.dumps(_short(results), indent=1) + "\n", encoding="utf-8")

    for named in options.models:
        name, _, place = named.partition("=")
        if name in results["scenes"]:
            continue
        model, dataset = cnnrnn.load(place), load_dataset(options.data).split("test")
        assert isinstance(model, CNNRNN) and dataset.image_paths is not None
        rows = list(scene_rows(model, dataset, options.images))
        paths = [labels_of(dataset, i, model) for i in range(options.images)]
        correlations = step_correlations(model, dataset.image_paths[: options.images], paths)
        results["scenes"][name] = summary(rows) | {"steps": correlations}
        write()
        print(faithfulness_table(results), correlation_table(results), sep="\n\n", flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
