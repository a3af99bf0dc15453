"""The tables of figures in the documentation are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables as table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_made_from_the_committed_run(page):
    text = page.read_text(encoding="utf-8")
    assert table.BLOCK.search(text)
    assert table.filled(text, RESULTS) == text, "run `python -m benchmarks.tables` on the results"


def test_every_table_is_shown_somewhere():
    shown = {m[2] for page in table.PAGES for m in table.BLOCK.finditer(page.read_text("utf-8"))}
    assert shown == set(table.TABLES)


def test_a_changed_figure_changes_the_table():
    changed = json.loads(json.dumps(RESULTS))
    for one in changed["benchmarks"]:
        if "images_per_second" in one["facts"]:
            one["facts"]["images_per_second"] *= 2
    assert table.summary(changed) != table.summary(RESULTS)
    assert table.threads(changed) != table.threads(RESULTS)
