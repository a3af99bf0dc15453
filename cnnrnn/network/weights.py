"""Weights of image networks from files: timm's, torchvision's, or of a training of either."""

from __future__ import annotations

import argparse
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where trainings keep a state dict, the average of the weights first."""
_WRAPPERS = ("_orig_mod.", "module.")
_PREFIXES = ("", "backbone.network.", "backbone.", "model.", "encoder.", "network.")
_COUNTER = "num_batches_tracked"
_MOST_SHOWN = 3


class WeightsError(ValueError):
    """A file of weights cannot be read, or does not fit the network."""


class Fitted(NamedTuple):
    """Weights that fill a network.

    Attributes:
        tensors: by the network's names.
        left_out: names in the file that were not needed.
    """

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]


def load_weights(network: nn.Module, file: str | Path, name: str) -> str:
    """Fill a network with the weights in a file.

    Args:
        network: each of its parameters and buffers must be in the file, but for the counters of
            batch norm. What else is there, such as a classifier, is left out.
        file: `.safetensors`, or a file of `torch.save` that holds tensors alone, with a state dict
            or what timm's or torchvision's training scripts write.
        name: of the network, for messages.

    Returns:
        A sentence that says what fitted.

    Raises:
        WeightsError: the file is none of these, or it does not fill the network.
    """
    file = Path(file)
    found = fitted(network, read_weights(file), f"{file} must hold the weights of {name}")
    _require_numbers(file, network, found.tensors)
    network.load_state_dict(found.tensors, strict=False)
    text = f"backbone {name}: all {len(found.tensors)} tensors from {file}"
    if found.left_out:
        text += f" ({_listed(found.left_out)} left out)"
    return text


def _require_numbers(file: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights of another kind than the network's, floating-point or whole, or not finite."""
    own = network.state_dict()
    for name, value in tensors.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise WeightsError(f"{file}: {name} must be {own[name].dtype}, got {value.dtype}")
        count = count_nonfinite(value.to(own[name].dtype))
        if count:
            raise WeightsError(
                f"{file}: {name} must be finite, got {count} of {value.numel()} values that are not"
            )


def count_nonfinite(value: Tensor) -> int:
    """Count the values that are not finite; a finite sum tells at once that there are none."""
    if not value.is_floating_point() or value.sum().isfinite():
        return 0
    return int((~value.isfinite()).sum())


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a state dict; nothing but tensors and plain values is unpickled."""
    if not file.is_file():
        raise WeightsError(f"{file} must be a file of weights, found no such file")
    kept = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    for key in _KEYS:
        if isinstance(kept, Mapping) and isinstance(kept.get(key), Mapping):
            kept = kept[key]
            break
    if not isinstance(kept, Mapping) or not kept:
        raise WeightsError(f"{file} must hold a state dict, found {type(kept).__name__}")
    tensors = {}
    for key, value in kept.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{file} must hold a state dict of tensors, got {type(value).__name__} for {key!r}"
            )
        if value.layout is not torch.strided or value.is_nested or value.device.type != "cpu":
            raise WeightsError(f"{file} must hold plain tensors, got another kind for {key!r}")
        while key.startswith(_WRAPPERS):
            key = key.partition(".")[2]
        tensors[key] = value
    return tensors


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} must be a safetensors file: {error}") from error


def _read_pickled(file: Path) -> object:
    try:
        # timm's and torchvision's scripts keep their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text advises to unpickle it all the same
        raise WeightsError(
            f"{file} must be a .safetensors file, or one of torch.save with tensors and plain "
            "values alone: it holds something else, which is not unpickled"
        ) from error
    except Exception as error:  # a broken file makes torch raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{file} must be a .safetensors file, or one of torch.save: {reason}"
        ) from error


def fitted(network: nn.Module, tensors: Mapping[str, Tensor], message: str) -> Fitted:
    """Match a state dict with a network.

    By name, with or without a prefix that other code adds; else by the network's own conversion of
    former names, where timm has one; else in order, where every shape and every last part of a name
    agrees (so weights of the same network written by another library fit).

    Args:
        network: to be filled.
        tensors: by the file's names.
        message: begins the error.

    Raises:
        WeightsError: some tensor is missing or of another shape.
    """
    needed = {k: v for k, v in network.state_dict().items() if not k.endswith(_COUNTER)}
    best: Fitted | None = None
    for prefix in _PREFIXES:
        named = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        found = _by_name(needed, named)
        if best is None or len(found.tensors) > len(best.tensors):
            best = found
    assert best is not None
    if len(best.tensors) < len(needed):
        for attempt in (_converted(network, needed, tensors), _in_order(needed, tensors)):
            if attempt is not None and len(attempt.tensors) == len(needed):
                return attempt
        raise WeightsError(f"{message}: {_mismatch(needed, tensors, best)}")
    return best


def _by_name(needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Fitted:
    fit = {k: tensors[k] for k, v in needed.items() if k in tensors and tensors[k].shape == v.shape}
    return Fitted(fit, tuple(k for k in tensors if k not in fit and not k.endswith(_COUNTER)))


def _converted(
    network: nn.Module, needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Fitted | None:
    """Match after timm's conversion of former and other libraries' names, where it has one."""
    module = sys.modules[type(network).__module__]
    for name in ("checkpoint_filter_fn", "_filter_fn"):
        convert: Callable[..., Mapping[str, Tensor]] | None = getattr(module, name, None)
        if convert is None:
            continue
        given = (dict(tensors), network)[: len(inspect.signature(convert).parameters)]
        try:
            return _by_name(needed, convert(*given))
        except (KeyError, AttributeError, TypeError, RuntimeError, ValueError, IndexError):
            return None  # not of the kind that it converts
    return None


def _in_order(needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Fitted | None:
    """Match one by one in the order of the file; what is left over, the classifier, is last."""
    listed = [(k, v) for k, v in tensors.items() if not k.endswith(_COUNTER)]
    if len(listed) < len(needed):
        return None
    pairs = zip(needed.items(), listed, strict=False)
    if not all(own.shape == other.shape and _last(a) == _last(b) for (a, own), (b, other) in pairs):
        return None
    fit = {name: value for name, (_, value) in zip(needed, listed, strict=False)}
    return Fitted(fit, tuple(name for name, _ in listed[len(needed) :]))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _mismatch(needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor], best: Fitted) -> str:
    wrong = []
    for name, own in needed.items():
        if name not in best.tensors:
            other = tensors.get(name)
            found = "is missing" if other is None else f"is {list(other.shape)}"
            wrong.append(f"{name} {list(own.shape)} {found}")
    return (
        f"{len(best.tensors)} of {len(needed)} tensors fit, the first that do not: "
        f"{'; '.join(wrong[:_MOST_SHOWN])}; the file has {_listed(tuple(tensors))}"
    )


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
