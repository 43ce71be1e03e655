"""What a codec is: three kinds of steps, and what they are told about a block.

A chain is any number of `BlockStep` (block to block), one `BlockCoder` (block to bytes), any number of `ByteStep`
(bytes to bytes). The kinds are types, so a chain in a wrong order cannot be made. Steps are frozen dataclasses:
their fields are the parameters written into the header of every block.

A coder works on units of one or a few layers, each in some **planes**: byte runs of which a prefix may be enough.
Block data is ``[layer][K|V][token][kv_head][dim]``; a unit's tensor has that shape with the layers of the unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from kvstore.codecs.scratch import scratch
from kvstore.errors import CannotDecode, CannotEncode
from kvstore.rope import Rotary

T = TypeVar("T")
Bytes = np.ndarray
"""A flat array of uint8: a view of memory that somebody else owns, or bytes just made."""

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
LIMITS = {"layers": 4096, "tokens": 1 << 16, "kv_heads": 4096, "head_dim": 4096, "position": 1 << 40}
MAX_BYTES = 1 << 34
"""A block larger than this is refused before anything is allocated for it."""
UNIT = 1 << 19
"""Elements of a unit. Part of the format of codecs whose units have several layers."""


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """Shape of a block: everything its encoded size depends on.

    Attributes
    ----------
    layers, tokens, kv_heads, head_dim : int
        Extent of ``[layer][K|V][token][kv_head][dim]``.
    dtype : str
        ``bfloat16``, ``float16`` or ``float32``.
    position : int
        Position of the first token: keys were turned by it, and the sinks are at the first positions.
    """

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    position: int = 0

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if not (0 if name in ("tokens", "position") else 1) <= value <= most:
                raise CannotEncode(f"{name} of a block is {value}, outside what is allowed (at most {most}).")
        if self.dtype not in DTYPES:
            raise CannotEncode(f"blocks of dtype {self.dtype!r} are not known.")
        if self.nbytes > MAX_BYTES:
            raise CannotEncode(f"a block of {self.nbytes} bytes is larger than {MAX_BYTES}.")

    @property
    def channels(self) -> int:
        """Elements of one token's keys in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the block's tensor."""
        return (self.layers, 2, self.tokens, self.kv_heads, self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the block before encoding."""
        return 2 * self.layers * self.tokens * self.channels * DTYPES[self.dtype].itemsize

    def of(self, layers: int) -> BlockSpec:
        """The same block with so many layers."""
        return replace(self, layers=layers)


@dataclass(frozen=True, slots=True)
class Context:
    """What steps need besides the block: objects of the model, secrets, statistics. All optional until a step asks.

    Attributes
    ----------
    rotary : Rotary, optional
        The model's rotation; needed by ``prerope``.
    bases : mapping of str to object
        Calibrated bases by digest; needed by ``pca``.
    keys : mapping of str to bytes
        Sealing keys by key id; needed by ``seal``.
    importance : torch.Tensor, optional
        One float a token; needed by ``mikv`` to encode.
    query_peaks : torch.Tensor, optional
        Largest absolute query by ``[layer, kv_head, dim]``; needed by the balancer of ``mikv`` to encode.
    identity : bytes
        What the block is called; sealed parts are bound to it.
    """

    rotary: Rotary | None = None
    bases: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, bytes] = field(default_factory=dict)
    importance: torch.Tensor | None = None
    query_peaks: torch.Tensor | None = None
    identity: bytes = b""


class Step(ABC):
    """What all steps have. Subclasses are frozen dataclasses whose fields are int or str."""

    name: ClassVar[str]
    """Name in the header; a changed format gets a new name, so an old reader sees an unknown codec."""
    lossy: ClassVar[bool] = False
    by_importance: ClassVar[bool] = False
    """Needs `Context.importance` to encode; to decode nothing needs it."""

    def check(self, spec: BlockSpec) -> None:
        """Raise `CannotEncode` if the step does not work on such blocks."""
        del spec

    def reference(self, context: Context) -> str:
        """Digest of the object of the model that the step uses, written into the header; empty if none."""
        del context
        return ""


