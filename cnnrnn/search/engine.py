"""The public beam search: resolves options, runs an implementation, checks the result."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cnnrnn.config import SearchConfig
from cnnrnn.model import Head, ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.result import SearchResult, SearchStats

Implementation = Literal["auto", "native", "reference"]


class NonFiniteError(ValueError):
    """Some images' embeddings or scores are not finite; `images` holds their indices."""

    def __init__(self, images: list[int], batch: int) -> None:
        self.images = images
        shown = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
        super().__init__(
            f"{len(images)} of {batch} images have values that are not finite (index {shown}); "
            'check their features and the weights, or pass on_nonfinite="mark" to keep the others'
        )


def beam_search(
    head: Head,
    image_embedding: ImageEmbedding,
    config: SearchConfig | None = None,
    implementation: Implementation = "auto",
    marginals: bool = False,
    on_nonfinite: Literal["raise", "mark"] = "raise",
) -> SearchResult:
    """Find the N best label paths of each image.

    Args:
        head: the trained head.
        image_embedding: `head.embed(features)` of B images, float32; B may be 0.
        config: search options; `SearchConfig()` by default.
        implementation: `native` is the compiled search, `reference` plain torch; `auto` is native.
        marginals: also return each label's probability, summed over every visited path.
        on_nonfinite: `raise`, or `mark` such images with log-probability NaN and go on.

    Returns:
        The paths, best first, on the device of `image_embedding`.

    Raises:
        ValueError: for options that do not fit together and shapes that do not fit the head.
        NonFiniteError: for images whose embedding or scores are not finite.
    """
    config = config or SearchConfig()
    max_labels = resolve_max_labels(head, config)
    _check_embedding(head, image_embedding)
    if head.training and head.joint_dropout.p > 0:
        raise ValueError("head is in training mode, with dropout in its scores; call head.eval()")
    if implementation in ("auto", "native"):
        result = _native(head, image_embedding, config, max_labels, marginals)
    elif implementation == "reference":
        result = reference.beam_search(
            head, image_embedding, config, max_labels=max_labels, marginals=marginals
        )
    else:
        raise ValueError(
            f"implementation must be auto, native or reference, got {implementation!r}"
        )
    if on_nonfinite == "raise":
        marked = result.nonfinite().tolist()
        if marked:
            raise NonFiniteError(marked, len(result))
    return result


def resolve_max_labels(head: Head, config: SearchConfig) -> int:
    """Return T: the config's, else the head's; at most L unless the order is free."""
    longest = head.max_labels if config.max_labels is None else config.max_labels
    if config.order != "free":
        longest = min(longest, head.num_labels)
    if config.min_labels > longest:
        raise ValueError(f"min_labels ({config.min_labels}) must not exceed max_labels ({longest})")
    return longest


def _check_embedding(head: Head, embedding: ImageEmbedding) -> None:
    joint, logits = embedding.joint, embedding.label_logits
    if joint.dim() != 2 or joint.shape[1] != head.joint_dim:
        raise ValueError(
            f"image_embedding.joint must be [B, {head.joint_dim}], got {list(joint.shape)}"
        )
    expected = [len(joint), head.num_labels + 1]
    if logits is not None and list(logits.shape) != expected:
        raise ValueError(
            f"image_embedding.label_logits must be {expected}, got {list(logits.shape)}"
        )


class HeadTables(NamedTuple):
    """A head's weights as the kernels read them (csrc/kernels/search.h)."""

    score_weight: Tensor  # [D, L+1]
    score_bias: Tensor | None  # [L+1]
    input_gates: Tensor  # [L+1, 4H]
    hidden_weight: Tensor  # [H, 4H]
    output_weight: Tensor  # [H, D]


class _Kept(NamedTuple):
    """What is kept of a head: its tables, the prefix states made with them, and their key."""

    key: tuple[Any, ...]
    tables: HeadTables
    prefixes: Any  # _C.PrefixTable, or None


PREFIX_BYTES = 256 << 20  # a head's prefix states are forgotten when they fill this much memory
_kept: weakref.WeakKeyDictionary[Head, _Kept] = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # another thread may have been using a table at the fork
    os.register_at_fork(after_in_child=_kept.clear)


@torch.no_grad()
def head_tables(head: Head) -> _Kept:
    """Return the head's tables in float32 on the CPU, made anew when a weight has changed.

    A change is seen by where a parameter lies and by torch's count of its in-place edits, which
    edits through `.data` do not raise: those need `head.clear_cache()`.
    """
    if any(parameter.is_inference() for parameter in head.parameters()):
        # Made under torch.inference_mode(), where edits are not counted: nothing can be kept.
        return _Kept((), _make_tables(head), None)
    key = (head.cache_generation, *((p.data_ptr(), p._version) for p in head.parameters()))
    kept = _kept.get(head)
    if kept is None or kept.key != key:
        from cnnrnn import _C

        with torch.inference_mode(False), torch.no_grad():
            kept = _kept[head] = _Kept(key, _make_tables(head), _C.PrefixTable(PREFIX_BYTES))
    return kept


def _make_tables(head: Head) -> HeadTables:
    def table(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()

    labels_and_start = torch.cat(
        [head.label_embedding[: head.num_labels], head.label_embedding[head.start :]]
    )
    with torch.autocast(head.label_embedding.device.type, enabled=False):
        input_gates = head.recurrence.input_gates(labels_and_start)
    return HeadTables(
        score_weight=table(head.label_embedding[: head.num_labels + 1].t()),
        score_bias=None if head.score_bias is None else table(head.score_bias),
        input_gates=table(input_gates),
        hidden_weight=table(head.recurrence.weight_hh.t()),
        output_weight=table(head.output_projection.weight.t()),
    )


def _native(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    max_labels: int,
    marginals: bool,
) -> SearchResult:
    outputs = run_compiled(head, embedding, config, max_labels, marginals=marginals)
    labels, lengths, log_probs, sums, _, stats = outputs
    device = embedding.joint.device
    return SearchResult(
        labels.to(device),
        lengths.to(device),
        log_probs.to(device),
        head.num_labels,
        SearchStats(**stats),
        None if sums is None else sums.to(device),
    )


def run_compiled(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    max_labels: int,
    *,
    marginals: bool = False,
    trace: bool = False,
    instruction_set: str = "auto",
) -> tuple[Any, ...]:
    """Call `_C.beam_search`; tests ask for every step's decisions, or an instruction set."""
    from cnnrnn import _C

    search: Callable[..., tuple[Any, ...]] = _C.beam_search
    embedding = embedding.to("cpu", torch.float32)
    logits = embedding.label_logits
    kept = head_tables(head)
    return search(
        embedding.joint.detach(),
        None if logits is None else logits.detach(),
        *kept.tables,
        cell=head.cell,
        activation=head.activation,
        beam_size=config.beam_size,
        max_labels=max_labels,
        min_labels=config.min_labels,
        order=config.order,
        end_takes_slot=config.end_takes_slot,
        stop=config.stop,
        marginals=marginals,
        trace=trace,
        # Kept states are those of one instruction set: another's would differ in the last bit.
        prefixes=kept.prefixes if instruction_set == "auto" else None,
        prefix_bytes=PREFIX_BYTES,
        instruction_set=instruction_set,
    )
