"""The bytes of an encoded block: a header, a directory of parts, the parts.

    magic "KVC1" | u16 chain bytes | u16 reference bytes | u32 layers, tokens, kv_heads, head_dim | u64 position
    | u8 dtype | u8 planes | u16 units | chain | references
    | directory: units x planes of (u64 bytes, u64 xxh3-64), plane-major | zeros | u64 xxh3-64 of everything before
    | parts, in the order of the directory

All numbers are little-endian. Parts are plane-major: all units' first planes, then all second ones, so dropping the
last planes is cutting the file off, and the rest is still a valid block. A part's place is the sum of the sizes
before it. The zeros make the first part start at a multiple of 64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from kvstore.codecs.base import DTYPES, BlockSpec, Bytes
from kvstore.errors import CannotDecode, CannotEncode, CorruptBlock

MAGIC = b"KVC1"
_HEAD = struct.Struct("<4sHHIIIIQBBH")
_ENTRY = np.dtype([("nbytes", "<u8"), ("check", "<u8")])
_CHECK = struct.Struct("<Q")
_ALIGN = 64
_NAMES = tuple(DTYPES)
PIECE = 1 << 18
"""Bytes that are copied and checked at a time."""
MAX_TEXT = 4096
"""Longest chain, and longest list of references."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A parsed and verified header.

    Attributes
    ----------
    spec : BlockSpec
        The block.
    chain : str
        The chain's name, as `kvstore.codecs.parse` reads it.
    references : tuple of str
        One a step: digest of the object of the model that it uses.
    units, planes : int
        Extent of the directory.
    sizes, checks, offsets : numpy.ndarray
        ``[plane, unit]``: bytes, checksum and place of each part.
    label : bytes
        The header before the directory; sealed parts are bound to it.
    """

    spec: BlockSpec
    chain: str
    references: tuple[str, ...]
    units: int
    planes: int
    sizes: np.ndarray
    checks: np.ndarray
    offsets: np.ndarray
    label: bytes

    def nbytes(self, planes: int) -> int:
        """Bytes of the block with so many planes."""
        return int(self.offsets[planes - 1, -1] + self.sizes[planes - 1, -1])

    def part(self, data: Bytes, plane: int, unit: int) -> Bytes:
        """A part's bytes, once their checksum has been found right."""
        found = self._bytes(data, plane, unit)
        self._check(xxhash.xxh3_64_intdigest(found.data), plane, unit)
        return found

    def copy(self, data: Bytes, units: range, out: Bytes) -> None:
        """The first plane of some units, each verified, into memory of their size; after an error it means nothing."""
        at = 0
        for unit in units:
            part = self._bytes(data, 0, unit)
            self._check(copied(part, out[at : at + part.size]), 0, unit)
            at += part.size

    def _bytes(self, data: Bytes, plane: int, unit: int) -> Bytes:
        start, size = self.offsets.item(plane, unit), self.sizes.item(plane, unit)
        found = data[start : start + size]
        if found.size != size:
            raise CorruptBlock(f"part {unit} of plane {plane} is cut off.")
        return found

    def _check(self, found: int, plane: int, unit: int) -> None:
        if found != self.checks.item(plane, unit):
            raise CorruptBlock(f"part {unit} of plane {plane} has a wrong checksum.")


def copied(source: Bytes, out: Bytes) -> int:
    """Copy bytes; their checksum. By pieces, so that what is checked is still in the core's cache."""
    if source.size <= PIECE:
        out[:] = source
        return xxhash.xxh3_64_intdigest(out.data)
    check = xxhash.xxh3_64()
    for at in range(0, source.size, PIECE):
        piece = out[at : at + PIECE]
        piece[:] = source[at : at + PIECE]
        check.update(piece.data)
    return check.intdigest()


