"""Importance with a block: it lasts through every tier, says which tokens get the bits, and what a block is worth."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from daemons import MakeDaemon, until

from kvstore.codecs import BlockSpec, Context, importance, parse
from kvstore.errors import CannotEncode, InvalidParams
from kvstore.eviction import make_policy
from kvstore.eviction.cost import WEIGHTS, recompute_cost, weight
from kvstore.remote import record
from kvstore.types import BlockHeader, BlockId, Scope, TierCode

TOKENS = 64


def weights(seed: int = 0) -> torch.Tensor:
    return torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed)) * 3


def test_weights_are_float16_and_come_back() -> None:
    found = importance.unpack(importance.pack(weights()), TOKENS)
    assert found is not None
    torch.testing.assert_close(found, weights(), rtol=1e-3, atol=0)
    assert importance.unpack(b"", TOKENS) is None
    huge = importance.unpack(importance.pack(torch.tensor([1e9, 0.0])), 2)
    assert huge is not None
    assert huge.tolist() == [65504.0, 0.0]


@pytest.mark.parametrize(
    "data",
    [b"\x00", bytes(2 * TOKENS - 2), np.full(TOKENS, np.nan, "<f2").tobytes(), np.full(TOKENS, -1, "<f2").tobytes()],
)
def test_what_is_no_importance_is_refused(data: bytes) -> None:
    with pytest.raises(CannotEncode):
        importance.unpack(data, TOKENS)


def test_mikv_gives_the_bits_to_the_tokens_that_the_header_names() -> None:
    spec, chain = BlockSpec(2, TOKENS, 2, 32, "float32", position=TOKENS), parse("mikv(hi=8,lo=2,share=25)")
    block = torch.randn(spec.shape, generator=torch.Generator().manual_seed(1))
    header = BlockHeader(position=TOKENS, importance=importance.pack(weights()))
    context = Context(importance=importance.unpack(header.importance, TOKENS))
    out = np.zeros(chain.bound(spec, context), np.uint8)
    size = chain.encode(block, spec, out, context)
    back = torch.empty_like(block)
    chain.decode(out[:size], spec, back)  # which tokens they are stands in the block
    errors = (back - block).pow(2).sum((0, 1, 3, 4))
    important = weights().argsort(descending=True)[: TOKENS // 4]
    others = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, important, False)
    assert errors[important].max() < errors[others].min() / 10
    with pytest.raises(CannotEncode):
        chain.encode(block, spec, out, Context(importance=importance.unpack(b"", TOKENS)))


def test_it_lasts_through_memory_disk_and_a_restart(make_daemon: MakeDaemon) -> None:
    header = BlockHeader(parent=b"p" * 32, position=TOKENS, importance=importance.pack(weights()))
    daemon = make_daemon({"disk.bytes": "8MiB"}).start()
    with daemon.client() as client:
        client.put(b"k" * 32, bytes(4096), header)
        assert client.get(b"k" * 32).header == header
        until(lambda: daemon.stats()["queue"]["blocks"] == 0, "the queue to be empty")
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        assert client.lookup([b"k" * 32]) == [TierCode.DISK]
        assert client.get(b"k" * 32).header == header


def test_more_than_a_block_can_have_is_refused(make_daemon: MakeDaemon) -> None:
    with make_daemon({}).start().client() as client, pytest.raises(InvalidParams, match="importance"):
        client.put(b"k" * 32, bytes(4096), BlockHeader(importance=bytes(1 << 15)))


def test_it_is_in_the_record_of_redis() -> None:
    block = BlockId(Scope("uid-1", b"n" * 32), b"k" * 32)
    header = BlockHeader(importance=importance.pack(weights()))
    value = record.encode(block, record.new_write(), header, 64, [record.sum_of(bytes(64))], None)
    assert record.decode(block, value, None).header == header


def test_headers_without_it_are_as_they_were() -> None:
    assert msgspec.msgpack.encode(BlockHeader(position=3)) == msgspec.msgpack.encode({"position": 3})


def test_what_nobody_looks_at_leaves_first_where_cost_counts() -> None:
    plain = BlockHeader(tokens=bytes(4 * TOKENS))
    heavy, light = (
        msgspec.structs.replace(plain, importance=importance.pack(torch.full((TOKENS,), share))) for share in (1.5, 0.7)
    )
    assert recompute_cost(heavy, 1) == pytest.approx(1.5 * recompute_cost(plain, 1), rel=1e-3)
    policy = make_policy("gdsf")
    for name, header in (("heavy", heavy), ("plain", plain), ("light", light)):
        policy.insert(name, 4096, cost=recompute_cost(header, 4096))
    assert list(policy.victims()) == ["light", "plain", "heavy"]


@pytest.mark.parametrize(("value", "expected"), [(0.0, WEIGHTS[0]), (100.0, WEIGHTS[1]), (float("nan"), 1.0)])
def test_a_weight_has_bounds(value: float, expected: float) -> None:
    assert weight(BlockHeader(importance=np.full(TOKENS, value, "<f2").tobytes())) == expected
    assert weight(BlockHeader(importance=b"\x01")) == 1.0
