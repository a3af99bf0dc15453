"""What runs a backbone: torch, and on a CPU also ONNX Runtime or OpenVINO.

For those a backbone is exported to an ONNX file, from decoded images to features, once: it is kept
in the user's cache under the digest of the weights. `auto` exports where the images of one call
would keep torch busy for long, times the engines that are installed, and takes the fastest. The
search is the same behind all of them.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import mmap
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cnnrnn.config import Backend, Precision
from cnnrnn.data.images import normalize
from cnnrnn.machine.cache import Cache
from cnnrnn.machine.devices import has_bf16, use_one_thread_if_forked
from cnnrnn.machine.files import weights_digest
from cnnrnn.network.backbones import Backbone
from cnnrnn.network.onnx_files import (
    ExportError,
    can_export,
    external_data,
    require_onnx,
    to_onnx,
    write_onnx,
)

_log = logging.getLogger(__name__)

CACHE_KIND = "backbones"
FORMAT = 1
"""Of an exported backbone; a file of another is not found again."""
EXPORT_REPAYS_SECONDS = 20.0
"""`auto` exports for a call whose images keep torch busy for this long: twice what it takes."""
OPENING_REPAYS_SECONDS = 2.0
"""Likewise, where the exported file is in the cache."""
FEWEST_IMAGES = 64
"""Smaller calls stay with what there is in the process."""
TIMED_IMAGES = 8
IMAGES_A_PASS = {"torch": 2, "onnx": 8}
"""Images for each thread that go through a backbone at once on a CPU.

Larger activations are memory that the system takes back after every layer and gives anew page by
page: half of the time of an EfficientNet with 64 images in torch.
"""
EXACT_TO, BF16_TO = 1e-3, 0.25
"""Largest difference from torch's features that an engine may have, of their largest value."""

_FILE = "backbone.onnx"
_TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
_MODULES = {"onnx": "onnxruntime", "openvino": "openvino"}


class EngineError(ValueError):
    """A backbone cannot run in an engine."""


class Engine(Protocol):
    """What runs an exported backbone.

    Attributes:
        name: as `backend` names it.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, F] float32 of images [B, 3, S, S] uint8, on the CPU.

        It computes on as many threads as torch would in this thread.
        """


class _OnnxRuntime:
    """An exported backbone in ONNX Runtime: a session for each number of threads."""

    name = "onnx"

    def __init__(self, file: Path, threads: int, bf16: bool) -> None:
        assert not bf16
        self._file = file
        self._content: mmap.mmap | None = None
        if not external_data(file).exists():  # which only a path leads to
            with file.open("rb") as handle:  # stays readable when the cache evicts the file
                self._content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._sessions: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._session(threads)

    def __call__(self, images: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        session = self._session(threads)
        parts = [
            torch.from_numpy(session.run(None, {"images": part.numpy()})[0])
            for part in images.split(IMAGES_A_PASS["onnx"] * threads)
        ]
        return torch.cat(parts)

    def _session(self, threads: int) -> Any:
        with self._lock:
            if threads not in self._sessions:
                import onnxruntime

                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                options.log_severity_level = 3  # errors alone
                source = self._file if self._content is None else self._content[:]
                self._sessions[threads] = onnxruntime.InferenceSession(
                    source, options, providers=["CPUExecutionProvider"]
                )
            return self._sessions[threads]


class _OpenVino:
    """An exported backbone in OpenVINO, which computes each batch on threads of its own."""

    name = "openvino"

    def __init__(self, file: Path, threads: int, bf16: bool) -> None:
        import openvino

        self._core = openvino.Core()
        self._model = self._core.read_model(file)
        self._threads = threads
        self._precision = "bf16" if bf16 else "f32"
        self._compiled: dict[int, Any] = {}
        self._requests = threading.local()
        self._lock = threading.Lock()
        self._compiled_for(threads)

    def __call__(self, images: Tensor) -> Tensor:
        share = min(torch.get_num_threads(), self._threads)
        requests: dict[int, Any] = self._requests.__dict__.setdefault("by_share", {})
        if share not in requests:
            requests[share] = self._compiled_for(share).create_infer_request()
        requests[share].infer([images.numpy()], share_inputs=True)
        return torch.from_numpy(requests[share].get_output_tensor(0).data.copy())

    def _compiled_for(self, share: int) -> Any:
        """Return the model compiled for as many batches at once as have `share` threads each."""
        with self._lock:
            if share not in self._compiled:
                streams = max(1, self._threads // share)
                self._compiled[share] = self._core.compile_model(
                    self._model,
                    "CPU",
                    {
                        "INFERENCE_PRECISION_HINT": self._precision,
                        "NUM_STREAMS": streams,
                        "INFERENCE_NUM_THREADS": streams * share,
                        "ENABLE_CPU_PINNING": False,
                    },
                )
            return self._compiled[share]


_ENGINES: dict[str, Callable[[Path, int, bool], Engine]] = {
    "onnx": _OnnxRuntime,
    "openvino": _OpenVino,
}


class _Pixels(nn.Module):
    """A backbone from decoded images: what is exported."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = backbone.network
        mean, std = (torch.tensor(v) for v in (backbone.preprocessing.mean,
                                               backbone.preprocessing.std))  # fmt: skip
        self.register_buffer("scale", (1 / (std * 255)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)

    scale: Tensor
    shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(torch.addcmul(self.shift, images.float(), self.scale))
        return features


class _Gate:
    """Lets forward passes run beside each other, and an export alone.

    While torch traces a module it changes what other threads see of it. Passes wait for an export
    that waits, which would else never have its turn.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting)
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._running)
                yield  # whoever comes now waits for the lock
            finally:
                self._waiting -= 1
                self._condition.notify_all()


