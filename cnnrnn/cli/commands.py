"""What each command does: `RUN` has a function for each, from its options to the exit status."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cnnrnn.cli.output import (
    metrics_table,
    opened,
    others_table,
    require_folder,
    say,
    uncalibrated_line,
    write_json,
    write_labels,
    yaml_text,
)
from cnnrnn.cli.predict import run_predict, run_suggest
from cnnrnn.config import (
    CompareConfig,
    LabelOrder,
    ModelConfig,
    OnBadImage,
    SearchConfig,
    TrainConfig,
)
from cnnrnn.machine.words import without_nan

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from cnnrnn.data import Dataset
    from cnnrnn.model.classifier import CNNRNN
    from cnnrnn.model.ensemble import Ensemble
    from cnnrnn.training.ensemble import EnsembleResult
    from cnnrnn.training.run import TrainResult


def run_train(options: Namespace) -> int:
    """Train a model or an ensemble."""
    from cnnrnn.data.splits import describe_splits
    from cnnrnn.inspection.report import require_report
    from cnnrnn.machine.devices import resolve_device
    from cnnrnn.machine.distributed import join
    from cnnrnn.machine.files import write_whole
    from cnnrnn.machine.progress import terminal_progress
    from cnnrnn.training.ensemble import train_ensemble
    from cnnrnn.training.run import train

    if options.report:
        require_report()
    config, model, search = _recipe(options)
    out = _run_folder(options)
    unsaved = ("config", "preset", "resume", "report")
    resolved = {k: v for k, v in options.as_dict().items() if k not in unsaved}

    def start() -> None:
        say(describe_splits(dataset, config))
        if options.resume and (out / "config.yaml").exists():
            return
        text = yaml_text(resolved)
        write_whole(out / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))

    orders = _member_orders(options.members, options.member_orders, config)
    result: TrainResult | EnsembleResult
    with join(resolve_device(config.device)) as ranks:
        with ranks.first_goes_ahead():  # it may write the data set
            dataset = _dataset(options, config.on_bad_image)
        if len(orders) == 1 and options.member_orders is None:
            result = train(
                dataset, out, model, search, config, resume=options.resume, on_start=start,
                say=say, progress=terminal_progress, ranks=ranks,
            )  # fmt: skip
        elif ranks.size > 1:
            raise ValueError(
                f"an ensemble trains in one process, without torchrun, got {ranks.size}"
            )
        else:
            result = train_ensemble(
                dataset, out, model, search, config, orders, resume=options.resume,
                on_start=start, say=say, progress=terminal_progress,
            )  # fmt: skip
    if not ranks.first:
        return 0
    print(metrics_table(result.metrics, f"validation, {len(result.model.labels)} labels"))
    print(f"best checkpoint: {out / 'best'}")
    if options.report:
        _report_on_training(result.model, dataset, config, out)
    return 0


def _report_on_training(
    model: CNNRNN | Ensemble, dataset: Dataset, config: TrainConfig, out: Path
) -> None:
    """Write report.html of the validation images."""
    from cnnrnn.data.splits import training_splits
    from cnnrnn.inspection.report import write_report
    from cnnrnn.machine.progress import terminal_progress

    _, validation = training_splits(dataset, config)
    cache = Path(config.feature_cache) if config.feature_cache else out / "features"
    write_report(
        model, validation, out / "report.html", title=f"{out}: {dataset.source}, validation",
        remarks=["These are the validation images, by which the best epoch and the thresholds were "
                 "chosen: expect less of others."],
        log=_training_log(out), cache=None if validation.images is None else cache,
        backend=config.backend, workers=config.workers or None, on_bad_image=config.on_bad_image,
        progress=terminal_progress,
    )  # fmt: skip
    print(f"report: {out / 'report.html'}")


def _training_log(run: Path) -> Path:
    """Return a run's log; of an ensemble that of its first member."""
    own, member = run / "log.jsonl", run / "members" / "0" / "log.jsonl"
    return member if member.is_file() else own


def _dataset(options: Namespace, on_bad_image: OnBadImage) -> Dataset:
    from cnnrnn.data import load_dataset

    return load_dataset(
        options.data, images=options.images, on_bad_image=on_bad_image,
        follow_links=options.follow_links, max_pixels=options.max_pixels,
    )  # fmt: skip


def _run_folder(options: Namespace) -> Path:
    if not options.out:
        raise ValueError("--out must name a folder, got an empty name")
    return Path(options.out)


