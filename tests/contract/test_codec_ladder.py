"""A tier that encodes keeps the contract of tiers; exact stays exact, and blocks shrink before any leaves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from codec_kit import (
    CHAINS,
    EXACT,
    LOSSY,
    NAMES,
    WHOLE,
    as_pages,
    block_id,
    encoded_by_an_engine,
    error,
    ladder,
    load,
    payload,
    profiles,
    rung,
    store,
)

from kvstore import Namespace
from kvstore.codecs import importance, read
from kvstore.encoding import form_of, pages
from kvstore.errors import ConfigError
from kvstore.ladder import Ladder
from kvstore.profile import Profiles
from kvstore.testing.tier_suite import TierSuite
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.types import (
    BlockHeader,
    BlockId,
    Dropped,
    DropReason,
    Exists,
    Hit,
    Miss,
    MissReason,
    Scope,
    Stored,
)


class TestLadderOfOpaqueBlocks(TierSuite):
    """Payloads whose layout is not known pass through as they are."""

    persistent = True
    root: Path

    async def make(self, capacity: int, place: Path) -> Tier:
        self.root = place
        return Ladder(DiskTier(place, capacity, pin_share=1.0), lambda scope: None, exact="lossless")

    async def damage(self, tier: Tier, block: BlockId) -> None:
        folder = self.root / "blocks" / block.scope.domain / block.scope.ns.hex()
        (path,) = folder.glob(f"{block.key.hex()}-*.kv")
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("exact", ["raw", "lossless"])
async def test_exact_blocks_come_back_bit_for_bit(tmp_path: Path, exact: str) -> None:
    tier = await ladder(tmp_path, exact=exact)
    for number in range(6):
        assert isinstance(await store(tier, number, tokens=64 - 10 * (number % 2)), Stored)
    assert tier.size(block_id(0)) == WHOLE
    assert (tier.inner.size(block_id(0)) == WHOLE) == (exact == "raw")
    await tier.close()
    again = await ladder(tmp_path, exact="raw")  # whatever is set now, what is there is read
    for number in range(6):
        got = await load(again, number)
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got.view(torch.uint8), payload(number, 64 - 10 * (number % 2)).view(torch.uint8))
    await again.close()


async def test_the_budget_counts_what_is_stored(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, exact="lossless")
    for number in range(20):
        await store(tier, number)
    state = tier.describe_state()["codecs"]
    held = state["held"]["byteplanes|zstd(level=1)"]
    assert held["blocks"] == 20
    assert held["logical_bytes"] == 20 * WHOLE
    assert held["stored_bytes"] < 0.75 * 20 * WHOLE
    assert state["since_start"]["byteplanes|zstd(level=1)"]["blocks"] == 20
    assert held["stored_bytes"] < tier.usage().used < 20 * WHOLE
    await tier.close()


async def test_a_payload_of_half_a_token_is_not_stored(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, exact="lossless")
    view = pages(WHOLE - 1)
    assert isinstance(await tier.put(block_id(0), BlockHeader(), [view], WHOLE - 1), Dropped)
    await tier.close()


async def test_values_that_no_codec_takes_stay_raw(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p"))
    view = pages(WHOLE)
    view[:2] = b"\xc0\x7f"  # not a number
    block = block_id(0, LOSSY)
    assert isinstance(await tier.put(block, BlockHeader(), [view], WHOLE), Stored)
    assert tier.inner.size(block) == WHOLE
    await tier.close()


async def test_bytes_of_another_encoder_are_a_miss_and_gone(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, exact="lossless")
    await store(tier, 1)
    stored = tier.inner.size(block_id(1))
    assert stored is not None
    view = pages(stored)
    hit = await tier.inner.get(block_id(1), [view])
    assert isinstance(hit, Hit)
    for change in (0, stored // 2, stored - 9):  # magic, a part, the checksum of the payload
        bad = pages(stored)
        bad[:] = view
        bad[change] ^= 1
        await tier.inner.drop(block_id(1))
        await tier.inner.put(block_id(1), hit.header, [bad], stored)
        assert await load(tier, 1) == Miss(MissReason.CORRUPT)
        assert tier.size(block_id(1)) is None
    await tier.close()


async def test_a_lossy_block_under_an_exact_name_is_a_miss(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p"), exact="lossless")
    await store(tier, 1, LOSSY)
    stored = tier.inner.size(block_id(1, LOSSY))
    assert stored is not None
    view = pages(stored)
    hit = await tier.inner.get(block_id(1, LOSSY), [view])
    assert isinstance(hit, Hit)
    await tier.inner.put(block_id(1), hit.header, [view], stored)
    assert await load(tier, 1) == Miss(MissReason.CORRUPT)
    await tier.close()


@pytest.mark.parametrize("truncate", [False, True])
async def test_blocks_shrink_before_any_is_evicted(tmp_path: Path, truncate: bool) -> None:
    rungs = [rung(CHAINS[0], 1.5), rung(CHAINS[0], 2.5, planes=3), rung(CHAINS[0], 3.5, planes=1)] if truncate else None
    tier = await ladder(tmp_path, 4 << 20, profiles=profiles(tmp_path / "p", rungs))
    plain = await ladder(tmp_path / "plain", 4 << 20)
    count = 110
    for number in range(count):
        assert isinstance(await store(tier, number, LOSSY), Stored)
        await store(plain, number)
        assert tier.usage().used <= tier.usage().capacity
        if tier.inner.counters.evicted:
            # Nothing left before everything else stood on the last rung.
            assert tier.describe_state()["codecs"]["can_step"] <= 1
            break
    kept = sum(tier.size(block_id(n, LOSSY)) is not None for n in range(count))
    assert kept > 1.5 * sum(plain.size(block_id(n)) is not None for n in range(count))
    state = tier.describe_state()["codecs"]
    assert state["stepped_down"] > 20
    assert state["bytes_freed"] > 1 << 20
    assert state["lost_stepping"] == 0
    errors = []
    for number in range(count):
        got = await load(tier, number, LOSSY)
        if isinstance(got, torch.Tensor):
            errors.append(error(got, payload(number)))
    assert max(errors) < 0.5
    assert min(errors) < 0.02
    assert errors[0] > 3 * errors[-1]  # the oldest went down, the newest is fine
    await tier.close()
    await plain.close()


@pytest.mark.parametrize(("blocks", "count"), [(8, 24), (12, 40)])
async def test_a_burst_of_writers_evicts_nothing_that_could_shrink(tmp_path: Path, blocks: int, count: int) -> None:
    tier = await ladder(tmp_path, blocks * WHOLE, profiles=profiles(tmp_path / "p"))
    writers = asyncio.Semaphore(8)  # as write-behind has them

    async def one(number: int) -> None:
        async with writers:
            assert isinstance(await store(tier, number, LOSSY), Stored)

    await asyncio.gather(*map(one, range(count)))
    assert tier.inner.counters.evicted == 0
    assert all(tier.contains(*block_id(number, LOSSY)) for number in range(count))
    await tier.close()


async def test_exact_blocks_wait_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.steps.STEP_S", 60.0)
    tier = await ladder(tmp_path, 8 * WHOLE, exact="lossless", profiles=profiles(tmp_path / "p"))
    async with asyncio.timeout(30):
        for wave in (range(12), range(12, 24)):  # what is still being stored cannot leave for others
            await asyncio.gather(*(store(tier, number) for number in wave))
    assert tier.inner.counters.evicted > 0
    await tier.close()


async def test_exact_blocks_never_step_down(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, 3 << 20, exact="lossless", profiles=profiles(tmp_path / "p"))
    for number in range(20):
        await store(tier, number)
    for number in range(40):
        await store(tier, number, LOSSY)
    for number in range(20):
        got = await load(tier, number)
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, payload(number))
    await tier.close()


async def test_a_pinned_block_stays_where_it_is(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, 3 << 20, profiles=profiles(tmp_path / "p"))
    await store(tier, 0, LOSSY)
    before = tier.inner.size(block_id(0, LOSSY))
    assert tier.pin(block_id(0, LOSSY), asyncio.get_running_loop().time() + 1000)
    for number in range(1, 80):
        await store(tier, number, LOSSY)
    assert tier.inner.size(block_id(0, LOSSY)) == before
    assert tier.steps.down > 0
    await tier.close()


async def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins of blocks that never step, or left, and layouts of namespaces that nobody knows any more."""
    monkeypatch.setattr("kvstore.ladder.MOST_FORMS", 8)
    known = dict(NAMES)
    tier = Ladder(DiskTier(tmp_path / "disk", 64 << 20), known.get, profiles=profiles(tmp_path))
    await tier.start()
    for number in range(200):
        assert isinstance(await store(tier, number, LOSSY if number % 2 else EXACT), Stored)
        assert tier.pin(block_id(number, LOSSY if number % 2 else EXACT), time.monotonic() + 60)
        if number % 2:
            await tier.drop(block_id(number, LOSSY))
    assert len(tier.steps.pins) <= 65
    for number in range(100):
        scope = Scope("u0", number.to_bytes(32, "big"))
        known[scope] = EXACT
        assert tier.size(BlockId(scope, bytes(32))) is None
        assert tier._form(scope) is not None
        del known[scope]
    assert len(tier._forms) <= 9
    await tier.close()


