"""Tensor parallelism: every rank keeps its own heads, and a block counts only if all ranks have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import ENVIRONMENT, Daemon
from model import tiny_llama


def run(model: Path, daemon: Daemon, ranks: int, mode: str = "async", script: str = "tp_engine.py") -> dict[str, Any]:
    """An engine's answers, from a process of its own: its workers are processes, too."""
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[i > 0] for i in range(ranks)),
    }
    environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    command = [sys.executable, str(Path(__file__).with_name(script)), str(model), daemon.address, str(ranks), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


SLOW = pytest.mark.skipif("KVSTORE_TEST_SLOW" not in os.environ, reason="set KVSTORE_TEST_SLOW=1: takes two minutes")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=SLOW)])
def test_each_rank_keeps_its_heads(daemon: Daemon, ranks: int) -> None:
    model = tiny_llama(heads=2 * ranks, kv_heads=ranks)
    told = run(model, daemon, ranks)
    assert told["cached"] == [0, 576]
    assert told["tokens"][0] == told["tokens"][1]
    metrics = told["metrics"]
    assert metrics["kvstore_saved_blocks"] == ranks * 9
    assert metrics["kvstore_loaded_blocks"] == ranks * 9
    assert metrics["external_prefix_cache_hits"] == 576
