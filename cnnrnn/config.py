"""Every option and its default, as frozen dataclasses; the command line is made from them.

`ModelConfig()` and `TrainConfig()` are this project's own recipe; each `.paper()` is the recipe of
Wang et al. (CVPR 2016) as far as the paper states it. What it does not state is marked "ours".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Cell = Literal["lstm", "paper"]
Activation = Literal["relu", "tanh", "identity"]
Order = Literal["increasing", "unique", "free"]
Algorithm = Literal["beam", "exact"]
Stop = Literal["n_best", "literal"]
Decide = Literal["path", "threshold", "label_thresholds", "k", "f1"]
DECISIONS: tuple[Decide, ...] = get_args(Decide)
PathLoss = Literal["sequence", "pla", "mla"]
BestBy = Literal["both", "nll", "decisions"]
LabelOrder = Literal["frequency", "rare", "given", "random", "easiest", "shuffled"]
OnBadImage = Literal["error", "skip"]
Backend = Literal["auto", "torch", "onnx", "openvino"]
Precision = Literal["auto", "fp32", "bf16"]
"""What torch multiplies in, in training and in a backbone."""
SearchPrecision = Literal["exact", "fast"]
"""What the CUDA search multiplies label scores in: float32, or float16 with float32 sums."""
SearchDevice = Literal["auto", "cpu", "cuda"]
"""Where a call searches; no option of a model, and in no checkpoint."""
FilePrecision = Literal["float32", "float16"]
"""The type of an exported backbone's weights."""

MAX_BEAM_SIZE = 16
MAX_PLACES = 64
MAX_KNOWN = 4
"""Labels of an image that an exported file takes as known to be present, by default."""
MAX_WIDTH = 65_536
MAX_PIXELS = 100_000_000
"""Pixels of an image file that is decoded, by default; what reads it decides, not the model."""
MAX_PATH = 65_536
"""Labels of the longest path."""
MAX_SIDE = 4096
"""Pixels of a backbone's input, in each direction."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _require_fraction(name: str, value: float) -> None:
    _require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")


def require_max_pixels(max_pixels: int) -> None:
    """Fail where no image could be decoded."""
    _require(max_pixels >= 1, f"max_pixels must be at least 1, got {max_pixels}")


def _require_side(pixels: int) -> None:
    _require(1 <= pixels <= MAX_SIDE, f"image_size must be in 1..{MAX_SIDE}, got {pixels}")


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded RGB image becomes the backbone's input.

    The whole image is resized to a square, so that no label is cropped away; then each channel
    is scaled to 0..1 and normalised.

    Attributes:
        image_size: side of the square input, in pixels.
        mean: per-channel mean to subtract, on the 0..1 scale.
        std: per-channel standard deviation to divide by, on the 0..1 scale.
        interpolation: resampling filter, `bilinear` or `bicubic`, antialiased.
        jpeg_draft: JPEG files at least four times as large as the input, in both directions, are
            decoded at 1/2, 1/4 or 1/8 of their size, the smallest that is twice the input: several
            times faster, and values move a little.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    jpeg_draft: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        _require_side(self.image_size)
        for name, triple in (("mean", self.mean), ("std", self.std)):
            _require(len(triple) == 3, f"{name} must have 3 values, got {len(triple)}")
        _require(min(self.std) > 0, f"std must be positive, got {self.std}")
        _require_choice("interpolation", self.interpolation, ("bilinear", "bicubic"))


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `CNNRNN`.

    Attributes:
        backbone: `small` (plain torch, needs no extra) or the name of any timm model, also with a
            tag (`resnet50.a1_in1k`), as `hf-hub:OWNER/NAME` or as `local-dir:FOLDER`.
        pretrained: load timm's pretrained weights.
        weights: file of the backbone's weights, in place of those: `.safetensors`, or a state dict
            or a training's checkpoint of timm or torchvision by `torch.save`.
        freeze_backbone: keep the backbone fixed, in eval mode; its features are cached on disk.
        image_size: side of the square input in pixels; None takes the backbone's own.
        jpeg_draft: decode large JPEG files at a smaller size, see `Preprocessing`.
        trunk_dim: width of the hidden layer between image feature and head; 0 for none.
        trunk_skip: the head reads the image feature itself beside the hidden layer.
        joint_dim: D, width of the joint space of labels and images.
        hidden_dim: H, width of the recurrent state.
        cell: `lstm`, or `paper` for equation 1 taken literally.
        activation: h of equation 4.
        score_bias: learn one bias per label and END.
        projection_bias: learn a bias in the image projection U_I.
        chain_term: add an independent classifier's next-label logits to the scores.
        tied_embedding: the recurrence reads labels through the rows that score them, as in the
            paper; false gives it a separate embedding.
        input_dropout: dropout on the image feature.
        hidden_dropout: dropout on the hidden layer.
        joint_dropout: dropout on the outputs of U_o and U_I, before their sum.
    """

    backbone: str = "resnet50"
    pretrained: bool = True
    freeze_backbone: bool = True
    weights: str | None = None
    image_size: int | None = None
    jpeg_draft: bool = True
    trunk_dim: int = 512
    trunk_skip: bool = True
    joint_dim: int = 64
    hidden_dim: int = 128
    cell: Cell = "lstm"
    activation: Activation = "relu"
    score_bias: bool = True
    projection_bias: bool = True
    chain_term: bool = True
    tied_embedding: bool = False
    input_dropout: float = 0.3
    hidden_dropout: float = 0.5
    joint_dropout: float = 0.3

    def __post_init__(self) -> None:
        """Check sizes, choices and rates."""
        for name, least in (("trunk_dim", 0), ("joint_dim", 1), ("hidden_dim", 1)):
            width = getattr(self, name)
            _require(
                least <= width <= MAX_WIDTH, f"{name} must be in {least}..{MAX_WIDTH}, got {width}"
            )
        _require_choice("cell", self.cell, ("lstm", "paper"))
        _require_choice("activation", self.activation, ("relu", "tanh", "identity"))
        for name in ("input_dropout", "hidden_dropout", "joint_dropout"):
            _require_fraction(name, getattr(self, name))
        if self.image_size is not None:
            _require_side(self.image_size)

    @classmethod
    def paper(cls) -> ModelConfig:
        """Return the paper's model: frozen VGG-16 (fc7), D = 64, H = 512, no biases, eq. 1.

        The activation h of equation 4 is not stated; ReLU is ours.
        """
        return cls(
            backbone="vgg16",
            trunk_dim=0,
            trunk_skip=False,
            joint_dim=64,
            hidden_dim=512,
            cell="paper",
            activation="relu",
            score_bias=False,
            projection_bias=False,
            chain_term=False,
            tied_embedding=True,
            input_dropout=0.0,
            hidden_dropout=0.0,
            joint_dropout=0.5,
        )


