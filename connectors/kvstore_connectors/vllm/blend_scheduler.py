"""Blending in vLLM's scheduler: which prompts, from which chunks, and under which names their KV goes.

Blended KV is approximate. So the hashes of a prompt's blocks are replaced from the first blended one on, by hashes that
no exact prompt has: neither vLLM's own prefix cache nor the daemon ever finds such a block for anybody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError, InvalidParams
from kvstore.keys import content_key
from kvstore.types import Namespace
from kvstore_connectors.base import Tally, log
from kvstore_connectors.blend.amount import AMOUNTS
from kvstore_connectors.choice import Blend
from kvstore_connectors.vllm.blend_gate import Gate
from kvstore_connectors.vllm.blend_jobs import BlendJob, BlendSpan, CaptureJob
from kvstore_connectors.vllm.blend_search import MOST_TOKENS, Chunk, Search, Searches
from kvstore_connectors.vllm.blend_wish import Wish, read_wish
from kvstore_connectors.vllm.identity import Scope, request_namespace

LEAST_SPAN = 16
"""Tokens that a chunk must still bring when its front is in an exact prefix already."""

MOST_COMPUTED = 0.65
"""Blending computes outside the engine's own kernels: above this share of tokens the engine is faster."""

LONGEST_TAIL = 512
"""Tokens behind the last chunk that are computed together with the repair; of more the engine computes the rest."""

STALE = 0.5
"""Where the best variant's fix overhead is above this, a prompt that is computed exactly brings a better one."""

NAME = 32
"""Bytes of a block's name in place of its hash."""

_TAINT = b"kvstore/blended/2"


@dataclass(slots=True)
class Plan(Blend):
    """What a prompt's KV is made of: exact up to `exact`, then blended up to `end`, out of these chunks."""

    spans: list[Chunk]


@dataclass(slots=True)
class State:
    """A request that asks for blending or capture.

    Attributes
    ----------
    plan : Plan or None
        As last promised.
    tainted : int or None
        First engine block whose hash is not that of an exact prefix.
    pays : bool or None
        Whether blending was found to pay, which holds however often the engine asks; None before.
    captured : set of (int, int)
        Spans whose capture was begun.
    """

    wish: Wish
    scope: Scope
    tokens: NDArray[np.int32]
    search: Search | None = None
    plan: Plan | None = None
    taken: bool = False
    tainted: int | None = None
    pays: bool | None = None
    captured: set[tuple[int, int]] = field(default_factory=set)


