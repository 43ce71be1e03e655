"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import torch

from kvstore_gpu import checks
from kvstore_gpu.compile import Source, uses_reference
from kvstore_gpu.select import reference

SOURCE = Source("select", ["select_top"])
_THREADS = 1024


def top(
    scores: torch.Tensor,
    wanted: int,
    forced: torch.Tensor | None = None,
    *,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Indices of the highest scores, ascending.

    Parameters
    ----------
    scores : Tensor, float32, [token]
    wanted : int
        How many; at most as many as there are.
    forced : Tensor, bool, [token], optional
        Chosen before all others; if they are more than wanted, the first of them.

    Returns
    -------
    Tensor, int32, [wanted]

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.tensor(scores, "scores", shape=(None,), dtypes=(torch.float32,))
    count = scores.shape[0]
    if not 0 <= wanted <= count or count > 1 << 30:
        raise checks.refuse("wanted", f"{wanted} of {count} scores")
    if forced is not None:
        checks.tensor(forced, "forced", shape=(count,), dtypes=(torch.bool,), device=scores.device)
    if uses_reference(scores.device):
        return reference.top(scores, wanted, forced)
    out = torch.empty(wanted, dtype=torch.int32, device=scores.device)
    if wanted:
        none = forced.view(torch.uint8) if forced is not None else None
        args = (scores, none, count, wanted, out)
        SOURCE.launch("select_top", 1, args, scores.device, threads=_THREADS, stream=stream)
    return out


def heavy_hitters(
    mass: torch.Tensor, seen: torch.Tensor, budget: int, *, sinks: int = 4, recent: int = 32
) -> torch.Tensor:
    """Tokens to keep after H2O (arXiv 2306.14048): the highest mean attention, the first tokens and the last ones.

    The sum of attention favours early tokens, which more queries could see; so it is divided by their number.

    Parameters
    ----------
    mass : Tensor, float32, [kv_head, token]
        Attention that each token got, summed over queries.
    seen : Tensor, float32, [token]
        Queries that could see the token.
    budget : int
        Tokens to keep.
    sinks, recent : int
        First and last tokens that are kept always; they count towards the budget.

    Returns
    -------
    Tensor, int32, [budget]
        Ascending. The same for all heads, so that pages stay whole.
    """
    checks.tensor(mass, "mass", shape=(None, None), dtypes=(torch.float32,))
    count = mass.shape[1]
    checks.tensor(seen, "seen", shape=(count,), dtypes=(torch.float32,), device=mass.device)
    if budget < min(sinks + recent, count):
        raise checks.refuse("budget", f"{budget} tokens do not hold {sinks} first and {recent} last ones")
    forced = torch.zeros(count, dtype=torch.bool, device=mass.device)
    forced[:sinks] = True
    forced[max(count - recent, 0) :] = True
    return top((mass.mean(0) / seen.clamp(min=1)).contiguous(), min(budget, count), forced)
