"""The public beam search: resolves options, runs an implementation, checks the result."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from cnnrnn import _C  # also registers torch.ops.cnnrnn.beam_search
from cnnrnn.config import SearchConfig, SearchPrecision
from cnnrnn.labels import PAD
from cnnrnn.machine.words import listed
from cnnrnn.network.head import PREFIX_BYTES, Head, ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.result import SearchResult, SearchStats

Implementation = Literal["auto", "native", "reference"]
PackedHead: TypeAlias = "_C.CpuHead | _C.CudaHead"

_CPU = torch.device("cpu")


class NonFiniteError(ValueError):
    """Some images' embeddings or scores are not finite; `images` holds their indices."""

    def __init__(self, images: list[int], batch: int) -> None:
        self.images = images
        super().__init__(
            f"{len(images)} of {batch} images have values that are not finite "
            f"(index {listed(images)}); "
            'check their features and the weights, or pass on_nonfinite="mark" to keep the others'
        )


def beam_search(
    head: Head,
    image_embedding: ImageEmbedding,
    config: SearchConfig | None = None,
    implementation: Implementation = "auto",
    marginals: bool = False,
    on_nonfinite: Literal["raise", "mark"] = "raise",
    precision: SearchPrecision = "exact",
    evidence: Tensor | None = None,
) -> SearchResult:
    """Find the N best label paths of each image.

    Args:
        head: the trained head.
        image_embedding: `head.embed(features)` of B images, float32; B may be 0.
        config: search options; `SearchConfig()` by default.
        implementation: `native` is the compiled search, on the GPU for tensors that are there where
            this build has CUDA, else on the CPU; `auto` is native on the CPU, until the search on a
            GPU has been measured; `reference` is plain torch.
        marginals: also return the probability that a path holds each label, summed over every
            visited path that does not yet; given evidence, over the complete paths found.
        on_nonfinite: `raise`, or `mark` such images with log-probability NaN and go on. Under
            torch.compile and torch.export, where values are not known, they are marked.
        precision: of label scores on a GPU: `exact` multiplies in float32, `fast` in float16 with
            float32 sums; rankings closer than its rounding may change. Elsewhere both are exact.
        evidence: what is known of labels, [B, L] int8 or [1, L] for all images: 1 present, -1
            absent, 0 unknown. The paths found hold every present label and no absent one; their
            scores stay log P(path | image), without it. Where something is known the search runs
            on the CPU.

    Returns:
        The paths, best first, on the device of `image_embedding`.

    Raises:
        ValueError: for options that do not fit together, shapes that do not fit the head, and
            evidence of more present labels than max_labels.
        NonFiniteError: for images whose embedding or scores are not finite.
    """
    config = config or SearchConfig()
    max_labels = resolve_max_labels(head, config)
    _check_embedding(head, image_embedding)
    if head.training and head.joint_dropout.p > 0:
        raise ValueError("head is in training mode, with dropout in its scores; call head.eval()")
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision must be exact or fast, got {precision!r}")
    if config.algorithm == "exact":
        return _exact(
            head, image_embedding, config, implementation, marginals, on_nonfinite, evidence
        )
    if implementation in ("auto", "native"):
        wide = evidence is not None or config.places(marginals) > config.beam_size
        on_cpu = implementation == "auto" or wide
        device = _CPU if on_cpu else search_device(image_embedding.joint)
        options = _Options(config, max_labels, marginals, precision, evidence)
        arguments = (head, image_embedding, options, device)
        if torch.compiler.is_compiling():
            return _traced(*arguments)
        result, nonfinite = _native(*arguments)
    elif implementation == "reference":
        if evidence is not None:
            check_evidence(head, evidence, len(image_embedding), max_labels)
        result = reference.beam_search(
            head,
            image_embedding,
            config,
            max_labels=max_labels,
            marginals=marginals,
            evidence=evidence,
        )
        nonfinite = len(result.nonfinite())
    else:
        raise ValueError(
            f"implementation must be auto, native or reference, got {implementation!r}"
        )
    if nonfinite and on_nonfinite == "raise":
        raise NonFiniteError(result.nonfinite().tolist(), len(result))
    return result


