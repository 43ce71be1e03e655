"""ProphetKV: recompute the tokens that the question looks at, seen by letting it read the unrepaired cache once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.attention import scores
from kvstore_connectors.blend.prompt import top
from kvstore_connectors.blend.work import Work

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Question:
    """Attention of the question's tokens, a mean over layers, heads and tokens.

    The reading costs the question's tokens once more; it is part of the work's cost.
    """

    name: str = "question"

    def repair(self, work: Work, count: int) -> Iterator[int]:
        prompt = work.prompt
        mass = torch.zeros(len(prompt.ids), device=prompt.ids.device)

        def watch(layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
            asking = rows >= int(prompt.question[0])
            table = scores(queries[asking], keys, rows[asking], work.model.scale)
            mass.add_(table.softmax(-1).sum((0, 1)))

        yield from work.steps(prompt.missing, watch=watch)
        seen = work.model.total(mass, "sum").masked_fill(~prompt.repairable, -torch.inf)
        yield from work.steps(work.with_missing(top(seen, count)))
