"""`predict`, `predict_iter` and `predict_features`, once for every kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnnrnn.config import (
    MAX_PIXELS,
    Backend,
    Calibration,
    Decide,
    OnBadImage,
    Precision,
    SearchConfig,
    SearchDevice,
    require_max_pixels,
)
from cnnrnn.machine.devices import resolve_device, use_one_thread_if_forked
from cnnrnn.machine.words import listed
from cnnrnn.network.backbones import Backbone
from cnnrnn.network.engines import BackboneRunner
from cnnrnn.prediction.decisions import DecisionOptions
from cnnrnn.prediction.known import Known, Names
from cnnrnn.prediction.pipeline import ImageModel, predict_images
from cnnrnn.prediction.result import Prediction, decided_predictions
from cnnrnn.search.device import require_search_device
from cnnrnn.search.inference import Inference


@dataclass(frozen=True)
class Running:
    """How a model runs for one call; see `Predictor.predict`."""

    beam_size: int | None = None
    min_labels: int | None = None
    forbidden_labels: Sequence[str] = ()
    device: str | None = None
    precision: Precision = "fp32"
    compiled: bool = False
    backend: Backend | None = None
    search_device: SearchDevice = "auto"


class Predictor(ABC):
    """What finds label paths in images or feature vectors, and is asked for predictions.

    Attributes:
        calibration: what the validation split decided.
    """

    calibration: Calibration

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """Label names in path order, [L]."""

    @abstractmethod
    def image_model(self, running: Running) -> ImageModel:
        """Return what runs images as the options say.

        Raises:
            ValueError: the model reads no images, or an option does not fit it.
        """

    @abstractmethod
    def longest_path_of(self, running: Running) -> int:
        """Return how many labels a path can hold under these options."""

    def known_labels(self, running: Running, known: Names, absent: Names) -> Known:
        """Return what is known of images, checked as far as that goes; see `predict`."""
        return Known(self.labels, self.longest_path_of(running), known, absent)

    @abstractmethod
    def infer_features(
        self, features: Tensor, running: Running, evidence: Tensor | None
    ) -> Inference:
        """Search feature vectors [n, F] float32 as the options say, given evidence [n, L] int8.

        Raises:
            ValueError: the model reads no feature vectors, or an option does not fit it.
        """

    def predict(
        self,
        images: Any,
        *,
        known: Names = (),
        absent: Names = (),
        top_k: int | None = None,
        beam_size: int | None = None,
        min_labels: int | None = None,
        forbidden_labels: Sequence[str] = (),
        decide: Decide = "path",
        threshold: float | None = None,
        batch_size: int = 64,
        device: str | None = None,
        workers: int | None = None,
        precision: Precision = "fp32",
        compiled: bool = False,
        backend: Backend | None = None,
        search_device: SearchDevice = "auto",
        on_bad_image: OnBadImage = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> list[Prediction]:
        """Predict the label set of each image, in the order given.

        Args:
            images: a path, a folder, the bytes of an image file or a file open in binary mode, a
                PIL image, an array [H, W, 3] or [B, H, W, 3] of uint8 RGB, a tensor [3, H, W] or
                [B, 3, H, W] of uint8 or of float in 0..1, or a list of these.
                A folder stands for the pictures in it and below, sorted by path. A file for ONNX
                Runtime that takes uint8 pictures takes no float tensors.
            known: names of labels that are known to be present: a list for all images, or a list
                of lists, one per image. Every set holds them, and scores are those of the other
                labels given them.
            absent: likewise, labels known to be absent.
            top_k: keep at most this many labels, those with the best scores. Labels known to be
                present count, and all of them stay.
            beam_size: N, 1 to 16; the model's own by default. A search in ONNX Runtime has no
                other.
            min_labels: every set has at least so many labels, and shorter label paths are
                forbidden; 0 allows empty sets. None for what validation data decided: 1 where no
                image there is without labels.
            forbidden_labels: deprecated, for `absent` of all images; only for exported files.
            decide: `path` takes the best path's labels; `threshold` those whose score reaches the
                threshold chosen on validation data, `label_thresholds` each label's own; `k` the
                number of best-scored labels chosen there; `f1` the set with the best expected F1
                over the sets found.
            threshold: overrides that threshold, and implies `decide="threshold"`.
            batch_size: images per step.
            device: `cpu`, `cuda`, `cuda:N` or `auto`, to which the model is moved; None leaves it
                where it is. ONNX Runtime stays where it was opened.
            workers: threads that decode, while on a CPU as many batches are computed at once, as
                far as torch has threads; 0 does all in the calling thread. None has one per core,
                up to 8, and 0 for an iterator, so that a batch is answered before more is taken
                from it.
            precision: of the backbone. `bf16` is faster where the hardware has it, and moves scores
                by up to some hundredths; `auto` is bf16 there and fp32 elsewhere.
            compiled: run the backbone through torch.compile, which takes a minute at the first
                batch.
            backend: what runs the backbone: `torch`, on a CPU also `onnx` (ONNX Runtime) or
                `openvino`, whose scores differ in the last digits; None for the model's own, which
                is `auto`: on a CPU the fastest that is installed, once there are enough images to
                repay the export, some hundred.
            search_device: `cpu` or `cuda` searches there, wherever the model is; `auto` searches on
                the CPU, but for a model that is on a GPU on which the search has been measured (see
                `beam_search`). Where `marginal_places` needs more live paths than a GPU holds, as
                by default with known labels, the CPU searches. ONNX Runtime searches where it runs.
            on_bad_image: `error` stops at an unreadable image, `skip` gives it a prediction without
                labels and with `.error`, and warns of folders in a folder that cannot be listed.
            max_pixels: image files and PIL images of more pixels are bad images. A JPEG that is
                decoded at a smaller size counts by that; what takes more than 8 bytes a pixel to
                decode counts for more, as WebP does.

        Returns:
            One `Prediction` per image.

        Raises:
            TypeError: `images` holds something else, or `known` no names.
            ValueError: an array or tensor has another shape or type, or options do not fit; a known
                label is none of the model's, or both present and absent.
            BadImageError: an image cannot be read.
        """
        return list(
            self.predict_iter(
                images,
                known=known,
                absent=absent,
                top_k=top_k,
                beam_size=beam_size,
                min_labels=min_labels,
                forbidden_labels=forbidden_labels,
                decide=decide,
                threshold=threshold,
                batch_size=batch_size,
                device=device,
                workers=workers,
                precision=precision,
                compiled=compiled,
                backend=backend,
                search_device=search_device,
                on_bad_image=on_bad_image,
                max_pixels=max_pixels,
            )
        )

    def predict_iter(
        self,
        images: Any,
        *,
        known: Names = (),
        absent: Names = (),
        top_k: int | None = None,
        beam_size: int | None = None,
        min_labels: int | None = None,
        forbidden_labels: Sequence[str] = (),
        decide: Decide = "path",
        threshold: float | None = None,
        batch_size: int = 64,
        device: str | None = None,
        workers: int | None = None,
        precision: Precision = "fp32",
        compiled: bool = False,
        backend: Backend | None = None,
        search_device: SearchDevice = "auto",
        on_bad_image: OnBadImage = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Prediction]:
        """Predict image after image, holding a few batches at a time; arguments as in `predict`.

        `images` may also be any iterable of single images, such as a generator that never ends.
        With `workers` up to three batches, and on a CPU one for each thread of torch, are taken
        ahead of the prediction that is returned.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be error or skip, got {on_bad_image!r}")
        require_max_pixels(max_pixels)
        options = DecisionOptions(top_k, decide, threshold, min_labels)
        running = Running(
            beam_size, min_labels, forbidden_labels, device, precision, compiled, backend,
            search_device,
        )  # fmt: skip
        model = self.image_model(running)
        return predict_images(
            images,
            model,
            options,
            self.known_labels(running, known, absent),
            batch_size=batch_size,
            workers=workers,
            on_bad_image=on_bad_image,
            max_pixels=max_pixels,
        )

    def predict_features(
        self,
        features: Tensor | np.ndarray[Any, Any],
        *,
        known: Names = (),
        absent: Names = (),
        top_k: int | None = None,
        beam_size: int | None = None,
        min_labels: int | None = None,
        forbidden_labels: Sequence[str] = (),
        decide: Decide = "path",
        threshold: float | None = None,
        device: str | None = None,
        search_device: SearchDevice = "auto",
    ) -> list[Prediction]:
        """Predict label sets of feature vectors [B, F]; other arguments as in `predict`."""
        options = DecisionOptions(top_k, decide, threshold, min_labels)
        use_one_thread_if_forked()
        batch = torch.as_tensor(features).to(torch.float32)
        running = Running(
            beam_size, min_labels, forbidden_labels, device, search_device=search_device
        )
        of_all = self.known_labels(running, known, absent)
        of_all.require_all_used(len(batch))
        rows = range(len(batch))
        evidence = of_all.evidence(rows, [str(row) for row in rows])
        inference = self.infer_features(batch, running, evidence)
        return decided_predictions(inference, self.labels, self.calibration, options)


