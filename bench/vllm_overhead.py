"""What the connector costs vLLM where it brings nothing: every prompt is new, and everything is stored.

Two engines, one without a connector and one with it, run the same work in turns, with fresh prompts every time. Figures
are ratios, with the connector over without. Then the daemon is stopped and killed under the engine, and the worst
request is set against those before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests" / "engines"))

from common import facts  # noqa: E402
from demo import EngineProcess  # noqa: E402
from kit import Daemon, Engine, numbers, set_environment  # noqa: E402

PROMPT, BATCH, GENERATED = 600, 4, 48


def serve_work(model: str, address: str) -> None:
    """Body of an engine process; see `bench.demo.serve_questions`."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to its log
    set_environment()
    with_connector = address != "none"
    dtype = "bfloat16" if "bfloat16" in model else "float32"
    engine = Engine(Path(model), address if with_connector else None, dtype=dtype, max_num_batched_tokens=1024)
    engine.ask(numbers(300, 999_983), max_tokens=2)
    reply: dict[str, Any] = {"ready": not with_connector or engine.connected()}
    while True:
        print(json.dumps(reply), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        command = json.loads(line)
        seed = command.get("seed", 0)
        if command["do"] == "first":
            reply = {"seconds": engine.ask(numbers(PROMPT, seed), max_tokens=1)[0].seconds}
        elif command["do"] == "batch":
            prompts = [numbers(PROMPT // 2, seed * 100 + i) for i in range(BATCH)]
            seconds = engine.ask(*prompts, max_tokens=GENERATED)[0].seconds
            reply = {"tokens_per_s": BATCH * (PROMPT // 2 + GENERATED) / seconds}
        elif command["do"] == "wait":
            reply = {"connected": engine.connected(20.0)}
        else:
            reply = {**engine.metrics(), "save_s": engine.seconds("save_seconds")} if with_connector else {}
    engine.close()


def in_turns(plain: EngineProcess, ours: EngineProcess, rounds: int) -> dict[str, Any]:
    """First-token times and throughput of both, each round in the other order."""
    seen: dict[str, dict[str, list[float]]] = {"first": {"plain": [], "ours": []}, "batch": {"plain": [], "ours": []}}
    for number in range(rounds):
        pair = [("plain", plain), ("ours", ours)]
        for what, field in (("first", "seconds"), ("batch", "tokens_per_s")):
            for repeat in range(2 if what == "first" else 1):
                for name, engine in pair if (number + repeat) % 2 else reversed(pair):
                    seed = (number * 10 + repeat) * 7 + 1
                    seen[what][name].append(engine.tell(what, seed=seed)[field])
        print(f"  round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    first, batch = seen["first"], seen["batch"]
    return {
        "first_token_ratio_median": _ratio(statistics.median(first["ours"]), statistics.median(first["plain"])),
        "first_token_ratio_best": _ratio(min(first["ours"]), min(first["plain"])),
        "first_token_ratio_pairs": _pairs(first["ours"], first["plain"]),
        "throughput_ratio_median": _ratio(statistics.median(batch["ours"]), statistics.median(batch["plain"])),
        "throughput_ratio_best": _ratio(max(batch["ours"]), max(batch["plain"])),
        "throughput_ratio_pairs": _pairs(batch["ours"], batch["plain"]),
        "rounds": rounds,
        "seconds_ours": sum(first["ours"]) + sum(BATCH * (PROMPT // 2 + GENERATED) / rate for rate in batch["ours"]),
    }


def _ratio(one: float, other: float) -> float:
    return round(one / other, 4)


def _pairs(ours: list[float], plain: list[float]) -> float:
    """Median of the ratios of neighbours in time: what the machine did besides falls out."""
    return round(statistics.median(a / b for a, b in zip(ours, plain, strict=True)), 4)


def outage(engine: EngineProcess, daemon: Daemon, how: signal.Signals, seeds: range) -> dict[str, Any]:
    """Times of requests before and after the daemon was struck."""
    before = [engine.tell("first", seed=seed)["seconds"] for seed in seeds[:8]]
    daemon.send(how)
    after = [engine.tell("first", seed=seed)["seconds"] for seed in seeds[8:]]
    daemon.kill()
    usual = statistics.median(before)
    return {
        "worst_before_over_usual_ms": round((max(before) - usual) * 1e3, 1),
        "worst_added_ms": round((max(after) - usual) * 1e3, 1),
        "first_added_ms": round((after[0] - usual) * 1e3, 1),
        "median_of_the_others_ratio": _ratio(statistics.median(after[1:]), usual),
    }


def run(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """Everything."""
    from model import smollm2

    model = smollm2(dtype)
    daemon = Daemon(folder, host_bytes="2GiB")
    daemon.start()
    plain = EngineProcess(HERE, model, "none", folder / "plain.log")
    ours = EngineProcess(HERE, model, daemon.address, folder / "ours.log")
    try:
        result: dict[str, Any] = {"model": f"SmolLM2-135M-Instruct, {dtype}", "prompt_tokens": PROMPT}
        result["nothing_to_hit"] = in_turns(plain, ours, rounds)
        counted = ours.tell("metrics")
        # Without the noise of the machine: time in which the engine's thread did nothing but store.
        result["save_share_of_time"] = round(counted["save_s"] / result["nothing_to_hit"].pop("seconds_ours"), 4)
        result["save_ms_per_block"] = round(counted["save_s"] / counted["kvstore_saved_blocks"] * 1e3, 2)
        result["stored_blocks"] = counted["kvstore_saved_blocks"]
        result["loaded_blocks"] = counted["kvstore_loaded_blocks"]
        for name, how in (("hung", signal.SIGSTOP), ("killed", signal.SIGKILL)):
            if daemon.process is None:
                daemon.start()
                ours.tell("wait")
            base = 1_000_003 if name == "hung" else 2_000_003
            result[name] = outage(ours, daemon, how, range(base, base + 24))
            time.sleep(0.2)
    finally:
        plain.close()
        ours.close()
        daemon.kill()
    return result


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engine", nargs=2, metavar=("MODEL", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve_work(*options.engine)
        return 0
    set_environment()
    with tempfile.TemporaryDirectory(prefix="kvstore-overhead-") as folder:
        result = run(Path(folder), options.dtype, options.rounds)
    report = {"bench": "vllm_overhead", "machine": facts(), "results": result}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
