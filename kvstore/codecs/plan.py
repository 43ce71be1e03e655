"""Where everything of an encoded block goes: known before encoding from its chain, its shape, and what these refer to.

Small blocks are copied in less time than a plan takes to make, so plans are remembered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.codecs import frame
from kvstore.codecs.base import BlockSpec, Context
from kvstore.errors import CannotDecode

if TYPE_CHECKING:
    from kvstore.codecs.chain import Chain

MOST = 512
"""Plans that are remembered: one for each chain, shape and position, some KiB each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Places in an encoded block.

    Attributes
    ----------
    chain : str
        Name of the chain.
    span : int
        Layers of a unit.
    firsts : tuple of int
        First layer of each unit.
    raw, sizes, offsets : numpy.ndarray
        ``[plane, unit]``, not to be written to: bytes before and after byte steps, and where these begin.
    nbytes : int
        Bytes of the block, header and directory included; the most, where a byte step does not say exactly.
    label : bytes
        The header before the directory.
    """

    chain: str
    span: int
    firsts: tuple[int, ...]
    raw: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    nbytes: int
    label: bytes

    @property
    def units(self) -> int:
        """How many units."""
        return len(self.firsts)

    @property
    def planes(self) -> int:
        """How many planes each of them has."""
        return len(self.raw)

    def rounds(self, several: int, units: range | None = None) -> list[range]:
        """Units, all by default, so many at a time."""
        units = range(self.units) if units is None else units
        return [units[at : at + several] for at in range(0, len(units), several)]

    def units_of(self, layers: range, count: int) -> range:
        """The units of some of so many layers; raises `CannotDecode` if they are not whole ones."""
        first, last = layers.start, layers.stop
        if (
            layers.step != 1
            or not 0 <= first < last <= count
            or first % self.span
            or (last % self.span and last < count)
        ):
            raise CannotDecode(f"layers {first} to {last} are not whole units of {self.span} layers.")
        return range(first // self.span, -(-last // self.span))


_plans: dict[tuple[Chain, BlockSpec, tuple[str, ...]], Plan] = {}


def planned(chain: Chain, spec: BlockSpec, context: Context) -> Plan:
    """The plan of such blocks. Raises `CannotEncode` if the chain does not fit them, or needs what is not there."""
    references = tuple(step.reference(context) for step in chain.steps)
    known = chain, spec, references
    found = _plans.get(known)
    if found is None:
        found = _made(chain, spec, context, references)
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[known] = found
    return found


def _made(chain: Chain, spec: BlockSpec, context: Context, references: tuple[str, ...]) -> Plan:
    """Nothing of the context goes into it but what the references name."""
    for step in chain.steps:
        step.check(spec)
    coder = chain.coder
    span = coder.span(spec, context)
    firsts = tuple(range(0, spec.layers, span))
    shapes = {layers: spec.of(layers) for layers in (min(span, spec.layers), spec.layers - firsts[-1])}
    rows = [coder.planes(shapes[min(span, spec.layers - first)], first, context) for first in firsts]
    raw = np.array(rows, np.int64).T
    sizes = raw.copy()
    for step in chain.byte_steps:
        sizes = np.vectorize(step.bound, otypes=[np.int64])(sizes)
    name = str(chain)
    label = frame.head(spec, name, references, len(firsts), len(raw))
    start = frame.head_nbytes(label, len(firsts), len(raw))
    offsets = (start + np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    for array in (raw, sizes, offsets):
        array.flags.writeable = False
    return Plan(name, span, firsts, raw, sizes, offsets, start + int(sizes.sum()), label)
