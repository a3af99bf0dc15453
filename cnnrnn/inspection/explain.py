"""Where in an image a model looks: `explain`, one map for each step of a label path.

Letters: K explained steps of the path, L labels, H recurrent width, S side of the square input,
B images.

The image enters the model once, in the joint projection, so the steps of a path differ only in what
their scores read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor

from cnnrnn.api import resolve_model
from cnnrnn.config import MAX_PIXELS
from cnnrnn.data.images import decode_image, normalize, to_tensor
from cnnrnn.inspection.deconvolution import deconvolvable
from cnnrnn.labels import forbidden_labels
from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.words import listed
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble
from cnnrnn.network.backbones import Backbone
from cnnrnn.network.head import ImageEmbedding
from cnnrnn.prediction.inputs import read_image

Method = Literal["deconvolution", "label_deconvolution", "occlusion", "integrated_gradients"]
DECONVOLUTIONS = ("deconvolution", "label_deconvolution")
STEPS = 64
WINDOWS = 8
"""Occluded squares are an eighth of the side wide, and move by half of that."""
AT_ONCE = 16
"""Images of integrated gradients that run through the network together."""


class ExplainedStep(NamedTuple):
    """A step of a path, and the score that its map explains.

    Attributes:
        prefix: the labels before it.
        label: whose conditional score is explained; "END" for that the path ends here; None for
            the average of the label nodes.
        score: in nats, see `explain`.
        baseline: the same of an image of the mean colour; NaN for a deconvolution.
    """

    prefix: tuple[str, ...]
    label: str | None
    score: float
    baseline: float

    @property
    def name(self) -> str:
        """When it is: "before the first label", or after which."""
        return f"after {self.prefix[-1]}" if self.prefix else "before the first label"


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where in an image the scores of a path's steps come from.

    Attributes:
        source: the image's path, or "0".
        method: that made the maps.
        explained: a sentence on what the maps are of.
        path: the labels, in path order.
        steps: K of them, in order.
        maps: [K, S, S] float32. Of a deconvolution the size of what arrives at a pixel, at least 0;
            of the others the share in the score, above 0 where a pixel raises it.
        image: uint8 [3, S, S] as the model reads it, made square.
        size: width and height of the image before that, in pixels.
    """

    source: str
    method: Method
    explained: str
    path: tuple[str, ...]
    steps: tuple[ExplainedStep, ...]
    maps: Tensor
    image: Tensor
    size: tuple[int, int]

    def __repr__(self) -> str:
        return f"Explanation({self.source!r}, method={self.method!r}, path={self.path})"

    def save(self, file: str | Path) -> None:
        """Draw the image and its maps; see `cnnrnn.inspection.explain_figure`.

        Args:
            file: PNG, JPEG, PDF or SVG, by its suffix.

        Raises:
            ModuleNotFoundError: matplotlib, of the extra `[explain]`, is not installed.
            ValueError: matplotlib writes no such file.
            OSError: the file cannot be written.
        """
        from cnnrnn.inspection.explain_figure import draw

        draw(self, Path(file))


