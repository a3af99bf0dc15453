"""The training state: everything that a killed run needs to resume bit-identically.

One safetensors file with the rest as JSON in its header, and a checksum of both; nothing is
pickled. It is replaced atomically, so a reader finds the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cnnrnn.config import (
    ModelConfig,
    SearchConfig,
    TrainConfig,
    flat_options,
    former_options,
)
from cnnrnn.data import Dataset
from cnnrnn.data.images import image_identity
from cnnrnn.machine.files import weights_digest, write_whole
from cnnrnn.model.checkpoint import FEATURES_ONLY, read_options
from cnnrnn.network.backbones import Backbone

STATE_FILE = "state.safetensors"
FORMAT = 2
FIRST_WITH_CHECKSUM = 2
FREE_OPTIONS = ("device", "workers", "backend", "tensorboard", "feature_cache")
"""Options of `TrainConfig` that a resumed run may change."""

_GROWING_SCHEDULES = ("constant", "step")
_NOTHING = "nothing"


class ResumeError(ValueError):
    """A run cannot resume from the state in its folder."""


class Recipe(NamedTuple):
    """What a run was started with; options that came later have their defaults.

    Attributes:
        model: the architecture.
        search: the search, whose order training paths have.
        train: the recipe; options that a resumed run may change have their defaults.
        training_data: digest of its training records, see `data_digest`.
    """

    model: ModelConfig
    search: SearchConfig
    train: TrainConfig
    training_data: str


class TrainingState(NamedTuple):
    """A state in two parts.

    Attributes:
        values: what JSON can hold.
        tensors: the rest, by name.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]


