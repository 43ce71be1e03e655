"""A daemon in a dictionary, for tests that want every moment in their own hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvstore.client import LeasedBlock, Room
from kvstore.errors import KVStoreError
from kvstore.keys import namespace_digest
from kvstore.types import Exists, Miss, MissReason, Namespace, Stored, TierCode

RANKS = [Namespace(model="m", tp_rank=rank, tp_size=2, block_tokens=8) for rank in range(2)]
ENGINE_BLOCK, BLOCK = 4, 8


class FakeClient:
    """A daemon in a dictionary: (namespace digest, key) -> bytes."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes, bytes], bytes] = {}
        self.tiers: dict[tuple[bytes, bytes], TierCode] = {}
        self.refuse: dict[bytes, list[MissReason]] = {}
        self.valid = True
        self.error: KVStoreError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []
        self.speeds: dict[TierCode, tuple[float, float, float]] = {}
        self.prefetched: list[bytes] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.gate.wait(5)
        if self.error is not None:
            raise self.error

    def connect(self) -> None:
        if self.error is not None:
            raise self.error

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def lookup_many(self, queries: Sequence[tuple[Namespace, list[bytes]]], *, prefix: bool) -> list[list[TierCode]]:
        self._called("lookup")
        out = []
        for namespace, keys in queries:
            ids = [(namespace_digest(namespace), key) for key in keys]
            found = [self.tiers.get(one, TierCode.HOST) if one in self.blocks else TierCode.ABSENT for one in ids]
            out.append(found)
        return out

    def prefetch(self, keys: Sequence[bytes], *, namespace: Namespace) -> int:
        self._called("prefetch")
        self.prefetched += keys
        return len(keys)

    def lease(self, keys: Sequence[bytes], *, namespace: Namespace, ttl_s: float, wait_s: float) -> Any:
        self._called("lease")
        blocks: list[Any] = []
        for index, key in enumerate(keys):
            data = self.blocks.get((namespace_digest(namespace), key))
            reasons = self.refuse.get(key)
            if reasons:
                blocks.append(Miss(reasons.pop(0)))
            elif data is None:
                blocks.append(Miss(MissReason.ABSENT))
            else:
                array = np.frombuffer(data, dtype=np.uint8)
                half = len(array) // 2  # every other block lies in two parts
                parts = [array] if index % 2 == 0 else [array[:half], array[half:]]
                blocks.append(LeasedBlock(index, len(data), TierCode.HOST, parts, None))
        return _Context(blocks=blocks, valid=lambda: self.valid)

    def reserve(self, offers: Any, *, namespace: Namespace, ttl_s: float, wait_s: float) -> Any:
        self._called("reserve")
        ns = namespace_digest(namespace)
        rooms: list[Any] = []
        for index, (key, nbytes, _) in enumerate(offers):
            memory = [np.zeros(nbytes // 2, dtype=np.uint8), np.zeros(nbytes - nbytes // 2, dtype=np.uint8)]
            rooms.append(Exists() if (ns, key) in self.blocks else Room(index, nbytes, memory))

        def commit(indexes: list[int]) -> list[Any]:
            self._called("commit")
            for index in indexes:
                self.blocks[ns, offers[index][0]] = b"".join(part.tobytes() for part in rooms[index].parts)
            return [Stored() if isinstance(room, Room) else room for room in rooms]

        return _Context(blocks=rooms, commit=commit)


class _Context(SimpleNamespace):
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def hash_of(index: int) -> bytes:
    return bytes([index]) * 32


def eventually(condition: Callable[[], bool], wait_s: float = 5.0) -> bool:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False
