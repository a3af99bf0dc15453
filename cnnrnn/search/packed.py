"""A head as the compiled searches read it: packed once, made anew when a weight has changed."""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cnnrnn import _C
from cnnrnn.network.head import Head

PackedHead: TypeAlias = "_C.CpuHead | _C.CudaHead"
CPU = torch.device("cpu")

_packed: weakref.WeakSet[Head] = weakref.WeakSet()  # heads that `_C.packed_head` may keep


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a fused optimiser's step as an edit of the weights, as that of any other is.

    torch does not, and the search knows weights by that count.
    """
    fused = [p for g in optimizer.param_groups if g.get("fused") for p in g["params"]]
    torch.autograd.graph.increment_version([p for p in fused if p.grad is not None])


register_optimizer_step_post_hook(_count_fused_steps)


def packed_head(head: Head, device: torch.device = CPU) -> PackedHead:
    """Return the head as the kernels of a device read it, made anew when a weight has changed.

    A change is seen by which storage a parameter has, where it lies, and torch's count of its
    in-place edits, in which fused optimisers' steps are counted here. Edits through `.data` and by
    replayed CUDA graphs are in no count: `head.clear_cache()`, or going from train to eval mode.
    """
    if head not in _packed:
        _packed.add(head)
        weakref.finalize(head, _C.forget_head, id(head)).atexit = False
    return _C.packed_head(
        id(head),
        device,
        head.cell,
        head.activation,
        head.cache_generation,
        head.prefix_bytes,
        *head_parameters(head),  # type: ignore[arg-type]  # see detached
    )


def packed_cpu_head(head: Head) -> _C.CpuHead:
    """Return `packed_head` of the CPU."""
    packed = packed_head(head)
    assert isinstance(packed, _C.CpuHead)
    return packed


def detached(tensors: tuple[Tensor | None, ...], device: torch.device) -> tuple[Tensor | None, ...]:
    """Return what the kernels take; None only where a head may lack a parameter."""
    return tuple(None if t is None else t.detach().to(device, torch.float32) for t in tensors)


def head_parameters(head: Head) -> tuple[Tensor | None, ...]:
    """Return what the search reads of a head, in the order of the op's arguments."""
    modules: dict[str, Any] = head._modules
    recurrence, projection = modules["recurrence"], modules["output_projection"]
    return (
        _parameter(head, "label_embedding"),
        _parameter(head, "input_embedding"),
        _parameter(head, "score_bias"),
        _parameter(recurrence, "weight_ih"),
        _parameter(recurrence, "weight_hh"),
        _parameter(recurrence, "bias_ih"),
        _parameter(recurrence, "bias_hh"),
        _parameter(projection, "weight"),
    )


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a weight or None; one that is pruned or computed is no parameter, but an attribute.

    A module's look-up of attributes takes long: ten are a third of the search of one image.
    """
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter
