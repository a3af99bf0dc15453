"""The commands and options that README.md and docs/ show are those of the command line."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from cnnrnn.cli import _underscored
from cnnrnn.cli.options import make_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
REST = "--data coco:ROOT --out OUT"  # what `...` stands for

COMMANDS = sorted({
    match[1].split("  #")[0].strip().replace(" ...", f" {REST}")
    for line in TEXT.replace("\\\n", "").splitlines()
    if (match := re.match(r"    (?:torchrun .*-m )?cnnrnn (.*)", line))
})  # fmt: skip


def parses(words: list[str]) -> None:
    make_parser("ours").parse_args(_underscored(words))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_one(command):
    parses(shlex.split(command))


def test_a_wrong_option_would_fail():
    with pytest.raises(SystemExit):
        parses(shlex.split(f"train {REST} --best-of 3"))


def test_shown_options_exist():
    """Those in running text, of any command; what is of other programs is named here."""
    parser = make_parser("ours")
    known = {"--config", "--print_config"}
    todo = [parser]
    while todo:
        for action in todo.pop()._actions:
            known.update(_underscored(action.option_strings))
            if isinstance(action.choices, dict):
                todo += action.choices.values()
    others = {
        "--no-build-isolation",
        "--help",
        "--backbone-trunk-dim",
        "--attacks",
        "--kills",
        "--mutations",
    }  # of pytest in this project
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    shown = {
        option
        for code in re.findall(r"`([^`]+)`", prose)
        if not re.match(r"(python|pytest|pip|torchrun|uv)\b", code)
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)
    }
    assert len(shown) > 40
    assert {o for o in shown if _underscored([o])[0] not in known} - others == set()


def test_shown_modules_exist():
    modules = set(re.findall(r"python -m\s+((?:benchmarks|tests)[\w.]*)", TEXT))
    assert len(modules) > 5
    assert [m for m in modules if importlib.util.find_spec(m) is None] == []


def test_shown_python_is_python():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "a page", "exec")
