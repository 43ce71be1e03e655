"""transformers connector: `generate()` that loads the KV of a prompt's beginning and stores what is new.

from kvstore_connectors.transformers import KVStoreCache

kv = KVStoreCache(model)
out = kv.generate(**inputs, max_new_tokens=64)
"""

from kvstore_connectors.transformers.cache import KVStoreCache, Summary
from kvstore_connectors.transformers.chunks import Blend, Chunks
from kvstore_connectors.transformers.prefix import PrefixCache, StoreReport

__all__ = ["Blend", "Chunks", "KVStoreCache", "PrefixCache", "StoreReport", "Summary"]
