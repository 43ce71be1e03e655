"""Ladder(DiskTier(...)): a tier that keeps blocks encoded, and makes them smaller before it lets any go.

Blocks of ``exact`` namespaces are kept raw or lossless, never less. A namespace of fidelity ``lossy:PROFILE`` has the
rungs of its profile: a block comes in on the first, and when the tier is nearly full its least valuable blocks step
down, one rung at a time, before any is evicted. Where a rung is a prefix of another's planes, stepping down is cutting
off.

Only whole blocks of a known layout are encoded. How a block lies in the tier below can be told from its size alone, so
that a restart needs no index of its own: raw payloads are whole tokens long, encoded ones never are.

    encoded payload: frame of `kvstore.codecs` | xxh3-64 of the raw payload, exact chains only | a zero, if needed
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.errors import CodecError, ConfigError, CorruptBlock
from kvstore.tiers.base import Tier
from kvstore.tiers.wrappers import WrappedTier
from kvstore.types import (
    BlockHeader,
    BlockId,
    Dropped,
    DropReason,
    Hit,
    LoadOutcome,
    Miss,
    MissReason,
    Namespace,
    Scope,
    StoreOutcome,
)

if TYPE_CHECKING:
    from kvstore.codecs import BlockSpec, Chain, Context
    from kvstore.profile import Profiles, Rung

T = TypeVar("T")
CANONICAL = "lkthd1"
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SUM_BYTES = 8
NEARLY_FULL = 0.95
"""Share of the capacity from which blocks step down."""
STEPS_A_PUT = 8
"""Most blocks that step down for one that comes in."""
LOSSY = "lossy:"


@dataclass(frozen=True, slots=True)
class Form:
    """How the blocks of a namespace are encoded.

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


