"""Settings of the SGLang connector: keys of ``--hicache-storage-backend-extra-config``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvstore.client.address import parse_address
from kvstore.errors import ConfigError

REMEDY = "It is a key of --hicache-storage-backend-extra-config."

SGLANG_KEYS = frozenset(
    {
        "allocator",
        "backend_name",
        "class_name",
        "file_storage_path",
        "hicache_storage_pass_prefix_keys",
        "interface_v1",
        "module_path",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)
"""Keys of the same dictionary that are SGLang's own."""

_LONGEST_MS = 600_000.0


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """What a user may set; all of it has a default.

    Attributes
    ----------
    address : str
        Path of the daemon's Unix socket. Empty for KVSTORE_CLIENT_ADDRESS, else the user's daemon.
    tenant : str
        Blocks are shared only inside one tenant.
    revision : str
        What tells these weights from others, where it can not be found out: a commit or a digest.
    weights_digest : str
        How the weights in a local directory are told apart: ``sample`` reads a little of every tensor, ``full`` every
        byte, once per start.
    lookup_deadline_ms : float
        After this time an unanswered question is a miss.
    load_deadline_ms : float
        After this time a call to load takes what has arrived; the rest is a miss.
    save_deadline_ms : float
        Longest time a call to store waits for the daemon.
    """

    address: str = ""
    tenant: str = ""
    revision: str = ""
    weights_digest: str = "sample"
    lookup_deadline_ms: float = 200.0
    load_deadline_ms: float = 3000.0
    save_deadline_ms: float = 1000.0

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> BackendConfig:
        """Read the dictionary that SGLang hands over.

        Raises
        ------
        ConfigError
            On an unknown key, naming the nearest, and on a value that breaks its rule.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in extra.items():
            if key in SGLANG_KEYS:
                continue
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known are: {', '.join(defaults)}."
                raise ConfigError(f"sglang: there is no setting {key!r}.{hint}", REMEDY)
            values[key] = _text(key, value) if isinstance(defaults[key], str) else _milliseconds(key, value)
        made = cls(**values)
        if made.weights_digest not in ("sample", "full"):
            raise ConfigError(f"weights_digest: {made.weights_digest!r} is neither 'sample' nor 'full'.", REMEDY)
        if not isinstance(parse_address(made.address or None), str):
            raise ConfigError(
                f"sglang: the daemon at {made.address or 'KVSTORE_CLIENT_ADDRESS'} is reached over TCP, without shared "
                "memory.",
                "Run `kvstore serve` on this host and give the path of its socket as `address`.",
            )
        return made


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{key}: {value!r} is not text.", REMEDY)
    return value


def _milliseconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}: {value!r} is not a number.", REMEDY)
    if not 0 < value <= _LONGEST_MS:
        raise ConfigError(f"{key}: {value!r} is not between 0 and {_LONGEST_MS:.0f}.", REMEDY)
    return float(value)
