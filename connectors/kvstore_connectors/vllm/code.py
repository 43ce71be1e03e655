"""Blocks that this engine stores encoded: smaller in host memory, and on their way across PCIe.

Only in lossy namespaces, and only by a rung of the profile, which the daemon enforces. Such blocks keep their form in
every tier and come back in it (`kvstore.encoding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from kvstore.codecs import parse, read
from kvstore.codecs.base import BlockSpec, Context
from kvstore.codecs.frame import has_head, head
from kvstore.encoding import form_of
from kvstore.errors import CannotDecode, CodecError, ConfigError, CorruptBlock
from kvstore.rope import Rotary
from kvstore.types import BlockHeader, Namespace
from kvstore_connectors.vllm.pages import Bytes

MOST_HEAD = 1 << 20
"""More than the header of any block: 16 bytes a part, and two texts."""

_REMEDY = "`chain` is a key of `kv_connector_extra_config`: `fp8`, or `prerope|kv4(k=4,v=4)`; see docs/codecs.md."


class Codes:
    """How the blocks of a lossy namespace may be encoded: by this engine's chain, or by that of another one.

    Parameters
    ----------
    namespace : Namespace
        Of this rank, with a lossy fidelity and the canonical layout.
    rotary : Rotary
        The model's rotation.
    own : str
        The chain that this engine's blocks are stored by; empty if they are stored as they are.

    Raises
    ------
    ConfigError
        If blocks of this namespace can not be encoded, or not by this chain.
    """

    def __init__(self, namespace: Namespace, rotary: Rotary, own: str = "") -> None:
        self._namespace, self._rotary = namespace, rotary
        self._known: dict[str, BlockCode] = {}
        self.own = self._code(own) if own else None

    def _code(self, chain: str) -> BlockCode:
        if chain not in self._known:
            made = BlockCode(chain, self._namespace, self._rotary)
            self._known[chain] = self._known[str(made.chain)] = made
        return self._known[chain]

    def of(self, parts: Sequence[Bytes], position: int) -> BlockCode | None:
        """The code of a leased block, by its header; None if it is no encoded block of this place."""
        nbytes = sum(part.nbytes for part in parts)
        data = parts[0] if len(parts) == 1 or parts[0].nbytes >= MOST_HEAD else np.concatenate(parts)
        if self.own is not None and self.own.knows(data, nbytes, position):
            return self.own
        try:
            code = self._code(read(data).chain)
        except (CodecError, CorruptBlock, ConfigError):
            return None
        return code if code.knows(data, nbytes, position) else None


class BlockCode:
    """One chain, for the blocks of one rank; parameters and errors as of `Codes`."""

    def __init__(self, chain: str, namespace: Namespace, rotary: Rotary) -> None:
        form = form_of(namespace)
        if form is None or not form.lossy:
            raise ConfigError(f"chain: blocks of fidelity {namespace.fidelity!r} and layout {namespace.layout!r} are "
                              "not encoded by the engine.", _REMEDY)  # fmt: skip
        try:
            self.chain = parse(chain)
        except CodecError as error:
            raise ConfigError(f"chain: {error.cause}", _REMEDY) from None
        if not self.chain.exact_size:
            raise ConfigError(f"chain: what {chain} makes of a block has no size known before.", _REMEDY)
        self.context = Context(rotary=rotary)
        self.form = form
        self._block_tokens = namespace.block_tokens
        # The first block of a prompt differs from the others; what does not fit is said here, at the start.
        self._ends = [self.chain.ends(self.spec(at), self.context) for at in (0, self._block_tokens)]
        self._units, self._planes = self.chain.extent(self.spec(0), self.context)
        self._references = tuple(step.reference(self.context) for step in self.chain.steps)
        self._name = str(self.chain)
        self._label = lru_cache(maxsize=4096)(self._make_label)

    def _make_label(self, position: int) -> bytes:
        """How the header of a block begins; made once for each place, since every block that is loaded is compared."""
        return head(self.spec(position), self._name, self._references, self._units, self._planes)

    def spec(self, position: int) -> BlockSpec:
        """A block whose first token has this position."""
        return self.form.spec(BlockHeader(position=position))

    def nbytes(self, position: int) -> int:
        """Stored bytes of a block."""
        return self.form.marked(self._ends[position > 0][-1], by_engine=True)

    def knows(self, data: Bytes, nbytes: int, position: int) -> bool:
        """Whether a stored block is one of this chain and place, by its header, and enough of it is there.

        ``data`` is at least its header, ``nbytes`` what it has in all.
        """
        needed = self.chain.coder.required() or self._planes
        return (
            self.form.is_by_engine(nbytes)
            and nbytes >= self._ends[position > 0][needed - 1]
            and has_head(data, self._label(position), self._units, self._planes)
        )

    def encode(self, raw: Bytes, position: int, into: Bytes) -> None:
        """Encode a block on the CPU. Raises `CannotEncode`."""
        spec = self.spec(position)
        block = torch.from_numpy(raw).view(spec.torch_dtype).view(spec.shape)
        into[self.chain.encode(block, spec, into, self.context) :] = 0

    def decode(self, data: Bytes, position: int) -> Bytes:
        """Decode a block on the CPU. Raises `CorruptBlock` or `CannotDecode`."""
        spec, frame = self.spec(position), read(data)
        whole = sum(frame.nbytes(planes) <= data.nbytes for planes in range(1, frame.planes + 1))
        if not whole:
            raise CannotDecode("not even the first planes of a block are there.")
        raw = np.empty(spec.nbytes, np.uint8)
        out = torch.from_numpy(raw).view(spec.torch_dtype).view(spec.shape)
        self.chain.decode(data, spec, out, self.context, planes=whole)
        return raw
