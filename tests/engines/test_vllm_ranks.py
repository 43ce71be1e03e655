"""Tensor parallelism: every rank keeps its own heads, a block counts only if all ranks have it, and all choose the same
tokens, so two say what one says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tp_engine
from kit import ENVIRONMENT, Daemon
from model import tiny_llama

SLOW = pytest.mark.skipif("KVSTORE_TEST_SLOW" not in os.environ, reason="set KVSTORE_TEST_SLOW=1: takes a minute")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=SLOW)])
def test_each_rank_keeps_its_heads_and_blends_as_one_does(daemon: Daemon, ranks: int) -> None:
    model = tiny_llama(heads=2 * ranks, kv_heads=ranks)
    told = answers_of(model, daemon, ranks)
    twice = told["twice"]
    assert twice["cached"] == [0, 576]
    assert twice["tokens"][0] == twice["tokens"][1]
    assert twice["metrics"]["kvstore_saved_blocks"] == ranks * 9
    assert twice["metrics"]["kvstore_loaded_blocks"] == ranks * 9
    assert twice["metrics"]["external_prefix_cache_hits"] == 576
    with tp_engine.of_ranks(model, daemon.address, 1) as alone:
        one = tp_engine.blended(alone)
    assert one["cached"] == told["blended"]["cached"] == [128 + 450 + 39] * 2
    assert one["tokens"] == told["blended"]["tokens"]
    for blended, by in ((one, 1), (told["blended"], ranks)):
        assert blended["metrics"]["kvstore_blend_failures"] == 0
        assert blended["metrics"]["kvstore_captured_chunks"] == 3 * by
        reused = (450 - 68) + (450 - 225)  # 15 % and 50 % are computed again
        assert blended["metrics"]["kvstore_blend_reused_tokens"] == reused * by


def answers_of(model: Path, daemon: Daemon, ranks: int) -> dict[str, Any]:
    """What an engine of several ranks says, from a process of its own: its workers are processes, too."""
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[i > 0] for i in range(ranks)),
    }
    environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    command = [sys.executable, tp_engine.__file__, str(model), daemon.address, str(ranks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))
