"""A calibrated basis of a model: how its keys and values are turned into few numbers, a group of layers at a time.

After KVTC (arXiv 2511.01815) and xKV (2503.18893): neighbouring layers' keys before RoPE share a low-rank basis, and
the basis is the model's, not the context's, so blocks stay independent. Ours is not orthogonal: it is that of the
product of two second moments, of the data and of the loss (`kvstore.codecs.fit`), so an error of one unit costs the
same Kullback-Leibler divergence in every component, and one step size for all of them is the best allocation of bits.

A basis is an object of its own, named by its digest; blocks name the basis they need.

    magic "KVB1" | u32 bytes of a JSON header | header | arrays, little-endian | sha256 of everything before

Arrays of a part: mean, spread, largest of each column of ``forward`` and of each row of ``inverse`` in float32, then
both matrices in float16, divided by these.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from kvstore.codecs.base import LIMITS
from kvstore.errors import CannotDecode

MAGIC = b"KVB1"
MAX_BYTES = 1 << 33
_HEAD = struct.Struct("<4sI")
_MAX_HEADER = 1 << 20
KINDS = ("k", "v", "kv")


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    layers: int
    kv_heads: int
    head_dim: int
    span: int
    kinds: list[str]
    ranks: list[list[int]]
    rotary: str
    model: str
    revision: str


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One transform: of the keys (``k``), the values (``v``) or both (``kv``) of a group of layers.

    Attributes
    ----------
    mean : torch.Tensor
        ``[n]`` float32, n the elements of a token in the group.
    forward : torch.Tensor
        ``[n, r]``: components are ``(x - mean) @ forward``.
    inverse : torch.Tensor
        ``[r, n]``: ``x`` is about ``mean + y @ inverse``.
    spread : torch.Tensor
        ``[r]``: standard deviation of each component on the calibration texts, falling.
    """

    mean: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor
    spread: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """A model's basis.

    Attributes
    ----------
    layers, kv_heads, head_dim : int
        Shape of the model's KV.
    span : int
        Layers of a group; the last group may have fewer.
    kinds : tuple of str
        What is transformed: ``("kv",)`` together, or ``("k", "v")`` apart.
    groups : tuple of tuple of Part
        ``[group][kind]``.
    rotary : str
        Digest of the rotation that keys were turned back by.
    model, revision : str
        Whose it is.
    """

    layers: int
    kv_heads: int
    head_dim: int
    span: int
    kinds: tuple[str, ...]
    groups: tuple[tuple[Part, ...], ...]
    rotary: str = ""
    model: str = ""
    revision: str = ""
    _bytes: list[bytes] = field(default_factory=list, repr=False)

    @property
    def digest(self) -> str:
        """Name of the basis: the first 32 hexadecimal digits of the sha256 of its bytes."""
        return self.to_bytes()[-32:].hex()[:32]

    def to_bytes(self) -> bytes:
        """The file that `read_basis` reads."""
        if not self._bytes:
            ranks = [[len(part.spread) for part in group] for group in self.groups]
            header = msgspec.json.encode(
                _Header(
                    self.layers,
                    self.kv_heads,
                    self.head_dim,
                    self.span,
                    list(self.kinds),
                    ranks,
                    self.rotary,
                    self.model,
                    self.revision,
                )
            )
            body = [_HEAD.pack(MAGIC, len(header)), header]
            for part in (part for group in self.groups for part in group):
                body += _arrays(part)
            data = b"".join(body)
            self._bytes.append(data + hashlib.sha256(data).digest())
        return self._bytes[0]


def _arrays(part: Part) -> list[bytes]:
    columns, rows = part.forward.abs().amax(0), part.inverse.abs().amax(1)
    single = (part.mean, part.spread, columns, rows)
    half = (part.forward / columns.clamp(min=1e-30), part.inverse / rows.clamp(min=1e-30)[:, None])
    return [
        array.detach().cpu().to(dtype).contiguous().numpy().tobytes()
        for arrays, dtype in ((single, torch.float32), (half, torch.float16))
        for array in arrays
    ]


