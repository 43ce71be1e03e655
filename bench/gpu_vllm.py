"""Time to first token in vLLM on a GPU: computed, found on the GPU, in vLLM's own offloading, in kvstore.

The shape of Llama-3-8B with dummy weights, prompts of random tokens. Each contestant is an engine of its own in a fresh
process, all in one run on one device; kvstore's have a daemon each. Three questions:

- one request: a prompt is asked once (computed, and stored), again (found on the GPU), and, after the engine has
  dropped its own prefix cache, some times more (found in host memory). The answer of a hit has to be the token of the
  first answer. What the stores cost shows in the first answer, against an engine without a connector.
- eight at once, all of them in host memory: until the last has its first token, and the slowest of them.
- many that generate: what storing as they go costs a step, and how much is stored. With little host memory
  (--host-gib 8) the later rounds store into memory that is pinned already.

``kv4`` is kvstore with blocks that the engine stores encoded. Random weights cannot be measured for what that costs in
quality, so the profile it needs says nothing of quality; see docs/codecs.md for models that can.

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
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
SEED = 1
Ask = Callable[..., list[Any]]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONHASHSEED": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
CHAIN = "prerope|kv4"
TOGETHER, TOGETHER_TOKENS = 8, 16384
GENERATING, GENERATED = 64, 256
QUESTIONS = ("one", "together", "generating")


def transfer_config(contestant: str, address: str, host_gib: int) -> dict[str, Any] | None:
    """vLLM's --kv-transfer-config."""
    if contestant in ("kvstore", "kv4"):
        extra: dict[str, Any] = {"address": address, "load": "always", "load_deadline_ms": 10_000.0}
        if contestant == "kv4":
            extra |= {"fidelity": "lossy:bench", "chain": CHAIN}
        module = "kvstore_connectors.vllm.connector"
        return {"kv_connector": "KVStoreConnector", "kv_connector_module_path": module, "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}  # fmt: skip
    if contestant == "offloading":
        extra = {
            "block_size": 256,
            "cpu_bytes_to_use": host_gib << 30,
            "num_cpu_blocks": (host_gib << 30) // (256 * BYTES_A_TOKEN),
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

    transfer = transfer_config(options.contestant, options.address, options.host_gib)
    engine = LLM(
        model=options.model, load_format="dummy", skip_tokenizer_init=True, attention_backend="FLASH_ATTN",
        max_model_len=max(*options.tokens, TOGETHER_TOKENS) + 64, enable_prefix_caching=True,
        gpu_memory_utilization=0.85,
        enforce_eager=options.eager, max_num_batched_tokens=options.chunk, seed=SEED, disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )  # fmt: skip

    def ask(prompts: list[list[int]], count: int = 1) -> list[Any]:
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
        return engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    ask([prompt(2048, 1)])
    ask([prompt(max(options.tokens), 2)])
    stored = partial(wait_until_stored, options.address)
    result: dict[str, Any] = {}
    if "one" in options.questions:
        result["one"] = [
            one_request(engine, ask, stored, tokens, options.rounds, bool(transfer)) for tokens in options.tokens
        ]
    if "together" in options.questions:
        result["together"] = together(engine, ask, stored, bool(transfer))
    if "generating" in options.questions:
        result["generating"] = generating(ask, options.rounds)
    if options.contestant in ("kvstore", "kv4"):
        result["connector"] = counters(engine)
    print(json.dumps(result), file=out, flush=True)


def prompt(tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    made = random.Random(seed)
    return [made.randrange(1000, 120_000) for _ in range(tokens)]


def wait_until_stored(address: str, quiet_s: float = 1.5) -> None:
    """Wait until what was computed is stored: the daemon has had no new block for a while; else for some seconds."""
    from kvstore import KVStoreClient

    time.sleep(quiet_s)
    if not address:
        return
    with KVStoreClient(address) as client:
        before, now = -1, 0
        while before != now:
            time.sleep(quiet_s)
            before, now = now, client.stats()["tiers"]["host"]["stored"]


def one_request(
    engine: Any, ask: Ask, stored: Callable[[], None], tokens: int, rounds: int, connected: bool
) -> dict[str, Any]:
    """Seconds to the first token of prompts that are nowhere, on the GPU, in host memory."""

    def timed(ids: list[int]) -> tuple[float, int, int]:
        begun = time.perf_counter()
        answer = ask([ids])[0]
        return time.perf_counter() - begun, int(answer.outputs[0].token_ids[0]), int(answer.num_cached_tokens or 0)

    full = [timed(prompt(tokens, 100 * tokens + i)) for i in range(rounds)]
    wanted = prompt(tokens, 100 * tokens + rounds - 1)
    row: dict[str, Any] = {
        "tokens": tokens,
        "full": [one[0] for one in full],
        "gpu_hit": [timed(wanted)[0] for _ in range(rounds)],
    }
    if connected:
        stored()
        hits = []
        for _ in range(rounds + 1):
            drop_prefix_cache(engine)
            hits.append(timed(wanted))
        row |= {"host_hit": [one[0] for one in hits[1:]], "first_host_hit": hits[0][0]}
        row |= {"cached_tokens": [one[2] for one in hits], "same_token": [one[1] == full[-1][1] for one in hits]}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def together(engine: Any, ask: Ask, stored: Callable[[], None], connected: bool) -> dict[str, Any]:
    """Several requests at once: computed, and from host memory."""
    prompts = [prompt(TOGETHER_TOKENS, 7000 + i) for i in range(TOGETHER)]

    def timed() -> dict[str, Any]:
        begun = time.perf_counter()
        answers = ask(prompts)
        first = sorted(answer.metrics.first_token_latency for answer in answers)
        return {"all": time.perf_counter() - begun, "first_tokens": first,
                "cached": sum(answer.num_cached_tokens or 0 for answer in answers)}  # fmt: skip

    row = {"requests": TOGETHER, "tokens": TOGETHER_TOKENS, "full": timed()}
    if connected:
        stored()
        hits = []
        for _ in range(3):
            drop_prefix_cache(engine)
            hits.append(timed())
        row["host_hit"] = hits
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def generating(ask: Ask, rounds: int) -> dict[str, Any]:
    """Many requests that generate: seconds a step, of each round the median over requests; what was pinned meanwhile.

    Most of them wait a step or two for prompts of others; `decode_step` is of those whose prompts were the last.
    """
    from kvstore_gpu import host

    steps, least, pinned = [], [], []
    for number in range(rounds):
        before = host.registered()[1]
        prompts = [prompt(512, 9000 + 100 * number + i) for i in range(GENERATING)]
        answers = ask(prompts, GENERATED)
        found = [(a.metrics.last_token_ts - a.metrics.first_token_ts) / (GENERATED - 1) for a in answers]
        steps.append(median(found))
        least.append(min(found))
        pinned.append((host.registered()[1] - before) * host.WINDOW)
    row = {"requests": GENERATING, "tokens": GENERATED, "step": steps, "decode_step": least,
           "pinned_bytes": pinned}  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def counters(engine: Any) -> dict[str, float]:
    """What the connector counted."""
    return {one.name: one.value for one in engine.get_metrics() if "kvstore" in one.name and hasattr(one, "value")}


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
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--graphs", dest="eager", action="store_false", help="with CUDA graphs")
    parser.add_argument("--contestants", nargs="+", default=["plain", "offloading", "kvstore", "kv4"])
    parser.add_argument("--host-gib", type=int, default=56, help="host memory of each")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds an engine may take")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options)
        return
    result: dict[str, Any] = {"command": " ".join(sys.argv), "rounds": options.rounds, "chunk": options.chunk}
    with tempfile.TemporaryDirectory() as place:
        model = shaped(Path(place))
        for contestant in options.contestants:
            try:
                result[contestant] = run(contestant, model, Path(place), options)
            except (subprocess.SubprocessError, json.JSONDecodeError) as error:
                result[contestant] = {"failed": str(error)[:500]}
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    table(result, options.contestants)


def shaped(place: Path) -> Path:
    """A folder that vLLM takes for a model of this shape."""
    model = place / "llama3-8b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA3_8B))
    return model


def settings_for(contestant: str, model: Path, place: Path, host_gib: int) -> dict[str, str]:
    """Of the daemon that a contestant needs."""
    settings = {"host.bytes": f"{host_gib}GiB"}
    if contestant == "kv4":
        settings["codecs.profiles"] = str(write_profile(model, place / "profiles"))
    return settings


def run(contestant: str, model: Path, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One contestant in a process of its own, with a daemon if it needs one."""
    from common import running_daemon

    settings = settings_for(contestant, model, place, options.host_gib)
    needed = running_daemon(settings) if contestant in ("kvstore", "kv4") else nullcontext("")
    with needed as address:
        command = [sys.executable, __file__, "--contestant", contestant, "--model", str(model), "--address", address,
                   "--rounds", str(options.rounds), "--chunk", str(options.chunk), "--host-gib", str(options.host_gib),
                   *([] if options.eager else ["--graphs"]), "--tokens", *map(str, options.tokens),
                   "--questions", *options.questions]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.timeout, check=True)
        return json.loads(done.stdout)


def write_profile(model: Path, folder: Path) -> Path:
    """A profile that lets `CHAIN` run on random weights."""
    from kvstore.profile import Profile, Rung, save_profile
    from kvstore.rope import rotary

    code = (
        "import sys; from vllm.config import ModelConfig; from kvstore_connectors.vllm.identity import model_identity;"
        f"c = ModelConfig(model=sys.argv[1], skip_tokenizer_init=True, seed={SEED}, max_model_len=4096);"
        "print(); print('\t'.join(model_identity(c, dummy=True)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    name, revision = done.stdout.strip().splitlines()[-1].split("\t")
    rung = Rung(CHAIN, 0, 0.0, 0.0, 1.0, 0.0, 3.5, 1.0, 1.0)
    rotation = list(rotary(LLAMA3_8B).frequencies)
    profile = Profile(name="bench", model=name, revision=revision, layers=32, kv_heads=8, head_dim=128,
                      frequencies=rotation, rungs=[rung])  # fmt: skip
    save_profile(profile, folder)
    return folder


def table(result: dict[str, Any], contestants: list[str]) -> None:
    """Milliseconds, medians."""
    for contestant in contestants:
        found = result[contestant]
        if "failed" in found:
            print(f"{contestant:<10} {found}")
            continue
        for row in found.get("one", []):
            shown = [
                f"{name} {median(row[name]) * 1e3:8.1f}" for name in ("full", "gpu_hit", "host_hit") if name in row
            ]
            extra = ""
            if "host_hit" in row:
                extra = f"first hit {row['first_host_hit'] * 1e3:.1f}, cached {row['cached_tokens'][-1]}, "
                extra += f"same {all(row['same_token'])}"
            print(f"{contestant:<10} {row['tokens']:>6} tokens  {'  '.join(shown)}  {extra}")
        if "together" in found:
            group = found["together"]
            hits = [f"{hit['all'] * 1e3:.0f} (slowest {hit['first_tokens'][-1] * 1e3:.0f}, cached {hit['cached']})"
                    for hit in group.get("host_hit", [])]  # fmt: skip
            print(f"{contestant:<10} {group['requests']} at once: computed {group['full']['all'] * 1e3:.0f}  {hits}")
        if "generating" in found:
            group = found["generating"]
            for name in ("step", "decode_step"):
                print(f"{contestant:<10} {name} of {GENERATING}: {[round(step * 1e3, 3) for step in group[name]]} ms")
            print(f"{contestant:<10} GiB pinned meanwhile: {[round(n / 2**30, 2) for n in group['pinned_bytes']]}")


if __name__ == "__main__":
    main()
