"""A chunk as blocks: what to store so that `match` finds it, and what to lease of one that was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidParams
from kvstore.keys import TokenIds, as_token_array, chunk_block_keys, content_key, context_digest
from kvstore.types import (
    DIGEST_BYTES,
    MAX_CHUNK_BLOCKS,
    MAX_CHUNK_TOKENS,
    MAX_LINEAGE,
    BlockHeader,
    ChunkInfo,
    Namespace,
)


class ChunkPart(NamedTuple):
    """One block of a chunk: its key and header, and which of the chunk's tokens it holds the KV of."""

    key: bytes
    header: BlockHeader
    start: int
    stop: int


def chunk_parts(
    namespace: Namespace,
    tokens: TokenIds,
    *,
    before: TokenIds = (),
    lineage: Sequence[bytes] = (),
    inter: Sequence[float] = (),
    cci: float = 0.0,
    external: NDArray[np.floating] | None = None,
    labels: Sequence[str] = (),
    names: Mapping[int, bytes] | None = None,
) -> list[ChunkPart]:
    """The blocks of a chunk, to be reserved and committed together.

    Parameters
    ----------
    namespace : Namespace
        `block_tokens` of it go into a block; the last one may be shorter.
    tokens : ints
        The chunk.
    before : ints
        Everything that its KV attended to, from position 0 on.
    lineage : sequence of bytes
        Content keys of the chunks among that, in order. None of them: `before` is a system prompt.
    inter, cci, external
        Cache-Craft's statistics, as in `ChunkInfo`; `external` has one value a token.
    labels : sequence of str
        Rights needed to read what stands before it.
    names : mapping of int to bytes
        Keys of blocks that hold the same KV already, under the name of a prefix: by place, never the last one. They are
        referred to, and no part of the answer.

    Raises
    ------
    InvalidParams
        If the chunk is empty, or longer than its description may be.
    """
    ids, lead = as_token_array(tokens), as_token_array(before)
    if not 0 < len(ids) <= MAX_CHUNK_TOKENS:
        raise InvalidParams(f"chunk: it has {len(ids)} tokens; 1 to {MAX_CHUNK_TOKENS} are possible.", "Split it.")
    size, names = namespace.block_tokens, names or {}
    if len(ids) > size * MAX_CHUNK_BLOCKS:
        raise InvalidParams(
            f"chunk: {len(ids)} tokens in blocks of {size} are more than {MAX_CHUNK_BLOCKS} blocks.", ""
        )
    content, context = content_key(namespace, ids), context_digest(lead)
    keys = chunk_block_keys(content, context, -(-len(ids) // size))
    keys[:-1] = [names.get(place, key) for place, key in enumerate(keys[:-1])]
    info = ChunkInfo(
        content=content,
        context=context,
        tokens=ids.tobytes(),
        position=len(lead),
        capture="live" if lineage else "system" if len(lead) else "isolated",
        blocks=b"".join(keys[:-1]),
        lineage=list(lineage)[-MAX_LINEAGE:],
        inter=list(inter)[-MAX_LINEAGE:],
        cci=cci,
        external=b"" if external is None else np.asarray(external, dtype="<f2").tobytes(),
        labels=sorted(labels),
    )
    parts = []
    for place, key in enumerate(keys):
        start, stop = place * size, min((place + 1) * size, len(ids))
        header = BlockHeader(
            parent=keys[place - 1] if place else b"",
            tokens=ids[start:stop].tobytes(),
            position=len(lead) + start,
            chunk=info if key is keys[-1] else None,
        )
        if place not in names or key is keys[-1]:
            parts.append(ChunkPart(key, header, start, stop))
    return parts


def chunk_keys(last: bytes, info: ChunkInfo) -> list[bytes]:
    """Keys of all blocks of a chunk, in order, by that of its last block and the description in its header."""
    joined = info.blocks
    return [*(joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)), last]
