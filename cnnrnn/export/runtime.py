"""`OnnxPredictor`: an exported model in ONNX Runtime, with the inputs and results of `predict`."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from cnnrnn.config import Activation, Cell, SearchConfig
from cnnrnn.data.files import reason, short
from cnnrnn.data.images import normalize
from cnnrnn.export.graph import INPUT_NAMES, LABEL_SCORES, OUTPUT_NAMES, Input
from cnnrnn.export.onnx import FORMAT
from cnnrnn.export.session import (
    ANY,
    COMPILED,
    PROVIDERS,
    OnnxModelError,
    Port,
    Search,
    open_session,
    require_ports,
)
from cnnrnn.labels import LabelSpace, check_evidence
from cnnrnn.machine.devices import use_one_thread_if_forked
from cnnrnn.model.checkpoint import (
    Form,
    forms,
    parse_json,
    read_calibration,
    read_labels,
    read_preprocessing,
    read_search,
    require_finite,
    require_forms,
    require_one_per_label,
    typed,
)
from cnnrnn.network.backbones import without_values
from cnnrnn.network.head import Head, ImageEmbedding, chain_logits
from cnnrnn.prediction.known import Known, Names, names_with
from cnnrnn.prediction.pipeline import ImageModel
from cnnrnn.prediction.predictor import Predictor, Running
from cnnrnn.search import NonFiniteError, SearchResult
from cnnrnn.search.inference import SEARCH_BATCH, Inference, of_all, search_given

NO_MASK = 'forbidden labels need the search in the file: search="onnx" (--search onnx)'
EVIDENCE_FORMAT = 4
"""From this one on, the search in a file takes evidence, and no mask."""
DRAFT_FORMAT = 5
"""From this one on, the preprocessing says whether JPEG files are decoded at a smaller size."""
ROWS_AT_ONCE = 16 * SEARCH_BATCH
"""Rows of label scores of a run, live paths times banks: the largest beam's in one bank."""