@dataclass(frozen=True)
class SearchConfig:
    """Beam search over label paths; docs/search.md states what each option means exactly.

    Attributes:
        beam_size: N, live paths and returned paths per image, 1 to 16.
        max_labels: T, longest path; None takes the longest label set seen in training
            (20 for a head that was not trained).
        min_labels: END is forbidden on shorter paths, unless nothing else may follow: under
            `increasing` a path that reached the last label ends there.
        order: `increasing` allows only labels above the last one, `unique` any label not yet on
            the path, `free` every label.
        end_takes_slot: END competes for one of the N places of a step.
        stop: `n_best` ends when no live path can enter the N best; `literal` ends when the best
            live path is below every finished one, as the paper says.
        marginal_places: live paths of each bank (docs/search.md) in a search for marginals, up to
            64; at least `beam_size`, which it is by default. More find more of the probability
            where it is spread over many label sets: a model takes 64 for images of which labels
            are known.
        algorithm: `beam`; or `exact`, which returns the most probable label sets with a proof, for
            `increasing` order. Marginals come from a beam in either case; `end_takes_slot` and
            `stop` are the beam's.
        max_expansions: prefixes of an image that the exact search scores at most.
    """

    beam_size: int = 8
    max_labels: int | None = None
    min_labels: int = 0
    order: Order = "increasing"
    end_takes_slot: bool = False
    stop: Stop = "n_best"
    marginal_places: int | None = None
    algorithm: Algorithm = "beam"
    max_expansions: int = 200

    def __post_init__(self) -> None:
        """Check ranges and choices."""
        _require(
            1 <= self.beam_size <= MAX_BEAM_SIZE,
            f"beam_size must be in 1..{MAX_BEAM_SIZE}, got {self.beam_size}",
        )
        _require(self.min_labels >= 0, f"min_labels must be at least 0, got {self.min_labels}")
        _require_choice("order", self.order, ("increasing", "unique", "free"))
        _require_choice("stop", self.stop, ("n_best", "literal"))
        _require_choice("algorithm", self.algorithm, ("beam", "exact"))
        _require(
            self.algorithm == "beam" or self.order == "increasing",
            f"algorithm exact needs order increasing, got {self.order}",
        )
        _require(
            self.max_expansions >= 1,
            f"max_expansions must be at least 1, got {self.max_expansions}",
        )
        if self.marginal_places is not None:
            _require(
                1 <= self.marginal_places <= MAX_PLACES,
                f"marginal_places must be in 1..{MAX_PLACES}, got {self.marginal_places}",
            )
        if self.max_labels is not None:
            _require(
                0 <= self.max_labels <= MAX_PATH,
                f"max_labels must be in 0..{MAX_PATH}, got {self.max_labels}",
            )
            _require(
                self.min_labels <= self.max_labels,
                f"min_labels ({self.min_labels}) must not exceed max_labels ({self.max_labels})",
            )

    def places(self, marginals: bool) -> int:
        """Return how many live paths of a bank are kept, in a search for marginals or without."""
        return max(self.beam_size, self.marginal_places or 0) if marginals else self.beam_size

    @classmethod
    def paper(cls, k: int = 0) -> SearchConfig:
        """Return the paper's search with at least `k` labels (footnote 1); N is ours."""
        return cls(beam_size=4, min_labels=k, order="free", end_takes_slot=True, stop="literal")


