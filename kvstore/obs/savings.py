"""How much computing the store has saved, said carefully: at least so many seconds.

The daemon does not compute, but it sees what engines had to: the blocks they offer. The fastest rate at which blocks of
a namespace ever came, over ten seconds, stands for how fast its engine computes. It may compute faster than it was ever
asked to, and then the true saving is smaller than any estimate could tell; but it can hardly compute slower.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvstore.types import Scope

WINDOW_S = 10
MAX_SCOPES = 1024


class Saved(NamedTuple):
    """Tokens served instead of computed, and seconds that computing them would have taken; None if never seen."""

    tokens: float
    seconds: float | None


class _Pace:
    """The fastest that a namespace was computed."""

    __slots__ = ("best", "now", "recent")

    def __init__(self) -> None:
        self.now = 0
        self.recent: deque[int] = deque([0] * WINDOW_S, maxlen=WINDOW_S)
        self.best = 0.0


class Savings:
    """Watches how fast engines compute, and says what was saved."""

    def __init__(self) -> None:
        self._paces: dict[Scope, _Pace] = {}

    def computed(self, scope: Scope, tokens: int) -> None:
        """Note that an engine offered a block of so many tokens."""
        pace = self._paces.get(scope)
        if pace is None:
            if len(self._paces) >= MAX_SCOPES:
                return
            pace = self._paces[scope] = _Pace()
        pace.now += tokens

    def tick(self) -> None:
        """Once a second: let the window go on."""
        for pace in self._paces.values():
            pace.recent.append(pace.now)
            pace.now = 0
            pace.best = max(pace.best, sum(pace.recent) / WINDOW_S)

    def pace(self, scope: Scope) -> float | None:
        """Tokens a second at which a namespace was computed at best; None if nothing was seen."""
        pace = self._paces.get(scope)
        return pace.best if pace is not None and pace.best > 0 else None

    def saved(self, scope: Scope, tokens: float) -> Saved:
        """What handing out so many tokens of a namespace has saved."""
        pace = self.pace(scope)
        return Saved(tokens, None if pace is None else tokens / pace)
