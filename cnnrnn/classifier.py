"""`CNNRNN`: backbone, head, label names and decisions in one module that is saved and loaded."""

from __future__ import annotations

import json
import os
import shutil
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from cnnrnn.backbones import Backbone, make_backbone
from cnnrnn.config import Calibration, ModelConfig, Preprocessing, SearchConfig
from cnnrnn.labels import LabelSpace
from cnnrnn.model import Head, ImageEmbedding

if TYPE_CHECKING:
    from cnnrnn.decisions import Inference
    from cnnrnn.prediction import Prediction

T = TypeVar("T")

FORMAT = 2
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FEATURES_ONLY = "features"


class CheckpointError(ValueError):
    """A checkpoint folder is missing, incomplete or does not fit together."""


class CNNRNN(nn.Module):
    """A multi-label image classifier: images in, label paths out.

    Attributes:
        config: the architecture.
        label_space: names in path order and their place in the training data.
        backbone: the image network; None for a head trained on feature vectors.
        head: scores label paths.
        search: the search that `predict` runs by default.
        calibration: what the validation split decided.
    """

    def __init__(
        self,
        config: ModelConfig,
        label_space: LabelSpace,
        head: Head,
        backbone: Backbone | None,
        search: SearchConfig | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.label_space = label_space
        self.head = head
        self.backbone = backbone
        self.search = search or SearchConfig()
        self.calibration = calibration or Calibration()

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in path order, [L]."""
        return self.label_space.names

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.label_embedding.device

    @property
    def feature_dim(self) -> int:
        """F, the width of the feature vectors that the head reads."""
        return self.head.feature_dim

    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's features [B, F] of normalised images [B, 3, S, S]."""
        if self.backbone is None:
            raise ValueError(
                "this model was trained on feature vectors and has no backbone; "
                "use model.predict_features(features)"
            )
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Tensor) -> ImageEmbedding:
        """Embed normalised images [B, 3, S, S] for the search."""
        return self.head.embed(self.features(images))

    def infer(self, features: Tensor, search: SearchConfig | None = None) -> Inference:
        """Search feature vectors [n, F]; the model's own search by default."""
        from cnnrnn.decisions import infer

        return infer(self.head, features, search or self.search)

    def set_nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return -log P(the whole true set | image) in nats, see `decisions.set_nll`.

        Args:
            features: [n, F].
            targets: [n, L] bool, columns in the order of `labels`.

        Returns:
            [n] float64; an upper bound where `search.order` is not `increasing`.
        """
        from cnnrnn.decisions import set_nll

        return set_nll(self.head, features.to(self.device), targets, self.search.order)

    def predict(self, images: Any, **options: Any) -> list[Prediction]:
        """Predict label sets of images; arguments as in `cnnrnn.predict`."""
        from cnnrnn.predictor import predict

        return predict(images, self, **options)

    def predict_features(self, features: Tensor, **options: Any) -> list[Prediction]:
        """Predict label sets of feature vectors [B, F]; options as in `cnnrnn.predict_features`."""
        from cnnrnn.predictor import predict_features

        return predict_features(features, self, **options)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder, whole or not at all.

        Args:
            path: the folder; a former checkpoint there is replaced.
        """
        replace_folder(path, self.write)

    def write(self, folder: Path) -> None:
        """Write a checkpoint's files into a folder that is there."""
        from safetensors.torch import save_file

        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        write_description(folder, self._description())
        # safetensors makes its file for the owner alone; the umask decides, as for the other.
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": asdict(self.config),
            "feature_dim": self.head.feature_dim,
            "labels": list(self.label_space.names),
            "source_index": list(self.label_space.source_index),
            "preprocessing": None if self.backbone is None else asdict(self.backbone.preprocessing),
            "max_labels": self.head.max_labels,
            "search": asdict(self.search),
            "calibration": asdict(self.calibration),
        }


