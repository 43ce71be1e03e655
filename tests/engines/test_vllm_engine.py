"""A real vLLM engine with the connector: what is loaded is what would have been computed, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import ENGINE_BLOCK, Daemon, Engine, engine, numbers

from kvstore.client.handles import Lease
from kvstore_connectors.vllm.jobs import LoadJob
from kvstore_connectors.vllm.transfers import Transfers

BLOCK = 64


@pytest.fixture(scope="module", params=["async", "sync"])
def vllm(request: pytest.FixtureRequest, daemon: Daemon, tiny: Path) -> Iterator[Engine]:
    """Long prompts are computed in chunks of 192 tokens; loads run beside the batch, or before it."""
    extra = {"block_tokens": BLOCK, "async_load": request.param == "async"}
    # A tenant each, so that what one stored is not there for the other.
    extra["tenant"] = request.param
    with engine(tiny, daemon.address, extra, max_num_batched_tokens=192) as made:
        assert made.connected()
        yield made


@pytest.fixture(scope="module")
def truth(daemon: Daemon, tiny: Path) -> Callable[..., list[int]]:
    """Tokens that an engine without a connector answers with; asked first, since engines do not run side by side."""
    with engine(tiny, None, max_num_batched_tokens=192) as plain:
        known = {seed: plain.ask(numbers(700, seed), max_tokens=80)[0].tokens for seed in range(12)}
    return lambda seed, count=8: known[seed][:count]


@pytest.fixture(scope="module", autouse=True)
def _truth_first(truth: Any) -> None:
    """The plain engine has to be gone before the tested one starts."""


def test_second_time_is_loaded_and_the_same(vllm: Engine, truth: Any) -> None:
    before = vllm.metrics()
    first, second = vllm.ask(numbers(700))[0], vllm.ask(numbers(700))[0]
    assert first.cached == 0
    assert second.cached == 640  # 10 whole blocks of 64
    assert first.tokens == second.tokens == truth(0)
    after = vllm.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["kvstore_saved_blocks"] == 11  # the last one was filled by generated tokens
    assert grown["kvstore_loaded_blocks"] == 10
    assert grown["kvstore_hit_tokens_host"] == 640
    assert grown["external_prefix_cache_hits"] == 640
    assert grown["kvstore_recomputed_tokens"] == 0


def test_whole_prompt_is_there_and_one_token_is_computed(vllm: Engine) -> None:
    cold = vllm.ask(numbers(640, 1))[0]
    warm = vllm.ask(numbers(640, 1))[0]
    assert (cold.cached, warm.cached) == (0, 639)
    assert warm.tokens == cold.tokens


def test_engine_has_a_part_of_a_block_already(vllm: Engine, truth: Any) -> None:
    vllm.ask(numbers(700, 2))
    vllm.forget()
    vllm.ask(numbers(700, 2)[: 3 * ENGINE_BLOCK + 5], local=True)  # 96 tokens: one and a half blocks of 64
    before = vllm.metrics()
    again = vllm.ask(numbers(700, 2), local=True)[0]
    assert again.cached == 640
    assert again.tokens == truth(2)
    after = vllm.metrics()
    assert after["external_prefix_cache_hits"] - before["external_prefix_cache_hits"] == 640 - 96


def test_generated_tokens_are_stored_too(vllm: Engine, truth: Any) -> None:
    prompt = numbers(700, 3)
    written = vllm.ask(prompt, max_tokens=80)[0].tokens
    assert written == truth(3, 80)
    follow_up = vllm.ask([*prompt, *written, *numbers(10, 90)])[0]
    assert follow_up.cached == 768  # 700 + 80 tokens, of which 779 have KV: 12 blocks


def test_salt_separates_and_unites(vllm: Engine) -> None:
    prompt = numbers(300, 4)
    vllm.ask(prompt, salt="red")
    assert vllm.ask(prompt, salt="blue")[0].cached == 0
    assert vllm.ask(prompt)[0].cached == 0
    assert vllm.ask(prompt, salt="red")[0].cached == 256


@pytest.mark.parametrize("salt", ["\x00", "a/../b", "ä\ud800"[:1], "x" * 10_000])
def test_any_text_is_a_salt(vllm: Engine, salt: str) -> None:
    prompt = numbers(130, 5)
    cold = vllm.ask(prompt, salt=salt)[0]
    warm = vllm.ask(prompt, salt=salt)[0]
    assert (cold.cached, warm.cached) == (0, 128)
    assert cold.tokens == warm.tokens


def test_batch_that_shares_a_beginning(vllm: Engine) -> None:
    start = numbers(384, 6)
    prompts = [[*start, *numbers(200, 60 + i)] for i in range(4)]
    cold = vllm.ask(*prompts)
    warm = vllm.ask(*prompts)
    assert [answer.tokens for answer in warm] == [answer.tokens for answer in cold]
    assert all(answer.cached == 576 for answer in warm)


def test_blocks_gone_between_lookup_and_load(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm.ask(numbers(700, 7))[0].tokens == truth(7)
    before = vllm.metrics()
    begin = Transfers._begin

    def drop_fourth(self: Transfers, client: Any, **job: Any) -> Any:
        client.drop(job["keys"][3:4], namespace=job["namespace"])
        return begin(self, client, **job)

    monkeypatch.setattr(Transfers, "_begin", drop_fourth)
    holed = vllm.ask(numbers(700, 7))[0]
    monkeypatch.undo()
    after = vllm.metrics()
    assert holed.tokens == truth(7)
    assert after["kvstore_recomputed_tokens"] - before["kvstore_recomputed_tokens"] == 640 - 3 * BLOCK
    # The hole was filled again, so the third time everything is there.
    assert vllm.ask(numbers(700, 7))[0].cached == 640


def test_lease_lost_during_the_copy(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.ask(numbers(700, 8))
    before = vllm.metrics()
    monkeypatch.setattr(Lease, "valid", lambda self: False)
    lost = vllm.ask(numbers(700, 8))[0]
    monkeypatch.undo()
    after = vllm.metrics()
    assert lost.tokens == truth(8)
    assert after["kvstore_recomputed_tokens"] - before["kvstore_recomputed_tokens"] == 640
    assert vllm.ask(numbers(700, 8))[0].cached == 640


def test_nobody_finds_blocks_that_failed_to_load(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A synchronous load's blocks are in the engine's prefix cache before they are filled. Its request is aborted right
    after the load failed: who asks next must not be given what was never loaded."""
    from vllm import SamplingParams

    vllm.ask(numbers(700, 8))
    vllm.forget()
    spoil(vllm)
    failures = []

    def fail(self: Transfers, link: Any, job: LoadJob, *rest: Any) -> set[int]:
        failures.append(job.request)
        return set(job.engine_ids)

    monkeypatch.setattr(Transfers, "load", fail)
    core = vllm.llm.llm_engine
    core.add_request("aborted", {"prompt_token_ids": numbers(700, 8)}, SamplingParams(temperature=0.0, max_tokens=8))
    for _ in range(500):
        core.step()
        if failures:
            break
    core.abort_request(["aborted"])
    assert failures
    monkeypatch.undo()
    assert vllm.ask(numbers(700, 8), local=True)[0].tokens == truth(8)


