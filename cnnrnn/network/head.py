"""The model of Wang et al. (CVPR 2016): a backbone and a head over the joint label-image space.

Letters: B images, T steps, L labels (END not counted), H recurrent width, D joint width, F
image-feature width. The image enters only in the joint projection, after the recurrence, so a
recurrent state is a function of the label prefix alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.config import Activation, Cell, ModelConfig, Order
from cnnrnn.labels import PAD, prefix_trie
from cnnrnn.network.cooccurrence import CoOccurrence, told
from cnnrnn.network.recurrence import LSTMRecurrence, PaperRecurrence, prefix_outputs
from cnnrnn.network.sampling import Samples, sample_sets

UNTRAINED_MAX_LABELS = 20
PREFIX_BYTES = 512 << 20
MOST_COUNTED_LABELS = 2048  # pairs of more labels are not counted: 16 MB


@dataclass(frozen=True)
class ImageEmbedding:
    """What the search needs to know of each image.

    Attributes:
        joint: [B, D] U_I I, the image in the joint space.
        label_logits: [B, L+1] the chain term's next-label logits, END last; None without it.
    """

    joint: Tensor
    label_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.joint)

    def of(self, images: Tensor) -> ImageEmbedding:
        """Return the embeddings of some images: [M] int64 indices."""
        logits = None if self.label_logits is None else self.label_logits[images]
        return ImageEmbedding(self.joint[images], logits)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageEmbedding:
        """Move to a device, and to a dtype where one is given."""
        logits = None if self.label_logits is None else self.label_logits.to(device, dtype)
        return ImageEmbedding(self.joint.to(device, dtype), logits)


def chain_logits(label_scores: Tensor) -> Tensor:
    """Turn independent label scores into the next-label logits of an increasing path.

    If label l were present with probability sigmoid(v_l), independently of all others, the next
    label of an increasing path after label k would be l with probability
    p_l * prod_{k<j<l} (1 - p_j). Up to a constant over what is allowed after k, its logits are
    a_l = v_l + sum_{j>l} softplus(v_j) and a_END = 0, whatever k is.

    Args:
        label_scores: [B, L] v, one score per label in path order.

    Returns:
        [B, L+1] a, in float32 or wider; END is the last column.
    """
    v = label_scores if label_scores.dtype == torch.float64 else label_scores.float()
    softplus = functional.softplus(v)
    after = softplus.flip(1).cumsum(1).flip(1) - softplus
    return functional.pad(v + after, (0, 1))


class Dropout(nn.Dropout):
    """Dropout whose mask on a CPU is a comparison with uniform numbers.

    torch draws a CPU's mask with `bernoulli_`, which takes seven times as long on one that is not
    Intel's: a sixth of a training step on cached features.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop and scale in training, pass through otherwise."""
        if not self.training or inputs.device.type != "cpu" or self.p in (0, 1):
            return super().forward(inputs)
        kept = torch.rand(inputs.shape, dtype=torch.float32).ge_(self.p).to(inputs.dtype)
        return inputs * kept.div_(1 - self.p)


class Trunk(nn.Sequential):
    """The layers between image feature and head: scaling, dropout and, with `trunk_dim`, a layer.

    With `skip`, the output is [hidden, feature].

    Attributes:
        feature_scale: [] factor on the features; 1 in a new trunk.
    """

    feature_scale: Tensor

    def __init__(
        self,
        feature_dim: int,
        trunk_dim: int,
        input_dropout: float,
        hidden_dropout: float,
        skip: bool = False,
    ) -> None:
        layers: list[nn.Module] = [Dropout(input_dropout)]
        if trunk_dim:
            layers += [nn.Linear(feature_dim, trunk_dim), nn.ReLU(), Dropout(hidden_dropout)]
        super().__init__(*layers)
        self.register_buffer("feature_scale", torch.ones(()))
        self.skip = skip and trunk_dim > 0
        self.output_dim = (trunk_dim or feature_dim) + (feature_dim if self.skip else 0)

    @classmethod
    def from_config(cls, config: ModelConfig, feature_dim: int) -> Trunk:
        """Build the trunk that a `ModelConfig` describes."""
        return cls(
            feature_dim,
            config.trunk_dim,
            config.input_dropout,
            config.hidden_dropout,
            config.trunk_skip,
        )

    @torch.no_grad()
    def fit_scale(self, features: Tensor, rms: float) -> None:
        """Scale features to a common size, so that a learning rate means the same for all.

        Args:
            features: [n, F] of the training images.
            rms: root mean square over all images and features that they get; 0 leaves them
                unscaled.
        """
        if rms == 0:
            return
        squares = sum(float(part.double().square().sum()) for part in features.split(4096))
        found = math.sqrt(squares / max(features.numel(), 1))
        self.feature_scale.fill_(rms / found if found > 0 else 1.0)

    def forward(self, features: Tensor) -> Tensor:
        """Return what the head reads of image features: [B, F] to [B, output_dim]."""
        hidden = features = self[0](features * self.feature_scale)
        for layer in list(self)[1:]:
            hidden = layer(hidden)
        return torch.cat([hidden, features], dim=1) if self.skip else hidden


