"""Fixtures shared by the tests."""

from __future__ import annotations

import pytest
import torch

# Tests are small: more threads only wait for one another, badly so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a test should pass on; without a GPU the CUDA half skips."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
