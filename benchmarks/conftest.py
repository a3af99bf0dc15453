"""One thread, and a machine described by what bears on the figures."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnrnn import _C


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest benchmarks/ --full` runs what `make bench` runs."""
    parser.addoption(
        "--full", action="store_true", help="all benchmarks, on well trained heads (half an hour)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Without `--full` the closing table stands in the place of pytest-benchmark's own."""
    config.addinivalue_line("markers", "full: a benchmark that only `--full` runs")
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet |= not config.getoption("--full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the benchmarks, and say in one sentence what they need where it is missing."""
    timed = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
    if timed and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "the benchmarks need pytest-benchmark: pip install pytest-benchmark"
        )
    left_out = [item for item in timed if item.get_closest_marker("full")]
    if left_out and not config.getoption("--full"):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Close with images per second, and how often that is the strongest of torch."""
    session = getattr(config, "_benchmarksession", None)  # pytest-benchmark's
    measured = {
        (b.params["num_labels"], b.params["implementation"], b.name.split("[")[0][5:]): rate
        for b in (session.benchmarks if session else ())
        if (b.params or {}).get("chain_term") and (rate := b.extra_info.get("images_per_second"))
        and "implementation" in b.params
    }  # fmt: skip
    if measured:
        terminalreporter.section("images per second, and ratio to the strongest torch")
        for line in closing_table(measured):
            terminalreporter.write_line(line)


def closing_table(measured: dict[tuple[int, str, str], float]) -> list[str]:
    """Lay out rates by number of labels, implementation and state of the prefix table."""
    tables = ("cold", "warm", "full_hit")
    lines = [f"{'':45}" + "".join(f"{name.replace('_', ' '):>18}" for name in tables)]
    for num_labels in sorted({labels for labels, _, _ in measured}):
        names = [name for labels, name, _ in measured if labels == num_labels]
        for name in dict.fromkeys(names):
            shown = "this search" if name == "native" else f"torch, {name}"
            cells = []
            for table in tables:
                rate = measured.get((num_labels, name, table))
                of_torch = [
                    value for (labels, other, where), value in measured.items()
                    if labels == num_labels and where == table and other != "native"
                ]  # fmt: skip
                ratio = f"{rate / max(of_torch):8.2f}" if rate and of_torch else " " * 8
                cells.append(f"{rate:10,.0f}{ratio}" if rate else " " * 18)
            lines.append(f"L = {num_labels:<5}{shown:<36}" + "".join(cells).rstrip())
    return lines


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Say what bears on the figures; host names do not."""
    return {
        "cpu": processor(),
        "instruction_sets": _C.instruction_sets(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