def spoil(vllm: Engine) -> None:
    """Overwrite every engine block that no request may find, as other requests' KV would."""
    pool = vllm.core.scheduler.kv_cache_manager.block_pool
    for block in pool.blocks:
        if block.block_hash is None:
            for layer in vllm.worker_connector._worker._pages.caches:
                for side in layer:
                    side[block.block_id].fill_(0x40400000)  # 3.0


def test_defect_while_loading_is_a_recompute(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.ask(numbers(700, 9))

    def broken(self: Transfers, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Transfers, "load", broken)
    assert vllm.ask(numbers(700, 9))[0].tokens == truth(9)


def test_defect_while_saving_changes_nothing(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Transfers, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Transfers, "save", broken)
    assert vllm.ask(numbers(700, 10))[0].tokens == truth(10)
    monkeypatch.undo()
    assert vllm.ask(numbers(700, 10))[0].cached == 0


def test_reset_with_the_connector_forgets_everything(vllm: Engine, truth: Any) -> None:
    vllm.ask(numbers(700, 11))
    assert vllm.llm.reset_prefix_cache(reset_connector=True)
    anew = vllm.ask(numbers(700, 11))[0]
    assert (anew.cached, anew.tokens) == (0, truth(11))
    assert vllm.ask(numbers(700, 11))[0].cached == 640


def test_block_table_followed_without_the_engines_help(vllm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 does not say a request's block table with each step; what we follow ourselves has to be the same."""
    from kvstore_connectors.vllm.saves import Saves

    told = Saves.table
    seen = []

    def compare(name: str, tracked: Any, output: Any) -> list[int]:
        ids = told(name, tracked, output)
        seen.append((list(ids), list(tracked.engine_ids)))
        return ids

    monkeypatch.setattr(Saves, "table", staticmethod(compare))
    vllm.ask(numbers(500, 12), numbers(430, 13), max_tokens=70)
    vllm.ask(numbers(500, 12), numbers(300, 14), max_tokens=70)
    assert len(seen) > 6
    assert all(engines == ours for engines, ours in seen)
