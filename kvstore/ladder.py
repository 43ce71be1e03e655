"""Ladder(DiskTier(...)): a tier that keeps blocks encoded, and makes them smaller before it lets any go.

Blocks of ``exact`` namespaces are kept raw or lossless, never less, and so are durable blocks of any. A namespace of
fidelity ``lossy:PROFILE`` has the rungs of its profile: a block comes in on the first, and when the tier is nearly full
its least valuable blocks step down, one rung at a time, before any is evicted. After MiKV (arXiv 2402.18096): a little
kept of everything beats all of a little.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore.encoding import Encoded, Encoding, Form, form_of, pages
from kvstore.errors import CannotDecode, CodecError, ConfigError, CorruptBlock
from kvstore.standing import UNREAD, Standing
from kvstore.steps import Steps
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
    Stored,
    StoreOutcome,
)
from kvstore.watcher import Watcher, Watchers

if TYPE_CHECKING:
    from kvstore.profile import Profiles

T = TypeVar("T")
MOST_FORMS = 8192
"""Namespaces whose layout is remembered before it is looked which of them the daemon still knows."""


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
        self._encoding = Encoding(exact, profiles)
        self._fields = fields
        self._forms: dict[Scope, Form | None] = {}
        self._most_forms = MOST_FORMS
        self._threads = ThreadPoolExecutor(threads, "codec", initializer=_one_core)
        self._standing = Standing()
        self.steps = Steps(inner, self._encoding, self._standing, self._form, self._work, self._noted)
        inner.watch(self._standing)
        self.passed: dict[str, Counter[str]] = {}
        self.undecodable = self.unweighed = 0
        self.busy_s = 0.0

    async def start(self) -> None:
        """Recover what is there; load the codecs now if they will be needed, not while somebody waits."""
        await self.inner.start()
        if self._encoding.wants_codecs:
            await asyncio.to_thread(importlib.import_module, "kvstore.codecs")

    def _form(self, scope: Scope) -> Form | None:
        if scope not in self._forms:
            fields = self._fields(scope)
            if fields is None:
                return None
            if len(self._forms) >= self._most_forms:  # of namespaces that the daemon forgot
                self._forms = {known: form for known, form in self._forms.items() if self._fields(known) is not None}
                self._most_forms = max(MOST_FORMS, 2 * len(self._forms))
            self._forms[scope] = form_of(fields)
            self._take_stock(scope)
        return self._forms[scope]

    def _take_stock(self, scope: Scope) -> None:
        """Count the encoded blocks of a namespace that were there before it was known."""
        form = self._forms[scope]
        if form is not None:
            for key, sized in self.inner.held(scope).items():
                if not form.is_raw(sized.nbytes):
                    rung = 0 if self._rungs(form) > 1 else None
                    self._standing.set(BlockId(scope, key), UNREAD, sized.nbytes, form.whole, rung)

    def _rungs(self, form: Form) -> int:
        """How many rungs blocks of a namespace have here: none if the tier has no order, or their profile is away."""
        if self.inner.order is None or not form.lossy:
            return 0
        try:
            return len(self._encoding.rungs(form)[0])
        except ConfigError:
            return 0

    # -- looking -------------------------------------------------------------------------------------------------------

    def size(self, block: BlockId) -> int | None:
        """Payload bytes of the block as `get` gives it, if it is here."""
        stored = self.inner.size(block)
        form = None if stored is None else self._form(block.scope)
        return stored if form is None or stored is None or _as_it_is(form, stored) else form.whole

    def chain(self, block: BlockId) -> str:
        """By which chain a block is encoded, and how many of its planes are kept if some were cut off; empty if raw."""
        return self._standing.rung(block)

    def watch(self, watcher: Watcher) -> None:
        """Have somebody told of every block that comes or goes."""
        self.inner.watch(Watchers(self._standing, watcher))

    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction, and where it stands, until a monotonic time."""
        pinned = self.inner.pin(block, until)
        self.steps.pin(block, until if pinned else 0.0)
        return pinned

    def describe_state(self) -> dict[str, Any]:
        """State of the tier, and `codecs`: what is held on each rung, what passed through it, what stepped down."""
        for scope in self.inner.scopes():  # blocks of before the start count as soon as their namespace is known
            self._form(scope)
        codecs = {
            "exact": self._encoding.exact,
            "held": self._standing.by_rung(),
            "since_start": {name: dict(counts) for name, counts in self.passed.items()},
            "can_step": self._standing.can_step,
            "stepped_down": self.steps.down,
            "bytes_freed": self.steps.freed,
            "lost_stepping": self.steps.lost,
            "taken_over": self.steps.up,
            "undecodable": self.undecodable,
            "without_importance": self.unweighed,
            "busy_s": round(self.busy_s, 3),
        }
        return {**self.inner.describe_state(), "codecs": codecs}

    # -- several copies ------------------------------------------------------------------------------------------------

    def outdone(self, scope: Scope, key: bytes, other: Tier) -> bool:
        """Whether another tier that keeps blocks encoded has a copy that lost less, as far as is known. No I/O."""
        form = self._form(scope)
        if form is None or not form.lossy or not isinstance(other, Ladder):
            return False
        block = BlockId(scope, key)
        stored, theirs = self.inner.size(block), other.inner.size(block)
        return stored is not None and theirs is not None and self.steps.outdone(block, form, stored, theirs)

    async def take_over(self, block: BlockId, other: Tier) -> bool:
        """Replace a block by the better copy of another tier, byte for byte, if there is room; whether it was."""
        return isinstance(other, Ladder) and await self.steps.take_over(block, other.inner)

    # -- out -----------------------------------------------------------------------------------------------------------

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """The payload of a block as it was stored. What does not decode to that is a miss, and is dropped.

        Damage counts as such; a block whose chain or profile is not known here is `undecodable`.
        """
        form = self._form(block.scope)
        while True:
            stored = self.inner.size(block)
            if stored is None or form is None or form.is_raw(stored):
                return await self.inner.get(block, into)
            if form.is_by_engine(stored):
                outcome = await self.inner.get(block, into)
                return await self._looked_at(block, form, outcome, into) if isinstance(outcome, Hit) else outcome
            if sum(view.nbytes for view in into) != form.whole:
                return Miss(MissReason.LOST)
            buffer = pages(stored)
            outcome = await self.inner.get(block, [buffer])
            if isinstance(outcome, Hit):
                return await self._decoded(block, form, outcome, buffer, into)
            if outcome.reason != MissReason.LOST or self.inner.size(block) in (None, stored):
                return outcome  # else it stepped down under the read: once more

    async def _looked_at(self, block: BlockId, form: Form, outcome: Hit, into: Sequence[memoryview]) -> LoadOutcome:
        """A block that goes back as its engine encoded it, if its header still says so and its profile allows it."""
        data = into[0] if len(into) == 1 else memoryview(b"".join(into))
        try:
            found = self._encoding.given(form, outcome.header, data, whole=False)
        except (CodecError, CorruptBlock, ConfigError, ImportError) as error:
            return await self._unreadable(block, error)
        self._standing.seen(block, found.name)
        return outcome

    async def _decoded(
        self, block: BlockId, form: Form, outcome: Hit, buffer: memoryview, into: Sequence[memoryview]
    ) -> LoadOutcome:
        try:
            name = await self._work(self._encoding.decode, form, outcome.header, buffer, into)
        except (CodecError, CorruptBlock, ConfigError, ImportError) as error:
            return await self._unreadable(block, error)
        self._standing.seen(block, name)
        return Hit(outcome.header, form.whole)

    async def _unreadable(self, block: BlockId, error: Exception) -> Miss:
        """Count and drop a block that is damaged, or that needs what is not here: a profile, a codec, torch."""
        known = not isinstance(error, CannotDecode | ConfigError | ImportError)
        self.counters.corrupt += known
        self.undecodable += not known
        await self.inner.drop(block)
        return Miss(MissReason.CORRUPT)

    # -- in ------------------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """Store a block, encoded if it is whole and becomes smaller by it."""
        form = self._form(block.scope)
        encoded = None
        if form is not None and not self.inner.contains(block.scope, block.key):
            if form.is_raw(nbytes):
                encoded = await self._encoded(form, header, payload, nbytes, durable)
            elif form.is_by_engine(nbytes):
                encoded = await self._given(form, header, payload)
            if encoded is None and not form.is_raw(nbytes):  # it could not be told from an encoded one
                self.counters.drop(DropReason.UNDECODABLE)
                return Dropped(DropReason.UNDECODABLE)
        size = nbytes if encoded is None else encoded.data.nbytes
        views = payload if encoded is None else [encoded.data]
        lower = form is not None and encoded is not None and not durable and encoded.rung + 1 < self._rungs(form)
        async with self.steps.room_for(size, may_step=lower):
            outcome = await self.inner.put(block, header, views, size, durable=durable)
            if form is not None and encoded is not None and isinstance(outcome, Stored):
                self._noted(block, encoded, form, may_step=not durable)
        if durable:
            self._standing.stay(block)
        return outcome

    def _noted(self, block: BlockId, encoded: Encoded, form: Form, *, may_step: bool) -> None:
        """Count how a block was stored, and remember it in a tier that tells when it leaves."""
        if not encoded.name:  # raw, as a better copy may be
            self._standing.forget(block)
            return
        counts = self.passed.setdefault(encoded.name, Counter())
        counts.update(blocks=1, logical_bytes=form.whole, stored_bytes=encoded.data.nbytes)
        if self.inner.order is not None and self.inner.size(block) == encoded.data.nbytes:
            rung = encoded.rung if may_step and encoded.rung + 1 < self._rungs(form) else None
            self._standing.set(block, encoded.name, encoded.data.nbytes, form.whole, rung)

    async def _given(self, form: Form, header: BlockHeader, payload: Sequence[memoryview]) -> Encoded | None:
        """A block that the engine encoded, each part checked; None if it is not to be kept."""
        data = payload[0] if len(payload) == 1 else memoryview(b"".join(payload))
        try:
            return await self._work(partial(self._encoding.given, form, header, data, whole=True))
        except (CodecError, CorruptBlock, ConfigError):
            return None

    async def _encoded(
        self, form: Form, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, durable: bool
    ) -> Encoded | None:
        """A new block, encoded; None if it is to stay raw, as does what a chain does not take."""
        try:
            if form.lossy and not durable and nbytes == form.whole:
                self.unweighed += self._encoding.passes_over(form, header)
            first = self._encoding.first(form, header, nbytes, durable=durable)
            if first is None:
                return None
            rung, chain = first
            return await self._work(self._encoding.encode, form, header, payload, chain, rung)
        except (CodecError, ConfigError):
            return None

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


def _as_it_is(form: Form, nbytes: int) -> bool:
    """Whether a payload of so many bytes is handed out as it lies: nothing encoded it, or the engine did."""
    return form.is_raw(nbytes) or form.is_by_engine(nbytes)


def _one_core() -> None:
    """Have torch compute in the codec thread alone: the other cores are the engine's."""
    import torch

    torch.set_num_threads(1)
