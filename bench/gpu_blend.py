"""First token of prompts made of chunks, on a GPU: blended in vLLM against full prefill, and where the time goes.

The shape of Llama-3-8B with dummy weights. Chunks are captured behind a system prompt, as a server would; then prompts
of all of them in an order of their own are asked, in turns computed in full and blended with 15 % of the reused tokens
computed again. Tokens are the words of files (``--text``), numbered as vocabularies do it, common ones first; without,
they are random, which no prompt is: equal words lead nowhere, and what is computed again stands alone everywhere.
Random weights say nothing of quality: the verdict that opens the gate here is made up, and docs/chunks.md has what was
measured on models.

    python bench/gpu_blend.py --text docs kvstore --out bench/results/h200/blend.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from gpu_vllm import ENVIRONMENT, SEED, drop_prefix_cache, prompt, shaped, wait_until_stored

SHARE = 0.15
CHUNK, SYSTEM, QUESTION = 512, 64, 64

Answered = tuple[float, Any]
"""Seconds until the first token, and the answer."""

Asked = Callable[[Callable[[], Answered], str], Answered]
"""Asks, given what asks and its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Blending on a GPU.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chunks", type=int, nargs="+", default=[31, 63], help="chunks of 512 tokens in a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", dest="eager", action="store_false", help="with CUDA graphs")
    parser.add_argument("--selectors", nargs="+", default=["auto", "v-deviation"])
    parser.add_argument("--reach", type=int, help="layers that questions are repaired in, as a verdict says (all)")
    parser.add_argument("--load", choices=("always", "faster"), default="always", help="faster: only what pays")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files, or folders of .md and .py files")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from common import running_daemon

    with tempfile.TemporaryDirectory() as place, running_daemon({"host.bytes": "64GiB"}) as address:
        model = shaped(Path(place))
        result = {"command": " ".join(sys.argv), "share": SHARE, "chunk_tokens": CHUNK}
        result["prompts"] = measure(model, address, Path(place) / "verdict.json", options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["prompts"]:
        shown = {name: f"{median(row[name]) * 1e3:.1f}" for name in ("full", *options.selectors)}
        print(row["tokens"], "tokens, ms:", shown, "seconds in parts:", row["parts"])
        print("  blended of", len(row["full"]), "prompts:", row["blended_prompts"])


def plainly(ask: Callable[[], Answered], name: str) -> Answered:
    """Ask, and nothing else."""
    return ask()


def measure(
    model: Path, address: str, verdict: Path, options: argparse.Namespace, asked: Asked = plainly
) -> list[dict[str, Any]]:
    """Capture, then ask in turns."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    extra = {"address": address, "load": options.load, "load_deadline_ms": 10_000.0, "lookup_deadline_ms": 1000.0,
             "blend_gate": str(verdict)}  # fmt: skip
    longest = SYSTEM + max(options.chunks) * CHUNK + QUESTION
    engine = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, attention_backend="FLASH_ATTN",
        max_model_len=longest + 64, enable_prefix_caching=True, gpu_memory_utilization=0.75, seed=SEED,
        enforce_eager=options.eager, max_num_batched_tokens=8192, disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVStoreConnector", kv_connector_module_path="kvstore_connectors.vllm.connector",
            kv_role="kv_both", kv_load_failure_policy="recompute", kv_connector_extra_config=extra,
        ),
    )  # fmt: skip
    open_gate(verdict, get_kv_transfer_group()._worker._namespace, options.reach)
    system = prompt(SYSTEM, 1)
    count = max(options.chunks)
    text = words(options.text, (count + options.rounds + 1) * CHUNK) if options.text else None
    chunks = [prompt(CHUNK, 50 + i) if text is None else text[i * CHUNK :][:CHUNK] for i in range(count)]
    questions = [
        prompt(QUESTION, 900 + i) if text is None else text[(count + i) * CHUNK :][:QUESTION]
        for i in range(options.rounds + 1)
    ]
    for chunk in chunks:
        span = (SYSTEM, SYSTEM + CHUNK)
        ask(engine, [*system, *chunk, *prompt(2, 2)], {"capture": True, "spans": [span]})
    time.sleep(2.0)
    return [one_length(engine, address, system, chunks[:count], questions, options, asked) for count in options.chunks]


def words(paths: list[Path], count: int) -> list[int]:
    """So many words of files, as tokens; punctuation and spaces are words, the most common one is number 1000."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.*")))]
    texts = [file.read_text() for file in files if file.suffix in (".md", ".py")]
    random.Random(SEED).shuffle(texts)
    found = [word for text in texts for word in re.findall(r"\w+|\s+|[^\w\s]", text)]
    if len(found) < count:
        raise SystemExit(f"--text: {len(found)} words are not the {count} that prompts of this length need")
    number = {word: 1000 + place for place, (word, _) in enumerate(Counter(found).most_common())}
    return [number[word] for word in found[:count]]


