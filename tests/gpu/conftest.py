"""Every test of a kernel runs on the CPU, where it tests reference and checks, and on CUDA where that is."""

from __future__ import annotations

import pytest
import torch
from gpu_kit import device_names


@pytest.fixture(params=device_names())
def device(request: pytest.FixtureRequest) -> str:
    """Where the test runs."""
    torch.manual_seed(20)
    return request.param
