"""How the blocks of a namespace are encoded: by which chain, into what bytes, and what the next rung down is.

Only whole blocks of a known layout are encoded: by a tier, which decodes them again, or by the engine that stored them,
which gets them back as they are and never in a namespace that may not lose precision. How a block lies in a tier can be
told from its size alone, so that a restart needs no index of its own. Raw payloads are whole tokens long; of the others
those of an engine are of odd length, those of a tier of even length.

    encoded payload: frame of `kvstore.codecs` | xxh3-64 of the raw payload, exact chains only | zeros, if needed

Chains that give bits to the tokens that matter take their importance from the block's header. A block whose header says
nothing of it that can be used passes over such rungs: bits by a guess would not be what the profile measured.

Nothing here does I/O or waits; all of it may run in threads.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.errors import CannotDecode, CodecError, ConfigError, CorruptBlock
from kvstore.standing import called
from kvstore.types import BlockHeader, Namespace

if TYPE_CHECKING:
    from kvstore.codecs import BlockSpec, Chain, Context
    from kvstore.codecs.frame import Frame
    from kvstore.profile import Profiles, Rung

CANONICAL = "lkthd1"
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SUM_BYTES = 8
MARK_BYTES = 3
"""Most zeros behind a frame."""
EXACT = ("raw", "lossless")
LOSSY = "lossy:"


@dataclass(frozen=True, slots=True)
class Form:
    """What the blocks of a namespace look like.

    Attributes
    ----------
    namespace : Namespace
    token_bytes, whole : int
        Raw bytes of a token, and of a whole block.
    """

    namespace: Namespace
    token_bytes: int
    whole: int

    @property
    def lossy(self) -> bool:
        """Whether blocks may lose precision."""
        return self.namespace.fidelity.startswith(LOSSY)

    def is_raw(self, nbytes: int) -> bool:
        """Whether a payload of so many bytes is a raw one."""
        return nbytes % self.token_bytes == 0

    def is_by_engine(self, nbytes: int) -> bool:
        """Whether a payload of so many bytes was encoded by the engine that stored it."""
        return self.lossy and nbytes % 2 == 1

    def marked(self, size: int, *, by_engine: bool) -> int:
        """Length of an encoded payload whose frame has so many bytes: what it is can be told from it."""
        size += size % 2 != by_engine
        return size + 2 * self.is_raw(size)

    def spec(self, header: BlockHeader) -> BlockSpec:
        """Shape of a whole block."""
        from kvstore.codecs import BlockSpec

        own = self.namespace
        return BlockSpec(own.layers, own.block_tokens, own.kv_heads, own.head_dim, own.dtype, header.position)


def form_of(namespace: Namespace | None) -> Form | None:
    """The form of a namespace's blocks; None if its layout is not one that codecs know."""
    if namespace is None or namespace.layout != CANONICAL or namespace.dtype not in ITEM_BYTES:
        return None
    elements = 2 * namespace.layers * namespace.kv_heads * namespace.head_dim
    token = elements * ITEM_BYTES[namespace.dtype]
    return Form(namespace, token, token * namespace.block_tokens) if token > 1 and namespace.block_tokens > 0 else None


def pages(nbytes: int) -> memoryview:
    """Page-aligned memory, as tiers want it."""
    return memoryview(mmap.mmap(-1, -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE))[:nbytes]


class Encoded(NamedTuple):
    """Bytes of a block, and the rung they are of: its name (`kvstore.standing.called`; empty if raw), its number."""

    data: memoryview
    name: str
    rung: int = 0