async def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    found = profiles(tmp_path / "p")
    assert found.check(LOSSY) == ""
    other = msgspec.structs.replace(LOSSY, model="other")
    assert "model" in found.check(other)
    assert Profiles(None).check(LOSSY)
    failed = profiles(tmp_path / "q", [rung(CHAINS[1], 3.0, kl=0.5)])
    assert "passed" in failed.check(LOSSY)
    with pytest.raises(ConfigError):
        Ladder(DiskTier(tmp_path / "d", 1 << 20), NAMES.get, exact="fp8")


@pytest.mark.parametrize("becomes", ["outdone", "refused", "absent"])
async def test_what_an_earlier_profile_allowed_is_read_while_the_gate_of_the_new_one_does(
    tmp_path: Path, becomes: str
) -> None:
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p"))
    await store(tier, 1, LOSSY)
    await tier.close()
    small = rung(CHAINS[1], 4.0, kl=1e-6)  # less than the block's rung in every way
    other = {"outdone": [rung(CHAINS[0], 2.0)], "refused": [rung(CHAINS[0], 2.0, kl=0.5)], "absent": []}[becomes]
    again = await ladder(tmp_path, profiles=profiles(tmp_path / "p", [*other, small]))
    got = await load(again, 1, LOSSY)
    if becomes == "outdone":
        assert error(got, payload(1)) < 0.01
    else:
        assert got == Miss(MissReason.CORRUPT)
        assert (again.undecodable, again.counters.corrupt, again.size(block_id(1, LOSSY))) == (1, 0, None)
    await again.close()


