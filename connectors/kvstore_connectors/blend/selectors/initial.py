"""EPIC (ICML'25): recompute the first tokens of each chunk, sinks only because they stood first."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Initial(Choice):
    """As many first tokens of every chunk as the share allows."""

    name: str = "initial"

    def scores(self, work: Work) -> Generator[int, None, torch.Tensor]:
        yield from ()
        ids = work.prompt.ids
        depth = torch.full((len(ids),), -torch.inf, device=ids.device)
        for span in work.prompt.spans:
            depth[span.start : span.stop] = -torch.arange(span.stop - span.start, device=ids.device).float()
        return depth
