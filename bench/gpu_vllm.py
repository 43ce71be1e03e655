"""Time to first token in vLLM on a GPU: computed, found on the GPU, in vLLM's own offloading, in kvstore.

One request at a time, the shape of Llama-3-8B with dummy weights, prompts of random tokens. Each contestant is an
engine of its own in a fresh process, all in one run on one device. A prompt is asked once (computed, and stored), again
(found on the GPU), and, after the engine has dropped its own prefix cache, some times more (found in host memory). The
answer of a hit has to be the token of the first answer. What the stores cost shows in the first answer, against an
engine without a connector.

    python bench/gpu_vllm.py --out bench/results/h200/vllm.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
BYTES_A_TOKEN = 2 * 32 * 8 * 128 * 2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONHASHSEED": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
OFFLOADED_GIB = 24


def transfer_config(contestant: str, address: str) -> dict[str, Any] | None:
    """vLLM's --kv-transfer-config."""
    if contestant == "kvstore":
        extra: dict[str, Any] = {"address": address, "load": "always", "load_deadline_ms": 10_000.0}
        module = "kvstore_connectors.vllm.connector"
        return {"kv_connector": "KVStoreConnector", "kv_connector_module_path": module, "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}  # fmt: skip
    if contestant == "offloading":
        extra = {
            "block_size": 256,
            "cpu_bytes_to_use": OFFLOADED_GIB << 30,
            "num_cpu_blocks": (OFFLOADED_GIB << 30) // (256 * BYTES_A_TOKEN),
        }
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return None


def contest(options: argparse.Namespace) -> None:
    """Body of an engine's process: prints one JSON line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = transfer_config(options.contestant, options.address)
    engine = LLM(
        model=options.model, load_format="dummy", skip_tokenizer_init=True, attention_backend="FLASH_ATTN",
        max_model_len=max(options.tokens) + 64, enable_prefix_caching=True, gpu_memory_utilization=0.85,
        enforce_eager=options.eager, max_num_batched_tokens=options.chunk, seed=1,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)

    def ask(ids: list[int]) -> tuple[float, int, int]:
        begun = time.perf_counter()
        answer = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
        return time.perf_counter() - begun, int(answer.outputs[0].token_ids[0]), int(answer.num_cached_tokens or 0)

    def prompt(tokens: int, seed: int) -> list[int]:
        made = random.Random(seed)
        return [made.randrange(1000, 120_000) for _ in range(tokens)]

    ask(prompt(2048, 1))
    ask(prompt(max(options.tokens), 2))
    rows = []
    for tokens in options.tokens:
        full = [ask(prompt(tokens, 100 * tokens + i)) for i in range(options.rounds)]
        wanted = prompt(tokens, 100 * tokens)
        on_gpu = [ask(wanted) for _ in range(options.rounds)]
        row: dict[str, Any] = {
            "tokens": tokens,
            "full": [one[0] for one in full],
            "gpu_hit": [one[0] for one in on_gpu],
        }
        if transfer:
            time.sleep(1.0)  # stores are asynchronous
            hits = []
            for _ in range(options.rounds + 1):
                drop_prefix_cache(engine)
                hits.append(ask(wanted))
            row |= {"host_hit": [one[0] for one in hits[1:]], "first_host_hit": hits[0][0]}
            row |= {"cached_tokens": [one[2] for one in hits], "same_token": [one[1] == full[0][1] for one in hits]}
        rows.append(row)
        print(options.contestant, json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps(rows), file=out, flush=True)


def drop_prefix_cache(engine: Any) -> None:
    """Have the engine forget what it has computed; what a connector is still storing may hold it up for a while."""
    for _ in range(100):
        if engine.reset_prefix_cache():
            return
        time.sleep(0.05)
    raise SystemExit("the engine did not drop its prefix cache")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token on a GPU.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768, 65000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--graphs", dest="eager", action="store_false", help="with CUDA graphs")
    parser.add_argument("--contestants", nargs="+", default=["plain", "kvstore", "offloading"])
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds an engine may take")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options)
        return
    from common import running_daemon

    result: dict[str, Any] = {"command": " ".join(sys.argv), "rounds": options.rounds, "chunk": options.chunk}
    with tempfile.TemporaryDirectory() as place, running_daemon({"host.bytes": f"{OFFLOADED_GIB}GiB"}) as address:
        model = Path(place) / "llama3-8b"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA3_8B))
        for contestant in options.contestants:
            command = [sys.executable, __file__, "--contestant", contestant, "--model", str(model),
                       "--address", address,
                       "--rounds", str(options.rounds), "--chunk", str(options.chunk),
                       *([] if options.eager else ["--graphs"]), "--tokens", *map(str, options.tokens)]  # fmt: skip
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.timeout, check=True)
                result[contestant] = json.loads(done.stdout)
            except (subprocess.SubprocessError, json.JSONDecodeError) as error:
                result[contestant] = {"failed": str(error)[:500]}
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    table(result, options.contestants)


def table(result: dict[str, Any], contestants: list[str]) -> None:
    """Milliseconds, medians."""
    for contestant in contestants:
        rows = result[contestant]
        if isinstance(rows, dict):
            print(f"{contestant:<12} {rows}")
            continue
        for row in rows:
            shown = [
                f"{name} {median(row[name]) * 1e3:8.1f}" for name in ("full", "gpu_hit", "host_hit") if name in row
            ]
            extra = f"cached {row['cached_tokens'][-1]}, same {all(row['same_token'])}" if "host_hit" in row else ""
            print(f"{contestant:<12} {row['tokens']:>6} tokens  {'  '.join(shown)}  {extra}")


if __name__ == "__main__":
    main()
