"""Batched beam searches in plain torch: what the compiled search is measured against.

Both do the same work under the default options (increasing order, n_best stop) in whole-batch
tensor operations, as one would write them for speed in torch:

- `PathStates` advances the recurrence for every live path of every image;
- `PrefixStates` keeps one state per label prefix in a table, across steps, images and calls, as the
  compiled search does, and makes the missing ones of a step together.

`compiled=True` passes the arithmetic of a step through torch.compile. Rows of paths that were
dropped, and of images that have ended, are left out of the recurrence, except with
`every_slot=True`, the loop as one writes it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnnrnn.model import Head, ImageEmbedding


class Paths(NamedTuple):
    """The N best label paths of each image, best first."""

    labels: Tensor  # [B, N, T], padded with -1
    log_probs: Tensor  # [B, N]


def step_scores(
    projected: Tensor,
    joint: Tensor,
    label_logits: Tensor | None,
    label_embedding: Tensor,
    score_bias: Tensor | None,
    last: Tensor,
    live_scores: Tensor,
) -> Tensor:
    """Equations 4 and 5 and the step's log-probabilities for all live paths at once.

    Args:
        projected: [B, n, D] U_o o of each live path.
        joint: [B, D].
        label_logits: [B, L+1] or None.
        label_embedding: [L+1, D].
        score_bias: [L+1] or None.
        last: [B, n] last label of each live path, -1 at the root.
        live_scores: [B, n], -inf where no path lives.

    Returns:
        [B, n, L+1] scores of the paths so continued.
    """
    total = (projected + joint[:, None]).relu()
    scores = torch.nn.functional.linear(total, label_embedding, score_bias)
    forbidden = torch.arange(scores.shape[2], device=scores.device) <= last[:, :, None]
    if label_logits is not None:
        logits = label_logits[:, None].masked_fill(forbidden, -torch.inf)
        scores = scores + (logits - logits.amax(2, keepdim=True))
    else:
        scores = scores.masked_fill(forbidden, -torch.inf)
    return live_scores[:, :, None] + scores.log_softmax(2).clamp(max=0)


class _TorchSearch:
    """The beams, which both searches share; subclasses keep the recurrent states."""

    def __init__(self, head: Head, beam_size: int, max_labels: int, compiled: bool) -> None:
        if head.activation != "relu":
            raise ValueError(f"the opponents know relu, got {head.activation}")
        self.head, self.beam_size, self.max_labels = head, beam_size, max_labels
        self._step_scores: Callable[..., Tensor] = (
            torch.compile(step_scores, dynamic=False) if compiled else step_scores
        )
        self._extend: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
            torch.compile(self._extend_states, dynamic=True) if compiled else self._extend_states
        )

    def _extend_states(
        self, labels: Tensor, output: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, cell = self.head.extend(labels, (output, cell))
        return output, cell, self.head.output_projection(output)

    def start(self, batch: int) -> None:
        raise NotImplementedError

    def advance(self, parents: Tensor, labels: Tensor, live: Tensor) -> Tensor:
        """Give U_o o [B, N, D] of the live paths `parents` [B, N] extended by `labels` [B, N]."""
        raise NotImplementedError

    def root(self) -> Tensor:
        """Give U_o o [D] of the empty path."""
        raise NotImplementedError

    @torch.no_grad()
    def search(self, embedding: ImageEmbedding) -> Paths:
        """Find the N best label paths of each image."""
        head, N, T = self.head, self.beam_size, self.max_labels
        L, B = head.num_labels, len(embedding)
        rows = head.label_embedding[: L + 1].detach()
        bias = None if head.score_bias is None else head.score_bias.detach()
        joint, logits = embedding.joint, embedding.label_logits
        done_scores = joint.new_full((B, N), -torch.inf)
        done_paths = torch.full((B, N, T), -1)
        live_scores, last = joint.new_zeros(B, 1), torch.full((B, 1), -1)
        paths = torch.full((B, 1, T), -1)
        self.start(B)
        projected = self.root().expand(B, 1, -1)
        for step in range(T + 1):
            if step < T:
                scores = self._step_scores(projected, joint, logits, rows, bias, last, live_scores)
                ended = scores[:, :, L]
            else:
                ended = live_scores
            done_scores, kept = torch.cat([done_scores, ended], 1).topk(N)
            done_paths = _rows(torch.cat([done_paths, paths], 1), kept)
            if step == T:
                break
            live_scores, kept = scores[:, :, :L].flatten(1).topk(min(N, scores.shape[1] * L))
            parents, last = kept // L, kept % L
            live_scores = live_scores.masked_fill(live_scores <= done_scores[:, -1:], -torch.inf)
            live = live_scores > -torch.inf
            if not live.any():
                break
            paths = _rows(paths, parents)
            paths[:, :, step] = last
            if step + 1 < T:
                projected = self.advance(parents, last, live)
        return Paths(done_paths, done_scores)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Pick rows [B, n, W] of [B, m, W] by index [B, n]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


class PathStates(_TorchSearch):
    """The recurrence runs for every live path: nothing is shared between paths or images."""

    def __init__(
        self,
        head: Head,
        beam_size: int,
        max_labels: int,
        compiled: bool = False,
        every_slot: bool = False,
    ) -> None:
        super().__init__(head, beam_size, max_labels, compiled)
        self._every_slot = every_slot

    def start(self, batch: int) -> None:
        labels = torch.full((batch,), self.head.start)
        output, cell, projected = self._extend(labels, *self.head.initial_state(batch))
        self._output, self._cell = output[:, None], cell[:, None]
        self._root = projected[:, None]

    def root(self) -> Tensor:
        return self._root

    def advance(self, parents: Tensor, labels: Tensor, live: Tensor) -> Tensor:
        rows = torch.ones_like(live) if self._every_slot else live
        image, path = rows.nonzero(as_tuple=True)
        parent = parents[image, path]
        output, cell, projected = self._extend(
            labels[image, path], self._output[image, parent], self._cell[image, parent]
        )
        self._output = output.new_zeros(*live.shape, output.shape[1])
        self._cell = torch.zeros_like(self._output)
        self._output[image, path], self._cell[image, path] = output, cell
        all_projected = projected.new_zeros(*live.shape, projected.shape[1])
        all_projected[image, path] = projected
        return all_projected


class PrefixStates(_TorchSearch):
    """One state per label prefix, kept across calls in tables that double when they are full.

    `children` [nodes, L] holds the node of each prefix extended by each label, or -1: the fastest
    table that torch can look into, at 4 L bytes per prefix.
    """

    def __init__(self, head: Head, beam_size: int, max_labels: int, compiled: bool = False) -> None:
        super().__init__(head, beam_size, max_labels, compiled)
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Forget every state but the root's."""
        head, capacity = self.head, 1024
        self._children = torch.full((capacity, head.num_labels), -1, dtype=torch.int32)
        self._outputs = torch.empty(capacity, head.hidden_dim)
        self._cells = torch.empty(capacity, head.hidden_dim)
        self._projected = torch.empty(capacity, head.joint_dim)
        self._append(torch.tensor([head.start]), *head.initial_state(1), first=0)
        self.size = 1

    def start(self, batch: int) -> None:
        self._nodes = torch.zeros(batch, 1, dtype=torch.int64)

    def root(self) -> Tensor:
        return self._projected[0]

    def advance(self, parents: Tensor, labels: Tensor, live: Tensor) -> Tensor:
        parents = self._nodes.gather(1, parents)
        nodes = self._children[parents, labels]
        missing = live & (nodes < 0)
        if missing.any():
            L = self.head.num_labels
            keys = torch.unique(parents[missing] * L + labels[missing])
            parent, label = keys // L, keys % L
            self._reserve(self.size + len(keys))
            self._append(label, self._outputs[parent], self._cells[parent], first=self.size)
            self._children[parent, label] = torch.arange(
                self.size, self.size + len(keys), dtype=torch.int32
            )
            self.size += len(keys)
            nodes = self._children[parents, labels]
        self._nodes = nodes.clamp(min=0).to(torch.int64)  # a dropped path may have no node
        return self._projected[self._nodes]

    def _append(self, labels: Tensor, output: Tensor, cell: Tensor, first: int) -> None:
        output, cell, projected = self._extend(labels, output, cell)
        end = first + len(labels)
        self._outputs[first:end], self._cells[first:end] = output, cell
        self._projected[first:end] = projected

    def _reserve(self, size: int) -> None:
        capacity = len(self._children)
        if size <= capacity:
            return
        while capacity < size:
            capacity *= 2
        for name, filling in (("_children", -1), ("_outputs", 0), ("_cells", 0), ("_projected", 0)):
            old = getattr(self, name)
            new = old.new_full((capacity, old.shape[1]), filling)
            new[: len(old)] = old
            setattr(self, name, new)
