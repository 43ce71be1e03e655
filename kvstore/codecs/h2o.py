"""h2o: which tokens stay when a budget of tokens is given ("Heavy-Hitter Oracle", arXiv 2306.14048).

A selection, not a step of a chain: what it drops is gone, and with it every fact nobody has asked about yet, so it
serves a context that one user goes on with, never blocks that others may reuse. Two additions that field reports ask
for: the first tokens always stay, and the newest ones have a time of grace, since nobody could attend to them yet.
Kept tokens keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore.errors import CannotEncode


@dataclass(frozen=True, slots=True)
class H2O:
    """Keep the heaviest tokens.

    Attributes
    ----------
    budget : int
        Tokens to keep, sinks and recent ones included.
    recent : int
        Newest tokens that stay; H2O's own rule is half of the budget.
    sinks : int
        First tokens that stay.
    """

    budget: int
    recent: int = 32
    sinks: int = 4

    def __post_init__(self) -> None:
        if not (self.budget >= 1 and self.recent >= 0 and self.sinks >= 0):
            raise CannotEncode(f"a budget is at least 1, recent and sinks at least 0, not {self}.")
        if self.recent + self.sinks > self.budget:
            raise CannotEncode(
                f"{self.recent} recent tokens and {self.sinks} sinks do not fit a budget of {self.budget}."
            )

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices of the kept tokens, rising, ``[…, min(budget, tokens)]``.

        Parameters
        ----------
        scores : torch.Tensor
            ``[…, token]``: importance, as `kvstore.codecs.importance` makes it. Among equals the earlier token stays.
        """
        tokens = scores.shape[-1]
        if tokens <= self.budget:
            return torch.arange(tokens, device=scores.device).expand(scores.shape)
        weight = scores.double().clone()
        weight[..., : self.sinks] = float("inf")
        if self.recent:
            weight[..., -self.recent :] = float("inf")
        order = weight.argsort(stable=True, dim=-1, descending=True)
        return order[..., : self.budget].sort(-1).values
