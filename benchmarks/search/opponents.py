"""Batched beam searches in plain torch: what the compiled search is measured against.

Both do the same work under the default options (increasing order, n_best stop), as one would write
them for speed in torch: images that have ended and paths that were dropped are left out, the gates'
input half is a lookup, the largest allowed logit is a running maximum, and in-place operations save
memory traffic.

- `PathStates` advances the recurrence for every live path of every image;
- `PrefixStates` keeps one state per label prefix in a table, across steps, images and calls, as the
  compiled search does, and makes the missing ones of a step together.

`compiled=True` passes the arithmetic of a step through torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.network.recurrence import LSTMRecurrence


class FoundPaths(NamedTuple):
    """The N best label paths of each image, best first."""

    labels: Tensor  # [B, N, T], padded with -1
    log_probs: Tensor  # [B, N]


def step_log_probs(
    projected: Tensor,
    joint: Tensor,
    offsets: Tensor,
    label_embedding: Tensor,
) -> Tensor:
    """Equations 4 and 5 and the softmax, for the rows that are live.

    Args:
        projected: [R, D] U_o o of each row's path.
        joint: [R, D] of each row's image.
        offsets: [R, L+1] bias and label logits, -inf where a label may not follow.
        label_embedding: [D, L+1].

    Returns:
        [R, L+1] log-probabilities.
    """
    total = (projected + joint).relu()
    return torch.addmm(offsets, total, label_embedding).log_softmax(1).clamp(max=0)


def lstm_step(
    gates: Tensor, output: Tensor, cell: Tensor, hidden_weight: Tensor, output_projection: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step for M prefixes: output [M, H], cell [M, H] and U_o o [M, D] after it.

    Args:
        gates: [M, 4H] input half of the gates, with biases.
        output: [M, H] before the step.
        cell: [M, H] before the step.
        hidden_weight: [H, 4H].
        output_projection: [H, D].
    """
    i, f, g, o = torch.addmm(gates, output, hidden_weight).chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    output = o.sigmoid() * cell.tanh()
    return output, cell, output @ output_projection


