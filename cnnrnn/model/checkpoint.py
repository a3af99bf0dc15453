"""The folder of a checkpoint: found, replaced whole, and its values checked one by one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cnnrnn.config import Calibration, Preprocessing, SearchConfig
from cnnrnn.data.dataset import expected_name
from cnnrnn.data.files import kind_of_path, reason, short
from cnnrnn.machine.files import writing
from cnnrnn.machine.words import listed
from cnnrnn.network.weights import count_nonfinite

T = TypeVar("T")


FORMAT = 6


WEIGHTS_FILE = "model.safetensors"


CONFIG_FILE = "config.json"


FEATURES_ONLY = "features"


MAX_CONFIG_BYTES = 1 << 26
"""A larger description is an error: that of a million labels has about as many."""


SHIPPED_NAMES = ("scenes", "animals")
"""What `cnnrnn.load` takes by name, see `shipped`."""


class CheckpointError(ValueError):
    """A checkpoint folder is missing, incomplete or does not fit together."""


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that a path stands for; see `load_checkpoint`."""
    folder = Path(path)
    found = _found(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} is not a checkpoint: neither it nor {folder / 'best'} holds {CONFIG_FILE}, "
            f"and the models of the package are {' and '.join(SHIPPED_NAMES)}"
        )
    return found


def is_checkpoint(path: str | Path) -> bool:
    """Whether `find_checkpoint` finds one."""
    return _found(Path(path)) is not None


def _found(folder: Path) -> Path | None:
    candidates = [folder, folder / "best", _former(folder), _former(folder / "best")]
    return next((c for c in candidates if os.path.isfile(c / CONFIG_FILE)), None)


def replace_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a checkpoint folder, whole or not at all.

    The folder is written beside its place and moved there. A process killed between the two
    moves leaves the former checkpoint in a hidden folder, where `find_checkpoint` finds it.

    Args:
        path: the folder; a former checkpoint there is replaced.
        write: gets an empty folder to fill.

    Raises:
        CheckpointError: there is something else.
        OSError: with the folder's name.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, not a folder for a checkpoint")
    if target.exists() and not (target / CONFIG_FILE).is_file() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty and holds no checkpoint; not replaced")
    partial, former = target.parent / f".{target.name}.partial-{os.getpid()}", _former(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(target):
            partial.mkdir(parents=True)
            write(partial)
            for file in partial.rglob("*"):
                if file.is_file():
                    _flush(file)
            if target.exists():  # else a process was killed here, and the former is all there is
                shutil.rmtree(former, ignore_errors=True)
                target.rename(former)
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write the JSON that says what a checkpoint folder holds."""
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_description(file: Path) -> Any:
    """Read that JSON, whatever it holds.

    Raises:
        CheckpointError: it is no JSON, or too large.
    """
    with open(file, "rb") as handle:
        data = handle.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file} must have at most {MAX_CONFIG_BYTES:,} bytes, got more")
    try:
        return parse_json(data.decode())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {reason(error)}") from error


def parse_json(text: str) -> Any:
    """Parse JSON whose keys are unique and whose numbers are finite.

    Raises:
        ValueError: it is no such JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_with_unique_keys, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"keys of an object must be unique, got {short(key)} twice")
        result[key] = value
    return result


def _no_number(word: str) -> None:
    raise ValueError(f"numbers must be finite, got {word}")


def require_format(file: Path, found: Any) -> None:
    """Refuse a checkpoint of a format that is not known."""
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{file} has format {short(found)}, this release reads 1 to {FORMAT}; upgrade cnnrnn"
        )


class Form(NamedTuple):
    """Type and shape of a tensor, as a safetensors file states them before its values."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """Return the form of each tensor."""
    return {
        name: Form(_TYPES.get(value.dtype, str(value.dtype)), tuple(value.shape))
        for name, value in tensors.items()
    }


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as a checkpoint holds them: floating-point ones are float32."""
    return {
        name: (value.float() if value.is_floating_point() else value).contiguous()
        for name, value in tensors.items()
    }