@pytest.mark.parametrize("becomes", ["refused", "absent"])
async def test_what_may_not_be_read_does_not_step_to_what_may(tmp_path: Path, becomes: str) -> None:
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p"))
    await store(tier, 1, LOSSY)
    await tier.close()
    small = [rung(CHAINS[1], 4.0), rung(CHAINS[2], 6.0)]
    other = [rung(CHAINS[0], 2.0, kl=0.5)] if becomes == "refused" else []
    again = await ladder(tmp_path, profiles=profiles(tmp_path / "p", [*other, *small]))
    assert again.size(block_id(1, LOSSY)) == WHOLE  # its header was not read yet
    await again.steps.step(block_id(1, LOSSY))
    assert (again.steps.down, again.steps.lost, again.size(block_id(1, LOSSY))) == (0, 1, None)
    await again.close()


async def test_planes_that_are_left_of_a_block_are_no_rung_by_themselves(tmp_path: Path) -> None:
    for planes in (1, 2):  # both could be decoded
        place = tmp_path / str(planes)
        tier = await ladder(
            place, profiles=profiles(place / "p", [rung(CHAINS[0], 2.0), rung(CHAINS[0], 4.0, planes=1)])
        )
        await store(tier, 1, LOSSY)
        view = pages(tier.inner.size(block_id(1, LOSSY)) or 0)
        hit = await tier.inner.get(block_id(1, LOSSY), [view])
        assert isinstance(hit, Hit)
        form = form_of(LOSSY)
        assert form is not None
        left = view[: form.marked(read(np.frombuffer(view, np.uint8)).nbytes(planes), by_engine=False)]
        await tier.inner.drop(block_id(1, LOSSY))
        await tier.inner.put(block_id(1, LOSSY), hit.header, [left], left.nbytes)
        got = await load(tier, 1, LOSSY)
        assert got == Miss(MissReason.CORRUPT) if planes == 2 else error(got, payload(1)) < 0.5
        await tier.close()


