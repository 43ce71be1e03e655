"""Which tokens matter: importance of each key from queries, keys and the log-sum-exp of attention, a window at a time.

Attention weights are never kept: with the log-sum-exp that every attention kernel has at hand, the weight of a key is
``exp(q k / sqrt(dim) - lse)``, so sums over queries are made in windows of a few hundred queries. Under grouped-query
attention the weights of the query heads of a group are averaged, after the softmax.

Sources, all ``[kv_head, token]``, float32:

- `attention_sum`: H2O's heavy hitters (arXiv 2306.14048). Early tokens are seen by more queries and win by that alone.
- `attention_mean`: the same over the number of queries that could see the key.
- `window`: SnapKV (2404.14469), the last queries only.
- `expected_attention`: from the mean and covariance of queries, for queries to come (2510.00636).
- `even_shares`: attention as a multiple of what an even spread would give: what is stored with blocks (`pack`).
- `reconstruction`: the largest weight over the queries of a repeated context, after KVzip (2505.23416); the only one
  here that does not depend on what the prompt happened to ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from kvstore.errors import CannotEncode
from kvstore.rope import Rotary
from kvstore.types import BlockHeader

QUERIES = 256
WEIGHTS = 1 << 25
"""Queries of a window, and weights of all heads in it, at most: what bounds the memory."""
_LARGEST = 65504.0


def log_sum_exp(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logarithm of the softmax denominator of each query, where no attention kernel exports it.

    Parameters
    ----------
    queries : torch.Tensor
        ``[query, head, dim]``, after RoPE.
    keys : torch.Tensor
        ``[token, kv_head, dim]``, after RoPE.
    positions : torch.Tensor
        ``[query]``: index of each query among the keys; it sees keys up to its own.

    Returns
    -------
    torch.Tensor
        ``[head, query]``, float32.
    """
    size = _window(queries, keys)
    found = [
        _logits(queries[at : at + size], keys, positions[at : at + size]).logsumexp(-1).flatten(0, 1)
        for at in range(0, len(queries), size)
    ]
    return torch.cat(found, 1)