class Ladder(WrappedTier):
    """Encode on the way in, decode on the way out, step down under pressure.

    Parameters
    ----------
    inner : Tier
        What keeps the encoded blocks, and counts their bytes.
    fields : callable
        Namespace of a scope, if it is known.
    exact : str
        Chain of whole blocks in exact namespaces: ``raw`` or ``lossless``.
    profiles : Profiles, optional
        What lossy namespaces may use.
    threads : int
        Threads that encode and decode.
    """

    def __init__(
        self,
        inner: Tier,
        fields: Callable[[Scope], Namespace | None],
        *,
        exact: str = "raw",
        profiles: Profiles | None = None,
        threads: int = 2,
    ) -> None:
        super().__init__(inner)
        if exact not in ("raw", "lossless"):
            raise ConfigError(f"exact blocks are kept raw or lossless, not by {exact!r}.")
        self._fields, self._exact, self._profiles = fields, exact, profiles
        self._forms: dict[Scope, Form | None] = {}
        self._threads = ThreadPoolExecutor(threads, "codec")
        self._lock = asyncio.Lock()
        self._rung: dict[BlockId, int] = {}
        self._pins: dict[BlockId, float] = {}
        self.stats: dict[str, Counter[str]] = {}
        self.stepped = self.lost = self.stepped_bytes = 0
        self.busy_s = 0.0

    def _form(self, scope: Scope) -> Form | None:
        if scope not in self._forms:
            fields = self._fields(scope)
            if fields is None:
                return None
            self._forms[scope] = form_of(fields)
        return self._forms[scope]

    # -- looking -------------------------------------------------------------------------------------------------------

    def size(self, block: BlockId) -> int | None:
        """Raw payload bytes of the block if it is here."""
        stored = self.inner.size(block)
        form = None if stored is None else self._form(block.scope)
        return stored if form is None or stored is None or form.is_raw(stored) else form.whole

    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction, and where it stands, until a monotonic time."""
        pinned = self.inner.pin(block, until)
        self._pins.pop(block, None)
        if pinned and until:
            self._pins[block] = until
        return pinned

    def describe_state(self) -> dict[str, Any]:
        """State of the tier, and `codecs`: what passed through each chain since start, and what stepped down."""
        codecs = {
            "exact": self._exact,
            "since_start": {name: dict(counts) for name, counts in self.stats.items()},
            "stepped_down": self.stepped,
            "bytes_freed": self.stepped_bytes,
            "lost_stepping": self.lost,
            "busy_s": round(self.busy_s, 3),
            "held": self._held(),
        }
        return {**self.inner.describe_state(), "codecs": codecs}

    def _held(self) -> dict[str, dict[str, int]]:
        """Blocks, raw and stored bytes that are here, by raw, lossless and lossy."""
        found: dict[str, Counter[str]] = {}
        for scope in self.inner.scopes():
            form = self._form(scope)
            if form is None:
                continue
            for sized in self.inner.held(scope).values():
                raw = form.is_raw(sized.nbytes)
                kind = "raw" if raw else "lossy" if form.lossy else "lossless"
                counts = found.setdefault(kind, Counter())
                counts.update(blocks=1, stored_bytes=sized.nbytes, logical_bytes=sized.nbytes if raw else form.whole)
        return {kind: dict(counts) for kind, counts in found.items()}

    # -- out -----------------------------------------------------------------------------------------------------------

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """The raw payload of a block. What does not decode to what was stored is a miss, and is dropped."""
        stored, form = self.inner.size(block), self._form(block.scope)
        if stored is None or form is None or form.is_raw(stored):
            return await self.inner.get(block, into)
        if sum(view.nbytes for view in into) != form.whole:
            return Miss(MissReason.LOST)
        buffer = pages(stored)
        outcome = await self.inner.get(block, [buffer])
        if not isinstance(outcome, Hit):
            return outcome
        try:
            await self._work(self._decode, block, form, outcome.header, buffer, into)
        except (CodecError, CorruptBlock, ConfigError):
            self.counters.corrupt += 1
            await self.inner.drop(block)
            return Miss(MissReason.CORRUPT)
        return Hit(outcome.header, form.whole)

    def _decode(
        self, block: BlockId, form: Form, header: BlockHeader, data: memoryview, into: Sequence[memoryview]
    ) -> None:
        raw = self._raw(block, form, header, np.frombuffer(data, np.uint8))
        at = 0
        for view in into:
            np.frombuffer(view, np.uint8)[:] = raw[at : at + view.nbytes]
            at += view.nbytes

    def _raw(self, block: BlockId, form: Form, header: BlockHeader, data: np.ndarray) -> np.ndarray:
        """The raw payload of an encoded one."""
        import torch

        from kvstore.codecs import Context, parse, read

        frame = read(data)
        chain, spec = parse(frame.chain), _spec(form, header)
        if chain.lossy and not form.lossy:
            raise CorruptBlock(f"a block of an exact namespace was encoded by {frame.chain}.")
        context = self._rungs(form)[1] if form.lossy else Context()
        planes = _planes(frame, data.size)
        out = torch.empty(spec.shape, dtype=spec.torch_dtype)
        chain.decode(data, spec, out, context, planes=planes)
        raw = out.view(-1).view(torch.uint8).numpy()
        if not chain.lossy:
            end = frame.nbytes(frame.planes)
            if int.from_bytes(data[end : end + SUM_BYTES].tobytes(), "little") != xxh3_64_intdigest(raw.data):
                raise CorruptBlock("a decoded block is not what was encoded.")
        return raw

    # -- in ------------------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """Store a block, encoded if it is whole and becomes smaller by it."""
        form = self._form(block.scope)
        if form is None:
            return await self.inner.put(block, header, payload, nbytes, durable=durable)
        if not form.is_raw(nbytes):  # it could not be told from an encoded one
            self.counters.drop(DropReason.TOO_LARGE)
            return Dropped(DropReason.TOO_LARGE)
        chain = self._first(form, nbytes)
        if chain is None or self.inner.contains(block.scope, block.key):
            return await self.inner.put(block, header, payload, nbytes, durable=durable)
        try:
            data = await self._work(self._encode, block, form, header, payload, chain)
        except CodecError:  # values that the chain does not take: raw takes all
            data = None
        if data is None:
            return await self.inner.put(block, header, payload, nbytes, durable=durable)
        if form.lossy:
            await self._make_room(data.nbytes)
            self._rung[block] = 0
        outcome = await self.inner.put(block, header, [data], data.nbytes, durable=durable)
        self._count(str(chain), nbytes, data.nbytes)
        return outcome

    def _first(self, form: Form, nbytes: int) -> Chain | None:
        if nbytes != form.whole or (not form.lossy and self._exact == "raw"):
            return None
        from kvstore.codecs import parse

        return self._rungs(form)[0][0][1] if form.lossy else parse(self._exact)

    def _rungs(self, form: Form) -> tuple[list[tuple[Rung, Chain]], Context]:
        if self._profiles is None:
            raise ConfigError("no profile is here.", "Start the daemon with the profile that the namespace names.")
        return self._profiles.rungs(form.namespace)

    def _encode(
        self, block: BlockId, form: Form, header: BlockHeader, payload: Sequence[memoryview], chain: Chain
    ) -> memoryview | None:
        parts = [np.frombuffer(view, np.uint8) for view in payload]
        return self._encoded(form, header, parts[0] if len(parts) == 1 else np.concatenate(parts), chain)

    def _encoded(self, form: Form, header: BlockHeader, raw: np.ndarray, chain: Chain) -> memoryview | None:
        """A raw payload, encoded; None if it does not become smaller."""
        import torch

        from kvstore.codecs import Context

        spec = _spec(form, header)
        context = self._rungs(form)[1] if form.lossy else Context()
        tensor = torch.from_numpy(raw if raw.flags.writeable else raw.copy()).view(spec.torch_dtype).view(spec.shape)
        out = pages(chain.bound(spec, context) + SUM_BYTES + 1)
        size = chain.encode(tensor, spec, np.frombuffer(out, np.uint8), context)
        if not chain.lossy:
            out[size : size + SUM_BYTES] = xxh3_64_intdigest(raw.data).to_bytes(SUM_BYTES, "little")
            size += SUM_BYTES
        return _never_raw(form, out, size)

    def _count(self, chain: str, raw: int, stored: int) -> None:
        self.stats.setdefault(chain, Counter()).update(blocks=1, logical_bytes=raw, stored_bytes=stored)

    # -- down ----------------------------------------------------------------------------------------------------------

    async def _make_room(self, nbytes: int) -> None:
        """Have the least valuable lossy blocks step down, until there is room or all are on the last rung."""
        async with self._lock:
            if len(self._rung) + len(self._pins) > 2 * self.inner.usage().blocks + 1024:  # of blocks that have left
                self._rung = {b: rung for b, rung in self._rung.items() if self.inner.contains(*b)}
                self._pins = {b: until for b, until in self._pins.items() if until > time.monotonic()}
            for _ in range(STEPS_A_PUT):
                usage = self.inner.usage()
                if usage.used + nbytes <= NEARLY_FULL * usage.capacity or self.inner.order is None:
                    return
                found = next(iter(self.inner.order.victims(None, 0, self._can_step)), None)
                if found is None:
                    return
                await self._step(found[0])

    def _can_step(self, block: BlockId) -> int:
        """Stored bytes of a block that has a rung below it and is not pinned, else 0."""
        if self._pins.get(block, 0.0) > time.monotonic():
            return 0
        form = self._form(block.scope)
        stored = self.inner.size(block)
        if form is None or stored is None or not form.lossy or form.is_raw(stored):
            return 0
        return stored if self._rung.get(block, 0) + 1 < len(self._rungs(form)[0]) else 0

    async def _step(self, block: BlockId) -> None:
        """Put a block one rung down. It is absent for a moment; if it cannot be put back, it is lost and counted."""
        stored, form = self.inner.size(block), self._form(block.scope)
        if stored is None or form is None:
            return
        buffer = pages(stored)
        outcome = await self.inner.get(block, [buffer])
        if not isinstance(outcome, Hit):
            return
        try:
            rung, data = await self._work(self._smaller, block, form, outcome.header, buffer)
        except (CodecError, CorruptBlock):
            await self.inner.drop(block)
            self.lost += 1
            return
        self._rung[block] = rung
        if data is None or data.nbytes >= stored:
            return
        await self.inner.drop(block)
        again = await self.inner.put(block, outcome.header, [data], data.nbytes)
        if isinstance(again, Dropped):
            self.lost += 1
            return
        self.stepped += 1
        self.stepped_bytes += stored - data.nbytes
        self._count(self._rungs(form)[0][rung][0].chain, form.whole, data.nbytes)

    def _smaller(
        self, block: BlockId, form: Form, header: BlockHeader, buffer: memoryview
    ) -> tuple[int, memoryview | None]:
        """The next rung of a block, and its bytes there."""
        from kvstore.codecs import read

        data = np.frombuffer(buffer, np.uint8)
        frame, rungs = read(data), self._rungs(form)[0]
        own = _planes(frame, data.size)
        standing = [i for i, (r, chain) in enumerate(rungs) if str(chain) == frame.chain and r.planes in (own, 0)]
        rung = (standing[-1] if standing else -1) + 1
        if rung >= len(rungs):
            return len(rungs) - 1, None
        wanted, chain = rungs[rung]
        if str(chain) == frame.chain and wanted.planes:
            size = frame.nbytes(wanted.planes)
            out = pages(size + 1)
            out[:size] = buffer[:size]
            return rung, _never_raw(form, out, size)
        return rung, self._encoded(form, header, self._raw(block, form, header, data), chain)

    # -- threads -------------------------------------------------------------------------------------------------------

    async def _work(self, function: Callable[..., T], *args: Any) -> T:
        """Run in a codec thread, to its end even if whoever asked is gone: it holds the caller's buffers."""
        began = time.perf_counter()
        job = asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            await asyncio.wait([job])
            raise
        finally:
            self.busy_s += time.perf_counter() - began

    async def close(self) -> None:
        """Close the tier and end the threads."""
        await self.inner.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _spec(form: Form, header: BlockHeader) -> BlockSpec:
    from kvstore.codecs import BlockSpec

    own = form.namespace
    return BlockSpec(own.layers, own.block_tokens, own.kv_heads, own.head_dim, own.dtype, header.position)


def _planes(frame: Any, nbytes: int) -> int:
    """How many whole planes of a frame so many bytes hold."""
    return sum(frame.nbytes(planes) <= nbytes for planes in range(1, frame.planes + 1))


def _never_raw(form: Form, out: memoryview, size: int) -> memoryview | None:
    """The bytes of an encoded payload, one longer if they could be a raw one; None if they save nothing."""
    size += form.is_raw(size)
    return out[:size] if size < form.whole else None
