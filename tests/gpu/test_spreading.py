"""Where words lead: the kernels against torch, on prompts of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore.errors import InvalidParams
from kvstore_gpu.spreading import Spreading, needed, reference

HOWS = (
    Spreading(),
    Spreading(hops=0),
    Spreading(hops=3, ahead=3, back=1, fade=0.7, single=0.9, backward=0.2, seam=50, rest=0.0),
)


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Ids, the chunk of each, and chunks side by side or with gaps, of few or many different words."""
    rng = np.random.default_rng(seed)
    n, chunks = int(rng.integers(30, 1500)), int(rng.integers(1, 9))
    few = int(rng.choice([4, 50, 500, 2**31 - 1]))
    ids = np.minimum(rng.zipf(1.3, n), few) if rng.random() < 0.4 else rng.integers(0, few, n)
    apart = rng.random() < 0.5
    cuts = np.sort(rng.choice(np.arange(n - int(rng.integers(0, 12))), 2 * chunks if apart else chunks + 1, False))
    pairs = cuts.reshape(-1, 2) if apart else np.stack([cuts[:-1], cuts[1:]], 1)
    spans = [(int(start), int(stop)) for start, stop in pairs]
    owner = torch.full((n,), -1)
    for chunk, (start, stop) in enumerate(spans):
        owner[start:stop] = chunk
    return torch.from_numpy(ids.astype(np.int64)), owner, spans


@pytest.mark.parametrize("seed", range(120))
def test_the_same_as_in_torch(seed: int, device: str) -> None:
    ids, owner, spans = drawn(seed)
    how = HOWS[seed % len(HOWS)]
    found = needed(ids.to(device), owner.to(device), spans, how)
    wanted = reference.needed(ids, owner, spans, how)
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-5, atol=0)
    assert torch.equal(found, needed(ids.to(device), owner.to(device), spans, how))


def test_nothing_leads_where_there_is_no_chunk(device: str) -> None:
    found = needed(torch.arange(9, device=device), torch.full((9,), -1, device=device), [])
    assert (found == -torch.inf).all()


@pytest.mark.parametrize("spans", [[(0, 5), (4, 8)], [(3, 3)], [(0, 11)]])
def test_spans_that_make_no_sense_are_refused(spans: list[tuple[int, int]], device: str) -> None:
    ids = torch.arange(10, device=device)
    with pytest.raises(InvalidParams, match="spans"):
        needed(ids, torch.zeros_like(ids), spans)
    with pytest.raises(InvalidParams, match="owner"):
        needed(ids, torch.zeros(9, dtype=torch.int64, device=device), [(0, 9)])
    with pytest.raises(InvalidParams, match="ids"):
        needed(ids.int(), ids, [(0, 9)])
