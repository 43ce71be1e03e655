"""Blending under tensor parallelism: all ranks choose the same tokens, so two say what one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit import Daemon
from model import tiny_llama
from test_vllm_ranks import run


def blend(model: Path, daemon: Daemon, ranks: int) -> dict[str, Any]:
    return run(model, daemon, ranks, script="tp_blend.py")


@pytest.mark.slow
def test_two_ranks_blend_as_one_does(daemon: Daemon) -> None:
    model = tiny_llama()
    one, two = (blend(model, daemon, ranks) for ranks in (1, 2))
    assert one["cached"] == two["cached"] == [128 + 450 + 39] * 2
    assert one["tokens"] == two["tokens"]
    for told, ranks in ((one, 1), (two, 2)):
        assert told["metrics"]["kvstore_blend_failures"] == 0
        assert told["metrics"]["kvstore_captured_chunks"] == 3 * ranks
        reused = (450 - 68) + (450 - 225)  # 15 % and 50 % are computed again
        assert told["metrics"]["kvstore_blend_reused_tokens"] == reused * ranks
