"""What is to be stored: blocks that become full in a step and are not known to be there.

Most steps add one token to each of many requests and fill no block. So a request is looked at when it is new, when it
computes more than one token, and in the step in which its next block is full if it computes one a step: `_due`.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from kvstore_connectors.vllm.blend_scheduler import Blends
from kvstore_connectors.vllm.jobs import ConnectorMeta, SaveBlock, SaveJob
from kvstore_connectors.vllm.tracked import Tracked


class Saves:
    """Follows requests and their block tables.

    Parameters
    ----------
    requests : mapping of str to Tracked
        The requests that the engine has, as the scheduler's side keeps them.
    engine_block, block_tokens : int
        Tokens in a block of the engine and of kvstore.
    blends : Blends, optional
        For requests that store chunks, or part of whose KV is approximate.
    """

    def __init__(
        self, requests: Mapping[str, Tracked], engine_block: int, block_tokens: int, blends: Blends | None
    ) -> None:
        self._requests = requests
        self._block_tokens = block_tokens
        self._engine_block = engine_block
        self._ratio = block_tokens // engine_block
        self._blends = blends
        self._due: defaultdict[int, list[str]] = defaultdict(list)
        """By step: requests that may have something to store then."""
        self._look_at_all = False

    def look_at_all(self) -> None:
        """Some requests compute again what they had computed: in the next step all are looked at."""
        self._look_at_all = True

    def follow(self, output: Any) -> list[int]:
        """Keep the block tables of all requests as this step leaves them.

        Returns
        -------
        list of int
            Engine blocks that the step is the first to write: on a device, KV of an ended request may still be on its
            way out of them.
        """
        fresh: list[int] = []
        for new in output.scheduled_new_reqs:
            fresh += new.block_ids[0][new.num_computed_tokens // self._engine_block :]
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                tracked.engine_ids = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        for name, new_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new_ids is None:
                continue
            fresh += new_ids[0]
            tracked = self._requests.get(name)
            if tracked is None:
                continue
            if name in resumed:
                tracked.engine_ids = list(new_ids[0])
            else:
                tracked.engine_ids.extend(new_ids[0])
        return fresh

    def plan(self, meta: ConnectorMeta, output: Any, *, hold: bool) -> None:
        """Add to a step's plan what is to be stored after it.

        With `hold` nothing is: while a synchronous load is not confirmed by every rank, KV computed on top of it may be
        wrong, on other ranks too and for other requests that share its blocks. It is made up for.
        """
        for name in self._concerned(meta.step, output):
            tracked = self._requests.get(name)
            if tracked is None or tracked.private:
                continue
            count = output.num_scheduled_tokens.get(name)
            if count is None:  # its turn comes later; if it never had one, then as a new request
                if tracked.computed >= 0:
                    self._look_at(name, tracked, meta.step + 1)
                continue
            self._follow_progress(tracked, count)
            if not hold:
                blocks = self._fresh_blocks(name, tracked, output)
                if blocks:
                    meta.saves.append(SaveJob(name, tracked.scope, blocks))
                if self._blends is not None and name in self._blends.capturing:
                    table, hashes = self.table(name, tracked, output), tracked.request.block_hashes
                    meta.captures += self._blends.captures(name, tracked.computed, table, hashes)
            end = (tracked.saved + 1) * self._block_tokens
            if end <= self._exact(name, end):
                self._look_at(name, tracked, meta.step + max(end - tracked.computed, 1))

    def _concerned(self, step: int, output: Any) -> Collection[str]:
        """Requests that may have something to store after this step."""
        scheduled = output.num_scheduled_tokens
        due = [name for name in self._due.pop(step, ()) if name in self._requests and self._requests[name].due == step]
        if self._look_at_all:
            self._look_at_all = False
            return list(self._requests)
        capturing = () if self._blends is None else self._blends.capturing
        names = [*due, *(name for name in capturing if name in scheduled)]
        names += [new.req_id for new in output.scheduled_new_reqs]
        names += getattr(output.scheduled_cached_reqs, "resumed_req_ids", ())
        if output.total_num_scheduled_tokens != len(scheduled):
            names += [name for name, count in scheduled.items() if count > 1]
        return dict.fromkeys(names)

    def _look_at(self, name: str, tracked: Tracked, step: int) -> None:
        if tracked.due != step:
            tracked.due = step
            self._due[step].append(name)

    def _follow_progress(self, tracked: Tracked, count: int) -> None:
        begin = tracked.request.num_computed_tokens
        if tracked.computed < 0:
            tracked.saved = begin // self._block_tokens  # what lies before is the engine's own or was loaded
        elif begin < tracked.computed:  # resumed, or sent back after a failed load
            tracked.saved = min(tracked.saved, begin // self._block_tokens)
        tracked.computed = begin + count

    def _fresh_blocks(self, name: str, tracked: Tracked, output: Any) -> list[SaveBlock]:
        """Blocks that are full after this step and are not known to be stored."""
        computed = self._exact(name, tracked.computed)
        full = min(computed // self._block_tokens, len(tracked.request.block_hashes) // self._ratio)
        if full <= tracked.saved:
            return []
        table = self.table(name, tracked, output)
        blocks = []
        for index in range(tracked.saved, full):
            ids = table[index * self._ratio : (index + 1) * self._ratio]
            if not tracked.present >> index & 1 and len(ids) == self._ratio:
                blocks.append(self._save_block(tracked.request, index, ids))
        tracked.saved = full
        return blocks

    def _exact(self, name: str, tokens: int) -> int:
        """So many of a request's first tokens as are exact; what is behind is approximate: it is nobody else's."""
        exact = None if self._blends is None else self._blends.exact_tokens(name)
        return tokens if exact is None else min(tokens, exact)

    def _save_block(self, request: Any, index: int, ids: list[int]) -> SaveBlock:
        size, hashes = self._block_tokens, request.block_hashes
        tokens = struct.pack(f"<{size}i", *request.all_token_ids[index * size : (index + 1) * size])
        parent = bytes(hashes[index * self._ratio - 1]) if index else b""
        return SaveBlock(bytes(hashes[(index + 1) * self._ratio - 1]), parent, index * size, tokens, list(ids))

    @staticmethod
    def table(name: str, tracked: Tracked, output: Any) -> list[int]:
        """The request's block table: the engine's word where it gives it (0.32), else what was followed."""
        state = getattr(output, "kv_connector_block_state", None)
        if state is not None:
            known = state.get_block_ids(name)
            if known is not None:
                return list(known[0])
        return tracked.engine_ids