def explain(
    image: Any,
    model: CNNRNN | str | Path | None = None,
    *,
    method: Method = "deconvolution",
    label: str | None = None,
    path: Sequence[str] | None = None,
    known: Sequence[str] = (),
    absent: Sequence[str] = (),
    window: int | None = None,
    steps: int = STEPS,
    device: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Explanation:
    """Explain a model's steps along a label path of an image: before the first label, after each.

    The conditional score of a label at a step is the log-odds that it comes next, given the labels
    before it and, in increasing order, that no label between them does; that of END is the log-odds
    that the path ends. docs/explain.md says how far the maps can be trusted.

    Args:
        image: a path, the bytes of an image file or one open in binary mode, a PIL image, an array
            [H, W, 3] of uint8 RGB, or a tensor [3, H, W] of uint8 or of float in 0..1.
        model: a model, a checkpoint folder, `animals`, or None for the small demo model.
        method: `deconvolution`, the paper's, of the average of the label nodes; or of a label's
            conditional score `label_deconvolution`, `occlusion` (what the score loses when a square
            is covered) or `integrated_gradients` (Sundararajan et al., 2017). The first two are for
            networks of ReLUs, the last two need the extra `[explain]`.
        label: explain this label at every step where it may come next; by default the next label
            of the path, and END after the last. Not for `deconvolution`.
        path: the labels of the path, in any order where paths increase; by default those of the
            best path.
        known: labels that are present, for the search of the best path.
        absent: labels that are not.
        window: side in pixels of the square of `occlusion`; by default an eighth of the input's.
            It moves by half of that.
        steps: points between the mean colour and the image, of `integrated_gradients`.
        device: where to run; what is loaded here goes to the `auto` device unless this names one.
        max_pixels: images of more pixels count as unreadable.

    Returns:
        A map for each step; the step after the last label is left out where nothing else may
        follow.

    Raises:
        BadImageError: the image cannot be read.
        CheckpointError: the folder is missing, or does not hold a checkpoint.
        ModuleNotFoundError: the extra `[explain]` is not installed.
        ValueError: the model is an ensemble, an exported file or reads no images; the backbone is
            no network of ReLUs; or an option does not fit.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if label is not None and method == "deconvolution":
        raise ValueError(
            "method deconvolution explains the average of the label nodes: label is for "
            f"label_deconvolution and other methods, got {label!r}"
        )
    if window is not None and method != "occlusion":
        raise ValueError(f"window is for method occlusion, got {window} for {method}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    one = _one_model(model, device)
    assert one.backbone is not None
    pixels, size, source = _read(image, one.backbone, max_pixels)
    side = pixels.shape[-1]
    if window is not None and not 1 <= window < side:
        raise ValueError(f"window must be in 1..{side - 1}, got {window}")
    if path is None:
        found = one.predict(pixels, known=known, absent=absent, backend="torch", workers=0)[0].paths
        if not found:
            raise ValueError(f"no label set that the model holds possible fits what is known of "
                             f"{source}")  # fmt: skip
        names = found[0][0]
    else:
        if known or absent:
            raise ValueError("known and absent are for the search of a path, got a path as well")
        names = _as_path(path, one)
    # Weights of a frozen backbone need no gradient, the image does, whatever the caller's mode.
    with torch.inference_mode(False), torch.enable_grad():
        scores = PathScores(one, names, label, average=method == "deconvolution")
        inputs = normalize(pixels[None].to(one.device), one.backbone.preprocessing)
        maps, values, baselines = _explained(one.backbone, scores, inputs, method, window, steps)
    if not (maps.isfinite().all() and values.isfinite().all()):
        raise ValueError(f"the model's scores of {source}, or what they come from, are not finite")
    shown = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)
    return Explanation(
        source,
        method,
        _explained_in_words(method, scores, one),
        names,
        tuple(
            ExplainedStep(names[:step], name, value, baseline)
            for step, name, value, baseline in zip(
                scores.steps, scores.names, values.tolist(), baselines.tolist(), strict=True
            )
        ),
        maps.float().cpu(),
        shown.cpu(),
        size,
    )


def _one_model(model: Any, device: str | None) -> CNNRNN:
    """Return a model that has a backbone, in eval mode, or refuse it by what it is."""
    from cnnrnn.export import OnnxPredictor

    if isinstance(model, OnnxPredictor) or str(model).lower().endswith(".onnx"):
        raise ValueError(
            "explain looks into the layers of a network, and an exported file has none: it needs "
            "the run or checkpoint that was exported"
        )
    found = resolve_model(model, device)
    if isinstance(found, Ensemble):
        raise ValueError(
            f"explain takes one model, got an ensemble of {len(found.models)}, whose members have "
            "paths of their own: it needs one of them, such as members/0 of its folder"
        )
    if found.backbone is None:
        raise ValueError(
            "explain needs a model of images: this one was trained on feature vectors and has no "
            "backbone"
        )
    return found


def _read(image: Any, backbone: Backbone, max_pixels: int) -> tuple[Tensor, tuple[int, int], str]:
    """Return an image as [3, S, S], its width and height, and what it is called."""
    form = backbone.preprocessing
    if isinstance(image, (str, Path, bytes, Image.Image)) or callable(getattr(image, "read", None)):
        rgb = decode_image(image, name="the image", preprocessing=form, max_pixels=max_pixels)
        source = str(image) if isinstance(image, (str, Path)) else "0"
        return to_tensor(rgb, form), rgb.size, source
    item = read_image(0, image, form, "error", max_pixels)
    assert item.image is not None
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return item.image, (int(width), int(height)), item.source


def _as_path(names: Sequence[str], model: CNNRNN) -> tuple[str, ...]:
    """Return labels as a path that the model's search allows."""
    if isinstance(names, str):
        raise TypeError(f"path must be a list of label names, got {names!r}")
    for name in names:
        _require_label("path must hold labels of the model", name, model)
    order = model.search.order
    if order != "free" and len(set(names)) != len(names):
        raise ValueError(f"path must hold each label once, got {listed(names)}")
    return tuple(sorted(names, key=model.labels.index) if order == "increasing" else names)


def _require_label(rule: str, name: str, model: CNNRNN) -> None:
    if name not in model.labels:
        raise ValueError(f"{rule} ({listed(model.labels)}), got {name!r}")


class PathScores:
    """The scores of a path's steps as a function of image features.

    Args:
        model: its head and the order of its paths.
        path: label names.
        label: explained at every step where it may come; None for the next one.
        average: explain the average of the label nodes instead.

    Attributes:
        steps: [K] how many labels stand before each explained step.
        names: [K] what is explained, see `ExplainedStep`.
    """

    def __init__(
        self, model: CNNRNN, path: tuple[str, ...], label: str | None, *, average: bool
    ) -> None:
        head = self._head = model.head
        self._average = average
        L, device = head.num_labels, model.device
        labels = [model.labels.index(name) for name in path]
        forbidden = forbidden_labels(torch.tensor([labels], dtype=torch.int64), L,
                                     model.search.order)[0]  # fmt: skip
        targets = [*labels, L]
        if label is not None:
            _require_label("label must be one of the model's", label, model)
            targets = [model.labels.index(label)] * len(targets)
        # In increasing order a label competes with END and those after it alone: those between it
        # and the last one are then known to be absent.
        rivals = ~forbidden
        for step, target in enumerate(targets):
            increasing = model.search.order == "increasing" and target < L
            rivals[step, : target + 1 if increasing else 0] = False
            rivals[step, target] = False
        shown = [
            step
            for step, target in enumerate(targets)
            if average or (not forbidden[step, target] and bool(rivals[step].any()))
        ]
        self.steps = shown
        self.names = [
            None if average else "END" if targets[step] == L else model.labels[targets[step]]
            for step in shown
        ]
        self._targets = torch.tensor([targets[step] for step in shown], device=device)  # [K]
        self._rivals = rivals[shown].to(device)  # [K, L+1]
        with torch.no_grad():
            state = head.initial_state(1)
            outputs = []
            for row in (head.start, *labels):
                state = head.extend(torch.tensor([row], device=device), state)
                outputs.append(state[0])
            self._outputs = torch.cat(outputs)[shown]  # [K, H]

    def __call__(self, features: Tensor) -> Tensor:
        """Return the scores [B, K] of image features [B, F]."""
        embedding = self._head.embed(features)
        joint = ImageEmbedding(embedding.joint[:, None])
        scores = self._head.score(self._outputs, joint)  # [B, K, L+1]
        if self._average:
            return scores[..., : self._head.num_labels].mean(2)
        if embedding.label_logits is not None:
            scores = scores + embedding.label_logits[:, None]
        own = scores.gather(2, self._targets[None, :, None].expand(len(scores), -1, 1))[..., 0]
        return own - scores.masked_fill(~self._rivals, -torch.inf).logsumexp(2)


def _explained(
    backbone: Backbone,
    scores: PathScores,
    inputs: Tensor,
    method: Method,
    window: int | None,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps [K, S, S], and the scores of the image and of the mean colour, [K] each."""
    if method in DECONVOLUTIONS:
        return _deconvolved(backbone, scores, inputs)
    with torch.no_grad():
        grey = torch.zeros_like(inputs)  # the mean colour, normalised
        values, baselines = scores(backbone(torch.cat([inputs, grey])))
    with from_extra("captum", f"method {method}", "explain"):
        import captum.attr  # noqa: F401
    maps = (
        _occluded(backbone, scores, inputs, window)
        if method == "occlusion"
        else _integrated(backbone, scores, inputs, steps)
    )
    return maps, values, baselines


def _deconvolved(
    backbone: Backbone, scores: PathScores, inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the gradient of each score at the image feature back to the pixels by the rule."""
    inputs = inputs.detach().clone().requires_grad_()
    features = deconvolvable(backbone, inputs, backbone.name)
    values = scores(features)[0]
    maps = []
    for value in values:
        (arrived,) = torch.autograd.grad(value, inputs, retain_graph=True)
        maps.append(arrived[0].norm(dim=0))
    return torch.stack(maps).detach(), values.detach(), torch.full_like(values.detach(), torch.nan)


def _occluded(backbone: Backbone, scores: PathScores, inputs: Tensor, window: int | None) -> Tensor:
    """Cover squares with the mean colour; a pixel gets the mean over the squares that hold it."""
    from captum.attr import Occlusion

    side = inputs.shape[-1]
    square = window or max(side // WINDOWS, 1)
    stride = max(square // 2, 1)

    def one(images: Tensor) -> Tensor:  # [1, 3, S, S]: all K scores come of one pass
        return scores(backbone(images))[0]

    found: Tensor = Occlusion(one).attribute(
        inputs, sliding_window_shapes=(3, square, square), strides=(3, stride, stride), baselines=0
    )
    return found[:, 0]


def _integrated(backbone: Backbone, scores: PathScores, inputs: Tensor, steps: int) -> Tensor:
    """Integrate gradients from the mean colour to the image; the sum is the scores' difference."""
    from captum.attr import IntegratedGradients

    forward: Callable[[Tensor], Tensor] = lambda images: scores(backbone(images))  # noqa: E731
    method = IntegratedGradients(forward)
    maps = [
        method.attribute(
            inputs, baselines=0, target=step, n_steps=steps, internal_batch_size=AT_ONCE
        )[0].sum(0)
        for step in range(len(scores.steps))
    ]
    return torch.stack(maps).detach()


def _explained_in_words(method: Method, scores: PathScores, model: CNNRNN) -> str:
    """Say what the maps are of."""
    if method != "deconvolution":
        name = "deconvolution" if method in DECONVOLUTIONS else method.replace("_", " ")
        return f"{name} of a label's conditional score, in nats"
    text = "deconvolution of the average of the label nodes"
    if model.head.label_classifier is not None:
        text += (
            ", of the recurrent part alone: the chain term's scores, which are the same at every "
            "step, are left out"
        )
    if model.head.activation == "identity":
        text += "; with activation identity no step differs from another"
    return text
