"""Chunks out of a daemon's memory to their places in a prompt: on a device some layers ahead of what is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_gpu_tier import Daemon

from kvstore import KVStoreClient, Namespace
from kvstore.client import Room, chunk_parts
from kvstore.rope import Rotary
from kvstore.types import Stored
from kvstore_connectors import chunk_loads
from kvstore_connectors.base import Tally
from kvstore_connectors.blend.prompt import LayerKV
from kvstore_connectors.chunk_loads import ChunkLoad, Wanted, begin_load

LAYERS, HEADS, DIM, BLOCK = 11, 2, 64, 32
NAMESPACE = Namespace(
    model="chunks", dtype="bfloat16", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, block_tokens=BLOCK, layout="lkthd1"
)
ROTATION = Rotary(tuple(1e4 ** (-i / 32) for i in range(32)))
SYSTEM = list(range(10))
LENGTHS = (70, 45, 64, 33, 100)
CHUNKS = [[1000 * number + i for i in range(length)] for number, length in enumerate(LENGTHS, 1)]
ORDER = (3, 0, 4, 2, 1)


def content(number: int) -> torch.Tensor:
    """KV of a chunk, ``[layer, side, token, head, dim]``."""
    made = torch.Generator().manual_seed(number)
    return torch.randn((LAYERS, 2, LENGTHS[number], HEADS, DIM), generator=made).bfloat16()


def turned(keys: torch.Tensor, distance: int) -> torch.Tensor:
    """Keys ``[layer, token, head, dim]`` moved to later positions, in float64."""
    angles = distance * torch.tensor(ROTATION.frequencies, dtype=torch.float64)
    a, b = keys.double().chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVStoreClient]:
    """Of a daemon that has the chunks, captured behind a system prompt."""
    daemon = Daemon(tmp_path_factory.mktemp("chunks"), gpu__bytes="0")
    try:
        with KVStoreClient(daemon.socket, namespace=NAMESPACE, timeout_s=20) as opened:
            for number, ids in enumerate(CHUNKS):
                parts = chunk_parts(NAMESPACE, np.array(ids, "<i4"), before=np.array(SYSTEM, "<i4"))
                pieces = [content(number)[:, :, part.start : part.stop].contiguous() for part in parts]
                offers = [(part.key, piece.nbytes, part.header) for part, piece in zip(parts, pieces, strict=True)]
                with opened.reserve(offers, namespace=NAMESPACE) as reservation:
                    for room, piece in zip(reservation.blocks, pieces, strict=True):
                        assert isinstance(room, Room)
                        room.write(piece.view(torch.uint8).numpy().ravel())
                    assert all(isinstance(one, Stored) for one in reservation.commit(range(len(parts))))
            yield opened
    finally:
        daemon.end()


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def wanted() -> tuple[list[Wanted], bytes]:
    """The chunks in another order, and the prompt's tokens."""
    tokens, out = list(SYSTEM), []
    for number in ORDER:
        ids = np.array(CHUNKS[number], "<i4")
        key = chunk_parts(NAMESPACE, ids, before=np.array(SYSTEM, "<i4"))[-1].key
        out.append(Wanted(len(tokens), len(tokens) + len(ids), 0, key, False))
        tokens += CHUNKS[number]
    return out, np.array([*tokens, 7, 8, 9], "<i4").tobytes()


def begun(client: Any, device: torch.device) -> tuple[ChunkLoad, list[LayerKV], torch.Tensor]:
    """A load, where it goes to, and what has to be there in the end, ``[layer, side, token, head, dim]``."""
    chunks, tokens = wanted()
    room = torch.zeros((LAYERS, 2, len(tokens) // 4, HEADS, DIM), dtype=torch.bfloat16, device=device)
    expected = torch.zeros(room.shape, dtype=torch.float64)
    for number, one in zip(ORDER, chunks, strict=True):
        keys, values = content(number).transpose(0, 1)
        expected[:, 0, one.start : one.stop] = turned(keys, one.start - len(SYSTEM))
        expected[:, 1, one.start : one.stop] = values.double()
    cache = [LayerKV(*sides) for sides in room]
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    load = begin_load(client, NAMESPACE, chunks, tokens, cache, ROTATION, 5.0, Tally(), stream)
    assert load is not None
    return load, cache, expected


def same(held: LayerKV, expected: torch.Tensor) -> None:
    assert torch.equal(held.values.double().cpu(), expected[1])
    torch.testing.assert_close(held.keys.double().cpu(), expected[0], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("at_once", [256, 4])
def test_a_layer_is_there_once_it_was_waited_for(
    client: Any, device: torch.device, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_loads, "BLOCKS_AT_ONCE", at_once)
    load, cache, expected = begun(client, device)
    for layer in range(LAYERS):
        load.wait(layer)
        same(cache[layer], expected[layer])
    assert load.finish()
    assert load.seconds > 0


def test_all_is_there_in_the_end_whoever_waited(client: Any, device: torch.device) -> None:
    load, cache, expected = begun(client, device)
    assert load.finish()
    for layer in range(LAYERS):
        same(cache[layer], expected[layer])


def test_what_is_computed_meanwhile_is_not_overwritten(client: Any, device: torch.device) -> None:
    """Rows written behind a layer's coming stay; later layers come behind the caller's back."""
    load, cache, _ = begun(client, device)
    for layer in range(LAYERS):
        load.wait(layer)
        cache[layer].keys[20:90] = layer + 1
        time.sleep(0.002)
    assert load.finish()
    for layer, held in enumerate(cache):
        assert bool((held.keys[20:90] == layer + 1).all())


def test_a_chunk_of_other_tokens_is_not_loaded(client: Any, device: torch.device) -> None:
    chunks, tokens = wanted()
    ids = np.frombuffer(tokens, "<i4").copy()
    ids[chunks[2].start + 5] += 1
    tally = Tally()
    cache = [
        LayerKV(*torch.zeros((2, len(ids), HEADS, DIM), dtype=torch.bfloat16, device=device)) for _ in range(LAYERS)
    ]
    assert begin_load(client, NAMESPACE, chunks, ids.tobytes(), cache, ROTATION, 5.0, tally) is None
    assert tally.peek()["blend_wrong_tokens"] == 1
    assert not any(bool(held.keys.any()) for held in cache)
