"""Writes a model as one ONNX file, from pictures or feature vectors to label paths."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from cnnrnn.config import MAX_KNOWN, FilePrecision, SearchConfig
from cnnrnn.export.graph import (
    INPUT_NAMES,
    LABEL_SCORES,
    OUTPUT_NAMES,
    ExportedModel,
    Input,
)
from cnnrnn.machine.files import weights_digest, write_whole
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble, load_model
from cnnrnn.network.onnx_files import ExportError, require_onnx, to_onnx, write_onnx
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.packed import head_parameters

if TYPE_CHECKING:
    from onnx import ModelProto

FORMAT = 5
BANKS = "banks"
"""What the search takes as an input while it is traced; the file computes it."""


def export_onnx(
    model: CNNRNN | Ensemble | str | Path,
    path: str | Path,
    *,
    input_kind: Input | None = None,
    precision: FilePrecision = "float32",
    loop: bool = False,
    dynamic_size: bool = False,
    search: SearchConfig | None = None,
    max_known: int = MAX_KNOWN,
) -> None:
    """Write a model as one ONNX file: backbone, projection and the whole beam search.

    docs/deployment.md lists inputs, outputs and metadata of the file. Beside `model.onnx` comes
    `model.labels.json` with the metadata again, for clients that cannot read them from the file.

    Args:
        model: a model or a checkpoint folder.
        path: file to write.
        input_kind: what the file takes: `uint8` pictures [B, S, S, 3], normalised inside; `float`,
            normalised pictures [B, 3, S, S]; or `features` [B, F], for the head alone. By default
            `uint8`, and `features` for a model without a backbone.
        precision: `float16` for backbone, trunk and image projections; recurrence, label scores
            and the search stay float32.
        loop: the steps of the search as an ONNX Loop, which ends with the last live path and makes
            a smaller file, instead of one after the other.
        dynamic_size: pictures of any height and width, where the backbone takes them.
        search: options of the search; the model's own by default. Every bank has `beam_size`
            places, or `marginal_places` where those are more.
        max_known: labels of an image that may be known to be present. A batch is searched with as
            many banks as it needs; 0 for one bank, and no width that depends on values.

    Raises:
        ValueError: the options do not fit the model, or it cannot be exported.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    require_onnx()
    import onnx

    path = Path(path)
    if path.suffix.lower() != ".onnx" or path.is_dir():
        raise ValueError(f"path must be a file that ends in .onnx, got {path}")
    model = _single_model(model)
    search = search or model.search
    search = replace(search, max_labels=resolve_max_labels(model.head, search))
    input_kind = input_kind or ("features" if model.backbone is None else "uint8")
    _check_options(model, input_kind, precision, dynamic_size, search, max_known)
    half = precision == "float16"
    exported = ExportedModel(model, input_kind, search, loop, max_known, half).eval()
    proto = _exported(exported, model, input_kind, search, dynamic_size)
    _give_defaults(proto, search, len(model.labels))
    metadata = _metadata(model, input_kind, precision, loop, search, max_known)
    onnx.helper.set_model_props(proto, metadata)
    write_onnx(proto, path)
    write_whole(labels_file(path), lambda file: file.write_text(_beside(metadata), "utf-8"))


def labels_file(path: Path) -> Path:
    """Return the file beside an exported one that says what its outputs mean."""
    return path.with_name(f"{path.stem}.labels.json")


def _beside(metadata: dict[str, str]) -> str:
    """Return the metadata as one JSON object, without the weights of the compiled search."""
    values = {k: json.loads(v) for k, v in metadata.items() if k not in ("head", "content_hash")}
    values["content_hash"] = metadata["content_hash"]
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _single_model(model: CNNRNN | Ensemble | str | Path) -> CNNRNN:
    loaded = load_model(model) if isinstance(model, (str, Path)) else model
    if isinstance(loaded, Ensemble):
        raise ValueError("an ensemble cannot be exported; export its members one by one")
    return loaded


def _check_options(
    model: CNNRNN,
    input_kind: Input,
    precision: FilePrecision,
    dynamic_size: bool,
    search: SearchConfig,
    max_known: int,
) -> None:
    if input_kind not in INPUT_NAMES:
        raise ValueError(f"input_kind must be one of {', '.join(INPUT_NAMES)}, got {input_kind!r}")
    if precision not in get_args(FilePrecision):
        raise ValueError(f"precision must be float32 or float16, got {precision!r}")
    if model.backbone is None and input_kind != "features":
        raise ValueError(
            f"input_kind must be features for a model without a backbone, got {input_kind}"
        )
    if dynamic_size and input_kind == "features":
        raise ValueError("dynamic_size is of pictures; the input is feature vectors")
    if search.algorithm != "beam":
        raise ValueError(
            f"search.algorithm must be beam to be exported, got {search.algorithm}: pass search="
        )
    if not search.max_labels:
        raise ValueError("max_labels must be at least 1 to export, got 0")
    if max_known < 0:
        raise ValueError(f"max_known must be at least 0, got {max_known}")


