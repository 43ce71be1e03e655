"""ProphetKV: recompute the tokens that the question looks at, seen by letting it read the unrepaired cache once."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kvstore_connectors.blend.attention import scores
from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Question(Choice):
    """Attention of the question's tokens, summed over layers.

    The reading costs the question's tokens once more; it is part of the work's cost.

    Parameters
    ----------
    by : {"mean", "peak"}
        The mean over heads and tokens, as published; or the highest head's highest token less that head's mean. A sink
        is looked at by all tokens alike and so has no peak.
    """

    name: str = "question"
    by: Literal["mean", "peak"] = "mean"

    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        prompt, model = work.prompt, work.model
        seen = torch.zeros(model.layers, len(prompt.ids), device=prompt.ids.device)
        asked = int(prompt.question[0])

        def watch(layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
            asking = rows >= asked
            table = scores(queries[asking], keys[: len(prompt.ids)], rows[asking], model.scale).softmax(-1)
            if self.by == "mean":
                seen[layer] = table.sum((0, 1))
            else:
                seen[layer] = (table.amax(1) - table.mean(1)).amax(0)

        yield from work.steps(prompt.missing, watch=watch)
        return model.total(seen, "sum" if self.by == "mean" else "max").sum(0)