def load_checkpoint(path: str | Path) -> CNNRNN:
    """Read a checkpoint folder, or the best checkpoint of a training run's folder.

    Args:
        path: a folder written by `CNNRNN.save`, or one that holds such a folder as `best`.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        CheckpointError: the folder is missing or incomplete, or its parts do not fit together.
    """
    found = find_checkpoint(path)
    return _build(found, _read_config(found / CONFIG_FILE))


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that a path stands for; see `load_checkpoint`."""
    folder = Path(path)
    candidates = [folder, folder / "best", _former(folder), _former(folder / "best")]
    found = next((c for c in candidates if (c / CONFIG_FILE).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} is not a checkpoint: neither it nor {folder / 'best'} holds {CONFIG_FILE}"
        )
    return found


def replace_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a checkpoint folder, whole or not at all.

    The folder is written beside its place and moved there. A process killed between the two
    moves leaves the former checkpoint in a hidden folder, where `find_checkpoint` finds it.

    Args:
        path: the folder; a former checkpoint there is replaced.
        write: gets an empty folder to fill.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, not a folder for a checkpoint")
    if target.exists() and not (target / CONFIG_FILE).is_file() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty and holds no checkpoint; not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        former = _former(target)
        if target.exists():  # else a process was killed here, and the former is all there is
            shutil.rmtree(former, ignore_errors=True)
            target.rename(former)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write the JSON that says what a checkpoint folder holds."""
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_description(file: Path) -> Any:
    """Read that JSON, whatever it holds.

    Raises:
        CheckpointError: it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    description = read_description(file)
    if isinstance(description, dict) and "members" in description:
        raise CheckpointError(f"{file.parent} holds an ensemble; cnnrnn.load reads it")
    expected = {"format", "model", "feature_dim", "labels", "source_index", "preprocessing",
                "max_labels", "search", "calibration"}  # fmt: skip
    if not isinstance(description, dict) or not expected <= description.keys():
        missing = sorted(expected - set(description)) if isinstance(description, dict) else "object"
        raise CheckpointError(f"{file} lacks {missing}; it is not a checkpoint of cnnrnn")
    require_format(file, description["format"])
    if description["format"] == 1 and isinstance(description["model"], dict):
        description["model"].setdefault("tied_embedding", True)
    return description


def require_format(file: Path, found: Any) -> None:
    """Refuse a checkpoint of a format that is not known."""
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{file} has format {found}, this release reads 1 to {FORMAT}; upgrade cnnrnn"
        )


def _build(folder: Path, description: dict[str, Any]) -> CNNRNN:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = read_options(ModelConfig, "model", description["model"])
        labels = LabelSpace(
            tuple(typed("labels", description["labels"], list[str])),
            tuple(typed("source_index", description["source_index"], list[int])),
        )
        search = read_options(SearchConfig, "search", description["search"])
        calibration = read_calibration(description["calibration"], description["format"])
        require_one_per_label(calibration, len(labels))
        feature_dim = typed("feature_dim", description["feature_dim"], int)
        head = Head.from_config(config, len(labels), feature_dim)
        head.max_labels = typed("max_labels", description["max_labels"], int)
        if head.max_labels < 0:
            raise ValueError(f"max_labels must be at least 0, got {head.max_labels}")
        backbone = None
        if description["preprocessing"] is not None:
            preprocessing = read_options(
                Preprocessing, "preprocessing", description["preprocessing"]
            )
            backbone = make_backbone(config, load_pretrained=False)
            backbone.preprocessing = preprocessing
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a size beyond memory
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a model: {error}"
        ) from error
    model = CNNRNN(config, labels, head, backbone, search, calibration)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        if description["format"] == 1:  # had no scaling of features
            weights.setdefault("head.trunk.feature_scale", head.trunk.feature_scale)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not hold the weights of the model that "
            f"{CONFIG_FILE} describes: {reason}"
        ) from error
    return model.eval()


def read_options(kind: type[T], name: str, values: Any) -> T:
    """Build a config dataclass from JSON values, of which each must be there and of its type."""
    typed(name, values, dict)
    fields = typing.get_type_hints(kind)
    if values.keys() != fields.keys():
        odd = sorted(values.keys() ^ fields.keys())
        raise ValueError(f"{name} has fields missing or unknown: {', '.join(odd)}")
    return kind(**{key: typed(f"{name}.{key}", v, fields[key]) for key, v in values.items()})


def read_calibration(values: Any, form: Any) -> Calibration:
    """Build a calibration from the JSON values of a file of a format; format 1 lacks two."""
    if form == 1 and isinstance(values, dict):
        values = {"min_labels": 0, "uncalibrated": []} | values
    return read_options(Calibration, "calibration", values)


def require_one_per_label(calibration: Calibration, num_labels: int) -> None:
    """Raise a ValueError where a calibration is not that of so many labels."""
    if len(calibration.label_thresholds) not in (0, num_labels):
        raise ValueError(
            f"calibration.label_thresholds must be {num_labels} numbers, one per label, or none, "
            f"got {len(calibration.label_thresholds)}"
        )
    others = [label for label in calibration.uncalibrated if not 0 <= label < num_labels]
    if others:
        raise ValueError(
            f"calibration.uncalibrated must be labels in 0..{num_labels - 1}, got {others[0]}"
        )


def typed(name: str, value: Any, kind: Any) -> Any:
    """Return a JSON value if it is of a type, a list as tuple where that is the type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        of_any_length = parts[-1] is Ellipsis
        kinds = parts[:1] * len(value) if of_any_length else parts
        if len(value) == len(kinds):
            return tuple(typed(name, v, part) for v, part in zip(value, kinds, strict=True))
    if origin is list and isinstance(value, list):
        return [typed(name, item, parts[0]) for item in value]
    if origin is typing.Literal and value in parts:
        return value
    if origin is types.UnionType:
        accepted = parts
    else:
        accepted = (float, int) if kind is float else (kind,)
    if origin in (None, types.UnionType) and type(value) in accepted:
        return value
    raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")


def _former(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.former"


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over names, types, shapes and values of weights, on any device."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