def one_length(
    engine: Any,
    address: str,
    system: list[int],
    chunks: list[list[int]],
    questions: list[list[int]],
    options: argparse.Namespace,
    asked: Asked,
) -> dict[str, Any]:
    """Prompts of so many chunks, in turns."""
    row: dict[str, Any] = {"tokens": SYSTEM + len(chunks) * CHUNK + QUESTION, "chunks": len(chunks), "full": []}
    row |= {name: [] for name in options.selectors}
    row["blended_prompts"] = dict.fromkeys(options.selectors, 0)
    before = counters(engine)
    blended = {}
    for number in range(options.rounds + 1):  # the first warms up
        order = random.Random(number).sample(chunks, len(chunks))
        ids = [*system, *(token for chunk in order for token in chunk), *questions[number]]
        spans = [(SYSTEM + i * CHUNK, SYSTEM + (i + 1) * CHUNK) for i in range(len(chunks))]
        for name in ("full", *options.selectors):
            wish = None if name == "full" else {"blend": True, "share": SHARE, "spans": spans, "selector": name}
            drop_prefix_cache(engine)
            wait_until_stored(address, 0.5)
            if number == 1 and name != "full":
                before = counters(engine)
            salt = f"{name}-{number}" if name == "full" else None
            seconds, answer = asked(partial(ask, engine, ids, wish, salt), f"{row['tokens']} tokens, {name}, {number}")
            if number:
                row[name].append(seconds)
            told = (answer.kv_transfer_params or {}).get("kvstore", {})
            if number and name != "full":
                row["blended_prompts"][name] += told["blended_tokens"] > 0
            if number == 1 and name != "full":
                after = counters(engine)
                blended[name] = {key: round(after[key] - before.get(key, 0), 4) for key in after
                                 if after[key] != before.get(key, 0)}  # fmt: skip
                blended[name]["told"] = told
    row["parts"] = blended
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def ask(engine: Any, ids: list[int], wish: dict[str, Any] | None, salt: str | None = None) -> Answered:
    """Ask for a prompt's first token."""
    from vllm import SamplingParams

    extra = None if wish is None else {"kv_transfer_params": {"kvstore": wish}}
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra)
    wanted: dict[str, Any] = {"prompt_token_ids": ids} | ({"cache_salt": salt} if salt else {})
    begun = time.perf_counter()
    answer = engine.generate([wanted], sampling, use_tqdm=False)[0]
    return time.perf_counter() - begun, answer


def open_gate(path: Path, namespace: Any, reach: int | None) -> None:
    """A verdict for random weights, which no probe could measure."""
    verdict = {"model": namespace.model, "revision": namespace.revision, "share": SHARE, "selector": "auto",
               "prompts": 1, "kl": 0.0, "top1": 1.0, "most_kl": 1.0, "least_top1": 0.0, "reach": reach}  # fmt: skip
    path.write_text(json.dumps(verdict))
    time.sleep(1.5)  # engines look at it once a second


def counters(engine: Any) -> dict[str, float]:
    """What the connector counts of blending."""
    return {
        one.name.removeprefix("vllm:kvstore_"): one.value
        for one in engine.get_metrics()
        if "kvstore" in one.name and hasattr(one, "value")
    }


if __name__ == "__main__":
    main()
