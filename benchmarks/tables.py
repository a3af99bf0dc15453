"""Make the tables in README.md and docs/ from measured figures.

    pytest benchmarks/ --benchmark-json=run.json
    python -m benchmarks.tables run.json benchmarks/results/cpu.json   # keeps what the tables need
    python -m benchmarks.tables benchmarks/results/cpu.json            # rewrites the tables

Those of methods are made from `benchmarks/results/comparison/` (results.json of `cnnrnn compare`,
one per data set) and `benchmarks/results/likelihood/` (the same with `--settings 1`, of the methods
that give probabilities to label sets), those of the recipe from `benchmarks/results/recipe.json`
(of benchmarks/quality/recipe.py), that of instructions from `benchmarks/results/instructions.json`
(of benchmarks/search/instructions.py), that of wrong labels from
`benchmarks/results/planted_errors.json` (of benchmarks/quality/planted_errors.py), those of
questions from `benchmarks/results/questions.json` (of benchmarks/quality/questions.py), those of
unknown labels from `benchmarks/results/unknown_labels.json` (of
benchmarks/quality/unknown_labels.py), those of nearest labels from
`benchmarks/results/neighbours.json` (of benchmarks/quality/neighbours.py), those of explanations
from `benchmarks/results/faithfulness.json` (of benchmarks/quality/faithfulness.py).

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality import neighbours
from benchmarks.quality.faithfulness import correlation_table, faithfulness_table
from benchmarks.quality.known_labels import table as known_table
from benchmarks.quality.planted_errors import table as planted_table
from benchmarks.quality.questions import table as questions_table
from benchmarks.quality.recipe import OF_ORDERS
from benchmarks.quality.recipe import table as recipe_table
from benchmarks.quality.unknown_labels import table as unknown_table
from cnnrnn.comparison import COLUMNS, Row, markdown_table, read_rows, table_cells

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            "data.md",
            "known_labels.md",
            "questions.md",
            "labels.md",
            "explain.md",
            "performance.md",
            "comparison.md",
            "training.md",
            "orders.md",
            "deployment.md",
            "tables/comparison.md",
        )
    ),
)
COMPARED = {
    "scene": "scenes", "animals": "VOC animals", "camvid": "street patches", "corel5k": "Corel-5k",
    "corel16k": "Corel-16k",
}  # fmt: skip
FORMER = ("coco",)  # measured with the recipe before this one
LIKELIHOOD = {
    "scene": "scenes", "animals": "VOC animals", "camvid": "street patches",
    "cocoweak": "COCO label sets, weak", "corel5k": "Corel-5k", "corel16k": "Corel-16k",
}  # fmt: skip
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Figures = dict[tuple[Any, ...], dict[str, Any]]
SIZES = [(80, True), (80, False), (1000, True), (1000, False)]
OPPONENTS = {
    "states per path": "torch, states per path",
    "states per path, compiled": "the same, torch.compile",
    "states per prefix": "torch, states per prefix",
    "states per prefix, compiled": "the same, torch.compile",
}


def reduce(run: dict[str, Any]) -> dict[str, Any]:
    """Keep of a run the machine and, per benchmark, its parameters, its median and its facts."""
    return {
        "machine": run["machine_info"],
        "commit": run["commit_info"]["id"],
        "date": run["datetime"][:10],
        "benchmarks": [
            {
                "name": one["name"].split("[")[0],
                "params": one["params"] or {},
                "median_s": _short(one["stats"]["median"]),
                "rounds": one["stats"]["rounds"],
                "facts": {key: _short(value) for key, value in one["extra_info"].items()},
            }
            for one in run["benchmarks"]
        ],
    }


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def figures(results: dict[str, Any]) -> Figures:
    """Index facts by test name and parameter values."""
    return {
        (one["name"], *one["params"].values()): {**one["facts"], "median_s": one["median_s"]}
        for one in results["benchmarks"]
    }


def _figure(all_figures: Figures, name: str, *values: Any) -> dict[str, Any]:
    """Find one figure by its test's name and parameters, in whatever order pytest lists them."""
    for key, facts in all_figures.items():
        if key[0] == name and sorted(map(repr, key[1:])) == sorted(map(repr, values)):
            return facts
    raise KeyError(f"no benchmark {name} with {values} in the results")


