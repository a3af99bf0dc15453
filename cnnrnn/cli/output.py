"""What the command line writes: tables, predictions, JSON and YAML."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cnnrnn.deployment.rows import Csv, JsonLines, RowOptions, record_of
from cnnrnn.machine.files import writing
from cnnrnn.machine.words import listed
from cnnrnn.prediction.result import Prediction

TABLE_METRICS = ("C-P", "C-R", "C-F1", "O-P", "O-R", "O-F1", "MAP@10", "mAP", "mAP-11pt",
                 "exact-match", "example-F1")  # fmt: skip
NAMES_SHOWN = 10
STANDARD_OUTPUT = "standard output"
LABELS_ALONE = RowOptions()


def say(line: str) -> None:
    """Print a line of a run's progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def write_json(file: str, values: Any, ascii_only: bool = False) -> None:
    """Write values to a file; names of files may be bytes that are no text, and need escapes."""
    text = json.dumps(values, indent=2, ensure_ascii=ascii_only) + "\n"
    with writing(file):
        Path(file).write_text(text, encoding="utf-8")


def yaml_text(values: dict[str, Any]) -> str:
    """Write values as YAML, in their order."""
    import yaml

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def uncalibrated_line(names: list[str], num_labels: int) -> str:
    """Name labels without a threshold of their own, the first of many."""
    return (
        f"{len(names)} of {num_labels} labels are too rare for a threshold of their own and have "
        f"the common one: {listed(names, NAMES_SHOWN)}"
    )


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


def others_table(others: dict[str, dict[str, float]]) -> str:
    """Lay out the measures of labels that were not revealed, in per cent: a row by what is known.

    Args:
        others: as `Evaluation.others`.
    """
    first = next(iter(others.values()))
    names = ("example-AP", "label-mAP", "O-F1")
    lines = [
        f"labels that are not known, of {first['images']:,.0f} images (O-F1 at its best cut here):",
        " " * 16 + "".join(f"{name:>12}" for name in names),
    ]
    for known, values in others.items():
        lines.append(f"{known:<16}" + "".join(f"{100 * values[name]:12.1f}" for name in names))
    return "\n".join(lines)


@contextmanager
def opened(path: str | None) -> Iterator[IO[str]]:
    """Open a file to write, or standard output for None."""
    # A file name may be bytes that are no text: they leave as they came.
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        with writing(STANDARD_OUTPUT):
            yield sys.stdout
        return
    with (
        writing(path),
        open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        yield stream


def prediction_writer(
    form: str,
    stream: IO[str],
    options: RowOptions = LABELS_ALONE,
    labels: Sequence[str] = (),
) -> Callable[[Prediction], None]:
    """Return what writes a prediction in a form: table, csv or jsonl.

    Args:
        form: of the text.
        stream: takes it.
        options: what is written beside the labels.
        labels: the model's, for the columns of CSV with all scores.
    """
    if form == "csv":
        table, rows = Csv(options, labels), csv.writer(stream)
        rows.writerow(table.header)
        return lambda p: rows.writerow(table.row(record_of(p, options)))
    if form == "jsonl":
        lines = JsonLines(options, labels)
        return lambda p: print(lines.row(record_of(p, options)), file=stream)

    def line(p: Prediction) -> None:
        scores = p.scores
        shown = ", ".join(f"{name} {scores[name]:.2f}" for name in p.labels) or "(no labels)"
        if options.neighbours and p.error is None:
            near = p.neighbours(options.neighbours)
            shown += "; near: " + ", ".join(f"{name} {cosine:.2f}" for name, cosine in near)
        print(f"{p.source:<40}  {p.error or shown}", file=stream)

    return line


def _pairs(near: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": name, "cosine": round(cosine, 4)} for name, cosine in near]


def write_labels(
    form: str,
    thresholds: dict[str, float],
    near: dict[str, list[tuple[str, float]]],
    stream: IO[str],
) -> None:
    """Write a model's labels in a form: table, csv or jsonl.

    Args:
        form: of the text.
        thresholds: of each label, in path order.
        near: of each label, the nearest ones with cosines; empty where they are not asked for.
        stream: takes the text.
    """
    if form == "csv":
        rows = csv.writer(stream)
        rows.writerow(["label", "threshold", *(["nearest", "cosine"] if near else [])])
        for name, cut in thresholds.items():
            cells = [name, f"{cut:.4g}"]
            if near:
                pairs = [[other, f"{cosine:.4f}"] for other, cosine in near[name]] or [["", ""]]
                rows.writerows([*cells, *pair] for pair in pairs)
            else:
                rows.writerow(cells)
        return
    width = max(len(name) for name in ("label", *thresholds))
    if form == "table":
        print(
            f"{'label':<{width}}  threshold{'  nearest, with cosine' if near else ''}", file=stream
        )
    for name, cut in thresholds.items():
        if form == "jsonl":
            record: dict[str, Any] = {"label": name, "threshold": round(cut, 4)}
            if near:
                record["nearest"] = _pairs(near[name])
            print(json.dumps(record, ensure_ascii=False), file=stream)
            continue
        shown = ", ".join(f"{other} {cosine:.2f}" for other, cosine in near.get(name, []))
        print(f"{name:<{width}}  {cut:9.2f}  {shown}".rstrip(), file=stream)


def question_writer(form: str, count: int, stream: IO[str]) -> Callable[[Prediction], None]:
    """Return what writes a prediction and its next questions in a form: table or jsonl."""
    from cnnrnn.inspection.questions import next_questions

    def write(p: Prediction) -> None:
        questions = next_questions(p, count)
        if form == "jsonl":
            record = record_of(p, LABELS_ALONE)
            if p.error is None:
                record["questions"] = [question._asdict() for question in questions]
            print(json.dumps(record, ensure_ascii=False), file=stream)
            return
        labels = ", ".join(p.labels) or "(no labels)"
        asked = ", ".join(f"{q.label} {q.score:.2f}" for q in questions) or "nothing"
        print(f"{p.source:<40}  {p.error or f'{labels}; ask: {asked}'}", file=stream)

    return write


def require_folder(name: str, file: str | None) -> None:
    """Fail where the folder of a file that an option names is missing."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--{name} {file} must be in a folder that exists")