class _TorchSearch:
    """The beams, which both searches share; subclasses keep the recurrent states."""

    def __init__(self, head: Head, beam_size: int, max_labels: int, compiled: bool = False) -> None:
        if head.activation != "relu" or not isinstance(head.recurrence, LSTMRecurrence):
            raise ValueError(
                f"the opponents know relu and lstm, got {head.activation}, {head.cell}"
            )
        self.head, self.beam_size, self.max_labels = head, beam_size, max_labels
        L = head.num_labels
        with torch.no_grad():
            self._gates = head.recurrence.input_gates(head.input_rows)
            self._hidden_weight = head.recurrence.weight_hh.t().contiguous()
            self._output_projection = head.output_projection.weight.t().contiguous()
            self._label_embedding = head.label_embedding[: L + 1].t().contiguous()
            # Row k + 1 is the bias of what may follow label k, row 0 of what may follow the root.
            forbidden = torch.ones(L + 1, L + 1).triu().t().tril(-1).bool()
            bias = torch.zeros(L + 1) if head.score_bias is None else head.score_bias
            self._bias = bias.repeat(L + 1, 1).masked_fill(forbidden, -torch.inf)
        self._step: Callable[..., Tensor] = step_log_probs
        self._lstm: Callable[..., tuple[Tensor, Tensor, Tensor]] = lstm_step
        if compiled:
            self._step = torch.compile(step_log_probs, dynamic=True)
            self._lstm = torch.compile(lstm_step, dynamic=True)
        zeros = torch.zeros(1, head.hidden_dim)
        self._root = self._extend(torch.tensor([head.start]), zeros, zeros)

    @torch.no_grad()
    def _extend(
        self, labels: Tensor, output: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._lstm(
            self._gates[labels], output, cell, self._hidden_weight, self._output_projection
        )

    def start(self, rows: int) -> Tensor:
        """Begin with `rows` empty paths; return their U_o o [rows, D]."""
        raise NotImplementedError

    def advance(self, parents: Tensor, labels: Tensor) -> Tensor:
        """Extend rows `parents` [R] by `labels` [R]; return the new rows' U_o o [R, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def search(self, embedding: ImageEmbedding) -> FoundPaths:
        """Find the N best label paths of each image."""
        N, T, L, B = self.beam_size, self.max_labels, self.head.num_labels, len(embedding)
        joint, logits = embedding.joint, embedding.label_logits
        most = None if logits is None else logits.flip(1).cummax(1).values.flip(1)
        done_scores = joint.new_full((B, N), -torch.inf)
        done_paths = torch.full((B, N, T), -1)
        images = torch.arange(B)  # that have not ended
        paths = torch.full((B, 1, T), -1)  # [images, n, T]
        # Rows are the live paths: the place of their image, their rank there, score and last label.
        at, rank = torch.arange(B), torch.zeros(B, dtype=torch.int64)
        scores, last = torch.zeros(B), torch.full((B,), -1)
        projected = self.start(B)
        for step in range(T + 1):
            n = paths.shape[1]
            ended = scores.new_full((len(images), n), -torch.inf)
            if step < T:
                offsets = self._bias[last + 1]
                if logits is not None and most is not None:
                    offsets += logits[images[at]] - most[images[at], last + 1, None]
                log_probs = self._step(projected, joint[images[at]], offsets, self._label_embedding)
                ended[at, rank] = scores + log_probs[:, L]
                best, labels = log_probs[:, :L].topk(min(N, L))
                best += scores[:, None]
            else:
                ended[at, rank] = scores
            found, kept = torch.cat([done_scores[images], ended], 1).topk(N)
            done_scores[images] = found
            done_paths[images] = _rows(torch.cat([done_paths[images], paths], 1), kept)
            if step == T:
                break
            K = best.shape[1]
            extended = scores.new_full((len(images), n, K), -torch.inf)
            extended[at, rank] = best
            candidates = labels.new_zeros(len(images), n, K)
            candidates[at, rank] = labels
            row_of = at.new_zeros(len(images), n)
            row_of[at, rank] = torch.arange(len(at))
            live_scores, kept = extended.flatten(1).topk(min(N, n * K))
            live = (live_scores > found[:, -1:]) & (live_scores > -torch.inf)
            alive = live.any(1).nonzero()[:, 0]
            if len(alive) == 0:
                break
            labels = candidates.flatten(1).gather(1, kept)
            paths = _rows(paths, kept // K)
            paths[:, :, step] = labels
            row_of = row_of.gather(1, kept // K)
            if len(alive) < len(images):
                images, paths, live = images[alive], paths[alive], live[alive]
                live_scores, labels, row_of = live_scores[alive], labels[alive], row_of[alive]
            at, rank = live.nonzero(as_tuple=True)
            scores, last = live_scores[at, rank], labels[at, rank]
            if step + 1 < T:
                projected = self.advance(row_of[at, rank], last)
        return FoundPaths(done_paths, done_scores)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Pick rows [B, n, W] of [B, m, W] by index [B, n]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


class PathStates(_TorchSearch):
    """The recurrence runs for every live path: nothing is shared between paths or images."""

    def start(self, rows: int) -> Tensor:
        output, cell, projected = self._root
        self._output, self._cell = output.expand(rows, -1), cell.expand(rows, -1)
        return projected.expand(rows, -1)

    def advance(self, parents: Tensor, labels: Tensor) -> Tensor:
        self._output, self._cell, projected = self._extend(
            labels, self._output[parents], self._cell[parents]
        )
        return projected


class PrefixStates(_TorchSearch):
    """One state per label prefix, kept across calls in tables that double when they are full.

    `children` [nodes * L] holds the node of each prefix extended by each label, or -1: the fastest
    table that torch can look into, at 4 L bytes per prefix.
    """

    def __init__(self, head: Head, beam_size: int, max_labels: int, compiled: bool = False) -> None:
        super().__init__(head, beam_size, max_labels, compiled)
        self.clear()

    def clear(self) -> None:
        """Forget every state but the root's."""
        capacity = 1024
        self._children = torch.full((capacity * self.head.num_labels,), -1, dtype=torch.int32)
        self._states = [values.new_empty(capacity, values.shape[1]) for values in self._root]
        for states, root in zip(self._states, self._root, strict=True):
            states[:1] = root
        self.size = 1

    def start(self, rows: int) -> Tensor:
        self._nodes = torch.zeros(rows, dtype=torch.int64)
        return self._root[2].expand(rows, -1)

    def advance(self, parents: Tensor, labels: Tensor) -> Tensor:
        L = self.head.num_labels
        keys = self._nodes[parents] * L + labels
        self._nodes = self._children[keys].long()
        missing = self._nodes < 0
        if missing.any():
            made = torch.unique(keys[missing])
            first, self.size = self.size, self.size + len(made)
            self._reserve()
            nodes = made // L
            output, cell, _ = self._states
            for states, new in zip(
                self._states, self._extend(made % L, output[nodes], cell[nodes]), strict=True
            ):
                states[first : self.size] = new
            self._children[made] = torch.arange(first, self.size, dtype=torch.int32)
            self._nodes = self._children[keys].long()
        return self._states[2][self._nodes]

    def _reserve(self) -> None:
        capacity = len(self._states[0])
        if self.size <= capacity:
            return
        while capacity < self.size:
            capacity *= 2
        for i, states in enumerate(self._states):
            larger = states.new_empty(capacity, states.shape[1])
            larger[: len(states)] = states
            self._states[i] = larger
        children = self._children.new_full((capacity * self.head.num_labels,), -1)
        children[: len(self._children)] = self._children
        self._children = children
