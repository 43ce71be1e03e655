"""Eviction policies by name. A new policy is one file and one row here."""

from __future__ import annotations

from typing import Any

from kvstore.errors import ConfigError
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.lru import LRU

POLICIES: dict[str, type[EvictionPolicy[Any]]] = {LRU.name: LRU}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """Make an empty policy.

    Raises
    ------
    ConfigError
        If no policy has that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"eviction: {name!r} is not one of {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]()
