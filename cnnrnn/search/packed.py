"""A head as the compiled searches read it: packed once, made anew when a weight has changed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from cnnrnn import _C
from cnnrnn.network.head import PREFIX_BYTES, Head

PackedHead: TypeAlias = "_C.CpuHead | _C.CudaHead"
CPU = torch.device("cpu")


class _Kept(NamedTuple):
    """A head as one device's kernels read it, with its kept prefix states, and what of."""

    places: tuple[tuple[dict[str, Any], str, Any], ...]  # (a module's dict, name, value then)
    storages: tuple[Tensor, ...]  # held, so that no other weights come to lie at their addresses
    key: tuple[Any, ...]
    packed: PackedHead


_kept: weakref.WeakKeyDictionary[Head, dict[torch.device, _Kept]] = weakref.WeakKeyDictionary()
_inherited: list[object] = []


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a fused optimiser's step as an edit of the weights, as that of any other is.

    torch does not, and both this module and the registered op know weights by that count.
    """
    fused = [p for g in optimizer.param_groups if g.get("fused") for p in g["params"]]
    torch.autograd.graph.increment_version([p for p in fused if p.grad is not None])


register_optimizer_step_post_hook(_count_fused_steps)


def _leave_to_the_parent() -> None:
    """Begin anew in a forked child: another thread may have been using a head at the fork.

    What the parent packed stays where it is; freeing what lies on a GPU would need CUDA, which a
    forked child cannot use.
    """
    _inherited.extend(_kept.values())
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def search_device(tensor: Tensor) -> torch.device:
    """Return where the compiled search runs for a tensor: its GPU, where this build has CUDA."""
    return tensor.device if tensor.is_cuda and _C.WITH_CUDA else CPU


def packed_head(head: Head, device: torch.device = CPU) -> PackedHead:
    """Return the head as the kernels of a device read it, made anew when a weight has changed.

    A change is seen by which tensor a parameter is, where it lies, and torch's count of its
    in-place edits, in which fused optimisers' steps are counted here. Edits through `.data` and by
    replayed CUDA graphs are in no count: `head.clear_cache()`, or going from train to eval mode.
    """
    kept = _kept.get(head, {}).get(device)
    if kept is not None:
        replaced = any(values.get(name) is not value for values, name, value in kept.places)
        if not replaced and kept.key == _weights_key(head, kept.places):
            return kept.packed
    _kept.get(head, {}).pop(device, None)  # before another takes as much memory
    places = tuple(_searched(head))
    tensors = [tensor for tensor in head_parameters(head) if tensor is not None]
    if not _edits_are_seen(tensors, places):
        return _pack(head, device)
    # The key first: another thread may edit a weight while the head is packed.
    key = _weights_key(head, places)
    packed = _pack(head, device)
    of_devices = _kept.setdefault(head, {})
    of_devices[device] = _Kept(places, tuple(tensor.detach() for tensor in tensors), key, packed)
    return packed


def packed_cpu_head(head: Head) -> _C.CpuHead:
    """Return `packed_head` of the CPU."""
    packed = packed_head(head)
    assert isinstance(packed, _C.CpuHead)
    return packed


def _pack(head: Head, device: torch.device) -> PackedHead:
    if device.type == "cuda":
        return make_cuda_head(head, device, prefix_bytes=head.prefix_bytes)
    return make_cpu_head(head, prefix_bytes=head.prefix_bytes)


def _edits_are_seen(
    tensors: list[Tensor], places: tuple[tuple[dict[str, Any], str, Any], ...]
) -> bool:
    """Whether every weight stands at its place (a pruned or reparametrised one is computed).

    What is made under torch.inference_mode() has no count of edits.
    """
    in_place = {id(value) for _, _, value in places}
    return all(id(tensor) in in_place and not tensor.is_inference() for tensor in tensors)


def make_cpu_head(
    head: Head, *, prefix_bytes: int = PREFIX_BYTES, instruction_set: str = "auto"
) -> _C.CpuHead:
    """Pack a head's weights into a new `_C.CpuHead`; tests name a budget or instruction set."""
    return _C.CpuHead(
        *detached(head_parameters(head), CPU),  # type: ignore[arg-type]  # see detached
        cell=head.cell,
        activation=head.activation,
        prefix_bytes=prefix_bytes,
        instruction_set=instruction_set,
    )


def make_cuda_head(
    head: Head, device: torch.device, *, prefix_bytes: int = PREFIX_BYTES
) -> _C.CudaHead:
    """Pack a head's weights into a new `_C.CudaHead` on a GPU; tests name a budget."""
    return _C.CudaHead(
        *detached(head_parameters(head), device),  # type: ignore[arg-type]  # see detached
        cell=head.cell,
        activation=head.activation,
        prefix_bytes=prefix_bytes,
    )


def detached(tensors: tuple[Tensor | None, ...], device: torch.device) -> tuple[Tensor | None, ...]:
    """Return what the kernels take; None only where a head may lack a parameter."""
    return tuple(None if t is None else t.detach().to(device, torch.float32) for t in tensors)


def head_parameters(head: Head) -> tuple[Tensor | None, ...]:
    """Return what the search reads of a head, in the order of the op's arguments."""
    recurrence = head.recurrence
    return (
        head.label_embedding,
        head.input_embedding,
        head.score_bias,
        recurrence.weight_ih,
        recurrence.weight_hh,
        getattr(recurrence, "bias_ih", None),
        getattr(recurrence, "bias_hh", None),
        head.output_projection.weight,
    )


def _searched(head: Head) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """List where the searched parameters stand, so that a replaced one is seen without a walk."""
    for owner, names in (
        (head._modules, ("recurrence", "output_projection")),
        (head._parameters, ("label_embedding", "input_embedding", "score_bias")),
        (head.recurrence._parameters, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        (head.output_projection._parameters, ("weight",)),
    ):
        for name in names:
            yield owner, name, owner.get(name)


def _weights_key(
    head: Head, places: tuple[tuple[dict[str, Any], str, Any], ...]
) -> tuple[Any, ...]:
    tensors = (value for _, _, value in places if isinstance(value, Tensor))
    edits = ((tensor.data_ptr(), tensor._version) for tensor in tensors)
    return (head.cache_generation, head.prefix_bytes, head.cell, head.activation, *edits)