def save_state(file: Path, state: TrainingState) -> None:
    """Write a state atomically."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().contiguous() for name, value in state.tensors.items()}
    values = json.dumps(state.values)
    header = {"format": str(FORMAT), "state": values, "checksum": _checksum(values, tensors)}
    write_whole(file, lambda partial: save_file(tensors, partial, metadata=header))


def read_state(data: bytes, name: str) -> TrainingState:
    """Read what `save_state` wrote.

    Args:
        data: the file's bytes.
        name: of the file, for messages.

    Raises:
        ResumeError: they are not a state that this release reads, or were changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        found, text = header["format"], header["state"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{name} must hold a training state, but does not: {error}") from error
    if found not in map(str, range(1, FORMAT + 1)):
        raise ResumeError(f"{name} has format {found}, this release reads 1 to {FORMAT}")
    if int(found) >= FIRST_WITH_CHECKSUM and header.get("checksum") != _checksum(text, tensors):
        raise ResumeError(
            f"{name} is damaged: its checksum is another. Leave --resume out to start over"
        )
    try:
        values = json.loads(text)
        return TrainingState(dict(values), tensors)
    except (ValueError, TypeError, RecursionError) as error:
        raise ResumeError(f"{name} must hold a training state, but does not: {error}") from error


def _checksum(values: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of both parts of a state."""
    digest = hashlib.sha256(values.encode())
    digest.update(weights_digest(sorted(tensors.items())).encode())
    return digest.hexdigest()


def require_int(values: Mapping[str, Any], name: str) -> None:
    """Raise a KeyError or TypeError where a state lacks a number."""
    if type(values[name]) is not int:
        raise TypeError(f"{name} must be a whole number, got {values[name]!r}")


def remove_partial_files(out: Path) -> None:
    """Remove partly written files that killed processes left in a run's folder."""
    for path in out.glob(".*.partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def run_identity(
    train_data: Dataset,
    val_data: Dataset,
    frozen_backbone: Backbone | None,
    model_config: ModelConfig,
    search_config: SearchConfig,
    config: TrainConfig,
) -> dict[str, Any]:
    """Return what a resumed run must have in common with the one that was killed, as JSON.

    Images are compared by name and size, feature vectors by their values.
    """
    options = flat_options(model_config, search_config, config, leave_out=FREE_OPTIONS)
    if frozen_backbone is not None:
        del options["init_backbone"]  # its weights are compared
    if train_data.features is not None:
        del options["model.jpeg_draft"]
    identity = {
        "options": options,
        "training data": data_digest(train_data),
        "validation data": data_digest(val_data),
        "frozen backbone": None
        if frozen_backbone is None
        else weights_digest(frozen_backbone.state_dict().items()),
    }
    result: dict[str, Any] = json.loads(json.dumps(identity))
    return result


def stored_recipe(folder: Path) -> Recipe:
    """Return what the run in a folder was started with, from its training state.

    Args:
        folder: of `train`, or its `best` or `last` folder.

    Raises:
        ResumeError: there is no training state, or it is not one of this release.
    """
    found = next((f for f in (folder, folder.parent) if (f / STATE_FILE).is_file()), None)
    if found is None:
        raise ResumeError(
            f"{folder} must be the folder of a run of one model, with its {STATE_FILE}, to read "
            "the recipe from; there is none"
        )
    file = found / STATE_FILE
    try:
        identity = read_state(file.read_bytes(), str(file)).values["identity"]
        options: dict[str, dict[str, Any]] = {"": {}, "model": {}, "search": {}}
        named = former_options() | identity["options"]
        if named["model.backbone"] == FEATURES_ONLY:  # which has no pictures
            named["model.jpeg_draft"] = ModelConfig().jpeg_draft
        for name, value in named.items():
            prefix, _, field = name.rpartition(".")
            options[prefix][field] = value
        return Recipe(
            read_options(ModelConfig, "model", options["model"]),
            read_options(SearchConfig, "search", options["search"]),
            read_options(TrainConfig, "options", options[""]),
            identity["training data"],
        )
    except ResumeError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResumeError(f"{file} does not say what its run was started with: {error}") from error


def require_same_run(stored: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to resume with other options or other data than a run was started with.

    The epochs of the last stage, `finish_epochs` or without these `epochs`, may grow if the
    learning rate does not depend on their number (`schedule` constant or step), unless a learned
    label order would still have changed.

    Raises:
        ResumeError: names every option that differs, with both values.
    """
    former = former_options()
    after = now["options"]
    before = {name: value for name, value in former.items() if name in after} | stored["options"]
    last = "finish_epochs" if after["finish_epochs"] else "epochs"
    # A longer run would have learned another order after this one's last epoch.
    reorders_later = (
        after["label_order"] == "easiest"
        and last == "epochs"
        and before["epochs"] <= after["reorder_epochs"]
    )
    differing = []
    for name in sorted({*before, *after}):
        old, new = before.get(name, _NOTHING), after.get(name, _NOTHING)
        grows = (
            name == last
            and name in before
            and after["schedule"] in _GROWING_SCHEDULES
            and not reorders_later
            and new > old
        )
        if old != new and not grows:
            differing.append(f"{name} must be {json.dumps(old)}, got {json.dumps(new)}")
    for name in ("training data", "validation data", "frozen backbone"):
        if stored[name] != now[name]:
            differing.append(f"{name} must be the same, got different ones")
    if differing:
        raise ResumeError(
            f"the run in {out} can resume only as it was started: {'; '.join(differing)}. Leave "
            "--resume out to start over"
        )


def data_digest(data: Dataset) -> str:
    """Return a SHA-256 of records: labels, numbers, and features or names and sizes of pictures."""
    digest = hashlib.sha256(json.dumps(data.label_names).encode())
    unknown = (data.unknown_indptr, data.unknown_indices) if data.has_unknown else ()
    for array in (data.label_indptr, data.label_indices, data.rows, data.features, *unknown):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    for image in data.images or ():
        if not isinstance(image, Path):
            digest.update(image_identity(image))
            continue
        digest.update(os.fsencode(image.name))
        try:
            size = os.stat(image).st_size
        except (OSError, ValueError):  # it is a bad image
            size = None
        digest.update(f" {size}\n".encode())
    return digest.hexdigest()