def test_only_known_layouts_are_encoded() -> None:
    assert form_of(None) is None
    assert form_of(Namespace(model="m")) is None
    form = form_of(EXACT)
    assert form is not None
    assert (form.whole, form.lossy) == (WHOLE, False)


async def test_a_read_that_a_step_overtakes_is_read_again(tmp_path: Path) -> None:
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p"))
    await store(tier, 0, LOSSY)
    before = tier.inner.size(block_id(0, LOSSY))
    readers = [asyncio.ensure_future(load(tier, 0, LOSSY)) for _ in range(4)]
    steps = [asyncio.ensure_future(tier.steps.step(block_id(0, LOSSY))) for _ in range(3)]
    found = await asyncio.gather(*readers)
    await asyncio.gather(*steps)
    assert all(isinstance(got, torch.Tensor) for got in found)
    assert (tier.inner.size(block_id(0, LOSSY)) or 0) < (before or 0)
    assert tier.steps.lost == 0
    assert await tier.check() == []
    await tier.close()


async def give(tier: Tier, number: int, data: memoryview, namespace: Namespace = LOSSY) -> object:
    return await tier.put(block_id(number, namespace), BlockHeader(position=64 * number), [data], data.nbytes)


async def take(tier: Tier, number: int) -> bytes | Miss:
    nbytes = tier.size(block_id(number, LOSSY))
    assert nbytes is not None
    view = pages(nbytes)
    outcome = await tier.get(block_id(number, LOSSY), [view])
    return outcome if isinstance(outcome, Miss) else bytes(view)


@pytest.mark.asyncio
async def test_what_an_engine_encoded_comes_back_as_it_was_also_after_a_restart(workdir: Path) -> None:
    data = encoded_by_an_engine(3)
    for _ in range(2):
        tier = await ladder(workdir, profiles=profiles(workdir))
        if tier.size(block_id(3, LOSSY)) is None:
            assert isinstance(await give(tier, 3, data), Stored)
            assert tier.chain(block_id(3, LOSSY)) == "prerope|kv4(k=4,v=4,group=64,sinks=4)"
        assert tier.size(block_id(3, LOSSY)) == data.nbytes
        assert isinstance(await give(tier, 3, memoryview(bytes(data.nbytes))), Exists)  # whatever it is: not written
        assert await take(tier, 3) == bytes(data)
        assert tier.describe_state()["codecs"]["undecodable"] == 0
        await tier.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["another chain", "another place", "a bit", "the end", "nothing"])
async def test_what_an_engine_encoded_wrongly_is_not_stored(workdir: Path, what: str) -> None:
    tier = await ladder(workdir, profiles=profiles(workdir))
    data = encoded_by_an_engine(3)
    if what == "another chain":
        data = encoded_by_an_engine(3, "prerope|kv4(k=3,v=3)")
    elif what == "another place":
        data = encoded_by_an_engine(3, position=64)
    elif what == "a bit":
        data[-20] ^= 1
    elif what == "the end":
        data = data[:-2]
    else:
        data = memoryview(bytes(data.nbytes))
    outcome = await give(tier, 3, data)
    assert isinstance(outcome, Dropped)
    assert outcome.reason == DropReason.UNDECODABLE
    assert tier.size(block_id(3, LOSSY)) is None
    await tier.close()


@pytest.mark.asyncio
async def test_what_an_engine_encoded_steps_down_and_stays_its_own_while_planes_are_cut(workdir: Path) -> None:
    cut = [rung(CHAINS[1], 3.5), rung(CHAINS[1], 6.0, planes=1)]
    tier = await ladder(workdir, 40 * 8704, profiles=profiles(workdir, cut))
    for number in range(1, 60):
        assert isinstance(await give(tier, number, encoded_by_an_engine(number)), Stored)
    assert tier.describe_state()["codecs"]["stepped_down"] > 5
    sizes = {number: tier.size(block_id(number, LOSSY)) for number in range(1, 60)}
    small = [number for number, size in sizes.items() if size is not None and size < encoded_by_an_engine(1).nbytes]
    assert small
    assert all(size is None or size % 2 == 1 for size in sizes.values())
    whole, found = bytes(encoded_by_an_engine(small[0])), await take(tier, small[0])
    assert isinstance(found, bytes)
    assert whole.startswith(found[:-3])
    await tier.close()


