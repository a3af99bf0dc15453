"""An epoch of head training on cached features: `python -m benchmarks.training`.

82,783 images with 2,048 features and COCO-like label sets (label_sets.py), the default head and its
optimiser step included, one thread. The recurrence runs

- over the batch's distinct prefixes, as `Head.forward` does;
- over length-sorted packed sequences, with torch.nn.LSTM and scores of the real steps alone;
- over padded paths, an LSTM step and scores for every position.

All three give the same loss, which is checked first. A fourth contestant trains what is common to
them, trunk, chain term and optimiser, without recurrence and label scores: nothing can be faster
than that. Prints seconds and images/s of the epoch, and ratios of the steps' medians, which a
disturbance of some steps does not move.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.search.label_sets import sample_label_sets
from cnnrnn.config import ModelConfig, TrainConfig
from cnnrnn.labels import PAD, forbidden_labels, increasing_paths, prefix_trie
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.network.losses import binary_cross_entropy, sequence_loss
from cnnrnn.training.optimizers import make_optimizer

IMAGES, FEATURES, LABELS = 82_783, 2048, 80
TURN = 4  # batches: what disturbs one disturbs all


def shared_prefixes(head: Head, features: Tensor, targets: Tensor) -> Tensor:
    """The package's own forward pass and loss."""
    paths = increasing_paths(targets)
    scores, label_scores = head(features, paths)
    return _with_auxiliary(sequence_loss(scores, paths, "increasing"), label_scores, targets)


class Packed(nn.Module):
    """The head with torch's LSTM over packed sequences of START and the labels."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.lstm = nn.LSTM(head.joint_dim, head.hidden_dim, batch_first=True)
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(self.lstm, f"{name}_l0").copy_(getattr(head.recurrence, name))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the losses [B]."""
        head = self.head
        paths = increasing_paths(targets)
        order = targets.sum(1).argsort(descending=True)
        features, paths, targets = features[order], paths[order], targets[order]
        lengths = (paths != PAD).sum(1)
        embedding, label_scores = head.embed_with_label_scores(features)
        inputs = functional.pad(paths.masked_fill(paths == PAD, 0), (1, 0), value=head.start)
        packed = pack_padded_sequence(head.input_rows[inputs], lengths + 1, batch_first=True)
        outputs, _ = self.lstm(packed)
        # Rows by step, then by image: those that reach it are the first ones.
        images = torch.cat([torch.arange(int(n)) for n in packed.batch_sizes])
        steps = torch.arange(len(packed.batch_sizes)).repeat_interleave(packed.batch_sizes)
        rows = head.score(outputs.data, ImageEmbedding(embedding.joint[images]))
        if embedding.label_logits is not None:
            rows = rows + embedding.label_logits[images]
        rows = rows.masked_fill(
            forbidden_labels(paths, head.num_labels, "increasing")[images, steps], -torch.inf
        )
        padded = functional.pad(paths, (0, 1), value=PAD)
        aims = padded.masked_fill(padded == PAD, head.num_labels)[images, steps]
        losses = functional.cross_entropy(rows, aims, reduction="none")
        sums = losses.new_zeros(len(paths)).index_add(0, images, losses)
        found = _with_auxiliary(sums, label_scores, targets)
        return torch.empty_like(found).index_copy(0, order, found)


