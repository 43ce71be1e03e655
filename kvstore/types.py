"""The words of kvstore as values: what a block is called, what it carries, and what can become of it.

Nothing here does I/O, and nothing here imports another module of kvstore except `errors`.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, Literal, NamedTuple

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


MAX_CHUNK_TOKENS = 8192
"""Longest chunk: its description, ids and statistics included, fits into the header of one block."""

MAX_CHUNK_BLOCKS = 512
"""Blocks of a chunk, whose keys its description names."""

MAX_LINEAGE = 64
"""Chunks before it that a chunk remembers: the nearest."""

CHUNK_MARK = b"ch"
"""The last bytes of the key of a chunk's last block: after a restart chunks are found by the names of their files."""

Label = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
"""Names a right to read, as the gateway in front of the engine gives it out."""


class ChunkInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A chunk, described in the header of its last block: by its content, and by the context its KV was computed in.

    Attributes
    ----------
    content : bytes
        Content key: of the chunk's own tokens.
    context : bytes
        Digest of all token ids before it (`kvstore.keys.context_digest`): with the content key, the variant.
    tokens : bytes
        All its token ids as int32 little-endian.
    position : int
        Position of its first token where its KV was computed; keys are turned for the positions from there on.
    capture : str
        ``isolated``: nothing before it; ``system``: a system prompt only; ``live``: other chunks, too.
    blocks : bytes
        Keys of its blocks before the last one, 32 bytes each, in order.
    lineage : list of bytes
        Content keys of the chunks before it, in order; the nearest `MAX_LINEAGE` of them.
    inter : list of float
        Cache-Craft's influence of each of those on it, summed over layers; empty if not measured.
    cci : float
        Cache-Craft's contextual influence, in 0.5..1; 0 if not measured.
    external : bytes
        Attention mass that each of its tokens put on other chunks, float16 little-endian; empty if not measured.
    labels : list of str
        Who reuses it must have all of these: the rights needed to read what stood before it.
    """

    content: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    context: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    tokens: Annotated[bytes, msgspec.Meta(min_length=4, max_length=4 * MAX_CHUNK_TOKENS)]
    position: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0
    capture: Literal["isolated", "system", "live"] = "isolated"
    blocks: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES * MAX_CHUNK_BLOCKS)] = b""
    lineage: Annotated[list[bytes], msgspec.Meta(max_length=MAX_LINEAGE)] = []
    inter: Annotated[list[float], msgspec.Meta(max_length=MAX_LINEAGE)] = []
    cci: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    external: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_CHUNK_TOKENS)] = b""
    labels: Annotated[list[Label], msgspec.Meta(max_length=16)] = []


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
    chunk : ChunkInfo or None
        Only on the last block of a chunk.
    importance : bytes
        How much of the attention each token got, as a multiple of an even share, float16 little-endian; empty if not
        measured (`kvstore.codecs.importance.unpack`).
    """

    parent: bytes = b""
    tokens: bytes = b""
    position: int = 0
    chunk: ChunkInfo | None = None
    importance: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_CHUNK_TOKENS)] = b""


class TierCode(IntEnum):
    """Where a block is, as one byte in a `lookup` reply. Smaller is nearer.

    But for GPU: what is in the memory of a GPU is in host memory, too, and a lookup says HOST of it. It is the word for
    a leased block that can be read there.
    """

    ABSENT = 0
    HOST = 1
    DISK = 2
    REDIS = 3
    GPU = 4


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
    OVER_LIMIT = "over_limit"
    TOO_LARGE = "too_large"
    UNDECODABLE = "undecodable"
    IN_FLIGHT = "in_flight"
    EXPIRED = "expired"
    NOT_DURABLE = "not_durable"
    TIER_FULL = "tier_full"
    TIER_DOWN = "tier_down"
    IO_ERROR = "io_error"
    ABORTED = "aborted"
    UNREACHABLE = "unreachable"


class Gone(StrEnum):
    """Why a block is no longer in a tier."""

    EVICTED = "evicted"
    DROPPED = "dropped"
    EXPIRED = "expired"
    CORRUPT = "corrupt"
    LOST = "lost"


class Extent(NamedTuple):
    """A run of bytes in one slab. Slab ids are never used twice in one life of the daemon."""

    slab: int
    offset: int
    nbytes: int


class Hit(NamedTuple):
    """A block was found and its bytes are in the buffers that the caller gave."""

    header: BlockHeader
    nbytes: int


class ChunkMatch(NamedTuple):
    """Tokens `start` to `stop` of a prompt are a stored chunk, every block of which is in some tier.

    Attributes
    ----------
    key : bytes
        Of the chunk's last block, whose header describes it (`ChunkInfo`).
    blocks : int
        How many it has.
    tier : TierCode
        The farthest that one of them is in.
    capture : str
        As in `ChunkInfo`.
    overhead : float
        Cache-Craft's fix overhead of this variant here: 0 if, and only if, it was computed behind exactly these tokens.
    """

    start: int
    stop: int
    key: bytes
    blocks: int
    tier: TierCode
    capture: str
    overhead: float


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