@dataclass(frozen=True)
class Calibration:
    """What was chosen on a validation split, stored with the model.

    Attributes:
        threshold: a label is present from this score on, under `decide="threshold"`; the one with
            the best O-F1.
        mix_weight: weight of the chain term's own score beside the path marginal, in logit space.
        label_thresholds: one threshold per label, in path order, under `decide="label_thresholds"`;
            each the one with the label's best F1, shrunk towards `threshold`. Empty if they were
            not calibrated: then every label uses `threshold`.
        k: how many labels each image gets under `decide="k"`; the number with the best O-F1.
        min_labels: labels that every decided set has at least; 1 where no validation image is
            without labels.
        uncalibrated: labels, in path order, with too few positives for a threshold of their own;
            they use `threshold`.
        known_mix_weight: as `mix_weight`, where some labels are known.
        set_nll: -log P(set) in nats that the true sets of 1, 2, ... percent of further images do
            not exceed, as far as validation data tells; empty where it was not calibrated.
    """

    threshold: float = 0.5
    mix_weight: float = 0.5
    label_thresholds: tuple[float, ...] = ()
    k: int = 1
    min_labels: int = 0
    uncalibrated: tuple[int, ...] = ()
    known_mix_weight: float = 0.0
    set_nll: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("mix_weight", "known_mix_weight"):
            weight = getattr(self, name)
            _require(0 <= weight <= 1, f"{name} must be in [0, 1], got {weight}")
        _require(
            len(self.set_nll) <= 99 and list(self.set_nll) == sorted(self.set_nll),
            "set_nll must be at most 99 ascending numbers",
        )
        _require(self.k >= 1, f"k must be at least 1, got {self.k}")
        _require(self.min_labels >= 0, f"min_labels must be at least 0, got {self.min_labels}")


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe.

    Attributes:
        optimizer: `adamw` or `rmsprop`.
        learning_rate: of everything, except for the factors below.
        warm_scale: factor on the learning rate of trunk and chain term after a warm stage.
        backbone_scale: factor on the learning rate of a backbone that is trained further.
        recurrent_scale: factor on the learning rate of the weights from state to state.
        momentum: of RMSprop.
        weight_decay: of the weights, decoupled from the gradient, as in AdamW; also with RMSprop.
        batch_size: images per batch; with `torchrun` over all processes together.
        accumulate: batches per step of the optimiser; the loss is the mean over all their images.
        warm_epochs: at most this many epochs of binary cross-entropy on the chain term, in a first
            stage; 0 for none.
        epochs: at most this many epochs of the sequence loss.
        finish_epochs: at most this many more epochs from the best one on, at a lower learning rate.
        finish_scale: factor on all learning rates in those.
        best_by: how the best epoch is chosen on validation data: `decisions`, the largest O-F1 plus
            mAP of mixed scores plus exact match of the best path; `nll`, the smallest -log P(true
            set); or `both`, decisions minus a tenth of the NLL. The losses `pla` and `mla`, whose
            paths have other orders, use decisions alone.
        patience: stop a stage after this many epochs without improvement in validation.
        aux_weight: weight of the chain term's binary cross-entropy beside the sequence loss.
        clip_norm: largest gradient norm; 0 for no clipping.
        schedule: of the learning rate in each stage: `constant`; `one_cycle`, up to it and down to
            0; `cosine`, from it down to 0; `step`, times `step_factor` every `step_epochs` epochs.
        step_epochs: of `schedule: step`.
        step_factor: of `schedule: step`.
        ema_decay: validate and keep an exponential moving average of the weights with this decay
            per step, not biased towards the first ones; 0 for the weights themselves.
        loss: `sequence` (cross-entropy along a path in the label order), or one that fits the order
            to the model's own predictions: `pla` (predicted label alignment) or `mla` (minimal loss
            alignment). Both need the search order `unique`.
        label_order: `frequency` (most frequent first in training), `rare` (rarest first), `given`,
            `random` (drawn once, from the seed), `easiest` (starts as `frequency` and is learned
            again from the model after each of the first `reorder_epochs` epochs) or `shuffled` (a
            new random order for every image of every batch; needs a search order other than
            `increasing`).
        reorder_epochs: epochs of the sequence loss after which `easiest` learns its order again.
        train_split: name of the split to train on; None takes `train`, or `all`.
        val_split: name of the split to validate on; None takes `val`, or holds out a share of the
            training split if there is no `val` or if `train_split` contains its records.
        val_fraction: share of the training split held out if there is no split to validate on;
            about the same share of every label.
        feature_rms: feature vectors, including a frozen backbone's, are scaled to this root mean
            square over the training images; 0 leaves them unscaled.
        empty: `keep` training images without labels (their target is END) or `drop` them.
        augment: flip and shift training images, if the backbone is trained.
        on_bad_image: `error` stops at an unreadable image, `skip` leaves it out and counts it.
        precision: `auto` (bf16 autocast on a GPU that has it), `fp32` or `bf16`.
        workers: processes that decode images; 0 decodes in the training process. With a frozen
            backbone, threads that decode; 0 for one per core.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        backend: what makes the features of a frozen backbone: `torch`, on a CPU also `onnx` (ONNX
            Runtime) or `openvino`, or `auto`, the fastest where there are enough images.
        seed: of initial weights, shuffling, dropout and the held-out share.
        init_backbone: start the backbone from this checkpoint folder, whose head is not read, or
            from a file as of `model.weights`.
        feature_cache: folder for a frozen backbone's features; None puts it in the output folder.
        tensorboard: also write each epoch's figures to `tensorboard/` in the output folder.
    """

    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: float = 1e-3
    warm_scale: float = 0.3
    backbone_scale: float = 0.1
    recurrent_scale: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-2
    batch_size: int = 128
    accumulate: int = 1
    warm_epochs: int = 0
    epochs: int = 60
    finish_epochs: int = 20
    finish_scale: float = 0.3
    best_by: BestBy = "both"
    patience: int = 6
    aux_weight: float = 1.0
    clip_norm: float = 5.0
    schedule: Literal["constant", "one_cycle", "cosine", "step"] = "constant"
    step_epochs: int = 10
    step_factor: float = 0.1
    ema_decay: float = 0.99
    loss: PathLoss = "sequence"
    label_order: LabelOrder = "frequency"
    reorder_epochs: int = 3
    train_split: str | None = None
    val_split: str | None = None
    val_fraction: float = 0.1
    feature_rms: float = 0.25
    empty: Literal["keep", "drop"] = "keep"
    augment: bool = True
    on_bad_image: OnBadImage = "error"
    precision: Precision = "auto"
    workers: int = 0
    device: str = "auto"
    backend: Backend = "auto"
    seed: int = 0
    init_backbone: str | None = None
    feature_cache: str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check ranges and choices."""
        _require_choice("optimizer", self.optimizer, ("adamw", "rmsprop"))
        _require_choice("schedule", self.schedule, ("constant", "one_cycle", "cosine", "step"))
        _require_choice("loss", self.loss, get_args(PathLoss))
        _require_choice("best_by", self.best_by, get_args(BestBy))
        _require_choice("label_order", self.label_order, get_args(LabelOrder))
        _require_choice("empty", self.empty, ("keep", "drop"))
        _require_choice("on_bad_image", self.on_bad_image, ("error", "skip"))
        _require_choice("precision", self.precision, get_args(Precision))
        _require_choice("backend", self.backend, get_args(Backend))
        _require(
            self.loss == "sequence" or self.label_order not in ("easiest", "shuffled"),
            "label_order must be frequency, rare, given or random for loss "
            f"{self.loss}, which makes its own paths, got {self.label_order}",
        )
        _require(self.learning_rate > 0, f"learning_rate must be > 0, got {self.learning_rate}")
        for name in ("batch_size", "accumulate", "step_epochs", "patience"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        factor = self.step_factor
        _require(0 < factor <= 1, f"step_factor must be in (0, 1], got {factor}")
        _require_fraction("ema_decay", self.ema_decay)
        _require_fraction("val_fraction", self.val_fraction)
        _require(
            self.train_split is None or self.train_split != self.val_split,
            f"val_split must be another split than train_split, got {self.val_split!r} for both",
        )
        _require(0 <= self.seed < 2**63, f"seed must be in 0..2^63-1, got {self.seed}")
        for name in ("warm_scale", "finish_scale", "backbone_scale", "recurrent_scale", "momentum",
                     "weight_decay", "warm_epochs", "epochs", "finish_epochs", "reorder_epochs",
                     "aux_weight", "clip_norm", "feature_rms", "workers"):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be at least 0, got {value}")

    @classmethod
    def paper(cls) -> TrainConfig:
        """Return the paper's recipe: RMSprop, momentum 0.9, weight decay 1e-4, one stage.

        Learning rate, batch size, epochs, patience, clipping and the size of the features are ours:
        the paper does not state them. So are two changes without which its literal cell does not
        learn: weight decay is decoupled from the gradient
        (`training.optimizers.decoupled_rmsprop`), and the weights from state to state, which make
        its states grow without bound, take steps of a thousandth.
        """
        return cls(
            optimizer="rmsprop",
            learning_rate=1e-4,
            recurrent_scale=0.001,
            momentum=0.9,
            weight_decay=1e-4,
            batch_size=128,
            warm_epochs=0,
            epochs=40,
            finish_epochs=0,
            aux_weight=0.0,
            ema_decay=0.0,
            feature_rms=1.0,
            augment=False,
        )


def flat_options(
    model: ModelConfig, search: SearchConfig, train: TrainConfig, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Return the options of a training by name, those of model and search after a prefix.

    Args:
        model: named `model.` and the field.
        search: named `search.` and the field.
        train: named by the field.
        leave_out: names that are left out.
    """
    parts = (("", train), ("model.", model), ("search.", search))
    named = {f"{prefix}{k}": v for prefix, part in parts for k, v in asdict(part).items()}
    return {name: value for name, value in named.items() if name not in leave_out}


def former_options() -> dict[str, Any]:
    """Return what options meant for a training from before they existed: mostly their defaults."""
    defaults = flat_options(ModelConfig(), SearchConfig(), TrainConfig())
    return defaults | {"model.jpeg_draft": False}


@dataclass(frozen=True)
class NusWideOptions:
    """What to read of a `nuswide:` source.

    Attributes:
        labels: `concepts`, the 81 of the ground truth, or `tags`, the 1,000 that users gave.
        train: a list of images that make up the split `train`; None takes the set's own splits.
        val: the same of `val`.
        test: the same of `test`.
    """

    labels: Literal["concepts", "tags"] = "concepts"
    train: str | None = None
    val: str | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        """Check the choice."""
        _require_choice("labels", self.labels, ("concepts", "tags"))


@dataclass(frozen=True)
class VocOptions:
    """What to read of a `voc:` source.

    Attributes:
        labels: file with the labels, one per line, in their order; None takes VOC's 20, or the
            names that occur where one of them is none of these.
    """

    labels: str | None = None


@dataclass(frozen=True)
class JsonLinesOptions:
    """How a `jsonl:` source is laid out.

    Attributes:
        images: the folder that image paths start from; None takes that of the file.
        vocabulary: file with the labels, one per line, in their order; None takes the labels that
            occur, sorted.
    """

    images: str | None = None
    vocabulary: str | None = None


@dataclass(frozen=True)
class HuggingFaceOptions:
    """What to read of an `hf:` source.

    Attributes:
        image: column of images; None takes the only one of that type.
        labels: column of labels, or `a,b,c` for columns that are one label each; None takes the
            column of class labels or of lists, or all others where they are true and false.
        config: the configuration of a dataset that has several.
        vocabulary: file with the names of numbered labels, one per line, label 0 first.
    """

    image: str | None = None
    labels: str | None = None
    config: str | None = None
    vocabulary: str | None = None


@dataclass(frozen=True)
class TableOptions:
    """How a `csv:` source is laid out.

    Attributes:
        image: column of image paths; None takes the first of image, fname, file_name, filename,
            image_name, image_path, path, file that there is.
        labels: column of labels, or of 0 and 1 for the label that it is named by; `a,b,c` or `a..z`
            for several of the latter. None takes the first of labels, tags, label, or all other
            columns where they hold 0 and 1.
        split: column of split names, or of true and false where its name is `is_valid`; None
            takes split or is_valid where there is one.
        delimiter: between the labels of an image; `space` is any white space, `none` takes a cell
            for one label. None takes the first of `;`, `|` and `,` that any cell has.
        separator: between the cells of a row: comma, semicolon, tab or pipe, by name or as a sign;
            None takes what fits the header.
        encoding: of the table; None takes UTF-8, or UTF-16 with a byte order mark.
        suffix: added to each image path.
        vocabulary: file with the labels, one per line, in their order; None takes the labels that
            occur, sorted.
    """

    image: str | None = None
    labels: str | None = None
    split: str | None = None
    delimiter: str | None = None
    separator: str | None = None
    encoding: str | None = None
    suffix: str = ""
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        """Check delimiter and separator."""
        _require(self.delimiter != "", "delimiter must not be empty, got ''")
        separators = (None, "comma", "semicolon", "tab", "pipe", ",", ";", "\t", "|")
        _require(
            self.separator in separators,
            f"separator must be comma, semicolon, tab or pipe, got {self.separator!r}",
        )


@dataclass(frozen=True)
class SvmlightOptions:
    """How svmlight text of a `features:` source is read.

    Attributes:
        vocabulary: file with label names, one per line, label 0 first; None takes the label
            numbers that occur, with their digits as names.
        features: F, how many features a record has; None takes those up to the highest number
            that occurs.
        first: number of the first feature, 0 or 1; None takes 0 where a 0 occurs, else 1.
    """

    vocabulary: str | None = None
    features: int | None = None
    first: Literal[0, 1] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.features is not None:
            _require(self.features >= 1, f"features must be at least 1, got {self.features}")
        _require(self.first in (None, 0, 1), f"first must be 0 or 1, got {self.first}")


@dataclass(frozen=True)
class CompareConfig:
    """What a comparison of methods runs.

    Attributes:
        seeds: one result of every trained method for each; the first one tunes.
        methods: names of methods, see docs/comparison.md; None takes all distinct ones.
        settings: how many settings of its own hyperparameter each method tries.
        members: M, trainings that an ensemble averages.
        test_split: name of the split that is tested on.
        tune_each_seed: choose the setting for every seed instead of keeping the first one's.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] | None = None
    settings: int = 4
    members: int = 3
    test_split: str = "test"
    tune_each_seed: bool = False

    def __post_init__(self) -> None:
        """Check ranges and that there are no duplicates."""
        _require(len(self.seeds) > 0, "seeds must name at least one seed, got none")
        for name, values in (("seeds", self.seeds), ("methods", self.methods or ())):
            _require(
                len(set(values)) == len(values), f"{name} must be distinct, got {list(values)}"
            )
        for seed in self.seeds:
            _require(0 <= seed < 2**63, f"seeds must be in 0..2^63-1, got {seed}")
        _require(1 <= self.settings <= 5, f"settings must be in 1..5, got {self.settings}")
        _require(self.members >= 2, f"members must be at least 2, got {self.members}")