def padded_loop(head: Head, features: Tensor, targets: Tensor) -> Tensor:
    """One LSTM step and one row of scores for every position of every path."""
    paths = increasing_paths(targets)
    rows = paths.masked_fill(paths == PAD, head.end)
    state = head.extend(rows.new_full((len(rows),), head.start), head.initial_state(len(rows)))
    outputs = [state[0]]
    for labels in rows.unbind(1):
        state = head.extend(labels, state)
        outputs.append(state[0])
    embedding, label_scores = head.embed_with_label_scores(features)
    scores = head.score(torch.stack(outputs, 1), ImageEmbedding(embedding.joint[:, None]))
    if embedding.label_logits is not None:
        scores = scores + embedding.label_logits[:, None]
    scores = scores.masked_fill(forbidden_labels(paths, head.num_labels, "increasing"), -torch.inf)
    padded = functional.pad(paths, (0, 1), value=PAD)
    aims = padded.masked_fill(padded == PAD, head.num_labels)
    losses = functional.cross_entropy(scores.flatten(0, 1), aims.flatten(), reduction="none")
    past_end = torch.arange(aims.shape[1]) > (paths != PAD).sum(1, keepdim=True)
    sums = losses.view_as(aims).masked_fill(past_end, 0).sum(1)
    return _with_auxiliary(sums, label_scores, targets)


def common_part(head: Head, features: Tensor, targets: Tensor) -> Tensor:
    """What each of the three does besides recurrence and label scores."""
    increasing_paths(targets)
    embedding, label_scores = head.embed_with_label_scores(features)
    return _with_auxiliary(embedding.joint.sum(1), label_scores, targets)


def _with_auxiliary(losses: Tensor, label_scores: Tensor | None, targets: Tensor) -> Tensor:
    if label_scores is None:
        return losses
    return losses + binary_cross_entropy(label_scores, targets)


def epoch(
    losses: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]],
    features: Tensor,
    targets: Tensor,
    batch: int,
) -> dict[str, list[float]]:
    """Train an epoch of each, by turns of a few batches; return the seconds of each step."""
    optimizers = {
        name: make_optimizer([{"params": list(module.parameters()), "lr": 1e-3}], TrainConfig())
        for name, (module, _) in losses.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    parts = order.split(batch)
    for first in range(0, len(parts), TURN):
        for name, (module, loss) in losses.items():
            for part in parts[first : first + TURN]:
                began = time.perf_counter()
                optimizers[name].zero_grad(set_to_none=True)
                loss(features[part], targets[part]).mean().backward()
                nn.utils.clip_grad_norm_(module.parameters(), 5.0)
                optimizers[name].step()
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    targets = torch.from_numpy(np.ascontiguousarray(sample_label_sets(IMAGES, LABELS, 0)))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(IMAGES, FEATURES, generator=generator)
    for hidden_dim in (512, ModelConfig().hidden_dim):
        losses: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {}
        for name in ("distinct prefixes", "packed sequences", "padded paths", "common part"):
            torch.manual_seed(0)
            head = Head.from_config(ModelConfig(hidden_dim=hidden_dim), LABELS, FEATURES)
            module: nn.Module = Packed(head) if name == "packed sequences" else head
            loss = {
                "distinct prefixes": partial(shared_prefixes, head),
                "packed sequences": module,
                "padded paths": partial(padded_loop, head),
                "common part": partial(common_part, head),
            }[name]
            module.eval()
            with torch.no_grad():
                if name == "common part":
                    losses[name] = (module.train(), loss)
                    continue
                expected = shared_prefixes(head, features[:64], targets[:64])
                torch.testing.assert_close(
                    loss(features[:64], targets[:64]), expected, rtol=1e-4, atol=1e-4
                )
            losses[name] = (module.train(), loss)
        results = epoch(losses, features, targets, arguments.batch)
        fastest = median(results["distinct prefixes"])
        trie = prefix_trie(increasing_paths(targets[: arguments.batch]))
        rows, nodes = int((trie.nodes >= 0).sum()), 1 + sum(map(len, trie.labels))
        print(f"H = {hidden_dim}, batches of {arguments.batch}: the first one has {rows} steps, "
              f"{trie.nodes.numel()} with padding, {nodes} distinct prefixes")  # fmt: skip
        for name, seconds in results.items():
            total = sum(seconds)
            print(f"  {name:18} epoch {total:6.1f} s  {IMAGES / total:8,.0f} images/s  "
                  f"{median(seconds) / fastest:5.2f}x", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
