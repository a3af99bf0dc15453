"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests are small: more threads only wait for one another, badly so on a busy machine.
torch.set_num_threads(1)

# A shell starts what runs in its background with Ctrl-C ignored, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a long run try more than the daily one: `pytest --searches 10000 --mutations 2000`."""
    parser.addoption(
        "--searches", type=int, default=1000, help="random searches to hold against float64"
    )
    parser.addoption(
        "--mutations", type=int, default=300, help="broken data files to read, over all formats"
    )
    parser.addoption(
        "--attacks", action="store_true", help="as many tries as docs/reliability.md reports"
    )
    parser.addoption("--kills", type=int, default=5, help="training runs to kill and resume")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep exported backbones of tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNNRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter, as `tmp_path` is not; see `tests.nobody`."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        for parent, _, _ in os.walk(name):
            os.chmod(parent, 0o755)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a test should pass on; without a GPU the CUDA half skips."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
