"""ShadowKV decoding: low-rank keys and landmarks here, values in the daemon's memory (arXiv 2410.21465).

Of the prompt's keys two thin factors before RoPE are kept, and one mean key for each chunk of tokens. A step scores
the means, rebuilds the keys of the best chunks at their positions, and fetches the values of just these chunks: from
blocks of the store that are leased, in place, or from memory of its own where nothing is stored. Chunks that their mean
stands for badly are kept as they are, with the newest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvstore.codecs import lowrank
from kvstore.errors import InvalidParams
from kvstore.rope import Rotary, rotary
from kvstore_connectors.transformers.sparse import SparseCache, SparseLayer, attention, nbytes
from kvstore_connectors.transformers.support import base_model
from kvstore_gpu.lowrank import padded, reconstruct


@dataclass(frozen=True, slots=True)
class ShadowKV:
    """What a step may read.

    Attributes
    ----------
    budget : int
        Tokens that a step chooses.
    rank : int
        Rank of the keys, in percent of the channels of a layer (the paper's: 160 of 1,024).
    chunk : int
        Tokens that one landmark stands for.
    outliers : int
        Chunks of each head that are kept as they are.
    tail : int
        Newest tokens of the prompt that are kept as they are, at least.
    """

    budget: int = 256
    rank: int = 16
    chunk: int = 8
    outliers: int = 4
    tail: int = 32

    def __post_init__(self) -> None:
        least = (self.budget, self.chunk, self.tail)
        if min(least) < 1 or self.outliers < 0 or not 1 <= self.rank <= 100 or self.budget < self.chunk:
            raise InvalidParams(f"{self}: sizes are at least 1, the rank at most 100 percent.", "")


class Values(Protocol):
    """Where the values of the first tokens of a prompt are."""

    tokens: int
    """How many it has."""

    def rows(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Values ``[kv_head, n, dim]`` of tokens ``[kv_head, n]``; raises `LeaseExpired` if they are gone."""
        ...


class _Here:
    """Values in memory of this process."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.transpose(0, 1).clone()
        self.tokens = len(values)

    def rows(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """See `Values.rows`."""
        del layer
        return self._values.gather(1, rows[..., None].expand(-1, -1, self._values.shape[2]))


class Angles:
    """Cosines and sines of a prompt's first tokens, which all layers share."""

    def __init__(self, turn: Rotary) -> None:
        self.turn = turn
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, layer: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 ``[token, pair]``; without pairs for a layer without positions."""
        if layer in self.turn.skipped_layers:
            return torch.empty(tokens, 0, device=device), torch.empty(tokens, 0, device=device)
        if self._made is None or len(self._made[0]) != tokens or self._made[0].device != device:
            self._made = self.turn.table(torch.arange(tokens, device=device))
        return self._made


class ShadowLayer(SparseLayer):
    """Keys as factors and landmarks; see `SparseLayer`."""

    def __init__(self, rule: ShadowKV, angles: Angles, layer: int, stored: Values | None) -> None:
        super().__init__()
        self._rule, self._angles, self._layer, self._stored = rule, angles, layer, stored
        self.fetched = 0

    def index(self, queries: torch.Tensor, scale: float) -> None:
        """See `SparseLayer.index`."""
        rule = self._rule
        context = max(self.seen - rule.tail, 0) // rule.chunk * rule.chunk
        if self._stored is not None:
            context = min(context, self._stored.tokens // rule.chunk * rule.chunk)
        keys, values = self.keep_from(context)
        self._context = context
        if not context:
            return
        turn, plain = self._angles.turn, keys.float()
        self._table = self._angles.of(self._layer, context, keys.device)
        if self._layer not in turn.skipped_layers:
            plain = turn.turn(plain, self._table, back=True)
        rank = min(-(-keys[0].numel() * rule.rank // 100), context)
        left, right = lowrank.factors(plain.reshape(context, -1), rank)
        self._left, self._right = padded(left), padded(right.view(rank, *keys.shape[1:]).permute(1, 2, 0))
        self._marks = lowrank.landmarks(keys, rule.chunk).to(keys.dtype)
        self._dropped = lowrank.outliers(keys, self._marks, min(rule.outliers, len(self._marks)), rule.chunk)
        worst = self._tokens(self._dropped)[..., None].expand(-1, -1, keys.shape[2])
        self._kept = keys.transpose(0, 1).gather(1, worst), values.transpose(0, 1).gather(1, worst)
        self._source: Values = _Here(values) if self._stored is None else self._stored

    def _tokens(self, chunks: torch.Tensor) -> torch.Tensor:
        """Tokens ``[kv_head, n * chunk]`` of chunks ``[kv_head, n]``."""
        size = self._rule.chunk
        return (chunks[..., None] * size + torch.arange(size, device=chunks.device)).flatten(1)

    def _keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Rebuilt keys ``[kv_head, n, dim]`` of tokens ``[kv_head, n]``, turned to their positions."""
        return reconstruct(self._left, self._right, rows.int(), *self._table, self.keys.dtype,
                           interleaved=self._angles.turn.interleaved)  # fmt: skip

    def _values(self, rows: torch.Tensor) -> torch.Tensor:
        return self._source.rows(self._layer, rows).to(self.values)

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparseLayer.everything`. Keys of outliers are exact, the others rebuilt."""
        if not self._context:
            return self.keys[:, :, :0], self.values[:, :, :0]
        rows = torch.arange(self._context, device=self.keys.device).expand(self.keys.shape[1], -1)
        keys, worst = self._keys(rows), self._tokens(self._dropped)[..., None]
        keys.scatter_(1, worst.expand(-1, -1, keys.shape[2]), self._kept[0])
        return keys[None], self._values(rows)[None]

    def attend(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """See `SparseLayer.attend`."""
        if not self._context:
            self.touched = self.exact_nbytes
            return attention(query, self.keys[0], self.values[0], scale)
        count = min(self._rule.budget // self._rule.chunk, len(self._marks) - self._dropped.shape[1])
        rows = self._tokens(lowrank.select(query, self._marks.float(), self._dropped, count))
        fetched = self._values(rows)
        keys = torch.cat([self._kept[0], self._keys(rows), self.keys[0]], 1)
        values = torch.cat([self._kept[1], fetched, self.values[0]], 1)
        self.fetched = nbytes(fetched)
        factors = rows.numel() * self._left.shape[1] * self._left.element_size() + nbytes(self._right)
        self.touched = self.exact_nbytes + nbytes(*self._kept, self._marks) + factors + self.fetched
        return attention(query, keys, values, scale)


class ShadowCache(SparseCache):
    """A cache whose steps read landmarks, rebuilt keys and fetched values.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that `KVStoreCache` takes.
    rule : ShadowKV
    stored : Values, optional
        Where the values of the prompt's first tokens are (`leased.LeasedPrompt`); by default they stay here.

    Examples
    --------
    >>> with ShadowCache(model, ShadowKV(budget=256)) as past:               # doctest: +SKIP
    ...     out = model.generate(**inputs, past_key_values=past)
    """

    def __init__(self, model: Any, rule: ShadowKV, stored: Values | None = None) -> None:
        config = base_model(model).config
        angles = Angles(rotary(config.to_dict()))
        count = int(config.num_hidden_layers)
        super().__init__(model, [ShadowLayer(rule, angles, layer, stored) for layer in range(count)])

    @property
    def fetched(self) -> int:
        """Bytes of values that the last step fetched."""
        return sum(layer.fetched for layer in self.layers)