class Blends:
    """Decides which prompts are blended, and which spans are captured.

    Parameters
    ----------
    searches : Searches
    tally : Tally
    engine_block, block_tokens : int
        Tokens in a block of the engine, and of kvstore.
    default : Wish
        For requests that say nothing.
    gate : Gate or None
        Without one nothing is blended.
    pays : callable
        Whether a prompt of so many tokens is sooner blended than computed (`Decisions.blend_pays`).

    Attributes
    ----------
    capturing : set of str
        Requests of which spans may still have to be stored.
    """

    def __init__(
        self,
        searches: Searches,
        tally: Tally,
        engine_block: int,
        block_tokens: int,
        default: Wish,
        gate: Gate | None,
        pays: Callable[[Blend, int], bool],
    ) -> None:
        self._searches = searches
        self._tally = tally
        self._engine_block = engine_block
        self._block_tokens = block_tokens
        self._default = default
        self._gate = gate
        self._pays = pays
        self._ranks: list[Namespace] = []
        self._states: dict[str, State] = {}
        self.capturing: set[str] = set()
        self._warned = False

    def know_ranks(self, namespaces: Sequence[Namespace]) -> None:
        """The workers' namespaces; before they are known nothing is blended."""
        self._ranks = list(namespaces)

    # -- requests ------------------------------------------------------------------------------------------------------

    def arrived(self, request: Any, scope: Scope) -> None:
        """Read a new request's wish and begin its search."""
        if request.request_id in self._states:
            return
        try:
            wish = read_wish(request.kv_transfer_params, self._default)
        except InvalidParams as error:
            self._tally.add("blend_bad_request")
            log.debug("a request is computed without chunks: %s", error)
            return
        prompt = request.prompt_token_ids
        fits = 0 < len(prompt or ()) <= MOST_TOKENS
        if not wish.active or not fits or not self._ranks or not self._plain(request, scope):
            return
        state = State(wish, scope, np.asarray(prompt, dtype="<i4"))
        state.search = self._searches.submit(self._namespaces(scope), state.tokens, wish)
        self._tally.add("blend_searches")
        self._states[request.request_id] = state
        if wish.capture:
            self.capturing.add(request.request_id)

    @staticmethod
    def _plain(request: Any, scope: Scope) -> bool:
        """Only text, and only the base model: the modules that blending runs know nothing else."""
        embeds = getattr(request, "prompt_embeds", None)
        return not scope.lora and not getattr(request, "mm_features", None) and embeds is None

    def _namespaces(self, scope: Scope) -> list[Namespace]:
        return [request_namespace(rank, scope) for rank in self._ranks]

    def waits(self, name: str) -> Search | None:
        """The search that a request waits for, if its answer is still to come and in time."""
        state = self._states.get(name)
        search = None if state is None else state.search
        return None if search is None or search.over else search

    def wait(self, search: Search, timeout_s: float) -> bool:
        """Wait a moment for an answer; whether it is there."""
        return self._searches.wait(search, timeout_s)

    def any_open(self) -> Search | None:
        """A search that somebody waits for."""
        return next((search for name in self._states if (search := self.waits(name)) is not None), None)

    # -- the promise ---------------------------------------------------------------------------------------------------

    def promise(self, request: Any, n_local: int, exact: int) -> int:
        """Tokens beyond `n_local` whose KV can be blended; 0 if that is not asked for, not allowed, or does not pay.

        `exact` tokens in front can be had exactly. The request's hashes are replaced from there on.
        """
        state = self._states.get(request.request_id)
        if state is None or not state.wish.blend or state.search is None or not state.search.finished:
            return 0
        plan = self._plan(state, max(exact, n_local), len(state.tokens) - 1)
        if plan is None or not self._open(state.wish.share):
            return 0
        if state.pays is None:
            state.pays = self._pays(plan, len(state.tokens))
        if not state.pays:
            return 0
        state.plan, state.taken = plan, False
        self._taint(request, state, plan.exact // self._engine_block)
        return plan.end - n_local

    def _plan(self, state: State, exact: int, most: int) -> Plan | None:
        search = state.search
        chunks = (
            [] if search is None else [c for c in search.found if min(c.stop, most) - max(c.start, exact) >= LEAST_SPAN]
        )
        if not chunks:
            return None
        end = min(most, chunks[-1].stop + LONGEST_TAIL)
        covered = sum(min(c.stop, end - 1) - max(c.start, exact) for c in chunks)
        computed = end - exact - covered + state.wish.share * covered
        if computed > MOST_COMPUTED * (end - exact):
            self._tally.add("blend_not_worth")
            return None
        return Plan(exact, end, computed, chunks)

    def _open(self, share: float) -> bool:
        reason = "no `blend_gate` is set"
        if self._gate is not None:
            reason = self._gate.why_closed(self._ranks[0], share)
        if reason:
            self._tally.add("blend_gate_closed")
            if not self._warned:
                self._warned = True
                log.warning("kvstore: prompts are not blended on this model: %s.", reason)
        return not reason

    def _taint(self, request: Any, state: State, first: int) -> None:
        """Give the blocks from `first` on names of their own: of this very prompt, blended in this way."""
        if state.tainted is not None and state.tainted <= first:
            return
        how = f"{state.wish.share!r}/{state.wish.amount}/{state.wish.selector}".encode()
        tag = hashlib.sha256(_TAINT + how + state.tokens.tobytes()).digest()
        hashes = request.block_hashes
        before = b"".join(bytes(one) for one in hashes[max(0, first - 1) :])
        names = hashlib.shake_256(tag + first.to_bytes(8, "little") + before).digest(NAME * (len(hashes) - first))
        for place, index in enumerate(range(first, len(hashes))):
            hashes[index] = type(hashes[index])(names[NAME * place : NAME * (place + 1)])
        state.tainted = first

    def allocated(self, name: str, n_external: int) -> None:
        """The engine took a promise up, or did without."""
        state = self._states.get(name)
        if state is not None and state.plan is not None and not state.taken:
            state.taken = n_external > 0
            state.plan = state.plan if state.taken else None

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def job(self, name: str, begin: int, table: list[int], hashes: Sequence[bytes], busy: set[int]) -> BlendJob | None:
        """The workers' part of a promise that was taken up; None if the promise was another.

        Parameters
        ----------
        begin : int
            Tokens that the engine has.
        table : list of int
        hashes : sequence of bytes
            vLLM's, of the request's blocks, as they were before they were replaced.
        busy : set of int
            Engine blocks that this very step computes: what is in them comes too late for us.
        """
        state = self._states.get(name)
        if state is None or state.plan is None:
            return None
        plan, size, ratio = state.plan, self._block_tokens, self._block_tokens // self._engine_block
        table = table[: -(-plan.end // self._engine_block)]
        first = begin // size
        job = BlendJob(
            request=name,
            scope=state.scope,
            tokens=state.tokens[: plan.end].tobytes(),
            hashes=[bytes(one) for one in hashes[first : plan.exact // size]] if plan.exact > begin else [],
            skip=begin // self._engine_block - first * ratio,
            begin=begin,
            exact=plan.exact,
            table=table,
            spans=[self._span(chunk, plan) for chunk in plan.spans],
            share=state.wish.share,
            selector=state.wish.selector,
            amount=state.wish.amount,
            reach=None if self._gate is None else self._gate.reach,
            sound=busy.isdisjoint(table[: begin // self._engine_block]),
        )
        self._tally.add("blend_prompts")
        return job

    @staticmethod
    def _span(chunk: Chunk, plan: Plan) -> BlendSpan:
        # The last token is computed always, so no span reaches it.
        start, stop = max(chunk.start, plan.exact), min(chunk.stop, plan.end - 1)
        return BlendSpan(start, stop, start - chunk.start, chunk.keys, chunk.overhead == 0.0)

    def blending(self, name: str) -> Blend | None:
        """What a request's last promise blends; None if it blends nothing."""
        state = self._states.get(name)
        return None if state is None else state.plan

    def exact_tokens(self, name: str) -> int | None:
        """Tokens in front of a request whose KV and names are exact; None if all are."""
        state = self._states.get(name)
        return None if state is None or state.tainted is None else state.tainted * self._engine_block

    def captures(self, name: str, computed: int, table: list[int], hashes: Sequence[Any]) -> list[CaptureJob]:
        """Spans that are whole once `computed` tokens are, and are to be stored as chunks."""
        state = self._states.get(name)
        if state is None or not state.wish.capture or state.tainted is not None or state.search is None:
            self.capturing.discard(name)
            return []
        search = state.search
        wanted = [*search.absent, *((c.start, c.stop) for c in search.found if c.overhead > STALE)]
        ready = sorted(span for span in wanted if span[1] <= computed and span not in state.captured)
        state.captured.update(ready)
        if search.finished and state.captured.issuperset(wanted):
            self.capturing.discard(name)
        return [self._capture(name, state, span, table, hashes) for span in ready]

    def _capture(
        self, name: str, state: State, span: tuple[int, int], table: list[int], hashes: Sequence[Any]
    ) -> CaptureJob:
        start, stop = span
        search, size = state.search, self._block_tokens
        known = [] if search is None else [*search.absent, *((c.start, c.stop) for c in search.found)]
        before = sorted(one for one in known if one[1] <= start)
        namespace = request_namespace(self._ranks[0], state.scope)
        named: dict[int, bytes] = {}
        if start % size == 0:
            ratio = size // self._engine_block
            for place in range((stop - start) // size):
                index = (start // size + place + 1) * ratio - 1
                if (place + 1) * size < stop - start and index < len(hashes):
                    named[place] = bytes(hashes[index])
        return CaptureJob(
            request=name,
            scope=state.scope,
            tokens=state.tokens[:stop].tobytes(),
            start=start,
            table=table[: -(-stop // self._engine_block)],
            lineage=[content_key(namespace, state.tokens[a:b]) for a, b in before],
            labels=tuple(state.wish.labels),
            hashes=named,
        )

    def report(self, name: str) -> dict[str, Any] | None:
        """What the client that sent a request is told of it."""
        state = self._states.get(name)
        if state is None or not (state.wish.blend or state.captured):
            return None
        plan = state.plan
        return {
            "blended_tokens": 0 if plan is None else plan.end - plan.exact,
            "chunks": 0 if plan is None else len(plan.spans),
            "captured_spans": len(state.captured),
        }

    def give_up(self, name: str) -> None:
        """A blend failed: the request computes for itself, under its replaced names."""
        state = self._states.get(name)
        if state is not None:
            state.plan, state.search = None, None

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._states.pop(name, None)
        self.capturing.discard(name)

    def reset(self) -> None:
        """The engine's weights may have changed: what was found belongs to others."""
        for name in list(self._states):
            self.give_up(name)

    def close(self) -> None:
        """End the thread."""
        self._searches.close()


def default_wish(
    share: float, selector: str, separator: str, amount: str = "share", *, blend: bool, capture: bool
) -> Wish:
    """The server's defaults out of its settings.

    Raises
    ------
    ConfigError
    """
    try:
        ids = [int(part) for part in separator.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"blend_separator: {separator!r} is not a list of token ids.", "Write '198,198'.") from None
    if not 0 <= share <= 1:
        raise ConfigError(f"blend_share: {share} is not between 0 and 1.", "")
    how = AMOUNTS.get(amount)
    if how is None:
        raise ConfigError(f"blend_amount: {amount!r} is none of {', '.join(AMOUNTS)}.", "")
    return Wish(blend=blend, capture=capture, separator=ids, share=share, selector=selector, amount=how)
