"""The whole model as tensor operations over a batch, which ONNX can express.

The search is that of `cnnrnn/search/reference.py`, every image and live path at once. What does not
depend on the image is computed beforehand: the label's part of the gates is a table [L+2, 4H], and
the state after START a constant.

Letters: B images, N live paths, T the longest path, L labels, H recurrent width, D joint width.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cnnrnn.config import SearchConfig
from cnnrnn.data.images import normalize
from cnnrnn.labels import PAD
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.cooccurrence import told
from cnnrnn.network.head import Head, activated, chain_logits
from cnnrnn.network.recurrence import lstm_state, paper_state
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.inference import mixed_given
from cnnrnn.search.reference import LIVE_MASS_FLOOR

Input = Literal["uint8", "float", "features"]
INPUT_NAMES: dict[Input, str] = {"uint8": "images", "float": "images", "features": "features"}
OUTPUT_NAMES = ("labels", "lengths", "log_probs", "marginals", "log_evidence", "scores", "joint")
LABEL_SCORES = "label_scores"
"""One more output, where the head has a chain term, told of present labels: see `Head.told`."""


class Paths(NamedTuple):
    """The N best label paths of each image, best first, as `SearchResult` has them."""

    labels: Tensor  # [B, N, T]
    lengths: Tensor  # [B, N]
    log_probs: Tensor  # [B, N]
    marginals: Tensor  # [B, L]
    log_evidence: Tensor  # [B]


class _Images(NamedTuple):
    """What is searched, and what is known of it."""

    joint: Tensor  # [B, D]
    label_logits: Tensor | None  # [B, L+1]
    min_labels: Tensor  # [] int64
    banks: Tensor | None  # [K+1] int64, their numbers; None for one bank
    present: Tensor  # [B, L] bool
    absent: Tensor  # [B, L] bool
    given: Tensor  # [B] bool, something is known of the image


class _State(NamedTuple):
    """What the search knows between two steps. A score of -inf marks a place without a path.

    There are P live paths: W places of every bank, bank after bank; only the empty path before the
    first step.
    """

    scores: Tensor  # [B, P] of the live paths
    labels: Tensor  # [B, P, T] theirs
    output: Tensor  # [B, P, H]
    cell: Tensor  # [B, P, H]
    done_scores: Tensor  # [B, N], best first
    done_labels: Tensor  # [B, N, T]
    visited: Tensor  # [B, L] probability that a live path is followed by each label
    peak: Tensor  # [B, 1] the best score of all complete paths
    masses: Tensor  # [B, 1+L] over e^peak: of all complete paths, and of those that hold each label
    accepting: Tensor  # [B] bool; False once a literal stop has fixed the result
    marked: Tensor  # [B] bool, a value was not finite that could have changed the result


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values and their places: [B, n] to [B, count] each.

    ONNX's TopK puts the lower place first where values are equal, as the search wants it; torch's
    own promises no order.
    """
    largest, places = values.topk(count, dim=1)
    return largest, places


