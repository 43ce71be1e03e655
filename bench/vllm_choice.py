"""Load or recompute on a real vLLM: a disk throttled to 50 MB/s must not make a first token later than computing it.

Three engines with the same prompts, in turns: without a connector (computes everything), with the connector as it is,
and with ``load: always``, which loads whatever the daemon has. Host memory is small, so every prompt is on the
throttled disk when it is asked for again. Figures are ratios of first-token times over computing, pair by pair; what
the connector exports of its forecasts and its regret stands beside them. A second, much slower disk shows the other
side: there computing is faster, and loading always is what it costs not to choose.

With ``--changes`` the bandwidth of one disk changes while the engines run, and each prompt is told by how much its
first token was later or sooner, in the order in which they were asked. It is a bound on the bandwidth that changes, or
with ``--slow-medium`` the time that reading takes, 2 MiB after 2 MiB, several blocks side by side.

    python bench/vllm_choice.py --rounds 1 --seed 21 --changes 50 8 120 12 --host-mib 64 \\
        --out bench/results/vllm_choice_changes_paced21.json
    python bench/vllm_choice.py --out bench/results/vllm_choice.json      (in the environment of `make engines`)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests" / "engines"))

from common import facts  # noqa: E402
from demo import EngineProcess  # noqa: E402
from kit import Daemon, Engine, numbers, set_environment  # noqa: E402

LENGTHS = (400, 800, 1200, 1600)
PER_LENGTH = 3
"""Prompts of each length; together they are several times what host memory holds."""


_BOUND = """
import signal
from pathlib import Path
from kvstore.tiers import throttle
from kvstore.__main__ import main
paces = []
made = throttle.Pace.__init__
def make(pace, rate):
    made(pace, rate)
    paces.append(pace)
throttle.Pace.__init__ = make
def change(*_):
    for pace in paces:
        pace.bytes_per_s = float(Path("rate").read_text())
signal.signal(signal.SIGUSR1, change)
main()
"""

_SLOW = """
import signal, threading, time
from pathlib import Path
from kvstore.disk.io import Files
from kvstore.__main__ import main
rate, turn, read = [1e9], threading.Lock(), Files.read
def slow(self, fd, buffers, position):
    moved = read(self, fd, buffers, position)
    with turn:
        time.sleep(moved / rate[0])
    return moved
Files.read = slow
def change(*_):
    rate[0] = float(Path("rate").read_text())
