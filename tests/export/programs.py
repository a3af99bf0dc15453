"""Programs other than this package that run an exported file, each as one function."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
JAVASCRIPT = ROOT / "examples" / "javascript"

Arrays = dict[str, np.ndarray[Any, Any]]


def in_onnxruntime(file: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]


def in_reference(file: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
    """Run the file in ONNX's own evaluator, which holds no tensor of an empty dimension."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(file))
    answers = []
    for feed in feeds:
        with np.errstate(all="ignore"):  # of infinite scores
            every = evaluator.run(None, feed, intermediate=True)
        assert isinstance(every, dict)
        empty = [name for name, value in every.items() if 0 in np.shape(value)]
        assert not empty, empty
        answers.append({name: every[name] for name in evaluator.output_names})
    return answers


def in_openvino(file: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()

    @cache
    def compiled(given: tuple[str, ...]) -> Any:
        model = core.read_model(without_defaults(file, given))
        return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    answers = []
    for feed in feeds:
        model = compiled(_optional(feed))
        found = model(feed)
        answers.append({output.any_name: np.array(found[output]) for output in model.outputs})
    return answers


def in_node(file: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
    need_node()
    program = ROOT / "tests" / "export" / "run_model.mjs"
    with TemporaryDirectory() as folder:
        runs = []
        for feed in feeds:
            given = _optional(feed)
            changed = Path(folder) / f"{'_'.join(given)}.onnx"
            if not changed.exists():
                changed.write_bytes(without_defaults(file, given))
            packed = {name: _packed(array) for name, array in feed.items()}
            runs.append({"file": str(changed), "feed": packed})
        run = subprocess.run(
            ["node", str(program)], input=json.dumps(runs),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [
        {name: _unpacked(tensor) for name, tensor in answer.items()}
        for answer in json.loads(run.stdout)
    ]


def without_defaults(file: Path, names: Sequence[str]) -> bytes:
    """Return a model in which these inputs are like others, as docs/deployment.md has it."""
    import onnx

    model = onnx.load(file)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    text: bytes = model.SerializeToString()
    return text


def _optional(feed: Arrays) -> tuple[str, ...]:
    return tuple(name for name in ("evidence", "min_labels") if name in feed)


def need_node() -> None:
    """Skip where Node.js or the example's packages are not installed; in CI they must be."""
    missing = None
    if shutil.which("node") is None:
        missing = "node is not installed"
    elif not (JAVASCRIPT / "node_modules" / "onnxruntime-node").is_dir():
        missing = "run `make javascript`, which installs onnxruntime-node"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    elif missing:
        pytest.skip(missing)


def _packed(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"type": array.dtype.name, "dims": list(array.shape), "data": data}


def _unpacked(tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
    values = np.frombuffer(base64.b64decode(tensor["data"]), tensor["type"])
    return values.reshape(tensor["dims"])


PROGRAMS = {
    "onnxruntime": in_onnxruntime,
    "onnx.reference": in_reference,
    "openvino": in_openvino,
    "onnxruntime-node": in_node,
}
