"""Opens exported files in ONNX Runtime, and says which execution provider cannot run and why."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from cnnrnn.data.files import short
from cnnrnn.export.graph import LABEL_SCORES
from cnnrnn.machine.words import listed

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto

Search = Literal["onnx", "native", "compiled"]  # compiled: what native was called
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
REPAIR = "For CUDA and TensorRT run `pip uninstall -y onnxruntime && pip install onnxruntime-gpu`"
COMPILED = 'search="native" (--search native on the command line)'
_ERRORS_ONLY = 3  # of ONNX Runtime's levels: it warns of every optional input


class ProviderError(RuntimeError):
    """ONNX Runtime does not run on the execution provider that was asked for."""


class OnnxModelError(ValueError):
    """A file is not an ONNX model that `export_onnx` wrote."""


ANY = -1
"""A side of a tensor that is fixed, at whatever number."""


class Port(NamedTuple):
    """What a graph takes or gives.

    Attributes:
        dtype: ONNX Runtime's name of the type.
        sides: of the tensor: a number, `ANY`, or None where it may vary.
    """

    dtype: str
    sides: tuple[int | None, ...]

    def fits(self, value: onnxruntime.NodeArg) -> bool:
        """Tell whether a graph's input or output is this; sides that have a name may be any."""
        return (
            value.type == f"tensor({self.dtype})"
            and len(value.shape) == len(self.sides)
            and all(map(_side_fits, value.shape, self.sides))
        )


def _side_fits(side: int | str | None, wanted: int | None) -> bool:
    if wanted == ANY:
        return isinstance(side, int)
    return wanted is None or not isinstance(side, int) or side == wanted


def require_ports(
    found: Iterable[onnxruntime.NodeArg], expected: Mapping[str, Port], optional: Mapping[str, Port]
) -> None:
    """Raise a ValueError where a graph has other inputs or outputs than expected and optional."""
    named = {value.name: value for value in found}
    for name in expected.keys() - named.keys():
        raise ValueError(f"the graph must have {name}, found {listed(named) or 'nothing'}")
    for name, value in named.items():
        wanted = expected.get(name) or optional.get(name)
        if wanted is None:
            raise ValueError(f"the graph must not have {short(name)}")
        if not wanted.fits(value):
            raise ValueError(
                f"{name} of the graph must be {wanted.dtype} {list(wanted.sides)}, got "
                f"{value.type} {value.shape}"
            )


def open_session(
    path: Path,
    providers: Sequence[str | tuple[str, dict[str, Any]]],
    search: Search,
    fallback: bool,
    threads: int | None,
) -> onnxruntime.InferenceSession:
    """Open a file, with `search="native"` the part of it before the search.

    Arguments and errors as of `OnnxPredictor`.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise OnnxModelError(f"{path} must be an ONNX file of cnnrnn export, found {found}")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ONNX Runtime is not installed: run `pip install "cnnrnn[onnx]"`, or '
            '"cnnrnn[onnx-cpu]" on a machine without a GPU'
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ProviderError(f"ONNX Runtime is broken. {distribution_problem() or REPAIR}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        options.intra_op_num_threads = threads
    wanted = [_provider(provider) for provider in providers]
    first = wanted[0][0]
    there = onnxruntime.get_available_providers()
    why = None
    if first not in there:
        why = f"{first} is not in this ONNX Runtime, which has {', '.join(there)}"
        if first in PROVIDERS.values():
            why += f". {distribution_problem() or REPAIR}"
        if not fallback:
            raise ProviderError(why)
    if first in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]) and first in there:
        onnxruntime.preload_dlls()  # CUDA's libraries as pip installs them beside torch
    usable = [provider for provider in wanted if provider[0] in there]
    source = _embedding_part(path) if search != "onnx" else str(path)
    try:
        session = onnxruntime.InferenceSession(
            source, options, providers=usable or [(PROVIDERS["cpu"], {})]
        )
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        reason = " ".join(str(error).split())[:300]
        raise OnnxModelError(f"{path} cannot be opened by ONNX Runtime: {reason}") from error
    runs = session.get_providers()[0]
    if runs != first:
        why = why or (
            f"{first} cannot start: ONNX Runtime's log above names the library that is missing, or "
            "there is no GPU"
        )
        if not fallback:
            raise ProviderError(
                f"{why}; pass fallback=True, or --device cpu on the command line, to run on {runs}"
            )
        warnings.warn(f"{why}; {runs} runs instead", stacklevel=3)
    return session


def has_cuda() -> bool:
    """Whether there is a GPU, and an ONNX Runtime that was built for it."""
    if not torch.cuda.is_available():
        return False
    import onnxruntime

    return PROVIDERS["cuda"] in onnxruntime.get_available_providers()


def distribution_problem() -> str | None:
    """Say what is wrong where both distributions of ONNX Runtime are installed, and the repair."""
    if not all(_installed(name) for name in DISTRIBUTIONS):
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: run "
        "`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install onnxruntime-gpu`"
    )


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _provider(provider: str | tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    name, options = (provider, {}) if isinstance(provider, str) else provider
    return PROVIDERS.get(name, name), options


def _give_no_evidence(model: ModelProto) -> None:
    """Give a file without defaults the one that its label scores read: nothing is known."""
    from onnx import TensorProto, helper

    inputs = {value.name: value for value in model.graph.input}
    names = {tensor.name for tensor in model.graph.initializer}
    if "evidence" in inputs and "evidence" not in names:
        L = inputs["evidence"].type.tensor_type.shape.dim[1].dim_value
        nothing = helper.make_tensor("evidence", TensorProto.INT8, [1, L], [0] * L)
        model.graph.initializer.append(nothing)


def _embedding_part(path: Path) -> bytes:
    """Return the model up to the image's embedding, without the search."""
    try:
        import onnx
        from onnx.utils import Extractor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{COMPILED} takes the file apart with onnx, which is not installed: run "
            '`pip install "cnnrnn[onnx]"`'
        ) from error
    try:
        model = onnx.load(path)
        names = [output.name for output in model.graph.output]
        kept = [name for name in ("joint", LABEL_SCORES) if name in names]
        _give_no_evidence(model)
        part = Extractor(model).extract_model([model.graph.input[0].name], kept)
    except Exception as error:  # protobuf and onnx raise whatever they please
        reason = " ".join(str(error).split())[:300]
        raise OnnxModelError(f"{path} must be an ONNX model of cnnrnn, found: {reason}") from error
    part.metadata_props.extend(model.metadata_props)
    text: bytes = part.SerializeToString()
    return text