def _number(value: float) -> str:
    if value >= 10_000:
        return f"{round(value, -2):,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _size(num_labels: int, chain_term: bool) -> str:
    return f"{num_labels:,} labels, {'chain term' if chain_term else 'no chain term'}"


def throughput(results: dict[str, Any]) -> str:
    """Images per second of the CPU search, and of each opponent with the ratio to it."""
    all_figures = figures(results)
    header = ["", "table", "CPU search", *OPPONENTS.values()]
    rows = []
    for size in SIZES:
        for table, test in (("warm", "test_warm"), ("full hit", "test_full_hit"),
                            ("cold", "test_cold")):  # fmt: skip
            mine = _figure(all_figures, test, "native", *size)["images_per_second"]
            row = [_size(*size), table, f"**{_number(mine)}**"]
            for opponent in OPPONENTS:
                # Without kept states the table makes no difference: the warm run stands for all.
                of = "test_warm" if opponent.startswith("states per path") else test
                theirs = _figure(all_figures, of, opponent, *size)["images_per_second"]
                row.append(f"{_number(theirs)} ({mine / theirs:.3g}x)")
            rows.append(row)
    mine = _figure(all_figures, "test_adversarial", "native")["images_per_second"]
    row = ["1,000 labels", "adversarial", f"**{_number(mine)}**"]
    for opponent in OPPONENTS:
        theirs = _figure(all_figures, "test_adversarial", opponent)["images_per_second"]
        row.append(f"{_number(theirs)} ({mine / theirs:.3g}x)")
    return _table(header, [*rows, row])


def work(results: dict[str, Any]) -> str:
    """Operations, bytes and floor beside each figure of the CPU search."""
    all_figures = figures(results)
    header = (
        ",table,paths scored,vectors scored,states made,parents extended,hit rate,"
        "vector instructions,KB moved,floor|images/s,reached"
    )
    cases = [
        (_size(*size), table, _figure(all_figures, test, "native", *size))
        for size in SIZES
        for table, test in (
            ("warm", "test_warm"),
            ("full hit", "test_full_hit"),
            ("cold", "test_cold"),
        )  # fmt: skip
    ]
    cases.append(
        ("1,000 labels", "adversarial", _figure(all_figures, "test_adversarial", "native"))
    )
    rows = []
    for name, table, f in cases:
        row = [name, table, f"{f['rows']:.1f}", f"{f['vectors']:.1f}"]
        row += [f"{f['states_made']:.3g}", f"{f['parents_extended']:.3g}", f"{f['hit_rate']:.3f}"]
        row += [_number(f["vector_instructions"]), f"{f['bytes'] / 1000:.1f}"]
        rows.append(
            [*row, _number(f["floor_images_per_second"]), f"{100 * f['share_of_floor']:.0f} %"]
        )
    return _table([name.replace("|", ", ") for name in header.split(",")], rows)


def kept(results: dict[str, Any]) -> str:
    """What the prefix table holds at the end of a warm run."""
    all_figures = figures(results)
    rows = []
    for size in SIZES:
        facts = _figure(all_figures, "test_warm", "native", *size)
        rows.append([_size(*size), f"{facts['prefix_nodes']:,}",
                     f"{facts['prefix_bytes'] / 1e6:.0f} MB"])  # fmt: skip
    return _table(["", "prefixes", "memory"], rows)


def one_image(results: dict[str, Any]) -> str:
    """Microseconds of the public call with one image."""
    all_figures = figures(results)
    rows = []
    for size in SIZES:
        row = [_size(*size)]
        for images in ("seen", "unseen"):
            facts = _figure(all_figures, "test_one_image", images, *size)
            row += [f"{facts['p50_us']:.0f}", f"{facts['p99_us']:.0f}"]
        rows.append(row)
    return _table(["", "full hit, p50", "p99", "unseen image, p50", "p99"], rows)


