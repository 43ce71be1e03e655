"""Eviction policies by name. A new policy is one file and one row here, or an entry point of ``kvstore.eviction``.

A policy of another distribution is found by its entry point's name; it must pass `kvstore.testing.policy_suite`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvstore.errors import ConfigError
from kvstore.eviction.arc import ARC
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.chooser import Chooser
from kvstore.eviction.closed import PrefixClosed
from kvstore.eviction.gdsf import GDSF
from kvstore.eviction.lhd import LHD
from kvstore.eviction.lru import LRU
from kvstore.eviction.mq import MQ
from kvstore.eviction.s3fifo import S3FIFO

POLICIES: dict[str, type[EvictionPolicy[Any]]] = {
    policy.name: policy for policy in (LHD, Chooser, LRU, ARC, MQ, S3FIFO, GDSF)
}


def names() -> list[str]:
    """Names of all policies that can be chosen."""
    return sorted({*POLICIES, *_plugins()})


@cache
def _plugins() -> dict[str, EntryPoint]:
    """What other distributions bring, looked up once: that reads a file of each that is installed."""
    return {found.name: found for found in entry_points(group="kvstore.eviction")}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """Make an empty policy that keeps prefixes closed.

    Raises
    ------
    ConfigError
        If no policy has that name, here or among the entry points, or what an entry point names is not a policy.
    """
    policy = POLICIES.get(name) or _plugin(name)
    if policy is None:
        raise ConfigError(f"eviction: {name!r} is not one of {', '.join(names())}.")
    return policy() if policy is LHD else PrefixClosed(policy())


def _plugin(name: str) -> type[EvictionPolicy[Any]] | None:
    found = _plugins().get(name)
    if found is None:
        return None
    policy = found.load()
    if not (isinstance(policy, type) and issubclass(policy, EvictionPolicy)):
        raise ConfigError(f"eviction: the entry point {name!r} names {found.value}, which is not a policy.")
    return policy
