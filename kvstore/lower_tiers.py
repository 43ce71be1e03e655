"""The tiers below host memory, as the settings ask for them: disk and Redis, each with what is wrapped around it.

What a tier needs is imported when it is asked for: a daemon without Redis loads no client library of it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvstore import machine
from kvstore.config import Loaded
from kvstore.errors import ConfigError
from kvstore.tiers.base import Tier
from kvstore.types import Namespace, Scope

if TYPE_CHECKING:
    from kvstore.profile import Profiles
    from kvstore.settings import Codecs, Redis


def lower_tiers(loaded: Loaded, fields: Callable[[Scope], Namespace | None], profiles: Profiles | None) -> list[Tier]:
    """The tiers that the settings ask for, not started, fastest first.

    Parameters
    ----------
    loaded : Loaded
        Settings and their origins.
    fields : callable
        What a namespace is, if it is known: a tier keeps blocks encoded as their namespace allows.
    profiles : Profiles or None
        What may be lost of which model's blocks.
    """
    from kvstore.ladder import Ladder
    from kvstore.tiers.wrappers import Breaker

    s = loaded.settings
    ladder = partial(Ladder, fields=fields, profiles=profiles, threads=s.codecs.threads)
    tiers: list[Tier] = []
    if s.disk.bytes:
        tiers.append(ladder(_disk_tier(loaded), exact=s.codecs.disk))
    if s.redis.url:
        tiers.append(ladder(Breaker(_redis_tier(s.redis), deadline_s=4 * s.redis.timeout_s), exact=s.codecs.redis))
    return tiers


def _disk_tier(loaded: Loaded) -> Tier:
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.throttle import Throttled
    from kvstore.tiers.wrappers import Breaker

    s = loaded.settings
    # The automatic budget is a share of free space; what is ours already counts with the same share.
    share = machine.DISK_SHARE if "auto" in loaded.origins["disk.bytes"] else 0.0
    disk = DiskTier(
        s.disk.path,
        s.disk.bytes,
        threads=s.disk.threads,
        policy=s.disk.policy,
        found_share=share,
        pin_share=s.limits.pin_percent / 100,
    )
    shielded = Breaker(disk, deadline_s=s.disk.deadline_s)
    return Throttled(shielded, s.disk.max_bandwidth) if s.disk.max_bandwidth else shielded


def _redis_tier(s: Redis) -> Tier:
    from kvstore.remote.link import read_key
    from kvstore.tiers.redis import RedisTier

    return RedisTier(
        s.url.reveal(),
        s.bytes,
        prefix=s.prefix,
        cluster=s.cluster,
        connections=s.connections,
        ttl_s=s.ttl_s,
        timeout_s=s.timeout_s,
        key=b"" if s.key_file is None else read_key(s.key_file),
        own_domain=f"uid-{os.getuid()}",
    )


def check_codecs(asked: Codecs) -> None:
    """Codecs need torch, which small images leave out; blocks that stay raw need nothing."""
    wanted = [name for name in ("disk", "redis") if getattr(asked, name) != "raw"]
    wanted += ["profiles"] if asked.profiles is not None else []
    if wanted and importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"codecs.{wanted[0]}: codecs need torch, which is not installed here.",
            "`pip install torch`, or keep blocks raw and name no profiles.",
        )
