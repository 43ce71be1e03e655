"""A real model answers the same: cold, warm, after engine and daemon were restarted, after its blocks decayed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import Daemon, Engine, engine, numbers
from model import smollm2

BLOCK = 128
STORY = (
    "The lighthouse at the end of the long pier was built by two brothers who never agreed on anything. "
    "One wanted it to be tall, the other wanted it to be strong, and so it became neither for a very long time. "
    "In the year of the great storm the elder brother, whose name was Anselm, carried the lamp up the stairs alone. "
    "The younger brother, whose name was Bertram, counted the ships that came home and wrote the number on the wall. "
    "On the last night of that year he wrote forty-one, and nobody in the village ever forgot it. "
)
QUESTIONS = ("What number did Bertram write on the wall?", "Who carried the lamp up the stairs?")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a disk tier."""
    made = Daemon(tmp_path_factory.mktemp("truth"), disk=True, host_bytes="512MiB")
    made.start()
    yield made
    made.stop()


def open_engine(own: Daemon) -> Any:
    return engine(smollm2(), own.address, {"block_tokens": BLOCK}, max_num_batched_tokens=512)


def prompts(vllm: Engine) -> list[list[int]]:
    tokenizer = vllm.llm.get_tokenizer()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": STORY * 5 + question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def ask_both(vllm: Engine) -> tuple[list[list[int]], list[int]]:
    """Tokens and numbers of cached tokens, of one question after the other."""
    answers = [vllm.ask(prompt, max_tokens=12)[0] for prompt in prompts(vllm)]
    return [answer.tokens for answer in answers], [answer.cached for answer in answers]


def test_identical_answers_through_every_restart(own: Daemon) -> None:
    with open_engine(own) as vllm:
        whole = [len(prompt) // BLOCK * BLOCK for prompt in prompts(vllm)]
        cold, cached = ask_both(vllm)
        assert cached[0] == 0
        assert cached[1] >= whole[1] - BLOCK  # the story was stored with the first question
        warm, cached = ask_both(vllm)
        assert (warm, cached) == (cold, whole)
        assert vllm.metrics()["kvstore_recomputed_tokens"] == 0

    with open_engine(own) as vllm:  # another life of the engine
        assert vllm.connected()
        again, cached = ask_both(vllm)
        assert (again, cached) == (cold, whole)

        # A daemon that is killed loses its memory. What its disk has, it serves; the rest is computed again.
        settle(own)
        own.kill()
        own.start()
        assert vllm.served(51)
        from_disk, cached = ask_both(vllm)
        assert from_disk == cold
        assert cached == whole
        assert vllm.metrics()["kvstore_hit_tokens_disk"] > 0

        own.kill()
        assert damage(own.folder / "disk") > 0
        own.start()
        assert vllm.served(52)
        before = vllm.metrics()
        spoiled, _ = ask_both(vllm)
        assert spoiled == cold
        after = vllm.metrics()
        assert after["kvstore_recomputed_tokens"] > before["kvstore_recomputed_tokens"]


def settle(own: Daemon) -> None:
    """Wait until what was stored is on disk."""
    with own.client() as client:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if not client.stats()["queue"]["blocks"]:
                return
            time.sleep(0.1)
    raise AssertionError("the write-behind queue did not empty")


def damage(folder: Path) -> int:
    """Flip bytes in the middle of every stored block; how many there were."""
    damaged = 0
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 1 << 20:
            with file.open("r+b") as handle:
                handle.seek(file.stat().st_size // 2)
                piece = handle.read(64)
                handle.seek(-len(piece), 1)
                handle.write(bytes(255 - byte for byte in piece))
            damaged += 1
    return damaged


def test_preempted_requests_answer_the_same(tiny: Path, daemon: Daemon) -> None:
    """Room for 1,024 tokens and four requests that grow to 500 each: some are thrown out, and come back with a load."""
    asked = [numbers(300, seed) for seed in range(4)]
    with engine(tiny, None) as plain:
        truth = [plain.ask(prompt, max_tokens=120)[0].tokens for prompt in asked]
    with engine(tiny, daemon.address, {"block_tokens": 64}, num_gpu_blocks_override=33, max_model_len=768) as vllm:
        assert vllm.connected()
        answers = vllm.ask(*asked, max_tokens=120)
        preemptions = next(m.value for m in vllm.llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert preemptions > 0
        assert [answer.tokens for answer in answers] == truth
        assert [answer.tokens for answer in vllm.ask(*asked, max_tokens=120)] == truth
        assert vllm.metrics()["kvstore_loaded_blocks"] > 0
