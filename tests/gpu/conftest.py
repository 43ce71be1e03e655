"""Every test runs on the reference, on the kernels under an emulator, and on CUDA where that is."""

from __future__ import annotations

import os
from collections import Counter

import emulator
import pytest
import torch

from kvstore_gpu import compile as compiler

SAMPLE = {"cpu": 6, "emulated": 9}
"""Without a GPU one case in so many is run: the reference treats all layouts alike, and the emulator is slow."""

WATCHED = SAMPLE | {"cuda": 7}
"""The same under compute-sanitizer, where a case takes many times as long (`make sanitize-gpu`)."""


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors of the test lie."""
    torch.manual_seed(20)
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"
    if request.param == "emulated":
        if emulator.COMPILER is None:
            pytest.skip("no g++")
        monkeypatch.setattr(compiler, "emulator", emulator.launch)
    return "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases out, the same ones every time; none with KVSTORE_GPU_TESTS=all, some on CUDA too with =watched."""
    chosen = os.environ.get("KVSTORE_GPU_TESTS")
    if chosen == "all":
        return
    sample = WATCHED if chosen == "watched" else SAMPLE
    seen: Counter[tuple[str, str]] = Counter()
    kept, dropped = [], []
    for item in items:
        where = getattr(item, "callspec", None) and item.callspec.params.get("device")  # type: ignore[attr-defined]
        if where in sample and "tests/gpu/" in item.nodeid:
            function = item.nodeid.partition("[")[0]
            seen[function, where] += 1
            if seen[function, where] % sample[where] != 1:
                dropped.append(item)
                continue
        kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
