"""Cache-Craft (SIGMOD'25): recompute the tokens that looked most at other chunks when their chunk was captured."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend.prompt import Capture
from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class External(Choice):
    """Highest attention mass on what stood before the chunk when it was captured (w_i).

    Raises
    ------
    ConfigError
        If a chunk was not captured behind others: then nothing is known of its tokens.
    """

    name: str = "external"

    def scores(self, work: Work) -> Generator[int, None, torch.Tensor]:
        yield from ()
        ids = work.prompt.ids
        mass = torch.full((len(ids),), -torch.inf, device=ids.device)
        for span in work.prompt.spans:
            if span.capture is Capture.EXACT:
                continue
            if span.external is None:
                raise ConfigError(
                    f"the chunk at {span.start} was captured without other chunks before it, so has no external mass",
                    "Select by question for such chunks, or let the planner choose.",
                )
            mass[span.start : span.stop] = span.external.to(mass)
        return mass
