"""The folder of a checkpoint: found, replaced whole, and its values checked one by one."""

from __future__ import annotations

import json
import os
import shutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cnnrnn.config import Calibration, Preprocessing, SearchConfig
from cnnrnn.machine.files import writing

T = TypeVar("T")


FORMAT = 6


WEIGHTS_FILE = "model.safetensors"


CONFIG_FILE = "config.json"


FEATURES_ONLY = "features"


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
    return next((c for c in candidates if (c / CONFIG_FILE).is_file()), None)


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
        CheckpointError: it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def require_format(file: Path, found: Any) -> None:
    """Refuse a checkpoint of a format that is not known."""
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{file} has format {found}, this release reads 1 to {FORMAT}; upgrade cnnrnn"
        )


def read_options(kind: type[T], name: str, values: Any) -> T:
    """Build a config dataclass from JSON values, of which each must be there and of its type."""
    typed(name, values, dict)
    fields = typing.get_type_hints(kind)
    if values.keys() != fields.keys():
        odd = sorted(values.keys() ^ fields.keys())
        raise ValueError(f"{name} has fields missing or unknown: {', '.join(odd)}")
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


def require_one_per_label(calibration: Calibration, num_labels: int) -> None:
    """Raise a ValueError where a calibration is not that of so many labels."""
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
        return value
    raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")


def _former(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.former"


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