def threads(results: dict[str, Any]) -> str:
    """Two threads against one."""
    all_figures = figures(results)
    rows = []
    for chain_term in (True, False):
        for table in ("full hit", "cold"):
            one, two = (
                _figure(all_figures, "test_threads", table, n, chain_term)["images_per_second"]
                for n in (1, 2)
            )
            rows.append([_size(80, chain_term), table, _number(one), _number(two),
                         f"{two / one:.2f}x"])  # fmt: skip
    return _table(["", "table", "one thread", "two threads", ""], rows)


def share(results: dict[str, Any]) -> str:
    """A backbone and the search on its features."""
    all_figures = figures(results)
    backbone, search = (
        1e3 * _figure(all_figures, "test_share_of_the_search", part)["median_s"]
        for part in ("resnet50", "search")
    )
    row = [f"{backbone:,.0f}", f"{search:.2f}", f"{100 * search / backbone:.3f} %"]
    return _table(["ResNet-50", "head and search", "share"], [row])


def summary(results: dict[str, Any]) -> str:
    """The README's table: 80 labels with the chain term."""
    all_figures = figures(results)
    rates = {
        name: _figure(all_figures, test, implementation, 80, True)["images_per_second"]
        for name, test, implementation in (
            ("the reference, image by image", "test_warm", "reference"),
            ("torch, states per path", "test_warm", "states per path"),
            ("torch, states per prefix, warm", "test_warm", "states per prefix"),
            ("the same, torch.compile", "test_warm", "states per prefix, compiled"),
            ("CPU search, cold", "test_cold", "native"),
            ("CPU search, warm", "test_warm", "native"),
            ("CPU search, full hit", "test_full_hit", "native"),
        )
    }
    strongest = max(rate for name, rate in rates.items() if not name.startswith("CPU search"))
    rows = [[name, _number(rate), f"{rate / strongest:.2g}"] for name, rate in rates.items()]
    return _table(["", "images/s", "ratio"], rows)


def machine(results: dict[str, Any]) -> str:
    """Say where and when the figures were measured."""
    about = results["machine"]
    return (
        f"{about['cpu']}, {about['instruction_sets'][0]}, torch {about['torch']}, "
        f"{results['date']}, commit {results['commit'][:7]}.\n"
    )


def comparison(data_set: str) -> str:
    """Every method on one data set."""
    return markdown_table(_rows(data_set)) + "\n"


def _rows(data_set: str) -> list[Row]:
    file = ROOT / "benchmarks" / "results" / "comparison" / f"{data_set}.json"
    return read_rows(file)


def best_of_all() -> str:
    """The README's table: this project's decisions beside the strongest of the other methods."""
    shown = {
        "CNN-RNN, thresholded": "**CNN-RNN, thresholded**",
        "CNN-RNN, best path": "**CNN-RNN, best path**",
        "no RNN, thresholded": "no RNN, thresholded",
        "binary cross-entropy": "binary cross-entropy",
        "Poly-1 loss": "Poly-1 loss",
        "asymmetric loss": "asymmetric loss",
        "squared error": "squared error",
        "probabilistic chain, thresholded": "probabilistic chain, thresholded",
    }
    wanted = [COLUMNS.index(name) for name in ("O-F1", "C-F1 own", "mAP", "exact match")]
    cells = {data_set: table_cells(_rows(data_set)) for data_set in COMPARED}
    rows = [
        [label, *(
            " / ".join(
                "–" if math.isnan(cells[d][title][i].mean) else f"{cells[d][title][i].mean:.1f}"
                for i in wanted
            )
            for d in COMPARED
        )]
        for title, label in shown.items()
    ]  # fmt: skip
    return _table(["", *COMPARED.values()], rows)


# Tables of the methods that give label sets a probability: the columns of the comparison, and the
# rows by what they are called there.
LIKELIHOOD_TABLES = {
    "likelihood": (("NLL",), {
        "binary cross-entropy": "independent: binary cross-entropy",
        "probabilistic chain, best set": "probabilistic chain, linear in the labels before",
        "no RNN, best path": "no RNN: the last label alone",
        "CNN-RNN, best path": "**CNN-RNN**",
    }),
    "likelihood-sets": (("exact match",), {
        "probabilistic chain, best set": "probabilistic chain, best set",
        "no RNN, best path": "no RNN, best path",
        "CNN-RNN, best path": "**CNN-RNN, best path**",
    }),
    "likelihood-decisions": (("O-F1", "C-F1 own", "mAP", "exact own"), {
        "binary cross-entropy": "binary cross-entropy",
        "probabilistic chain, thresholded": "probabilistic chain",
        "no RNN, thresholded": "no RNN",
        "CNN-RNN, thresholded": "**CNN-RNN**",
    }),
}  # fmt: skip


