"""SmolLM2-135M in vLLM on a GPU: what it answers over KV from kvstore, against what it answers when all is computed.

Real weights and real text: Python's own reference and library, so that a wrong byte would show in the words. Each case
is an engine and a daemon of its own. Every prompt, alone and with greedy sampling, is asked three times:

- computed: under a salt of its own, so that nothing of any other prompt is found (no token may come from a cache);
- stored: without a salt, where what it shares with prompts before it is loaded already;
- loaded, after the engine has dropped its own prefix cache: all whole blocks come from kvstore, and their number has to
  be told by the engine.

The engine computes in chunks of a block's tokens, so what is left after a load is computed in the shape it has in full
prefill, and all tokens have to be identical, in float32 and in bfloat16. (Where a prompt ends with a block all but one
token is loaded; that shape is another, so in bfloat16 its answer only counts.) Lossy chains are measured, not judged.

    python bench/gpu_smollm2.py --model SmolLM2-135M-Instruct --out bench/results/h200/smollm2.json

It ends with an error if an exact case is not identical, or something was not loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gpu_vllm import ENVIRONMENT, drop_prefix_cache

BLOCK = 256
GENERATED = 32
LENGTHS = (1003, 1024, 1025, 1279, 1280, 1281, 1500, 1777, 2047, 2048, 2049, 2311, 2600, 2815, 3001, 3333, 3584, 3840,
           4095, 4096)  # fmt: skip
SHARED = ((700, (1100, 1471)), (1536, (2000, 2822)), (2048, (3100, 4001)))
"""Tokens that prompts begin with together, and how long each of them is."""


@dataclass(frozen=True)
class Case:
    """An engine to ask."""

    dtype: str
    graphs: bool = False
    chain: str = ""

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.chain or 'raw'}{', CUDA graphs' if self.graphs else ''}"


CASES = {
    "float32": Case("float32"),
    "float32-graphs": Case("float32", graphs=True),
    "bfloat16": Case("bfloat16"),
    "bfloat16-graphs": Case("bfloat16", graphs=True),
    "kv4": Case("bfloat16", chain="prerope|kv4"),
    "fp8": Case("bfloat16", chain="fp8"),
}


def prompts(model: Path, longest: int) -> list[list[int]]:
    """Token ids of pieces of text, no two of them from the same place but for what is shared."""
    from tokenizers import Tokenizer

    from kvstore_connectors.blend.samples import builtin_texts

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in builtin_texts().values()]
    at = [0] * len(texts)

    def piece(number: int, tokens: int) -> list[int]:
        kind = number % len(texts)
        at[kind] += tokens
        if at[kind] > len(texts[kind]):
            raise SystemExit(f"the texts have only {len(texts[kind])} tokens")
        return texts[kind][at[kind] - tokens : at[kind]]

    found = [piece(number, tokens) for number, tokens in enumerate(LENGTHS) if tokens <= longest]
    for number, (shared, lengths) in enumerate(SHARED):
        if max(lengths) <= longest:
            common = piece(number, shared)
            found += [common + piece(number + i, tokens - shared) for i, tokens in enumerate(lengths)]
    return found


# -- an engine's process -----------------------------------------------------------------------------------------------


def contest(options: argparse.Namespace) -> None:
    """Ask one engine; prints one JSON line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "2"})
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    case = CASES[options.case]
    extra: dict[str, Any] = {"address": options.address, "load": "always", "block_tokens": BLOCK,
                             "load_deadline_ms": 10_000.0, "lookup_deadline_ms": 2000.0,
                             "save_deadline_ms": 2000.0}  # fmt: skip
    if case.chain:
        extra |= {"fidelity": "lossy:bench", "chain": case.chain}
    # Several engines share the device: each says what it keeps, and asks for no more of what is free.
    room: dict[str, Any] = (
        {"kv_cache_memory_bytes": 2 << 30, "gpu_memory_utilization": 0.2} if options.device == "cuda" else {}
    )
    engine = LLM(
        model=str(options.model), skip_tokenizer_init=True, dtype=case.dtype, seed=0,
        max_model_len=options.longest + 2 * GENERATED, max_num_batched_tokens=BLOCK, max_num_seqs=8,
        enable_prefix_caching=True, enforce_eager=not case.graphs, disable_log_stats=False, **room,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVStoreConnector", kv_connector_module_path="kvstore_connectors.vllm.connector",
            kv_role="kv_both", kv_load_failure_policy="recompute", kv_connector_extra_config=extra,
        ),
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True, detokenize=False)

    def ask(ids: list[int], salt: str = "") -> tuple[list[int], int]:
        asked: dict[str, Any] = {"prompt_token_ids": ids} | ({"cache_salt": salt} if salt else {})
        drop_prefix_cache(engine)
        answer = engine.generate([asked], sampling, use_tqdm=False)[0]
        return list(answer.outputs[0].token_ids), int(answer.num_cached_tokens or 0)

    asked = prompts(options.model, options.longest)
    result = {"name": case.name, "prompts": rounds(ask, asked)}
    result["connector"] = {one.name: one.value for one in engine.get_metrics()
                           if "kvstore" in one.name and hasattr(one, "value")}  # fmt: skip
    print(json.dumps(result), file=out, flush=True)


