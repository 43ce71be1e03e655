"""Finding chunks by their tokens: which stored KV may be reused somewhere inside a prompt (docs/chunks.md)."""

from kvstore.chunks.index import ChunkIndex, Match
from kvstore.chunks.table import Content, ContentTable
from kvstore.chunks.variants import Variant, fix_overhead, numbered

__all__ = ["ChunkIndex", "Content", "ContentTable", "Match", "Variant", "fix_overhead", "numbered"]