def read_weights(
    file: Path, expected: Mapping[str, Form], optional: Mapping[str, Form], prefix: str = ""
) -> dict[str, Tensor]:
    """Read a model's weights, after what the file says of them has been held against the model.

    Args:
        file: of safetensors.
        expected: the tensors of the model.
        optional: tensors that it may have too.
        prefix: what the names begin with that are read; the file may have others.

    Raises:
        CheckpointError: it is no such file, its tensors are not those of the model, or they have
            values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    message = f"{file} does not hold the weights of the model that {CONFIG_FILE} describes"
    if not file.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{message}: found {kind_of_path(file)}")
    try:
        with safe_open(file, "pt") as handle:
            names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118
            parts = {name: handle.get_slice(name) for name in names}
            require_forms(
                {n: Form(p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()},
                expected,
                optional,
            )
            weights = {name: handle.get_tensor(name) for name in names}
        require_finite(weights)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{message}: {reason(error)}") from error
    return weights


def require_forms(
    found: Mapping[str, Form], expected: Mapping[str, Form], optional: Mapping[str, Form]
) -> None:
    """Raise a ValueError where tensors are not those expected; the optional may be there too."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"it lacks {listed(missing, 3)}")
    for name, form in found.items():
        wanted = expected.get(name) or optional.get(name)
        if wanted is None:
            raise ValueError(f"it has {short(name)}, which the model has not")
        if form != wanted:
            raise ValueError(f"{name} must be {wanted}, got {form}")


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where a weight is not finite."""
    for name, value in weights.items():
        count = count_nonfinite(value)
        if count:
            raise ValueError(
                f"{name} must be finite, got {count} of {value.numel()} values that are not"
            )


def read_options(kind: type[T], name: str, values: Any) -> T:
    """Build a config dataclass from JSON values, of which each must be there and of its type."""
    typed(name, values, dict)
    fields = typing.get_type_hints(kind)
    if values.keys() != fields.keys():
        odd = [key if key in fields else short(key) for key in values.keys() ^ fields.keys()]
        raise ValueError(f"{name} has fields missing or unknown: {listed(sorted(odd))}")
    return kind(**{key: typed(f"{name}.{key}", v, fields[key]) for key, v in values.items()})


def read_calibration(values: Any, form: Any) -> Calibration:
    """Build a calibration from the JSON values of a file of a format; earlier ones lack some."""
    if form == 1 and isinstance(values, dict):
        values = {"min_labels": 0, "uncalibrated": []} | values
    if form in (1, 2) and isinstance(values, dict):
        values = {"known_mix_weight": 0.0, "set_nll": []} | values
    return read_options(Calibration, "calibration", values)


def read_search(values: Any, form: Any) -> SearchConfig:
    """Build search options from the JSON values of a file of a format; earlier ones lack some."""
    if form in (1, 2) and isinstance(values, dict):
        added = {"marginal_places": None, "algorithm": "beam", "max_expansions": 200}
        values = added | values
    return read_options(SearchConfig, "search", values)


def read_preprocessing(values: Any, *, drafts: bool) -> Preprocessing:
    """Build a preprocessing from JSON values; formats without drafts decode at full size."""
    if isinstance(values, dict) and not drafts:
        values = {"jpeg_draft": False} | values
    return read_options(Preprocessing, "preprocessing", values)


def read_labels(values: Any) -> tuple[str, ...]:
    """Return label names of JSON: unique, with characters that can be shown."""
    names = typed("labels", values, list[str])
    for name in names:
        expected = expected_name(name)
        if expected is not None:
            raise ValueError(f"labels must have {expected}, got {short(name)}")
    return tuple(names)


def require_one_per_label(calibration: Calibration, num_labels: int) -> None:
    """Raise a ValueError where a calibration is not that of so many labels."""
    if calibration.min_labels > num_labels:
        raise ValueError(
            f"calibration.min_labels must be in 0..{num_labels}, got {calibration.min_labels}"
        )
    if len(calibration.label_thresholds) not in (0, num_labels):
        raise ValueError(
            f"calibration.label_thresholds must be {num_labels} numbers, one per label, or none, "
            f"got {len(calibration.label_thresholds)}"
        )
    others = [label for label in calibration.uncalibrated if not 0 <= label < num_labels]
    if others:
        raise ValueError(
            f"calibration.uncalibrated must be labels in 0..{num_labels - 1}, got {others[0]}"
        )


def typed(name: str, value: Any, kind: Any) -> Any:
    """Return a JSON value if it is of a type, a list as tuple where that is the type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        of_any_length = parts[-1] is Ellipsis
        kinds = parts[:1] * len(value) if of_any_length else parts
        if len(value) == len(kinds):
            return tuple(typed(name, v, part) for v, part in zip(value, kinds, strict=True))
    if origin is list and isinstance(value, list):
        return [typed(name, item, parts[0]) for item in value]
    if origin is typing.Literal and value in parts:
        return value
    if origin is types.UnionType:
        accepted = parts
    else:
        accepted = (float, int) if kind is float else (kind,)
    if origin in (None, types.UnionType) and type(value) in accepted:
        _require_size(name, value)
        return value
    raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {short(value)}")


def _require_size(name: str, value: Any) -> None:
    """Raise a ValueError for a number that torch has not."""
    if isinstance(value, float) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be less than 2^63, got {short(value)}")


def _former(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.former"


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
