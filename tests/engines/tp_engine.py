"""Run by test_vllm_ranks in a process of its own: a tensor-parallel engine that answers twice. Prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kit import engine, numbers, set_environment

set_environment()


def main(model: str, address: str, ranks: int, mode: str) -> None:
    """Ask one prompt twice, the second time without the engine's own cache."""
    extra = {"block_tokens": 64, "async_load": mode == "async"}
    with engine(Path(model), address, extra, tensor_parallel_size=ranks, max_num_batched_tokens=256) as vllm:
        answers = [vllm.ask(numbers(600), max_tokens=8)[0] for _ in range(2)]
        metrics = vllm.metrics()
    told = {"tokens": [a.tokens for a in answers], "cached": [a.cached for a in answers], "metrics": metrics}
    print("RESULT " + json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
