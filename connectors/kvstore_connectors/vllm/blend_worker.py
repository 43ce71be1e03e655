"""Blending in vLLM's worker: load chunks, move them, compute some tokens again, write the result into the cache.

Everything that fails here ends as blocks that were not loaded: vLLM then computes the prompt, exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvstore.client import Room, Verdict, chunk_parts, report_blend
from kvstore.errors import InternalError
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import Namespace, Stored
from kvstore_connectors.base import Link, Tally, log, report_defect
from kvstore_connectors.blend.amount import Controller, chunk_bytes
from kvstore_connectors.blend.prompt import LayerKV, Prompt, brought
from kvstore_connectors.blend.selectors.planner import selector_for
from kvstore_connectors.blend.work import Work
from kvstore_connectors.chunk_loads import ChunkLoad, Wanted, begin_load
from kvstore_connectors.clock import Moment
from kvstore_connectors.vllm.blend_jobs import BlendJob, CaptureJob
from kvstore_connectors.vllm.blend_rows import Rows
from kvstore_connectors.vllm.blend_scheduler import MOST_COMPUTED
from kvstore_connectors.vllm.identity import request_namespace
from kvstore_connectors.vllm.jobs import LoadJob
from kvstore_connectors.vllm.transfers import TTL_S, fill_room

if TYPE_CHECKING:
    from kvstore_connectors.blend.prompt import Cache
    from kvstore_connectors.vllm.blend_gate import Gate
    from kvstore_connectors.vllm.blend_model import EngineModel

MAX_BYTES = 4 << 30
"""Memory that one prompt's KV may take while it is blended; longer prompts are computed."""

KEPT_BYTES = {"cpu": 256 << 20, "cuda": MAX_BYTES}
"""Memory for a prompt's KV, at most, that is kept for the next one; by the kind of memory."""


class _Gathered(NamedTuple):
    """A prompt, its cache, a view of `room` for each layer, and what is on its way into that."""

    prompt: Prompt
    room: torch.Tensor
    cache: list[LayerKV]
    load: ChunkLoad


class _Repaired(NamedTuple):
    """Work that was given to the device, from when to when it takes."""

    work: Work
    begun: Moment
    ended: Moment


def _finished(load: ChunkLoad) -> bool:
    """Whether all came and was right until it was copied; no error, since the other ranks wait to hear of it."""
    try:
        return load.finish()
    except Exception:
        report_defect("ending a load of chunks")
        return False


