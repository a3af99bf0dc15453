"""A module as an ONNX file: what the export of a whole model and that of a backbone share."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cnnrnn.machine.files import write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

OPSET = 20
ONE_FILE_BYTES = 2**31 - 2**20
"""An ONNX file cannot be larger than 2 GB; a larger model's weights lie beside it."""
_PACKAGES = ("onnx", "onnxscript")


class ExportError(ValueError):
    """A module cannot be exported."""


def can_export() -> bool:
    """Whether the packages are installed that an export needs."""
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def require_onnx() -> None:
    """Say which package an export needs.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"export needs {name}, which is not installed: "
                'run `pip install "cnnrnn[onnx]"`, or "cnnrnn[onnx-cpu]" on a machine without a GPU'
            )


def to_onnx(
    module: nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: Any,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ModelProto:
    """Trace a module into an ONNX model, without the exporter's notes of where its code lies.

    Args:
        module: in eval mode.
        arguments: what it is traced with.
        dynamic_shapes: of the arguments, as for `torch.export.export`.
        input_names: of the model.
        output_names: of the model.

    Raises:
        ExportError: torch cannot export the module; the message is torch's reason.
    """
    try:
        with warnings.catch_warnings(), _quiet_loggers():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module,
                arguments,
                dynamic_shapes=dynamic_shapes,
                strict=False,
                # A guess of how places lie in memory would else be required of every bank count.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            written = torch.onnx.export(
                program,
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # tracing runs the module's own code, and raises what it pleases
        raise ExportError(" ".join(str(error).split())[:300]) from error
    assert written is not None
    proto: ModelProto = written.model_proto
    _forget_the_exporter(proto.graph)
    del proto.metadata_props[:]
    return proto


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Keep the exporter from logging each node that it rewrites."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _forget_the_exporter(graph: GraphProto) -> None:
    """Take off what names the exporter's source files on this machine: most of a small file."""
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_the_exporter(attribute.g)
    del graph.metadata_props[:]


def external_data(path: Path) -> Path:
    """Return where the weights of a model lie that is larger than one file can be."""
    return path.with_name(f"{path.name}.data")


def write_onnx(proto: ModelProto, path: Path) -> None:
    """Check a model and put it at its place, its weights beside it where it is too large."""
    import onnx

    beside = external_data(path)
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) < ONE_FILE_BYTES:
        onnx.checker.check_model(proto, full_check=True)
        write_whole(path, lambda file: file.write_bytes(proto.SerializeToString()))
        beside.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        onnx.save(proto, partial, save_as_external_data=True, location=beside.name)
        onnx.checker.check_model(partial, full_check=True)
        partial.with_name(beside.name).replace(beside)
        partial.replace(path)
