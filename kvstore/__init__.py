"""kvstore keeps the attention keys and values that LLM engines computed, and hands them back at memory speed.

    from kvstore import KVStoreClient, Namespace, prefix_keys

Public names are loaded when they are first used, so that `import kvstore` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.client import AsyncKVStoreClient, KVStoreClient
    from kvstore.errors import KVStoreError
    from kvstore.keys import PrefixChain, prefix_keys
    from kvstore.types import BlockHeader, Dropped, Exists, Hit, Miss, Namespace, Stored, TierCode

__version__ = "0.1.0"

__all__ = [
    "AsyncKVStoreClient",
    "BlockHeader",
    "Dropped",
    "Exists",
    "Hit",
    "KVStoreClient",
    "KVStoreError",
    "Miss",
    "Namespace",
    "PrefixChain",
    "Stored",
    "TierCode",
    "__version__",
    "prefix_keys",
]

_HOME = {
    "AsyncKVStoreClient": "kvstore.client",
    "KVStoreClient": "kvstore.client",
    "KVStoreError": "kvstore.errors",
    "PrefixChain": "kvstore.keys",
    "prefix_keys": "kvstore.keys",
} | dict.fromkeys(
    ("BlockHeader", "Dropped", "Exists", "Hit", "Miss", "Namespace", "Stored", "TierCode"), "kvstore.types"
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