_gate = _Gate()


@dataclass
class _Known:
    """What this process knows of a backbone.

    Attributes:
        identity: of what it computes, see `_identity`.
        key: of its entry in the cache, once that was asked for.
        torch_seconds: what torch takes for an image, once it was timed.
        engines: those that are open, by name and whether in bf16.
        chosen: what `auto` takes, by precision.
        folder: holds the exported file, where the cache could not be written.
    """

    identity: tuple[Any, ...]
    key: str | None = None
    torch_seconds: float | None = None
    engines: dict[tuple[str, bool], Engine] = field(default_factory=dict)
    chosen: dict[Precision, str] = field(default_factory=dict)
    folder: Path | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


_all_known: WeakKeyDictionary[Backbone, _Known] = WeakKeyDictionary()
_lock = threading.Lock()


def _leave_to_the_parent() -> None:
    """Begin anew in a forked process, which has none of the threads that engines wait for.

    To destroy an engine would be to wait for its threads: another reference keeps it for ever.
    """
    global _gate, _lock
    _gate, _lock = _Gate(), threading.Lock()
    for known in list(_all_known.values()):
        for engine in known.engines.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    _all_known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _known(backbone: Backbone) -> _Known:
    """Return what is known of a backbone as it is now."""
    identity = _identity(backbone)
    with _lock:
        known = _all_known.get(backbone)
        if known is None or known.identity != identity:
            known = _all_known[backbone] = _Known(identity)
        return known


def _identity(backbone: Backbone) -> tuple[Any, ...]:
    """Return what differs once a backbone computes something else.

    What was written through `.data` is not seen before the next `train()`, as with packed heads.
    """
    tensors = list(chain(backbone.parameters(), backbone.buffers()))
    weights: Any
    if any(tensor.is_inference() for tensor in tensors):  # those count no versions
        weights = weights_digest(backbone.state_dict().items())
    else:
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    modules = tuple((id(module), type(module)) for module in backbone.modules())
    return weights, modules, backbone.preprocessing, backbone.trainings