class TorchPredictor(Predictor):
    """A predictor whose backbone and head torch runs; a module, too.

    Attributes:
        search: the options of the search that it runs by default.
        backbone: the image network; None for feature vectors.
        backend: what runs the backbone by default, see `Predictor.predict`; not in a checkpoint.
    """

    search: SearchConfig
    backbone: Backbone | None
    backend: Backend = "auto"

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def infer(
        self,
        features: Tensor,
        search: SearchConfig | None = None,
        evidence: Tensor | None = None,
        search_device: SearchDevice = "auto",
    ) -> Inference:
        """Search feature vectors [n, F].

        Args:
            features: [n, F].
            search: the model's own by default.
            evidence: what is known of labels, [1 or n, L] int8; see `beam_search`.
            search_device: where to search, see `beam_search`.
        """

    @abstractmethod
    def longest_path(self, search: SearchConfig) -> int:
        """Return how many labels a path of a search can hold."""

    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's features [B, F] of normalised images [B, 3, S, S]."""
        features: Tensor = self._required_backbone()(images)
        return features

    def _required_backbone(self) -> Backbone:
        if self.backbone is None:
            raise ValueError(
                "this model was trained on feature vectors and reads no images; "
                "use model.predict_features(features)"
            )
        return self.backbone

    def image_model(self, running: Running) -> ImageModel:
        """Return what runs images as the options say; see `Predictor.image_model`."""
        self._required_backbone()
        search = self._searched_by(running)
        return TorchModel(
            self, search, running.precision, running.compiled, running.backend or self.backend,
            running.search_device,
        )  # fmt: skip

    def longest_path_of(self, running: Running) -> int:
        """Return how many labels a path can hold under these options."""
        return self.longest_path(self._search(running))

    def infer_features(
        self, features: Tensor, running: Running, evidence: Tensor | None
    ) -> Inference:
        """Search feature vectors as the options say; see `Predictor.infer_features`."""
        search = self._searched_by(running)
        return self.infer(features.to(self.device), search, evidence, running.search_device)

    def _searched_by(self, running: Running) -> SearchConfig:
        """Bring the module to its device, in eval mode, and return the options of its search."""
        if running.forbidden_labels:
            raise ValueError(
                "forbidden_labels are only for exported files, got "
                f"{listed(running.forbidden_labels)}: name them in absent="
            )
        require_search_device(running.search_device)
        assert isinstance(self, nn.Module)
        if running.device is not None:
            self.to(resolve_device(running.device))
        self.eval()
        return self._search(running)

    def _search(self, running: Running) -> SearchConfig:
        options = {"beam_size": running.beam_size, "min_labels": running.min_labels}
        changes: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
        return replace(self.search, **changes)