class Blender:
    """Blends and captures for one rank.

    Parameters
    ----------
    rows : Rows
    namespace : Namespace
        Of this rank.
    tally : Tally
    load_deadline_s : float
        For the chunks to come.
    model : EngineModel, optional
        Without it chunks are captured, but nothing is blended.
    gate : Gate, optional
        Whose verdict the daemon is told, for its dashboard.
    """

    def __init__(
        self,
        rows: Rows,
        namespace: Namespace,
        tally: Tally,
        load_deadline_s: float,
        model: EngineModel | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._rows = rows
        self._namespace = namespace
        self._tally = tally
        self._deadline_s = load_deadline_s
        self._model = model
        self._gate = gate
        self._controller = Controller()
        self._asked = False  # by the last prompt; the same on all ranks
        self._copies = torch.cuda.Stream(rows.device, priority=-1) if rows.device.type == "cuda" else None
        self._ended: list[Callable[[], float]] = []
        self._kept = torch.empty(0, dtype=rows.dtype, device=rows.device)
        self._token_bytes = 2 * rows.layers * rows.shape[0] * rows.shape[1] * rows.dtype.itemsize

    # -- blending ------------------------------------------------------------------------------------------------------

    def blend(self, link: Link, job: BlendJob, load: Callable[[LoadJob], set[int]]) -> set[int]:
        """Fill what was promised; returns the engine blocks that were not filled.

        Parameters
        ----------
        load : callable
            Loads the exact blocks in front.
        """
        begun = time.monotonic()
        missing, gathered = job.table[job.begin // self._rows.engine_block :], None
        try:
            if job.sound:
                gathered = self._gather(link, job)
                missing = self._load_exact(job, load)
        except Exception:  # the other ranks wait to hear of it
            report_defect("gathering chunks")
        repaired = None
        try:
            # All ranks begin the pass or none: its sums over ranks wait for each other. What comes late may still fail.
            ready = None if missing else gathered
            if self._model is not None and self._model.agree(ready is not None) and ready is not None:
                with torch.inference_mode():
                    repaired = self._repair(self._model, job, ready)
        except Exception as error:
            if self._model is not None and self._model.ranks > 1:
                # The others wait for its part of a sum, and would take what it sums next for that: wrong numbers. So it
                # ends, and the engine with it, as when a rank fails in a pass of vLLM's own.
                log.critical(
                    "blending failed on one of several ranks: the engine has to be started again", exc_info=True
                )
                raise SystemExit("kvstore: a rank failed while others waited for it") from error
            raise
        finally:
            sound = gathered is not None and _finished(gathered.load)
        if self._model is not None and gathered is not None and repaired is not None and self._model.agree(sound):
            self._fill(job, gathered.cache)
            self._ended.append(partial(self._count, link, gathered, repaired, begun))
            return set()
        self._tally.add("blend_failures")
        self._tally.add("recomputed_tokens", len(job.tokens) // 4 - job.begin)
        return set(missing or job.table[job.exact // self._rows.engine_block :])

    def settle(self) -> float:
        """Count what was blended; seconds from the beginning of the first blend until the device was through the step.

        It waits for the device: for when the step's other work has been given to it. 0 if nothing was blended.
        """
        ended, self._ended = self._ended, []
        return max([count() for count in ended], default=0.0)

    def _count(self, link: Link, gathered: _Gathered, repaired: _Repaired, begun: float) -> float:
        prompt, _, cache, load = gathered
        tokens, computed = len(prompt.ids) - prompt.exact, int(repaired.work.changed.sum())  # waits for the device
        self._controller.loaded(chunk_bytes(prompt.spans, cache), load.seconds)
        self._controller.repaired(repaired.work.token_layers, repaired.begun.until(repaired.ended) - load.waited())
        seconds = time.monotonic() - begun
        self._tally.add("blend_seconds", seconds)
        self._tally.add("blended_tokens", tokens)
        self._tally.add("blend_computed_tokens", computed)
        self._tally.add("blend_reused_tokens", tokens - computed)
        self.report(link, prompts=1, tokens=tokens, computed=computed)
        return seconds

    def report(self, link: Link, **counts: int) -> None:
        """Tell the daemon what was blended, and by which verdict."""
        found = None if self._gate is None else self._gate.verdict()
        verdict = None if found is None else Verdict(*(getattr(found, name) for name in Verdict.__struct_fields__))
        namespace = self._namespace
        link.run("report", lambda client: report_blend(client, namespace, verdict=verdict, **counts))

    def _load_exact(self, job: BlendJob, load: Callable[[LoadJob], set[int]]) -> list[int]:
        """Load the blocks in front of the first chunk; the engine blocks from the first that could not be had on."""
        if not job.hashes:
            return []
        size = self._rows.engine_block
        wanted = job.table[job.begin // size : job.exact // size]
        tokens, position = job.exact - job.begin, (job.begin // size - job.skip) * size
        failed = load(LoadJob(job.request, job.scope, job.hashes, job.skip, wanted, tokens, False, position))
        first = next((place for place, one in enumerate(job.table) if one in failed), None)
        return [] if first is None else job.table[first:]

    def _gather(self, link: Link, job: BlendJob) -> _Gathered | None:
        """The prompt, and the chunks on their way into its cache."""
        count = len(job.tokens) // 4
        if count * self._token_bytes > MAX_BYTES:
            self._tally.add("blend_too_long")
            return None
        ids = torch.from_numpy(np.frombuffer(job.tokens, dtype="<i4").astype(np.int64))
        try:
            room = self._zeros(self._rows.room(count))
        except torch.OutOfMemoryError:
            self._tally.add("blend_no_memory")
            return None
        cache = [LayerKV(keys, values) for keys, values in room]
        load = link.run("blend", partial(self._begin_load, job=job, cache=cache))
        if load is None:
            return None
        prompt = Prompt(brought(ids, self._rows.device), tuple(load.spans), job.exact)
        return _Gathered(prompt, room, cache, load)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros and not whatever was there: attention masks what is missing, but zero times NaN is NaN.

        Those of the prompt before, if they are enough. To touch new memory of the host takes as long as the loading. On
        a device the engine's passes would cut up what was given back, so that the driver is asked for gigabytes again
        and again, until it has none: then the process gives back all that it keeps, and waits.
        """
        rows, count = self._rows, math.prod(shape)
        if count * rows.dtype.itemsize > KEPT_BYTES[rows.device.type]:
            return torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        if len(self._kept) < count:
            self._kept = self._kept[:0].clone()  # not both at a time
            with torch.inference_mode(False):  # it outlives the mode that it is made in
                self._kept = torch.empty(count, dtype=rows.dtype, device=rows.device)
        return self._kept[:count].view(shape).zero_()

    def _repair(self, model: EngineModel, job: BlendJob, gathered: _Gathered) -> _Repaired:
        """Compute the tokens that need it, each layer when it has come."""
        prompt, room, cache, load = gathered
        share = self._share(model, job, prompt, cache)
        begun = Moment(self._rows.device)
        if job.exact:  # the engine's own part of the prompt
            self._rows.read_front(job.table, job.exact, room)
        work = Work(model, prompt, cache, load.wait, kv_only=True, asked=self._asked, reach=job.reach)
        for _ in work.repair(selector_for(job.selector, prompt), share):
            load.ahead()
        self._asked = work.asked
        return _Repaired(work, begun, Moment(self._rows.device))

    def _fill(self, job: BlendJob, cache: Cache) -> None:
        """Put the prompt into the engine's cache."""
        count = len(job.tokens) // 4
        for layer, held in enumerate(cache):
            self._rows.write(layer, job.table, job.exact, held.keys[job.exact : count], held.values[job.exact : count])

    def _share(self, model: EngineModel, job: BlendJob, prompt: Prompt, cache: list[LayerKV]) -> float:
        """Share of reused tokens to compute again; the same on all ranks, though their clocks differ."""
        if job.amount == "share":
            return job.share
        found = self._controller.share(prompt, cache, job.share, max(job.share, MOST_COMPUTED))
        return float(model.total(torch.tensor([found], device=prompt.ids.device), "max"))

    # -- chunks --------------------------------------------------------------------------------------------------------

    def _begin_load(self, client: Any, job: BlendJob, cache: list[LayerKV]) -> ChunkLoad | None:
        if self._model is None:
            raise InternalError("a chunk was to be placed without the model.")
        namespace = request_namespace(self._namespace, job.scope)
        digest = namespace_digest(namespace)
        wanted = [Wanted(one.start, one.stop, one.offset, one.keys[digest], one.exact) for one in job.spans]
        where = (job.tokens, cache, self._model.rotary, self._deadline_s, self._tally, self._copies)
        return begin_load(client, namespace, wanted, *where)

    # -- capture -------------------------------------------------------------------------------------------------------

    def capture(self, link: Link, job: CaptureJob) -> None:
        """Store a span of the cache as a chunk; returns when it is copied."""
        stored = link.run("save", partial(self._capture, job=job))
        if stored:
            self._tally.add("captured_chunks")
            self._tally.add("captured_tokens", len(job.tokens) // 4 - job.start)

    def _capture(self, client: Any, job: CaptureJob) -> bool:
        namespace = request_namespace(self._namespace, job.scope)
        digest = namespace_digest(namespace)
        ids = np.frombuffer(job.tokens, dtype="<i4")
        parts = chunk_parts(
            namespace,
            ids[job.start :],
            before=ids[: job.start],
            lineage=job.lineage,
            labels=job.labels,
            names={place: derived_key(digest, engine_hash) for place, engine_hash in job.hashes.items()},
        )
        offers = [(part.key, (part.stop - part.start) * self._token_bytes, part.header) for part in parts]
        with client.reserve(offers, namespace=namespace, ttl_s=TTL_S, wait_s=0.0) as reservation:
            filled = []
            for part, room in zip(parts, reservation.blocks, strict=True):
                if isinstance(room, Room):
                    fill_room(room, partial(self._write, job, job.start + part.start, job.start + part.stop))
                    filled.append(room.index)
            outcomes = reservation.commit(filled)
        return bool(filled) and all(isinstance(one, Stored) for one in outcomes)

    def _write(self, job: CaptureJob, start: int, stop: int, into: np.ndarray) -> None:
        rows = self._rows
        target = torch.from_numpy(into).view(rows.dtype).view(rows.layers, 2, stop - start, *rows.shape)
        for layer in range(rows.layers):
            keys, values = rows.read(layer, job.table, start, stop)
            target[layer, 0].copy_(keys)
            target[layer, 1].copy_(values)
