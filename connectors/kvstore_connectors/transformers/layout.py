"""How the KV of a block lies in memory: here and in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [batch, kv_head, token, dim]: the order transformers computes in."""


@dataclass(frozen=True)
class Layout:
    """Shape of one stored block: [layer][K|V][token][kv_head][dim] in the model's own type, keys after RoPE.

    Attributes
    ----------
    layers, kv_heads, head_dim, block_tokens : int
    dtype : torch.dtype
    """

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    NAME = "lkthd1"

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.layers * 2 * self.block_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize

    def view(self, raw: Bytes | torch.Tensor) -> torch.Tensor:
        """The bytes of a block as a tensor [layer, 2, token, kv_head, dim], without copying.

        Parameters
        ----------
        raw : ndarray or Tensor, uint8, [nbytes]
        """
        shape = (self.layers, 2, self.block_tokens, self.kv_heads, self.head_dim)
        flat = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(raw)
        return flat.view(self.dtype).view(shape)

    def empty(self, batch: int, tokens: int, device: torch.device) -> list[LayerKV]:
        """Memory for the KV of a prompt, one (K, V) for each layer, each [batch, kv_head, tokens, dim]."""
        shape = (batch, self.kv_heads, tokens, self.head_dim)
        return [
            (torch.empty(shape, dtype=self.dtype, device=device), torch.empty(shape, dtype=self.dtype, device=device))
            for _ in range(self.layers)
        ]

    def read(self, raw: Bytes | torch.Tensor, kv: Sequence[LayerKV], row: int, block: int) -> None:
        """Copy a stored block into the KV of a prompt.

        Parameters
        ----------
        raw : ndarray or Tensor, uint8, [nbytes]
        kv : sequence of (Tensor, Tensor), each [batch, kv_head, tokens, dim]
        row : int
            Which prompt of the batch.
        block : int
            Which block of it.
        """
        # To a GPU the block goes in one piece; on the CPU this is the mapped memory itself, copied once, below.
        source = self.view(raw).to(kv[0][0].device)
        begin, end = block * self.block_tokens, (block + 1) * self.block_tokens
        for layer, pair in enumerate(kv):
            for which, target in enumerate(pair):
                target[row, :, begin:end].copy_(source[layer, which].transpose(0, 1))

    def write(self, kv: Sequence[LayerKV], row: int, block: int, raw: Bytes) -> None:
        """Copy a block of a prompt's KV into memory of the store; the mirror of `read`."""
        target = self.view(raw)
        begin, end = block * self.block_tokens, (block + 1) * self.block_tokens
        for layer, pair in enumerate(kv):
            for which, source in enumerate(pair):
                target[layer, which].copy_(source[row, :, begin:end].transpose(0, 1))

    def mismatch(self, kv: Sequence[LayerKV], batch: int, tokens: int) -> str:
        """Why some KV can not be cut into blocks of this layout, in words; empty if it can."""
        wanted = (batch, self.kv_heads, tokens, self.head_dim)
        if len(kv) != self.layers:
            return f"the cache has {len(kv)} layers, the model's configuration {self.layers}"
        for index, pair in enumerate(kv):
            for tensor in pair:
                if tensor.shape != wanted:
                    return f"layer {index} holds KV of shape {list(tensor.shape)}, not {list(wanted)}"
                if tensor.dtype != self.dtype:
                    return f"layer {index} holds KV of type {tensor.dtype}, the model is of type {self.dtype}"
        return ""