def _exact(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    implementation: Implementation,
    marginals: bool,
    on_nonfinite: Literal["raise", "mark"],
    evidence: Tensor | None,
) -> SearchResult:
    """Return the N most probable sets, and the marginals of a beam where they are wanted."""
    beam = replace(config, algorithm="beam")
    sums = None
    if marginals:
        sums = beam_search(head, embedding, beam, implementation, True, "mark", evidence=evidence)
    sets = best_sets(
        head, embedding,
        count=config.beam_size, max_labels=resolve_max_labels(head, config),
        min_labels=config.min_labels, max_expansions=config.max_expansions,
        implementation=implementation, evidence=evidence, on_nonfinite=on_nonfinite,
    )  # fmt: skip
    return SearchResult(
        sets.labels, sets.lengths, sets.log_probs, head.num_labels, sets.stats,
        None if sums is None else sums.marginals(),
        None if sums is None else sums.log_evidence,
        sets.proved >= 1,
    )  # fmt: skip


class BestSets(NamedTuple):
    """The most probable label sets of images, best first.

    Attributes:
        labels: [B, K, T] int64 label indices in path order, padded with -1.
        lengths: [B, K] int64.
        log_probs: [B, K] log P(set | image); -inf past the last set, NaN for a marked image.
        proved: [B] int64: the first so many are proved to be the most probable ones.
        ended: [B] bool: fewer than K, and no other set is left that is wanted.
        expansions: [B] int64, prefixes that were scored.
        stats: how much of the recurrence was shared.
    """

    labels: Tensor
    lengths: Tensor
    log_probs: Tensor
    proved: Tensor
    ended: Tensor
    expansions: Tensor
    stats: SearchStats


def best_sets(
    head: Head,
    image_embedding: ImageEmbedding,
    *,
    count: int,
    max_labels: int | None = None,
    min_labels: int = 0,
    least: float = -math.inf,
    max_expansions: int = 200,
    evidence: Tensor | None = None,
    implementation: Implementation = "auto",
    on_nonfinite: Literal["raise", "mark"] = "raise",
) -> BestSets:
    """Find the K most probable label sets of each image, along increasing paths, with a proof.

    Best first over label prefixes, on the CPU: a prefix's score bounds that of all sets it begins.

    Args:
        head: the trained head.
        image_embedding: of B images.
        count: K.
        max_labels: T; all sets by default.
        min_labels: of a set, unless its last label is the last of all.
        least: sets of a lower log-probability are not wanted.
        max_expansions: prefixes of an image that are scored at most.
        evidence: what is known of labels, as in `beam_search`.
        implementation: as in `beam_search`; the reference scores every set.
        on_nonfinite: as in `beam_search`.

    Raises:
        ValueError: as `beam_search` does.
        NonFiniteError: for images whose embedding or scores are not finite.
    """
    _check_embedding(head, image_embedding)
    T = head.num_labels if max_labels is None else min(max_labels, head.num_labels)
    B, device = len(image_embedding), image_embedding.joint.device
    if implementation == "reference":
        if evidence is not None:
            check_evidence(head, evidence, B, T)
        found = reference.best_sets(
            head, image_embedding, count=count, max_labels=T, min_labels=min_labels,
            least=least, evidence=evidence,
        )  # fmt: skip
        return _as_best_sets(found, count, T, image_embedding.joint)
    on_cpu = image_embedding.to(_CPU, torch.float32)
    labels, lengths, log_probs, proved, ended, expansions, stats, nonfinite = packed_cpu_head(
        head
    ).best_sets(
        on_cpu.joint, on_cpu.label_logits, count, T, min_labels, least, max_expansions, evidence
    )
    sets = BestSets(
        labels.to(device), lengths.to(device), log_probs.to(device), proved.to(device),
        ended.to(device), expansions.to(device), SearchStats(*stats),
    )  # fmt: skip
    if nonfinite and on_nonfinite == "raise":
        raise NonFiniteError(sets.log_probs[:, 0].isnan().nonzero()[:, 0].tolist(), B)
    return sets


