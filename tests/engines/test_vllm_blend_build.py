"""What `kvstore build` stores, a real vLLM finds and blends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kit import Daemon, engine, numbers

SYSTEM = numbers(100, 70)
DOCS = [numbers(150, seed) for seed in range(71, 75)]
QUESTION = numbers(30, 76)


def prompt_of(order: tuple[int, ...]) -> list[int]:
    return [*SYSTEM, *(token for one in order for token in DOCS[one]), *QUESTION]


def test_built_probed_and_blended(daemon: Daemon, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_connectors.vllm.blend_gate.LOOK_S", 0.0)
    monkeypatch.setattr("kvstore_connectors.vllm.blend_scheduler.MOST_COMPUTED", 1.0)
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"tokens": doc}) + "\n" for doc in DOCS), "utf-8")
    (tmp_path / "system.jsonl").write_text(json.dumps({"tokens": SYSTEM}), "utf-8")
    verdict = tmp_path / "verdict.json"
    command = [sys.executable, "-m", "kvstore", "build", str(tmp_path / "docs.jsonl"), "--model", str(tiny)]
    command += ["--system", str(tmp_path / "system.jsonl"), "--address", daemon.address, "--json"]
    closed, opened = (prompt_of(order) for order in ((2, 0, 3), (3, 1, 0)))
    extra = {"block_tokens": 64, "blend_gate": str(verdict), "lookup_deadline_ms": 2000, "tenant": "build"}
    with engine(tiny, daemon.address, extra) as vllm:
        assert vllm.connected()

        def ask(prompt: list[int]) -> tuple[list[int], int]:
            wish = {"kv_transfer_params": {"kvstore": {"blend": True, "share": 1.0}}}
            answer = vllm.ask(prompt, extra_args=wish)[0]
            return answer.tokens, answer.cached

        truth = [vllm.ask(prompt, salt="aside")[0].tokens for prompt in (closed, opened)]
        vllm.ask(numbers(70, 77), max_tokens=1)  # introduces the engine
        built = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert (built["total"], built["computed"], built["skipped"]) == (4, 600, 0)
        assert ask(closed) == (truth[0], 0)
        # The tiny model is random, and what blending a part costs there is no matter: measure with everything.
        done = subprocess.run(
            [*command, "--probe", str(verdict), "--share", "1"], capture_output=True, text=True, check=True
        )
        again = json.loads(done.stdout)
        assert (again["skipped"], again["computed"]) == (4, 0)
        assert again["verdict"]["kl"] < 1e-5
        before = vllm.metrics()
        assert ask(opened) == (truth[1], len(opened) - 1)
        after = vllm.metrics()
        assert after["kvstore_blend_prompts"] == before["kvstore_blend_prompts"] + 1
        assert after["kvstore_blend_failures"] == before["kvstore_blend_failures"]