def _exported(
    exported: ExportedModel,
    model: CNNRNN,
    input_kind: Input,
    search: SearchConfig,
    dynamic_size: bool,
) -> ModelProto:
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    if input_kind == "features":
        example = torch.zeros(2, model.feature_dim)
    else:
        assert model.backbone is not None
        side = model.backbone.preprocessing.image_size
        first = 1 if input_kind == "uint8" else 2
        if dynamic_size:
            shape |= {first + i: torch.export.Dim.DYNAMIC for i in range(2)}
        sizes = (2, side, side, 3) if input_kind == "uint8" else (2, 3, side, side)
        example = torch.zeros(sizes, dtype=torch.uint8 if input_kind == "uint8" else torch.float32)
    arguments = (
        example,
        torch.tensor(search.min_labels),
        torch.zeros(1, len(model.labels), dtype=torch.int8),
        torch.arange(2) if exported.search.most_known else None,
    )
    names = [INPUT_NAMES[input_kind], "min_labels", "evidence"]
    banks = None
    if exported.search.most_known:
        names.append(BANKS)
        banks = {0: torch.export.Dim("banks")}
    chained = model.head.label_classifier is not None
    outputs = [*OUTPUT_NAMES, *([LABEL_SCORES] if chained else [])]
    try:
        proto = to_onnx(exported, arguments, (shape, {}, {}, banks), names, outputs)
    except ExportError as error:
        how = " for pictures of any size; without dynamic_size it may be" if dynamic_size else ""
        raise ValueError(
            f"backbone {model.config.backbone} cannot be exported{how}. torch says: {error}"
        ) from error
    sides = ("batch",) if input_kind == "features" else ("batch", "height", "width")
    _name_dimensions(proto, sides)
    if exported.search.most_known:
        _count_banks(proto, exported.search.most_known)
    return proto


def _count_banks(proto: ModelProto, most_known: int) -> None:
    """Make the banks of what was an input: one more than the batch's most present labels.

    torch exports no width that depends on values but as an input's.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    zero, one, axis, most = (f"{BANKS}.{name}" for name in ("zero", "one", "axis", "most"))
    for name, value in ((zero, 0), (one, 1), (axis, [1]), (most, most_known)):
        constant = numpy_helper.from_array(np.array(value, np.int64), name)
        proto.graph.initializer.append(constant)
    found = [f"{BANKS}.{number}" for number in range(7)]
    nodes = [
        helper.make_node("Cast", ["evidence"], [found[0]], to=TensorProto.INT64),
        helper.make_node("Greater", [found[0], zero], [found[1]]),
        helper.make_node("Cast", [found[1]], [found[2]], to=TensorProto.INT64),
        helper.make_node("ReduceSum", [found[2], axis], [found[3]], keepdims=0),
        helper.make_node("ReduceMax", [found[3]], [found[4]], keepdims=0),
        helper.make_node("Clip", [found[4], zero, most], [found[5]]),
        helper.make_node("Add", [found[5], one], [found[6]]),
        helper.make_node("Range", [zero, found[6], one], [BANKS]),
    ]
    for node in reversed(nodes):
        node.name = f"{BANKS}.{node.op_type}.{node.output[0]}"
        proto.graph.node.insert(0, node)
    del proto.graph.input[-1]


def _name_dimensions(proto: ModelProto, names: tuple[str, ...]) -> None:
    """Name the dimensions that vary, which torch has numbered, in the order of the first input."""
    values = [*proto.graph.input, *proto.graph.output]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim]
    numbered = [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    named = dict(zip((name for name in numbered if name), names, strict=False))
    for dim in dims:
        if dim.dim_param in named:
            dim.dim_param = named[dim.dim_param]


def _give_defaults(proto: ModelProto, search: SearchConfig, num_labels: int) -> None:
    """Make two inputs optional: an initializer of an input's name is its default."""
    import numpy as np
    from onnx import numpy_helper

    # Traced with one row for all images, it broadcasts as well with a row for each.
    proto.graph.input[2].type.tensor_type.shape.dim[0].dim_param = "rows"
    del proto.graph.value_info[:]
    for name, value in (
        ("min_labels", np.array(search.min_labels, np.int64)),
        ("evidence", np.zeros((1, num_labels), np.int8)),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(value, name))


def _metadata(
    model: CNNRNN,
    input_kind: Input,
    precision: FilePrecision,
    loop: bool,
    search: SearchConfig,
    max_known: int,
) -> dict[str, str]:
    """Return what a consumer must know beside the graph, each value as JSON."""
    preprocessing = None if model.backbone is None else asdict(model.backbone.preprocessing)
    values = {
        "cnnrnn_format": FORMAT,
        "input": input_kind,
        "precision": precision,
        "loop": loop,
        "labels": list(model.labels),
        "source_index": list(model.label_space.source_index),
        "preprocessing": None if input_kind == "features" else preprocessing,
        "calibration": asdict(model.calibration),
        "search": asdict(search),
        "max_known": max_known,
        "cell": model.head.cell,
        "activation": model.head.activation,
    }
    content = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    content.update(weights_digest(model.state_dict().items()).encode())
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return texts | {"content_hash": content.hexdigest(), "head": _head_text(model)}


def _head_text(model: CNNRNN) -> str:
    """Return the weights of the search, for the compiled one, as a safetensors file in base64."""
    from safetensors.torch import save

    read = (*head_parameters(model.head), model.head.cooccurrence)
    searched = {id(tensor) for tensor in read if tensor is not None}
    tensors = {
        name: tensor.detach().cpu().float().contiguous()
        for name, tensor in (*model.head.named_parameters(), *model.head.named_buffers())
        if id(tensor) in searched
    }
    return base64.b64encode(save(tensors)).decode()
