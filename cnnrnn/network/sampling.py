"""Label sets drawn from a head's distribution: for the mean of any function of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cnnrnn.config import Order
from cnnrnn.labels import check_evidence

if TYPE_CHECKING:
    from cnnrnn.network.head import Head, ImageEmbedding


class Samples(NamedTuple):
    """Label sets drawn for B images.

    Attributes:
        sets: [B, n, L] bool.
        log_weights: [B, n]. The mean of a function f over P(set | image, evidence) is estimated by
            the mean of f over the draws, weighted by exp(log_weights). All 0 without evidence;
            -inf for a draw that ended where nothing was admissible. exp of their log-mean-exp is
            an unbiased estimate of P(evidence | image).
    """

    sets: Tensor
    log_weights: Tensor

    def marginals(self) -> Tensor:
        """Estimate the probability that each label is in the set: [B, L], NaN where no draw is."""
        weights = (self.log_weights - self.log_weights.amax(1, keepdim=True)).exp()
        return (weights[:, :, None] * self.sets).sum(1) / weights.sum(1, keepdim=True)


@torch.no_grad()
def sample_sets(
    head: Head,
    embedding: ImageEmbedding,
    count: int,
    *,
    evidence: Tensor | None = None,
    seed: int = 0,
    max_labels: int | None = None,
    order: Order = "increasing",
) -> Samples:
    """Draw label sets, each label given the ones before it (ancestral sampling).

    Labels known to be present or absent are respected as in the search: a step is drawn among what
    evidence admits. With a chain term it is drawn by the logits of `given_logits`, which know what
    is still to come, and its weight is its probability over that of drawing it so. Without one the
    weight is the probability of what was admitted (likelihood weighting; Fung and Chang, UAI 1989):
    more draws are needed.

    Args:
        head: in eval mode.
        embedding: of B images.
        count: n, draws for each image.
        evidence: [1 or B, L] int8: 1 present, -1 absent, 0 unknown.
        seed: of the draws; the same for the same arguments on one kind of device.
        max_labels: T, a path of so many labels ends; the head's own by default.
        order: of the paths that the head was trained on.

    Raises:
        ValueError: an option is out of range, or evidence does not fit.
    """
    B, L, device = len(embedding), head.num_labels, embedding.joint.device
    T = head.max_labels if max_labels is None else max_labels
    T = T if order == "free" else min(T, L)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
    if T < 0:
        raise ValueError(f"max_labels must be at least 0, got {T}")
    if evidence is not None:
        check_evidence(evidence, B, L, T)
    known = torch.zeros(1, L, dtype=torch.int8) if evidence is None else evidence
    known = known.to(device).expand(B, L)
    logits = given = embedding.label_logits
    if logits is not None and evidence is not None:
        given = torch.where(known.any(1, keepdim=True), given_logits(logits, known), logits)
    generator = torch.Generator(device).manual_seed(seed)
    rows = B * count
    image = torch.arange(B, device=device).repeat_interleave(count)
    sets = torch.zeros(rows, L, dtype=torch.bool, device=device)
    wide = torch.float64 if embedding.joint.dtype == torch.float64 else torch.float32
    log_weights = torch.zeros(rows, dtype=wide, device=device)
    last = torch.full((rows,), -1, device=device)
    open_ = torch.ones(rows, dtype=torch.bool, device=device)
    start = torch.full((1,), head.start, device=device)
    outputs, cells = head.extend(start, head.initial_state(1))
    prefix = torch.zeros(rows, dtype=torch.int64, device=device)  # a row of the states above
    for step in range(T):
        at = open_.nonzero()[:, 0]
        if not len(at):
            break
        # Draws of one image with one prefix are drawn from the same row.
        pairs, row = torch.unique(image[at] * len(outputs) + prefix[at], return_inverse=True)
        one = at[torch.empty_like(pairs).scatter_(0, row, torch.arange(len(at), device=device))]
        of = image[one]
        scores = head.score(outputs[prefix[one]], embedding.of(of)).to(wide)
        allowed = _allowed(order, sets[one], last[one])
        admitted = allowed & _admitted(order, known[of], sets[one], T - step)
        proposed = scores if given is None else scores + given[of]
        scores = scores if logits is None else scores + logits[of]
        proposed = proposed.masked_fill(~admitted, -torch.inf)
        mass = proposed.logsumexp(1) - scores.masked_fill(~allowed, -torch.inf).logsumexp(1)
        possible = (mass > -torch.inf)[row]
        log_weights[at[~possible]] = -torch.inf
        open_[at[~possible]] = False
        at, row = at[possible], row[possible]
        drawn = _drawn(proposed.softmax(1), row, generator)
        log_weights[at] += mass[row]
        if logits is not None and given is not None:
            log_weights[at] += (logits - given)[image[at], drawn]
        open_[at[drawn == L]] = False
        at, drawn = at[drawn < L], drawn[drawn < L]
        sets[at, drawn] = True
        last[at] = drawn
        # Draws of one prefix share its state.
        pairs, index = torch.unique(prefix[at] * L + drawn, return_inverse=True)
        parents = pairs // L
        outputs, cells = head.extend(pairs % L, (outputs[parents], cells[parents]))
        prefix[at] = index
    lacking = ((known == 1)[image] & ~sets).any(1)
    log_weights[lacking] = -torch.inf
    return Samples(sets.view(B, count, L), log_weights.view(B, count))


def given_logits(label_logits: Tensor, evidence: Tensor) -> Tensor:
    """Return the chain term's next-label logits given what is known of labels.

    As `chain_logits`, for independent labels of which known ones are certain: an absent label
    cannot follow and no label before it is the less probable for it; a present one's own odds do
    not count. With these a path of an independent classifier is drawn as evidence has it.

    Args:
        label_logits: [B, L+1] as of `chain_logits`, END last.
        evidence: [B, L] int8: 1 present, -1 absent, 0 unknown.

    Returns:
        [B, L+1], to be read where a label may follow that is not known to be absent.
    """
    known = evidence != 0
    over_end = label_logits - label_logits[:, -1:]
    own = over_end[:, :-1] - over_end.flip(1).logcumsumexp(1).flip(1)[:, 1:]  # v
    softplus = functional.softplus(own).masked_fill(known, 0)
    to_come = softplus.flip(1).cumsum(1).flip(1) - softplus
    return functional.pad(own.masked_fill(known, 0) + to_come, (0, 1))


def _drawn(probabilities: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a column from each of some rows, in proportion to its value: [M].

    By the inverse of the distribution function, all rows' laid end to end: one random number a
    draw. A column of probability 0 does not make it rise, so it is never drawn.

    Args:
        probabilities: [R, L+1], at least one above 0 in the rows asked for.
        rows: [M] int64.
        generator: of the draws.
    """
    rising = probabilities.double().cumsum(1)
    total = rising[:, -1:]
    rising = torch.where(total > 0, rising / total, 1.0)  # 1 in rows that are not asked for
    rising += torch.arange(len(rising), device=rising.device)[:, None]
    device = generator.device
    points = torch.rand(len(rows), dtype=torch.float64, generator=generator, device=device) + rows
    points = torch.minimum(points, torch.nextafter(rows + 1.0, rows.double()))  # not rounded up
    found = torch.searchsorted(rising.flatten(), points, right=True)
    return found - rows * probabilities.shape[1]


def _allowed(order: Order, sets: Tensor, last: Tensor) -> Tensor:
    """Return what an order lets follow paths with these labels [M, L] and last label: [M, L+1]."""
    allowed = functional.pad(torch.ones_like(sets), (0, 1), value=True)
    if order == "increasing":
        allowed[:, :-1] = torch.arange(sets.shape[1], device=sets.device) > last[:, None]
    elif order == "unique":
        allowed[:, :-1] = ~sets
    return allowed


def _admitted(order: Order, known: Tensor, sets: Tensor, steps_left: int) -> Tensor:
    """Return what evidence [M, L] lets follow paths with these labels [M, L]: [M, L+1] bool.

    As `search.reference.admissible_labels` says it of one path.
    """
    L = sets.shape[1]
    lacking = (known == 1) & ~sets
    lacks = lacking.any(1)
    admitted = torch.cat([known != -1, ~lacks[:, None]], 1)
    if order == "increasing":
        lowest = lacking.int().argmax(1).masked_fill(~lacks, L)
        admitted[:, :L] &= torch.arange(L, device=sets.device) <= lowest[:, None]
    urgent = lacks & (lacking.sum(1) == steps_left)
    admitted[:, :L] &= lacking | ~urgent[:, None]
    return admitted
