"""EPIC (ICML'25): recompute the first tokens of each chunk, sinks only because they stood first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvstore_connectors.blend.prompt import Capture, top
from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Initial:
    """As many first tokens of every chunk as the share allows."""

    name: str = "initial"

    def repair(self, work: Work, count: int) -> Iterator[int]:
        ids = work.prompt.ids
        depth = torch.full((len(ids),), -torch.inf, device=ids.device)
        for span in work.prompt.spans:
            if span.capture is not Capture.EXACT:
                depth[span.start : span.stop] = -torch.arange(span.stop - span.start, device=ids.device).float()
        yield from work.steps(work.with_missing(top(depth, count)))