def _window(queries: torch.Tensor, keys: torch.Tensor) -> int:
    return max(1, min(QUERIES, WEIGHTS // (queries.shape[1] * max(len(keys), 1))))


def _logits(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[kv_head, heads of its group, query, token]``, minus infinity where a query does not see the key."""
    count, heads, dim = queries.shape
    groups = keys.shape[1]
    grouped = queries.float().view(count, groups, heads // groups, dim).permute(1, 2, 0, 3)
    found = grouped @ keys.float().permute(1, 2, 0)[:, None] / math.sqrt(dim)
    hidden = torch.arange(len(keys), device=keys.device) > positions.to(keys.device)[:, None]
    return found.masked_fill(hidden, float("-inf"))


def _over_queries(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Join the weights ``[kv_head, head of its group, query, token]`` of all windows into ``[kv_head, token]``."""
    groups = keys.shape[1]
    found = torch.zeros(groups, len(keys), device=keys.device)
    size = _window(queries, keys)
    for at in range(0, len(queries), size):
        logits = _logits(queries[at : at + size], keys, positions[at : at + size])
        weights = (logits - lse[:, at : at + size].view(groups, -1, logits.shape[2], 1)).exp()
        found = join(found, weights)
    return found


def attention_sum(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Attention that each key got from all queries, ``[kv_head, token]``; a head's total is the number of queries."""
    return _over_queries(queries, keys, lse, positions, lambda found, weights: found + weights.sum(2).mean(1))


def attention_mean(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Attention that each key got from each query that could see it, ``[kv_head, token]``."""
    sees = (positions.to(keys.device)[:, None] >= torch.arange(len(keys), device=keys.device)).sum(0)
    return attention_sum(queries, keys, lse, positions) / sees.clamp(min=1)


def even_shares(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Sum over the queries of how many times an even share of its attention each gave a key, ``[kv_head, token]``.

    A query at position p spreads its attention over p + 1 keys; a weight times p + 1 is 1 where it prefers none. So
    queries far on in a long context count as much as early ones, and blocks of different contexts compare.
    """
    return _softmax_sums(queries, keys, positions, positions + 1)


def attention_total(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`attention_sum` where no log-sum-exp is at hand: in one pass instead of two."""
    return _softmax_sums(queries, keys, positions, torch.ones_like(positions))


def _softmax_sums(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Sum over queries of their weights times a factor each, mean over a group's heads, ``[kv_head, token]``."""
    found, size = torch.zeros(keys.shape[1], len(keys), device=keys.device), _window(queries, keys)
    for at in range(0, len(queries), size):
        weights = _logits(queries[at : at + size], keys, positions[at : at + size]).softmax(-1)
        heads = weights.shape[1]
        found += (factors[at : at + size].to(weights) / heads).repeat(heads) @ weights.flatten(1, 2)
    return found


def window(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, positions: torch.Tensor, last: int = 32
) -> torch.Tensor:
    """Attention that each key got from the last queries, ``[kv_head, token]``."""
    return attention_sum(queries[-last:], keys, lse[:, -last:], positions[-last:]) / min(last, len(queries))


def reconstruction(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Largest weight that any query and any head of the group gave each key, ``[kv_head, token]``.

    The queries are those of a prompt that has the model repeat the context, behind it.
    """
    return _over_queries(
        queries, keys, lse, positions, lambda found, weights: torch.maximum(found, weights.amax((1, 2)))
    )


def expected_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotary: Rotary, ahead: int = 512
) -> torch.Tensor:
    """Attention to expect from the next queries, times the norm of what it would add, ``[kv_head, token]``.

    Queries before RoPE are taken as normal; turned to the mean of the next positions, their mean and covariance give
    the expectation of ``exp(q k)`` in closed form.

    Parameters
    ----------
    queries : torch.Tensor
        ``[query, head, dim]``, before RoPE; of sinks better none.
    keys, values : torch.Tensor
        ``[token, kv_head, dim]``, keys after RoPE.
    rotary : Rotary
        The model's rotation.
    ahead : int
        How many positions to look ahead.
    """
    count, groups, dim = keys.shape
    rows = queries.float()
    mean = rows.mean(0)
    centred = rows - mean
    covariance = torch.einsum("nhi,nhj->hij", centred, centred) / len(rows)
    turn = _mean_turn(rotary, count, ahead, dim).to(keys.device)
    mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
    heads = mean.shape[0]
    key = keys.float().permute(1, 0, 2).repeat_interleave(heads // groups, 0)
    score = torch.einsum("hd,hnd->hn", mean, key) / math.sqrt(dim)
    score = score + torch.einsum("hni,hij,hnj->hn", key, covariance, key) / (2 * dim)
    weight = score.softmax(-1).view(groups, -1, count).mean(1)
    return weight * values.float().norm(dim=-1).T


def _mean_turn(rotary: Rotary, start: int, ahead: int, dim: int) -> torch.Tensor:
    """Mean of the rotations of the next positions, ``[dim, dim]``."""
    table = rotary.table(torch.arange(start, start + ahead))
    unit = torch.eye(dim)[None].expand(ahead, dim, dim)
    return rotary.turn(unit, table).mean(0).T


def pack(weights: torch.Tensor) -> bytes:
    """Weights of a block's tokens, at least 0, as its header carries them: float16, little-endian."""
    return weights.detach().cpu().float().clamp(0, _LARGEST).numpy().astype("<f2").tobytes()


def unpack(data: bytes, tokens: int) -> torch.Tensor | None:
    """Weights out of a block's header, float32 ``[token]``; None if they were not measured.

    Raises
    ------
    CannotEncode
        They are not one finite number, at least 0, for each token.
    """
    if not data:
        return None
    if len(data) != 2 * tokens:
        raise CannotEncode(f"the header has {len(data)} bytes of importance for {tokens} tokens.")
    found = np.frombuffer(data, "<f2").astype(np.float32)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise CannotEncode("the importance in the header is not finite, or negative.")
    return torch.from_numpy(found)


def known(header: BlockHeader | None, tokens: int) -> torch.Tensor | None:
    """`unpack` of a block's header; None also if it says nothing that can be used."""
    try:
        return None if header is None else unpack(header.importance, tokens)
    except CannotEncode:
        return None