@pytest.mark.asyncio
async def test_nothing_encoded_is_stored_under_an_exact_name(workdir: Path) -> None:
    tier = await ladder(workdir, profiles=profiles(workdir))
    assert isinstance(await give(tier, 3, encoded_by_an_engine(3), EXACT), Dropped)
    await tier.close()


# -- importance --------------------------------------------------------------------------------------------------------

BY_IMPORTANCE = "prerope|mikv(hi=8,lo=2,share=25,sinks=0)"
HEAVY = torch.arange(3, 64, 4)
"""A quarter of the tokens."""


def weighed(what: str) -> BlockHeader:
    """The header of block 1 with importance that says `HEAVY`, says nothing, or cannot be believed."""
    weights = torch.full((64,), 0.5).index_fill(0, HEAVY, 2.0)
    found = {
        "measured": importance.pack(weights),
        "missing": b"",
        "of fewer tokens": importance.pack(weights[1:]),
        "not a number": importance.pack(weights)[:-2] + b"\x00\x7e",
    }
    return BlockHeader(position=64, importance=found[what])


async def lost_by(tier: Tier, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the tokens that matter, and of the others."""
    got = await load(tier, number, LOSSY)
    assert isinstance(got, torch.Tensor)
    lost = (got - payload(1)).float().pow(2).sum((0, 1, 3, 4))
    others = torch.ones(64, dtype=torch.bool).index_fill(0, HEAVY, False)
    return lost[HEAVY], lost[others]


@pytest.mark.parametrize("what", ["missing", "of fewer tokens", "not a number"])
async def test_the_tokens_that_matter_get_the_bits_if_the_header_names_them(tmp_path: Path, what: str) -> None:
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p", [rung(BY_IMPORTANCE, 4.0), rung(CHAINS[2], 6.0)]))
    view = as_pages(payload(1))
    for number, says in ((1, "measured"), (2, what)):
        assert isinstance(await tier.put(block_id(number, LOSSY), weighed(says), [view], WHOLE), Stored)
    assert tier.chain(block_id(1, LOSSY)).startswith("prerope|mikv")
    assert tier.chain(block_id(2, LOSSY)).startswith("prerope|kv4(k=2")  # passed over: bits by a guess are not measured
    assert tier.describe_state()["codecs"]["without_importance"] == 1
    heavy, light = await lost_by(tier, 1)
    assert heavy.max() < light.min() / 10
    assert heavy.max() < (await lost_by(tier, 2))[0].min() / 10
    await tier.close()


async def test_a_step_down_to_bits_by_importance(tmp_path: Path) -> None:
    rungs = [rung(CHAINS[0], 2.0), rung(BY_IMPORTANCE, 4.0), rung(BY_IMPORTANCE, 6.0, planes=1)]
    tier = await ladder(tmp_path, profiles=profiles(tmp_path / "p", rungs))
    view = as_pages(payload(1))
    for number, says in ((1, "measured"), (2, "missing")):
        await tier.put(block_id(number, LOSSY), weighed(says), [view], WHOLE)
        await tier.steps.step(block_id(number, LOSSY))
    heavy, light = await lost_by(tier, 1)
    assert heavy.max() < light.min() / 10
    assert tier.chain(block_id(2, LOSSY)) == "prerope|kv4(k=8,v=8,group=64,sinks=4)"  # nothing below it is for it
    assert tier.steps.lost == 0
    await tier.steps.step(block_id(1, LOSSY))  # cut off to the low bits of all: needs no importance any more
    heavy, light = await lost_by(tier, 1)
    assert heavy.mean() > light.mean() / 4
    assert tier.steps.down == 2
    await tier.close()


def test_bits_by_importance_outdo_no_rung_that_every_block_can_take(tmp_path: Path) -> None:
    found = profiles(tmp_path, [rung(CHAINS[0], 2.0), rung(BY_IMPORTANCE, 4.0, kl=1e-6), rung(BY_IMPORTANCE, 3.0)])
    chains = [each.chain for each, _ in found.rungs(LOSSY)[0]]
    assert chains == [CHAINS[0], BY_IMPORTANCE]