def head(spec: BlockSpec, chain: str, references: tuple[str, ...], units: int, planes: int) -> bytes:
    """The header before the directory."""
    text, refs = chain.encode("ascii"), "\n".join(references).encode("ascii")
    if max(len(text), len(refs)) > MAX_TEXT:
        raise CannotEncode(f"a chain's name may have {MAX_TEXT} characters.")
    numbers = (spec.layers, spec.tokens, spec.kv_heads, spec.head_dim, spec.position, _NAMES.index(spec.dtype))
    return _HEAD.pack(MAGIC, len(text), len(refs), *numbers, planes, units) + text + refs


def head_nbytes(label: bytes, units: int, planes: int) -> int:
    """Bytes before the first part."""
    return _aligned(len(label) + units * planes * _ENTRY.itemsize)


def _aligned(nbytes: int) -> int:
    return -(-(nbytes + _CHECK.size) // _ALIGN) * _ALIGN


def seal_head(out: Bytes, label: bytes, sizes: np.ndarray, checks: np.ndarray) -> None:
    """Write header and directory to the start of ``out``."""
    entries = np.empty(sizes.size, _ENTRY)
    entries["nbytes"], entries["check"] = sizes.ravel(), checks.ravel()
    body = label + entries.tobytes()
    body = body.ljust(_aligned(len(body)) - _CHECK.size, b"\0")
    body += _CHECK.pack(xxhash.xxh3_64_intdigest(body))
    out[: len(body)] = np.frombuffer(body, np.uint8)


def has_head(data: Bytes, label: bytes, units: int, planes: int) -> bool:
    """Whether a block starts with that header, undamaged; its directory is not looked at."""
    end = head_nbytes(label, units, planes)
    if data.size < end or data[: len(label)].tobytes() != label:
        return False
    checked = end - _CHECK.size
    return _CHECK.unpack(data[checked:end].tobytes())[0] == xxhash.xxh3_64_intdigest(data[:checked].data)


def read(data: Bytes) -> Frame:
    """Parse a header and verify it; nothing else is looked at. Raises `CorruptBlock` or `CannotDecode`."""
    if data.size < _HEAD.size:
        raise CorruptBlock("an encoded block is shorter than its header.")
    magic, n_chain, n_refs, layers, tokens, heads, dim, position, dtype, planes, units = _HEAD.unpack(
        data[: _HEAD.size].tobytes()
    )
    if magic != MAGIC:
        raise CannotDecode(f"an encoded block starts with {magic!r}, which this version does not read.")
    n_label = _HEAD.size + n_chain + n_refs
    n_entries = n_label + units * planes * _ENTRY.itemsize
    end = _aligned(n_entries)
    if max(n_chain, n_refs) > MAX_TEXT or not units or not planes or data.size < end:
        raise CorruptBlock("the header of an encoded block is cut off or out of bounds.")
    checked = end - _CHECK.size
    if _CHECK.unpack(data[checked:end].tobytes())[0] != xxhash.xxh3_64_intdigest(data[:checked].data):
        raise CorruptBlock("the header of an encoded block has a wrong checksum.")
    try:
        spec = BlockSpec(layers, tokens, heads, dim, _NAMES[dtype], position)
        chain = data[_HEAD.size : _HEAD.size + n_chain].tobytes().decode("ascii")
        refs = tuple(data[_HEAD.size + n_chain : n_label].tobytes().decode("ascii").split("\n"))
    except (CannotEncode, IndexError, UnicodeDecodeError) as error:
        raise CorruptBlock(f"the header of an encoded block is out of bounds: {error}") from None
    entries = np.frombuffer(data[n_label:n_entries].tobytes(), _ENTRY).reshape(planes, units)
    if units > layers or int(entries["nbytes"].max()) > 2 * spec.nbytes + (1 << 24):
        raise CorruptBlock("the directory of an encoded block is out of bounds.")
    sizes = entries["nbytes"].astype(np.int64)
    ends = np.cumsum(sizes.ravel())
    offsets = (end + ends - sizes.ravel()).reshape(planes, units)
    label = data[:n_label].tobytes()
    return Frame(spec, chain, refs, units, planes, sizes, entries["check"], offsets, label)