def rounds(ask: Callable[..., tuple[list[int], int]], asked: list[list[int]]) -> list[dict[str, Any]]:
    """What became of each prompt."""
    computed = [ask(ids, salt=f"computed {number}") for number, ids in enumerate(asked)]
    stored = [ask(ids) for ids in asked]
    time.sleep(2.0)  # stores are asynchronous
    loaded = [ask(ids) for ids in asked]
    rows = []
    for ids, (wanted, cached), (first, shared), (found, hit) in zip(asked, computed, stored, loaded, strict=True):
        rows.append({
            "tokens": len(ids), "computed_cached": cached, "shared_cached": shared, "loaded": hit,
            "whole_blocks": min(len(ids) // BLOCK * BLOCK, len(ids) - 1), "equal_shapes": len(ids) % BLOCK != 0,
            "stored_agreed": agreed(first, wanted), "agreed": agreed(found, wanted),
        })  # fmt: skip
    return rows


def agreed(found: list[int], wanted: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), len(wanted))


# -- all of them -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2 over loaded KV.")
    parser.add_argument("--model", type=Path, required=True, help="directory: config.json, tokenizer.json, weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--longest", type=int, default=4096, help="leave out prompts of more tokens")
    parser.add_argument("--together", type=int, default=3, help="engines at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds an engine may take")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        contest(options)
        return
    result: dict[str, Any] = {"command": " ".join(sys.argv), "device": device_name(options.device)}
    result |= {"block_tokens": BLOCK, "generated": GENERATED, "cases": {}}
    with ThreadPoolExecutor(options.together) as pool:
        for name, found in zip(options.cases, pool.map(lambda name: run(name, options), options.cases), strict=True):
            result["cases"][name] = found
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name:<16} {found['verdict']}", flush=True)
    if any(not found["passed"] for found in result["cases"].values()):
        raise SystemExit("not as it has to be")


def device_name(device: str) -> str:
    """The card, for the record."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own, with a daemon of its own, and what is to be said of it."""
    from common import running_daemon

    with tempfile.TemporaryDirectory() as place:
        settings = {"host.bytes": "8GiB" if options.device == "cuda" else "1GiB"}
        if CASES[name].chain:
            settings["codecs.profiles"] = str(write_profile(options.model, CASES[name].chain, Path(place)))
        with running_daemon(settings) as address:
            command = [sys.executable, __file__, "--model", str(options.model), "--case", name, "--address", address,
                       "--device", options.device, "--longest", str(options.longest)]  # fmt: skip
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.timeout, check=True)
                found = json.loads(done.stdout)
            except (subprocess.SubprocessError, json.JSONDecodeError) as error:
                return {"passed": False, "verdict": f"failed: {str(error)[:300]}"}
    return found | judged(found["prompts"], exact=not CASES[name].chain, narrow=CASES[name].dtype != "float32")


def judged(rows: list[dict[str, Any]], *, exact: bool, narrow: bool) -> dict[str, Any]:
    """Whether a case is as it has to be, and figures of it."""
    identical = [row["agreed"] == GENERATED for row in rows]
    owed = [row["equal_shapes"] or not narrow for row in rows]
    loaded = all(row["loaded"] == row["whole_blocks"] > 0 and row["computed_cached"] == 0 for row in rows)
    same = all(is_same for is_same, is_owed in zip(identical, owed, strict=True) if is_owed)
    figures = {
        "identical": sum(identical), "of": len(rows), "owed": sum(owed),
        "owed_identical": sum(a and b for a, b in zip(identical, owed, strict=True)),
        "mean_agreed": mean(row["agreed"] for row in rows), "first_token": sum(row["agreed"] > 0 for row in rows),
        "loaded_tokens": sum(row["loaded"] for row in rows), "tokens": sum(row["tokens"] for row in rows),
        "shared_prompts": sum(row["shared_cached"] > 0 for row in rows), "all_loaded": loaded,
    }  # fmt: skip
    verdict = (f"identical {figures['identical']} of {figures['of']}, where it is owed {figures['owed_identical']} of "
               f"{figures['owed']}; the first {figures['mean_agreed']:.1f} of {GENERATED} tokens agree; loaded "
               f"{figures['loaded_tokens']} of {figures['tokens']} tokens"
               f"{'' if loaded else ', NOT ALL THAT WAS STORED'}")  # fmt: skip
    return {"passed": bool(rows) and loaded and (same or not exact), "figures": figures, "verdict": verdict}


def write_profile(model: Path, chain: str, folder: Path) -> Path:
    """A profile that lets a chain run without asking what it costs: that is what is measured here."""
    from kvstore.profile import Profile, Rung, save_profile
    from kvstore.rope import rotary
    from kvstore_connectors.weights import weights_digest

    config = json.loads((model / "config.json").read_text())
    profile = Profile(
        name="bench", model=model.name, revision=f"sample:{weights_digest(model)}", layers=config["num_hidden_layers"],
        kv_heads=config["num_key_value_heads"], head_dim=config["hidden_size"] // config["num_attention_heads"],
        frequencies=list(rotary(config).frequencies), rungs=[Rung(chain, 0, 0.0, 0.0, 1.0, 0.0, 1.9, 1.0, 1.0)],
    )  # fmt: skip
    save_profile(profile, folder / "profiles")
    return folder / "profiles"


if __name__ == "__main__":
    main()
