"""What is to be stored: blocks that become full in a step and are not known to be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

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
        self._ratio = block_tokens // engine_block
        self._blends = blends

    def follow(self, output: Any) -> None:
        """Keep the block tables of all requests as this step leaves them."""
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                tracked.engine_ids = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        for name, new_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            tracked = self._requests.get(name)
            if tracked is None or new_ids is None:
                continue
            if name in resumed:
                tracked.engine_ids = list(new_ids[0])
            else:
                tracked.engine_ids.extend(new_ids[0])

    def plan(self, meta: ConnectorMeta, output: Any, *, hold: bool) -> None:
        """Add to a step's plan what is to be stored after it.

        With `hold` nothing is: while a synchronous load is not confirmed by every rank, KV computed on top of it may be
        wrong, on other ranks too and for other requests that share its blocks. It is made up for.
        """
        for name, count in output.num_scheduled_tokens.items():
            tracked = self._requests.get(name)
            if tracked is None or tracked.private:
                continue
            self._follow_progress(tracked)
            if not hold:
                blocks = self._fresh_blocks(name, tracked, count, output)
                if blocks:
                    meta.saves.append(SaveJob(name, tracked.scope, blocks))
                if self._blends is not None:
                    table, hashes = self.table(name, tracked, output), tracked.request.block_hashes
                    meta.captures += self._blends.captures(name, tracked.computed + count, table, hashes)

    def _follow_progress(self, tracked: Tracked) -> None:
        computed = tracked.request.num_computed_tokens
        if tracked.computed < 0:
            tracked.saved = computed // self._block_tokens  # what lies before is the engine's own or was loaded
        elif computed < tracked.computed:  # resumed, or sent back after a failed load
            tracked.saved = min(tracked.saved, computed // self._block_tokens)
        tracked.computed = computed

    def _fresh_blocks(self, name: str, tracked: Tracked, count: int, output: Any) -> list[SaveBlock]:
        """Blocks that are full after this step and are not known to be stored."""
        full = min((tracked.computed + count) // self._block_tokens, len(tracked.request.block_hashes) // self._ratio)
        exact = None if self._blends is None else self._blends.exact_tokens(name)
        if exact is not None:  # what is behind is approximate: it is nobody else's
            full = min(full, exact // self._block_tokens)
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

    def _save_block(self, request: Any, index: int, ids: list[int]) -> SaveBlock:
        size, hashes = self._block_tokens, request.block_hashes
        tokens = np.array(request.all_token_ids[index * size : (index + 1) * size], dtype="<i4").tobytes()
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
