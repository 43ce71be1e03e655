"""Chunks through a whole daemon: stored, found, reused by who may, gone with their blocks, back after a restart."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from daemons import DaemonProcess, MakeDaemon, until

from kvstore.client import AsyncKVStoreClient, KVStoreClient, Loaded, Room, chunk_keys, chunk_parts
from kvstore.errors import InvalidParams
from kvstore.keys import prefix_keys
from kvstore.types import Miss, Namespace, TierCode

NS = Namespace(model="chunks", block_tokens=16)
NBYTES = 512


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, count, dtype=np.int32)


def body(tokens: bytes) -> bytes:
    return (tokens * NBYTES)[: NBYTES * (len(tokens) // 4)]


def put(client: KVStoreClient, tokens: np.ndarray, namespace: Namespace = NS, durable: bool = False, **how) -> bytes:
    """Store a chunk; the key of its last block."""
    parts = chunk_parts(namespace, tokens, **how)
    offers = [(part.key, NBYTES * (part.stop - part.start), part.header) for part in parts]
    with client.reserve(offers, namespace=namespace) as reservation:
        rooms = [room for room in reservation.blocks if isinstance(room, Room)]
        for room in rooms:
            room.write(body(parts[room.index].header.tokens))
        reservation.commit([room.index for room in rooms], durable=durable)
    return parts[-1].key


def read(client: KVStoreClient, last: bytes, namespace: Namespace = NS) -> tuple[np.ndarray, bytes]:
    """Tokens and bytes of a chunk, as a connector reads it."""
    with client.lease([last], namespace=namespace, headers=True) as lease:
        (block,) = lease.blocks
        assert not isinstance(block, Miss)
        assert block.header is not None
        info = block.header.chunk
    assert info is not None
    loaded = client.get_many(chunk_keys(last, info), namespace=namespace)
    return np.frombuffer(info.tokens, "<i4"), b"".join(bytes(one.data) for one in loaded if isinstance(one, Loaded))


def test_a_chunk_of_several_blocks_is_found_anywhere_and_read_back(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        chunk, system = ids(40, 1), ids(7, 2)
        last = put(client, chunk, before=system)
        prompt = np.concatenate([ids(23, 3), chunk, ids(9, 4)])
        (found,), absent = client.match(prompt, find=True, namespace=NS)
        assert (found.start, found.stop, found.key, found.blocks) == (23, 63, last, 3)
        assert (found.tier, found.capture, absent) == (TierCode.HOST, "system", [])
        tokens, data = read(client, found.key)
        assert np.array_equal(tokens, chunk)
        assert data == b"".join(body(chunk[a : a + 16].tobytes()) for a in (0, 16, 32))


def test_named_spans_and_separators_say_what_is_not_stored_yet(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        chunk, other = ids(20, 11), ids(18, 12)
        put(client, chunk)
        mark = np.array([60_001, 60_002], np.int32)
        prompt = np.concatenate([ids(5, 13), mark, chunk, mark, other, mark, ids(3, 14)])
        found, absent = client.match(prompt, separator=mark, namespace=NS)
        assert [(one.start, one.stop) for one in found] == [(7, 27)]
        assert absent == [(29, 47)]
        found, absent = client.match(prompt, spans=[(7, 27), (29, 40)], separator=mark, namespace=NS)
        assert len(found) == 1
        assert absent == [(29, 40)]


@pytest.mark.parametrize("spans", [[(3, 3)], [(0, 99)], [(0, 5), (4, 8)], [(6, 8), (0, 2)]])
def test_spans_that_make_no_sense_are_refused_and_the_connection_lives(shared_daemon: DaemonProcess, spans):
    with shared_daemon.client() as client:
        with pytest.raises(InvalidParams, match="spans"):
            client.match(ids(10, 1), spans=spans, namespace=NS)
        client.stats()


def test_wrong_token_ids_under_a_content_key_are_refused(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        (part,) = chunk_parts(NS, ids(12, 21))
        assert part.header.chunk is not None
        lie = msgspec.structs.replace(part.header.chunk, tokens=ids(12, 22).tobytes())
        wrong = msgspec.structs.replace(part.header, tokens=ids(12, 22).tobytes(), chunk=lie)
        with pytest.raises(InvalidParams, match="content key"):
            client.reserve([(part.key, NBYTES, wrong)], namespace=NS)
        assert client.match(ids(12, 22), spans=[(0, 12)], namespace=NS)[0] == []


def test_other_namespaces_and_labels_do_not_see_it(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        chunk = ids(40, 31)
        put(client, chunk, before=ids(4, 32), lineage=[b"x" * 32], labels=["board"])
        assert client.match(chunk, find=True, namespace=NS)[0] == []
        assert len(client.match(chunk, find=True, labels=["board"], namespace=NS)[0]) == 1
        for other in ({"salt": "s"}, {"tenant": "t"}, {"lora": "a"}, {"model": "m"}):
            elsewhere = msgspec.structs.replace(NS, **other)
            assert client.match(chunk, find=True, labels=["board"], namespace=elsewhere)[0] == []


def test_a_block_that_is_a_prefix_already_is_not_stored_twice(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        chunk = ids(40, 41)
        names = dict(enumerate(prefix_keys(NS, chunk)))
        for place, key in names.items():
            client.put(key, body(chunk[16 * place : 16 * place + 16].tobytes()), namespace=NS)
        before = client.stats()["tiers"]["host"]["blocks"]
        put(client, chunk, names=names)
        assert client.stats()["tiers"]["host"]["blocks"] == before + 1
        (found,), _ = client.match(chunk, find=True, namespace=NS)
        assert read(client, found.key)[1] == body(chunk[:16].tobytes()) + body(chunk[16:32].tobytes()) + body(
            chunk[32:].tobytes()
        )
        client.drop([names[0]], namespace=NS)
        assert client.match(chunk, find=True, namespace=NS)[0] == []


async def test_the_other_face_of_the_client_matches_too(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        put(client, ids(40, 45))
    async with AsyncKVStoreClient(shared_daemon.socket, namespace=NS) as other:
        (found,), absent = await other.match(ids(40, 45), spans=[(0, 40)])
        assert (found.start, found.stop, absent) == (0, 40, [])
        with pytest.raises(InvalidParams, match="262144"):
            await other.match(np.zeros(262_145, np.int32))


def test_chunks_that_are_empty_or_too_long_are_refused_before_anything_is_sent():
    for tokens in (ids(0, 1), ids(8193, 1)):
        with pytest.raises(InvalidParams, match="tokens"):
            chunk_parts(NS, tokens)
    with pytest.raises(InvalidParams, match="512 blocks"):
        chunk_parts(msgspec.structs.replace(NS, block_tokens=8), ids(8000, 1))


def test_dropped_blocks_leave_the_index(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        chunk = ids(40, 51)
        last = put(client, chunk)
        variants = client.stats()["chunks"]["variants"]
        client.drop([last], namespace=NS)
        assert client.match(chunk, find=True, namespace=NS)[0] == []
        assert client.stats()["chunks"]["variants"] == variants - 1


def test_the_variant_that_is_replaced_leaves_the_store(make_daemon: MakeDaemon):
    daemon = make_daemon({"chunks.variants": "2"}).start()
    with daemon.client() as client:
        chunk = ids(40, 61)
        keys = [put(client, chunk, before=ids(5, seed)) for seed in range(3)]
        assert client.stats()["chunks"]["variants"] == 2
        until(lambda: client.lookup(keys[:1], prefix=False, namespace=NS) == [TierCode.ABSENT], "the drop")
        assert client.stats()["tiers"]["host"]["blocks"] == 6


def test_an_evicted_chunk_is_not_offered(make_daemon: MakeDaemon):
    daemon = make_daemon({"host.bytes": "2MiB", "host.slab_bytes": "1MiB", "disk.bytes": "0"}).start()
    with daemon.client() as client:
        chunk = ids(40, 71)
        put(client, chunk)
        for number in range(600):
            client.put(bytes([number % 256, number // 256]).ljust(32, b"f"), b"x" * 8192, namespace=NS)
        assert client.match(chunk, find=True, namespace=NS)[0] == []
        assert client.stats()["chunks"]["variants"] == 0


def test_after_kill_9_chunks_are_found_again_by_the_headers_on_disk(make_daemon: MakeDaemon):
    daemon = make_daemon({"disk.bytes": "64MiB"}).start()
    with daemon.client() as client:
        chunks = [ids(40, seed) for seed in range(80, 90)]
        for chunk in chunks:
            put(client, chunk, durable=True, before=ids(6, 1), external=np.ones(40))
        client.put(b"p".ljust(32), b"not a chunk", namespace=NS, durable=True)
    daemon.kill()
    daemon.start()
    with daemon.client() as client:
        until(lambda: client.stats()["chunks"]["variants"] == 10, "the index to be rebuilt")
        (found,), _ = client.match(np.concatenate([ids(3, 2), chunks[4]]), find=True, namespace=NS)
        assert found.tier == TierCode.DISK
        assert read(client, found.key)[1] == b"".join(body(chunks[4][a : a + 16].tobytes()) for a in (0, 16, 32))
        assert client.match(chunks[4], find=True, namespace=NS)[0][0].tier == TierCode.HOST
