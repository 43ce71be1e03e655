"""Identity: namespace digest, prefix keys, content keys. All sha256, all computed in the client.

xxHash never serves identity: XXH3 has known collisions on inputs of a block's size, and a collision here would hand
one prompt another prompt's KV.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidParams
from kvstore.types import CHUNK_MARK, DIGEST_BYTES, Namespace

TokenIds = Sequence[int] | NDArray[np.integer]

_DOMAIN_NAMESPACE = b"kvstore/namespace/1"
_DOMAIN_PREFIX = b"kvstore/prefix/1"
_DOMAIN_CONTENT = b"kvstore/content/1"
_DOMAIN_CONTEXT = b"kvstore/context/1"
_DOMAIN_CHUNK = b"kvstore/chunk/1"

_MAX_TOKEN = 0x7FFFFFFF
_PACK = 8192
"""Ids of a list converted at a time: few enough that the second look at each finds it in the cache."""


@lru_cache(maxsize=4096)
def namespace_digest(ns: Namespace) -> bytes:
    """Digest of a length-prefixed encoding of every field, so that no two namespaces share an encoding.

    Each field contributes its name and value, each preceded by its length: values can not run into one another, and
    a field added later changes every digest.
    """
    out = hashlib.sha256(_DOMAIN_NAMESPACE)
    for name in Namespace.__struct_fields__:
        value = getattr(ns, name)
        for part in (name, value if isinstance(value, str) else repr(int(value))):
            raw = part.encode("utf-8", "surrogatepass")
            out.update(struct.pack("<Q", len(raw)))
            out.update(raw)
    return out.digest()


def hash_salt(salt: str | None) -> str:
    """What of a cache salt goes into a namespace: a digest, so that any text is allowed and none travels in clear."""
    return "" if not salt else hashlib.sha256(b"kvstore/salt/1" + salt.encode("utf-8", "surrogatepass")).hexdigest()


def as_token_array(tokens: TokenIds) -> NDArray[np.int32]:
    """Token ids as a contiguous little-endian int32 array.

    Raises
    ------
    InvalidParams
        If an id does not fit into a non-negative int32.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise InvalidParams(f"tokens: expected a 1-d integer array, got {tokens.ndim}-d {tokens.dtype}.", "")
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > _MAX_TOKEN):
            raise InvalidParams("tokens: an id does not fit into a non-negative int32.", "")
        return np.ascontiguousarray(tokens, dtype="<i4")
    try:
        parts = [tokens[at : at + _PACK] for at in range(0, len(tokens), _PACK)]
        packed = np.frombuffer(b"".join([struct.pack(f"<{len(part)}i", *part) for part in parts]), dtype="<i4")
    except (struct.error, TypeError) as error:
        raise InvalidParams(f"tokens: not a flat sequence of int32 ids ({error}).", "") from None
    if packed.size and packed.min() < 0:
        raise InvalidParams("tokens: an id does not fit into a non-negative int32.", "")
    return packed


class PrefixChain:
    """Prefix keys of one growing prompt.

    Key of block *i* = sha256(key of block *i-1* | token ids of block *i*), with the namespace digest at the root. Only
    full blocks have keys. `extend` hashes only what is new, so a conversation is hashed once however often it grows.

    Parameters
    ----------
    ns : Namespace or bytes
        The namespace, or its digest.
    block_tokens : int
        Tokens per block; taken from the namespace if one is given.
    """

    def __init__(self, ns: Namespace | bytes, block_tokens: int | None = None) -> None:
        digest = ns if isinstance(ns, bytes) else namespace_digest(ns)
        if block_tokens is None:
            if isinstance(ns, bytes):
                raise InvalidParams("block_tokens: needed where the namespace is given as a digest.", "")
            block_tokens = ns.block_tokens
        if block_tokens <= 0:
            raise InvalidParams(f"block_tokens: {block_tokens} is not positive.", "")
        self.block_tokens = block_tokens
        self.root = hashlib.sha256(_DOMAIN_PREFIX + digest).digest()
        self.keys: list[bytes] = []
        self._tail = np.empty(0, dtype="<i4")

    @property
    def n_tokens(self) -> int:
        """Tokens taken in so far, the unfinished block included."""
        return len(self.keys) * self.block_tokens + len(self._tail)

    def extend(self, tokens: TokenIds) -> list[bytes]:
        """Take in more tokens and return the keys of the blocks that became full."""
        new = as_token_array(tokens)
        if len(self._tail):
            new = np.concatenate([self._tail, new])
        size = self.block_tokens
        full = len(new) // size
        step = size * 4
        data = memoryview(cast("bytes", new)).cast("B")
        sha256 = hashlib.sha256
        parent = self.keys[-1] if self.keys else self.root
        fresh: list[bytes] = []
        for start in range(0, full * step, step):
            block = sha256(parent)
            block.update(data[start : start + step])
            parent = block.digest()
            fresh.append(parent)
        self.keys += fresh
        self._tail = new[full * size :].copy()
        return fresh

    def blocks(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, parent key) of each full block, the parent of the first being empty."""
        parent = b""
        for key in self.keys:
            yield key, parent
            parent = key


def prefix_keys(ns: Namespace, tokens: TokenIds) -> list[bytes]:
    """Prefix keys of the full blocks of `tokens`."""
    chain = PrefixChain(ns)
    chain.extend(tokens)
    return chain.keys


def content_key(ns: Namespace | bytes, tokens: TokenIds) -> bytes:
    """Identity of a chunk by its own tokens, wherever it stands."""
    digest = ns if isinstance(ns, bytes) else namespace_digest(ns)
    return hashlib.sha256(_DOMAIN_CONTENT + digest + as_token_array(tokens).tobytes()).digest()


def context_digest(tokens: TokenIds) -> bytes:
    """What stands before a chunk, for telling its variants apart: all token ids, recognised as chunks or not."""
    out = context_hasher()
    out.update(as_token_array(tokens).tobytes())
    return out.digest()


def context_hasher() -> hashlib._Hash:
    """`context_digest` of a text that grows: fed the bytes of int32 token ids, copied where a digest is wanted."""
    return hashlib.sha256(_DOMAIN_CONTEXT)


def chunk_block_keys(content: bytes, context: bytes, blocks: int) -> list[bytes]:
    """Keys of a chunk's blocks: by its content (which covers the namespace), its context, and their place.

    They are exact names: KV under them is what a prefill of exactly that context gives. The last key ends in
    `CHUNK_MARK`, and keeps 240 bits of the hash.
    """
    root = hashlib.sha256(_DOMAIN_CHUNK + content + context).digest()
    keys = [hashlib.sha256(root + struct.pack("<I", index)).digest() for index in range(blocks)]
    keys[-1] = keys[-1][: DIGEST_BYTES - len(CHUNK_MARK)] + CHUNK_MARK
    return keys


def derived_key(ns: bytes, engine_hash: bytes) -> bytes:
    """Prefix key of a block that an engine has already hashed with a sha256-class chain of its own.

    The engine's hash covers tokens and per-request extras (multimodal inputs, adapters, salts); the namespace digest
    adds what it does not know of: model, types, layout, ranks.
    """
    return hashlib.sha256(_DOMAIN_PREFIX + ns + engine_hash).digest()


def is_digest(value: bytes) -> bool:
    """Whether `value` has the length of an identity."""
    return len(value) == DIGEST_BYTES