class OnnxPredictor(Predictor):
    """An exported model.

    Args:
        path: a file written by `cnnrnn.export_onnx`.
        providers: what runs it, most wanted first: `cpu`, `cuda`, `tensorrt` or ONNX Runtime's own
            names, each also as (name, options).
        search: `onnx` runs the whole graph in ONNX Runtime; `native` runs it up to the image's
            embedding, and the search in this package's engine.
        fallback: accept another provider than the first one, with a warning.
        threads: of one operator, on the CPU; ONNX Runtime's choice (a thread per core) by default.

    Attributes:
        calibration: thresholds, k and mixing weight that validation data chose.
        preprocessing: of pictures; None for a file that takes feature vectors.
        search_config: the options of the search.
        max_labels: T, the longest path.
        max_known: labels of an image that may be known to be present, where the search runs in ONNX
            Runtime; 0 for a file of a release before that.
        input_kind: `uint8`, `float` or `features`.
        content_hash: SHA-256 of weights and metadata; the same for two exports alike of one model.
        search: where the search runs.

    Raises:
        OnnxModelError: the file is no such model.
        ProviderError: the provider is not there or cannot start, and `fallback` is off.
        ModuleNotFoundError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str | tuple[str, dict[str, Any]]] = ("cpu",),
        search: Search = "onnx",
        fallback: bool = False,
        threads: int | None = None,
    ) -> None:
        if search not in get_args(Search):
            raise ValueError(f"search must be onnx or native, got {search!r}")
        if isinstance(providers, str) or not providers:
            raise ValueError(f"providers must be a list of names, got {providers!r}")
        self.path = Path(path)
        self.search: Search = search
        self._process = os.getpid()
        self._session = open_session(self.path, providers, search, fallback, threads)
        self._output_names = [output.name for output in self._session.get_outputs()]
        try:
            self._read_metadata(self._session.get_modelmeta().custom_metadata_map)
            self._require_graph()
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, OnnxModelError):
                raise
            raise OnnxModelError(
                f"{self.path} must be written by cnnrnn.export_onnx, its metadata is missing or "
                f"invalid: {reason(error)}"
            ) from error

    def _read_metadata(self, texts: dict[str, str]) -> None:
        values: dict[str, Any] = {
            name: text if name in ("content_hash", "head") else parse_json(text)
            for name, text in texts.items()
        }
        form = values["cnnrnn_format"]
        if type(form) is not int or not 1 <= form <= FORMAT:
            raise OnnxModelError(
                f"{self.path} has format {short(form)}, this release reads 1 to {FORMAT}; upgrade "
                "cnnrnn"
            )
        self._format: int = form
        source_index = tuple(typed("source_index", values["source_index"], list[int]))
        self._labels = LabelSpace(read_labels(values["labels"]), source_index).names
        self.calibration = read_calibration(values["calibration"], form)
        require_one_per_label(self.calibration, len(self._labels))
        self.search_config = read_search(values["search"], form)
        if self.search_config.algorithm != "beam":
            raise ValueError(f"search.algorithm must be beam, got {self.search_config.algorithm}")
        self.max_labels: int = typed("search.max_labels", self.search_config.max_labels, int)
        self.max_known: int = 0
        if form >= EVIDENCE_FORMAT:
            self.max_known = typed("max_known", values["max_known"], int)
            if self.max_known < 0:
                raise ValueError(f"max_known must be at least 0, got {self.max_known}")
        self.input_kind: Input = typed("input", values["input"], Input)
        self.content_hash: str = values["content_hash"]
        self.preprocessing = None
        if self.input_kind != "features":
            self.preprocessing = read_preprocessing(
                values["preprocessing"], drafts=form >= DRAFT_FORMAT
            )
        self._head = _search_head(values, len(self._labels)) if self.search != "onnx" else None

    def _require_graph(self) -> None:
        """Raise a ValueError where the graph does not take and give what the metadata says."""
        N, T, L = self.search_config.beam_size, self.max_labels, len(self.labels)
        side = None if self.preprocessing is None else self.preprocessing.image_size
        image = {
            "uint8": Port("uint8", (None, side, side, 3)),
            "float": Port("float", (None, 3, side, side)),
            "features": Port("float", (None, ANY)),
        }[self.input_kind]
        inputs = {INPUT_NAMES[self.input_kind]: image}
        outputs = {"joint": Port("float", (None, ANY))}
        if self.search == "onnx":
            of_labels = Port("float", (None, L))
            inputs["min_labels"] = Port("int64", ())
            outputs |= {
                "labels": Port("int64", (None, N, T)),
                "lengths": Port("int64", (None, N)),
                "log_probs": Port("float", (None, N)),
                "marginals": of_labels,
                "scores": of_labels,
            }
            if self._takes_evidence:
                inputs["evidence"] = Port("int8", (None, L))
                outputs["log_evidence"] = Port("float", (None,))
            else:
                inputs["forbidden"] = Port("bool", (None, L))
        elif self._head is not None:
            outputs["joint"] = Port("float", (None, self._head.joint_dim))
        optional = {LABEL_SCORES: Port("float", (None, L))}
        session = self._session
        require_ports([*session.get_inputs(), *session.get_overridable_initializers()], inputs, {})
        require_ports(session.get_outputs(), outputs, optional)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in path order, [L]."""
        return self._labels

    @property
    def providers(self) -> list[str]:
        """The execution providers that really run, most used first."""
        return list(self._session.get_providers())

    def image_model(self, running: Running) -> ImageModel:
        """Return what runs images as the options say; see `Predictor.image_model`."""
        if self.preprocessing is None:
            raise ValueError(
                f"{self.path} takes feature vectors, no images; use predict_features(features)"
            )
        search, forbidden = self._searched_by(running)
        return _OnnxModel(self, search, forbidden)

    def longest_path_of(self, running: Running) -> int:
        """Return how many labels a path can hold: T of the file."""
        return self.max_labels

    def known_labels(self, running: Running, known: Names, absent: Names) -> Known:
        """Return what is known of images, at most what the file takes; see `predict`."""
        if running.forbidden_labels:
            warnings.warn(self._deprecated("forbidden_labels"), FutureWarning, stacklevel=3)
            if self._takes_evidence:
                absent = names_with(absent, running.forbidden_labels)
        if self._most_known == self.max_labels:
            return Known(self.labels, self.max_labels, known, absent)
        limit = (
            f"max_known of {self.path}",
            f"export again with a larger one, or open the file with {COMPILED}",
        )
        return Known(self.labels, self.max_known, known, absent, limit)

    @property
    def _takes_evidence(self) -> bool:
        return self._format >= EVIDENCE_FORMAT

    @property
    def _most_known(self) -> int:
        """Labels of an image that may be known to be present, as the file was opened."""
        if self.search != "onnx" or not self._takes_evidence:
            return self.max_labels
        return min(self.max_known, self.max_labels)

    def _deprecated(self, option: str) -> str:
        if self._takes_evidence:
            return f"{option} is deprecated and acts as absent: pass the labels as absent"
        return (
            f"{option} is deprecated: it is for files of format 1 to {EVIDENCE_FORMAT - 1} such as "
            f"{self.path}; files exported by this release take absent labels"
        )

    def infer_features(
        self, features: Tensor, running: Running, evidence: Tensor | None
    ) -> Inference:
        """Search feature vectors as the options say; see `Predictor.infer_features`."""
        if self.input_kind != "features":
            raise ValueError(
                f"{self.path} takes images, no feature vectors; export with input_kind features"
            )
        return self.infer(features, *self._searched_by(running), evidence)

    def infer(
        self,
        inputs: Tensor,
        search: SearchConfig | None = None,
        forbidden: Tensor | None = None,
        evidence: Tensor | None = None,
    ) -> Inference:
        """Run the model on its own kind of input.

        Args:
            inputs: uint8 [B, S, S, 3], normalised float [B, 3, S, S] or features [B, F]; on a GPU
                without a copy, where a GPU's provider runs.
            search: another `min_labels`, and for the compiled search any other options.
            forbidden: [1 or B, L] bool, deprecated: absent labels; in a file of an earlier release,
                labels that no path may have.
            evidence: what is known of labels, [1 or B, L] int8, see `beam_search`; a search in ONNX
                Runtime takes up to `max_known` present ones of an image.

        Returns:
            Sets and scores on the CPU.

        Raises:
            ValueError: for inputs and options that do not fit the file.
            NonFiniteError: for inputs that give values that are not finite.
        """
        use_one_thread_if_forked()
        search = search or self.search_config
        inputs = self._checked(inputs)
        forbidden, evidence = self._checked_known(forbidden, evidence, len(inputs))
        if self.search != "onnx":
            if forbidden is not None:
                raise ValueError(NO_MASK)
        elif replace(search, min_labels=self.search_config.min_labels) != self.search_config:
            raise ValueError(
                f"search must be that of {self.path} but for min_labels, {self.search_config}, got "
                f"{search}; export again, or open the file with {COMPILED}"
            )
        starts = range(0, max(1, len(inputs)), SEARCH_BATCH)
        runs = [
            self._searched(
                inputs[start : start + SEARCH_BATCH],
                search,
                _rows(forbidden, start, SEARCH_BATCH),
                _rows(evidence, start, SEARCH_BATCH),
            )
            for start in starts
        ]
        results = [result for result, _ in runs]
        label_scores = [scores.cpu() for _, scores in runs if scores is not None]
        marked = torch.cat([result.log_probs[:, 0].isnan() for result in results])
        if marked.any():
            raise NonFiniteError(marked.nonzero()[:, 0].tolist(), len(inputs))
        sets = torch.cat([result.best_sets() for result in results])
        return Inference(
            sets=sets,
            marginals=torch.cat([result.marginals() for result in results]),
            label_scores=torch.cat(label_scores) if label_scores else None,
            search=tuple(results),
            evidence=of_all(evidence, sets),
        )

    def run(
        self,
        inputs: Tensor,
        *,
        min_labels: int | None = None,
        forbidden: Tensor | None = None,
        evidence: Tensor | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Run the graph and return its outputs by name, on the device of `inputs`.

        Args:
            inputs: as in `infer`.
            min_labels: END is forbidden on shorter paths; the file's own by default.
            forbidden: as in `infer`.
            evidence: as in `infer`.
            outputs: names; all by default. A file opened for the compiled search gives `joint` and
                `label_scores` alone, and takes none of the other options.

        Raises:
            TypeError: `inputs` is no tensor.
            ValueError: an argument does not fit the file.
            RuntimeError: in a process that was forked after the file was opened.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.path} was opened before this process was forked, and ONNX Runtime's "
                "threads are not in a forked process: open the OnnxPredictor in the child"
            )
        names = list(outputs or self._output_names)
        unknown = [name for name in names if name not in self._output_names]
        if unknown:
            raise ValueError(
                f"outputs must be among {', '.join(self._output_names)}, got {unknown[0]!r}"
            )
        options = (min_labels, forbidden, evidence)
        if self.search != "onnx" and any(option is not None for option in options):
            raise ValueError(
                "min_labels, forbidden and evidence need the search in the file: search='onnx'"
            )
        if min_labels is not None and not 0 <= min_labels <= self.max_labels:
            raise ValueError(f"min_labels must be in 0..{self.max_labels}, got {min_labels}")
        inputs = self._checked(inputs)
        forbidden, evidence = self._checked_known(forbidden, evidence, len(inputs))
        on_gpu = inputs.is_cuda and self.providers[0] != PROVIDERS["cpu"]
        device = inputs.device if on_gpu else torch.device("cpu")
        given = {INPUT_NAMES[self.input_kind]: inputs}
        if min_labels is not None:
            given["min_labels"] = torch.tensor(min_labels)
        if forbidden is not None:
            given["forbidden"] = forbidden
        if evidence is not None:
            given["evidence"] = evidence
        for value in self._session.get_inputs():  # a file whose defaults were taken off
            if value.name not in given:
                given[value.name] = self._default(value.name)
        given = {name: tensor.to(device).contiguous() for name, tensor in given.items()}
        found = {name: self._empty(name, len(inputs), device) for name in names}
        if len(inputs):
            binding = self._session.io_binding()
            for name, tensor in given.items():
                binding.bind_input(name, *_place(tensor))
            for name, tensor in found.items():
                binding.bind_output(name, *_place(tensor))
            if on_gpu:
                torch.cuda.current_stream(device).synchronize()
            self._session.run_with_iobinding(binding)
        return {name: tensor.to(inputs.device) for name, tensor in found.items()}

    def _checked(self, inputs: Tensor) -> Tensor:
        """Return inputs as the file takes them, of the width that it declares."""
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}")
        declared = self._session.get_inputs()[0]
        of_bytes = self.input_kind == "uint8"
        fits = inputs.dtype == torch.uint8 if of_bytes else inputs.is_floating_point()
        sizes = list(inputs.shape)
        if (
            not fits
            or len(sizes) != len(declared.shape)
            or any(
                isinstance(side, int) and side != size
                for side, size in zip(declared.shape, sizes, strict=True)
            )
        ):
            shape = ", ".join(map(str, declared.shape))
            raise ValueError(
                f"{declared.name} must be {'uint8' if of_bytes else 'float'} [{shape}], got "
                f"{inputs.dtype} {sizes}"
            )
        return inputs if of_bytes else inputs.float()

    def _checked_known(
        self, forbidden: Tensor | None, evidence: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the mask, of an older file alone, and evidence, as the file takes them."""
        L = len(self.labels)
        if forbidden is not None:
            sizes = list(forbidden.shape)
            if forbidden.dtype != torch.bool or sizes not in ([1, L], [batch, L]):
                raise ValueError(
                    f"forbidden must be bool [1 or {batch}, {L}], got {forbidden.dtype} {sizes}"
                )
        if evidence is not None:
            if self.search == "onnx" and not self._takes_evidence:
                raise ValueError(
                    f"known and absent labels need a file of format {EVIDENCE_FORMAT}, got "
                    f"{self._format} in {self.path}: export again, or open it with {COMPILED}"
                )
            most = self._most_known
            limit = "max_labels" if most == self.max_labels else f"max_known of {self.path}"
            check_evidence(evidence, batch, L, most, limit)
        if forbidden is None or not self._takes_evidence:
            return forbidden, evidence
        warnings.warn(self._deprecated("forbidden"), FutureWarning, stacklevel=3)
        if evidence is None:
            return None, -forbidden.to(torch.int8)
        both = (forbidden & (evidence == 1)).nonzero()
        if len(both):
            image, label = both[0].tolist()
            name = self.labels[label]
            raise ValueError(
                f"{name!r} is both known to be present and forbidden for image {image}"
            )
        return None, torch.where(forbidden, -1, evidence).to(torch.int8)

    def _default(self, name: str) -> Tensor:
        """Return an optional input that changes nothing."""
        if name == "min_labels":
            return torch.tensor(self.search_config.min_labels)
        dtype = torch.bool if name == "forbidden" else torch.int8
        return torch.zeros(1, len(self.labels), dtype=dtype)

    def _empty(self, name: str, batch: int, device: torch.device) -> Tensor:
        N, T, L = self.search_config.beam_size, self.max_labels, len(self.labels)
        shapes = dict(zip(OUTPUT_NAMES, ((N, T), (N,), (N,), (L,), (), (L,)), strict=False))
        shapes |= {"joint": (self._joint_dim(),), LABEL_SCORES: (L,)}
        dtype = torch.int64 if name in ("labels", "lengths") else torch.float32
        return torch.empty(batch, *shapes[name], dtype=dtype, device=device)

    def _joint_dim(self) -> int:
        joint = next(output for output in self._session.get_outputs() if output.name == "joint")
        return int(joint.shape[1])

    def _searched(
        self,
        inputs: Tensor,
        search: SearchConfig,
        forbidden: Tensor | None,
        evidence: Tensor | None,
    ) -> tuple[SearchResult, Tensor | None]:
        """Return the result, on the CPU, and the chain term's own scores or None."""
        if self._head is not None:
            found = self.run(inputs)
            label_scores = found.get(LABEL_SCORES)
            logits = None if label_scores is None else chain_logits(label_scores)
            embedding = ImageEmbedding(found["joint"], logits)
            result = search_given(self._head, embedding, search, evidence, on_nonfinite="mark")
            if label_scores is not None and evidence is not None:
                label_scores = self._head.told(label_scores.cpu(), evidence)
            return result.cpu(), label_scores
        names = [name for name in self._output_names if name not in ("scores", "joint")]
        present = [0] if evidence is None else (evidence == 1).sum(1).tolist()
        rows = (1 + max(present, default=0)) ** 2 * search.places(marginals=True)
        at_once = max(1, ROWS_AT_ONCE // rows)
        parts = [
            self.run(
                inputs[start : start + at_once],
                min_labels=search.min_labels,
                forbidden=_rows(forbidden, start, at_once),
                evidence=_rows(evidence, start, at_once),
                outputs=names,
            )
            for start in range(0, max(1, len(inputs)), at_once)
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in names}
        log_evidence = found.get("log_evidence")
        result = SearchResult(
            labels=found["labels"].cpu(),
            lengths=found["lengths"].cpu(),
            log_probs=found["log_probs"].cpu(),
            num_labels=len(self.labels),
            requested_marginals=found["marginals"].cpu(),
            log_evidence=None if log_evidence is None else log_evidence.cpu(),
        )
        return result, found.get(LABEL_SCORES)

    def _searched_by(self, running: Running) -> tuple[SearchConfig, Tensor | None]:
        """Return the options of the search and the labels that are forbidden [1, L]."""
        of_torch = replace(running, beam_size=None, min_labels=None, forbidden_labels=())
        if of_torch != Running():
            raise ValueError(
                f"device, precision, compiled, backend and search_device are not for {self.path}, "
                "which ONNX Runtime runs: choose providers when it is opened, precision when it is "
                "exported"
            )
        search, beam_size = self.search_config, running.beam_size
        if beam_size is not None and beam_size != search.beam_size:
            if self.search == "onnx":
                raise ValueError(
                    f"beam_size is {search.beam_size} in {self.path}, got {beam_size}; export "
                    f"again, or open the file with {COMPILED}"
                )
            search = replace(search, beam_size=beam_size)
        if running.min_labels is not None:
            search = replace(search, min_labels=running.min_labels)
        return search, self._forbidden(running.forbidden_labels)

    def _forbidden(self, names: Sequence[str]) -> Tensor | None:
        """Return the mask of an older file; in others they are absent, see `known_labels`."""
        if not names or self._takes_evidence:
            return None
        if self.search != "onnx":
            raise ValueError(NO_MASK)
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"forbidden_labels must be labels of {self.path}, got {unknown[0]!r}")
        return torch.tensor([[name in names for name in self.labels]])


class _OnnxModel:
    """What `predict_images` needs of an exported model."""

    def __init__(
        self, predictor: OnnxPredictor, search: SearchConfig, forbidden: Tensor | None
    ) -> None:
        assert predictor.preprocessing is not None
        self.labels = predictor.labels
        self.calibration = predictor.calibration
        self.preprocessing = predictor.preprocessing
        self.torch_threads = 0  # ONNX Runtime has threads of its own
        self._predictor = predictor
        self._search = search
        self._forbidden = forbidden

    def prepare(self, count: int | None) -> None:
        """Nothing to choose: ONNX Runtime runs the whole file."""

    def begin(self, images: list[Tensor], evidence: Tensor | None) -> Callable[[], Inference]:
        """Put images together; ONNX Runtime runs when the search is due."""
        if self._predictor.input_kind == "uint8":
            if any(image.dtype != torch.uint8 for image in images):
                raise ValueError(
                    f"{self._predictor.path} takes uint8 pictures, got a float tensor; export with "
                    "input_kind float"
                )
            batch = torch.stack([image.permute(1, 2, 0) for image in images])
        else:
            batch = torch.cat([normalize(image[None], self.preprocessing) for image in images])
        return lambda: self._predictor.infer(batch, self._search, self._forbidden, evidence)


def _rows(of_images: Tensor | None, start: int, count: int) -> Tensor | None:
    """Return what belongs to some images, of [1 or B, L]."""
    if of_images is None or len(of_images) == 1:
        return of_images
    return of_images[start : start + count]


def _place(tensor: Tensor) -> tuple[str, int, Any, list[int], int]:
    """Return what ONNX Runtime binds of a tensor: device, its number, type, shape and address."""
    types = {torch.uint8: np.uint8, torch.int8: np.int8, torch.bool: np.bool_,
             torch.int64: np.int64, torch.float32: np.float32}  # fmt: skip
    return (
        tensor.device.type, tensor.device.index or 0, types[tensor.dtype], list(tensor.shape),
        tensor.data_ptr(),
    )  # fmt: skip


_OF_IMAGES = ("image_projection.", "trunk.")
"""What a head that only searches has no use for."""


def _search_head(values: dict[str, Any], num_labels: int) -> Head:
    """Return a head that searches, from the file's metadata; it embeds no images."""
    from safetensors.torch import load

    weights = load(base64.b64decode(values["head"]))
    cell = typed("cell", values["cell"], Cell)
    activation = typed("activation", values["activation"], Activation)

    def new() -> Head:
        _, joint_dim = weights["label_embedding"].shape
        _, hidden_dim = weights["output_projection.weight"].shape
        return Head(
            num_labels, 1, joint_dim, hidden_dim, cell, activation,
            tied_embedding="input_embedding" not in weights, score_bias="score_bias" in weights,
        )  # fmt: skip

    with without_values():
        expected = forms(new().float().state_dict())
    searched = {name: form for name, form in expected.items() if not name.startswith(_OF_IMAGES)}
    counts = {"cooccurrence": Form("F32", (num_labels, num_labels))}
    require_forms(forms(weights), searched, counts)
    require_finite(weights)
    head = new()
    head.load_state_dict(weights, strict=False)
    head.max_labels = values["search"]["max_labels"]
    return head.eval()