def activated(total: Tensor, activation: Activation) -> Tensor:
    """Apply h of equation 4."""
    if activation == "identity":
        return total
    return total.relu() if activation == "relu" else total.tanh()


class Head(nn.Module):
    """Scores the next label of a path from an image feature and the labels so far.

    Args:
        num_labels: L, END not counted.
        feature_dim: F, width of the image feature.
        joint_dim: D. This and all others are as in `ModelConfig`.

    Attributes:
        label_embedding: [L+2, D] U_l, which scores labels; row L is END, row L+1 START.
        input_embedding: [L+2, D] by which the recurrence reads labels, rows as in label_embedding
            (that of END is not used); None where the two are tied.
        score_bias: [L+1] or None.
        image_projection: U_I.
        output_projection: U_o.
        recurrence: weight_ih [4H, D], weight_hh [4H, H] and, for `lstm`, two biases.
        label_classifier: the chain term's independent classifier, or None.
        cooccurrence: [L, L] what a label known to be present (its row) adds to the independent
            classifier's log-odds of the others, see `CoOccurrence`; None before training has
            counted it.
        max_labels: longest path of a search that names none: the largest training set.
        prefix_bytes: memory for kept prefix states, 512 MB by default; when full, the least
            recently used are evicted. States that one image needs are computed in any case. The
            packed weights are not counted.
        cache_generation: counts calls of `clear_cache`.
    """

    def __init__(
        self,
        num_labels: int,
        feature_dim: int,
        joint_dim: int = 64,
        hidden_dim: int = 512,
        cell: Cell = "lstm",
        activation: Activation = "relu",
        chain_term: bool = False,
        *,
        tied_embedding: bool = True,
        trunk_dim: int = 0,
        trunk_skip: bool = False,
        score_bias: bool = True,
        projection_bias: bool = True,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        joint_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("num_labels", num_labels), ("feature_dim", feature_dim),
                           ("joint_dim", joint_dim), ("hidden_dim", hidden_dim)):  # fmt: skip
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if cell not in ("lstm", "paper"):
            raise ValueError(f"cell must be lstm or paper, got {cell!r}")
        if activation not in ("relu", "tanh", "identity"):
            raise ValueError(f"activation must be relu, tanh or identity, got {activation!r}")
        self.num_labels = num_labels
        self.feature_dim = feature_dim
        self.joint_dim = joint_dim
        self.hidden_dim = hidden_dim
        self.cell: Cell = cell
        self.activation: Activation = activation
        self.max_labels = UNTRAINED_MAX_LABELS
        self.prefix_bytes = PREFIX_BYTES
        self.cache_generation = 0

        bound = 1.0 / math.sqrt(joint_dim)
        self.label_embedding = nn.Parameter(
            torch.empty(num_labels + 2, joint_dim).uniform_(-bound, bound)
        )
        # As large as nn.Embedding's: the gates distinguish labels from the first step on.
        self.input_embedding = (
            None if tied_embedding else nn.Parameter(torch.randn(num_labels + 2, joint_dim))
        )
        self.score_bias = nn.Parameter(torch.zeros(num_labels + 1)) if score_bias else None
        self.trunk = Trunk(feature_dim, trunk_dim, input_dropout, hidden_dropout, trunk_skip)
        width = self.trunk.output_dim
        self.image_projection = nn.Linear(width, joint_dim, bias=projection_bias)
        self.output_projection = nn.Linear(hidden_dim, joint_dim, bias=False)
        self.recurrence: LSTMRecurrence | PaperRecurrence = (
            LSTMRecurrence(joint_dim, hidden_dim)
            if cell == "lstm"
            else PaperRecurrence(joint_dim, hidden_dim)
        )
        self.label_classifier = nn.Linear(width, num_labels) if chain_term else None
        self.joint_dropout = Dropout(joint_dropout)
        self.register_buffer("cooccurrence", None)

    cooccurrence: Tensor | None

    @property
    def end(self) -> int:
        """Index of END among the scores, and its row of the label embedding."""
        return self.num_labels

    @property
    def start(self) -> int:
        """Row of the label embedding that begins every path."""
        return self.num_labels + 1

    @property
    def input_rows(self) -> Tensor:
        """What the recurrence reads of labels: [L+2, D]."""
        return self.label_embedding if self.input_embedding is None else self.input_embedding

    def clear_cache(self) -> None:
        """Make searches pack the weights again and drop kept prefix states.

        Needed after changes that torch does not count, through `.data` or by a replayed CUDA graph;
        all others are detected. Switching from train to eval mode does it too.
        """
        self.cache_generation += 1

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take counts, or none, from whatever head: a new one has none."""
        there = f"{prefix}cooccurrence" in state_dict
        L = self.num_labels
        self.cooccurrence = self.label_embedding.new_zeros(L, L) if there else None
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def train(self, mode: bool = True) -> Head:
        """Change the mode; weights may have changed undetected when training ends."""
        if self.training and not mode:
            self.clear_cache()
        return super().train(mode)

    @classmethod
    def from_config(cls, config: ModelConfig, num_labels: int, feature_dim: int) -> Head:
        """Build the head that a `ModelConfig` describes."""
        return cls(
            num_labels,
            feature_dim,
            config.joint_dim,
            config.hidden_dim,
            config.cell,
            config.activation,
            config.chain_term,
            tied_embedding=config.tied_embedding,
            trunk_dim=config.trunk_dim,
            trunk_skip=config.trunk_skip,
            score_bias=config.score_bias,
            projection_bias=config.projection_bias,
            input_dropout=config.input_dropout,
            hidden_dropout=config.hidden_dropout,
            joint_dropout=config.joint_dropout,
        )

    def embed(self, features: Tensor) -> ImageEmbedding:
        """Project image features into the joint space.

        Args:
            features: [B, F] float.

        Returns:
            The images' embeddings: joint [B, D] and, with a chain term, label logits [B, L+1].

        Raises:
            ValueError: when `features` is not [B, F].
        """
        embedding, _ = self.embed_with_label_scores(features)
        return embedding

    def embed_with_label_scores(self, features: Tensor) -> tuple[ImageEmbedding, Tensor | None]:
        """Like `embed`, and also return the independent classifier's scores v [B, L], or None."""
        if features.dim() != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"features must be [B, {self.feature_dim}], got {list(features.shape)}"
            )
        hidden = self.trunk(features)
        joint = self.joint_dropout(self.image_projection(hidden))
        if self.label_classifier is None:
            return ImageEmbedding(joint), None
        label_scores = self.label_classifier(hidden)
        return ImageEmbedding(joint, chain_logits(label_scores)), label_scores

    def count_cooccurrence(self, targets: Tensor, unknown: Tensor | None = None) -> None:
        """Count which labels occur together, for a head with a chain term and not too many labels.

        Args:
            targets: [n, L] bool of the training images, columns in path order.
            unknown: [n, L] bool, labels that are neither present nor absent.
        """
        if self.label_classifier is not None and self.num_labels <= MOST_COUNTED_LABELS:
            counted = CoOccurrence.counted(targets, smoothing=1.0, unknown=unknown)
            self.cooccurrence = counted.present.float().to(self.label_embedding.device)

    def told(self, label_scores: Tensor, evidence: Tensor) -> Tensor:
        """Tell the independent classifier which labels are present.

        Args:
            label_scores: [n, L] its log-odds.
            evidence: [1 or n, L] int8, see `beam_search`; absent labels add nothing.

        Returns:
            [n, L] log-odds given the labels known to be present, as if these were independent of
            the image and each other given the label that is asked about.
        """
        if self.cooccurrence is None:
            return label_scores
        return told(label_scores, self.cooccurrence, evidence.to(label_scores.device))

    def initial_state(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the zero state before START: output [count, H] and cell [count, H]."""
        zeros = self.label_embedding.new_zeros(count, self.hidden_dim)
        return zeros, zeros

    def extend(self, labels: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Read one more label into recurrent states (equation 3).

        Args:
            labels: [M] rows of the embedding; `start` for the first step.
            state: output [M, H] and cell [M, H] of the prefixes so far.
        """
        return self.recurrence.step(self.input_rows[labels], state)

    def score(self, outputs: Tensor, embedding: ImageEmbedding) -> Tensor:
        """Score labels and END after each path, without what its order forbids (eq. 4 and 5).

        The chain term's logits are left to the caller: they are per image, reach hundreds, and are
        shifted by the largest allowed one before they are added.

        Args:
            outputs: [..., H] recurrent outputs o.
            embedding: joint [..., D], broadcast against the outputs.

        Returns:
            [..., L+1] scores, END last.
        """
        return self._score_projected(self.output_projection(outputs), embedding.joint)

    def _score_projected(self, projected: Tensor, joint: Tensor) -> Tensor:
        """Like `score`, of U_o o [..., D] and the images' joint embeddings [..., D]."""
        total = activated(self.joint_dropout(projected) + joint, self.activation)
        return functional.linear(
            total, self.label_embedding[: self.num_labels + 1], self.score_bias
        )

    def sample(
        self,
        embedding: ImageEmbedding,
        count: int,
        evidence: Tensor | None = None,
        *,
        seed: int = 0,
        max_labels: int | None = None,
        order: Order = "increasing",
    ) -> Samples:
        """Draw label sets of embedded images, given evidence; see `sample_sets`."""
        return sample_sets(
            self, embedding, count,
            evidence=evidence, seed=seed, max_labels=max_labels, order=order,
        )  # fmt: skip

    def forward(self, features: Tensor, paths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score every step of given paths (teacher forcing).

        The recurrence runs over the batch's distinct prefixes, not over its paths: a recurrent
        state knows nothing of the image.

        Args:
            features: [B, F].
            paths: [B, T] int64 label indices padded with -1.

        Returns:
            Scores [B, T+1, L+1] of the label after each prefix, chain term included, 0 past the end
            of a path; and the independent classifier's scores [B, L], or None without a chain term.
        """
        embedding, label_scores = self.embed_with_label_scores(features)
        return self.score_paths(embedding, paths), label_scores

    def score_paths(self, embedding: ImageEmbedding, paths: Tensor) -> Tensor:
        """Score every step of given paths of embedded images; see `forward`: [B, T+1, L+1]."""
        positions = torch.arange(paths.shape[1] + 1, device=paths.device)
        steps = positions <= (paths != PAD).sum(1, keepdim=True)
        rows = self.score_steps(embedding, paths, steps)
        scores = rows.new_zeros(*steps.shape, self.num_labels + 1)
        return scores.index_put(steps.nonzero(as_tuple=True), rows)

    def score_steps(
        self,
        embedding: ImageEmbedding,
        paths: Tensor,
        steps: Tensor,
        images: Tensor | None = None,
    ) -> Tensor:
        """Score chosen steps of given paths.

        Args:
            embedding: of B images.
            paths: [P, T] int64 label indices padded with -1.
            steps: [P, T+1] bool, M of them: step t is what follows the path's first t labels.
            images: [P] int64, the image of each path; None where path i is that of image i.

        Returns:
            [M, L+1] scores, chain term included, END last; rows go path by path, step by step.
        """
        trie = prefix_trie(paths)
        outputs = prefix_outputs(self.recurrence, self.input_rows, self.start, trie)
        projected = self.output_projection(outputs)  # [prefixes, D]
        own = steps.nonzero(as_tuple=True)[0]
        own = own if images is None else images[own]
        rows = self._score_projected(projected[trie.nodes[steps]], embedding.joint[own])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return rows if embedding.label_logits is None else rows + embedding.label_logits[own]