def likelihood(name: str) -> str:
    """What methods that give label sets a probability come to on each data set."""
    columns, shown = LIKELIHOOD_TABLES[name]
    cells = {data_set: table_cells(_likelihood_rows(data_set)) for data_set in LIKELIHOOD}

    def text(data_set: str, title: str) -> str:
        found = [cells[data_set][title][COLUMNS.index(column)] for column in columns]
        if len(found) > 1:
            return " / ".join(f"{cell.mean:.{cell.digits}f}" for cell in found)
        return f"{found[0].mean:.{found[0].digits}f} ± {found[0].error or 0:.{found[0].digits}f}"

    rows = [[label, *(text(d, title) for d in LIKELIHOOD)] for title, label in shown.items()]
    return _table(["", *LIKELIHOOD.values()], rows)


def _likelihood_rows(data_set: str) -> list[Row]:
    return read_rows(ROOT / "benchmarks" / "results" / "likelihood" / f"{data_set}.json")


# Rows of the table of what makes the recipe fit label dependency: variants of quality/recipe.py.
FIT = (
    "the recipe", "the embedding that scores labels read by the recurrence too",
    "features as they are", "features of size 1", "the best epoch by NLL alone",
    "the best epoch by decisions alone", "less dropout in the joint space",
)  # fmt: skip


def _fitted(data_set: str, variant: str, measure: str) -> list[float]:
    """Return a figure of a variant of the recipe, one for each seed."""
    file = ROOT / "benchmarks" / "results" / "recipe.json"
    return [
        result["figures"][measure]
        for result in json.loads(file.read_text(encoding="utf-8"))
        if (result["source"], result["variant"]) == (data_set, variant)
    ]


def fit() -> str:
    """What the new parts of the recipe contribute: NLL / exact match of the path / O-F1 / mAP."""
    shown = {d: LIKELIHOOD[d] for d in ("cocoweak", "corel16k")}

    def text(data_set: str, variant: str) -> str:
        nll = statistics.fmean(_fitted(data_set, variant, "NLL"))
        others = (statistics.fmean(_fitted(data_set, variant, m)) for m in
                  ("path exact", "O-F1", "mAP"))  # fmt: skip
        return " / ".join([f"{nll:.2f}", *(f"{100 * value:.1f}" for value in others)])

    rows = [[variant, *(text(d, variant) for d in shown)] for variant in FIT]
    return _table(["", *shown.values()], rows)


def paper() -> str:
    """What the paper's preset comes to, with its cell and an LSTM."""
    preset = "the paper's preset"

    def text(values: list[float]) -> str:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return f"{100 * statistics.fmean(values):.1f} ± {100 * error:.1f}"

    rows = [
        [label, *(text(_fitted(d, variant, measure)) for d in LIKELIHOOD)]
        for label, variant, measure in (
            ("best path not empty", preset, "path not empty"),
            ("O-F1 of the best path", preset, "path O-F1"),
            ("the same, an LSTM for the cell", f"{preset}, an LSTM for its cell", "path O-F1"),
        )
    ]
    of1 = [table_cells(_likelihood_rows(d))["binary cross-entropy"][COLUMNS.index("O-F1")]
           for d in LIKELIHOOD]  # fmt: skip
    rows.append(["binary cross-entropy", *(f"{c.mean:.1f} ± {c.error or 0:.1f}" for c in of1)])
    return _table(["", *LIKELIHOOD.values()], rows)


