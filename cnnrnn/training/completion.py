"""Label sets of which some labels are unknown, completed by what the model itself believes."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnrnn.config import Order
from cnnrnn.labels import as_evidence
from cnnrnn.network.head import Head

DRAWS = 8
"""Completions among which one is drawn, by a head with a chain term."""
DRAWS_WITHOUT_CHAIN_TERM = 16
"""The same of a head without one, whose draws do not look ahead: see `sample_sets`."""


MOST_ADDED = 4
"""Times the longest path that a completion may add: one of an untrained head could go on and on."""


@torch.no_grad()
def completed(
    head: Head, features: Tensor, targets: Tensor, unknown: Tensor, order: Order
) -> Tensor:
    """Draw each image's unknown labels given those that are known: [B, L] bool.

    The gradient of log P(what is known) is the mean gradient of log P(whole set) over the sets that
    agree with it, each as probable as the model holds it to be (Fisher's identity), so one such set
    per step and image trains the likelihood of what is known. Sets drawn label by label are nearly
    so distributed: some are drawn, and one is kept in proportion to its weight (sampling importance
    resampling; Rubin, JASA 1987). What is left of the difference leans to the chain term alone.

    Args:
        head: its dropout is left out, and it computes in float32 or wider.
        features: [B, F].
        targets: [B, L] bool, labels known to be present.
        unknown: [B, L] bool.
        order: of the paths that the head is trained on.
    """
    partly = unknown.any(1).nonzero()[:, 0]
    if not len(partly):
        return targets
    count = DRAWS if head.label_classifier is not None else DRAWS_WITHOUT_CHAIN_TERM
    training = head.training
    head.eval()
    evidence = as_evidence(targets[partly], unknown[partly])
    # One more than can be there, so that END is drawn too.
    longest = int((evidence != -1).sum(1).max()) + 1
    limit = int(targets.sum(1).max()) + MOST_ADDED * head.max_labels
    with torch.autocast(features.device.type, enabled=False):
        draws = head.sample(
            head.embed(features[partly].float()), count, evidence,
            seed=int(torch.randint(2**62, ())), order=order, max_labels=min(longest, limit),
        )  # fmt: skip
    head.train(training)
    log_weights = draws.log_weights.double()
    if limit < min(longest, head.num_labels):  # those were cut off
        log_weights[draws.sets.sum(2) >= limit] = -torch.inf
    weights = (log_weights - log_weights.amax(1, keepdim=True)).exp().nan_to_num(0)
    found = weights.sum(1) > 0  # elsewhere the unknown labels are left out
    weights[~found] = 1.0
    chosen = torch.multinomial(weights, 1)[:, 0]
    sets = draws.sets[torch.arange(len(partly), device=chosen.device), chosen]
    whole = targets.clone()
    whole[partly] |= sets & found[:, None]
    return whole
