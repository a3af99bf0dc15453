"""The recurrent cells, and their run over the prefixes that a batch's label paths share.

Letters as in head.py: M rows, H recurrent width, D joint width. K distinct labels and N prefixes,
the empty one included, of a batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cnnrnn.labels import PrefixTrie

RecurrentState = tuple[Tensor, Tensor]  # output [M, H] and cell [M, H]


class LSTMRecurrence(nn.LSTMCell):
    """A standard LSTM over label embeddings (the paper's r and o are its cell and output)."""

    def step(self, inputs: Tensor, state: RecurrentState) -> RecurrentState:
        """Advance one step.

        Args:
            inputs: [M, D] label embeddings.
            state: output [M, H] and cell [M, H] before the step.

        Returns:
            Output [M, H] and cell [M, H] after it.
        """
        output, cell = super().forward(inputs, state)
        return output, cell

    def input_gates(self, inputs: Tensor) -> Tensor:
        """Return the label's part of the gates with all biases: [M, D] -> [M, 4H]."""
        return functional.linear(inputs, self.weight_ih, self.bias_ih + self.bias_hh)

    def fed_back(self, output: Tensor, cell: Tensor) -> Tensor:
        """Return the part of a state that weight_hh multiplies, which is the output."""
        return output

    def activate_(self, gates: Tensor) -> Tensor:
        """Apply the gates' activations in place: [M, 4H]."""
        i_f, g, o = gates.tensor_split((gates.shape[1] // 2, 3 * gates.shape[1] // 4), dim=1)
        i_f.sigmoid_(), g.tanh_(), o.sigmoid_()
        return gates

    def update(self, gates: Tensor, cell: Tensor) -> RecurrentState:
        """Return output and cell [M, H] after activated gates [M, 4H] and the cell before."""
        i, f, g, o = gates.chunk(4, dim=1)
        return lstm_state(i, f, g, o, cell)

    def update_backward(
        self, gates: Tensor, before: Tensor, cell: Tensor, grad_output: Tensor, grad_cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Carry a gradient back through `update` and `activate_`.

        Args:
            gates: [M, 4H] activated gates.
            before: [M, H] cell before the step.
            cell: [M, H] cell after it.
            grad_output: [M, H] the loss's gradient with respect to the output after the step.
            grad_cell: [M, H] and to the cell after it, but for what goes through that output.

        Returns:
            The gradient with respect to the gates before their activation [M, 4H] and to the cell
            before the step [M, H].
        """
        i, f, g, o = gates.chunk(4, dim=1)
        squashed = cell.tanh()
        grad_cell = grad_cell + grad_output * o * (1 - squashed * squashed)
        grad_gates = (
            grad_cell * g * (i * (1 - i)),
            grad_cell * before * (f * (1 - f)),
            grad_cell * i * (1 - g * g),
            grad_output * squashed * (o * (1 - o)),
        )
        return torch.cat(grad_gates, dim=1), grad_cell * f


class PaperRecurrence(nn.Module):
    """Equation 1 taken literally: ReLU everywhere, no biases, the cell r feeds back.

    x = relu(U_r r' + U_w w), i, f and g likewise; r = f * r' + i * x; o = r * g.
    Rows of the weights come in the order x, i, f, g.
    """

    bias_ih = bias_hh = None  # which LSTMRecurrence has

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        bound = 1.0 / math.sqrt(hidden_size)
        nn.init.uniform_(self.weight_ih, -bound, bound)
        # States are squared from step to step: they must begin where that makes them smaller.
        nn.init.uniform_(self.weight_hh, -bound / 10, bound / 10)

    def step(self, inputs: Tensor, state: RecurrentState) -> RecurrentState:
        """Advance one step; arguments and result as in `LSTMRecurrence.step`."""
        recurrent = functional.linear(self.fed_back(*state), self.weight_hh)
        return self.update(self.activate_(self.input_gates(inputs) + recurrent), state[1])

    def input_gates(self, inputs: Tensor) -> Tensor:
        """Return the label's part of the gates: [M, D] -> [M, 4H]."""
        return functional.linear(inputs, self.weight_ih)

    def fed_back(self, output: Tensor, cell: Tensor) -> Tensor:
        """Return the part of a state that weight_hh multiplies, which is the cell."""
        return cell

    def activate_(self, gates: Tensor) -> Tensor:
        """Apply the gates' activations in place: [M, 4H]."""
        return gates.relu_()

    def update(self, gates: Tensor, cell: Tensor) -> RecurrentState:
        """Return output and cell, as `LSTMRecurrence.update`."""
        x, i, f, g = gates.chunk(4, dim=1)
        return paper_state(x, i, f, g, cell)

    def update_backward(
        self, gates: Tensor, before: Tensor, cell: Tensor, grad_output: Tensor, grad_cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Carry a gradient back, as `LSTMRecurrence.update_backward`."""
        x, i, f, g = gates.chunk(4, dim=1)
        grad_cell = grad_cell + grad_output * g
        grad_gates = (grad_cell * i, grad_cell * x, grad_cell * before, grad_output * cell)
        return torch.cat(grad_gates, dim=1) * (gates > 0), grad_cell * f


def lstm_state(i: Tensor, f: Tensor, g: Tensor, o: Tensor, before: Tensor) -> RecurrentState:
    """Return output and cell after a step of an LSTM: activated gates and the cell before it."""
    cell = f * before + i * g
    return o * cell.tanh(), cell


def paper_state(x: Tensor, i: Tensor, f: Tensor, g: Tensor, before: Tensor) -> RecurrentState:
    """Return output and cell after a step of equation 1: activated gates and the cell before it."""
    cell = f * before + i * x
    return cell * g, cell


class _Level(NamedTuple):
    """The prefixes of one length from 1 on; nodes are numbered as in `PrefixTrie.nodes`.

    Attributes:
        nodes: [n] where these prefixes are.
        parents: [n] node that each of them extends, ascending.
        extended: [m] the distinct ones among the parents.
        family: [n] which of `extended` is each one's parent.
    """

    nodes: slice
    parents: Tensor
    extended: Tensor
    family: Tensor


def prefix_outputs(
    recurrence: LSTMRecurrence | PaperRecurrence,
    input_rows: Tensor,
    start: int,
    trie: PrefixTrie,
) -> Tensor:
    """Run a recurrence over the distinct prefixes of a batch's paths.

    Args:
        recurrence: the cell and its weights.
        input_rows: [L+2, D] what it reads of labels, END and START.
        start: the row that begins every path.
        trie: the prefixes, from `labels.prefix_trie`.

    Returns:
        [N, H] the recurrent output after each prefix. It can be differentiated once.
    """
    levels = []
    first_parent, first = 0, 1
    for parents in trie.parents:
        parents = first_parent + parents
        extended, family = parents.unique_consecutive(return_inverse=True)
        levels.append(_Level(slice(first, first + len(parents)), parents, extended, family))
        first_parent, first = first, first + len(parents)
    last_labels = torch.cat([torch.tensor([start], device=trie.nodes.device), *trie.labels])
    labels, label_of_node = last_labels.unique(return_inverse=True)
    label_gates = recurrence.input_gates(input_rows[labels])
    weight = recurrence.weight_hh.to(label_gates.dtype)  # narrow under autocast
    outputs: Tensor = _OverTrie.apply(recurrence, label_gates, weight, label_of_node, levels)
    return outputs


class _OverTrie(torch.autograd.Function):
    """The levels of a trie in turn, as one node of the autograd graph.

    Prefixes with one parent share its product with the recurrent weights. Left to autograd, every
    level would make a weight gradient [4H, H] of its own; here one product makes their sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: LSTMRecurrence | PaperRecurrence,
        label_gates: Tensor,  # [K, 4H]
        weight: Tensor,  # [4H, H]
        label_of_node: Tensor,  # [N]
        levels: list[_Level],
    ) -> Tensor:
        gates = label_gates.index_select(0, label_of_node)  # [N, 4H]
        outputs = recurrence.weight_hh.new_empty(len(gates), weight.shape[1])  # [N, H]
        cells = torch.empty_like(outputs)
        recurrence.activate_(gates[:1])  # START's: the state before it is zero
        outputs[:1], cells[:1] = recurrence.update(gates[:1], torch.zeros_like(cells[:1]))
        fed_back = recurrence.fed_back(outputs, cells)
        for nodes, parents, extended, family in levels:
            shared = functional.linear(fed_back.index_select(0, extended).to(weight.dtype), weight)
            recurrence.activate_(gates[nodes].add_(shared.index_select(0, family)))
            before = cells.index_select(0, parents)
            outputs[nodes], cells[nodes] = recurrence.update(gates[nodes], before)
        ctx.save_for_backward(gates, outputs, cells, weight, label_of_node)
        ctx.recurrence, ctx.levels, ctx.labels = recurrence, levels, len(label_gates)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, outputs, cells, weight, label_of_node = ctx.saved_tensors
        recurrence = ctx.recurrence
        grad_outputs, grad_cells = grad.clone(), torch.zeros_like(grad)
        grad_fed_back = recurrence.fed_back(grad_outputs, grad_cells)
        grad_label_gates = grad.new_zeros(ctx.labels, gates.shape[1])
        multiplied, grad_shared = [label_of_node[:0]], [gates[:0]]  # there may be no level
        for nodes, parents, extended, family in reversed(ctx.levels):
            before = cells.index_select(0, parents)
            grad_gates, grad_before = recurrence.update_backward(
                gates[nodes], before, cells[nodes], grad_outputs[nodes], grad_cells[nodes]
            )
            grad_label_gates.index_add_(0, label_of_node[nodes], grad_gates)
            grad_cells.index_add_(0, parents, grad_before)
            shared = grad_gates.new_zeros(len(extended), gates.shape[1])
            shared = shared.index_add_(0, family, grad_gates).to(weight.dtype)
            grad_fed_back.index_add_(0, extended, (shared @ weight).to(grad.dtype))
            multiplied.append(extended)
            grad_shared.append(shared)
        grad_gates, _ = recurrence.update_backward(
            gates[:1], torch.zeros_like(cells[:1]), cells[:1], grad_outputs[:1], grad_cells[:1]
        )
        grad_label_gates.index_add_(0, label_of_node[:1], grad_gates)
        states = recurrence.fed_back(outputs, cells).index_select(0, torch.cat(multiplied))
        grad_weight = torch.cat(grad_shared).t() @ states.to(weight.dtype)
        return None, grad_label_gates.to(gates.dtype), grad_weight, None, None
