"""SGLang connector: a storage backend for HiCache, loaded with ``--hicache-storage-backend dynamic``."""

from kvstore_connectors.sglang.storage import KVStoreHiCache

__all__ = ["KVStoreHiCache"]
