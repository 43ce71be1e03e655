"""A block as Redis values: one record that says all, and parts that hold the payload.

Record, little-endian: magic, version, seal, 0, write id, length of the body, body (msgpack, with the sums of the
parts, if they are in the clear), XXH3-64 of all before. The body names the block, so that a value under a wrong key is
found out; a part's key carries the write id, so that the parts of two writers never mix. With a key everything is
sealed with AES-256-GCM: the body as a whole, each part with its number and the write id; what Redis returns is then as
trustworthy as the key is secret, and a part's tag, which nothing but its own bytes fits, is checked in place of a sum.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import xxhash

from kvstore.errors import CorruptBlock
from kvstore.types import BlockHeader, BlockId

PART_BYTES = (1 << 20) - 4096
"""Payload bytes of a part: with what Redis adds it stays within 1 MiB, the size of a class of its allocator."""
MAX_RECORD = 4 << 20
SEAL_BYTES = 12 + 16
"""What a seal adds: nonce and tag."""
VERSION = 2

_MAGIC = b"KVSREDIS"
_FIXED = struct.Struct("<8sBBHQI")
_SUM = struct.Struct("<Q")


class Record(NamedTuple):
    """What is known of a stored block before its payload has been read."""

    write: int
    nbytes: int
    header: BlockHeader
    sums: tuple[int, ...]
    """Checksums of the parts; of sealed ones there are none."""


class _Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    domain: str
    ns: bytes
    key: bytes
    nbytes: int
    header: BlockHeader
    sums: bytes


_body = msgspec.msgpack.Decoder(_Body)


def part_count(nbytes: int) -> int:
    """Parts of a payload."""
    return -(-nbytes // PART_BYTES)


def new_write() -> int:
    """An id that no other write has."""
    return int.from_bytes(os.urandom(8), "little")


class Seal:
    """AES-256-GCM under one key; `None` instead of a seal leaves values in the clear, with checksums alone."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aes = AESGCM(key)

    def close(self, data: bytes | memoryview, about: bytes) -> bytes:
        """Encrypt and sign."""
        sealed = bytearray(len(data) + SEAL_BYTES)
        self.close_into(data, about, memoryview(sealed))
        return bytes(sealed)

    def close_into(self, data: bytes | memoryview, about: bytes, into: memoryview) -> None:
        """Encrypt and sign into memory that is `SEAL_BYTES` longer than the data."""
        into[:12] = os.urandom(12)
        self._aes.encrypt_into(into[:12], data, about, into[12:])

    def open(self, data: bytes | memoryview, about: bytes) -> bytes:
        """What was sealed; raises `CorruptBlock` if it was not sealed with this key, or not as this."""
        opened = bytearray(max(0, len(data) - SEAL_BYTES))
        self.open_into(data, about, memoryview(opened))
        return bytes(opened)

    def open_into(self, data: bytes | memoryview, about: bytes, into: memoryview) -> None:
        """As `open`, into memory that is `SEAL_BYTES` shorter; what it then holds means nothing if this raises."""
        from cryptography.exceptions import InvalidTag

        sealed = memoryview(data)
        try:
            self._aes.decrypt_into(sealed[:12], sealed[12:], about, into)
        except (InvalidTag, ValueError):
            raise CorruptBlock("redis: a value was not sealed with this key.") from None


def cut(views: Sequence[memoryview], at: int, nbytes: int) -> list[memoryview]:
    """What of some buffers, one behind the other, lies `at` bytes behind their start and is `nbytes` long."""
    out: list[memoryview] = []
    for view in views:
        here = view[at : at + nbytes]
        if len(here):
            out.append(here)
            nbytes -= len(here)
        at = max(0, at - len(view))
    return out


def span(number: int, nbytes: int) -> tuple[int, int]:
    """Where a part of a payload begins, and how long it is."""
    first = number * PART_BYTES
    return first, min(PART_BYTES, nbytes - first)


