"""Blending in vLLM's worker: load chunks, move them, compute some tokens again, write the result into the cache.

Everything that fails here ends as blocks that were not loaded: vLLM then computes the prompt, exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore.client import Room, Verdict, chunk_keys, chunk_parts, report_blend
from kvstore.errors import InternalError
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import ChunkInfo, Miss, Namespace, Stored
from kvstore_connectors.base import Link, Tally, report_defect
from kvstore_connectors.blend.prompt import Capture, LayerKV, Prompt, Span
from kvstore_connectors.blend.rope import move
from kvstore_connectors.blend.selectors.planner import planner, selector_named
from kvstore_connectors.blend.work import Selector, Work
from kvstore_connectors.vllm.blend_jobs import BlendJob, BlendSpan, CaptureJob
from kvstore_connectors.vllm.blend_rows import Rows
from kvstore_connectors.vllm.identity import request_namespace
from kvstore_connectors.vllm.jobs import LoadJob
from kvstore_connectors.vllm.transfers import TTL_S, contiguous, fill_room

if TYPE_CHECKING:
    from kvstore.rope import Rotary
    from kvstore_connectors.vllm.blend_gate import Gate
    from kvstore_connectors.vllm.blend_model import EngineModel

MAX_BYTES = 4 << 30
"""Memory that one prompt's KV may take while it is blended; longer prompts are computed."""

HEADERS_AT_ONCE = 24
BLOCKS_AT_ONCE = 16
"""Blocks leased in one call: with their headers, and for their bytes."""


