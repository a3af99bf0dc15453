"""What one known label is worth: a table and a picture of `cnnrnn compare`'s results.

    cnnrnn compare --data features:corel16k.npz --out corel16k --settings 1 --methods \
        cnn-rnn,no-rnn,bce,cooccurrence,pcc,dependency-network,crf,combinations
    python -m benchmarks.quality.known_labels Corel-16k=corel16k/results.json --out known_labels.png

The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnnrnn.comparison import Row, read_rows

MEASURE = "example-AP"
SHOWN = {
    "cnn-rnn": "**CNN-RNN**",
    "no-rnn": "no RNN: the last label alone",
    "cooccurrence": "independent + co-occurrence",
    "combinations": "label combinations",
    "crf": "pairwise CRF",
    "dependency-network": "conditional dependency network",
    "pcc": "probabilistic chain",
    "bce": "independent: binary cross-entropy",
}


def means(rows: Sequence[Row], method: str) -> list[tuple[float, float] | None]:
    """Return mean and standard error over seeds, in per cent: with none known and with one."""
    found = {row.seed: row for row in rows if row.method == method}.values()
    pairs: list[tuple[float, float] | None] = []
    for name in ("others", "others_given"):
        values = [100 * getattr(row, name)[MEASURE] for row in found if getattr(row, name)]
        if not values:
            pairs.append(None)
            continue
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        pairs.append((statistics.fmean(values), error))
    return pairs


def _measured(results: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Return the methods that all results have, with their names."""
    common = set.intersection(*({row.method for row in rows} for rows in results.values()))
    return {method: label for method, label in SHOWN.items() if method in common}


def table(results: Mapping[str, Sequence[Row]]) -> str:
    """Lay out as Markdown what each method gains by one known label on each data set."""

    def cell(value: tuple[float, float] | None) -> str:
        return "cannot use it" if value is None else f"{value[0]:.1f} ± {value[1]:.1f}"

    header = [f"{name}, {count} known" for name in results for count in ("none", "one")]
    lines = ["| example-AP | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for method, label in _measured(results).items():
        cells = [cell(value) for rows in results.values() for value in means(rows, method)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Draw the table's figures: a bar to what each method has with none known, on to one known."""
    import matplotlib.pyplot as plt

    shown = _measured(results)
    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 3.4), sharey=True, squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        for at, method in enumerate(reversed(shown)):
            none, one = means(rows, method)
            assert none is not None
            colour = "#c44e52" if method == "cnn-rnn" else "#4c72b0"
            axis.barh(at, none[0], color="#c7c7c7")
            if one is not None:
                axis.barh(at, max(one[0] - none[0], 0), left=none[0], color=colour)
                axis.text(one[0] + 0.5, at, f"{one[0]:.1f}", va="center", fontsize=9)
            else:
                axis.text(none[0] + 0.5, at, "cannot use it", va="center", fontsize=9)
        labels = [label.strip("*") for label in reversed(shown.values())]
        axis.set_yticks(range(len(shown)), labels)
        axis.set_title(name)
        axis.set_xlabel("average precision of the other labels, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
    figure.suptitle("none known (grey), and what one known label adds", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Print the table of results files, and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="NAME=results.json")
    parser.add_argument("--out", type=Path, help="PNG or SVG to draw")
    options = parser.parse_args()
    pairs = [text.partition("=") for text in options.results]
    results = {name: read_rows(Path(file)) for name, _, file in pairs}
    print(table(results), end="")
    if options.out is not None:
        draw(results, options.out)


if __name__ == "__main__":
    main()