def sum_of(part: bytes | memoryview) -> int:
    """The checksum of a part in the clear."""
    return xxhash.xxh3_64_intdigest(part)


def encode(
    block: BlockId, write: int, header: BlockHeader, nbytes: int, sums: Sequence[int], seal: Seal | None
) -> bytes:
    """The record of a block whose parts have these checksums, or are sealed and have none."""
    packed = b"".join(map(_SUM.pack, sums))
    body = msgspec.msgpack.encode(_Body(block.scope.domain, block.scope.ns, block.key, nbytes, header, packed))
    if seal is not None:
        body = seal.close(body, _about(block, write, -1))
    record = _FIXED.pack(_MAGIC, VERSION, seal is not None, 0, write, len(body)) + body
    return record + _SUM.pack(xxhash.xxh3_64_intdigest(record))


def close_part(
    block: BlockId, write: int, number: int, part: bytes | memoryview, seal: Seal, into: memoryview
) -> memoryview:
    """The sealed value of a part, in memory that has room for it."""
    value = into[: len(part) + SEAL_BYTES]
    seal.close_into(part, _about(block, write, number), value)
    return value


def decode(block: BlockId, value: bytes, seal: Seal | None) -> Record:
    """A record, verified as that of this block.

    Raises
    ------
    CorruptBlock
        If anything about it is not as `encode` makes it, or it names another block.
    """
    try:
        if len(value) > MAX_RECORD or xxhash.xxh3_64_intdigest(value[:-8]) != _SUM.unpack(value[-8:])[0]:
            raise CorruptBlock("redis: a record's checksum is wrong.")
        magic, version, sealed, zero, write, length = _FIXED.unpack_from(value)
        if (magic, version, zero) != (_MAGIC, VERSION, 0) or length != len(value) - _FIXED.size - 8:
            raise CorruptBlock("redis: a value is no record of this version.")
        if sealed != (seal is not None):
            raise CorruptBlock("redis: a record is sealed and there is no key, or the other way round.")
        raw = value[_FIXED.size : -8]
        body = _body.decode(raw if seal is None else seal.open(raw, _about(block, write, -1)))
    except (struct.error, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptBlock(f"redis: a record cannot be read ({error}).") from None
    if (body.domain, body.ns, body.key) != (block.scope.domain, block.scope.ns, block.key):
        raise CorruptBlock("redis: a record is that of another block.")
    if body.nbytes < 0 or len(body.sums) != (_SUM.size * part_count(body.nbytes) if seal is None else 0):
        raise CorruptBlock("redis: a record's sizes disagree.")
    return Record(write, body.nbytes, body.header, tuple(s for (s,) in _SUM.iter_unpack(body.sums)))


def open_part(
    block: BlockId, record: Record, number: int, value: memoryview, places: list[memoryview], seal: Seal | None
) -> None:
    """Verify a part and put its payload bytes to where they belong.

    Parameters
    ----------
    value : memoryview
        What was read, of the length that it must have. In the clear it may be in its place already.
    places : list of memoryview
        Where the payload bytes belong.

    Raises
    ------
    CorruptBlock
        If it is not what was written. What its place then holds means nothing.
    """
    part = value
    if seal is not None:
        part = places[0] if len(places) == 1 else memoryview(bytearray(len(value) - SEAL_BYTES))
        seal.open_into(value, _about(block, record.write, number), part)
    elif sum_of(part) != record.sums[number]:
        raise CorruptBlock("redis: a part's checksum is wrong.")
    at = 0
    for place in places if part is not places[0] else ():
        place[:] = part[at : at + len(place)]
        at += len(place)


def _about(block: BlockId, write: int, number: int) -> bytes:
    """What a seal is about: the block, the write, and which of its values."""
    domain = block.scope.domain.encode()
    return struct.pack("<Qqi", write, number, len(domain)) + domain + block.scope.ns + block.key