class Encoding:
    """Chains of exact and lossy namespaces.

    Parameters
    ----------
    exact : str
        ``raw`` or ``lossless``: what keeps whole blocks of exact namespaces, and durable blocks of any.
    profiles : Profiles, optional
        What lossy namespaces may use.
    """

    def __init__(self, exact: str, profiles: Profiles | None) -> None:
        if exact not in EXACT:
            raise ConfigError(f"exact blocks are kept raw or lossless, not by {exact!r}.")
        self.exact = exact
        self._profiles = profiles

    @property
    def wants_codecs(self) -> bool:
        """Whether anything is encoded here, and codecs are needed."""
        return self.exact != "raw" or self._profiles is not None

    def rungs(self, form: Form) -> tuple[list[tuple[Rung, Chain]], Context]:
        """Rungs of a lossy namespace, from the largest to the smallest, and what their chains need.

        Raises
        ------
        ConfigError
            There is no profile for it here.
        """
        if self._profiles is None:
            raise ConfigError("no profile is here.", "Start the daemon with the profile that the namespace names.")
        return self._profiles.rungs(form.namespace)

    def first(self, form: Form, header: BlockHeader, nbytes: int, *, durable: bool) -> tuple[int, Chain] | None:
        """Rung and chain that a new block is encoded by; None if it stays raw. What is durable loses nothing."""
        if nbytes != form.whole:
            return None
        if form.lossy and not durable:
            rungs = self.rungs(form)[0]
            return next(((i, chain) for i, (_, chain) in enumerate(rungs) if _takes(chain, form, header)), None)
        if self.exact == "raw":
            return None
        from kvstore.codecs import parse  # brings torch, which takes seconds: only where it was loaded at the start

        return 0, parse(self.exact)

    def passes_over(self, form: Form, header: BlockHeader) -> bool:
        """Whether a block of a lossy namespace has rungs that its header's importance, absent or bad, keeps it from."""
        return not all(_takes(chain, form, header) for _, chain in self.rungs(form)[0])

    def encode(
        self, form: Form, header: BlockHeader, payload: Sequence[memoryview], chain: Chain, rung: int = 0
    ) -> Encoded | None:
        """A raw payload, encoded; None if it does not become smaller. Raises `CodecError`."""
        parts = [np.frombuffer(view, np.uint8) for view in payload]
        planes = self.rungs(form)[0][rung][0].planes if chain.lossy else 0
        found = self._encode(form, header, parts[0] if len(parts) == 1 else np.concatenate(parts), chain, planes)
        return None if found is None else found._replace(rung=rung)

    def _encode(
        self, form: Form, header: BlockHeader, raw: np.ndarray, chain: Chain, planes: int = 0
    ) -> Encoded | None:
        """Encode by a chain, and keep so many of its planes; 0 means all."""
        import torch

        spec, context = form.spec(header), self._context(form, chain)
        if chain.by_importance:
            from kvstore.codecs import importance

            context = replace(context, importance=importance.known(header, spec.tokens))
        tensor = torch.from_numpy(raw if raw.flags.writeable else raw.copy()).view(spec.torch_dtype).view(spec.shape)
        out = pages(chain.bound(spec, context) + SUM_BYTES + MARK_BYTES)
        size, name = chain.encode(tensor, spec, np.frombuffer(out, np.uint8), context), str(chain)
        if planes:
            from kvstore.codecs import read

            frame = read(np.frombuffer(out, np.uint8))
            size, name = frame.nbytes(min(planes, frame.planes)), _called(frame, planes)
        if not chain.lossy:
            out[size : size + SUM_BYTES] = xxh3_64_intdigest(raw.data).to_bytes(SUM_BYTES, "little")
            size += SUM_BYTES
        data = _marked(form, out, size, by_engine=False)
        return None if data is None else Encoded(data, name)

    def decode(self, form: Form, header: BlockHeader, data: memoryview, into: Sequence[memoryview]) -> str:
        """Fill buffers with the raw payload of an encoded one; the name of the rung it stands on.

        Raises
        ------
        CorruptBlock
            The bytes are not what was encoded, or are of a chain that such a namespace may not have.
        CodecError, ConfigError
            Something that is needed is not here.
        """
        from kvstore.codecs import read

        encoded = np.frombuffer(data, np.uint8)
        frame = read(encoded)
        if len(into) == 1:
            self._decode(form, header, encoded, frame, np.frombuffer(into[0], np.uint8))
            return _called(frame, _planes(frame, encoded.size))
        raw, at = np.empty(form.whole, np.uint8), 0
        self._decode(form, header, encoded, frame, raw)
        for view in into:
            np.frombuffer(view, np.uint8)[:] = raw[at : at + view.nbytes]
            at += view.nbytes
        return _called(frame, _planes(frame, encoded.size))

    def _decode(self, form: Form, header: BlockHeader, data: np.ndarray, frame: Frame, raw: np.ndarray) -> None:
        """Fill `raw`, of the size of a whole block."""
        import torch

        from kvstore.codecs import parse

        chain, spec = parse(frame.chain), form.spec(header)
        planes = _planes(frame, data.size)
        if chain.lossy:
            self._gate(form, frame, planes)
        out = torch.from_numpy(raw).view(spec.torch_dtype).view(spec.shape)
        chain.decode(data, spec, out, self._context(form, chain), planes=planes)
        if not chain.lossy:
            end = frame.nbytes(frame.planes)
            if int.from_bytes(data[end : end + SUM_BYTES].tobytes(), "little") != xxh3_64_intdigest(raw.data):
                raise CorruptBlock("a decoded block is not what was encoded.")

    def _gate(self, form: Form, frame: Frame, planes: int) -> None:
        """Refuse a lossy frame, or what is left of one, that the namespace's profile does not let be read."""
        if not form.lossy:
            raise CorruptBlock(f"a block of an exact namespace was encoded by {frame.chain}.")
        if not planes:
            raise CorruptBlock("an encoded block is cut off in its first plane.")
        kept = {planes, 0} if planes == frame.planes else {planes}
        own = self._profiles
        if own is not None and not any(own.allows(form.namespace, frame.chain, count) for count in kept):
            raise CannotDecode(
                f"{planes} of {frame.planes} planes by {frame.chain} are no rung that its profile allows.",
                "The profile was calibrated anew, or the block comes from elsewhere; it will be stored again.",
            )

    def given(self, form: Form, header: BlockHeader, data: memoryview, *, whole: bool) -> Encoded:
        """What an engine encoded, once it has been found right: its header only, or with `whole` every part.

        Raises
        ------
        CorruptBlock, CannotDecode
            It is no frame, of another block, cut off, or by a chain that is no rung of the profile.
        ConfigError
            The profile is not here.
        """
        from kvstore.codecs import read

        encoded = np.frombuffer(data, np.uint8)
        frame = read(encoded)
        planes = _planes(frame, encoded.size)
        rung = self._rung(form, header, frame, planes)
        if not planes or data.nbytes != form.marked(frame.nbytes(planes), by_engine=True):
            raise CorruptBlock("an encoded block is longer or shorter than its header says.")
        if whole:
            for plane, unit in np.ndindex(planes, frame.units):
                frame.part(encoded, plane, unit)
        return Encoded(data, _called(frame, planes), rung)

    def _rung(self, form: Form, header: BlockHeader, frame: Frame, planes: int) -> int:
        """The rung that so many planes of a lossy frame stand on; raises `CannotDecode` if the profile has none."""
        from kvstore.codecs import parse

        rungs, context = self.rungs(form)
        chain, allowed = parse(frame.chain), (0, planes) if planes == frame.planes else (planes,)
        standing = [i for i, (rung, known) in enumerate(rungs) if known == chain and rung.planes in allowed]
        references = tuple(step.reference(context) for step in chain.steps)
        if frame.spec != form.spec(header) or frame.references != references or not standing:
            raise CannotDecode(f"a block of {frame.spec} was encoded by {frame.chain}: no rung of its profile.")
        return standing[0]

    def kept(self, form: Form, header: BlockHeader, data: memoryview) -> Encoded:
        """What a tier keeps of a block of a lossy namespace, each part verified; on rung -1 if nothing of it is lost.

        Raises
        ------
        CorruptBlock, CannotDecode
            It is damaged, or stands on no rung of the profile.
        ConfigError
            The profile is not here.
        """
        from kvstore.codecs import parse, read

        if form.is_raw(data.nbytes):
            return Encoded(data, "", -1)
        encoded = np.frombuffer(data, np.uint8)
        frame = read(encoded)
        planes, rung = _planes(frame, encoded.size), -1
        if parse(frame.chain).lossy:
            rung = self._rung(form, header, frame, planes)
        for plane, unit in np.ndindex(planes, frame.units):
            frame.part(encoded, plane, unit)
        return Encoded(data, _called(frame, planes), rung)

    def accepts(self, namespace: Namespace, header: BlockHeader, payload: Sequence[memoryview]) -> bool:
        """Whether a payload may be kept: raw, or encoded by its engine as its header says and its profile allows."""
        nbytes = sum(view.nbytes for view in payload)
        if nbytes % 2 == 0 or not namespace.fidelity.startswith(LOSSY):
            return True
        form = form_of(namespace)
        if form is None:
            return True
        try:
            data = payload[0] if len(payload) == 1 else memoryview(b"".join(payload))
            self.given(form, header, data, whole=False)
        except (CodecError, CorruptBlock, ConfigError):
            return False
        return True

    def _context(self, form: Form, chain: Chain) -> Context:
        from kvstore.codecs import Context

        return self.rungs(form)[1] if chain.lossy else Context()

    def lower(self, form: Form, header: BlockHeader, data: memoryview, *, shared: bool = False) -> Encoded | None:
        """An encoded block on the next rung down; None if there is none, or it was stored to lose nothing.

        In a tier that others share, what stands on no rung of the profile here stays as it is.

        Where the next rung is a prefix of the block's planes, stepping down is cutting off. Rungs that need importance
        are passed over where the header has none.
        """
        from kvstore.codecs import parse, read

        encoded = np.frombuffer(data, np.uint8)
        frame, rungs = read(encoded), self.rungs(form)[0]
        if not parse(frame.chain).lossy:
            return None
        own = _planes(frame, encoded.size)
        standing = [i for i, (r, chain) in enumerate(rungs) if str(chain) == frame.chain and r.planes in (own, 0)]
        if shared and not standing:
            return None
        raw: np.ndarray | None = None
        for number in range((standing[-1] if standing else -1) + 1, len(rungs)):
            rung, chain = rungs[number]
            if str(chain) == frame.chain and rung.planes:
                size = frame.nbytes(min(rung.planes, own))
                out = pages(size + MARK_BYTES)
                out[:size] = data[:size]
                cut = _marked(form, out, size, by_engine=form.is_by_engine(data.nbytes))
                found = None if cut is None else Encoded(cut, _called(frame, min(rung.planes, own)))
            elif not _takes(chain, form, header):
                continue
            else:
                if raw is None:
                    raw = np.empty(form.whole, np.uint8)
                    self._decode(form, header, encoded, frame, raw)
                found = self._encode(form, header, raw, chain, rung.planes)
            if found is not None and found.data.nbytes < data.nbytes:
                return found._replace(rung=number)
        return None


def _takes(chain: Chain, form: Form, header: BlockHeader) -> bool:
    """Whether a header says all that a chain needs to encode its block."""
    if not chain.by_importance:
        return True
    from kvstore.codecs import importance

    return importance.known(header, form.namespace.block_tokens) is not None


def _called(frame: Frame, planes: int) -> str:
    """The name of the rung that so many planes of a frame are."""
    return called(frame.chain, planes if planes < frame.planes else 0)


def _planes(frame: Frame, nbytes: int) -> int:
    """How many whole planes of a frame so many bytes hold."""
    return sum(frame.nbytes(planes) <= nbytes for planes in range(1, frame.planes + 1))


def _marked(form: Form, out: memoryview, size: int, *, by_engine: bool) -> memoryview | None:
    """The bytes of an encoded payload, zeros behind the frame included; None if they save nothing."""
    size = form.marked(size, by_engine=by_engine)
    return out[:size] if size < form.whole else None