def _member_orders(members: int, names: str | None, config: TrainConfig) -> list[LabelOrder]:
    """Return the label order of each member of an ensemble; one member alone is no ensemble."""
    if members < 1:
        raise ValueError(f"--members must be at least 1, got {members}")
    if names is None:
        return [config.label_order] * members
    orders = [cast("LabelOrder", name) for name in names.split(",")]
    for order in orders:
        replace(config, label_order=order)  # checks it
    if len(orders) != members:
        raise ValueError(
            f"--member_orders must name {members} label orders for --members {members}, "
            f"got {len(orders)}: {names}"
        )
    return orders


def _recipe(options: Namespace) -> tuple[TrainConfig, ModelConfig, SearchConfig]:
    fields = TrainConfig.__dataclass_fields__
    config = TrainConfig(**{name: options[name] for name in fields})
    return config, ModelConfig(**vars(options.model)), SearchConfig(**vars(options.search))


def run_compare(options: Namespace) -> int:
    """Train and measure the comparison methods."""
    from cnnrnn.comparison import (
        chosen_methods,
        compare,
        compared_splits,
        frozen_features,
        text_table,
    )
    from cnnrnn.inspection.report import require_report
    from cnnrnn.machine.devices import resolve_device
    from cnnrnn.machine.distributed import started_by_torchrun
    from cnnrnn.machine.progress import terminal_progress
    from cnnrnn.training.start import initial_backbone

    if started_by_torchrun():
        raise ValueError("compare runs in one process: start it without torchrun")
    if options.report:
        require_report()
    config, model, search = _recipe(options)
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    except ValueError:
        raise ValueError(
            f"--seeds must be comma-separated whole numbers, got {options.seeds!r}"
        ) from None
    methods = None if options.methods is None else tuple(options.methods.split(","))
    others = CompareConfig.__dataclass_fields__.keys() - {"seeds", "methods"}
    compared = CompareConfig(seeds, methods, **{name: options[name] for name in others})
    chosen_methods(compared, model, search)  # a wrong name fails before data is read
    out = _run_folder(options)
    dataset = _dataset(options, config.on_bad_image)
    if dataset.features is None:
        if not model.freeze_backbone:
            raise ValueError(
                "compare reads one set of features: --model.freeze_backbone must be true, got "
                "false; --init_backbone names a backbone that `train` has trained"
            )
        compared_splits(dataset, config, compared.test_split)  # fails before features are made
        backbone = initial_backbone(model, config).to(resolve_device(config.device))
        if backbone.origin:
            say(backbone.origin)
        dataset = frozen_features(
            dataset, backbone,
            Path(config.feature_cache) if config.feature_cache else out / "features",
            backend=config.backend, batch_size=config.batch_size, workers=config.workers or None,
            on_bad_image=config.on_bad_image, progress=terminal_progress,
        )  # fmt: skip
    rows = compare(
        dataset, out, model, search, config, compared,
        say=say,
    )  # fmt: skip
    images = len(dataset.splits[options.test_split])
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    labels = len(dataset.label_names)
    print(f"{options.data}, {options.test_split}: {images:,} images, {labels} labels, per cent, "
          f"{count}, NLL in nats, * best of its column")  # fmt: skip
    print(text_table(rows))
    print(f"also in {out / 'table.md'}; all figures: {out / 'results.json'}")
    if options.report:
        from cnnrnn.comparison.report import write_comparison

        write_comparison(rows, out / "report.html", f"{options.data}, {options.test_split}")
        print(f"report: {out / 'report.html'}")
    return 0


def run_evaluate(options: Namespace) -> int:
    """Measure a model on labelled data."""
    from cnnrnn.api import resolve_model
    from cnnrnn.evaluation import evaluate, write_per_label
    from cnnrnn.machine.progress import terminal_progress

    for name in ("per_label", "json"):
        require_folder(name, options[name])
    if options.reveal is not None and options.reveal < 1:
        raise ValueError(f"--reveal must be at least 1, got {options.reveal}")
    model = resolve_model(options.model, options.device)
    dataset = _dataset(options, options.on_bad_image)
    if options.split != "all" or "all" in dataset.splits:
        dataset = dataset.split(options.split)
    search = None
    if options.beam_size is not None:
        search = replace(model.search, beam_size=options.beam_size)
    evaluation = evaluate(
        model, dataset, k=options.k, search=search, min_labels=options.min_labels,
        backend=options.backend, search_device=options.search_device, revealed=options.reveal,
        batch_size=options.batch_size, workers=options.workers, on_bad_image=options.on_bad_image,
        progress=terminal_progress,
    )  # fmt: skip
    print(metrics_table(evaluation.metrics, f"{options.data}, {options.split}"))
    bound = "at most " if evaluation.nll_is_bound else ""
    print(f"NLL of the whole true set: {bound}{evaluation.nll:.3f} nats per image")
    if evaluation.others:
        print(others_table(evaluation.others))
    uncalibrated = [model.labels[i] for i in evaluation.calibration.uncalibrated]
    if uncalibrated:
        print(uncalibrated_line(uncalibrated, len(model.labels)))
    if options.per_label is not None:
        write_per_label(Path(options.per_label), model, evaluation)
    if options.json is not None:
        values: dict[str, Any] = without_nan(evaluation.metrics)
        values["label_thresholds"]["uncalibrated"] = uncalibrated
        values["NLL"] = without_nan(evaluation.nll)
        values |= without_nan(evaluation.others)
        write_json(options.json, values)
    return 0


