"""The `cnnrnn` command: train, compare, evaluate, predict, export, scenes, data check, check.

Options are made from the config dataclasses. Every command takes `--config FILE.yaml` with
overrides on the command line; dashes and underscores in option names mean the same.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from cnnrnn import __version__
from cnnrnn.config import (
    CompareConfig,
    Decide,
    LabelOrder,
    ModelConfig,
    OnBadImage,
    SearchConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from cnnrnn.ensemble import EnsembleResult
    from cnnrnn.export import OnnxPredictor
    from cnnrnn.prediction import Prediction
    from cnnrnn.train import TrainResult

TABLE_METRICS = ("C-P", "C-R", "C-F1", "O-P", "O-R", "O-F1", "MAP@10", "mAP", "mAP-11pt",
                 "exact-match", "example-F1")  # fmt: skip

MIN_LABELS = "fewest labels of a set and of a path; default: what validation data decided"

NAMES_SHOWN = 10
RECIPES = ("train", "compare")
"""Commands with the options of the recipe, of which `--preset` chooses the defaults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = _underscored(sys.argv[1:] if arguments is None else arguments)
    parser = _parser("ours")
    # Printing the configuration ends the parse, and must wait until the preset is known.
    quiet = [word for word in words if not word.startswith("--print_config")]
    options = parser.parse_args(quiet)
    command = options.command
    if command is None:
        parser.print_help()
        return 0
    if command in RECIPES and options[command].preset == "paper":  # named here or in a config file
        parser = _parser("paper")
    options = parser.parse_args(words)
    run: dict[str, Callable[[ArgumentParser, Namespace], int]] = {
        "train": _train, "compare": _compare, "evaluate": _evaluate, "predict": _predict,
        "export": _export, "scenes": _scenes, "data": _data, "check": _check,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = run[command](parser, options[command])
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of our output has gone, as under `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cnnrnn: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if not _is_meant_for_people(error):
            raise
        from cnnrnn.distributed import process_prefix

        print(f"cnnrnn: error: {process_prefix()}{error}", file=sys.stderr)
        return 1


def _is_meant_for_people(error: Exception) -> bool:
    """Errors of torch's own are bugs or out-of-memory, and keep their traceback."""
    from cnnrnn.distributed import LostProcessError
    from cnnrnn.export import ProviderError
    from cnnrnn.fit import NonFiniteLossError

    ours = (NonFiniteLossError, LostProcessError, ProviderError)
    return not isinstance(error, RuntimeError) or isinstance(error, ours)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from cnnrnn.data.images import BadImageWarning
    from cnnrnn.distributed import process_prefix

    if process_prefix() and not issubclass(category, BadImageWarning):
        return  # the first process says it
    print(f"cnnrnn: warning: {process_prefix()}{message}", file=sys.stderr)


def _underscored(words: Sequence[str]) -> list[str]:
    """Write option names with underscores; what follows a bare `--` is left as it is."""
    result = list(words)
    for position, word in enumerate(result):
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            result[position] = f"--{name[2:].replace('-', '_')}{equals}{value}"
    return result


def _parser(preset: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="cnnrnn", version=__version__,
        description="CNN-RNN multi-label image classification: train, measure, predict.",
    )  # fmt: skip
    commands = parser.add_subcommands(required=False, dest="command")
    commands.add_subcommand("train", _train_parser(preset), help="train a model")
    commands.add_subcommand(
        "compare", _compare_parser(preset), help="train and measure the comparison methods too"
    )
    commands.add_subcommand("evaluate", _evaluate_parser(), help="measure a model on labelled data")
    commands.add_subcommand("predict", _predict_parser(), help="label pictures")
    commands.add_subcommand("export", _export_parser(), help="write a model as an ONNX file")
    commands.add_subcommand("scenes", _scenes_parser(), help="write the synthetic scenes data set")
    data = ArgumentParser(description="Look into a labelled data set.")
    commands.add_subcommand("data", data, help="look into a labelled data set")
    actions = data.add_subcommands(required=True, dest="action")
    actions.add_subcommand("check", _data_check_parser(), help="count it, and say what is wrong")
    commands.add_subcommand("check", ArgumentParser(), help="say what this installation has")
    return parser


def _command_parser(description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="YAML or JSON file with options")
    return parser


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=str, required=True,
        help="coco:ROOT, coco:FILE.json with --images, voc:ROOT, nuswide:ROOT, csv:FILE, "
        "scenes:ROOT or features:FILE; docs/data.md has their options",
    )  # fmt: skip
    _add_images(parser)


def _add_images(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=str | None, help="picture folder of a coco: JSON, nuswide: or csv: source"
    )


def _train_parser(preset: str) -> ArgumentParser:
    parser = _command_parser("Train a model; writes best/, last/, log.jsonl and config.yaml.")
    _add_data(parser)
    parser.add_argument("--out", type=str, required=True, help="folder for the run")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the run in --out after the last epoch that it finished, or start it",
    )  # fmt: skip
    parser.add_argument(
        "--members", type=int, default=1, help="train an ensemble of so many, with seeds in a row"
    )
    parser.add_argument(
        "--member_orders", type=str | None,
        help="label order of each member, such as frequency,rare,random; label_order's without",
    )  # fmt: skip
    _add_recipe(parser, preset)
    return parser


def _add_recipe(parser: ArgumentParser, preset: str) -> None:
    parser.add_argument(
        "--preset", type=Literal["ours", "paper"], default="ours",
        help="defaults: this project's recipe, or the paper's (VGG-16 fc7, RMSprop, its cell)",
    )  # fmt: skip
    parser.add_class_arguments(TrainConfig, None)
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_class_arguments(SearchConfig, "search")
    if preset == "paper":
        parser.set_defaults(
            asdict(TrainConfig.paper())
            | {f"model.{k}": v for k, v in asdict(ModelConfig.paper()).items()}
            | {f"search.{k}": v for k, v in asdict(SearchConfig.paper()).items()}
        )


def _compare_parser(preset: str) -> ArgumentParser:
    parser = _command_parser(
        "Train the path model and the methods it is compared with on the same features; writes "
        "results.json and table.md, and goes on where it was stopped."
    )
    _add_data(parser)
    defaults = CompareConfig()
    parser.add_argument("--out", type=str, required=True, help="folder for results and weights")
    parser.add_argument(
        "--seeds", type=str, default=",".join(map(str, defaults.seeds)),
        help="seeds of the trained methods, with commas between; the first one tunes",
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=str | None,
        help="methods with commas between, as docs/comparison.md names them; all without",
    )  # fmt: skip
    parser.add_argument(
        "--settings", type=int, default=defaults.settings, help="settings that each method tries"
    )
    parser.add_argument(
        "--members", type=int, default=defaults.members, help="trainings that an ensemble averages"
    )
    parser.add_argument(
        "--test_split", type=str, default=defaults.test_split, help="name of the split to test on"
    )
    parser.add_argument(
        "--tune_each_seed", type=bool, default=defaults.tune_each_seed,
        help="choose settings anew for every seed",
    )  # fmt: skip
    _add_recipe(parser, preset)
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _command_parser("Measure a model on labelled data.")
    _add_data(parser)
    parser.add_argument("--model", type=str, required=True, help="checkpoint folder")
    parser.add_argument("--split", type=str, default="test", help="split of the data, or `all`")
    parser.add_argument("--k", type=int, default=3, help="also measure sets cut to k labels")
    parser.add_argument("--per_label", type=str | None, help="write each label's figures as CSV")
    parser.add_argument("--json", type=str | None, help="write all metrics as JSON")
    parser.add_argument("--min_labels", type=int | None, help=MIN_LABELS)
    _add_run_options(parser, batch_size=128)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode pictures")
    return parser


def _predict_parser() -> ArgumentParser:
    parser = _command_parser("Label pictures; writes each result as it is ready.")
    parser.add_argument("images", type=str, nargs="+", help="pictures and folders")
    parser.add_argument(
        "--model", type=str | None,
        help="checkpoint folder, or FILE.onnx of `cnnrnn export`; demo model without",
    )  # fmt: skip
    parser.add_argument(
        "--format", type=Literal["table", "csv", "jsonl"], default="table",
        help="a line each for people, CSV, or JSON lines",
    )  # fmt: skip
    parser.add_argument("--out", type=str | None, help="file to write; standard output without")
    parser.add_argument("--top_k", type=int | None, help="keep at most this many labels")
    parser.add_argument("--min_labels", type=int | None, help=MIN_LABELS)
    parser.add_argument(
        "--decide", type=Decide, default="path",
        help="labels of the best path, those above the calibrated threshold or above each label's "
        "own, the calibrated number of labels, or the set with the best expected F1",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float | None, help="another threshold on the scores")
    parser.add_argument(
        "--workers", type=int | None, help="threads that decode; one per core, up to 8, without"
    )
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16", "auto"], default="fp32",
        help="of the backbone in torch; auto is bf16 where the hardware has it",
    )  # fmt: skip
    parser.add_argument(
        "--compiled", action="store_true", help="run the backbone through torch.compile"
    )
    parser.add_argument(
        "--search", type=Literal["onnx", "compiled"], default="onnx",
        help="of FILE.onnx: in ONNX Runtime too, or by the compiled search",
    )  # fmt: skip
    _add_run_options(parser, batch_size=64)
    return parser


def _add_run_options(parser: ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--beam_size", type=int | None, help="N; the model's own without")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="pictures per step")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--on_bad_image", type=OnBadImage, default="error",
        help="stop at an unreadable picture, or go on and say so",
    )  # fmt: skip


def _export_parser() -> ArgumentParser:
    parser = _command_parser("Write a model as one ONNX file, the beam search included.")
    parser.add_argument("checkpoint", type=str, help="checkpoint folder")
    parser.add_argument("file", type=str, help="ONNX file to write")
    parser.add_argument(
        "--input", type=Literal["uint8", "float", "features"] | None,
        help="pictures as they are decoded, normalised pictures, or feature vectors for the head "
        "alone; uint8 without, and features for a model without a backbone",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=Literal["float32", "float16"], default="float32",
        help="of backbone, trunk and projections; the search stays float32",
    )  # fmt: skip
    parser.add_argument("--loop", action="store_true", help="the search as an ONNX Loop")
    parser.add_argument(
        "--dynamic_size", action="store_true", help="pictures of any height and width"
    )
    parser.add_argument("--beam_size", type=int | None, help="N; the model's own without")
    parser.add_argument("--max_labels", type=int | None, help="longest path; the model's without")
    return parser


def _scenes_parser() -> ArgumentParser:
    parser = _command_parser("Write the synthetic scenes data set in COCO format.")
    parser.add_argument("--out", type=str, required=True, help="folder to make")
    for split, count in (("train", 4000), ("val", 1000), ("test", 1000)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"{split} pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures")
    parser.add_argument("--image_size", type=int, default=64, help="side in pixels")
    return parser


def _data_check_parser() -> ArgumentParser:
    parser = _command_parser("Read a source whole: what is in it, and everything wrong with it.")
    parser.add_argument("source", type=str, help="as --data of train")
    _add_images(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode pictures")
    parser.add_argument("--labels", type=int, default=20, help="labels and pairs to show")
    parser.add_argument("--json", type=str | None, help="write the whole report as JSON")
    return parser


def _train(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.data import load_dataset
    from cnnrnn.distributed import join
    from cnnrnn.ensemble import train_ensemble
    from cnnrnn.fit import resolve_device
    from cnnrnn.progress import terminal_progress
    from cnnrnn.state import write_whole
    from cnnrnn.train import train

    config, model, search = _recipe(options)
    if not options.out:
        raise ValueError("--out must name a folder, got an empty name")
    out = Path(options.out)
    unsaved = ("config", "preset", "resume")
    resolved = {k: v for k, v in options.as_dict().items() if k not in unsaved}

    def save_options() -> None:
        if options.resume and (out / "config.yaml").exists():
            return
        text = _yaml(resolved)
        write_whole(out / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    orders = _member_orders(options.members, options.member_orders, config)
    result: TrainResult | EnsembleResult
    with join(resolve_device(config.device)) as ranks:
        with ranks.first_goes_ahead():  # it may write the data set
            dataset = load_dataset(
                options.data, images=options.images, on_bad_image=config.on_bad_image
            )
        if len(orders) == 1 and options.member_orders is None:
            result = train(
                dataset, out, model, search, config, resume=options.resume, on_start=save_options,
                say=say, progress=terminal_progress, ranks=ranks,
            )  # fmt: skip
        elif ranks.size > 1:
            raise ValueError(
                f"an ensemble trains in one process, without torchrun, got {ranks.size}"
            )
        else:
            result = train_ensemble(
                dataset, out, model, search, config, orders, resume=options.resume,
                on_start=save_options, say=say, progress=terminal_progress,
            )  # fmt: skip
    if not ranks.first:
        return 0
    print(metrics_table(result.metrics, f"validation, {len(result.model.labels)} labels"))
    print(f"best checkpoint: {out / 'best'}")
    return 0


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


def _compare(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.comparison import (
        chosen_methods,
        compare,
        compared_splits,
        frozen_features,
        text_table,
    )
    from cnnrnn.data import load_dataset
    from cnnrnn.distributed import started_by_torchrun
    from cnnrnn.fit import resolve_device
    from cnnrnn.progress import terminal_progress
    from cnnrnn.train import initial_backbone

    if started_by_torchrun():
        raise ValueError("compare runs in one process: start it without torchrun")
    config, model, search = _recipe(options)
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    except ValueError:
        raise ValueError(
            f"--seeds must be whole numbers with commas between, got {options.seeds!r}"
        ) from None
    methods = None if options.methods is None else tuple(options.methods.split(","))
    compared = CompareConfig(
        seeds,
        methods,
        options.settings,
        options.members,
        options.test_split,
        options.tune_each_seed,
    )
    chosen_methods(compared, model, search)  # a wrong name fails before data is read
    if not options.out:
        raise ValueError("--out must name a folder, got an empty name")
    out = Path(options.out)
    dataset = load_dataset(options.data, images=options.images, on_bad_image=config.on_bad_image)
    if dataset.features is None:
        if not model.freeze_backbone:
            raise ValueError(
                "compare reads one set of features: --model.freeze_backbone must be true, got "
                "false; --init_backbone names a backbone that `train` has trained"
            )
        compared_splits(dataset, config, compared.test_split)  # fails before features are made
        backbone = initial_backbone(model, config).to(resolve_device(config.device))
        dataset = frozen_features(
            dataset, backbone,
            Path(config.feature_cache) if config.feature_cache else out / "features",
            batch_size=config.batch_size, workers=config.workers,
            on_bad_image=config.on_bad_image, progress=terminal_progress,
        )  # fmt: skip
    rows = compare(
        dataset, out, model, search, config, compared,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    images = len(dataset.splits[options.test_split])
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    labels = len(dataset.label_names)
    print(f"{options.data}, {options.test_split}: {images:,} images, {labels} labels, per cent, "
          f"{count}, NLL in nats, * best of its column")  # fmt: skip
    print(text_table(rows))
    print(f"also in {out / 'table.md'}; all figures: {out / 'results.json'}")
    return 0


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _evaluate(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.data import load_dataset
    from cnnrnn.evaluation import evaluate, write_per_label
    from cnnrnn.predictor import resolve_model
    from cnnrnn.progress import terminal_progress

    for name in ("per_label", "json"):
        _require_folder(name, options[name])
    model = resolve_model(options.model, options.device)
    dataset = load_dataset(options.data, images=options.images, on_bad_image=options.on_bad_image)
    if options.split != "all" or "all" in dataset.splits:
        dataset = dataset.split(options.split)
    search = None
    if options.beam_size is not None:
        search = replace(model.search, beam_size=options.beam_size)
    evaluation = evaluate(
        model, dataset, k=options.k, search=search, min_labels=options.min_labels,
        batch_size=options.batch_size, workers=options.workers,
        on_bad_image=options.on_bad_image, progress=terminal_progress,
    )  # fmt: skip
    print(metrics_table(evaluation.metrics, f"{options.data}, {options.split}"))
    bound = "at most " if evaluation.nll_is_bound else ""
    print(f"NLL of the whole true set: {bound}{evaluation.nll:.3f} nats per image")
    uncalibrated = [model.labels[i] for i in evaluation.calibration.uncalibrated]
    if uncalibrated:
        print(_uncalibrated_line(uncalibrated, len(model.labels)))
    if options.per_label is not None:
        write_per_label(Path(options.per_label), model, evaluation)
    if options.json is not None:
        values: dict[str, Any] = {**_without_nan(evaluation.metrics)}
        values["label_thresholds"]["uncalibrated"] = uncalibrated
        values["NLL"] = None if math.isnan(evaluation.nll) else evaluation.nll
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    return 0


def _uncalibrated_line(names: list[str], num_labels: int) -> str:
    """Name labels without a threshold of their own, the first of many."""
    shown = ", ".join(names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (
        f"{len(names)} of {num_labels} labels are too rare for a threshold of their own and have "
        f"the common one: {shown}{more}"
    )


def _without_nan(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """JSON has no NaN: a figure that is not defined becomes null."""
    return {
        decision: {name: None if math.isnan(v) else v for name, v in values.items()}
        for decision, values in metrics.items()
    }


def metrics_table(metrics: dict[str, dict[str, float]], title: str) -> str:
    """Lay metrics out as text: a row per decision, in per cent."""
    first = next(iter(metrics.values()))
    lines = [f"{title}: {first['images']:,.0f} images, "
             f"{first['images-without-labels']:,.0f} without labels, "
             f"{first['labels-without-positives']:.0f} labels without positives"]  # fmt: skip
    widths = {name: max(6, len(name)) + 2 for name in TABLE_METRICS}
    lines.append(" " * 16 + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for decision, values in metrics.items():
        cells = "".join(f"{100 * values[name]:{width}.1f}" for name, width in widths.items())
        lines.append(f"{decision.replace('_', ' '):<16}{cells}")
    return "\n".join(lines)


def _predict(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.predictor import predict_iter
    from cnnrnn.progress import no_progress, terminal_progress

    default = {"precision": "fp32", "compiled": False, "search": "onnx"}
    asked: dict[str, Any] = {
        name: options[name]
        for name in ("top_k", "beam_size", "min_labels", "decide", "threshold", "batch_size",
                     "workers", "on_bad_image")
    }  # fmt: skip
    torch_only = [name for name in ("precision", "compiled") if options[name] != default[name]]
    if options.model is not None and options.model.lower().endswith(".onnx"):
        if torch_only:
            raise ValueError(
                f"--{torch_only[0]} must be left out for {options.model}, which ONNX Runtime runs; "
                "`cnnrnn export --precision float16` makes a file in half precision"
            )
        predictions = _onnx_predictor(options).predict_iter(options.images, **asked)
    elif options.search != default["search"]:
        raise ValueError(f"--search must be left out but for FILE.onnx, got {options.search}")
    else:
        predictions = predict_iter(
            options.images, options.model, device=options.device, precision=options.precision,
            compiled=options.compiled, **asked,
        )  # fmt: skip
    bad = 0
    show = no_progress if options.out is None else terminal_progress
    with _output(options.out) as stream, show("predict", None) as advance:
        write = _writer(options.format, stream)
        for prediction in predictions:
            write(prediction)
            stream.flush()
            bad += prediction.error is not None
            advance(1)
    if bad:
        print(f"cnnrnn: warning: {bad} pictures could not be read", file=sys.stderr)
    return 0


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


@contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    # A file name may be bytes that are no text: they leave as they came.
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        yield stream


def _writer(form: str, stream: IO[str]) -> Callable[[Prediction], None]:
    if form == "csv":
        rows = csv.writer(stream)
        rows.writerow(["image", "labels", "log_prob", "error"])
        return lambda p: rows.writerow(
            [p.source, ";".join(p.labels), "" if p.error else f"{p.log_prob:.6g}", p.error or ""]
        )
    if form == "jsonl":
        return lambda p: print(json.dumps(_record(p), ensure_ascii=False), file=stream)

    def line(p: Prediction) -> None:
        scores = p.scores
        shown = ", ".join(f"{name} {scores[name]:.2f}" for name in p.labels)
        print(f"{p.source:<40}  {p.error or shown or '(no labels)'}", file=stream)

    return line


def _record(p: Prediction) -> dict[str, Any]:
    if p.error is not None:
        return {"image": p.source, "error": p.error}
    scores = p.scores
    chosen = {name: round(scores[name], 6) for name in p.labels}
    return {"image": p.source, "labels": p.labels, "log_prob": p.log_prob, "scores": chosen}


def _export(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.export import export_onnx
    from cnnrnn.predictor import load

    _require_folder("file", options.file)
    model = load(options.checkpoint)
    changes = {name: options[name] for name in ("beam_size", "max_labels")}
    search = replace(model.search, **{k: v for k, v in changes.items() if v is not None})
    export_onnx(
        model, options.file, input_kind=options.input, precision=options.precision,
        loop=options.loop, dynamic_size=options.dynamic_size, search=search,
    )  # fmt: skip
    size = Path(options.file).stat().st_size
    print(f"{options.file}: {size / 1e6:,.1f} MB, {len(model.labels)} labels")
    return 0


def _scenes(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.data.scenes import write_scenes

    write_scenes(
        options.out, train=options.train, val=options.val, test=options.test, seed=options.seed,
        image_size=options.image_size,
    )  # fmt: skip
    print(f"{options.train + options.val + options.test} pictures in {options.out}")
    return 0


def _data(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.data.check import check_source
    from cnnrnn.progress import terminal_progress

    options = options.check
    _require_folder("json", options.json)
    if options.labels < 0 or options.workers < 0:
        raise ValueError(
            f"--labels and --workers must be at least 0, got {options.labels} and {options.workers}"
        )
    report = check_source(
        options.source, images=options.images, workers=options.workers,
        pairs=options.labels, progress=terminal_progress,
    )  # fmt: skip
    with _output(None) as stream:
        print("\n".join(report.lines(options.labels)), file=stream)
    if options.json is not None:
        text = json.dumps(report.as_dict(), indent=2) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    return 1 if report.problems else 0


def _require_folder(name: str, file: str | None) -> None:
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--{name} {file} must be in a folder that exists")


def _check(parser: ArgumentParser, options: Namespace) -> int:
    from cnnrnn.check import report

    lines, problems = report()
    print("\n".join(lines))
    for problem in problems:
        print(f"problem: {problem}")
    print("everything needed is there" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0
