"""The operator's desk on a real daemon: where blocks are, why others are not, who reads, and what can be changed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from daemons import NAMESPACE, NS, DaemonProcess, MakeDaemon, payload, store

from kvstore import KVStoreClient, Namespace
from kvstore.client import Verdict, operator, report_blend
from kvstore.errors import AccessError, ConfigError, InternalError, RequestError
from kvstore.eviction import make_policy, names
from kvstore.eviction.partitions import Partitions
from kvstore.keys import namespace_digest, prefix_keys
from kvstore.obs.blends import MOST, Blends
from kvstore.obs.departures import Departures
from kvstore.types import BlockHeader, BlockId, Gone, Scope, TierCode
from kvstore.wire.messages import Report
from kvstore.wire.traffic import BOUNDS_S, Traffic

KEYS = prefix_keys(NAMESPACE, range(256 * 6))
SCOPE = Scope("uid-1", b"n" * 32)
MIB = 1 << 20


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> DaemonProcess:
    return make_daemon({"host.bytes": "16MiB", "host.slab_bytes": "4MiB", "disk.bytes": "0"}).start()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[KVStoreClient]:
    with KVStoreClient(daemon.socket, namespace=NAMESPACE) as client:
        yield client


def test_explain_tells_where_blocks_are_and_why_others_are_not(client: KVStoreClient):
    store(client, [KEYS[0], KEYS[1], KEYS[3]])
    client.drop([KEYS[1]])
    with client.lease([KEYS[0]]) as lease:
        assert lease
        seen = operator.explain(client, NS, KEYS[:5])
    assert [block["tiers"] for block in seen] == [["host"], [], [], ["host"], []]
    assert [block["reachable"] for block in seen] == [True, False, False, False, False]
    assert [block["reason"] for block in seen] == ["", "dropped", "never_stored", "", "never_stored"]
    assert seen[0]["readers"] == 1
    assert seen[0]["bytes"] > 0
    assert 0 <= seen[0]["age_s"] < 60
    assert 0 <= seen[1]["gone_s"] < 60
    assert seen[1]["left"] == "host"
    assert operator.explain(client, NS, []) == []


def test_an_encoded_block_says_by_which_chain(make_daemon: MakeDaemon):
    daemon = make_daemon({"host.bytes": "16MiB", "disk.bytes": "16MiB", "codecs.disk": "lossless"}).start()
    namespace = Namespace(model="m", layout="lkthd1", dtype="float16", layers=1, kv_heads=1, head_dim=64)
    with KVStoreClient(daemon.socket, namespace=namespace) as client:
        key, *_ = client.keys(range(256))
        client.put(key, bytes(2 * 64 * 2 * 256), durable=True)
        (seen,) = operator.explain(client, namespace_digest(namespace), [key])
    assert seen["tiers"] == ["host", "disk"]
    assert seen["chains"]["disk"].startswith("byteplanes|zstd")


def test_an_evicted_block_says_so(client: KVStoreClient):
    chain = prefix_keys(NAMESPACE, range(256 * 40))
    for key in chain:
        client.put(key, payload(key, MIB))
    reasons = {block["reason"] for block in operator.explain(client, NS, chain)}
    assert reasons == {"", "evicted"}


def test_what_an_engine_blended_is_summed_and_shown(client: KVStoreClient):
    told = Verdict(0.15, "auto", 8, 0.05, 0.97, 0.1, 0.9)
    report_blend(client, NAMESPACE, verdict=told)
    report_blend(client, NAMESPACE, prompts=1, tokens=1000, computed=150)
    report_blend(client, NAMESPACE, prompts=2, tokens=500, computed=600)
    (seen,) = client.stats()["blends"]
    assert (seen["model"], seen["digest"]) == (NAMESPACE.model, NS.hex())
    assert (seen["prompts"], seen["tokens"], seen["computed"]) == (3, 1500, 750)
    assert seen["verdict"]["kl"] == 0.05
    # Figures that the daemon does not take are not told, and cost the caller nothing.
    report_blend(client, NAMESPACE, prompts=1, verdict=Verdict(2.0, "auto", 8, -1.0, 0.97, 0.1, 0.9))
    assert client.stats()["blends"][0]["prompts"] == 3


def test_what_computing_takes_is_seen_from_question_to_offer(client: KVStoreClient):
    for ask in (lambda: client.lookup(KEYS[:4]), lambda: client.get(KEYS[4])):
        client.drop(None)
        ask()
        time.sleep(0.2)
        store(client, KEYS[:5])
    assert client.get(KEYS[0])
    saved = client.stats()["saved"]
    assert saved["tokens_timed"] == 256
    # Four or five blocks in 0.2 s or somewhat more; spread over ten seconds it would be 2 s.
    assert 256 / (5 * 256 / 0.2) <= saved["seconds"] < 1


def test_reports_of_many_namespaces_are_bounded():
    blends = Blends()
    scopes = [Scope("uid-1", number.to_bytes(32, "big")) for number in range(MOST + 2)]
    for scope in scopes:
        blends.add(scope, Report(scope.ns, prompts=1 << 53))
    blends.add(scopes[-1], Report(scopes[-1].ns, prompts=1 << 53))
    state = blends.state(lambda scope: None)
    assert [each["digest"] for each in state] == [scope.ns.hex() for scope in scopes[2:]]
    assert state[-1]["prompts"] == 1 << 53


def test_leases_are_listed_while_they_last(client: KVStoreClient):
    store(client, KEYS[:3])
    assert operator.leases(client) == []
    with client.lease(KEYS[:3]):
        (held,) = operator.leases(client)
        assert held["blocks"] == 3
        assert held["namespace"] == NS.hex()
        assert held["model"] == NAMESPACE.model
        assert 0 < held["expires_s"] <= 60
    assert operator.leases(client) == []


def test_a_tier_gets_another_policy_and_keeps_its_blocks(client: KVStoreClient):
    for key, parent in zip(KEYS, [b"", *KEYS], strict=False):
        client.put(key, payload(key), BlockHeader(parent=parent))
    assert operator.policy(client)["host"] == "lhd"
    for name in ("lru", "arc", "mq", "s3-fifo", "gdsf", "lhd"):
        assert operator.policy(client, "host", name) == {"host": name}
        assert all(client.get(key) for key in KEYS)
    with pytest.raises(RequestError, match="attic"):
        operator.policy(client, "attic", "lru")
    with pytest.raises(ConfigError, match="fifo"):
        operator.policy(client, "host", "fifo")


def test_only_the_own_user_changes_a_policy(shared_daemon: DaemonProcess, tcp_port: int):
    from daemons import TOKEN

    with KVStoreClient(f"tcp://127.0.0.1:{tcp_port}", token=TOKEN, namespace=NAMESPACE) as remote:
        assert operator.policy(remote)
        with pytest.raises(AccessError):
            operator.policy(remote, "host", "lru")


def test_a_namespace_is_dropped_by_its_digest(client: KVStoreClient):
    store(client, KEYS)
    assert operator.drop(client, NS) == len(KEYS)
    assert not any(client.get(key) for key in KEYS)


def test_wanted_blocks_are_those_handed_out_and_those_computed(client: KVStoreClient):
    store(client, KEYS)
    for _ in range(3):
        with client.lease(KEYS):
            pass
    deadline = time.monotonic() + 5
    while (reuse := client.stats()["reuse"])["reusable"] < 18:
        assert time.monotonic() < deadline, reuse
        time.sleep(0.1)
    assert reuse["wanted"] == 24
    assert reuse["ceiling"] == pytest.approx(0.75)
    assert [rate for _, rate in reuse["curve"]] == sorted(rate for _, rate in reuse["curve"])


# -- parts -------------------------------------------------------------------------------------------------------------


def test_departures_are_bounded_and_the_latest_counts():
    departures = Departures(capacity=3)
    blocks = [BlockId(SCOPE, bytes([i]) * 32) for i in range(5)]
    for block in blocks:
        departures.removed(TierCode.HOST, block, Gone.EVICTED)
    departures.removed(TierCode.DISK, blocks[4], Gone.CORRUPT)
    departures.refused(blocks[3], "host_full")
    assert len(departures) == 3
    assert departures.find(blocks[0]) is None
    latest = departures.find(blocks[4])
    assert latest is not None
    assert (latest.tier, latest.reason) == ("disk", "corrupt")
    refused = departures.find(blocks[3])
    assert refused is not None
    assert (refused.tier, refused.reason) == ("", "host_full")


@pytest.mark.parametrize("name", names())
def test_a_switched_order_yields_each_block_once(name: str):
    order = Partitions(make_policy("lru"), lambda item: (4096, 1.0, None))
    blocks = [BlockId(SCOPE, bytes([i]) * 32) for i in range(50)]
    for block in blocks:
        order.insert(block, 4096, cost=1.0, parent=None)
    order.switch(name)
    assert order.policy == name
    assert len(order) == 50
    left = [item for item, _ in order.victims(None, 0, lambda _: 4096)]
    assert sorted(left) == blocks
    for item in left:
        order.remove(item, evicted=True)
    assert len(order) == 0


@pytest.mark.parametrize("name", ["lru", "arc", "mq", "s3-fifo", "gdsf"])
def test_blocks_that_name_each_other_as_parents_can_leave(name: str):
    order = Partitions(make_policy(name), lambda item: (4096, 1.0, None))
    blocks = [BlockId(SCOPE, bytes([i]) * 32) for i in range(3)]
    for block, parent in zip(blocks, (blocks[0], blocks[2], blocks[1]), strict=True):
        order.insert(block, 4096, cost=1.0, parent=parent)
    assert sorted(item for item, _ in order.victims(None, 0, lambda _: 4096)) == blocks


def test_request_times_are_counted_in_buckets_and_slow_ones_remembered():
    traffic = Traffic()
    for ago in (0.0, 1e-3, 0.2, 100.0):
        traffic.record("lease", time.perf_counter() - ago)
    traffic.record("reserve", time.perf_counter() - 1, InternalError("x"))
    traffic.record("events", time.perf_counter() - 30)
    below = dict(traffic.verbs["lease"].below())
    assert list(below) == list(BOUNDS_S)
    assert below[10.0] == 3, "one took longer than the last bound"
    assert below[0.25] == 3
    assert below[10e-3] == 2
    assert [(slow.verb, slow.error) for slow in traffic.slow] == [("lease", ""), ("lease", ""), ("reserve", "KV900")]
