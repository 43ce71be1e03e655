"""What the engine tests and benches share: a daemon in a subprocess, and real vLLM engines in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""A real engine on the CPU: no network, no telemetry, in this process, and threads that wait without spinning."""

ENGINE_BLOCK = 32


def set_environment() -> None:
    """Must run before vLLM or torch is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class Daemon:
    """`kvstore serve` in a subprocess.

    Parameters
    ----------
    folder : Path
        For its socket, its disk tier and its log.
    disk : bool
        Whether there is a disk tier.
    host_bytes : str
    flags : sequence of str
        Further flags.

    Attributes
    ----------
    entry : sequence of str
        What the interpreter runs.
    """

    entry: Sequence[str] = ("-m", "kvstore")

    def __init__(
        self, folder: Path, *, disk: bool = False, host_bytes: str = "256MiB", flags: Sequence[str] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = str(folder / "s" / "kvstore.sock")
        self.log = folder / "daemon.log"
        self._disk = ["--disk-path", str(folder / "disk")] if disk else ["--disk-bytes", "0"]
        self._host_bytes = host_bytes
        self._flags = list(flags)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait_s: float = 20.0) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, *self.entry, "serve", "--socket", self.address, "--http", ""]
        command += ["--host-bytes", self._host_bytes, *self._disk, *self._flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + wait_s
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the daemon did not start:\n{self.log.read_text()}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether it is there."""
        from kvstore.client import KVStoreClient
        from kvstore.errors import KVStoreError

        try:
            with KVStoreClient(self.address, timeout_s=1.0) as client:
                client.connect()
            return True
        except KVStoreError:
            return False

    def client(self) -> Any:
        """A client of it."""
        from kvstore.client import KVStoreClient

        return KVStoreClient(self.address)

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, wait_s: float = 20.0) -> None:
        """End it in good order."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(wait_s)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None


class Answer:
    """What an engine said to a prompt."""

    def __init__(self, output: Any, seconds: float) -> None:
        self.tokens = list(output.outputs[0].token_ids)
        self.text = output.outputs[0].text
        self.cached = output.num_cached_tokens
        self.reason = output.outputs[0].finish_reason
        self.seconds = seconds


class Engine:
    """A real vLLM engine in this process.

    Parameters
    ----------
    model : Path
    address : str or None
        Daemon to use; None for an engine without a connector.
    extra : dict
        Further keys of `kv_connector_extra_config`.
    **options
        Passed to `vllm.LLM`.
    """

    def __init__(self, model: Path, address: str | None, extra: dict[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if address is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="KVStoreConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"address": address, **(extra or {})},
                kv_load_failure_policy="recompute",
            )
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 2048,
            "enforce_eager": True,
            "max_num_seqs": 4,
            "block_size": ENGINE_BLOCK,
            "seed": 0,
            "disable_log_stats": False,
        }
        self.llm = LLM(model=str(model), **{**defaults, **options})

    def ask(
        self,
        *prompts: Sequence[int],
        max_tokens: int = 8,
        salt: str | None = None,
        local: bool = False,
        **sampling: Any,
    ) -> list[Answer]:
        """Complete prompts of token ids in one batch, greedily; without the engine's own cache, unless `local`."""
        from vllm import SamplingParams

        if not local:
            self.forget()
        inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for one in inputs:
            if salt is not None:
                one["cache_salt"] = salt
        sampling_params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **sampling)
        begun = time.monotonic()
        outputs = self.llm.generate(inputs, sampling_params, use_tqdm=False)
        return [Answer(output, time.monotonic() - begun) for output in outputs]

    def forget(self) -> None:
        """Drop the engine's own prefix cache; what the daemon holds stays.

        An engine that schedules ahead frees the last blocks of an answer that ended early with the step behind it.
        """
        deadline = time.monotonic() + 5.0
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise RuntimeError("the engine's prefix cache could not be reset")
            self.llm.llm_engine.step()

    @property
    def core(self) -> Any:
        """vLLM's engine core."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler_connector(self) -> Any:
        """The connector in the scheduler."""
        return self.core.scheduler.connector

    @property
    def worker_connector(self) -> Any:
        """The connector in the worker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    def metrics(self) -> dict[str, float]:
        """The connector's counters, and vLLM's of external hits, as users see them.

        Up to vLLM 0.26 `LLM` drops what is counted in steps that bring no token, so there they are too low.
        """
        out: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if "kvstore" in metric.name or "external_prefix" in metric.name:
                out[metric.name.removeprefix("vllm:")] = metric.value
        return out

    def connected(self, wait_s: float = 10.0) -> bool:
        """Wait until both sides of the connector reach the daemon."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if self.scheduler_connector._breaker.allow() and self.worker_connector._worker._breaker.allow():
                return True
            time.sleep(0.02)
        return False

    def served(self, seed: int, wait_s: float = 20.0) -> bool:
        """Wait until a prompt of its own comes back from the daemon. An engine that has not noticed a restart may take
        one or two that are computed, and a busy daemon may answer a hello too late."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if self.ask(numbers(300, seed), max_tokens=1)[0].cached:
                return True
        return False

    def close(self) -> None:
        """Shut the engine down so that another can be made in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


@contextmanager
def engine(model: Path, address: str | None, extra: dict[str, Any] | None = None, **options: Any) -> Iterator[Engine]:
    """An engine that is shut down at the end; it loads all there is, unless `extra` says otherwise."""
    made = Engine(model, address, {"load": "always", **(extra or {})}, **options)
    try:
        yield made
    finally:
        made.close()


def numbers(count: int, seed: int = 0) -> list[int]:
    """Token ids that look random and are always the same."""
    return [(i * 7919 + seed * 104_729 + 13) % 40_000 + 100 for i in range(count)]
