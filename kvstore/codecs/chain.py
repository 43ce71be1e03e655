"""A chain of steps, as one codec: exact sizes first, then encoding into a buffer, then decoding into a tensor.

Nothing is allocated but one unit of layers in float32 and the part at hand. What a header says about sizes is
compared with the tensor that the caller wants filled before any of it is believed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import xxhash

from kvstore.codecs import frame
from kvstore.codecs.base import BlockCoder, BlockSpec, BlockStep, Bytes, ByteStep, Context, Step, together
from kvstore.codecs.plan import Plan, planned
from kvstore.codecs.raw import as_bytes, finite, largest
from kvstore.codecs.scratch import scratch
from kvstore.errors import CannotDecode, CannotEncode, CorruptBlock

ROUND = 1 << 20
"""Elements of units that are coded in one round of calls: of half as many the calls cost up to a fifth, and many more
would leave the core's cache."""
ROOM = 16
"""Values so close to the largest of their type may be beyond it once something of them was lost."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Steps in order: block to block, one coder, bytes to bytes.

    Attributes
    ----------
    blocks : tuple of BlockStep
        What is done to the block before coding.
    coder : BlockCoder
        What makes bytes of it.
    byte_steps : tuple of ByteStep
        What is done to each part.
    """

    blocks: tuple[BlockStep, ...]
    coder: BlockCoder
    byte_steps: tuple[ByteStep, ...] = ()

    def __post_init__(self) -> None:
        if self.blocks and self.coder.native:
            raise CannotEncode(f"{self.coder.name} keeps the block's own bytes, so no step may change it before.")

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of encoding."""
        return (*self.blocks, self.coder, *self.byte_steps)

    @property
    def lossy(self) -> bool:
        """Whether a decoded block may differ from the one encoded."""
        return any(step.lossy for step in self.steps)

    @property
    def by_importance(self) -> bool:
        """Whether encoding needs the importance of the block's tokens."""
        return any(step.by_importance for step in self.steps)

    @property
    def exact_size(self) -> bool:
        """Whether `bound` is the encoded size; otherwise the size is known once `encode` has run."""
        return all(step.exact for step in self.byte_steps)

    def __str__(self) -> str:
        return "|".join(_text(step) for step in self.steps)

    def bound(self, spec: BlockSpec, context: Context | None = None) -> int:
        """Most bytes that such a block can take encoded; exactly its bytes if `exact_size`."""
        return self._plan(spec, context or Context()).nbytes

    def ends(self, spec: BlockSpec, context: Context | None = None) -> list[int]:
        """Bytes of such a block with one plane, with two, and so on; what `bound` says of it holds for them."""
        plan = self._plan(spec, context or Context())
        return (plan.offsets[:, -1] + plan.sizes[:, -1]).tolist()

    def extent(self, spec: BlockSpec, context: Context) -> tuple[int, int]:
        """Units and planes of such a block."""
        plan = self._plan(spec, context)
        return plan.units, plan.planes

    def encode(self, block: torch.Tensor, spec: BlockSpec, out: Bytes, context: Context | None = None) -> int:
        """Encode a block into a buffer of at least `bound` bytes.

        Parameters
        ----------
        block : torch.Tensor
            ``[layer][K|V][token][kv_head][dim]`` in the dtype of ``spec``.
        spec : BlockSpec
            What the block is.
        out : numpy.ndarray
            Flat, writable, uint8.
        context : Context, optional
            What the steps need.

        Returns
        -------
        int
            Bytes used.

        Raises
        ------
        CannotEncode
            The chain does not fit the block; nothing of ``out`` is valid then.
        """
        context = context or Context()
        plan = self._plan(spec, context)
        if tuple(block.shape) != spec.shape or block.dtype != spec.torch_dtype:
            raise CannotEncode(f"the block is {tuple(block.shape)} {block.dtype}, not {spec.shape} {spec.dtype}.")
        if out.size < plan.nbytes:
            raise CannotEncode(f"the buffer has {out.size} bytes of {plan.nbytes}.")
        sizes, offsets = plan.sizes.copy(), plan.offsets
        if self._is_copy:
            frame.seal_head(out, plan.label, sizes, _copied(as_bytes(block.contiguous()), out, sizes, offsets))
            return plan.nbytes
        checks, most = np.zeros(plan.sizes.shape, np.uint64), 0.0
        parts: list[list[Bytes]] = [[] for _ in range(plan.planes)]
        for some in plan.rounds(self._several(spec)):
            first = plan.firsts[some.start]
            layers = block[first : first + plan.span * len(some)]
            raw = plan.raw[:, some.start].tolist()
            if self.byte_steps:
                places = [np.empty(n if len(some) == 1 else (len(some), n), np.uint8) for n in raw]
            else:  # a plane of units that are taken at once lies in one piece
                starts = offsets[:, some.start].tolist()
                pieces = [out[at : at + len(some) * n] for at, n in zip(starts, raw, strict=True)]
                places = pieces if len(some) == 1 else [piece.reshape(len(some), -1) for piece in pieces]
            most = max(most, self._encode_unit(layers, spec.of(len(layers)), first, places, context))
            for plane, place in enumerate(places):
                for unit, part in zip(some, place if place.ndim == 2 else [place], strict=True):
                    for step in self.byte_steps:
                        part = step.encode(part, _label(plan.label, plane, unit), context)
                    sizes[plane, unit] = part.size
                    checks[plane, unit] = xxhash.xxh3_64_intdigest(part.data)
                    if self.byte_steps:
                        parts[plane].append(part)
        end = frame.head_nbytes(plan.label, plan.units, plan.planes)
        for part in (part for plane in parts for part in plane):
            out[end : end + part.size] = part
            end += part.size
        frame.seal_head(out, plan.label, sizes, checks)
        nbytes = end if self.byte_steps else plan.nbytes
        if most > torch.finfo(spec.torch_dtype).max / ROOM:
            self._try(out[:nbytes], plan, spec, context)
        return nbytes

    def _try(self, data: Bytes, plan: Plan, spec: BlockSpec, context: Context) -> None:
        """Whether what was lost has made values too large for their type: then no plane of it could be read back."""
        found = torch.empty(spec.shape, dtype=spec.torch_dtype)
        for planes in range(self.coder.required() or plan.planes, plan.planes + 1):
            try:
                self.decode(data, spec, found, context, planes=planes)
            except CorruptBlock as error:
                raise CannotEncode(f"the block's values are too large for {self}: {error.cause}") from None
            if not finite(found):
                raise CannotEncode(f"the block's values are too large for {self} in {spec.dtype}.")

    @property
    def _is_copy(self) -> bool:
        """Whether a part is the block's own bytes and nothing else."""
        return self.coder.verbatim and not self.byte_steps

    def _several(self, spec: BlockSpec) -> int:
        """Units that the coder takes at once."""
        return together(spec, ROUND) if self.coder.stacked else 1

    def _encode_unit(
        self, layers: torch.Tensor, spec: BlockSpec, first: int, places: Sequence[Bytes], context: Context
    ) -> float:
        """Encode; the greatest magnitude among the values, 0 where it does not matter."""
        most = 0.0
        if not self.coder.native:
            layers = layers.to(torch.float32)
            most = largest(layers)
            if not math.isfinite(most):
                raise CannotEncode(f"layer {first} has values that are not finite.")
        for step in self.blocks:
            layers = step.forward(layers, spec, first, context)
        self.coder.encode(layers, spec, first, places, context)
        return most

    def decode(
        self,
        data: Bytes,
        spec: BlockSpec,
        out: torch.Tensor,
        context: Context | None = None,
        *,
        layers: range | None = None,
        planes: int | None = None,
    ) -> None:
        """Decode a block, or some layers of it, into a tensor.

        Parameters
        ----------
        data : numpy.ndarray
            The encoded block, or a prefix of it that holds ``planes`` whole planes.
        spec : BlockSpec
            What the block must be.
        out : torch.Tensor
            ``[layer][K|V][token][kv_head][dim]`` for the layers asked for, in the dtype of ``spec``.
        context : Context, optional
            What the steps need.
        layers : range, optional
            Consecutive layers, from and to the borders of units; all by default.
        planes : int, optional
            How many planes to use; all by default.

        Raises
        ------
        CorruptBlock
            The bytes are not what was encoded.
        CannotDecode
            Something that is needed is not here, or the block is another than expected. After an error the contents
            of ``out`` are of no meaning.
        """
        context = context or Context()
        parsed, plan = frame.read(data), self._plan(spec, context, decoding=True)
        if parsed.spec != spec or parsed.chain != plan.chain:
            raise CannotDecode(f"the block is {parsed.spec} by {parsed.chain}, not {spec} by {self}.")
        for step, wanted in zip(self.steps, parsed.references, strict=True):
            if wanted != step.reference(context):
                raise CannotDecode(f"{step.name} used {wanted or 'nothing'}, but {step.reference(context)!r} is here.")
        if (parsed.planes, parsed.units) != (plan.planes, plan.units) or (parsed.sizes > plan.sizes).any():
            raise CorruptBlock("the directory is not of such a block.")
        if self.exact_size and (parsed.sizes != plan.sizes).any():
            raise CorruptBlock("the parts have other sizes than such a block has.")
        used = plan.planes if planes is None else planes
        if not (self.coder.required() or plan.planes) <= used <= plan.planes:
            raise CannotDecode(f"{self} cannot be read from {used} of {plan.planes} planes.")
        wanted_layers = range(spec.layers) if layers is None else layers
        units = plan.units_of(wanted_layers, spec.layers)
        if tuple(out.shape) != spec.of(len(wanted_layers)).shape or out.dtype != spec.torch_dtype:
            raise CannotDecode(f"the tensor to fill is {tuple(out.shape)} {out.dtype}.")
        if self._is_copy and out.is_contiguous():
            parsed.copy(data, units, as_bytes(out))
            return
        for some in plan.rounds(self._several(spec), units):
            first = plan.firsts[some.start]
            target = out[first - wanted_layers.start :][: plan.span * len(some)]
            parts: list[Bytes] = []
            for plane in range(used):
                sizes = plan.raw[plane]
                own = [self._part(parsed, data, plane, unit, sizes.item(unit), context) for unit in some]
                if len(own) == 1:
                    parts.append(own[0])
                elif self.byte_steps:
                    parts.append(np.stack(own))
                else:  # they lie in one piece
                    start = parsed.offsets.item(plane, some.start)
                    parts.append(data[start : start + len(own) * own[0].size].reshape(len(own), -1))
            self._decode_unit(parts, spec.of(len(target)), first, target, context)

    def tolerance(
        self, block: torch.Tensor, spec: BlockSpec, context: Context | None = None, *, planes: int | None = None
    ) -> torch.Tensor | None:
        """Most by which each element of a block can differ after a round trip, before it is rounded to its dtype.

        Parameters
        ----------
        block, spec, context
            As in `encode`.
        planes : int, optional
            How many planes are decoded; all by default.

        Returns
        -------
        torch.Tensor or None
            float32, of the block's shape. None if the coder promises nothing, or if steps before it move elements
            among each other: then the error is measured by decoding.
        """
        context = context or Context()
        plan = self._plan(spec, context)
        if any(step.lossy for step in self.blocks):
            return None
        found = []
        for first in plan.firsts:
            layers = block[first : first + plan.span].float()
            used = plan.planes if planes is None else planes
            found.append(self.coder.tolerance(layers, spec.of(len(layers)), first, used, context))
        known = [part for part in found if part is not None]
        return torch.cat(known) if len(known) == len(found) else None

    def _part(self, parsed: frame.Frame, data: Bytes, plane: int, unit: int, raw: int, context: Context) -> Bytes:
        part = parsed.part(data, plane, unit)
        inner = [raw]
        for step in self.byte_steps:
            inner.append(step.bound(inner[-1]))
        for step, nbytes in zip(reversed(self.byte_steps), reversed(inner[:-1]), strict=True):
            part = step.decode(part, nbytes, _label(parsed.label, plane, unit), context)
        if part.size != raw:
            raise CorruptBlock(f"part {unit} of plane {plane} has {part.size} bytes of {raw}.")
        return part

    def _decode_unit(
        self, parts: Sequence[Bytes], spec: BlockSpec, first: int, target: torch.Tensor, context: Context
    ) -> None:
        if not self.blocks:
            self.coder.decode(parts, spec, first, target, context)
        elif all(step.keys_only for step in self.blocks):  # values need not pass through float32
            unit = scratch("unit", (spec.layers, 1, *spec.shape[2:]), torch.float32)
            self.coder.decode_sides(parts, spec, first, unit[:, 0], target[:, 1], context)
            target[:, :1].copy_(self._undone(unit, spec, first, context))
        else:
            unit = scratch("unit", spec.shape, torch.float32)
            self.coder.decode(parts, spec, first, unit, context)
            target.copy_(self._undone(unit, spec, first, context))
        if self.lossy and spec.dtype == "float16" and not finite(target):
            raise CorruptBlock("a decoded value is outside the range of float16.")

    def _undone(self, unit: torch.Tensor, spec: BlockSpec, first: int, context: Context) -> torch.Tensor:
        """What it was before the steps in front of the coder; by turning, the largest values of a type can leave it."""
        for step in reversed(self.blocks):
            unit = step.inverse(unit, spec, first, context)
        if not largest(unit) <= torch.finfo(spec.torch_dtype).max:
            raise CorruptBlock(f"a decoded value is outside the range of {spec.dtype}.")
        return unit

    def _plan(self, spec: BlockSpec, context: Context, *, decoding: bool = False) -> Plan:
        try:
            return planned(self, spec, context)
        except CannotEncode as error:
            if decoding:
                raise CannotDecode(error.cause) from None
            raise


def _copied(block: Bytes, out: Bytes, sizes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Copy a block's parts to their places; their checksums."""
    checks, at = np.zeros(sizes.shape, np.uint64), 0
    for unit, (size, start) in enumerate(zip(sizes[0].tolist(), offsets[0].tolist(), strict=True)):
        checks[0, unit] = frame.copied(block[at : at + size], out[start : start + size])
        at += size
    return checks


def _label(head: bytes, plane: int, unit: int) -> bytes:
    return head + struct.pack("<II", plane, unit)


def _text(step: Step) -> str:
    values = ",".join(f"{f.name}={getattr(step, f.name)}" for f in fields(step))  # pyright: ignore[reportArgumentType]
    return f"{step.name}({values})" if values else step.name
