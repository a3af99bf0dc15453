"""The options of every command, made from the config dataclasses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from jsonargparse import ArgumentParser

from cnnrnn import __version__
from cnnrnn.cli.config_file import ConfigFile
from cnnrnn.config import (
    MAX_KNOWN,
    MAX_PIXELS,
    Backend,
    CompareConfig,
    Decide,
    FilePrecision,
    ModelConfig,
    OnBadImage,
    Precision,
    SearchConfig,
    SearchDevice,
    TrainConfig,
)

WORKERS = "threads that decode; default: one per core, up to 8"
MIN_LABELS = "least number of labels of a set and of a path; default: as chosen in validation"


RECIPES = ("train", "compare")
"""Commands with the options of the recipe, of which `--preset` chooses the defaults."""


def make_parser(preset: str) -> ArgumentParser:
    """Return the parser of all commands, with the defaults of a preset."""
    parser = ArgumentParser(
        prog="cnnrnn", version=__version__,
        description="CNN-RNN multi-label image classification: train, measure, predict.",
    )  # fmt: skip
    commands = parser.add_subcommands(required=False, dest="command")
    commands.add_subcommand("train", _train_parser(preset), help="train a model")
    commands.add_subcommand(
        "compare", _compare_parser(preset), help="train and measure the comparison methods"
    )
    commands.add_subcommand("evaluate", _evaluate_parser(), help="measure a model on labelled data")
    commands.add_subcommand(
        "report", _report_parser(), help="write a page that shows a model on labelled data"
    )
    commands.add_subcommand("predict", _predict_parser(), help="label images")
    commands.add_subcommand(
        "suggest", _suggest_parser(), help="name the labels that are worth asking about"
    )
    commands.add_subcommand(
        "labels", _labels_parser(), help="list a model's labels and what is near to each"
    )
    commands.add_subcommand(
        "explain", _explain_parser(), help="draw where in an image the steps of its path come from"
    )
    commands.add_subcommand("export", _export_parser(), help="write a model as an ONNX file")
    commands.add_subcommand("scenes", _scenes_parser(), help="write the synthetic scenes data set")
    data = ArgumentParser(description="Inspect a labelled data set.")
    commands.add_subcommand("data", data, help="inspect a labelled data set")
    actions = data.add_subcommands(required=True, dest="action")
    actions.add_subcommand("check", _data_check_parser(), help="what is in it, and what is wrong")
    commands.add_subcommand("check", ArgumentParser(), help="report what this installation has")
    return parser


def _command_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action=ConfigFile, help="YAML or JSON file with options")
    return parser


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=str, required=True,
        help="coco:ROOT, coco:FILE.json with --images, voc:ROOT, nuswide:ROOT, csv:FILE, "
        "folder:ROOT, jsonl:FILE, hf:PATH_OR_NAME, scenes:ROOT or features:FILE; docs/data.md has "
        "their options",
    )  # fmt: skip
    _add_images(parser)


def _add_images(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=str | None,
        help="image folder of a coco:, voc:, nuswide:, csv: or jsonl: source",
    )  # fmt: skip
    parser.add_argument(
        "--follow_links", action="store_true",
        help="follow links to pictures and folders that lead out of the image folder",
    )  # fmt: skip
    _add_max_pixels(parser)


def _add_max_pixels(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS,
        help="pictures of more pixels count as unreadable",
    )  # fmt: skip


def _train_parser(preset: str) -> ArgumentParser:
    parser = _command_parser("Train a model; writes best/, last/, log.jsonl and config.yaml.")
    _add_data(parser)
    parser.add_argument("--out", type=str, required=True, help="folder for the run")
    parser.add_argument(
        "--resume", action="store_true",
        help="resume the run in --out after the last epoch that it finished, or start it",
    )  # fmt: skip
    parser.add_argument(
        "--members", type=int, default=1, help="train an ensemble of this size, seeds in a row"
    )
    parser.add_argument(
        "--member_orders", type=str | None,
        help="label order of each member, such as frequency,rare,random; default: label_order's",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true",
        help="also write report.html, of the validation data, as `cnnrnn report` does",
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
        "results.json and table.md, and resumes where it was stopped."
    )
    _add_data(parser)
    defaults = CompareConfig()
    parser.add_argument("--out", type=str, required=True, help="folder for results and weights")
    parser.add_argument(
        "--seeds", type=str, default=",".join(map(str, defaults.seeds)),
        help="comma-separated seeds of the trained methods; the first one tunes",
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=str | None,
        help="comma-separated methods, as docs/comparison.md names them; default: all",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="also write report.html")
    # The two lists have commas; jsonargparse would ask for brackets.
    parser.add_class_arguments(CompareConfig, None, skip={"seeds", "methods"})
    _add_recipe(parser, preset)
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _command_parser("Measure a model on labelled data.")
    _add_data(parser)
    parser.add_argument("--model", type=str, required=True, help="checkpoint folder")
    parser.add_argument("--split", type=str, default="test", help="split of the data, or `all`")
    parser.add_argument("--k", type=int, default=3, help="also measure sets cut to k labels")
    parser.add_argument(
        "--reveal", type=int | None,
        help="also measure the other labels with so many true ones known of each image",
    )  # fmt: skip
    parser.add_argument("--per_label", type=str | None, help="write each label's figures as CSV")
    parser.add_argument("--json", type=str | None, help="write all metrics as JSON")
    parser.add_argument("--min_labels", type=int | None, help=MIN_LABELS)
    _add_run_options(parser, batch_size=128)
    _add_backend(parser)
    _add_search_device(parser)
    parser.add_argument("--workers", type=int | None, help=WORKERS)
    return parser


def _report_parser() -> ArgumentParser:
    parser = _command_parser(
        "Measure a model on labelled data and write one HTML page that shows what it does: "
        "training, decisions, each label, reliability, mistakes, suspected labels and more."
    )
    parser.add_argument("model", type=str, help="run or checkpoint folder")
    _add_data(parser)
    parser.add_argument("--split", type=str, default="test", help="split of the data, or `all`")
    parser.add_argument(
        "--out",
        type=str | None,
        help="HTML file to write; default: report.html in the run's folder",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    _add_on_bad_image(parser)
    _add_backend(parser)
    _add_search_device(parser)
    parser.add_argument("--workers", type=int | None, help=WORKERS)
    return parser


def _predict_parser() -> ArgumentParser:
    parser = _command_parser(
        "Label images. Standard output and tables get each result as it is ready, files in other "
        "forms appear at the end."
    )
    parser.add_argument("images", type=str, nargs="+", help="image files and folders")
    parser.add_argument(
        "--model", type=str | None,
        help="checkpoint folder, or FILE.onnx of `cnnrnn export`; default: the demo model",
    )  # fmt: skip
    parser.add_argument(
        "--format", type=Literal["table", "csv", "jsonl", "parquet"] | None,
        help="readable lines, CSV, JSON lines, or Parquet; default: by the suffix of --out, else "
        "readable lines",
    )  # fmt: skip
    parser.add_argument("--out", type=str | None, help="file to write; default: standard output")
    parser.add_argument(
        "--resume", action="store_true",
        help="keep what --out, or a run for it that was stopped, has of files that are unchanged",
    )  # fmt: skip
    parser.add_argument(
        "--scores", type=Literal["labels", "all"], default="labels",
        help="scores in CSV, JSON lines and Parquet: of the predicted labels, or of all",
    )  # fmt: skip
    parser.add_argument(
        "--sets",
        type=int | None,
        help="in CSV, JSON lines and Parquet, also write so many of the most probable label sets",
    )
    parser.add_argument(
        "--html", type=str | None,
        help="also write a page with small pictures, labels and scores, of the first 2,000 images",
    )  # fmt: skip
    parser.add_argument(
        "--sidecar", type=Literal["txt", "xmp"] | None,
        help="also write the labels beside each image: lines of text, or keywords (dc:subject) in "
        "the XMP file that is there, or a new one",
    )  # fmt: skip
    parser.add_argument(
        "--existing", type=Literal["skip", "append", "replace"], default="append",
        help="what to do with labels that a sidecar has: leave it as it is, add to them, or put "
        "these in their place",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", type=str, default=[], metavar="LABEL",
        help="a label that is not written to sidecars; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--neighbours", type=int | None,
        help="also name so many labels nearest to each image in the joint space, with cosines",
    )  # fmt: skip
    _add_known(parser)
    parser.add_argument("--top_k", type=int | None, help="keep at most this many labels")
    parser.add_argument("--min_labels", type=int | None, help=MIN_LABELS)
    parser.add_argument(
        "--decide", type=Decide, default="path",
        help="labels of the best path, those above the calibrated threshold or each label's own, "
        "the calibrated number of labels, or the set with the best expected F1",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float | None, help="on the scores; default: the calibrated one"
    )
    parser.add_argument("--workers", type=int | None, help=WORKERS)
    _add_backend(parser)
    _add_search_device(parser)
    parser.add_argument(
        "--precision", type=Precision, default="fp32",
        help="of the backbone; auto is bf16 where the hardware has it",
    )  # fmt: skip
    parser.add_argument(
        "--compiled", action="store_true", help="run the backbone through torch.compile"
    )
    _add_max_pixels(parser)
    parser.add_argument(
        "--search", type=Literal["onnx", "native", "compiled"], default="onnx",
        help="for FILE.onnx: search in ONNX Runtime, or with this package's CPU search (native; "
        "compiled is its former name)",
    )  # fmt: skip
    _add_run_options(parser, batch_size=64)
    return parser


def _add_known(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--known", action="append", type=str, default=[], metavar="LABEL",
        help="a label known to be present in every image; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--absent", action="append", type=str, default=[], metavar="LABEL",
        help="a label known to be absent from every image; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--known_from", type=str | None, metavar="csv:FILE",
        help="labels known to be present of each image, to be completed: a data set of images, "
        "such as a CSV",
    )  # fmt: skip


def _add_run_options(parser: ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--beam_size", type=int | None, help="N; default: the model's own")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="images per batch")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    _add_on_bad_image(parser)


def _add_on_bad_image(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--on_bad_image", type=OnBadImage, default="error",
        help="stop at an unreadable image, or report it and continue",
    )  # fmt: skip


def _add_backend(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--backend", type=Backend, default="auto",
        help="what runs the backbone: torch, on a CPU also onnx (ONNX Runtime) or openvino; auto "
        "takes the fastest where there are enough images",
    )  # fmt: skip


def _add_search_device(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--search_device", type=SearchDevice, default="auto",
        help="where to search; auto is the CPU, but for a model on a GPU on which the search has "
        "been measured",
    )  # fmt: skip


def _export_parser() -> ArgumentParser:
    parser = _command_parser("Write a model as one ONNX file, the beam search included.")
    parser.add_argument("checkpoint", type=str, help="checkpoint folder")
    parser.add_argument("file", type=str, help="ONNX file to write")
    parser.add_argument(
        "--input", type=Literal["uint8", "float", "features"] | None,
        help="decoded images, normalised images, or feature vectors for the head "
        "alone; default: uint8, and features for a model without a backbone",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=FilePrecision, default="float32",
        help="of backbone, trunk and projections; the search stays float32",
    )  # fmt: skip
    parser.add_argument("--loop", action="store_true", help="the search as an ONNX Loop")
    parser.add_argument(
        "--dynamic_size", action="store_true", help="images of any height and width"
    )
    parser.add_argument("--beam_size", type=int | None, help="N; default: the model's own")
    parser.add_argument("--max_labels", type=int | None, help="longest path; default: the model's")
    parser.add_argument(
        "--max_known", type=int, default=MAX_KNOWN,
        help="labels that may be known to be present in an image; 0 for absent ones alone",
    )  # fmt: skip
    parser.add_argument(
        "--marginal_places", type=int | None,
        help="live paths for each number of known labels still lacking, up to 64; default: the "
        "model's, or N",
    )  # fmt: skip
    return parser


def _scenes_parser() -> ArgumentParser:
    parser = _command_parser("Write the synthetic scenes data set in COCO format.")
    parser.add_argument("--out", type=str, required=True, help="folder to create")
    for split, count in (("train", 4000), ("val", 1000), ("test", 1000)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"{split} images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")
    parser.add_argument("--image_size", type=int, default=64, help="side in pixels")
    return parser


def _suggest_parser() -> ArgumentParser:
    parser = _command_parser(
        "Label images of which something is known, and name the labels to ask about next: those "
        "whose answer is expected to tell most about the label set."
    )
    parser.add_argument("images", type=str, nargs="+", help="image files and folders")
    parser.add_argument(
        "--model", type=str | None, help="checkpoint folder; default: the demo model"
    )
    _add_known(parser)
    parser.add_argument("--questions", type=int, default=3, help="labels to name, the best first")
    parser.add_argument(
        "--format", type=Literal["table", "jsonl"], default="table",
        help="readable lines, or JSON lines",
    )  # fmt: skip
    parser.add_argument("--out", type=str | None, help="file to write; default: standard output")
    parser.add_argument("--workers", type=int | None, help=WORKERS)
    _add_backend(parser)
    _add_search_device(parser)
    _add_max_pixels(parser)
    _add_run_options(parser, batch_size=64)
    return parser


def _labels_parser() -> ArgumentParser:
    parser = _command_parser(
        "List a model's labels in path order, with their thresholds and the labels nearest to each "
        "in the joint space, by cosine."
    )
    parser.add_argument("model", type=str, help="run or checkpoint folder, or `animals`")
    parser.add_argument("--nearest", type=int, default=5, help="how many to name; 0 for none")
    parser.add_argument(
        "--format", type=Literal["table", "csv", "jsonl"], default="table",
        help="readable lines, CSV with a row per pair, or JSON lines",
    )  # fmt: skip
    parser.add_argument("--out", type=str | None, help="file to write; default: standard output")
    return parser


def _explain_parser() -> ArgumentParser:
    parser = _command_parser(
        "Draw where in an image the steps of its label path come from: before the first label, and "
        "after each. docs/explain.md says how far to trust the methods."
    )
    parser.add_argument(
        "model",
        type=str,
        help="run or checkpoint folder, `animals`, or `scenes` for the demo model",
    )
    parser.add_argument("image", type=str, help="image file")
    parser.add_argument("--out", type=str, required=True, help="picture to write: PNG, JPEG, PDF")
    parser.add_argument(
        "--method",
        type=Literal["deconvolution", "label_deconvolution", "occlusion", "integrated_gradients"],
        default="deconvolution",
        help="deconvolution, the paper's, of the average of the label nodes; the others of a "
        "label's conditional score; deconvolutions are for networks of ReLUs",
    )  # fmt: skip
    parser.add_argument(
        "--label", type=str | None,
        help="explain this label wherever it may come next; default: the next label of the path; "
        "not for deconvolution",
    )  # fmt: skip
    parser.add_argument(
        "--path", action="append", type=str, metavar="LABEL",
        help="a label of the path to explain; may be given again; default: the best path",
    )  # fmt: skip
    parser.add_argument(
        "--known", action="append", type=str, default=[], metavar="LABEL",
        help="a label known to be present; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--absent", action="append", type=str, default=[], metavar="LABEL",
        help="a label known to be absent; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=int | None,
        help="side in pixels of the square that occlusion covers; default: an eighth of the input",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int | None, help="points of integrated gradients; default: 64"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    _add_max_pixels(parser)
    return parser


def _data_check_parser() -> ArgumentParser:
    parser = _command_parser("Read a whole source: what is in it, and what is wrong with it.")
    parser.add_argument("source", type=str, help="like --data of train")
    _add_images(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--labels", type=int, default=20, help="labels and pairs to show")
    parser.add_argument(
        "--all", action="store_true", help="list every problem, not the first three of a kind"
    )
    parser.add_argument("--json", type=str | None, help="write the whole report as JSON")
    parser.add_argument(
        "--suspects", type=str | None,
        help="look for wrong labels with --model and write them as CSV, the most suspicious first: "
        "image, label, given, suggested, log_odds",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=str | None,
        help="run or checkpoint folder that judges; in records that it was trained on, wrong "
        "labels look right: see --folds",
    )  # fmt: skip
    parser.add_argument(
        "--folds", type=int | None,
        help="train so many models by the recipe of --model, a run's folder: each record is judged "
        "by one that did not see it",
    )  # fmt: skip
    parser.add_argument(
        "--cut", type=float, default=0.0,
        help="suspect a label where the log-odds of the other answer, in nats, are at least this",
    )  # fmt: skip
    parser.add_argument("--split", type=str | None, help="judge this split alone; default: all")
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    return parser
