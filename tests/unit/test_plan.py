"""Plans of batches: every prompt once, every shared prefix in one run, pins as long as needed, the least peak."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import msgspec
import pytest
from daemons import NAMESPACE, DaemonProcess, payload
from hypothesis import given
from hypothesis import strategies as st

from kvstore import AsyncKVStoreClient, BlockHeader, KVStoreClient, Namespace
from kvstore.cli.main import run as command
from kvstore.errors import InvalidParams
from kvstore.plan import Plan, plan, plan_tokens

words = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=14)


def chain(word: list[int]) -> list[bytes]:
    """Prefix keys of a prompt whose blocks are these."""
    keys, parent = [], b""
    for block in word:
        parent = hashlib.sha256(parent + bytes([block])).digest()
        keys.append(parent)
    return keys


def shared_keys(prompts: list[list[bytes]]) -> set[bytes]:
    seen: set[bytes] = set()
    return {key for keys in prompts for key in keys if key in seen or seen.add(key)}


def peak(prompts: list[list[bytes]], order: list[int]) -> int:
    """Most shared blocks alive at one time, from the first use of each to its last."""
    at = {key: [i for i, p in enumerate(order) if key in prompts[p]] for key in shared_keys(prompts)}
    return max((sum(uses[0] <= i <= uses[-1] for uses in at.values()) for i in range(len(order))), default=0)


@given(words)
def test_the_order_is_all_prompts_with_each_shared_prefix_in_one_run(batch: list[list[int]]) -> None:
    prompts = [chain(word) for word in batch]
    made = plan(prompts)
    assert sorted(made.order) == list(range(len(prompts)))
    for key in shared_keys(prompts):
        uses = [i for i, p in enumerate(made.order) if key in prompts[p]]
        assert uses == list(range(uses[0], uses[-1] + 1))


@given(words)
def test_pins_cover_first_to_last_use_exactly(batch: list[list[int]]) -> None:
    prompts = [chain(word) for word in batch]
    made = plan(prompts)
    alive: set[bytes] = set()
    most = 0
    for step in made.steps:
        assert not alive & set(step.begins)
        alive |= set(step.begins)
        most = max(most, len(alive))
        mine = prompts[step.prompt]
        assert alive == set(mine[: step.shared]) == set(mine) & shared_keys(prompts)
        assert set(step.ends) <= alive
        alive -= set(step.ends)
    assert not alive
    assert most == made.peak


@given(words, st.randoms(use_true_random=False))
def test_no_order_has_a_lower_peak(batch: list[list[int]], chance: random.Random) -> None:
    prompts = [chain(word) for word in batch]
    made = plan(prompts)
    assert peak(prompts, made.order) == made.peak
    other = list(range(len(prompts)))
    assert made.peak <= peak(prompts, other)
    chance.shuffle(other)
    assert made.peak <= peak(prompts, other)


@given(words, st.data())
def test_groups_begin_alike_and_are_whole(batch: list[list[int]], data: st.DataObject) -> None:
    prompts = [chain(word) for word in batch]
    outputs = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(batch), max_size=len(batch)))
    made = plan(prompts, outputs)
    assert sum(group.count for group in made.groups) == len(prompts)
    for group in made.groups:
        members = [prompts[p] for p in made.order[group.first : group.first + group.count]]
        length = next((i for i, keys in enumerate(zip(*members, strict=False)) if len(set(keys)) > 1), None)
        assert group.common == (min(map(len, members)) if length is None else length)
        assert group.count == 1 or group.common > 0
    assert made.blocks == sum(map(len, prompts))
    assert made.distinct == len({key for keys in prompts for key in keys})


def test_the_list_keeps_its_order_where_nothing_speaks_for_another() -> None:
    assert plan([chain([1]), chain([2]), chain([]), chain([0, 1])]).order == [0, 1, 2, 3]
    assert plan([chain([1, 1]), chain([2]), chain([1, 2])]).order == [0, 2, 1]
    assert plan([]).steps == []


def test_groups_with_much_to_generate_go_first() -> None:
    prompts = [chain([1, 1]), chain([1, 2]), chain([2, 1]), chain([2, 2])]
    assert plan(prompts, [1, 1, 50, 50]).order == [2, 3, 0, 1]
    with pytest.raises(InvalidParams):
        plan(prompts, [1])


def test_keys_that_are_no_prefix_keys_are_refused() -> None:
    one, two = chain([1])[0], chain([2])[0]
    for wrong in ([[one, two], [two]], [[one], [two, one]], [[one, one]]):
        with pytest.raises(InvalidParams, match="prefix"):
            plan(wrong)


def test_tokens_share_by_whole_blocks() -> None:
    namespace = Namespace(model="toy", block_tokens=4)
    made = plan_tokens(namespace, [list(range(12)), [9] * 8, [0, 1, 2, 3, 4, 5, 6, 7, 99, 99, 99, 99], [0, 1, 2]])
    assert made.order == [0, 2, 1, 3]
    assert [step.shared for step in made.steps] == [2, 2, 0, 0]
    assert (made.blocks, made.distinct, made.peak) == (8, 6, 2)


def large(prompts: int, blocks: int) -> list[list[bytes]]:
    """A batch in random order: 20 system prompts, 200 documents behind each of them, questions behind those."""
    chance = random.Random(7)
    batch: list[list[bytes]] = []
    for _ in range(prompts):
        system, document = chance.randrange(20), chance.randrange(200)
        at = [system] * (blocks // 4) + [document] * (blocks // 2)
        keys = [
            hashlib.sha256(f"{system}/{document if i >= blocks // 4 else ''}/{i}".encode()).digest()
            for i, _ in enumerate(at)
        ]
        batch.append(keys + [chance.randbytes(32) for _ in range(blocks - len(at))])
    return batch


def test_a_large_batch_is_planned_in_seconds() -> None:
    batch = large(2000, 100)
    began = time.process_time()
    made: Plan = plan(batch)
    assert time.process_time() - began < 3
    assert made.distinct < made.blocks
    assert made.peak == 75


# -- carried out -------------------------------------------------------------------------------------------------------

BATCH = [chain(word) for word in ([1, 1, 1], [2], [1, 1, 2], [1, 2], [1, 1, 1])]


def pinned(client: KVStoreClient) -> int:
    return client.stats()["tiers"]["host"]["pinned_bytes"]


def test_pins_live_as_long_as_the_plan_says(shared_daemon: DaemonProcess) -> None:
    with KVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20) as client:
        made = plan(BATCH)
        most = 0
        with client.run(made) as steps:
            for step in steps:
                keys = BATCH[step.prompt]
                client.put_many([(k, payload(k), BlockHeader()) for k in keys])
                most = max(most, pinned(client))
        assert pinned(client) == 0
        one = len(payload(BATCH[0][0]))
        assert one * (made.peak - 1) <= most <= one * made.peak
        with client.run(made) as steps:  # everything is stored now
            for step in steps:
                assert pinned(client) == one * step.shared
                if step.prompt == 2:
                    break
            assert pinned(client) > 0
        assert pinned(client) == 0
        client.drop(None)


async def test_steps_may_overlap_and_end_in_any_order(shared_daemon: DaemonProcess) -> None:
    async with AsyncKVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20) as client:
        made = plan(BATCH)
        for keys in BATCH:
            await client.put_many([(k, payload(k), BlockHeader()) for k in keys])
        one = len(payload(BATCH[0][0]))

        async def held() -> int:
            return (await client.stats())["tiers"]["host"]["pinned_bytes"] // one

        async with client.run(made) as run:
            for number in range(len(made.steps)):
                await run.begin(number)
            assert await held() == len(shared_keys(BATCH))
            for number in reversed(range(1, len(made.steps))):
                await run.end(number)
            assert await held() == len(shared_keys(BATCH)), "the first step is still under way"
            await run.end(0)
            assert await held() == 0
            assert [step.prompt async for step in client.run(made)] == made.order
        await client.drop(None)


def test_the_command_reads_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text(
        '[0,1,2,3,4]\n{"tokens":[9,9,9,9]}\n{"tokens":[0,1,2,3,7,7,7,7],"output":5}\n{"keys":["%s"]}\n' % ("ab" * 32)
    )
    assert command(["plan", str(file), "--block-tokens", "4", "--json"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out)
    assert sorted(step["prompt"] for step in shown["steps"]) == [0, 1, 2, 3]
    assert (shown["blocks"], shown["distinct"], shown["peak"], len(shown["groups"])) == (5, 4, 1, 3)
    assert command(["plan", str(file), "--block-tokens", "4"]) == 0
    assert "4 prompts in 3 groups" in capsys.readouterr().out
    for wrong in (
        "[1,2",
        '{"words":[]}',
        '{"keys":["xy"]}',
        "[-1,1,1,1]",
        '{"keys":["abcd"]}',
        '{"keys":["ab"],"tokens":[1]}',
    ):
        file.write_text("[1]\n" + wrong)
        assert command(["plan", str(file)]) == 1
        assert "line 2" in capsys.readouterr().err
    assert command(["plan", str(tmp_path / "nothing")]) == 1