def run_report(options: Namespace) -> int:
    """Write a page that shows a model on labelled data."""
    import numpy as np

    from cnnrnn.api import resolve_model
    from cnnrnn.inspection.report import require_report, write_report
    from cnnrnn.inspection.suspects import seen_in_training
    from cnnrnn.machine.progress import terminal_progress

    require_report()
    run = Path(options.model)
    out = Path(options.out or (run if run.is_dir() else Path()) / "report.html")
    require_folder("out", str(out))
    model = resolve_model(options.model, options.device)
    source = _dataset(options, options.on_bad_image)
    dataset = source
    if options.split != "all" or "all" in source.splits:
        dataset = source.split(options.split)
    seen = np.intersect1d(seen_in_training(run, source), dataset.rows)
    remarks = []
    if len(seen):
        remarks.append(
            f"The model was trained on {len(seen):,} of these {len(dataset):,} images: expect less "
            "of others."
        )
    home = run.parent if run.name == "best" else run
    write_report(
        model, dataset, out, title=f"{options.model}: {options.data}, {options.split}",
        remarks=remarks, log=_training_log(home),
        cache=home / "features" if (home / "features").is_dir() and dataset.images else None,
        backend=options.backend, search_device=options.search_device,
        batch_size=options.batch_size, workers=options.workers, on_bad_image=options.on_bad_image,
        progress=terminal_progress,
    )  # fmt: skip
    print(f"report: {out}")
    if options.open:
        import webbrowser

        webbrowser.open(out.absolute().as_uri())
    return 0


def run_labels(options: Namespace) -> int:
    """List a model's labels and what is near to each."""
    from cnnrnn.api import load
    from cnnrnn.inspection.neighbours import nearest_labels

    if options.nearest < 0:
        raise ValueError(f"--nearest must be at least 0, got {options.nearest}")
    if options.model.lower().endswith(".onnx"):
        raise ValueError(f"labels needs a checkpoint folder, got the exported file {options.model}")
    model = load(options.model)
    near = nearest_labels(model, options.nearest) if options.nearest else {}
    calibration = model.calibration
    cuts = calibration.label_thresholds or [calibration.threshold] * len(model.labels)
    with opened(options.out) as stream:
        write_labels(options.format, dict(zip(model.labels, cuts, strict=True)), near, stream)
    return 0


def run_explain(options: Namespace) -> int:
    """Draw where the steps of an image's path come from."""
    from cnnrnn.inspection.explain import STEPS, explain
    from cnnrnn.inspection.explain_figure import require_drawable

    if options.steps is not None and options.method != "integrated_gradients":
        raise ValueError(f"--steps is for --method integrated_gradients, got {options.method}")
    require_folder("out", options.out)
    require_drawable(Path(options.out))  # before what may take minutes
    found = explain(
        options.image, options.model, method=options.method, label=options.label,
        path=options.path, known=options.known, absent=options.absent, window=options.window,
        steps=STEPS if options.steps is None else options.steps, device=options.device,
        max_pixels=options.max_pixels,
    )  # fmt: skip
    found.save(options.out)
    for step in found.steps:
        of = "" if step.label is None else f"  {step.label} {step.score:+.2f} nats"
        print(f"{step.name}{of}")
    print(f"{options.out}: {found.explained}")
    return 0


def run_export(options: Namespace) -> int:
    """Write a model as an ONNX file."""
    from cnnrnn.api import load
    from cnnrnn.export import export_onnx
    from cnnrnn.export.onnx import labels_file

    require_folder("file", options.file)
    model = load(options.checkpoint)
    changes = {name: options[name] for name in ("beam_size", "max_labels", "marginal_places")}
    search = replace(model.search, **{k: v for k, v in changes.items() if v is not None})
    export_onnx(
        model, options.file, input_kind=options.input, precision=options.precision,
        loop=options.loop, dynamic_size=options.dynamic_size, search=search,
        max_known=options.max_known,
    )  # fmt: skip
    size = Path(options.file).stat().st_size
    print(f"{options.file}: {size / 1e6:,.1f} MB, {len(model.labels)} labels, described in "
          f"{labels_file(Path(options.file))}")  # fmt: skip
    return 0


