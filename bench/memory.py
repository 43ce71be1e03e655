"""Host tier: load and store of blocks through the arena, against memcpy of the same sizes between touched pages.

Batches of 128 MiB, as a prompt would: `get_into` into warm buffers, lease and copy, `put_many`. The limit is
`np.copyto` of the same block sizes in the same order, between touched pages of as many bytes, once from ordinary
memory (numpy asks for huge pages there) and once from or to shared memory of the arena's kind. Every side walks four
batches in turn, so each works on 512 MiB of source and 512 MiB of target, far above any cache. A share is the median of
the shares of turns that were taken one right after the other.

    python bench/memory.py --out bench/results/memory.json
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from statistics import median

import numpy as np
from common import arguments, finish, key, running_daemon, timed, touched

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.types import Hit, Stored

MIB = 1 << 20
BATCH = 128 * MIB
TURNS = 4
SLAB = "64MiB"


def shared(nbytes: int) -> np.ndarray:
    """Touched memory of the arena's kind."""
    fd = os.memfd_create("kvstore-bench")
    os.ftruncate(fd, nbytes)
    out = np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8)
    os.close(fd)
    out[:] = 1
    return out


def blocks_of(memory: np.ndarray, nbytes: int) -> list[list[np.ndarray]]:
    """The batches of some memory, each a list of blocks."""
    parts = [memory[at : at + nbytes] for at in range(0, len(memory), nbytes)]
    per_batch = BATCH // nbytes
    return [parts[at : at + per_batch] for at in range(0, len(parts), per_batch)]


def copy(targets: list[np.ndarray], sources: list[np.ndarray]) -> None:
    """The limit."""
    for target, source in zip(targets, sources, strict=True):
        np.copyto(target, source)


class Race:
    """One block size."""

    def __init__(self, kv: KVStoreClient, nbytes: int, mine: np.ndarray, other: np.ndarray, arena: np.ndarray) -> None:
        self._kv = kv
        self._mine = blocks_of(mine, nbytes)
        self._other = blocks_of(other, nbytes)
        self._arena = blocks_of(arena, nbytes)
        per_batch = BATCH // nbytes
        self._keys = [[key(turn * per_batch + i, str(nbytes)) for i in range(per_batch)] for turn in range(TURNS)]

    def store(self, turn: int) -> None:
        """Store a batch that is not there."""
        items = [(k, b, BlockHeader()) for k, b in zip(self._keys[turn], self._mine[turn], strict=True)]
        outcomes = self._kv.put_many(items)
        assert all(isinstance(o, Stored) for o in outcomes), outcomes

    def load(self, turn: int) -> None:
        """Load a batch into warm buffers."""
        outcomes = self._kv.get_into(self._keys[turn], self._mine[turn])
        assert all(isinstance(o, Hit) for o in outcomes), outcomes

    def lease_and_copy(self, turn: int) -> None:
        """What an engine's connector does."""
        with self._kv.lease(self._keys[turn]) as lease:
            for block, buffer in zip(lease.blocks, self._mine[turn], strict=True):
                block.copy_into(buffer)  # type: ignore[union-attr]
            assert lease.valid()

    def run(self, rounds: int) -> dict[str, list[float]]:
        """GiB/s of every contestant, each turn of each round taken by all of them one after the other."""
        mine, other, arena = self._mine, self._other, self._arena
        seen: dict[str, list[float]] = {}

        def race(name: str, function: Callable[[int], None], turn: int) -> None:
            seen.setdefault(name, []).append(BATCH / timed(function, turn) / (1 << 30))

        for turn in range(TURNS):
            self.store(turn)
        for number in range(rounds * TURNS):
            turn = number % TURNS
            race("get_into", self.load, turn)
            race("memcpy from shared memory", lambda t: copy(mine[t], arena[t]), turn)
            race("lease and copy", self.lease_and_copy, turn)
            race("memcpy", lambda t: copy(mine[t], other[t]), turn)
            self._kv.drop(self._keys[turn])
            race("put_many", self.store, turn)
            race("memcpy to shared memory", lambda t: copy(arena[t], mine[t]), turn)
        self._kv.drop()
        return seen


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mib", type=int, nargs="*", default=[1, 4, 16, 32], help="block sizes (default 1 4 16 32)")
    args = parser.parse_args()
    results: dict[str, object] = {}
    rows: list[tuple[object, ...]] = []
    mine, other, arena = touched(TURNS * BATCH), touched(TURNS * BATCH), shared(TURNS * BATCH)
    settings = {"host.bytes": "768MiB", "host.slab_bytes": SLAB, "host.ahead_bytes": "768MiB"}
    with running_daemon(settings) as address, KVStoreClient(address, namespace=Namespace(model="bench")) as kv:
        for mib in args.mib:
            turns = Race(kv, mib * MIB, mine, other, arena).run(args.rounds)
            seen = {name: {"gib_s": median(rates), "best": max(rates)} for name, rates in turns.items()}
            results[f"{mib}_mib"] = seen
            for name, limits, target in (
                ("get_into", ("memcpy", "memcpy from shared memory"), 0.95),
                ("lease and copy", ("memcpy", "memcpy from shared memory"), 0.95),
                ("put_many", ("memcpy", "memcpy to shared memory"), 0.90),
            ):
                rate = seen[name]["gib_s"]
                shares = [median(a / b for a, b in zip(turns[name], turns[limit], strict=True)) for limit in limits]
                seen[name] |= {"of_memcpy": shares[0], "of_memcpy_shared": shares[1], "target": target}
                verdict = "ok" if min(shares) >= target else "ok, shared" if shares[1] >= target else "short"
                limit = ", ".join(f"{seen[limit]['gib_s']:.1f}" for limit in limits)
                share = ", ".join(f"{share:.0%}" for share in shares)
                rows.append((f"{mib} MiB", name, f"{rate:.1f} GiB/s", limit, share, f">= {target:.0%}", verdict))
    header = ("block", "what", "kvstore", "memcpy: ordinary, shared", "share of each", "target", "")
    finish(args, "memory", {"batch_bytes": BATCH, "batches": TURNS, **results}, header, rows)


if __name__ == "__main__":
    main()
