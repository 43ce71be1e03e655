"""Every test of a kernel runs on the CPU, where it tests reference and checks, and on CUDA where that is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gpu_kit import device_names

SAMPLE = 6
"""On the CPU every layout takes the same way through the reference: one case in so many is enough there."""


@pytest.fixture(params=device_names())
def device(request: pytest.FixtureRequest) -> str:
    """Where the test runs."""
    torch.manual_seed(20)
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases on the CPU out, the same ones every time."""
    seen: Counter[str] = Counter()
    kept, dropped = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        on_cpu = getattr(item, "callspec", None) is not None and item.callspec.params.get("device") == "cpu"
        if on_cpu and "tests/gpu/" in item.nodeid:
            seen[function] += 1
            if seen[function] % SAMPLE != 1:
                dropped.append(item)
                continue
        kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