def run_scenes(options: Namespace) -> int:
    """Write the synthetic scenes."""
    from cnnrnn.data.sources.scenes import write_scenes
    from cnnrnn.machine.progress import terminal_progress

    write_scenes(
        options.out, train=options.train, val=options.val, test=options.test, seed=options.seed,
        image_size=options.image_size, progress=terminal_progress,
    )  # fmt: skip
    print(f"{options.train + options.val + options.test} images in {options.out}")
    return 0


def run_data(options: Namespace) -> int:
    """Inspect a data set."""
    from cnnrnn.data.report import check_source
    from cnnrnn.machine.progress import terminal_progress

    options = options.check
    for name in ("json", "suspects"):
        require_folder(name, options[name])
    _require_suspect_options(options)
    if options.labels < 0 or options.workers < 0:
        raise ValueError(
            f"--labels and --workers must be at least 0, got {options.labels} and {options.workers}"
        )
    report = check_source(
        options.source, images=options.images, follow_links=options.follow_links,
        max_pixels=options.max_pixels, workers=options.workers, pairs=options.labels,
        progress=terminal_progress,
    )  # fmt: skip
    with opened(None) as stream:
        print("\n".join(report.lines(options.labels, options["all"])), file=stream)
    if options.json is not None:
        write_json(options.json, report.as_dict(), ascii_only=True)
    if options.suspects is not None:
        print(_write_suspects(options))
    return 1 if report.problems else 0


def _require_suspect_options(options: Namespace) -> None:
    """Fail where options of `data check` that belong together do not come together."""
    if (options.model is None) != (options.suspects is None):
        there, lacking = (
            ("model", "suspects") if options.suspects is None else ("suspects", "model")
        )
        raise ValueError(f"--{there} needs --{lacking}, got none")
    defaults = {"folds": None, "cut": 0.0, "split": None}
    for name, default in defaults.items():
        if options.suspects is None and options[name] != default:
            raise ValueError(f"--{name} needs --suspects and --model, got none")
    if options.folds is not None and options.folds < 2:
        raise ValueError(f"--folds must be at least 2, got {options.folds}")


def _write_suspects(options: Namespace) -> str:
    """Judge the labels of a source, write those that look wrong; return a line on them."""
    import numpy as np

    from cnnrnn.api import resolve_model
    from cnnrnn.data import load_dataset
    from cnnrnn.inspection.suspects import cross_fitted_suspects, find_suspects, seen_in_training
    from cnnrnn.machine.progress import terminal_progress
    from cnnrnn.model.checkpoint import find_checkpoint
    from cnnrnn.model.ensemble import Ensemble
    from cnnrnn.training.resume import stored_recipe

    model = resolve_model(options.model, options.device)
    # The report has named the images that cannot be read.
    source = load_dataset(
        options.source, images=options.images, on_bad_image="skip",
        follow_links=options.follow_links, max_pixels=options.max_pixels,
    )  # fmt: skip
    dataset = source if options.split is None else source.split(options.split)
    checkpoint = find_checkpoint(options.model)
    common: dict[str, Any] = {
        "cut": options.cut, "batch_size": options.batch_size, "on_bad_image": "skip",
        "cache": checkpoint.parent / "features" if checkpoint.name == "best" else None,
        "workers": options.workers or None, "progress": terminal_progress,
    }  # fmt: skip
    if options.folds is not None:
        if isinstance(model, Ensemble):
            raise ValueError(f"--folds needs the run of one model, {options.model} is an ensemble")
        suspects = cross_fitted_suspects(
            model, dataset, stored_recipe(Path(options.model)), options.folds,
            device=options.device, say=lambda line: print(line, file=sys.stderr, flush=True),
            **common,
        )  # fmt: skip
    else:
        rows = seen_in_training(Path(options.model), source)
        seen = np.intersect1d(rows, dataset.rows)
        if len(seen):
            warnings.warn(
                f"{options.model} was trained on {len(seen):,} of the {len(dataset):,} records, "
                "where wrong labels look right; with --folds 5 models judge that did not see them",
                stacklevel=1,
            )
        suspects = find_suspects(model, dataset, **common)
    suspects.write(Path(options.suspects))
    return f"{suspects.summary()}; {options.suspects} lists them"


def run_check(options: Namespace) -> int:
    """Report what this installation has."""
    from cnnrnn.cli.installation import installed

    lines, problems = installed()
    print("\n".join(lines))
    for problem in problems:
        print(f"problem: {problem}")
    print("nothing is missing" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


RUN: dict[str, Callable[[Namespace], int]] = {
    "train": run_train, "compare": run_compare, "evaluate": run_evaluate, "report": run_report,
    "predict": run_predict, "suggest": run_suggest, "labels": run_labels, "export": run_export,
    "explain": run_explain, "scenes": run_scenes,
    "data": run_data, "check": run_check,
}  # fmt: skip