class PathSearch(nn.Module):
    """The beam search of a head, with a beam for each number of present labels that a path lacks.

    Args:
        head: whose weights are copied, as float32.
        search: the options; `min_labels` is an input.
        loop: repeat one step in a loop that ends with the last live path, instead of writing T
            steps one after the other.
        max_known: labels of an image that evidence may say are present.

    Attributes:
        most_known: the same; at most T and L.
    """

    def __init__(self, head: Head, search: SearchConfig, loop: bool, max_known: int = 0) -> None:
        super().__init__()
        self.search = search
        self.max_labels = resolve_max_labels(head, search)
        self.num_labels = head.num_labels
        self.most_known = min(max_known, self.max_labels, self.num_labels)
        self.places = search.places(marginals=True)
        self.cell = head.cell
        self.activation = head.activation
        self.loop = loop
        with torch.no_grad():
            start = torch.tensor([head.start], device=head.label_embedding.device)
            output, cell = head.extend(start, head.initial_state(1))
            constants = {
                "label_embedding": head.label_embedding[: head.num_labels + 1],
                "score_bias": head.score_bias,
                "label_gates": head.recurrence.input_gates(head.input_rows),
                "recurrent_weight": head.recurrence.weight_hh,
                "output_weight": head.output_projection.weight,
                "root_projected": head.output_projection(output)[None],  # [1, 1, D]
                "root_output": output[None],  # [1, 1, H]
                "root_cell": cell[None],
                "root_product": head.recurrence.fed_back(output, cell)
                @ head.recurrence.weight_hh.T,
                "sure_end": torch.tensor([-torch.inf] * head.num_labels + [0.0]),
            }
        for name, value in constants.items():
            constant = None if value is None else value.detach().float().contiguous().clone()
            self.register_buffer(name, constant)

    label_embedding: Tensor
    score_bias: Tensor | None
    label_gates: Tensor
    recurrent_weight: Tensor
    output_weight: Tensor
    root_projected: Tensor
    root_output: Tensor
    root_cell: Tensor
    root_product: Tensor
    sure_end: Tensor

    def forward(
        self,
        joint: Tensor,
        label_logits: Tensor | None,
        min_labels: Tensor,
        evidence: Tensor,
        banks: Tensor | None = None,
    ) -> Paths:
        """Search.

        Args:
            joint: [B, D].
            label_logits: [B, L+1] or None.
            min_labels: [] int64, END is forbidden on shorter paths.
            evidence: [1 or B, L] int8 of 1 for labels known to be present, -1 absent, 0 unknown.
                An image of other values, or of more present labels than `most_known`, has no path.
            banks: [K+1] int64 of 0, 1, ..., K, the most present labels of an image; None where none
                has any.
        """
        N, T = self.search.beam_size, self.max_labels
        known = evidence.long().expand(joint.shape[0], -1)  # not every operator takes int8
        images = _Images(
            joint, label_logits, min_labels, banks,
            present=known == 1, absent=known == -1, given=(known != 0).any(1),
        )  # fmt: skip
        finite = joint.isfinite().all(1)
        if label_logits is not None:
            finite = finite & label_logits.isfinite().all(1)
        searched = finite & (images.present.sum(1) <= self.most_known) & (known.abs() <= 1).all(1)
        begin = joint.new_zeros(joint.shape[0], 1)  # the empty path is live
        begin = begin.masked_fill(~searched[:, None], -torch.inf)
        state = _State(
            scores=begin,
            labels=torch.full_like(begin, PAD, dtype=torch.int64)[:, :, None].expand(-1, 1, T),
            output=self.root_output,
            cell=self.root_cell,
            done_scores=torch.full_like(begin, -torch.inf).expand(-1, N),
            done_labels=torch.full_like(begin, PAD, dtype=torch.int64)[:, :, None].expand(-1, N, T),
            visited=torch.zeros_like(begin).expand(-1, self.num_labels),
            peak=torch.full_like(begin, torch.finfo(begin.dtype).min),  # finite: -inf - -inf is NaN
            masses=torch.zeros_like(begin).expand(-1, 1 + self.num_labels),
            accepting=finite | True,
            marked=~finite,
        )
        if T:
            state = self._step(state, torch.tensor(0), images, first=True)
        if self.loop and T > 1:
            state = self._loop(state, images)
        else:
            for t in range(1, T):
                state = self._step(state, torch.tensor(t), images)
        # Paths of length T can only end, at log-probability 0, unless they lack present labels.
        last, last_labels = state.scores[:, : self.places], state.labels[:, : self.places]
        scores, labels = self._merged(state, last, last_labels)
        peak, masses = self._complete(state, last, self._held(last_labels))
        shares = masses[:, 1:] / masses[:, :1]  # NaN where no path was found
        marginals = torch.where(images.given[:, None], shares, state.visited)
        marked = state.marked[:, None]
        absent = scores == -torch.inf
        lengths = (labels != PAD).sum(2).masked_fill(absent | marked, 0)
        return Paths(
            labels=labels.masked_fill((absent | marked)[:, :, None], PAD),
            lengths=lengths,
            log_probs=scores.masked_fill(marked, torch.nan),
            marginals=marginals.masked_fill(marked, torch.nan),
            log_evidence=(masses[:, 0].log() + peak[:, 0]).masked_fill(state.marked, torch.nan),
        )

    def _loop(self, state: _State, images: _Images) -> _State:
        """Repeat the step from the second on, while a path is live."""
        from torch._higher_order_ops.while_loop import while_loop

        def going(t: Tensor, *values: Tensor) -> Tensor:
            return (t < self.max_labels) & (_State(*values).scores > -torch.inf).any()

        def body(t: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            after = self._step(_State(*values), t, images)
            return (t + 1, *(part.clone() for part in after))  # no input may be returned

        carried = (torch.tensor(1), *(part.clone() for part in state))
        _, *values = while_loop(going, body, carried)
        return _State(*values)

    def _step(
        self,
        state: _State,
        t: Tensor,  # [] int64, labels on every live path
        images: _Images,
        first: bool = False,  # the empty path alone is live
    ) -> _State:
        """Score what may follow the live paths, end some and extend the best of each bank."""
        W, L = self.places, self.num_labels
        B, P = state.scores.shape
        projected = self.root_projected if first else state.output @ self.output_weight.T
        held = self._held(state.labels)
        log_probs, bad = self._log_probs(state, t, projected, images, held)
        extended = (state.scores[:, :, None] + log_probs).masked_fill(
            bad[:, :, None], -torch.inf
        )  # [B, P, L+1]
        new = extended[:, :W, :L]  # where nothing is known all paths are in the first bank
        if self.search.order == "free" and not first:  # what a path holds may follow again
            new = new.masked_fill(held[:, :W, 1:] > 0, -torch.inf)
        visited = state.visited + new.exp().sum(1)
        floor_before = self._floor(state.done_scores, state.accepting)

        # After the softmax: evidence chooses among paths, it makes none more probable.
        absent = nn.functional.pad(images.absent, (0, 1))[:, None]  # [B, 1, L+1]
        extended = extended.masked_fill(absent, -torch.inf)
        of_extension = None
        if images.banks is not None:
            bank, lacking = self._lacking(state, images, held, first)
            extended = extended.masked_fill(self._barred(t, bank, lacking), -torch.inf)
            of_extension = bank[:, :, None] - nn.functional.pad(lacking, (0, 1)).long()
        scores, parent, label = self._best_of_each_bank(extended, of_extension, images, first)
        rows = parent + P * torch.arange(B, device=parent.device)[:, None]  # of B x P
        labels = state.labels.flatten(0, 1)[rows]  # the parents' [B, P', T]
        if self.search.end_takes_slot:
            ends = label == L
            finished, finished_labels = scores.masked_fill(~ends, -torch.inf)[:, :W], labels[:, :W]
            finished_held = held.flatten(0, 1)[rows[:, :W]]
            scores = scores.masked_fill(ends, -torch.inf)
            label = label.masked_fill(ends, 0)
        else:
            finished, finished_labels = extended[:, :W, L], state.labels[:, :W]
            finished_held = held[:, :W]
        done_scores, done_labels = self._merged(state, finished, finished_labels)
        peak, masses = self._complete(state, finished, finished_held)

        accepting = state.accepting
        if self.search.stop == "literal":
            # Whether a path is done is read off the best one: in OpenVINO the least of infinite
            # numbers is finite.
            worst = done_scores.masked_fill(done_scores == -torch.inf, torch.inf).amin(1)
            best = scores.amax(1)
            passed = (done_scores[:, 0] > -torch.inf) & (best < worst)
            accepting = accepting & ~(passed & (best > -torch.inf))
        could_enter = (state.scores > floor_before[:, None]) & (
            state.scores >= self._floor(done_scores, state.accepting)[:, None]
        )
        marked = state.marked | (bad & could_enter).any(1)
        settled = scores.amax(1) <= self._floor(done_scores, accepting)
        given = images.given[:, None]
        live_mass = (scores - torch.where(given, peak, 0.0)).exp()
        if images.banks is not None:  # bank by bank: zeros change no bit of the first one's sum
            live_mass = live_mass.reshape(B, images.banks.shape[0], W).sum(2)
        most = torch.where(given, masses[:, :1], 1.0)[:, 0]
        stopped = settled & (live_mass.sum(1) < LIVE_MASS_FLOOR * most)
        scores = scores.masked_fill(stopped[:, None], -torch.inf)

        position = torch.arange(self.max_labels, device=label.device)
        output, cell = self._extended(state, rows, label, first)
        return _State(
            scores=scores,
            labels=torch.where(position == t, label[:, :, None], labels),
            output=output,
            cell=cell,
            done_scores=done_scores,
            done_labels=done_labels,
            visited=visited,
            peak=peak,
            masses=masses,
            accepting=accepting,
            marked=marked,
        )

    def _best_of_each_bank(
        self,
        extended: Tensor,  # [B, P, L+1] scores
        of_extension: Tensor | None,  # [B, P, L+1] the bank of each; None for one bank
        images: _Images,
        first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, parents' ranks and labels of the extensions that are kept: [B, P'] each.

        P' is the W places of every bank. A label of L is END.
        """
        W = self.places
        width = self.num_labels + self.search.end_takes_slot
        B, P = extended.shape[:2]
        extended = extended[:, :, :width]
        if of_extension is None or images.banks is None:
            offered = extended.reshape(B, P * width)
        else:
            mine = of_extension[:, None, :, :width] == images.banks[:, None, None]
            offered = torch.where(mine, extended[:, None], -torch.inf)
            offered = offered.reshape(B * images.banks.shape[0], P * width)
        places = min(W, width) if first else W
        scores, index = top(offered, places)
        if places < W:
            pad = (0, W - places)
            scores = nn.functional.pad(scores, pad, value=-torch.inf)
            index = nn.functional.pad(index, pad)
        if images.banks is not None:
            scores = scores.reshape(B, images.banks.shape[0] * W)
            index = index.reshape(B, images.banks.shape[0] * W)
        if first:
            return scores, torch.zeros_like(index), index
        # index // width takes ten nodes. One more than needed: no width may be 0, which some
        # runtimes take for 1.
        firsts = torch.arange(1, P + 1, device=index.device) * width
        parent = (index[:, :, None] >= firsts).sum(2)
        return scores, parent, index - parent * width

    def _log_probs(
        self, state: _State, t: Tensor, projected: Tensor, images: _Images, held: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log p of what may follow [B, P, L+1], and where scores are not finite [B, P]."""
        total = activated(projected + images.joint[:, None, :], self.activation)
        scores = total @ self.label_embedding.T  # [B, P, L+1]
        if self.score_bias is not None:
            scores = scores + self.score_bias
        # Only the end may follow where the order allows no label, also below min_labels.
        allowed = self._allowed(state, held)  # [B, P, L]
        only_end = (~allowed).all(2, keepdim=True) & (t < images.min_labels)  # [B, P, 1]
        end = (t >= images.min_labels).expand(*allowed.shape[:2], 1)
        allowed = torch.cat([allowed, end], dim=2)
        if images.label_logits is not None:
            # Only differences matter: taking off the largest first keeps the sum precise.
            label_logits = images.label_logits[:, None, :]
            largest = label_logits.masked_fill(~allowed, -torch.inf).amax(2, keepdim=True)
            scores = scores + (label_logits - largest.masked_fill(only_end, 0.0))
        scores = scores.masked_fill(~allowed, -torch.inf)
        bad = scores.isnan().any(2) | scores.amax(2).isinf()
        bad = bad & ~only_end[:, :, 0]
        log_probs = scores.log_softmax(2).clamp(max=0)
        return torch.where(only_end, self.sure_end, log_probs), bad

    def _allowed(self, state: _State, held: Tensor) -> Tensor:
        """Return which labels the order lets follow each live path: [B, P, L] bool."""
        if self.search.order == "increasing":
            return self._above_last(state)
        of_labels = held[:, :, 1:]
        return of_labels == 0 if self.search.order == "unique" else of_labels >= 0

    def _above_last(self, state: _State) -> Tensor:
        labels = torch.arange(self.num_labels, device=state.labels.device)
        return labels > state.labels.amax(2, keepdim=True)  # -1 on the empty path

    def _lacking(
        self, state: _State, images: _Images, held: Tensor, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the bank of each live path [B, P] and the present labels it lacks [B, P, L]."""
        assert images.banks is not None
        present = images.present[:, None]
        if first:
            return images.present.sum(1, keepdim=True), present
        bank = images.banks[:, None].expand(-1, self.places).flatten()
        increasing = self.search.order == "increasing"
        lacking = present & (self._above_last(state) if increasing else held[:, :, 1:] == 0)
        return bank.expand(held.shape[0], -1), lacking

    def _barred(
        self,
        t: Tensor,
        bank: Tensor,  # [B, P]
        lacking: Tensor,  # [B, P, L]
    ) -> Tensor:
        """Return what leaves no way to the present labels that a path lacks: [B, P, L+1] bool."""
        only_lacking = (bank == self.max_labels - t)[:, :, None]
        barred = only_lacking & ~lacking
        if self.search.order == "increasing":
            labels = torch.arange(self.num_labels, device=bank.device)
            lowest = torch.where(lacking, labels, self.num_labels).amin(2, keepdim=True)
            barred = barred | (labels > lowest)
        return torch.cat([barred, (bank > 0)[:, :, None]], dim=2)

    def _held(self, labels: Tensor) -> Tensor:
        """Return 1, and 1 for labels on each path, else 0: [B, P, T] to [B, P, 1+L]."""
        columns = nn.functional.pad(labels + 1, (0, 1))  # the first column takes the padding, too
        held = self.label_gates.new_zeros(*labels.shape[:2], 1 + self.num_labels)
        return held.scatter(2, columns, 1.0)

    def _extended(
        self, state: _State, rows: Tensor, label: Tensor, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Read one more label [B, P'] into the states of the parents [B, P'] (equation 3)."""
        gates = self.label_gates[label]  # [B, P', 4H]
        if first:
            gates, before = gates + self.root_product, self.root_cell
        else:
            before = state.cell.flatten(0, 1)[rows]
            fed_back = state.output.flatten(0, 1)[rows] if self.cell == "lstm" else before
            gates = gates + fed_back @ self.recurrent_weight.T
        if self.cell == "lstm":
            i, f, g, o = gates.chunk(4, dim=2)
            return lstm_state(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), before)
        x, i, f, g = gates.relu().chunk(4, dim=2)
        return paper_state(x, i, f, g, before)

    def _merged(
        self, state: _State, finished: Tensor, finished_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the N best done paths; at equal score the one that finished earlier is ahead."""
        offered = torch.cat([state.done_scores, finished], dim=1)
        offered_labels = torch.cat([state.done_labels, finished_labels], dim=1)
        scores, index = top(offered, self.search.beam_size)
        B, offers = offered.shape
        rows = index + offers * torch.arange(B, device=index.device)[:, None]
        labels = offered_labels.flatten(0, 1)[rows]
        if self.search.stop == "literal":
            accepting = state.accepting[:, None]
            scores = torch.where(accepting, scores, state.done_scores)
            labels = torch.where(accepting[:, :, None], labels, state.done_labels)
        return scores, labels

    def _complete(
        self,
        state: _State,
        finished: Tensor,  # [B, n]
        held: Tensor,  # [B, n, 1+L]
    ) -> tuple[Tensor, Tensor]:
        """Add paths that end to `peak` and `masses` of a state."""
        peak = torch.maximum(state.peak, finished.amax(1, keepdim=True))
        new = (finished - peak).exp()[:, None] @ held  # [B, 1, 1+L]
        return peak, state.masses * (state.peak - peak).exp() + new[:, 0]

    def _floor(self, done_scores: Tensor, accepting: Tensor) -> Tensor:
        """Return the score at or below which a live path cannot enter the result: [B]."""
        if self.search.stop == "n_best":
            return done_scores[:, -1]
        return torch.where(accepting, -torch.inf, torch.inf)


class ExportedModel(nn.Module):
    """A model from its input to decided paths and scores.

    Args:
        model: whose weights are copied.
        input_kind: what comes in.
        search: the options of the search.
        loop: see `PathSearch`.
        max_known: see `PathSearch`.
        half: backbone, trunk and the projections of the image compute in float16. The recurrence,
            label scores and sums stay float32.
    """

    def __init__(
        self,
        model: CNNRNN,
        input_kind: Input,
        search: SearchConfig,
        loop: bool,
        max_known: int,
        half: bool,
    ) -> None:
        super().__init__()
        copied = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self.search = PathSearch(copied.head, search, loop, max_known)
        self.backbone = None if input_kind == "features" else copied.backbone
        self.trunk = copied.head.trunk
        self.image_projection = copied.head.image_projection
        self.label_classifier = copied.head.label_classifier
        self.register_buffer("cooccurrence", copied.head.cooccurrence if max_known else None)
        self.input_kind = input_kind
        self.calibration = model.calibration
        self.dtype = torch.float16 if half else torch.float32
        for part in (self.backbone, self.trunk, self.image_projection, self.label_classifier):
            if part is not None:
                part.to(self.dtype)

    cooccurrence: Tensor | None

    def forward(
        self, inputs: Tensor, min_labels: Tensor, evidence: Tensor, banks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return what `OUTPUT_NAMES` names, and label scores where there is a chain term.

        Args:
            inputs: uint8 [B, S, S, 3], normalised float [B, 3, S, S] or features [B, F].
            min_labels: [] int64.
            evidence: [1 or B, L] int8; this and banks are as in `PathSearch`.
            banks: [K+1] int64 or None.
        """
        if self.backbone is not None:
            if self.input_kind == "uint8":
                inputs = normalize(inputs.permute(0, 3, 1, 2), self.backbone.preprocessing)
            inputs = self.backbone(inputs.to(self.dtype))
        hidden = self.trunk(inputs.to(self.dtype))
        joint = self.image_projection(hidden).float()
        label_scores = label_logits = None
        if self.label_classifier is not None:
            label_scores = self.label_classifier(hidden).float()
            label_logits = chain_logits(label_scores)
        paths = self.search(joint, label_logits, min_labels, evidence, banks)
        known = evidence.long().expand(joint.shape[0], -1)
        if label_scores is not None and self.cooccurrence is not None:
            label_scores = told(label_scores, self.cooccurrence, known)
        scores = mixed_given(paths.marginals, label_scores, self.calibration, known)
        outputs = (*paths, scores, joint)
        return outputs if label_scores is None else (*outputs, label_scores)