@dataclass(frozen=True)
class Description:
    """A chunk of a prompt: the span it fills, and what its header says."""

    span: BlendSpan
    key: bytes
    info: ChunkInfo


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
    rotation : Rotary, optional
        The model's, together with it.
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
        rotation: Rotary | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._rows = rows
        self._namespace = namespace
        self._tally = tally
        self._deadline_s = load_deadline_s
        self._model = model
        self._rotation = rotation
        self._gate = gate
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
            missing = self._load_exact(job, load) if job.sound else missing
            gathered = None if missing else self._gather(link, job)
        except Exception:  # the other ranks wait to hear of it
            report_defect("gathering chunks")
        model = self._model
        # All ranks begin the pass or none: its sums over ranks wait for each other.
        if model is None or not model.agree(gathered is not None) or gathered is None:
            self._tally.add("blend_failures")
            self._tally.add("recomputed_tokens", len(job.tokens) // 4 - job.begin)
            return set(missing or job.table[job.exact // self._rows.engine_block :])
        with torch.inference_mode():
            computed = self._repair(model, job, *gathered)
        self._tally.add("blend_seconds", time.monotonic() - begun)
        self.report(link, prompts=1, tokens=len(job.tokens) // 4 - job.exact, computed=computed)
        return set()

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
        failed = load(LoadJob(job.request, job.scope, job.hashes, job.skip, wanted, job.exact - job.begin, False))
        first = next((place for place, one in enumerate(job.table) if one in failed), None)
        return [] if first is None else job.table[first:]

    def _gather(self, link: Link, job: BlendJob) -> tuple[Prompt, list[LayerKV]] | None:
        """The prompt and its KV as far as it is cached: the engine's own exact part, and the chunks, moved."""
        count = len(job.tokens) // 4
        if count * self._token_bytes > MAX_BYTES:
            self._tally.add("blend_too_long")
            return None
        rows = self._rows
        shape = (count, *rows.shape)
        # Zeros and not whatever was there: attention masks what is missing, but zero times NaN is NaN.
        cache = [
            LayerKV(*(torch.zeros(shape, dtype=rows.dtype, device=rows.device) for _ in range(2)))
            for _ in range(rows.layers)
        ]
        for layer, held in enumerate(cache if job.exact else ()):
            held.keys[: job.exact], held.values[: job.exact] = rows.read(layer, job.table, 0, job.exact)
        spans = link.run("blend", partial(self._load_chunks, job=job, cache=cache))
        if spans is None:
            return None
        ids = torch.from_numpy(np.frombuffer(job.tokens, dtype="<i4").astype(np.int64)).to(rows.device)
        return Prompt(ids, tuple(spans), exact=job.exact), cache

    def _repair(self, model: EngineModel, job: BlendJob, prompt: Prompt, cache: list[LayerKV]) -> int:
        """Compute the tokens that need it and write the prompt into the engine's cache; how many were computed."""
        work = Work(model, prompt, cache)
        for _ in work.repair(selector_for(job.selector, prompt), job.share):
            pass
        for layer, held in enumerate(cache):
            self._rows.write(layer, job.table, job.exact, held.keys[job.exact :], held.values[job.exact :])
        computed = int(work.changed.sum())
        self._tally.add("blended_tokens", len(prompt.ids) - job.exact)
        self._tally.add("blend_computed_tokens", computed)
        self._tally.add("blend_reused_tokens", len(prompt.ids) - job.exact - computed)
        return computed

    # -- chunks --------------------------------------------------------------------------------------------------------

    def _load_chunks(self, client: Any, job: BlendJob, cache: list[LayerKV]) -> list[Span] | None:
        """Copy all chunks of a prompt into its cache; None if one of them can not be had as it should be."""
        namespace = request_namespace(self._namespace, job.scope)
        deadline = time.monotonic() + self._deadline_s
        described = self._describe(client, job, namespace)
        if described is None:
            return None
        pieces: list[tuple[bytes, Description, int]] = []
        for one in described:
            keys = chunk_keys(one.key, one.info)
            pieces += [(key, one, place * namespace.block_tokens) for place, key in enumerate(keys)]
        for at in range(0, len(pieces), BLOCKS_AT_ONCE):
            some = pieces[at : at + BLOCKS_AT_ONCE]
            wait_s = max(deadline - time.monotonic(), 0.0)
            with client.lease([key for key, _, _ in some], namespace=namespace, ttl_s=TTL_S, wait_s=wait_s) as lease:
                for block, (_, one, first) in zip(lease.blocks, some, strict=True):
                    if isinstance(block, Miss) or not self._place(contiguous(block), one, first, cache):
                        self._tally.add("blend_chunk_missing")
                        return None
                if not lease.valid():
                    self._tally.add("load_expired")
                    return None
        return [self._span(one, cache[0].keys.device) for one in described]

    def _describe(self, client: Any, job: BlendJob, namespace: Namespace) -> list[Description] | None:
        """The chunks' headers; None if one is gone, or is not of the tokens that stand in the prompt."""
        digest = namespace_digest(namespace)
        out: list[Description] = []
        for at in range(0, len(job.spans), HEADERS_AT_ONCE):
            some = job.spans[at : at + HEADERS_AT_ONCE]
            keys = [span.keys[digest] for span in some]
            wait_s = self._deadline_s
            with client.lease(keys, namespace=namespace, ttl_s=TTL_S, wait_s=wait_s, headers=True) as lease:
                for block, span, key in zip(lease.blocks, some, keys, strict=True):
                    info = None if isinstance(block, Miss) or block.header is None else block.header.chunk
                    if info is None:
                        self._tally.add("blend_chunk_missing")
                        return None
                    stored = info.tokens[4 * span.offset : 4 * (span.offset + span.stop - span.start)]
                    if stored != job.tokens[4 * span.start : 4 * span.stop]:
                        self._tally.add("blend_wrong_tokens")
                        return None
                    out.append(Description(span, key, info))
        return out

    def _place(self, payload: np.ndarray, one: Description, first: int, cache: list[LayerKV]) -> bool:
        """Copy a block, whose first token is the chunk's `first`, to where its tokens stand, keys moved there."""
        span, info, rows = one.span, one.info, self._rows
        count = min(len(info.tokens) // 4 - first, self._namespace.block_tokens)
        if len(payload) != count * self._token_bytes:
            return False
        a, b = max(span.offset, first), min(span.offset + span.stop - span.start, first + count)
        if a >= b:
            return True
        stored = torch.from_numpy(payload).view(rows.dtype).view(rows.layers, 2, count, *rows.shape)
        stored = stored[:, :, a - first : b - first].to(rows.device)
        to = span.start - span.offset + a
        new = torch.arange(to, to + b - a, device=rows.device)
        old = torch.arange(info.position + a, info.position + b, device=rows.device)
        moved = self._move(stored[:, 0], old, new)
        for layer, held in enumerate(cache):
            held.keys[to : to + b - a] = moved[layer]
            held.values[to : to + b - a] = stored[layer, 1]
        return True

    def _move(self, keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Keys ``[layer, token, head, dim]`` moved; where all layers have RoPE in one go, as if they were heads."""
        rotation = self._rotation
        if rotation is None:
            raise InternalError("a chunk was to be placed without the model's rotation.")
        if rotation.skipped_layers:
            return torch.stack([move(rotation, layer, one, old, new) for layer, one in enumerate(keys)])
        layers, tokens, heads, dim = keys.shape
        flat = keys.transpose(0, 1).reshape(tokens, layers * heads, dim)
        return move(rotation, 0, flat, old, new).view(tokens, layers, heads, dim).transpose(0, 1)

    @staticmethod
    def _span(one: Description, device: torch.device) -> Span:
        span, info = one.span, one.info
        external = None
        if info.external:
            part = np.frombuffer(info.external, dtype="<f2")[span.offset : span.offset + span.stop - span.start]
            external = torch.from_numpy(part.astype(np.float32)).to(device)
        kind = Capture.EXACT if span.exact else Capture(info.capture)
        return Span(span.start, span.stop, kind, external)

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


def selector_for(name: str, prompt: Prompt) -> Selector:
    """The strategy of that name; ``auto`` goes by how the prompt's chunks were captured.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name != "auto":
        return selector_named(name)
    if any(span.capture is Capture.LIVE and span.external is None for span in prompt.spans):
        return selector_named("question")  # vLLM shows no attention, so of what it captured no mass is known
    return planner(prompt)