def decisions() -> str:
    """What each decision of the recipe's models comes to."""
    sets = {d: name for d, name in LIKELIHOOD.items() if _fitted(d, "the recipe", "mass")}

    def mean(data_set: str, measure: str) -> str:
        return f"{100 * statistics.fmean(_fitted(data_set, 'the recipe', measure)):.1f}"

    shown = {
        "`threshold`: O-F1 / C-F1": ("threshold O-F1", "threshold C-F1"),
        "`label_thresholds`: O-F1 / C-F1": ("label_thresholds O-F1", "label_thresholds C-F1"),
        "`path`: exact match / example-F1": ("path exact-match", "path example-F1"),
        "`f1`: exact match / example-F1": ("f1 exact-match", "f1 example-F1"),
        "mass of the sets found": ("mass",),
    }
    rows = [[label, *(" / ".join(mean(d, m) for m in measures) for d in sets)]
            for label, measures in shown.items()]  # fmt: skip
    return _table(["", *sets.values()], rows)


def recipe(data_set: str, rows: dict[str, str] | None = None, former: bool = False) -> str:
    """What each part of the recipe, or each order of labels, contributes on one data set."""
    file = ROOT / "benchmarks" / "results" / ("recipe_former.json" if former else "recipe.json")
    return recipe_table(json.loads(file.read_text(encoding="utf-8")), data_set, rows) + "\n"


def planted() -> str:
    """How well planted errors are found among the labels of three data sets."""
    file = ROOT / "benchmarks" / "results" / "planted_errors.json"
    sources = {"cocoweak": "COCO, weak", "corel16k": "Corel-16k", "coco": "COCO"}
    return planted_table(json.loads(file.read_text(encoding="utf-8")), sources) + "\n"


def questions(data_set: str) -> str:
    """How fast the label sets of a data set become certain as questions are answered."""
    file = ROOT / "benchmarks" / "results" / "questions.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    return questions_table(results, data_set, (0, 1, 2, 3, 5, 10)) + "\n"


def faithfulness(lay_out: Callable[[dict[str, Any]], str]) -> str:
    """Whether explanations show what a label's score comes from, by the boxes of scenes."""
    file = ROOT / "benchmarks" / "results" / "faithfulness.json"
    return lay_out(json.loads(file.read_text(encoding="utf-8"))) + "\n"


def unknown() -> str:
    """What it is worth to say that labels are unknown."""
    file = ROOT / "benchmarks" / "results" / "unknown_labels.json"
    sources = {"cocoweak": "COCO, weak", "coco": "COCO", "animals": "VOC animals"}
    return unknown_table(json.loads(file.read_text(encoding="utf-8")), sources) + "\n"


NEAR = {"coco": "COCO", "animals": "VOC animals"}


def _near() -> list[dict[str, Any]]:
    file = ROOT / "benchmarks" / "results" / "neighbours.json"
    results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return results


def near_names(source: str, recipe: str) -> str:
    """What is near to a dozen labels."""
    return neighbours.names_table(_near(), source, recipe) + "\n"


def known() -> str:
    """What one known label is worth, to each method that can use it."""
    names = {"cocoweak": "COCO, weak", "corel16k": "Corel-16k"}
    folder = ROOT / "benchmarks" / "results" / "comparison"
    return known_table({name: read_rows(folder / f"known-{d}.json") for d, name in names.items()})


def exact() -> str:
    """What the exact search proves, how right conditional marginals are, what candidates cover."""
    file = ROOT / "benchmarks" / "results" / "exact.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    names = {"scene": "scenes", "cocoweak": "COCO, weak", "corel16k": "Corel-16k",
             "corel5k": "Corel-5k"}  # fmt: skip

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [label, *(cell(result) for result in results)]

    rows = [
        row("labels", lambda r: f"{r['exact']['labels']}"),
        row("best set proved within 200 prefixes", lambda r: f"{r['exact']['certified']:.2%}"),
        row("prefixes scored, median / most", lambda r: f"{r['exact']['expansions, median']:.0f} "
            f"/ {r['exact']['expansions, most']:.0f}"),
        row("its time over a beam of 8", lambda r: "{:.2f}".format(
            r["exact"]["time of the best set over a beam of 8"])),
        *(row(f"best set missed by a beam of {n}", lambda r, n=n: "{:.2%}".format(
            r["exact"][f"best set missed by a beam of {n}"])) for n in (1, 4, 8)),
        *(row(f"error of marginals, {n} places, mean", lambda r, n=n: "{:.4f}".format(
            r["marginals"]["places"][n]["mean"])) for n in ("8", "16", "64")),
        *(row(f"true set among candidates of {c}", lambda r, c=c: "{:.3f}".format(
            r["candidates"][c]["covered"])) for c in ("0.5", "0.8", "0.9")),
        *(row(f"sets of {c}, median of at most 1,000", lambda r, c=c: "{:,.0f}".format(
            r["candidates"][c]["sets, median"])) for c in ("0.5", "0.9")),
    ]  # fmt: skip
    return _table(["", *(names[result["source"]] for result in results)], rows)