class BackboneRunner:
    """Runs a backbone on images, by the engine that a `backend` names or `auto` finds.

    Args:
        backbone: on `device`, in eval mode.
        device: where features are made.
        backend: `torch`, `onnx`, `openvino` or `auto`.
        precision: `fp32`, `bf16`, or `auto`, which is bf16 where the hardware has it; ONNX Runtime
            multiplies in fp32 alone.
        compiled: run torch's through torch.compile.

    Raises:
        ValueError: the options do not fit together.
        ModuleNotFoundError: an engine asked for by name is not installed.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        *,
        backend: Backend = "auto",
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be fp32, bf16 or auto, got {precision!r}")
        if backend not in get_args(Backend):
            raise ValueError(
                f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}"
            )
        self._backbone = backbone
        self._device = device
        self._precision: Precision = precision
        self._half = precision == "bf16" or (precision == "auto" and has_bf16(device))
        self._backend = backend
        if backend in _ENGINES:
            self._require(backend, compiled)
        elif compiled or device.type != "cpu":
            self._backend = "torch"
        self._forward = _compiled(backbone) if compiled else backbone
        self._count: int | None = 0
        self._done = 0
        self._spent = 0.0
        self._threads = torch.get_num_threads()
        self._engine: Engine | None = None

    @property
    def engine(self) -> str:
        """What runs decoded images now: `torch`, `onnx` or `openvino`."""
        if self._engine is None:
            return "torch"
        return self._engine.name

    def prepare(self, count: int | None) -> None:
        """Choose the engine, in the thread that asks for features.

        Args:
            count: images to come; None for an unknown number, which `auto` exports for once torch
                has been busy with them for long. Where it is not known how long torch takes, the
                first batch tells.

        Raises:
            EngineError: the backbone cannot run in the engine that was asked for.
        """
        use_one_thread_if_forked()
        self._threads = torch.get_num_threads()
        self._count, self._done, self._spent = count, 0, 0.0
        if self._backend in _ENGINES:
            self._engine = self._opened(self._backend)
        elif self._backend == "auto":
            self._consider()

    def __call__(self, images: list[Tensor]) -> Tensor:
        """Return features [n, F] float32 of images, each uint8 or float in 0..1 of [3, S, S].

        Float images go through torch, whatever the engine. On a GPU the features stay there.
        """
        engine = self._engine
        if engine is not None and all(i.dtype == torch.uint8 and not i.is_cuda for i in images):
            return engine(torch.stack(images))
        began = time.perf_counter()
        features = self._torch(images)
        if self._backend == "auto" and not self._is_small:
            self._spent += (time.perf_counter() - began) * torch.get_num_threads() / self._threads
            self._done += len(images)
            self._consider()
        return features

    @property
    def _is_small(self) -> bool:
        return self._count is not None and self._count < FEWEST_IMAGES

    @torch.no_grad()
    def _torch(self, images: list[Tensor]) -> Tensor:
        step = len(images)
        if self._device.type == "cpu" and self._forward is self._backbone:
            step = IMAGES_A_PASS["torch"] * torch.get_num_threads()
        half = torch.autocast(self._device.type, torch.bfloat16, enabled=self._half)
        with _gate.shared(), half:
            return torch.cat(
                [
                    self._forward(self._normalized(images[start : start + step])).float()
                    for start in range(0, len(images), step)
                ]
            )

    def _normalized(self, images: list[Tensor]) -> Tensor:
        """Return images of any types and devices as one batch for the backbone."""
        alike = len({(image.dtype, image.device) for image in images}) == 1
        parts = [torch.stack(images)] if alike else [image[None] for image in images]
        preprocessing = self._backbone.preprocessing
        return torch.cat([normalize(part.to(self._device), preprocessing) for part in parts])

    def _require(self, engine: str, compiled: bool) -> None:
        """Fail where an engine asked for by name cannot be had."""
        if self._device.type != "cpu":
            raise ValueError(
                f"backend {engine} runs on a CPU, got device {self._device}: use backend torch "
                "there, or export_onnx with OnnxPredictor"
            )
        if compiled:
            raise ValueError(f"compiled is of torch, got backend {engine}")
        if engine == "onnx" and self._precision == "bf16":
            raise ValueError(
                "backend onnx multiplies in fp32, got precision bf16: use openvino or torch"
            )
        if not _is_installed(engine):
            extra = {"onnx": "onnx-cpu", "openvino": "openvino"}[engine]
            raise ModuleNotFoundError(
                f"backend {engine} needs {_MODULES[engine]}, which is not installed: run "
                f'`pip install "cnnrnn[{extra}]"`'
            )
        require_onnx()

    def _consider(self) -> None:
        """Take what `auto` finds fastest for the images that are left."""
        if self._is_small and self._backbone not in _all_known:
            return
        known = _known(self._backbone)
        if not known.lock.acquire(blocking=False):
            return  # another thread is at it
        try:
            if self._precision not in known.chosen and self._repays(known):
                known.chosen[self._precision] = self._fastest(known)
            chosen = known.chosen.get(self._precision, "torch")
            try:
                self._engine = None if chosen == "torch" else self._opened(chosen)
            except EngineError as error:
                _log.warning("%s; torch runs it", error)
                known.chosen[self._precision] = "torch"
                self._engine = None
        finally:
            known.lock.release()

    def _repays(self, known: _Known) -> bool:
        """Whether torch would be busy with the images of this call for long enough."""
        if self._is_small or not self._candidates():
            return False
        if self._done:
            known.torch_seconds = self._spent / self._done
        cache = Cache(CACHE_KIND)
        if known.torch_seconds is None and cache.use().entries:
            known.torch_seconds = self._seconds_found(cache, known).get("torch")
        if known.torch_seconds is None:
            return False
        left = 0 if self._count is None else self._count - self._done
        busy = self._spent if self._count is None else left * known.torch_seconds
        if busy < OPENING_REPAYS_SECONDS:
            return False
        return busy >= EXPORT_REPAYS_SECONDS or cache.has(self._key(known))

    def _seconds_found(self, cache: Cache, known: _Known) -> dict[str, float]:
        """Return what an image took in each engine, as it was found here before."""
        races = cache.known(self._key(known)).get("seconds per image", {})
        found: dict[str, float] = races.get(self._race(), {})
        return found

    def _race(self) -> str:
        return f"{self._precision}, {self._threads} threads, {_versions()}"

    def _timed(self, run: Callable[[], object]) -> float:
        """Return the seconds of an image, were all threads busy with such runs."""
        return _seconds(run) / TIMED_IMAGES * torch.get_num_threads() / self._threads

    def _candidates(self) -> list[str]:
        if not can_export():
            return []
        exact_too = self._precision != "bf16"
        return [e for e in _ENGINES if _is_installed(e) and (exact_too or e != "onnx")]

    def _fastest(self, known: _Known) -> str:
        """Time the engines, or read what was found when they were, and name the fastest."""
        cache = Cache(CACHE_KIND)
        found = self._seconds_found(cache, known)
        if not found:
            for engine in self._candidates():
                try:
                    opened = self._opened(engine)
                except EngineError as error:
                    _log.warning("%s", error)
                    continue
                images = torch.stack(self._examples())
                found[engine] = self._timed(partial(opened, images))
            if found:
                found["torch"] = self._timed(partial(self._torch, self._examples()))
                races = cache.known(self._key(known)).get("seconds per image", {})
                cache.note(self._key(known), {"seconds per image": races | {self._race(): found}})
        fastest = min(found, key=lambda name: found[name]) if found else "torch"
        _log.info("backend of %s: %s of %s", self._backbone.name, fastest, found)
        return fastest

    def _opened(self, engine: str) -> Engine:
        """Return an engine that runs the backbone as it is now.

        Raises:
            EngineError: the backbone cannot be exported, opened or trusted.
        """
        known = _known(self._backbone)
        bf16 = self._half and engine == "openvino"
        with known.lock:
            if (engine, bf16) not in known.engines:
                file = self._file(known, engine)
                try:
                    opened = _ENGINES[engine](file, self._threads, bf16)
                    self._check(opened, engine, bf16)
                except EngineError:
                    raise
                except Exception as error:  # the engines raise what they please
                    reason = " ".join(str(error).split())[:300]
                    raise EngineError(
                        f"backbone {self._backbone.name} does not run in {_TITLES[engine]}: "
                        f"{reason}"
                    ) from error
                known.engines[engine, bf16] = opened
            return known.engines[engine, bf16]

    def _check(self, engine: Engine, name: str, bf16: bool) -> None:
        """Compare an engine's features with torch's."""
        images = self._examples()
        expected = self._torch(images)
        difference = float((engine(torch.stack(images)) - expected).abs().max())
        size, bound = float(expected.abs().max()), BF16_TO if bf16 or self._half else EXACT_TO
        if not difference <= bound * size:
            raise EngineError(
                f"{_TITLES[name]} must give the features of torch for backbone "
                f"{self._backbone.name}, to {bound:g} of the largest, {size:.3g}; got a difference "
                f"of {difference:.3g}"
            )

    def _file(self, known: _Known, engine: str) -> Path:
        """Return the exported backbone, from the cache if it is there."""
        if known.folder is not None:
            return known.folder / _FILE
        cache, key = Cache(CACHE_KIND), self._key(known)
        entry = cache.find(key)
        if entry is not None:
            return entry / _FILE
        name = self._backbone.name
        _log.warning(
            "backbone %s is exported for %s: 10 to 20 s, once; the file is kept in %s",
            name, _TITLES[engine], cache.folder,
        )  # fmt: skip
        began = time.perf_counter()
        try:
            try:
                file = cache.keep(key, self._export) / _FILE
            except OSError as error:
                _log.warning("%s cannot be written: %s", cache.folder, error.strerror or error)
                folder = _folder_of_this_process()
                self._export(folder)
                known.folder = folder
                file = folder / _FILE
        except (OSError, ExportError) as error:
            raise EngineError(
                f"backbone {name} cannot be exported for {_TITLES[engine]}: {error}"
            ) from error
        _log.warning("exported in %.1f s", time.perf_counter() - began)
        return file

    def _export(self, folder: Path) -> dict[str, Any]:
        """Write the backbone into a folder, and return what is kept beside it.

        Raises:
            ExportError: torch cannot export it.
        """
        began = time.perf_counter()
        side = self._backbone.preprocessing.image_size
        with _gate.alone(), torch.inference_mode(False), torch.no_grad():
            backbone = self._backbone
            if any(p.is_inference() for p in backbone.parameters()):  # which no export takes
                backbone = copy.deepcopy(backbone)
            proto = to_onnx(
                _Pixels(backbone).eval(),
                (torch.zeros(2, 3, side, side, dtype=torch.uint8),),
                ({0: torch.export.Dim("batch")},),
                ["images"],
                ["features"],
            )
        write_onnx(proto, folder / _FILE)
        return {
            "backbone": self._backbone.name,
            "image_size": side,
            "torch": torch.__version__,
            "export seconds": time.perf_counter() - began,
        }

    def _key(self, known: _Known) -> str:
        if known.key is None:
            backbone = self._backbone
            form, architecture = backbone.preprocessing, backbone.architecture
            described = [
                FORMAT, torch.__version__, backbone.name, form.image_size, form.mean, form.std,
                None if architecture is None else architecture._asdict(),
                repr(backbone.network),
                weights_digest(backbone.state_dict().items()),
            ]  # fmt: skip
            text = json.dumps(described, sort_keys=True)
            known.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return known.key

    def _examples(self) -> list[Tensor]:
        side = self._backbone.preprocessing.image_size
        shape = (TIMED_IMAGES, 3, side, side)
        random = torch.Generator().manual_seed(0)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
        return list(images)


def _folder_of_this_process() -> Path:
    """Make a folder that is removed when this process ends, and by no process forked from it."""
    folder, process = Path(tempfile.mkdtemp(prefix="cnnrnn-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _is_installed(engine: str) -> bool:
    return importlib.util.find_spec(_MODULES[engine]) is not None


def _versions() -> str:
    """Name what the speed of engines depends on."""
    found = [f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"]
    found.append(f"torch {torch.__version__}")
    for module in _MODULES.values():
        spec = importlib.util.find_spec(module)
        if spec is not None:
            found.append(f"{module} {_version(module)}")
    return ", ".join(found)


def _version(module: str) -> str:
    for distribution in (module, f"{module}-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _seconds(run: Callable[[], object]) -> float:
    """Return the shorter of two runs after a first one."""
    run()
    found = []
    for _ in range(2):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def _run_backbone(backbone: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = backbone(images)
    return features


def _compiled(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a backbone compiled; torch finds what it has compiled by the function and the module.

    `torch.compile(backbone)` would be kept by whoever keeps it, and keep the backbone.
    """
    return partial(torch.compile(_run_backbone), backbone)
