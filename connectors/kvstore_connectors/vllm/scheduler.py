"""The connector's side in vLLM's scheduler: what is promised to the engine, and what is to be stored.

Nothing here waits for the daemon for longer than a fraction of a millisecond.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kvstore.types import Namespace, TierCode
from kvstore_connectors.base import Tally, report_defect
from kvstore_connectors.choice import Choice
from kvstore_connectors.vllm.answers import FIRST_WAIT_S, Answers
from kvstore_connectors.vllm.blend_jobs import BlendJob
from kvstore_connectors.vllm.blend_scheduler import Blends
from kvstore_connectors.vllm.decisions import Decisions
from kvstore_connectors.vllm.identity import request_scope
from kvstore_connectors.vllm.jobs import ConnectorMeta, LoadJob, Report
from kvstore_connectors.vllm.lookups import Lookups
from kvstore_connectors.vllm.saves import Saves
from kvstore_connectors.vllm.tracked import Tracked

IDLE_WAIT_S = 0.001
"""Pause of a step that has nothing but unanswered lookups; without it the engine's loop would spin."""


class SchedulerSide:
    """Decides what is loaded and stored.

    Parameters
    ----------
    lookups : Lookups
    tally : Tally
    engine_block : int
        Tokens in an engine block, each of which has a hash.
    block_tokens : int
        Tokens in a kvstore block.
    decisions : Decisions
        Whether loading pays.
    async_load, may_load, may_save : bool
    blends : Blends, optional
        For requests that reuse or store chunks.
    """

    def __init__(
        self,
        lookups: Lookups,
        tally: Tally,
        engine_block: int,
        block_tokens: int,
        decisions: Decisions,
        *,
        async_load: bool = True,
        may_load: bool = True,
        may_save: bool = True,
        blends: Blends | None = None,
    ) -> None:
        self._lookups = lookups
        self._answers = Answers(lookups, tally, engine_block, block_tokens, may_load)
        self._blends = blends
        self._tally = tally
        self._decisions = decisions
        self._engine_block = engine_block
        self._block_tokens = block_tokens
        self._ratio = block_tokens // engine_block
        self._async = async_load
        self._may_load = may_load
        self._may_save = may_save
        self._requests: dict[str, Tracked] = {}
        self._saves = Saves(self._requests, engine_block, block_tokens, blends)
        self._promised: dict[str, tuple[int, int]] = {}
        """First token and number of tokens of loads that were promised in this step."""
        self._epoch = ""
        self._step = 0
        self._unconfirmed: dict[int, int] = {}
        """Steps with synchronous loads, and how many ranks have not said how they went."""

    def know_ranks(self, namespaces: Sequence[Namespace], block_bytes: int) -> None:
        """The workers' namespaces, one for each rank, and the bytes of a block on one of them.

        Before they are known nothing is looked up.
        """
        self._answers.ranks = list(namespaces)
        if self._blends is not None:
            self._blends.know_ranks(self._answers.ranks)
        self._decisions.block_bytes = block_bytes * len(set(namespaces))  # ranks that hold replicas share blocks

    # -- what can be loaded --------------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """A request is new: look its blocks up before anybody asks."""
        tracked = self._track(request)
        if self._blends is not None and self._may_load:
            self._blends.arrived(request, tracked.scope)
        if tracked.query is None and self._answers.wanted(tracked):
            self._answers.ask(tracked)

    def matched(self, request: Any, n_local: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond the `n_local` that the engine has, and whether that runs beside the batch.

        (None, False) means: ask again.
        """
        tracked = self._track(request)
        tracked.n_local, tracked.sources, tracked.choice = n_local, [], None
        waited = self._await_search(request.request_id)
        tiers = self._answers.of(tracked) if self._answers.wanted(tracked) else []
        if tiers is None or not waited:
            return None, False
        first = n_local // self._block_tokens
        blended = self._blend(tracked, first + _leading(tiers, first))
        if blended:
            return blended, False
        found = _leading(tiers, first)
        if found == 0 or n_local >= request.num_tokens - 1:
            return 0, False
        choice = self._decide(tracked, tiers[first : first + found])
        # One token is left to compute: its result is the next token.
        end = min((first + choice.blocks) * self._block_tokens, request.num_tokens - 1)
        count = end - n_local
        if choice.blocks == 0 or count <= 0:
            return 0, False
        tracked.sources = tracked.matched[: choice.blocks]
        return count, self._async

    def _await_search(self, name: str) -> bool:
        """Whether nothing is to be waited for that concerns chunks; waits a moment for it."""
        search = None if self._blends is None else self._blends.waits(name)
        return self._blends is None or search is None or self._blends.wait(search, FIRST_WAIT_S)

    def _blend(self, tracked: Tracked, exact_blocks: int) -> int:
        """Tokens that can be blended behind those that the engine has, given how many blocks can be had exactly."""
        if self._blends is None or tracked.given_up or getattr(tracked.request, "skip_reading_prefix_cache", False):
            return 0
        return self._blends.promise(tracked.request, tracked.n_local, exact_blocks * self._block_tokens)

    def _decide(self, tracked: Tracked, matched: list[TierCode]) -> Choice:
        """How many of the matched blocks are worth loading."""
        query = tracked.query
        speeds = {} if query is None else query.speeds
        choice = self._decisions.choose(matched, speeds, tracked.n_local, tracked.request.num_tokens)
        tracked.choice, tracked.matched = choice, matched
        probe = self._decisions.wants_probe(choice, matched, speeds)
        if probe is not None and query is not None:
            self._lookups.bring_up(query, tracked.n_local // self._block_tokens + probe)
        return choice

    # -- what was promised ---------------------------------------------------------------------------------------------

    def allocated(self, request: Any, engine_ids: list[int], n_external: int) -> None:
        """The engine took a promise up (`n_external` > 0) and allocated blocks for it."""
        tracked = self._track(request)
        tracked.engine_ids = list(engine_ids)
        if n_external > 0:
            self._promised[request.request_id] = (tracked.n_local, n_external)
        if self._blends is not None:
            self._blends.allocated(request.request_id, n_external)
        self._take(request.request_id, tracked, n_external)

    def _take(self, name: str, tracked: Tracked, n_external: int) -> None:
        """Note that the engine goes by the last choice; what it computes though it is there need not be stored."""
        choice, tracked.choice, tracked.taken = tracked.choice, None, None
        if choice is None or (n_external == 0) != (choice.blocks == 0):
            return
        self._decisions.taken(name, choice, tracked.matched, loading=n_external > 0 and self._async)
        tracked.taken = choice
        first = tracked.n_local // self._block_tokens
        for index in range(first + choice.blocks, first + choice.matched):
            tracked.present |= 1 << index

    def sources(self, request: Any, n_external: int) -> dict[TierCode, int]:
        """How many of the promised tokens come from which tier; they add up to `n_external`."""
        tracked = self._track(request)
        out: dict[TierCode, int] = {}
        place = tracked.n_local
        end = place + n_external
        for index, tier in enumerate(tracked.sources, start=place // self._block_tokens):
            stop = min((index + 1) * self._block_tokens, end)
            if stop > place:
                out[tier] = out.get(tier, 0) + stop - place
                place = stop
        return out

    def _blend_job(self, blends: Blends, name: str, tracked: Tracked, start: int, output: Any) -> BlendJob:
        tracked.loading = tracked.engine_ids[start // self._engine_block :]
        hashes = [] if tracked.query is None else tracked.query.hashes
        try:
            job = blends.job(name, start, tracked.engine_ids, hashes, self._computed_now(name, output))
            if job is not None:
                return job
        except Exception:  # the promise was made: it has to end as a failed load, not as silence
            report_defect("planning a blend")
        return BlendJob(name, tracked.scope, b"", [], 0, start, start, tracked.engine_ids, [], 0.0, "", sound=False)

    def _computed_now(self, name: str, output: Any) -> set[int]:
        """Engine blocks that other requests compute in this step."""
        ids: set[int] = set()
        for other, count in output.num_scheduled_tokens.items():
            tracked = self._requests.get(other)
            if tracked is not None and other != name:
                begin = tracked.request.num_computed_tokens
                ids.update(tracked.engine_ids[begin // self._engine_block : (begin + count) // self._engine_block + 1])
        return ids

    def _load_job(self, name: str, tracked: Tracked, start: int, count: int) -> LoadJob:
        first, last = start // self._engine_block, -(-(start + count) // self._engine_block)
        tracked.loading = tracked.engine_ids[first:last]
        block = start // self._block_tokens
        position = block * self._block_tokens
        job = LoadJob(name, tracked.scope, [], 0, tracked.loading, count, self._async, position)
        if tracked.taken is not None:
            job.deadline_s, job.saves_s = tracked.taken.deadline_s, tracked.taken.saves_s
            job.ranks = len(set(self._answers.ranks))  # those that hold replicas share blocks
        try:
            end = -(-(start + count) // self._block_tokens)
            hashes = tracked.request.block_hashes
            job.skip = first - block * self._ratio
            job.hashes = [bytes(hashes[(i + 1) * self._ratio - 1]) for i in range(block, end)]
            for tier, tokens in self.sources(tracked.request, count).items():
                self._tally.add(f"hit_tokens_{tier.name.lower()}", tokens)
            for i in range(block, end):
                tracked.present |= 1 << i
        except Exception:  # the promise was made: it has to end as a failed load, not as silence
            job.hashes = []
            report_defect("planning a load")
        return job

    # -- each step -----------------------------------------------------------------------------------------------------

    def plan(self, output: Any) -> ConnectorMeta:
        """The workers' part in a step: loads that were promised, blocks that become full."""
        self._step += 1
        meta = ConnectorMeta(step=self._step, idle=not output.total_num_scheduled_tokens)
        promised, self._promised = self._promised, {}
        for name, (start, count) in promised.items():
            tracked = self._requests[name]
            if self._blends is not None and self._blends.blending(name) is not None:
                meta.blends.append(self._blend_job(self._blends, name, tracked, start, output))
            else:
                meta.loads.append(self._load_job(name, tracked, start, count))
        if meta.blends or (meta.loads and not self._async):
            self._unconfirmed[self._step] = len(self._answers.ranks)
        try:
            meta.fresh = [*self._saves.follow(output), *self._filled(meta)]
            if self._may_save:
                self._saves.plan(meta, output, hold=bool(self._unconfirmed))
        except Exception:  # the loads have to reach the workers whatever happens here
            meta.saves = []
            self._saves.look_at_all()
            report_defect("planning saves")
        if meta.idle:
            self._decisions.idle(self._step)
        if meta.idle and not meta.loads:
            self._rest()
        meta.timed = self._time(meta, output)
        return meta

    def _filled(self, meta: ConnectorMeta) -> list[int]:
        """Engine blocks that the step's loads fill."""
        loaded = [one for job in meta.loads for one in job.engine_ids]
        return loaded + [one for job in meta.blends for one in job.table[job.begin // self._engine_block :]]

    def _time(self, meta: ConnectorMeta, output: Any) -> bool:
        """Begin to time a step; whether the workers shall say when it has ended."""
        try:
            spans, scheduled = {}, output.num_scheduled_tokens
            one_each = output.total_num_scheduled_tokens == len(scheduled)
            if one_each and not meta.blends and self._decisions.waiting.isdisjoint(scheduled.keys()):
                return False  # and nobody's first one
            for name, count in scheduled.items():
                tracked = self._requests.get(name)
                if tracked is not None:
                    request = tracked.request
                    spans[name] = (request.num_computed_tokens, count, request.num_tokens)
            whole = len(spans) == len(scheduled)
            undisturbed = whole and (self._async or not meta.loads)
            blend = None
            if self._blends is not None and undisturbed and len(meta.blends) == 1:
                blend = self._blends.blending(meta.blends[0].request)
            return self._decisions.planned(self._step, spans, undisturbed and not meta.blends, blend)
        except Exception:  # the plan has to reach the workers
            report_defect("timing a step")
            return False

    def ended(self, report: Report | None, loaded: Sequence[str]) -> None:
        """A step's output is back; some loads beside the batch have ended."""
        self._decisions.loads_ended(loaded)
        report = report or Report()
        self._decisions.output(report.timed, report.blended)

    def _rest(self) -> None:
        """Nothing to compute: wait a moment for a lookup instead of spinning."""
        open_queries = [t.query for t in self._requests.values() if t.query is not None and not t.query.finished]
        search = None if self._blends is None else self._blends.any_open()
        if open_queries:
            self._lookups.wait_any(open_queries, IDLE_WAIT_S)
        elif self._blends is not None and search is not None:
            self._blends.wait(search, IDLE_WAIT_S)

    def failed(self, engine_ids: set[int]) -> set[int]:
        """Blocks were reported as not loaded: their requests compute for themselves, and store again.

        Returns
        -------
        set of int
            Engine blocks whose content is wrong until it has been computed again, and that other requests could find
            under their hash already: those of synchronous loads, and all that was computed on top of them.
        """
        spoiled: set[int] = set()
        self._saves.look_at_all()
        for name, tracked in self._requests.items():
            if tracked.loading and not engine_ids.isdisjoint(tracked.loading):
                filled = next(i for i, one in enumerate(tracked.loading) if one in engine_ids)
                self._decisions.load_failed(name, filled // self._ratio)
                tracked.given_up = True
                tracked.present = 0
                tracked.loading = []
            blended = self._blends is not None and self._blends.blending(name) is not None
            if not self._async or blended:
                first = next((place for place, one in enumerate(tracked.engine_ids) if one in engine_ids), None)
                spoiled.update(tracked.engine_ids[first:] if first is not None else ())
            if self._blends is not None and tracked.given_up:
                if blended:
                    self._decisions.blend_failed()
                self._blends.give_up(name)
        return spoiled

    def confirmed(self, report: Report) -> None:
        """Workers have been through the synchronous loads of some steps; failures among them are known by now."""
        for step, ranks in report.steps.items():
            left = self._unconfirmed.get(step, 0) - ranks
            if left > 0:
                self._unconfirmed[step] = left
            else:
                self._unconfirmed.pop(step, None)

    def reset(self) -> None:
        """The engine's caches were reset, perhaps since its weights changed: share nothing with what was before."""
        self._epoch = os.urandom(16).hex()
        if self._blends is not None:
            self._blends.reset()
        for tracked in self._requests.values():
            tracked.scope = tracked.scope._replace(epoch=self._epoch)
            tracked.query, tracked.private = None, True

    def finished(self, request: Any) -> None:
        """A request has ended."""
        self._requests.pop(request.request_id, None)
        self._decisions.forget(request.request_id)
        if self._blends is not None:
            self._blends.forget(request.request_id)

    def _track(self, request: Any) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = Tracked(request, request_scope(request, self._epoch))
            self._requests[request.request_id] = tracked
        return tracked


def _leading(tiers: Sequence[TierCode], first: int) -> int:
    """Blocks present from `first` on without a gap."""
    count = 0
    for tier in tiers[first:]:
        if tier == TierCode.ABSENT:
            break
        count += 1
    return count