def width(kind: str, layers: int, channels: int) -> int:
    """Elements of a token in a group of layers."""
    return layers * channels * len(kind)


def load_basis(path: Path) -> Basis:
    """Read a basis file. Raises `CannotDecode` if it is none, or larger than `MAX_BYTES`."""
    if path.stat().st_size > MAX_BYTES:
        raise CannotDecode(f"{path} is larger than a basis may be.")
    return read_basis(path.read_bytes())


def read_basis(data: bytes) -> Basis:
    """Parse a basis. Every size is checked before an array is made; raises `CannotDecode`."""
    if len(data) < _HEAD.size + 32 or data[:4] != MAGIC:
        raise CannotDecode("this is not a basis.")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise CannotDecode("the basis is damaged: its digest is wrong.")
    length = _HEAD.unpack_from(data)[1]
    if length > min(_MAX_HEADER, len(data)):
        raise CannotDecode("the header of the basis is out of bounds.")
    try:
        header = msgspec.json.decode(data[_HEAD.size : _HEAD.size + length], type=_Header)
    except msgspec.DecodeError as error:
        raise CannotDecode(f"the header of the basis cannot be read: {error}") from None
    shapes = _shapes(header)
    numbers = np.frombuffer(data, np.uint8, offset=_HEAD.size + length)[:-32]
    if numbers.size != sum(math.prod(shape) * size for group in shapes for part in group for shape, size in part):
        raise CannotDecode("the arrays of the basis do not have the sizes that its header says.")
    at, groups = 0, []
    for group in shapes:
        parts = []
        for part in group:
            arrays: list[Any] = []
            for shape, size in part:
                raw = numbers[at : at + size * math.prod(shape)]
                kind = torch.float32 if size == 4 else torch.float16
                arrays.append(torch.from_numpy(raw.copy()).view(kind).float().view(shape))
                at += raw.size
            mean, spread, columns, rows, forward, inverse = arrays
            found = Part(mean, forward * columns, inverse * rows[:, None], spread)
            if not all(bool(torch.isfinite(a).all()) for a in (mean, found.forward, found.inverse, spread)):
                raise CannotDecode("the basis has numbers that are not finite.")
            parts.append(found)
        groups.append(tuple(parts))
    return Basis(
        header.layers, header.kv_heads, header.head_dim, header.span, tuple(header.kinds), tuple(groups),
        header.rotary, header.model, header.revision, [data],
    )  # fmt: skip


def _shapes(header: _Header) -> list[list[tuple[tuple[tuple[int, ...], int], ...]]]:
    """Shapes of the arrays, and bytes of their elements, by group and kind."""
    sizes = (header.layers, header.kv_heads, header.head_dim, header.span)
    most = (LIMITS["layers"], LIMITS["kv_heads"], LIMITS["head_dim"], LIMITS["layers"])
    kinds = tuple(header.kinds)
    if any(not 0 < size <= limit for size, limit in zip(sizes, most, strict=True)) or kinds not in (("kv",), KINDS[:2]):
        raise CannotDecode("the shape of the basis is out of bounds.")
    count = -(-header.layers // header.span)
    if len(header.ranks) != count:
        raise CannotDecode(f"the basis has {len(header.ranks)} groups instead of {count}.")
    found = []
    for group, ranks in enumerate(header.ranks):
        layers = min(header.span, header.layers - group * header.span)
        widths = [width(kind, layers, header.kv_heads * header.head_dim) for kind in kinds]
        if len(ranks) != len(kinds) or any(not 0 < r <= n for r, n in zip(ranks, widths, strict=True)):
            raise CannotDecode("the ranks of the basis are out of bounds.")
        found.append(
            [
                (((n,), 4), ((r,), 4), ((r,), 4), ((r,), 4), ((n, r), 2), ((r, n), 2))
                for n, r in zip(widths, ranks, strict=True)
            ]
        )
    return found
