"""`cnnrnn predict` and `cnnrnn suggest`: labels of images, and what to ask about them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from cnnrnn.cli.output import (
    opened,
    prediction_writer,
    question_writer,
    require_folder,
)
from cnnrnn.machine.words import listed

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from cnnrnn.data import BadImageError
    from cnnrnn.deployment.rows import RowFile
    from cnnrnn.export import OnnxPredictor
    from cnnrnn.machine.progress import Progress
    from cnnrnn.model.classifier import CNNRNN
    from cnnrnn.model.ensemble import Ensemble
    from cnnrnn.prediction.html import ContactSheet
    from cnnrnn.prediction.result import Prediction


def run_predict(options: Namespace) -> int:
    """Label images."""
    from cnnrnn.deployment.rows import FORMS, RowOptions, form_of
    from cnnrnn.machine.progress import no_progress, terminal_progress
    from cnnrnn.prediction.inputs import with_folders_listed

    _require_predict_files(options)
    row_options = RowOptions(options.scores, options.sets or 0, options.neighbours or 0)
    form = options.format
    if form is None:
        form = "table" if options.out is None else form_of(options.out, default="table")
    if form == "parquet" and not _is_kept(options.out):
        raise ValueError("Parquet needs --out FILE, a file of its own")
    if options.resume and not (form in FORMS and _is_kept(options.out)):
        raise ValueError(
            "--resume needs --out FILE in CSV, JSON lines or Parquet, such as labels.jsonl"
        )
    if form == "table" and (options.sets or options.scores == "all"):
        name = "sets" if options.sets else "scores"
        raise ValueError(f"--{name} needs --format csv, jsonl or parquet")
    found = with_folders_listed(options.images, options.on_bad_image)
    images = [str(image) if isinstance(image, Path) else image for image in found]
    del found  # of a million files half a gigabyte
    known = _known_labels(options, images)
    predict, model = _predicting(options)
    unknown = sorted(set(options.exclude) - set(model.labels))
    if unknown:
        raise ValueError(f"--exclude must name labels of the model, got {listed(unknown)}")
    failed: list[str] = []
    sidecar = _sidecar_writer(options, failed)
    if form in FORMS and _is_kept(options.out):
        rows = FORMS[form](row_options, model.labels)
        _label_files(options, images, known, rows, predict, model, sidecar)
    else:
        show = no_progress if options.out is None else terminal_progress
        bad = 0

        def writer(stream: IO[str]) -> Callable[[Prediction], None]:
            return prediction_writer(form, stream, row_options, model.labels)

        # Outside of what writes --out, whose errors name that file.
        writing = _written(predict(images, known), options.out, writer, show)
        with _contact_sheet(options) as sheet, closing(writing) as written:
            for prediction in written:
                bad += prediction.error is not None
                sidecar(prediction)
                if sheet is not None:
                    sheet.add(prediction)
        if bad:
            print(f"cnnrnn: warning: {bad} images could not be read", file=sys.stderr)
    if failed:
        print(
            f"cnnrnn: warning: {len(failed)} sidecars were left as they are, the first: "
            f"{failed[0]}",
            file=sys.stderr,
        )
    return 0


def _sidecar_writer(options: Namespace, failed: list[str]) -> Callable[[Prediction], None]:
    """Return what writes the labels of an image beside it; what fails is listed under `skip`."""
    from cnnrnn.deployment.sidecars import write_sidecar

    def write(prediction: Prediction) -> None:
        if options.sidecar is None or prediction.error is not None:
            return
        try:
            write_sidecar(
                prediction.source, prediction.labels, kind=options.sidecar,
                existing=options.existing, exclude=options.exclude,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            if options.on_bad_image == "error":
                raise
            failed.append(str(error))

    return write


def _is_kept(out: str | None) -> bool:
    """Whether results go to a file, and not to standard output, a pipe or a device."""
    return out is not None and (os.path.isfile(out) or not os.path.exists(out))


def _predicting(
    options: Namespace,
) -> tuple[Callable[[Any, Any], Iterator[Prediction]], CNNRNN | Ensemble | OnnxPredictor]:
    """Return what labels images given what is known of them, as the options say, and its model."""
    from cnnrnn.api import resolve_model
    from cnnrnn.inspection.neighbours import require_one_space

    how: dict[str, Any] = {
        name: options[name]
        for name in ("absent", "top_k", "beam_size", "min_labels", "decide", "threshold",
                     "batch_size", "workers", "on_bad_image", "max_pixels")
    }  # fmt: skip
    torch_only = {
        "precision": "fp32", "compiled": False, "backend": "auto", "search_device": "auto",
    }  # fmt: skip
    if options.neighbours is not None and options.neighbours < 1:
        raise ValueError(f"--neighbours must be at least 1, got {options.neighbours}")
    model: CNNRNN | Ensemble | OnnxPredictor
    if options.model is not None and options.model.lower().endswith(".onnx"):
        given = [name for name, value in torch_only.items() if options[name] != value]
        if given:
            raise ValueError(
                f"--{given[0]} does not apply to {options.model}, which ONNX Runtime runs; "
                "`cnnrnn export --precision float16` makes a file in half precision"
            )
        if options.neighbours is not None:
            raise ValueError(
                f"--neighbours needs a checkpoint folder, got the exported file {options.model}"
            )
        model = _onnx_predictor(options)
    elif options.search != "onnx":
        raise ValueError(f"--search is only for FILE.onnx, got {options.search}")
    else:
        model = resolve_model(options.model, options.device)
        how |= {name: options[name] for name in torch_only}
        if options.neighbours is not None:
            require_one_space(model)

    def predict(images: Any, known: Any) -> Iterator[Prediction]:
        return model.predict_iter(images, known=known, **how)

    return predict, model


def _label_files(
    options: Namespace,
    images: list[str | BadImageError],
    known: list[str] | list[list[str]],
    rows: RowFile,
    predict: Callable[[Any, Any], Iterator[Prediction]],
    model: CNNRNN | Ensemble | OnnxPredictor,
    sidecar: Callable[[Prediction], None],
) -> None:
    """Write a row for each image to --out, which a stopped run leaves to be resumed."""
    from cnnrnn.deployment.labelling import label_files
    from cnnrnn.machine.progress import terminal_progress

    of_each = options.known_from is not None

    def predict_some(some: Any, positions: Any) -> Iterator[Prediction]:
        return predict(some, [known[i] for i in positions] if of_each else known)

    def each(prediction: Prediction) -> None:
        sidecar(prediction)
        if sheet is not None:
            sheet.add(prediction)

    out = Path(options.out)
    identity = _labelling_identity(options, rows, model)
    with _contact_sheet(options) as sheet:
        summary = label_files(
            images, predict_some, out, rows, identity,
            resume=options.resume, progress=terminal_progress, batch_size=options.batch_size,
            each=each, told=["\n".join(names) for names in known] if of_each else None,
        )  # fmt: skip
    print("\n".join(summary.lines(out)), file=sys.stderr)


def _labelling_identity(
    options: Namespace, rows: RowFile, model: CNNRNN | Ensemble | OnnxPredictor
) -> dict[str, Any]:
    """Return what rows of one file must have in common."""
    from dataclasses import asdict

    from cnnrnn.machine.files import file_digest, weights_digest

    is_file = options.model is not None and options.model.lower().endswith(".onnx")
    names = ("known", "absent", "known_from", "top_k", "min_labels", "decide", "threshold",
             "beam_size", "batch_size", "precision", "max_pixels", "search", "sidecar", "existing",
             "exclude")  # fmt: skip
    backbone = None if is_file else model.backbone  # type: ignore[union-attr]
    return {
        "format": type(rows).__name__,
        **asdict(rows.options),
        **{name: options[name] for name in names},
        "labels": list(model.labels),
        "calibration": asdict(model.calibration),
        "search of the model": None if is_file else asdict(cast("CNNRNN", model).search),
        "preprocessing": None if backbone is None else asdict(backbone.preprocessing),
        "weights": file_digest(Path(options.model)) if is_file
        else weights_digest(model.state_dict().items()),  # type: ignore[union-attr]
    }  # fmt: skip


def _written(
    predictions: Iterator[Prediction],
    out: str | None,
    writer: Callable[[IO[str]], Callable[[Prediction], None]],
    show: Progress,
) -> Generator[Prediction, None, None]:
    """Yield predictions, each once it is written."""
    with opened(out) as stream, show("predict", None) as advance:
        write = writer(stream)
        for prediction in predictions:
            write(prediction)
            stream.flush()
            advance(1)
            yield prediction


def _contact_sheet(options: Namespace) -> AbstractContextManager[ContactSheet | None]:
    from cnnrnn.prediction.html import contact_sheet

    if options.html is None:
        return nullcontext()
    return contact_sheet(
        options.html, title=f"Predictions of {options.model or 'the demo model'}",
        neighbours=options.neighbours or 0, max_pixels=options.max_pixels,
    )  # fmt: skip


def _require_predict_files(options: Namespace) -> None:
    """Fail before images are read where what is written would fail, or be overwritten."""
    for name in ("html", "out"):
        require_folder(name, options[name])
    if options.sidecar is None and (options.exclude or options.existing != "append"):
        name = "exclude" if options.exclude else "existing"
        raise ValueError(f"--{name} needs --sidecar txt or --sidecar xmp, got none")
    if options.out is not None and os.path.isdir(options.out):
        raise ValueError(f"--out must name a file, got the folder {options.out}")
    if options.resume and options.html is not None:
        raise ValueError("--html shows images as they are labelled: it cannot go with --resume")
    if options.html is not None and options.out is not None:
        if os.path.realpath(options.html) == os.path.realpath(options.out):
            raise ValueError(f"--html and --out must name two files, got {options.html} for both")


def _known_labels(
    options: Namespace, images: Sequence[str | Path | BadImageError]
) -> list[str] | list[list[str]]:
    """Return the labels that are known of all images, or a list for each where a file has some."""
    if options.known_from is None:
        return cast("list[str]", options.known)
    from cnnrnn.data import BadImageError, load_dataset

    dataset = load_dataset(options.known_from)
    if dataset.image_paths is None:
        raise ValueError(f"--known_from must name image files, {options.known_from} does not")
    names = dataset.label_names
    of_path = {
        os.path.realpath(path): [names[label] for label in dataset.labels(i)]
        for i, path in enumerate(dataset.image_paths)
    }
    paths = [
        os.path.realpath(image.path if isinstance(image, BadImageError) else image)
        for image in images
    ]
    found = [path for path in paths if path in of_path]
    if not found:
        raise ValueError(
            f"--known_from {options.known_from} must name some of the {len(paths)} images, got "
            f"none of them among its {len(of_path)}"
        )
    print(f"{options.known_from} names {len(found)} of {len(paths)} images", file=sys.stderr)
    return [[*options.known, *of_path.get(path, [])] for path in paths]


def _onnx_predictor(options: Namespace) -> OnnxPredictor:
    from cnnrnn.export import OnnxPredictor
    from cnnrnn.export.session import has_cuda

    device, _, number = options.device.partition(":")
    if device == "auto":
        device = "cuda" if has_cuda() else "cpu"
    if device not in ("cpu", "cuda") or not (number.isdecimal() or not number):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {options.device!r}")
    provider = (device, {"device_id": number}) if number else device
    return OnnxPredictor(options.model, providers=[provider], search=options.search)


def run_suggest(options: Namespace) -> int:
    """Name the labels to ask of images next."""
    from cnnrnn.api import predict_iter
    from cnnrnn.prediction.inputs import with_folders_listed

    if options.questions < 1:
        raise ValueError(f"--questions must be at least 1, got {options.questions}")
    images = with_folders_listed(options.images, options.on_bad_image)
    predictions = predict_iter(
        images, options.model, known=_known_labels(options, images), absent=options.absent,
        beam_size=options.beam_size, batch_size=options.batch_size, device=options.device,
        backend=options.backend, search_device=options.search_device, workers=options.workers,
        on_bad_image=options.on_bad_image, max_pixels=options.max_pixels,
    )  # fmt: skip
    bad = 0
    with opened(options.out) as stream:
        write = question_writer(options.format, options.questions, stream)
        for prediction in predictions:
            write(prediction)
            stream.flush()
            bad += prediction.error is not None
    if bad:
        print(f"cnnrnn: warning: {bad} images could not be read", file=sys.stderr)
    return 0
