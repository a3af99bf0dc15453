"""The public beam search: resolves options, runs an implementation, checks the result."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cnnrnn import _C  # which also registers torch.ops.cnnrnn.beam_search
from cnnrnn.config import SearchConfig, SearchDevice, SearchPrecision
from cnnrnn.labels import check_evidence
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import reference
from cnnrnn.search.checks import (
    Implementation,
    NonFiniteError,
    OnNonFinite,
    check_embedding,
    require_implementation,
    resolve_max_labels,
)
from cnnrnn.search.device import can_be_relied_on, device_of_search, require_search_device
from cnnrnn.search.exact import best_sets
from cnnrnn.search.native import NativeOptions, native_search, traced_search
from cnnrnn.search.packed import CPU
from cnnrnn.search.result import SearchResult


def beam_search(
    head: Head,
    image_embedding: ImageEmbedding,
    config: SearchConfig | None = None,
    implementation: Implementation = "auto",
    marginals: bool = False,
    on_nonfinite: OnNonFinite = "raise",
    precision: SearchPrecision = "exact",
    evidence: Tensor | None = None,
    search_device: SearchDevice = "auto",
) -> SearchResult:
    """Find the N best label paths of each image.

    Args:
        head: the trained head.
        image_embedding: `head.embed(features)` of B images, float32; B may be 0.
        config: search options; `SearchConfig()` by default.
        implementation: `auto` and `native` are the compiled search; `reference` is plain torch.
        marginals: also return the probability that a path holds each label, summed over every
            visited path that does not yet; given evidence, over the complete paths found.
        on_nonfinite: `raise`, or `mark` such images with log-probability NaN and go on. Under
            torch.compile and torch.export, where values are not known, they are marked.
        precision: of label scores on a GPU: `exact` multiplies in float32, `fast` in float16 with
            float32 sums; rankings closer than its rounding may change. Elsewhere both are exact.
        evidence: what is known of labels, [B, L] int8 or [1, L] for all images: 1 present, -1
            absent, 0 unknown. The paths found hold every present label and no absent one; their
            scores stay log P(path | image), without it. Where the live paths of all banks are more
            than 32 an image, the search runs on the CPU, which a warning says once.
        search_device: `cpu` searches there, `cuda` on the GPU of `image_embedding`, or on torch's
            current one where that is on the CPU; either copies what lies elsewhere. `auto` searches
            on the CPU, but for tensors that are on a GPU of `MEASURED_GPUS`, or on any for
            `native`, in a build with CUDA. The first search on a GPU compares a small one with the
            CPU's; where they differ, a warning says so, and the CPU searches from then on.

    Returns:
        The paths, best first, on the device of `image_embedding`.

    Raises:
        ValueError: for options that do not fit together, shapes that do not fit the head,
            evidence of more present labels than max_labels, and `cuda` where there is no GPU or
            this build lacks the CUDA search.
        NonFiniteError: for images whose embedding or scores are not finite.
    """
    config = config or SearchConfig()
    max_labels = resolve_max_labels(head, config)
    check_embedding(head, image_embedding)
    require_implementation(implementation)
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision must be exact or fast, got {precision!r}")
    require_search_device(search_device)
    if implementation == "reference" and search_device != "auto":
        raise ValueError(
            "search_device must be auto for the reference, which runs where image_embedding is, "
            f"got {search_device}"
        )
    if config.algorithm == "exact":
        return _exact(
            head, image_embedding, config, implementation, marginals, on_nonfinite, evidence,
            search_device,
        )  # fmt: skip
    if implementation in ("auto", "native"):
        device = device_of_search(image_embedding.joint, implementation, search_device)
        if device != CPU and not _has_room_on_gpu(config, marginals, evidence):
            device = CPU
        if not can_be_relied_on(device):
            device = CPU
        options = NativeOptions(config, max_labels, marginals, precision, evidence)
        arguments = (head, image_embedding, options, device)
        if torch.compiler.is_compiling():
            return traced_search(*arguments)
        result, nonfinite = native_search(*arguments)
    else:
        if evidence is not None:
            check_evidence(evidence, len(image_embedding), head.num_labels, max_labels)
        result = reference.beam_search(
            head,
            image_embedding,
            config,
            max_labels=max_labels,
            marginals=marginals,
            evidence=evidence,
        )
        nonfinite = len(result.nonfinite())
    if nonfinite and on_nonfinite == "raise":
        raise NonFiniteError(result.nonfinite().tolist(), len(result))
    return result


def _has_room_on_gpu(config: SearchConfig, marginals: bool, evidence: Tensor | None) -> bool:
    """Whether a GPU can hold the live paths of all banks; a warning says once that it cannot."""
    places = config.places(marginals)
    if evidence is None:
        banks = 1
    elif torch.compiler.is_compiling():  # what is known is not known yet
        return False
    else:
        banks = 1 + (int((evidence == 1).sum(-1).amax()) if evidence.numel() else 0)
    wide = evidence is not None or places > config.beam_size
    if not wide or banks * places <= _C.MAX_CUDA_PATHS:
        return True
    _warn_once(
        f"the CPU searches: {banks - 1} known labels need {banks} banks of {places} live paths an "
        f"image, and a GPU has room for {_C.MAX_CUDA_PATHS}; lower marginal_places or beam_size to "
        "search there"
    )
    return False


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _exact(
    head: Head,
    embedding: ImageEmbedding,
    config: SearchConfig,
    implementation: Implementation,
    marginals: bool,
    on_nonfinite: OnNonFinite,
    evidence: Tensor | None,
    search_device: SearchDevice,
) -> SearchResult:
    """Return the N most probable sets, and the marginals of a beam where they are wanted."""
    if torch.compiler.is_compiling():
        raise ValueError("algorithm exact is not for torch.compile and torch.export; use beam")
    beam = replace(config, algorithm="beam")
    call = partial(beam_search, head, config=beam, implementation=implementation,
                   marginals=marginals, on_nonfinite="mark",
                   search_device=search_device)  # fmt: skip
    found = call(embedding, evidence=evidence) if marginals else None
    sets = best_sets(
        head, embedding,
        count=config.beam_size, max_labels=resolve_max_labels(head, config),
        min_labels=config.min_labels, max_expansions=config.max_expansions,
        implementation=implementation, evidence=evidence, on_nonfinite=on_nonfinite,
    )  # fmt: skip
    certified = (sets.proved >= 1) | sets.ended
    exact = SearchResult(
        sets.labels, sets.lengths, sets.log_probs, head.num_labels, sets.stats,
        None if found is None else found.marginals(),
        None if found is None else found.log_evidence,
        certified,
    )  # fmt: skip
    # Where the expansions did not suffice, a beam may have found what is better.
    open_ = (~certified & ~sets.log_probs[:, 0].isnan()).nonzero()[:, 0]
    if not len(open_):
        return exact
    known = evidence
    if evidence is not None and len(evidence) > 1:
        known = evidence[open_.to(evidence.device)]
    of_beam = call(embedding.of(open_), evidence=known)
    better = of_beam.log_probs[:, 0] > exact.log_probs[open_, 0]
    for mine, theirs in ((exact.labels, of_beam.labels), (exact.lengths, of_beam.lengths),
                         (exact.log_probs, of_beam.log_probs)):  # fmt: skip
        mine[open_[better]] = theirs[better]
    return exact
