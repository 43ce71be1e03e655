"""How a block looks on disk: the name of its file, the header in front of its payload, the checksums.

    blocks/<domain>/<namespace, 64 hex>/<key, 64 hex>-<payload offset, hex>-<payload bytes, hex>.kv

    0         40                       offset (4096-aligned)               offset + nbytes     (4096-aligned)
    +---------+--------------+---------+-----------------------------------+--------------------+
    | fixed   | msgpack      | zeros   | payload                           | zeros              |
    +---------+--------------+---------+-----------------------------------+--------------------+

The name alone tells how large the file is, so a directory listing is all that a restart has to read. The header
repeats the name and adds the rest. Its checksum covers everything before the payload; each MiB of payload has its own;
zeros must be zeros. So a change of any one byte of the file is noticed. Nothing here does I/O.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import msgspec
from xxhash import xxh3_64, xxh3_64_intdigest

from kvstore.errors import CorruptBlock
from kvstore.types import DIGEST_BYTES, BlockHeader, BlockId, Scope

FORMAT_VERSION = 1
ALIGN = 4096
"""Unit of direct I/O and of the budget: every file is a multiple of it."""
PART_BYTES = 1 << 20
"""Payload bytes under one checksum."""
MAX_HEADER = 1 << 20
"""Bytes before the payload; bounds what is read before anything is trusted."""
MAX_PAYLOAD = 1 << 36
ENTRY_COST = 512
"""What a file costs beside its pages: inode and directory entry (ext4: 256 + at most 180 bytes for our names)."""

_IN_INODE = 4
_PER_MAP_PAGE = 340
"""ext4 keeps the places of 4 runs of a file in its inode, and of 340 in each page beside it. On a full, fragmented disk
every page may be a run of its own; without this the tier was seen 266 KB over a budget of 3 GiB."""

_MAGIC = b"KVSBLOCK"
_FIXED = struct.Struct("<8sHHIIIQQ")  # magic, version, flags, payload offset, msgpack bytes, 0, payload bytes, checksum
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = _FIXED.size - _CHECKSUM.size
_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{4,6})-(0|[1-9a-f][0-9a-f]{0,9})\.kv")
_DOMAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")

Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD)]


def round_up(nbytes: int) -> int:
    """The next multiple of `ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


def file_cost(nbytes: int) -> int:
    """What a file of so many bytes takes of the budget: its pages, its entry, and the map of where they are."""
    pages = -(-nbytes // ALIGN)
    maps = 0 if pages <= _IN_INODE else -(-pages // _PER_MAP_PAGE)
    return (pages + maps) * ALIGN + ENTRY_COST


class Shape(NamedTuple):
    """Where the payload starts in a block's file, and how long it is. One object serves all blocks of that shape."""

    offset: int
    nbytes: int

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return self.offset + round_up(self.nbytes)

    @property
    def cost(self) -> int:
        """What the file takes of the budget."""
        return file_cost(self.file_bytes)


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The typed part of the header."""

    domain: str
    ns: bytes
    key: bytes
    codecs: list[str]
    header: BlockHeader
    nbytes: Size
    part_bytes: int
    sums: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Body).decode
_RAW = ["raw"]


# -- names -------------------------------------------------------------------------------------------------------------


def block_name(key: bytes, shape: Shape) -> str:
    """Name of a block's file inside the directory of its namespace."""
    return f"{key.hex()}-{shape.offset:x}-{shape.nbytes:x}.kv"


def parse_name(name: str) -> tuple[bytes, Shape] | None:
    """Key and shape that a file name stands for, or None if it is not a name that `block_name` makes."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    shape = Shape(int(match[2], 16), int(match[3], 16))
    if shape.offset % ALIGN or not ALIGN <= shape.offset <= MAX_HEADER or shape.nbytes > MAX_PAYLOAD:
        return None
    key = bytes.fromhex(match[1])
    return (key, shape) if block_name(key, shape) == name else None


def is_domain(name: str) -> bool:
    """Whether a trust domain's name may be the name of a directory."""
    return _DOMAIN.fullmatch(name) is not None


def is_namespace(name: str) -> bool:
    """Whether `name` is that of a namespace's directory."""
    return _HEX.fullmatch(name) is not None


def is_block_id(block: BlockId) -> bool:
    """Whether a block's identity can be made into a path."""
    return is_domain(block.scope.domain) and len(block.scope.ns) == DIGEST_BYTES == len(block.key)


# -- header ------------------------------------------------------------------------------------------------------------


def shape_of(block: BlockId, header: BlockHeader, nbytes: int) -> Shape:
    """Shape of the file that this block would be stored in, exact before its checksums are known."""
    body = _body(block, header, nbytes, bytes(8 * part_count(nbytes)))
    return Shape(round_up(_FIXED.size + len(body)), nbytes)


def encode_header(block: BlockId, header: BlockHeader, shape: Shape, sums: bytes) -> bytes:
    """Everything before the payload, `shape.offset` bytes.

    Parameters
    ----------
    sums : bytes
        What `part_sums` says of the payload.
    """
    body = _body(block, header, shape.nbytes, sums)
    out = bytearray(shape.offset)
    _FIXED.pack_into(out, 0, _MAGIC, FORMAT_VERSION, 0, shape.offset, len(body), 0, shape.nbytes, 0)
    out[_FIXED.size : _FIXED.size + len(body)] = body
    _CHECKSUM.pack_into(out, _CHECKSUM_AT, xxh3_64_intdigest(out))
    return bytes(out)


def decode_header(raw: bytes | memoryview, block: BlockId, shape: Shape) -> tuple[BlockHeader, bytes]:
    """The block's header and the checksums of its payload, if `raw` is the header of exactly this block.

    Parameters
    ----------
    raw : bytes
        The first `shape.offset` bytes of the file; anything at all.

    Raises
    ------
    CorruptBlock
        If one byte is not what `encode_header` wrote for this block and shape.
    """
    if len(raw) != shape.offset or shape.offset < ALIGN:
        raise CorruptBlock(f"header has {len(raw)} bytes, its file name says {shape.offset}.")
    magic, version, flags, offset, length, zero, nbytes, checksum = _FIXED.unpack_from(raw)
    if magic != _MAGIC:
        raise CorruptBlock("the file does not start with a block's magic.")
    if version != FORMAT_VERSION or flags or zero:
        raise CorruptBlock(f"format version {version}, flags {flags:#x}: this build knows {FORMAT_VERSION} only.")
    if (offset, nbytes) != shape or _FIXED.size + length > offset:
        raise CorruptBlock(f"lengths {offset}, {length}, {nbytes} do not fit the file's name {tuple(shape)}.")
    if _header_checksum(raw) != checksum:
        raise CorruptBlock("the header's checksum is wrong.")
    try:
        body = _decode(raw[_FIXED.size : _FIXED.size + length])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptBlock(f"the header cannot be read ({error}).") from None
    if (body.domain, body.ns, body.key) != (*block.scope, block.key):
        raise CorruptBlock("the file holds another block than its name says.")
    if body.codecs != _RAW or body.nbytes != nbytes or body.part_bytes != PART_BYTES:
        raise CorruptBlock(f"codecs {body.codecs}, {body.nbytes} bytes in parts of {body.part_bytes}: not ours.")
    if len(body.sums) != 8 * part_count(nbytes):
        raise CorruptBlock("the header has checksums for another number of parts.")
    return body.header, body.sums


def _header_checksum(raw: bytes | memoryview) -> int:
    digest = xxh3_64(raw[:_CHECKSUM_AT])
    digest.update(bytes(_CHECKSUM.size))
    digest.update(raw[_FIXED.size :])
    return digest.intdigest()


def _body(block: BlockId, header: BlockHeader, nbytes: int, sums: bytes) -> bytes:
    (domain, ns), key = block
    return _encode(
        _Body(
            domain=domain,
            ns=ns,
            key=key,
            codecs=_RAW,
            header=header,
            nbytes=nbytes,
            part_bytes=PART_BYTES,
            sums=sums,
        )
    )


# -- payload -----------------------------------------------------------------------------------------------------------


def part_count(nbytes: int) -> int:
    """Number of checksums of a payload."""
    return -(-nbytes // PART_BYTES)


def part_sums(payload: Iterable[memoryview]) -> bytes:
    """xxh3_64 of each `PART_BYTES` of the payload, little-endian, 8 bytes each, however it is cut into buffers."""
    sums = array("Q")
    digest, room = xxh3_64(), PART_BYTES
    for view in payload:
        at = 0
        while at < len(view):
            piece = view[at : at + room]
            digest.update(piece)
            at += len(piece)
            room -= len(piece)
            if room == 0:
                sums.append(digest.intdigest())
                digest, room = xxh3_64(), PART_BYTES
    if room < PART_BYTES:
        sums.append(digest.intdigest())
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        sums.byteswap()
    return sums.tobytes()


def check_payload(payload: Sequence[memoryview], padding: memoryview, sums: bytes) -> None:
    """Compare a payload with its checksums and its padding with zeros.

    Raises
    ------
    CorruptBlock
        If they differ.
    """
    if part_sums(payload) != sums:
        raise CorruptBlock("a checksum of the payload is wrong.")
    if any(padding):
        raise CorruptBlock("the padding behind the payload is not zero.")


def scope_path(scope: Scope) -> str:
    """Path of a namespace's directory below ``blocks/``."""
    return f"{scope.domain}/{scope.ns.hex()}"