# Of an H200: multiprocessors, schedulers of each, and their clock in GHz.
H200_ISSUES = 132 * 4 * 1.98e9


def instructions() -> str:
    """What the CUDA search issues, counted, and how long an H200 takes to issue it at least."""
    file = ROOT / "benchmarks" / "results" / "instructions.json"
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    rows = []
    for large in (case for case in cases if case["batch"] == "large"):
        same = {key: large[key] for key in ("L", "chain_term", "precision")} | {"batch": "small"}
        small = next(case for case in cases if same.items() <= case.items())
        rows.append([
            f"{_size(large['L'], large['chain_term'])}, {large['precision']}",
            f"{large['paths_scored']:.1f}",
            *(f"{case[what]:,.0f}" for case in (large, small)
              for what in ("instructions", "products")),
            *(f"{1e6 * images * case['instructions'] / H200_ISSUES:,.0f} us"
              for images, case in ((65536, large), (4096, small))),
        ])  # fmt: skip
    header = ["", "paths scored", "instructions, large batch", "of them multiply-adds",
              "instructions, small batch", "of them multiply-adds", "B = 65,536, at least",
              "B = 4,096, at least"]  # fmt: skip
    return _table(header, rows)


def _deployed() -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / "deployment.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def deployment() -> str:
    """Rates and latencies of a deployed model, and what it takes over its backbone alone."""
    rows = _deployed()["latencies"]
    batches = sorted({row["batch"] for row in rows})
    header = [
        "",
        *(f"images/s, B = {b}" for b in batches),
        *(f"p50 / p99 ms, B = {b}" for b in batches),
        *(f"over backbone, B = {b}" for b in batches),
    ]
    table = []
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [next(r for r in rows if r["what"] == what and r["batch"] == b) for b in batches]
        over = [f"{100 * (r['over_backbone'] - 1):+.1f} %" if "over_backbone" in r else ""
                for r in own]  # fmt: skip
        if what == "search":
            over = [f"{100 * r['share_of_torch']:.2f} % of torch" for r in own]
        table.append(
            [what, *(_number(r["images_per_second"]) for r in own),
             *(f"{_number(r['p50_ms'])} / {_number(r['p99_ms'])}" for r in own), *over]
        )  # fmt: skip
    return _table(header, table)


def deployment_summary() -> str:
    """The README's: one image and 64."""
    rows = _deployed()["latencies"]

    def cell(what: str, batch: int) -> dict[str, Any]:
        return next(r for r in rows if r["what"] == what and r["batch"] == batch)

    table = []
    for what in dict.fromkeys(row["what"] for row in rows):
        if what != "search":
            one, many = cell(what, 1), cell(what, 64)
            over = f"{100 * (many['over_backbone'] - 1):+.1f} %" if "over_backbone" in many else ""
            table.append([what, f"{_number(one['p50_ms'])} / {_number(one['p99_ms'])}",
                          f"{many['images_per_second']:.1f}", over])  # fmt: skip
    header = ["", "one image, p50 / p99 ms", "batches of 64, images/s", "over the backbone alone"]
    return _table(header, table)