class TorchModel:
    """What `predict_images` needs of a model whose head torch holds.

    Args:
        model: has a backbone, in eval mode.
        search: the options of the search.
        precision: of the backbone.
        compiled: compile the backbone with torch.compile, once per model.
        backend: what runs the backbone.
        search_device: where to search.
    """

    def __init__(
        self,
        model: TorchPredictor,
        search: SearchConfig,
        precision: Precision = "fp32",
        compiled: bool = False,
        backend: Backend = "auto",
        search_device: SearchDevice = "auto",
    ) -> None:
        assert model.backbone is not None
        self.labels = model.labels
        self.calibration: Calibration = model.calibration
        self.preprocessing = model.backbone.preprocessing
        self._model = model
        self._search = search
        self._search_device = search_device
        self._runner = BackboneRunner(
            model.backbone, model.device, backend=backend, precision=precision, compiled=compiled
        )

    @property
    def torch_threads(self) -> int:
        """Those of this thread on a CPU; on a GPU batches follow each other."""
        return torch.get_num_threads() if self._model.device.type == "cpu" else 0

    def prepare(self, count: int | None) -> None:
        """Choose the backbone's engine; see `ImageModel.prepare`."""
        self._runner.prepare(count)

    @torch.no_grad()
    def begin(self, images: list[Tensor], evidence: Tensor | None) -> Callable[[], Inference]:
        """Run the backbone, which a GPU does while the caller goes on."""
        features = self.features(images)
        return lambda: self._model.infer(features, self._search, evidence, self._search_device)

    def features(self, images: list[Tensor]) -> Tensor:
        """Return the backbone's features [n, F] of images, as `ImageModel.begin` takes them."""
        return self._runner(images)