def _as_best_sets(
    found: list[list[tuple[tuple[int, ...], float]]], count: int, T: int, like: Tensor
) -> BestSets:
    B = len(found)
    labels = torch.full((B, count, T), PAD, device=like.device)
    lengths = torch.zeros(B, count, dtype=torch.int64, device=like.device)
    log_probs = like.new_full((B, count), -torch.inf)
    for b, sets in enumerate(found):
        for i, (chosen, score) in enumerate(sets):
            labels[b, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
            lengths[b, i], log_probs[b, i] = len(chosen), score
    proved = torch.tensor([len(sets) for sets in found], device=like.device)
    none = torch.zeros_like(proved)
    return BestSets(labels, lengths, log_probs, proved, proved < count, none, SearchStats())


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
    expected = (joint.shape[0], head.num_labels + 1)  # not len(): a traced batch has no number
    if logits is not None and logits.shape != expected:
        raise ValueError(
            f"image_embedding.label_logits must be {list(expected)}, got {list(logits.shape)}"
        )


def check_evidence(head: Head, evidence: Tensor, images: int, max_labels: int) -> None:
    """Check evidence of images as csrc/bindings.cpp does for the compiled search.

    Raises:
        ValueError: for another shape or type, other values than 1, 0 and -1, and more present
            labels than a path holds.
    """
    L = head.num_labels
    if evidence.dim() != 2 or evidence.shape[1] != L or evidence.shape[0] not in (1, images):
        raise ValueError(f"evidence must be [1 or {images}, {L}], got {list(evidence.shape)}")
    if evidence.dtype != torch.int8:
        raise ValueError(f"evidence must be int8, got {evidence.dtype}")
    for image, label in ((evidence < -1) | (evidence > 1)).nonzero()[:1].tolist():
        raise ValueError(
            "evidence must be 1 (present), -1 (absent) or 0 (unknown), got "
            f"{int(evidence[image, label])} for label {label} of image {image}"
        )
    present = (evidence == 1).sum(1)
    for image in (present > max_labels).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"image {image} has {present[image]} labels known to be present, "
            f"more than max_labels ({max_labels})"
        )


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
    return tensor.device if tensor.is_cuda and _C.WITH_CUDA else _CPU


def packed_head(head: Head, device: torch.device = _CPU) -> PackedHead:
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
        *_detached(head_parameters(head), _CPU),  # type: ignore[arg-type]  # see _detached
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
        *_detached(head_parameters(head), device),  # type: ignore[arg-type]  # see _detached
        cell=head.cell,
        activation=head.activation,
        prefix_bytes=prefix_bytes,
    )


def _detached(
    tensors: tuple[Tensor | None, ...], device: torch.device
) -> tuple[Tensor | None, ...]:
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


class _Options(NamedTuple):
    """The options of a call of the compiled search."""

    config: SearchConfig
    max_labels: int
    marginals: bool
    precision: SearchPrecision
    evidence: Tensor | None

    def arguments(self) -> tuple[int, int, int, str, bool, str, bool]:
        """Return the options up to `marginals` in the order of the compiled search's arguments."""
        config = self.config
        return (
            config.beam_size,
            self.max_labels,
            config.min_labels,
            config.order,
            config.end_takes_slot,
            config.stop,
            self.marginals,
        )


def _native(
    head: Head,
    embedding: ImageEmbedding,
    options: _Options,
    device: torch.device,
) -> tuple[SearchResult, int]:
    """Run the compiled search; return the result and how many images are marked."""
    joint, logits = embedding.joint, embedding.label_logits
    given = joint.device
    if device != given or joint.dtype != torch.float32:
        embedding = embedding.to(device, torch.float32)
        joint, logits = embedding.joint, embedding.label_logits
    packed = packed_head(head, device)
    labels, lengths, log_probs, sums, _, stats, nonfinite, log_evidence = packed.beam_search(
        joint,
        logits,
        *options.arguments(),
        precision=options.precision,
        evidence=options.evidence,
        marginal_places=options.config.marginal_places or 0,
    )
    if device != given:
        labels, lengths, log_probs = labels.to(given), lengths.to(given), log_probs.to(given)
        sums = None if sums is None else sums.to(given)
        log_evidence = None if log_evidence is None else log_evidence.to(given)
    result = SearchResult(
        labels, lengths, log_probs, head.num_labels, SearchStats(*stats), sums, log_evidence
    )
    return result, nonfinite


def _traced(
    head: Head,
    embedding: ImageEmbedding,
    options: _Options,
    device: torch.device,
) -> SearchResult:
    """Put the registered op into the graph that torch.compile or torch.export is making."""
    given = embedding.joint.device
    tensors = (embedding.joint, embedding.label_logits, *head_parameters(head))
    evidence = None if options.evidence is None else options.evidence.to(device)
    labels, lengths, log_probs, sums, log_evidence = torch.ops.cnnrnn.beam_search(
        *_detached(tensors, device),
        head.cell,
        head.activation,
        *options.arguments(),
        head.cache_generation,
        head.prefix_bytes,
        options.precision,
        evidence,
        options.config.marginal_places or 0,
    )
    return SearchResult(
        labels.to(given),
        lengths.to(given),
        log_probs.to(given),
        head.num_labels,
        requested_marginals=sums.to(given) if options.marginals else None,
        log_evidence=log_evidence.to(given) if options.marginals else None,
    )
