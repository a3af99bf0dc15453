"""The deconvolution of a network of ReLUs (Zeiler and Fergus, ECCV 2014), by torch's autograd.

Running the network backwards, linear layers are transposed and max-pooling returns what it took to
where that came from, which is what gradients do. They differ at a ReLU: the deconvolution passes
what is positive of the signal that comes back, a gradient what comes back where the ReLU was open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

OTHERS = frozenset({
    "celu", "elu", "gelu", "glu", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish",
    "prelu", "relu6", "rrelu", "selu", "silu", "softplus", "softsign", "threshold",
})  # fmt: skip
"""Activations in the place of a ReLU, at which the rule is not defined. Gates (sigmoid, softmax)
stand beside ReLUs, and are differentiated."""


class _DeconvolvedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(min=0)


class _Rules(TorchFunctionMode):
    """Replaces every ReLU, module or function, in place or not; counts activations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        plain = name.removesuffix("_")
        if plain == "relu" or _is_clamp_at_zero(plain, args, kwargs):
            self.found["relu"] += 1
            inputs = args[0] if args else kwargs["input"]
            outputs = _DeconvolvedReLU.apply(inputs)
            in_place = name.endswith("_") or kwargs.get("inplace", False) or args[1:] == (True,)
            return inputs.copy_(outputs) if in_place else outputs
        if plain in OTHERS:
            bounds = (*args[1:3], kwargs.get("min_val"), kwargs.get("max_val"))
            six = plain == "hardtanh" and {0.0, 6.0} <= set(bounds)  # as nn.ReLU6 calls it
            self.found["relu6" if six else plain] += 1
        return function(*args, **kwargs)


def _is_clamp_at_zero(plain: str, args: Any, kwargs: Any) -> bool:
    """Tell whether a call of torch is `clamp(min=0)`, a ReLU by another name."""
    if plain not in ("clamp", "clamp_min"):
        return False
    least = kwargs.get("min", args[1] if len(args) > 1 else None)
    most = kwargs.get("max", args[2] if len(args) > 2 else None)
    return isinstance(least, (int, float)) and least == 0 and most is None


def deconvolvable(network: Callable[[Tensor], Tensor], images: Tensor, name: str) -> Tensor:
    """Run a network of ReLUs so that autograd deconvolves it.

    Args:
        network: from images to features.
        images: [B, 3, S, S], of which gradients are wanted.
        name: of the network, for the error.

    Returns:
        [B, F] the network's features, from which `torch.autograd.grad` comes back by the rule.

    Raises:
        ValueError: the network has no ReLU, or other activations in their place.
    """
    with _Rules() as rules:
        features = network(images)
    others = {found for found in rules.found if found != "relu"}
    if others or not rules.found:
        has = "ReLUs beside " if "relu" in rules.found else ""
        raise ValueError(
            "deconvolution is for networks whose activations are ReLUs: where there is none it is "
            f"the plain gradient, and backbone {name} has {has}"
            f"{', '.join(sorted(others)) or 'no ReLU'}. Methods occlusion and "
            "integrated_gradients take any backbone"
        )
    return features
