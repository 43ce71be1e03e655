"""lowrank: keys of one context as a product of two thin matrices, values quantized (ShadowKV, arXiv 2410.21465).

For a long context that stays: the factors are the context's own, so nothing of it can be read without them; for blocks
that are reused one by one, ``pca`` has the model's. Keys must come from ``prerope``: after RoPE they are not low-rank.

Plane 0 of a unit of one layer: sinks in the block's dtype ``[K|V][sink][channel]``; left factor ``[token][rank]``, then
right factor ``[rank][channel]``, both bfloat16, of the keys that are no sinks; values as `kvstore.codecs.kv4` has them:
lows, scales ``[token][kv_head]`` float16, bit planes.

For attention that reads a part only, `landmarks` and `outliers` make ShadowKV's index of the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from kvstore.codecs import hadamard, quant
from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context
from kvstore.codecs.kv4 import unrotated
from kvstore.codecs.raw import as_bytes, finite, from_bytes
from kvstore.errors import CannotEncode, CorruptBlock


@dataclass(frozen=True)
class LowRank(BlockCoder):
    """Truncated singular value decomposition of keys.

    Attributes
    ----------
    rank : int
        Rank, in percent of the channels of a layer (ShadowKV: 160 of 1,024).
    v : int
        Bits of values, 2 to 8.
    sinks : int
        First tokens of a prompt that are kept as they are.
    """

    rank: int = 16
    v: int = 8
    sinks: int = 4
    name: ClassVar[str] = "lowrank"
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (1 <= self.rank <= 100 and 2 <= self.v <= 8 and 0 <= self.sinks <= 64):
            raise CannotEncode(f"lowrank takes a rank of 1 to 100 percent, 2 to 8 bits, 0 to 64 sinks, not {self}.")

    def span(self, spec: BlockSpec, context: Context) -> int:
        del spec, context
        return 1

    def _fields(self, spec: BlockSpec) -> tuple[int, int, int, int]:
        """Sinks, other tokens, rank, bytes of a bit plane of values."""
        sinks = min(max(self.sinks - spec.position, 0), spec.tokens)
        rows = spec.tokens - sinks
        rank = min(-(-spec.channels * self.rank // 100), rows)
        return sinks, rows, rank, quant.plane_nbytes(rows * spec.channels)

    def _sizes(self, spec: BlockSpec) -> tuple[int, ...]:
        sinks, rows, rank, plane = self._fields(spec)
        numbers = 2 * rows * spec.kv_heads
        kept = 2 * sinks * spec.channels * spec.torch_dtype.itemsize
        return (kept, 2 * rows * rank, 2 * rank * spec.channels, numbers, numbers, *[plane] * self.v)

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        del layer, context
        return (sum(self._sizes(spec)),)

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        del layer, context
        sinks, rows, rank, _ = self._fields(spec)
        fields = np.split(out[0], np.cumsum(self._sizes(spec))[:-1])
        fields[0][:] = as_bytes(unit[:, :, :sinks].to(spec.torch_dtype).contiguous())
        if not rows:
            return
        left, right = factors(unit[0, 0, sinks:].reshape(rows, -1), rank)
        codes, low, scale = quant.quantize(hadamard.rotate(unit[0, 1, sinks:].contiguous()), self.v, -1)
        for field, part in zip(fields[1:5], (left, right, low, scale), strict=True):
            field[:] = as_bytes(part.contiguous())
        quant.pack(codes.reshape(-1).numpy(), self.v, fields[5:])

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        del layer, context
        sinks, rows, rank, _ = self._fields(spec)
        kept, left, right, low, scale, *bits = np.split(planes[0], np.cumsum(self._sizes(spec))[:-1])
        first, a, b = (
            from_bytes(part, dtype)
            for part, dtype in ((kept, spec.torch_dtype), (left, torch.bfloat16), (right, torch.bfloat16))
        )
        if not all(finite(part) for part in (first, a, b)):
            raise CorruptBlock("a factor or a kept value is not finite.")
        out[0, :, :sinks] = first.view(2, sinks, *spec.shape[3:])
        if not rows:
            return
        keys = a.view(rows, rank).float() @ b.view(rank, spec.channels).float()
        if not finite(keys):
            raise CorruptBlock("the factors are out of bounds.")
        out[0, 0, sinks:] = keys.view(rows, *spec.shape[3:])
        codes = torch.from_numpy(quant.unpack(bits, rows * spec.channels)).view(rows, *spec.shape[3:])
        shape = (rows, spec.kv_heads, 1)
        lows, scales = quant.numbers(low, np.float16), quant.numbers(scale, np.float16, positive=True)
        unrotated(codes, lows.view(shape), scales.view(shape), self.v, self.v, out[0, 1, sinks:])


def factors(keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors ``[token, rank]`` and ``[rank, channel]`` of keys ``[token, channel]``, in bfloat16.

    By the eigenvectors of the Gram matrix in float64: as exact as a decomposition of the keys and many times faster
    when there are more tokens than channels.

    Raises
    ------
    CannotEncode
        The keys are too large, or not finite.
    """
    rows = keys.double()
    try:
        _, vectors = torch.linalg.eigh(rows.T @ rows)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise CannotEncode(f"keys cannot be decomposed: {error}") from None
    right = vectors.flip(1)[:, :rank].T
    return (rows @ right.T).to(torch.bfloat16), right.to(torch.bfloat16)


def landmarks(keys: torch.Tensor, chunk: int = 8) -> torch.Tensor:
    """Mean key of each whole chunk of tokens: ``[token, kv_head, dim]`` after RoPE to ``[chunk, kv_head, dim]``."""
    whole = len(keys) // chunk * chunk
    return keys[:whole].float().view(-1, chunk, *keys.shape[1:]).mean(1)


def outliers(keys: torch.Tensor, marks: torch.Tensor, count: int, chunk: int = 8) -> torch.Tensor:
    """Chunks that their landmark stands for worst, by least cosine: indices ``[kv_head, count]``, rising."""
    rows = keys[: len(marks) * chunk].float().view(len(marks), chunk, *keys.shape[1:])
    worst = F.cosine_similarity(rows, marks[:, None], dim=-1).amin(1)
    return worst.argsort(stable=True, dim=0)[:count].T.sort(-1).values


def select(queries: torch.Tensor, marks: torch.Tensor, dropped: torch.Tensor, count: int) -> torch.Tensor:
    """Chunks to read for a query, ``[kv_head, count]``: the largest softmax over landmarks, of any head of the group.

    Parameters
    ----------
    queries : torch.Tensor
        ``[head, dim]``, after RoPE.
    marks : torch.Tensor
        ``[chunk, kv_head, dim]``.
    dropped : torch.Tensor
        ``[kv_head, n]``: chunks that are read anyway (outliers) and compete for nothing.
    count : int
        Chunks to choose.
    """
    groups, dim = marks.shape[1:]
    logits = torch.einsum("gqd,cgd->gqc", queries.float().view(groups, -1, dim), marks) / dim**0.5
    logits.scatter_(-1, dropped[:, None].expand(-1, logits.shape[1], -1), float("-inf"))
    found = logits.softmax(-1).amax(1)
    return found.topk(min(count, found.shape[-1]), -1).indices.sort(-1).values