def deployment_predict() -> str:
    """Predict over files beside its parts."""
    header = ["backbone", "decoding alone, images/s", "backbone alone", "bound", "predict",
              "of the bound"]  # fmt: skip
    rows = [
        [r["backbone_name"], _number(r["decoding"]), _number(r["backbone"]),
         _number(1 / (1 / r["decoding"] + 1 / r["backbone"])), _number(r["predict"]),
         f"{100 * r['of_bound']:.0f} %"]
        for r in _deployed()["throughput"]
    ]  # fmt: skip
    return _table(header, rows)


def _engines() -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / "engines.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


ENGINE_NAMES = {
    "torch fp32": "torch", "onnx fp32": "ONNX Runtime", "openvino fp32": "OpenVINO",
    "torch bf16": "torch, bf16", "openvino bf16": "OpenVINO, bf16",
}  # fmt: skip


def engines() -> str:
    """Files to labels by engine."""
    results = _engines()
    speed = results["files to labels"]
    rows = [["timm's loop, torch", _number(speed["timm"]), "1"]]
    rows += [
        [f"`predict`, {title}", _number(speed[way]), f"{speed[way] / speed['timm']:.1f}"]
        for way, title in ENGINE_NAMES.items()
        if way in speed
    ]
    return _table(["", "images/s", "over timm's loop"], rows)


def deployment_machine() -> str:
    """Say where and when the deployment figures were measured."""
    results = _deployed()
    about = results["machine"]
    return (
        f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, ONNX Runtime "
        f"{about['onnxruntime']}, {results['date']}, commit {results['commit'][:7]}.\n"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": machine, "throughput": throughput, "work": work, "kept": kept,
    "one-image": one_image, "threads": threads, "share": share, "summary": summary,
    **{f"comparison-{d}": lambda results, d=d: comparison(d) for d in (*COMPARED, *FORMER)},
    "comparison": lambda results: best_of_all(),
    **{name: lambda results, name=name: likelihood(name) for name in LIKELIHOOD_TABLES},
    "fit": lambda results: fit(),
    "paper": lambda results: paper(),
    "decisions": lambda results: decisions(),
    "recipe-scene": lambda results: recipe("scene"),
    "recipe-animals": lambda results: recipe("animals"),
    "recipe-camvid": lambda results: recipe("camvid", former=True),
    "orders-scene": lambda results: recipe("scene", OF_ORDERS),
    "orders-animals": lambda results: recipe("animals", OF_ORDERS),
    "orders-camvid": lambda results: recipe("camvid", OF_ORDERS, former=True),
    "planted-errors": lambda results: planted(),
    "known-labels": lambda results: known(),
    "unknown-labels": lambda results: unknown(),
    "exact": lambda results: exact(),
    "neighbours": lambda results: neighbours.table(_near(), NEAR) + "\n",
    "neighbours-images": lambda results: neighbours.image_table(_near(), NEAR) + "\n",
    "neighbours-coco": lambda results: near_names("coco", "the default recipe"),
    "neighbours-coco-paper": lambda results: near_names("coco", "the paper's preset"),
    "neighbours-animals": lambda results: near_names("animals", "the default recipe"),
    "faithfulness": lambda results: faithfulness(faithfulness_table),
    "faithfulness-steps": lambda results: faithfulness(correlation_table),
    "questions-cocoweak": lambda results: questions("cocoweak"),
    "questions-corel16k": lambda results: questions("corel16k"),
    "instructions": lambda results: instructions(),
    "deployment": lambda results: deployment(),
    "deployment-summary": lambda results: deployment_summary(),
    "deployment-predict": lambda results: deployment_predict(),
    "engines": lambda results: engines(),
    "deployment-machine": lambda results: deployment_machine(),
}  # fmt: skip


def filled(page: str, results: dict[str, Any]) -> str:
    """Return a page's text with every table made from `results`."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]](results) + m[3], page)


def main() -> None:
    """Reduce a run's JSON, or rewrite the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of pytest-benchmark, or what was kept")
    parser.add_argument("target", type=Path, nargs="?", help="keep there what the tables need")
    options = parser.parse_args()
    source = json.loads(options.results.read_text(encoding="utf-8"))
    if options.target is not None:
        target = options.target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(reduce(source), indent=1) + "\n", encoding="utf-8")
        return
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), source), encoding="utf-8")


if __name__ == "__main__":
    main()
