"""CacheBlend (EuroSys'25): recompute the tokens whose KV deviates most from the cached KV, chosen at an early layer.

All rows pass the layers before the first check, so that their KV there is exact. At each check the rows that deviate
most go on; later checks narrow further, so that the mean over the layers behind the first check is the share asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kvstore_connectors.blend.prompt import LayerKV, top
from kvstore_connectors.blend.work import Work
from kvstore_gpu.deviation import deviation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """Squared distance between fresh and cached rows, summed over heads and dimensions in float32.

    Parameters
    ----------
    of : {"values", "keys"}
        CacheBlend's code takes values, LMCache's takes keys.
    checks : tuple of (float, float)
        Depths, as shares of all layers but never before layer 1, and what multiple of the count goes on from there;
        falling multiples are the paper's gradual filtering.
    """

    of: Literal["values", "keys"] = "values"
    checks: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    @property
    def name(self) -> str:
        kind = "v-deviation" if self.of == "values" else "k-deviation"
        return kind if len(self.checks) == 1 else f"{kind}-gradual"

    def repair(self, work: Work, count: int) -> Iterator[int]:
        keep = {max(1, int(d * work.model.layers)): int(count * multiple + 0.5) for d, multiple in self.checks}
        must = ~work.prompt.repairable

        def narrow(layer: int, rows: Tensor, fresh: LayerKV, cached: LayerKV) -> Tensor | None:
            if layer not in keep:
                return None
            new, old = (fresh.values, cached.values) if self.of == "values" else (fresh.keys, cached.keys)
            moved = work.model.total(deviation(new.contiguous(), old.to(new.dtype).contiguous()), "sum")
            kept = must[rows]
            kept[top(moved.masked_fill(kept, -torch.inf), keep[layer])] = True
            return kept

        yield from work.steps(work.all_rows(), narrow=narrow)
