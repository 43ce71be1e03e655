"""A stored prompt, read in place in the daemon's memory, a few tokens at a time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from kvstore.client import LeasedBlock
from kvstore.codecs import importance
from kvstore.errors import LeaseExpired
from kvstore.keys import prefix_keys
from kvstore.types import Namespace
from kvstore_connectors.transformers.cache import KVStoreCache
from kvstore_connectors.transformers.support import token_rows

TTL_S = 30.0
RENEW_S = 8.0
"""A lease this old is followed by a new one: the daemon may grant less than was asked for."""


class LeasedPrompt:
    """The KV of the longest stored beginning of a prompt, as a context manager that gives the right back.

    Nothing is copied until it is asked for. What was read counts only if the lease is found valid afterwards.

    Parameters
    ----------
    keeper : KVStoreCache
        The connector of the model, which stored the prompt.
    input_ids : Tensor, ndarray or sequence of int
        One prompt.

    Attributes
    ----------
    tokens : int
        Tokens that are there; 0 if nothing is stored, or the daemon is not to be had or on another host.
    importance : torch.Tensor or None
        ``[token]``: attention that each got, as a multiple of an even share; None if a block was stored without.
    """

    def __init__(self, keeper: KVStoreCache, input_ids: Any) -> None:
        self._keeper = keeper
        self._layout = keeper.layout
        namespace = keeper.namespace_now()
        (row,) = token_rows(input_ids)
        self._namespace: Namespace | None = namespace
        self._keys = [] if namespace is None else prefix_keys(namespace, row)
        self._lease: Any = None
        self._views: list[torch.Tensor] = []
        self._began = 0.0
        self.importance: torch.Tensor | None = None
        self._take()
        self._keys = self._keys[: len(self._views)]
        self.tokens = len(self._views) * self._layout.block_tokens

    def _take(self) -> None:
        """Lease the blocks (again), and let the lease before go."""
        if not self._keys:
            return
        before = self._lease
        self._began = time.monotonic()
        lease = self._keeper.link.run(
            "lease", lambda client: client.lease(self._keys, namespace=self._namespace, ttl_s=TTL_S, headers=True)
        )
        views: list[torch.Tensor] = []
        weights: list[torch.Tensor | None] = []
        for block in () if lease is None else lease.blocks:
            array = block.array if isinstance(block, LeasedBlock) else None
            if array is None or block.nbytes != self._layout.nbytes:
                break
            views.append(self._layout.view(array))
            weights.append(importance.known(block.header, self._layout.block_tokens))
        if before is not None and len(views) < len(self._keys):
            raise LeaseExpired("blocks of the prompt are not in the daemon's memory any more.")
        self._lease, self._views = lease, views
        measured = [one for one in weights if one is not None]
        self.importance = torch.cat(measured) if views and len(measured) == len(views) else None
        if before is not None:
            before.release()

    def rows(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Values ``[kv_head, n, dim]`` of tokens ``[kv_head, n]``.

        Raises
        ------
        LeaseExpired
            The blocks are not there any more: go on with full attention, or prefill again.
        """
        self._renew()
        size = self._layout.block_tokens
        wanted = rows.cpu()
        out = torch.empty(*wanted.shape, self._layout.head_dim, dtype=self._layout.dtype)
        blocks = wanted.div(size, rounding_mode="floor")
        for block in np.unique(blocks.numpy()).tolist():
            heads, places = (blocks == block).nonzero(as_tuple=True)
            out[heads, places] = self._views[block][layer, 1][wanted[heads, places] - block * size, heads]
        self._check()
        return out.to(rows.device)

    def tokens_of(self, chosen: torch.Tensor) -> torch.Tensor:
        """KV ``[layer, K|V, n, kv_head, dim]`` of tokens ``[n]``, rising. Raises `LeaseExpired` as `rows` does."""
        self._renew()
        size = self._layout.block_tokens
        parts = [
            view[:, :, chosen[(chosen >= at) & (chosen < at + size)] - at]
            for view, at in zip(self._views, range(0, self.tokens, size), strict=True)
        ]
        found = torch.cat(parts, 2)
        self._check()
        return found

    def _renew(self) -> None:
        if time.monotonic() > self._began + RENEW_S:
            self._take()

    def _check(self) -> None:
        if self._lease is None or not self._lease.valid():
            raise LeaseExpired("the lease of the prompt's blocks has expired, or the connection is gone.")

    def close(self) -> None:
        """Give the right back. May be called twice."""
        if self._lease is not None:
            self._lease.release()

    def __enter__(self) -> LeasedPrompt:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
