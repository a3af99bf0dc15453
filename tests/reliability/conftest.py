"""What the jobs read, made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets and trained runs, see `jobs.write_sources`."""
    pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("sources")
    run = subprocess.run(
        [sys.executable, "-m", "tests.reliability.jobs", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return folder