signal.signal(signal.SIGUSR1, change)
main()
"""


class ChangingDaemon(Daemon):
    """A daemon of which the disk gets slower and faster while it runs: a bound on its bandwidth, or reading itself."""

    def __init__(self, folder: Path, mb_s: int, host_mib: int, slow_medium: bool) -> None:
        self.entry = ("-c", _SLOW if slow_medium else _BOUND)
        flags = [] if slow_medium else ["--disk-max-bandwidth", f"{mb_s}MB"]
        super().__init__(folder, host_bytes=f"{host_mib}MiB", disk=True, flags=flags)

    def change(self, mb_s: int) -> None:
        """Give the disk another bandwidth."""
        (self.folder / "rate").write_text(str(mb_s * 1e6))
        self.send(signal.SIGUSR1)


def serve_work(model: str, address: str) -> None:
    """Body of an engine process; see `bench.demo.serve_questions`. The address may end with ``?always``."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to its log
    set_environment()
    socket, _, load = address.partition("?")
    extra = {"load": load or "faster"}
    engine = Engine(Path(model), None if socket == "none" else socket, extra, max_num_batched_tokens=1024)
    engine.ask(numbers(300, 999_983), max_tokens=2)
    reply: dict[str, Any] = {"ready": socket == "none" or engine.connected()}
    while True:
        print(json.dumps(reply), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        command = json.loads(line)
        if command["do"] == "first":
            answer = engine.ask(numbers(command["length"], command["seed"]), max_tokens=1)[0]
            reply = {"seconds": answer.seconds, "cached": answer.cached, "token": answer.tokens[0]}
        else:
            reply = engine.metrics() if socket != "none" else {}
    engine.close()


def prompts(seed: int) -> list[tuple[int, int]]:
    """(length, seed) of every prompt; no two share a block."""
    lengths = [length for length in LENGTHS for _ in range(PER_LENGTH)]
    return [(length, len(lengths) * seed + which) for which, length in enumerate(lengths)]


def run(folder: Path, rounds: int, disk_mb_s: int, seed: int) -> dict[str, Any]:
    """Everything."""
    from model import smollm2

    model = smollm2("float32")
    daemon = Daemon(folder, host_bytes="128MiB", disk=True, flags=["--disk-max-bandwidth", f"{disk_mb_s}MB"])
    daemon.start()
    engines = {
        "computed": EngineProcess(HERE, model, "none", folder / "plain.log"),
        "faster": EngineProcess(HERE, model, daemon.address, folder / "faster.log"),
        "always": EngineProcess(HERE, model, f"{daemon.address}?always", folder / "always.log"),
    }
    try:
        for length, tokens_of in prompts(seed):  # stored, and speeds learned
            for name in ("computed", "faster"):
                engines[name].tell("first", length=length, seed=tokens_of)
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for number in range(rounds):
            for length, tokens_of in prompts(seed):
                order = list(engines) if number % 2 else list(engines)[::-1]
                for name in order:
                    seen[name].append(engines[name].tell("first", length=length, seed=tokens_of))
            print(f"  round {number + 1}/{rounds}", file=sys.stderr, flush=True)
        counted = engines["faster"].tell("metrics")
    finally:
        for engine in engines.values():
            engine.close()
        daemon.kill()
    asked = prompts(seed) * rounds
    return {
        "same_first_tokens": all(len({engine[i]["token"] for engine in seen.values()}) == 1 for i in range(len(asked))),
        "ratio_to_computing": {name: _ratios(seen[name], seen["computed"], asked) for name in ("faster", "always")},
        "loaded_tokens": {name: sum(each["cached"] or 0 for each in seen[name]) for name in ("faster", "always")},
        "connector": {name: value for name, value in counted.items() if "kvstore" in name},
        "requests": len(asked),
    }


def run_changes(
    folder: Path, rounds: int, mb_s: list[int], host_mib: int, seed: int, slow_medium: bool
) -> dict[str, Any]:
    """One run through several bandwidths."""
    from model import smollm2

    model = smollm2("float32")
    daemon = ChangingDaemon(folder, mb_s[0], host_mib, slow_medium)
    daemon.start()
    daemon.change(mb_s[0])
    engines = {
        "computed": EngineProcess(HERE, model, "none", folder / "plain.log"),
        "faster": EngineProcess(HERE, model, daemon.address, folder / "faster.log"),
    }
    phases: list[dict[str, Any]] = []
    try:
        for length, tokens_of in prompts(seed):  # stored, and speeds learned
            for engine in engines.values():
                engine.tell("first", length=length, seed=tokens_of)
        for rate in mb_s:
            daemon.change(rate)
            seen: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(rounds):
                for length, tokens_of in prompts(seed):
                    for name in list(engines) if number % 2 else list(engines)[::-1]:
                        seen[name].append(engines[name].tell("first", length=length, seed=tokens_of))
            asked = prompts(seed) * rounds
            pairs = zip(asked, seen["faster"], seen["computed"], strict=True)
            tokens = [{engine[i]["token"] for engine in seen.values()} for i in range(len(asked))]
            phases.append(
                {
                    "disk_mb_s": rate,
                    "same_first_tokens": all(len(each) == 1 for each in tokens),
                    "ratio_to_computing": _ratios(seen["faster"], seen["computed"], asked),
                    "loaded_tokens": sum(each["cached"] or 0 for each in seen["faster"]),
                    "in_order": [
                        [length, round(a["seconds"], 3), round(b["seconds"], 3), a["cached"] or 0]
                        for (length, _), a, b in pairs
                    ],
                }
            )
            print(f"  {rate} MB/s: {phases[-1]['ratio_to_computing']}", file=sys.stderr, flush=True)
        counted = engines["faster"].tell("metrics")
    finally:
        for engine in engines.values():
            engine.close()
        daemon.kill()
    return {
        "host_mib": host_mib,
        "phases": phases,
        "in_order_is": "tokens, seconds with the connector, seconds computed, tokens loaded",
        "connector": {name: value for name, value in counted.items() if "kvstore_" in name and value},
    }


def _ratios(ours: list[dict[str, Any]], plain: list[dict[str, Any]], asked: list[tuple[int, int]]) -> dict[str, Any]:
    """Median of the paired ratios, of all prompts and by length, and that of the prompt that fares worst."""
    pairs = [(length, a["seconds"] / b["seconds"]) for (length, _), a, b in zip(asked, ours, plain, strict=True)]
    by_length = {
        length: round(statistics.median(ratio for of, ratio in pairs if of == length), 3) for length in LENGTHS
    }
    by_prompt: dict[tuple[int, int], list[float]] = {}
    for prompt, (_, ratio) in zip(asked, pairs, strict=True):
        by_prompt.setdefault(prompt, []).append(ratio)
    worst = max(map(statistics.median, by_prompt.values()))
    total = sum(each["seconds"] for each in ours) / sum(each["seconds"] for each in plain)
    median = statistics.median(ratio for _, ratio in pairs)
    return {"median": round(median, 3), "worst_prompt": round(worst, 3), "total": round(total, 3), **by_length}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default 0)")
    parser.add_argument("--disk-mb-s", type=int, nargs="+", default=[50, 8], help="of the disk tier (default 50 8)")
    parser.add_argument("--engine", nargs=2, metavar=("MODEL", "ADDRESS"), help=argparse.SUPPRESS)
    parser.add_argument("--changes", type=int, nargs="+", metavar="MB_S", help="bandwidths of one disk, in turn")
    parser.add_argument("--slow-medium", action="store_true", help="reads take their time, instead of a bound on them")
    parser.add_argument("--host-mib", type=int, default=128, help="host memory with --changes (default 128)")
    options = parser.parse_args()
    if options.engine:
        serve_work(*options.engine)
        return 0
    set_environment()
    result = {}
    if options.changes:
        with tempfile.TemporaryDirectory(prefix="kvstore-choice-") as folder:
            how = options.changes, options.host_mib, options.seed, options.slow_medium
            result["changes"] = run_changes(Path(folder), options.rounds, *how)
    for disk_mb_s in () if options.changes else options.disk_mb_s:
        with tempfile.TemporaryDirectory(prefix="kvstore-choice-") as folder:
            result[f"{disk_mb_s} MB/s"] = run(Path(folder), options.rounds, disk_mb_s, options.seed)
    report = {"bench": "vllm_choice", "machine": facts(), "results": result}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
