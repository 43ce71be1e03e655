"""The chunks that the daemon can find by content: split by trust domain and namespace, bounded in bytes.

The index holds no KV and nothing of its own: each entry is the header of a chunk's last block (`ChunkInfo`), entered
when the block comes and gone when it is in no tier any more. So it is rebuilt after a restart from headers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from kvstore.chunks.rolling import Roller
from kvstore.chunks.table import Content, ContentTable
from kvstore.chunks.variants import Variant, nearness, numbered
from kvstore.errors import InvalidParams
from kvstore.keys import chunk_block_keys, content_key, context_hasher
from kvstore.types import CHUNK_MARK, DIGEST_BYTES, MAX_LINEAGE, BlockHeader, BlockId, ChunkInfo, Scope

ENTRY_BYTES = 1536
"""What one variant costs beside its tokens, keys and statistics: objects, dict entries, slots of the filter."""

Resident = Callable[[Scope, list[bytes]], int | None]
"""The farthest tier that one of some blocks is in; None if one is nowhere."""


class Match(NamedTuple):
    """A chunk found in a prompt."""

    start: int
    stop: int
    key: bytes
    blocks: int
    tier: int
    capture: str
    overhead: float


def check_chunk(ns: bytes, key: bytes, header: BlockHeader) -> None:
    """Whether a header that describes a chunk tells the truth as far as that can be seen from it.

    Raises
    ------
    InvalidParams
        If the token ids are not those of the content key, or the parts do not fit together.
    """
    info = header.chunk
    if info is None:
        return
    wrong = ""
    tokens = len(info.tokens) // 4
    if not key.endswith(CHUNK_MARK):
        wrong = "its last block has a key that is not one of a chunk"
    elif len(info.tokens) % 4 or len(info.blocks) % DIGEST_BYTES:
        wrong = "its token ids or keys are cut off"
    elif content_key(ns, np.frombuffer(info.tokens, dtype="<i4")) != info.content:
        wrong = "its token ids are not those of its content key"
    elif not header.tokens or not info.tokens.endswith(header.tokens):
        wrong = "the tokens of its last block are not the last of its tokens"
    elif any(len(one) != DIGEST_BYTES for one in info.lineage) or len(info.inter) not in (0, len(info.lineage)):
        wrong = "its lineage is not a list of content keys with one influence each"
    elif len(info.external) not in (0, 2 * tokens):
        wrong = "its external mass is not one float16 a token"
    elif (info.capture == "isolated") != (info.position == 0) or (info.lineage and info.capture != "live"):
        wrong = f"it can not be {info.capture!r} at position {info.position} with {len(info.lineage)} chunks before it"
    if wrong:
        raise InvalidParams(f"chunk: {wrong}.", "Make headers with kvstore.client.chunk_parts.")


class ChunkIndex:
    """Chunks by content, in every namespace.

    Parameters
    ----------
    capacity : int
        Bytes that entries may take; above it those used longest ago are forgotten. Their blocks stay.
    resident : callable
        Where blocks are.
    most_variants : int
        Variants of one chunk; a further one takes the place of the one with the least reuse score.
    replaced : callable, optional
        Told of the blocks of a variant that lost its place.
    seed : int, optional
        Of the hashes.
    """

    def __init__(
        self,
        capacity: int,
        resident: Resident,
        most_variants: int = 5,
        replaced: Callable[[Scope, list[bytes]], None] = lambda scope, keys: None,
        seed: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.used = 0
        self.counts: Counter[str] = Counter()
        self._resident = resident
        self._most_variants = most_variants
        self._replaced = replaced
        self._roller = Roller(seed)
        self._tables: dict[Scope, ContentTable] = {}
        self._entries: dict[BlockId, tuple[Content, Variant]] = {}
        """By the chunk's last block, least recently used first."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def contents(self) -> int:
        """Chunks, however many variants each has."""
        return sum(map(len, self._tables.values()))

    # -- coming and going ----------------------------------------------------------------------------------------------

    def stored(self, block: BlockId, header: BlockHeader) -> None:
        """A block came into some tier. One that is no chunk, or here already, changes nothing."""
        info = header.chunk
        if info is None or block in self._entries:
            return
        try:
            check_chunk(block.scope.ns, block.key, header)
        except InvalidParams:
            self.counts["refused"] += 1
            return
        nbytes = ENTRY_BYTES + len(info.tokens) + len(info.blocks) + len(info.external) + 48 * len(info.lineage)
        if nbytes > self.capacity:
            self.counts["refused"] += 1
            return
        table = self._tables.setdefault(block.scope, ContentTable(self._roller))
        content = table.find(info.tokens)
        if content is None:
            content = Content(info.content, info.tokens)
            if not table.add(content):
                self.counts["refused"] += 1
                return
        earlier = content.variants.get(info.context)
        if earlier is not None:  # under another key: blocks of another length
            self._forget(BlockId(block.scope, earlier.key))
            content = self._again(block.scope, content)
        variant = Variant(block.key, msgspec.structs.replace(info, tokens=b""), nbytes)
        content.variants[info.context] = variant
        self._entries[block] = (content, variant)
        self.used += nbytes
        self.counts["stored"] += 1
        self._make_room(block, content)

    def _again(self, scope: Scope, content: Content) -> Content:
        """A content that may have left its table with its last variant."""
        table = self._tables.setdefault(scope, ContentTable(self._roller))
        if not content.variants:
            table.add(content)
        return content

    def _make_room(self, newest: BlockId, content: Content) -> None:
        if len(content.variants) > self._most_variants:
            others = [one for one in content.variants.values() if one.key != newest.key]
            least = min(others, key=lambda one: one.score)
            self.counts["replaced"] += 1
            self._forget(BlockId(newest.scope, least.key))
            # Blocks that it shares with prefixes keep their other name, and stay.
            own = chunk_block_keys(content.key, least.info.context, len(least.info.blocks) // DIGEST_BYTES + 1)
            held = {*_keys(least.info.blocks), least.key}
            self._replaced(newest.scope, [key for key in own if key in held])
        while self.used > self.capacity:
            self.counts["forgotten"] += 1
            self._forget(next(iter(self._entries)))

    def removed(self, block: BlockId) -> None:
        """A block is in no tier any more."""
        if block in self._entries:
            self.counts["removed"] += 1
            self._forget(block)

    def _forget(self, block: BlockId) -> None:
        content, variant = self._entries.pop(block)
        del content.variants[variant.info.context]
        self.used -= variant.nbytes
        if not content.variants:
            table = self._tables[block.scope]
            table.remove(content)
            if not len(table):
                del self._tables[block.scope]

    # -- finding -------------------------------------------------------------------------------------------------------

    def match(
        self,
        scope: Scope,
        tokens: bytes,
        spans: Sequence[tuple[int, int]] = (),
        *,
        find: bool = False,
        labels: Sequence[str] = (),
    ) -> list[Match]:
        """Chunks in a prompt: those of the named spans that are stored, and with `find` any others between them.

        Of each the variant with the least overhead behind the chunks found before it, among those whose blocks are all
        in some tier and whose labels the caller has. Each counts as a use of that variant.

        Parameters
        ----------
        tokens : bytes
            The prompt's token ids, int32 little-endian.
        spans : sequence of (int, int)
            Half-open ranges in order (`check_spans`).
        """
        table = self._tables.get(scope)
        if table is None:
            return []
        ids = np.frombuffer(tokens, dtype="<i4")
        rolled = table.roll(ids)
        search = _Search(self, scope, frozenset(labels), ids)
        named = [(a, table.at(rolled, tokens, a, b)) for a, b in spans]
        places = [(a, found) for a, found in named if found is not None and search.usable(found)]
        if find:
            gaps = list(_gaps([(a, a + found.length) for a, found in places], len(ids)))
            places += table.search(rolled, tokens, gaps, lambda content, _: search.usable(content))
            places.sort(key=lambda place: place[0])
        return [search.choose(start, content) for start, content in places]

    def touch(self, block: BlockId, variant: Variant, overhead: float) -> None:
        """Count a use."""
        variant.used(overhead)
        self._entries[block] = self._entries.pop(block)

    def info(self, block: BlockId) -> ChunkInfo | None:
        """What is known of a chunk by its last block, without its tokens."""
        entry = self._entries.get(block)
        return None if entry is None else entry[1].info

    def where(self, scope: Scope, variant: Variant) -> int | None:
        """The farthest tier that one of a variant's blocks is in; None if it is not whole."""
        return self._resident(scope, [*_keys(variant.info.blocks), variant.key])

    def check(self) -> str:
        """What is wrong with the index; empty if nothing is."""
        if self.used != sum(variant.nbytes for _, variant in self._entries.values()):
            return "its bytes are miscounted"
        if self.used > self.capacity:
            return "it takes more bytes than it may"
        held = {id(v) for table in self._tables.values() for c in table for v in c.variants.values()}
        if held != {id(variant) for _, variant in self._entries.values()}:
            return "entries and contents do not hold the same variants"
        return next((wrong for table in self._tables.values() if (wrong := table.check())), "")


class _Search:
    """One caller's search in one prompt: what it may use, and what it has found so far."""

    def __init__(self, index: ChunkIndex, scope: Scope, labels: frozenset[str], ids: np.ndarray) -> None:
        self._index = index
        self._scope = scope
        self._labels = labels
        self._ids = ids
        self._whole: dict[bytes, int] = {}
        self._before: list[bytes] = []
        self._context = context_hasher()
        self._hashed = 0

    def _variants(self, content: Content) -> list[Variant]:
        """Those that are whole and may be read."""
        return [v for v in content.variants.values() if self._labels.issuperset(v.info.labels) and self._is_whole(v)]

    def _is_whole(self, variant: Variant) -> bool:
        if variant.key not in self._whole:
            tier = self._index.where(self._scope, variant)
            if tier is None:
                return False
            self._whole[variant.key] = tier
        return True

    def usable(self, content: Content) -> bool:
        """Whether any variant of a content can be had."""
        return bool(self._variants(content))

    def choose(self, start: int, content: Content) -> Match:
        """The best variant of a chunk here; places have to come in order."""
        context = self._context_at(start)
        before = numbered(self._before[-MAX_LINEAGE:])
        rated = [(v.overhead(before, context), nearness(v), v) for v in self._variants(content)]
        overhead, _, best = min(rated, key=lambda one: one[:2])
        self._before.append(content.key)
        self._index.touch(BlockId(self._scope, best.key), best, overhead)
        stop = start + content.length
        tier = self._whole[best.key]
        return Match(
            start, stop, best.key, len(best.info.blocks) // DIGEST_BYTES + 1, tier, best.info.capture, overhead
        )

    def _context_at(self, start: int) -> bytes:
        """`kvstore.keys.context_digest` of the prompt up to here; the prompt is hashed once."""
        self._context.update(self._ids[self._hashed : start].tobytes())
        self._hashed = start
        return self._context.copy().digest()


def _keys(joined: bytes) -> list[bytes]:
    return [joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]


def _gaps(taken: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What lies between spans."""
    at = 0
    for start, stop in taken:
        if start > at:
            yield at, start
        at = stop
    if at < end:
        yield at, end