class BlockStep(Step):
    """Block to block, in float32, one unit of layers at a time."""

    keys_only: ClassVar[bool] = False
    """Leaves values alone: the unit that `inverse` is given may have no values, ``[layer][K][token][kv_head][dim]``."""

    @abstractmethod
    def forward(self, unit: torch.Tensor, spec: BlockSpec, layer: int, context: Context) -> torch.Tensor:
        """Transform a unit that starts at a layer of its block; never in place."""

    @abstractmethod
    def inverse(self, unit: torch.Tensor, spec: BlockSpec, layer: int, context: Context) -> torch.Tensor:
        """Undo `forward`; may work in place."""


class BlockCoder(Step):
    """Block to bytes. Sizes are known from the shape alone."""

    native: ClassVar[bool] = False
    """Works on the block's own dtype, bit by bit, instead of float32."""
    stacked: ClassVar[bool] = False
    """Units are single layers of one size, and `encode` and `decode` also take planes ``[layer, bytes]`` of several:
    fewer, longer rounds."""
    verbatim: ClassVar[bool] = False
    """The one plane is the unit's bytes as they are: there is nothing to do but copy and check them."""

    def span(self, spec: BlockSpec, context: Context) -> int:
        """Layers of a unit; the last unit may have fewer. By default one, or as many as make `UNIT` elements."""
        del context
        return together(spec)

    def required(self) -> int:
        """How many planes are needed at least; 0 means all."""
        return 0

    @abstractmethod
    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        """Exact bytes of each plane of the unit that starts at a layer; as many planes for every unit."""

    @abstractmethod
    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        """Fill ``out``, one array a plane, each of the size that `planes` says."""

    @abstractmethod
    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        """Fill the unit ``out`` from all planes, or from a prefix of at least `required`."""

    def decode_sides(
        self,
        planes: Sequence[Bytes],
        spec: BlockSpec,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        context: Context,
    ) -> None:
        """As `decode`, with keys and values ``[layer][token][kv_head][dim]`` apart, maybe of two dtypes."""
        unit = scratch("sides", spec.shape, torch.float32)
        self.decode(planes, spec, layer, unit, context)
        keys.copy_(unit[:, 0])
        values.copy_(unit[:, 1])

    def tolerance(
        self, unit: torch.Tensor, spec: BlockSpec, layer: int, planes: int, context: Context
    ) -> torch.Tensor | None:
        """Most by which each element can differ after decoding from so many planes, before it is rounded to the
        block's dtype; None if the coder promises nothing (its error is measured, see docs/codecs.md)."""
        del spec, layer, planes, context
        return None if self.lossy else torch.zeros(unit.shape)


class ByteStep(Step):
    """Bytes to bytes, one part at a time."""

    exact: ClassVar[bool] = True
    """Whether the encoded size is `bound` always; otherwise it is known only after encoding."""

    @abstractmethod
    def bound(self, nbytes: int) -> int:
        """Most bytes that a part of so many bytes can become."""

    @abstractmethod
    def encode(self, data: Bytes, label: bytes, context: Context) -> Bytes:
        """Encode a part; ``label`` tells the part from all others of its block."""

    @abstractmethod
    def decode(self, data: Bytes, nbytes: int, label: bytes, context: Context) -> Bytes:
        """Decode a part into exactly so many bytes, or raise `CorruptBlock`."""


def need(value: T | None, what: str, *, encoding: bool) -> T:
    """A value of the context that must be there."""
    if value is not None:
        return value
    raise (CannotEncode if encoding else CannotDecode)(f"{what} is needed and was not given.")


def together(spec: BlockSpec, elements: int = UNIT) -> int:
    """Layers of a block that make about so many elements, at least one."""
    return max(1, elements // max(2 * spec.tokens * spec.channels, elements // spec.layers))
