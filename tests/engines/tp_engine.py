"""Engines of one rank or several, and what is asked of them: the same prompt twice, then chunks put together.

Run by the tests of ranks in a process of its own, it prints what an engine of several ranks answered, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit import Engine, engine, numbers, set_environment

set_environment()

SYSTEM, DOCS, QUESTION = numbers(128, 90), [numbers(150, seed) for seed in range(91, 94)], numbers(40, 95)


@contextmanager
def of_ranks(model: Path, address: str, ranks: int) -> Iterator[Engine]:
    """An engine that may blend."""
    import msgspec

    from kvstore_connectors.vllm.blend_gate import Verdict
    from kvstore_connectors.weights import weights_digest

    verdict = Verdict(
        model=model.name,
        revision=f"sample:{weights_digest(model)}",
        share=0.0,
        selector="question",
        prompts=1,
        kl=0.0,
        top1=1.0,
        most_kl=0.1,
        least_top1=0.9,
    )
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder) / "verdict.json"
        gate.write_bytes(msgspec.json.encode(verdict))
        extra = {"block_tokens": 64, "blend_gate": str(gate), "lookup_deadline_ms": 5000, "tenant": f"ranks{ranks}"}
        with engine(model, address, extra, tensor_parallel_size=ranks, max_num_batched_tokens=256) as vllm:
            yield vllm


def twice(vllm: Engine) -> dict[str, Any]:
    """One prompt, and once more without the engine's own cache."""
    return _told([vllm.ask(numbers(600), max_tokens=8)[0] for _ in range(2)], vllm)


def blended(vllm: Engine) -> dict[str, Any]:
    """Three documents are captured, then a prompt of them is blended with each of two shares."""

    def ask(prompt: list[int], wish: dict[str, Any]) -> Any:
        return vllm.ask(prompt, max_tokens=8, extra_args={"kv_transfer_params": {"kvstore": wish}})[0]

    for doc in DOCS:
        ask(doc, {"capture": True, "spans": [[0, len(doc)]]})
    prompt = [*SYSTEM, *DOCS[2], *DOCS[0], *DOCS[1], *QUESTION]
    return _told([ask(prompt, {"blend": True, "share": share}) for share in (0.15, 0.5)], vllm)


def _told(answers: list[Any], vllm: Engine) -> dict[str, Any]:
    return {"tokens": [a.tokens for a in answers], "cached": [a.cached for a in answers], "metrics": vllm.metrics()}


if __name__ == "__main__":
    with of_ranks(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])) as several:
        print("RESULT " + json.dumps({"twice": twice(several), "blended": blended(several)}))
