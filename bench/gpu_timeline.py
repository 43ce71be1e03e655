"""Where the time to the first token goes, call by call: a prompt loaded from host memory, and one blended from chunks.

One engine, the shape of Llama-3-8B with dummy weights. Functions of vLLM and of the connector are watched while one
prompt is asked, the host's clock before and after each; what they give to the device runs on behind them. Watching
costs some microseconds a call.

    python bench/gpu_timeline.py --tokens 16384 65000 --chain kv4
    python bench/gpu_timeline.py --blend auto --text kvstore docs
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpu_vllm import (
    ENVIRONMENT,
    SEED,
    counters,
    drop_prefix_cache,
    prompt,
    settings_for,
    shaped,
    transfer_config,
    wait_until_stored,
)

WATCHED = {
    "vllm.v1.core.sched.scheduler": "Scheduler.schedule Scheduler.update_from_output",
    "vllm.v1.engine.core": "EngineCore.preprocess_add_request",
    "vllm.v1.worker.gpu_worker": "Worker.execute_model Worker.sample_tokens",
    "kvstore_connectors.vllm.scheduler": "SchedulerSide.arrived SchedulerSide.matched SchedulerSide.plan",
    "kvstore_connectors.vllm.lookups": "Lookups._ask",
    "kvstore_connectors.vllm.worker": "WorkerSide.start_loads",
    "kvstore_connectors.vllm.transfers": "Transfers._begin Transfers._finish",
    "kvstore_connectors.vllm.device_pages": "DevicePages.start",
    "kvstore_connectors.vllm.blend_scheduler": "Blends.promise Blends.job",
    "kvstore_connectors.vllm.blend_worker": "Blender.blend Blender._gather Blender._begin_load Blender._load_exact "
    "Blender._repair Blender._fill Blender.settle _finished",
    "kvstore_connectors.chunk_loads": "describe ChunkLoad.begin ChunkLoad.ahead",
    "kvstore_connectors.blend.varlen": "Plan.of",
    "kvstore_connectors.blend.selectors.question": "Reading.scores",
    "kvstore_gpu.spreading": "needed",
    "kvstore_connectors.blend.recompute": "Pass._layer",
}
"""By module: classes' methods, or functions."""


class Mark(NamedTuple):
    """A call: seconds since the prompt was asked, and how long it took."""

    begun: float
    took: float
    name: str
    thread: str


class Watch:
    """Notes calls while it is on."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._since: float | None = None

    def over(self, module: str, path: str) -> None:
        """Watch a function, ``Class.method`` or ``function``; one that is not there is told of."""
        *owners, last = path.split(".")
        try:
            owner = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            there = vars(owner)[last]
        except (ImportError, AttributeError, KeyError):
            print("not there:", module, path, file=sys.stderr)
            return
        bare = there.__func__ if isinstance(there, staticmethod) else there
        seen = self._noting(path, bare)
        setattr(owner, last, staticmethod(seen) if isinstance(there, staticmethod) else seen)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            since, begun = self._since, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if since is not None:
                    took = time.perf_counter() - begun
                    self._marks.append(Mark(begun - since, took, name, threading.current_thread().name))

        return call

    def during(self, act: Callable[[], Any]) -> tuple[float, list[Mark]]:
        """Seconds of an act, and the calls in it in the order in which they began."""
        self._marks, self._since = [], time.perf_counter()
        begun = self._since
        act()
        seconds, self._since = time.perf_counter() - begun, None
        return seconds, sorted(self._marks)


def shown(marks: list[Mark]) -> list[str]:
    """A line a call; calls of one name in a row, as those of layers, are one line."""
    lines: list[str] = []
    at = 0
    while at < len(marks):
        end = at + 1
        while end < len(marks) and marks[end][2:] == marks[at][2:]:
            end += 1
        first, last = marks[at], marks[end - 1]
        count = "" if end - at == 1 else f"  {end - at} calls in {(last.begun + last.took - first.begun) * 1e3:.2f}"
        lines.append(f"{first.begun * 1e3:9.2f} {first.took * 1e3:8.2f}  {first.name} ({first.thread}){count}")
        at = end
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time to the first token goes.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65000])
    parser.add_argument("--chain", default="kvstore", choices=("kvstore", "kv4"), help="blocks as they are, or by kv4")
    parser.add_argument("--blend", help="blend by this selector instead")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="as of gpu_blend.py")
    parser.add_argument("--reach", type=int, help="as of gpu_blend.py")
    parser.add_argument("--chunks", type=int, nargs="+", default=[31])
    parser.add_argument("--graphs", dest="eager", action="store_false", help="with CUDA graphs")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from common import running_daemon

    with tempfile.TemporaryDirectory() as folder:
        place, watch = Path(folder), Watch()
        model = shaped(place)
        for module, names in WATCHED.items():
            for name in names.split():
                watch.over(module, name)
        with running_daemon(settings_for(options.chain, model, place, 64)) as address:
            if options.blend:
                blended(model, address, place / "verdict.json", options, watch)
            else:
                loaded(model, address, options, watch)


def loaded(model: Path, address: str, options: argparse.Namespace, watch: Watch) -> None:
    """Prompts from host memory."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = transfer_config(options.chain, address, 64)
    engine = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, attention_backend="FLASH_ATTN",
        max_model_len=max(options.tokens) + 64, enable_prefix_caching=True, gpu_memory_utilization=0.75,
        enforce_eager=options.eager, max_num_batched_tokens=8192, seed=SEED, disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**(transfer or {})),
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    for tokens in options.tokens:
        wanted = [{"prompt_token_ids": prompt(tokens, tokens)}]
        ask = partial(engine.generate, wanted, sampling, use_tqdm=False)
        ask()
        wait_until_stored(address)
        for number in range(options.rounds):
            drop_prefix_cache(engine)
            told(f"{tokens} tokens, {options.chain}, round {number}", *watch.during(ask))
            if not counters(engine).get("vllm:kvstore_loaded_blocks"):
                raise SystemExit("nothing was loaded: these are times of computing")
        told(f"{tokens} tokens, found on the GPU", *watch.during(ask))


def blended(model: Path, address: str, verdict: Path, options: argparse.Namespace, watch: Watch) -> None:
    """Prompts from chunks."""
    import gpu_blend

    def asked(ask: Callable[[], tuple[float, Any]], name: str) -> tuple[float, Any]:
        answers: list[tuple[float, Any]] = []
        told(name, *watch.during(lambda: answers.append(ask())))
        return answers[0]

    options.selectors = [options.blend]
    gpu_blend.measure(model, address, verdict, options, asked)


def told(name: str, seconds: float, marks: list[Mark]) -> None:
    """Print what was seen."""
    print(f"\n{name}: {seconds * 1e3:.1f} ms", *shown(marks), sep="\n", flush=True)


if __name__ == "__main__":
    main()
