"""Any order of storing, evicting, dropping, asking, falling behind, reconnecting and restarts: a mirror ends up right.

KVSTORE_TEST_STATEFUL=300 runs 300 examples with fresh randomness instead of the few, always the same, of a normal run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from inprocess import InProcessDaemon

from kvstore import BlockHeader, KVStoreClient, Namespace, TierCode
from kvstore.client import EventStream, Mirror, streams

KEYS = 40
NAMESPACES = (Namespace(model="one"), Namespace(model="two"))
SETTINGS = {
    "host.bytes": str(1100 * 1024),
    "host.ahead_bytes": "0",
    "disk.bytes": "2MiB",
    "events.ring": "24",
}
BLOCK = bytes(60_000)

numbers = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=10, unique=True)
spaces = st.integers(0, len(NAMESPACES) - 1)
Truth = dict[TierCode, dict[bytes, dict[bytes, int]]]


def key(number: int) -> bytes:
    return hashlib.sha256(f"subscribers/{number}".encode()).digest()


class Machine(RuleBasedStateMachine):
    """One daemon, one client that changes things, two subscribers: one that keeps up and one that seldom looks."""

    @initialize()
    def begin(self) -> None:
        self.limit, streams.LIMIT = streams.LIMIT, 7
        self.root = Path(tempfile.mkdtemp(prefix="kv-"))
        self.server = InProcessDaemon(self.root, SETTINGS)
        self.mirrors = [Mirror(), Mirror()]
        self._start()

    def _start(self) -> None:
        self.server.start()
        self.client = KVStoreClient(self.server.socket, timeout_s=20)
        self.streams: list[EventStream] = [self.client.events() for _ in self.mirrors]

    def _end(self) -> None:
        for stream in self.streams:
            stream.close()
        self.client.close()
        self.server.stop()

    def teardown(self) -> None:
        if hasattr(self, "server"):
            streams.LIMIT = self.limit
            self._end()
            shutil.rmtree(self.root)

    # -- the world -----------------------------------------------------------------------------------------------------

    @rule(space=spaces, wanted=numbers)
    def put(self, space: int, wanted: list[int]) -> None:
        """More than memory holds, and in the end more than the disk holds."""
        items = [(key(n), BLOCK[: 1500 * n + 1], BlockHeader()) for n in wanted]
        self.client.put_many(items, namespace=NAMESPACES[space], wait_s=1.0)

    @rule(space=spaces, wanted=numbers)
    def get(self, space: int, wanted: list[int]) -> None:
        self.client.get_many([key(n) for n in wanted], namespace=NAMESPACES[space])

    @rule(space=spaces, wanted=numbers)
    def drop(self, space: int, wanted: list[int]) -> None:
        self.client.drop([key(n) for n in wanted], namespace=NAMESPACES[space])

    @rule(space=spaces)
    def drop_all(self, space: int) -> None:
        self.client.drop(None, namespace=NAMESPACES[space])

    @rule()
    def restart(self) -> None:
        self._end()
        self._start()

    # -- the subscribers -----------------------------------------------------------------------------------------------

    @rule(space=spaces)
    def churn(self, space: int) -> None:
        """So much that who does not look falls behind."""
        for first in range(0, KEYS, 8):
            self.put(space, list(range(first, first + 8)))

    @rule(who=st.integers(0, 1), times=st.integers(1, 3))
    def look(self, who: int, times: int) -> None:
        for _ in range(times):
            self._poll(who)

    @rule(who=st.integers(0, 1))
    def reconnect(self, who: int) -> None:
        """As another process would, which was told the place."""
        place = self.streams[who].position
        self.streams[who].close()
        self.streams[who] = self.client.events(place)

    def _poll(self, who: int) -> bool:
        events = self.streams[who].poll()
        for event in events:
            self.mirrors[who].apply(event)
        return bool(events) or not self.streams[who].position.boot

    @rule(who=st.integers(0, 1))
    def catch_up(self, who: int) -> None:
        """Once nothing moves any more, and the subscriber has asked until there is nothing new, he knows all."""
        self._settle()
        while self._poll(who):
            pass
        truth = self.server.ask(self._truth)
        mirror = self.mirrors[who]
        assert {tier: held for tier, held in mirror.tiers.items() if held} == truth
        assert mirror.blocks == sum(len(keys) for held in truth.values() for keys in held.values())

    def _settle(self) -> None:
        chain, until = self.server.daemon.chain, time.monotonic() + 20
        while self.server.ask(lambda: bool(chain._arrivals or chain.dirty_blocks)):
            assert time.monotonic() < until, "the daemon does not come to rest"
            time.sleep(0.002)

    def _truth(self) -> Truth:
        truth: Truth = {}
        for tier, (scopes, held) in self.server.daemon.chain.holdings().items():
            for scope in scopes():
                if blocks := held(scope):
                    truth.setdefault(tier, {})[scope.ns] = {k: block.nbytes for k, block in blocks.items()}
        return truth


_FRESH = int(os.environ.get("KVSTORE_TEST_STATEFUL", "0"))
TestSubscribers = Machine.TestCase
TestSubscribers.settings = settings(
    max_examples=_FRESH or 12,
    stateful_step_count=30,
    deadline=None,
    derandomize=not _FRESH,
    suppress_health_check=[HealthCheck.too_slow],
)
