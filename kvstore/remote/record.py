"""A block as Redis values: one record that says all, and parts that hold the payload.

Record, little-endian: magic, version, seal, 0, write id, length of the body, body (msgpack, with the sums of the
parts), XXH3-64 of all before. The body names the block, so that a value under a wrong key is found out; a part's key
carries the write id, so that the parts of two writers never mix. With a key everything is sealed with AES-256-GCM: the
body as a whole, each part with its number and the write id; what Redis returns is then as trustworthy as the key is
secret.
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
VERSION = 1

_MAGIC = b"KVSREDIS"
_FIXED = struct.Struct("<8sBBHQI")
_SUM = struct.Struct("<Q")


class Record(NamedTuple):
    """What is known of a stored block before its payload has been read."""

    write: int
    nbytes: int
    header: BlockHeader
    sums: tuple[int, ...]


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
        nonce = os.urandom(12)
        return nonce + self._aes.encrypt(nonce, data, about)

    def open(self, data: bytes, about: bytes) -> bytes:
        """What was sealed; raises `CorruptBlock` if it was not sealed with this key, or not as this."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._aes.decrypt(data[:12], data[12:], about)
        except (InvalidTag, ValueError):
            raise CorruptBlock("redis: a value was not sealed with this key.") from None


def pieces(payload: Sequence[memoryview], nbytes: int) -> list[memoryview | bytes]:
    """The payload cut into parts; copied only where a part crosses from one buffer into the next."""
    out: list[memoryview | bytes] = []
    views, at, start = [v.cast("B") for v in payload if len(v)], 0, 0
    for first in range(0, nbytes, PART_BYTES):
        need, taken = min(PART_BYTES, nbytes - first), list[memoryview]()
        while need:
            view = views[at][start : start + need]
            taken.append(view)
            need -= len(view)
            start += len(view)
            if start == len(views[at]):
                at, start = at + 1, 0
        out.append(taken[0] if len(taken) == 1 else b"".join(taken))
    return out


def encode(
    block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, seal: Seal | None
) -> tuple[int, bytes, list[memoryview | bytes]]:
    """Write id, record and parts of a block."""
    write = new_write()
    parts = pieces(payload, nbytes)
    sums = b"".join(_SUM.pack(xxhash.xxh3_64_intdigest(part)) for part in parts)
    body = msgspec.msgpack.encode(_Body(block.scope.domain, block.scope.ns, block.key, nbytes, header, sums))
    if seal is not None:
        body = seal.close(body, _about(block, write, -1))
        parts[:] = [seal.close(part, _about(block, write, number)) for number, part in enumerate(parts)]
    record = _FIXED.pack(_MAGIC, VERSION, seal is not None, 0, write, len(body)) + body
    return write, record + _SUM.pack(xxhash.xxh3_64_intdigest(record)), parts


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
    if body.nbytes < 0 or len(body.sums) != 8 * part_count(body.nbytes):
        raise CorruptBlock("redis: a record's sizes disagree.")
    return Record(write, body.nbytes, body.header, tuple(s for (s,) in _SUM.iter_unpack(body.sums)))


def open_part(block: BlockId, record: Record, number: int, value: bytes | None, seal: Seal | None) -> bytes:
    """The payload bytes of a part, verified.

    Raises
    ------
    CorruptBlock
        If it is missing, of another length, or not what was written.
    """
    length = min(PART_BYTES, record.nbytes - number * PART_BYTES)
    if value is None or len(value) != length + (SEAL_BYTES if seal is not None else 0):
        raise CorruptBlock("redis: a part is missing or of another length.")
    part = value if seal is None else seal.open(value, _about(block, record.write, number))
    if xxhash.xxh3_64_intdigest(part) != record.sums[number]:
        raise CorruptBlock("redis: a part's checksum is wrong.")
    return part


def scatter(part: bytes, at: int, into: Sequence[memoryview]) -> None:
    """Copy a part into the buffers, `at` bytes behind their start."""
    source, done, start = memoryview(part), 0, 0
    for view in into:
        first = max(at + done, start)
        here = min(start + len(view), at + len(part)) - first
        if here > 0:
            view[first - start : first - start + here] = source[done : done + here]
            done += here
        start += len(view)


def _about(block: BlockId, write: int, number: int) -> bytes:
    """What a seal is about: the block, the write, and which of its values."""
    domain = block.scope.domain.encode()
    return struct.pack("<Qqi", write, number, len(domain)) + domain + block.scope.ns + block.key
