"""What the connector costs vLLM where it brings nothing: every prompt is new, and everything is stored.

Two engines, one without a connector and one with it, run the same work in turns, with fresh prompts every time. Figures
are ratios, with the connector over without. Then the daemon is stopped and killed under the engine, and the worst
request is set against those before.

Beside the ratios, which carry the noise of whatever else the machine does, stands the time that the engine's thread
spent inside the connector, waits included: that is all the connector can add.
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


HOOKS = {
    "scheduler": (
        "on_new_request get_num_new_matched_tokens update_state_after_alloc build_connector_meta "
        "update_connector_output request_finished get_kv_connector_stats get_external_cache_hit_sources"
    ),
    "worker": (
        "bind_connector_metadata start_load_kv wait_for_layer_load save_kv_layer wait_for_save get_finished "
        "get_block_ids_with_load_errors get_kv_connector_stats build_connector_worker_meta clear_connector_metadata"
    ),
}


class Clock:
    """Time that the engine's thread spends inside a connector's hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, connector: Any, hooks: str) -> None:
        """Count the calls of these hooks."""
        for name in hooks.split():
            setattr(connector, name, self._timed(getattr(connector, name)))

    def _timed(self, hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return call

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


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
    clock = Clock()
    if with_connector:
        clock.watch(engine.scheduler_connector, HOOKS["scheduler"])
        clock.watch(engine.worker_connector, HOOKS["worker"])
    while True:
        print(json.dumps(reply), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        command = json.loads(line)
        seed = command.get("seed", 0)
        clock.take()
        if command["do"] == "first":
            reply = {"seconds": engine.ask(numbers(PROMPT, seed), max_tokens=1)[0].seconds}
            reply["inside"] = clock.take()
        elif command["do"] == "batch":
            prompts = [numbers(PROMPT // 2, seed * 100 + i) for i in range(BATCH)]
            seconds = engine.ask(*prompts, max_tokens=GENERATED)[0].seconds
            reply = {"tokens_per_s": BATCH * (PROMPT // 2 + GENERATED) / seconds, "inside": clock.take()}
            reply["seconds"] = seconds
        elif command["do"] == "wait":
            reply = {"connected": engine.connected(20.0)}
        else:
            reply = engine.metrics() if with_connector else {}
    engine.close()


def in_turns(plain: EngineProcess, ours: EngineProcess, rounds: int) -> dict[str, Any]:
    """First-token times and throughput of both, each round in the other order."""
    seen: dict[str, dict[str, list[dict[str, Any]]]] = {
        "first": {"plain": [], "ours": []},
        "batch": {"plain": [], "ours": []},
    }
    for number in range(rounds):
        pair = [("plain", plain), ("ours", ours)]
        for what, repeats in (("first", 2), ("batch", 1)):
            for repeat in range(repeats):
                for name, engine in pair if (number + repeat) % 2 else reversed(pair):
                    seen[what][name].append(engine.tell(what, seed=(number * 10 + repeat) * 7 + 1))
        print(f"  round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    first = {name: [one["seconds"] for one in answers] for name, answers in seen["first"].items()}
    batch = {name: [one["tokens_per_s"] for one in answers] for name, answers in seen["batch"].items()}
    return {
        "inside_connector_share_first_token": _share(seen["first"]["ours"]),
        "inside_connector_share_batch": _share(seen["batch"]["ours"]),
        "first_token_ratio_median": _ratio(statistics.median(first["ours"]), statistics.median(first["plain"])),
        "first_token_ratio_best": _ratio(min(first["ours"]), min(first["plain"])),
        "first_token_ratio_pairs": _pairs(first["ours"], first["plain"]),
        "throughput_ratio_median": _ratio(statistics.median(batch["ours"]), statistics.median(batch["plain"])),
        "throughput_ratio_best": _ratio(max(batch["ours"]), max(batch["plain"])),
        "throughput_ratio_pairs": _pairs(batch["ours"], batch["plain"]),
        "rounds": rounds,
    }


def _share(answers: list[dict[str, Any]]) -> float:
    """Median share of a request's time that was spent inside the connector."""
    return round(statistics.median(one["inside"] / one["seconds"] for one in answers), 5)


def _ratio(one: float, other: float) -> float:
    return round(one / other, 4)


def _pairs(ours: list[float], plain: list[float]) -> float:
    """Median of the ratios of neighbours in time: what the machine did besides falls out."""
    return round(statistics.median(a / b for a, b in zip(ours, plain, strict=True)), 4)


def outage(engine: EngineProcess, daemon: Daemon, how: signal.Signals, seeds: range) -> dict[str, Any]:
    """Requests before and after the daemon was struck."""
    before = [engine.tell("first", seed=seed) for seed in seeds[:8]]
    daemon.send(how)
    after = [engine.tell("first", seed=seed) for seed in seeds[8:]]
    daemon.kill()
    usual = statistics.median(one["seconds"] for one in before)
    inside = [round(one["inside"] * 1e3, 1) for one in after]
    return {
        "inside_connector_ms_before": round(statistics.median(one["inside"] for one in before) * 1e3, 1),
        "inside_connector_ms_first": inside[0],
        "inside_connector_ms_worst": max(inside),
        "inside_connector_ms_median_after": statistics.median(inside[1:]),
        "worst_before_over_usual_ms": round((max(one["seconds"] for one in before) - usual) * 1e3, 1),
        "worst_after_over_usual_ms": round((max(one["seconds"] for one in after) - usual) * 1e3, 1),
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
