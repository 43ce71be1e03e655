"""End the process, as `kill -9` would, at a named point of put, commit, promote, flush or recover.

For tests of what survives. A point is a method and whether the process ends before or after it; `arm` wraps that method
in the running process, so the code it is in knows nothing of it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A method, as ``module:Class.method``, and whether the process ends before it does its work or after."""

    where: str
    after: bool


_FILES = "kvstore.disk.io:Files"

POINTS: dict[str, Point] = {
    "put.allocate": Point("kvstore.tiers.host:HostTier.allocate", after=True),
    "put.reserved": Point("kvstore.leases:Ledger.reserve", after=True),
    "commit.begin": Point("kvstore.leases:Ledger.take", after=False),
    "commit.insert": Point("kvstore.tiers.host:HostTier.insert", after=True),
    "commit.queue": Point("kvstore.writebehind:WriteBehind.submit", after=True),
    "commit.durable": Point("kvstore.chain:TierChain.durable", after=True),
    "flush.begin": Point("kvstore.writebehind:WriteBehind._write", after=False),
    "flush.create": Point(f"{_FILES}.create_tmp", after=True),
    "flush.written": Point(f"{_FILES}.write", after=True),
    "flush.sync": Point(f"{_FILES}.sync", after=True),
    "flush.publish": Point(f"{_FILES}.publish", after=False),
    "flush.published": Point(f"{_FILES}.publish", after=True),
    "flush.make_dir": Point(f"{_FILES}.make_dir", after=True),
    "flush.sync_dir": Point(f"{_FILES}.sync_dir", after=False),
    "flush.take": Point(f"{_FILES}.open_taken", after=True),
    "flush.evict": Point(f"{_FILES}.unlink", after=True),
    "promote.begin": Point("kvstore.chain:TierChain._promote", after=False),
    "promote.read": Point(f"{_FILES}.read", after=True),
    "promote.got": Point("kvstore.tiers.disk:DiskTier.get", after=True),
    "recover.lock": Point(f"{_FILES}.lock", after=True),
    "recover.format": Point(f"{_FILES}.publish", after=False),
    "recover.wipe": Point(f"{_FILES}.unlink", after=True),
    "recover.list": Point(f"{_FILES}.list_dir", after=True),
    "recover.listed": Point("kvstore.disk.store:by_last_use", after=False),
    "client.reserve": Point("kvstore.client.core:Core.reserve", after=False),
    "client.write": Point("kvstore.client.blocks:Room.write", after=False),
    "client.written": Point("kvstore.client.blocks:Room.write", after=True),
    "client.commit": Point("kvstore.client.core:Core.commit", after=False),
    "client.lease": Point("kvstore.client.sync:KVStoreClient._send", after=True),
    "client.copy": Point("kvstore.client.core:copy_parts", after=False),
}
"""Every point, by name."""


def die() -> None:
    """End this process now: nothing is flushed, nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, nth: int = 1) -> None:
    """End this process when a point is passed for the n-th time from now on.

    Raises
    ------
    KeyError
        If there is no such point.
    """
    where, after = POINTS[point]
    module_name, _, path = where.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, _wrapped(getattr(owner, name), after, nth))


def _wrapped(function: Callable[..., Any], after: bool, nth: int) -> Callable[..., Any]:
    passed = itertools.count(1)

    def pass_by() -> None:
        if next(passed) == nth:
            die()

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            if not after:
                pass_by()
            result = await function(*args, **kwargs)
            if after:
                pass_by()
            return result

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not after:
            pass_by()
        result = function(*args, **kwargs)
        if after:
            pass_by()
        return result

    return called
