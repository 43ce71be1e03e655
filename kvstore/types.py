"""The words of kvstore as values: what a block is called, what it carries, and what can become of it.

Nothing here does I/O, and nothing here imports another module of kvstore except `errors`.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, NamedTuple

import msgspec

DIGEST_BYTES = 32
"""Length of a namespace digest, a prefix key and a content key (sha256)."""


Text = Annotated[str, msgspec.Meta(max_length=8192)]
"""A field of a namespace. The daemon remembers thousands of namespaces, so none may be of any size."""


class Namespace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that makes KV incompatible. Two engines share blocks only if every field is equal.

    A field may be empty, never absent. `kvstore.keys.namespace_digest` makes the 32-byte identity.

    Attributes
    ----------
    model, revision : str
        Model name, and the revision or digest of its weights.
    dtype : str
        Data type of the stored K and V, for example ``bfloat16``.
    layers, kv_heads, head_dim : int
        Shape of one token's KV on this rank; 0 where the payload is opaque.
    layout : str
        Name and version of the payload's order, ``lkthd1`` = [layer][K|V][token][kv_head][dim].
    block_tokens : int
        Tokens in a full block.
    rope : str
        The RoPE parameters, canonically encoded, since keys are stored after RoPE.
    attention : str
        ``full`` or ``mla``.
    quantization : str
        How the weights are quantized.
    fidelity : str
        ``exact``, or ``lossy:<profile>``. Classes never share blocks.
    tp_rank, tp_size, pp_rank, pp_size : int
        Place of this rank in the tensor- and pipeline-parallel group.
    lora : str
        LoRA adapter, name and digest.
    tenant : str
        Tenant the blocks belong to.
    salt : str
        Cache salt, already hashed by the client: the daemon never sees what the user sent.
    engine : str
        Producer of the KV, where its numerics or keys are its own.
    """

    model: Text
    revision: Text = ""
    dtype: Text = ""
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    layout: Text = "opaque"
    block_tokens: int = 256
    rope: Text = ""
    attention: Text = "full"
    quantization: Text = ""
    fidelity: Text = "exact"
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    lora: Text = ""
    tenant: Text = ""
    salt: Text = ""
    engine: Text = ""


class Scope(NamedTuple):
    """Who may see a block: the trust domain it was stored in, and its namespace digest."""

    domain: str
    ns: bytes


class BlockId(NamedTuple):
    """Full identity of a stored block inside the daemon."""

    scope: Scope
    key: bytes


class BlockHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What travels with a block's payload through every tier.

    Attributes
    ----------
    parent : bytes
        Prefix key of the block before it; empty for the first block of a prompt.
    tokens : bytes
        Token ids as int32 little-endian; empty if the client keeps no tokens.
    position : int
        Position of the first token in the prompt the KV was computed in.
    """

    parent: bytes = b""
    tokens: bytes = b""
    position: int = 0


class TierCode(IntEnum):
    """Where a block is, as one byte in a `lookup` reply. Smaller is nearer."""

    ABSENT = 0
    HOST = 1
    DISK = 2
    REDIS = 3


class MissReason(StrEnum):
    """Why a block that was asked for is not handed out."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    NO_SPACE = "no_space"
    TIER_DOWN = "tier_down"
    DEADLINE = "deadline"
    LOST = "lost"


class DropReason(StrEnum):
    """Why a block that was offered is not stored."""

    HOST_FULL = "host_full"
    TOO_LARGE = "too_large"
    IN_FLIGHT = "in_flight"
    EXPIRED = "expired"
    NOT_DURABLE = "not_durable"
    TIER_FULL = "tier_full"
    TIER_DOWN = "tier_down"
    IO_ERROR = "io_error"
    ABORTED = "aborted"
    UNREACHABLE = "unreachable"


class Extent(NamedTuple):
    """A run of bytes in one slab. Slab ids are never used twice in one life of the daemon."""

    slab: int
    offset: int
    nbytes: int


class Hit(NamedTuple):
    """A block was found and its bytes are in the buffers that the caller gave."""

    header: BlockHeader
    nbytes: int


class Miss(NamedTuple):
    """A block was not handed out, and why. Falsy, so that ``if block := kv.get(key)`` reads as it should."""

    reason: MissReason

    def __bool__(self) -> bool:
        return False


class Stored(NamedTuple):
    """A block was stored and is readable from now on."""


class Exists(NamedTuple):
    """The block was there already; nothing was written."""


class Dropped(NamedTuple):
    """A block was not stored, and why."""

    reason: DropReason


LoadOutcome = Hit | Miss
StoreOutcome = Stored | Exists | Dropped
