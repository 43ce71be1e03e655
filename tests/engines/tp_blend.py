"""Run by test_vllm_blend_ranks in a process of its own: an engine of several ranks that blends. Prints JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kit import engine, numbers, set_environment

set_environment()

SYSTEM, DOCS, QUESTION = numbers(128, 90), [numbers(150, seed) for seed in range(91, 94)], numbers(40, 95)


def main(model: str, address: str, ranks: int) -> None:
    """Capture three documents, then blend a prompt of them."""
    import msgspec

    from kvstore_connectors.vllm.blend_gate import Verdict
    from kvstore_connectors.weights import weights_digest

    folder = Path(model)
    verdict = Verdict(
        model=folder.name,
        revision=f"sample:{weights_digest(folder)}",
        share=0.0,
        selector="question",
        prompts=1,
        kl=0.0,
        top1=1.0,
        most_kl=0.1,
        least_top1=0.9,
    )
    gate = Path(tempfile.mkdtemp()) / "verdict.json"
    gate.write_bytes(msgspec.json.encode(verdict))
    extra = {"block_tokens": 64, "blend_gate": str(gate), "lookup_deadline_ms": 5000, "tenant": f"ranks{ranks}"}
    with engine(folder, address, extra, tensor_parallel_size=ranks, max_num_batched_tokens=256) as vllm:

        def ask(prompt: list[int], wish: dict[str, Any]) -> Any:
            return vllm.ask(prompt, max_tokens=8, extra_args={"kv_transfer_params": {"kvstore": wish}})[0]

        for doc in DOCS:
            ask(doc, {"capture": True, "spans": [[0, len(doc)]]})
        prompt = [*SYSTEM, *DOCS[2], *DOCS[0], *DOCS[1], *QUESTION]
        answers = [ask(prompt, {"blend": True, "share": share}) for share in (0.15, 0.5)]
        metrics = vllm.metrics()
    told = {"tokens": [a.tokens for a in answers], "cached": [a.cached for a in answers], "metrics": metrics}
    print("RESULT " + json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
