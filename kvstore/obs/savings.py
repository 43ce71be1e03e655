"""How much computing the store has saved: about so many seconds.

The daemon does not compute, but it sees how long engines take: from the question for the first missing block of a
prompt to the offer of the blocks from there on. Waiting in the engine's queue is in that time, so the fastest prompt
ever seen of a namespace stands for how fast its engine computes; or, where blocks are offered that nobody asked for,
the fastest ten seconds. Both are speeds that were reached: the engine is at least as fast, and the saving no larger.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from kvstore.types import BlockId, Scope

WINDOW_S = 10
PROMPT_S = 60.0
"""Longest time that a prompt is believed to have been computed for."""
LEAST_S = 1e-3
MAX_SCOPES = 1024
MAX_ASKED = 4096


class Saved(NamedTuple):
    """Tokens served instead of computed, and seconds that computing them would have taken; None if never seen."""

    tokens: float
    seconds: float | None


class _Pace:
    """The fastest that a namespace was computed.

    `began` and `prompt` are when the prompt that is being computed was asked for, and the tokens of it so far.
    """

    __slots__ = ("began", "best", "now", "prompt", "recent")

    def __init__(self) -> None:
        self.now = self.prompt = 0
        self.recent: deque[int] = deque([0] * WINDOW_S, maxlen=WINDOW_S)
        self.best = self.began = 0.0


class Savings:
    """Watches how fast engines compute, and says what was saved.

    Parameters
    ----------
    clock : callable
        Monotonic time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._paces: dict[Scope, _Pace] = {}
        self._asked: OrderedDict[BlockId, float] = OrderedDict()

    def asked(self, block: BlockId) -> None:
        """Note that somebody asked for a prompt of which this is the first block that is nowhere."""
        if block not in self._asked:
            self._asked[block] = self._clock()
            if len(self._asked) > MAX_ASKED:
                self._asked.popitem(last=False)

    def computed(self, block: BlockId, tokens: int) -> None:
        """Note that an engine offered a block of so many tokens."""
        pace = self._paces.get(block.scope)
        if pace is None:
            if len(self._paces) >= MAX_SCOPES:
                return
            pace = self._paces[block.scope] = _Pace()
        pace.now += tokens
        began = self._asked.pop(block, None)
        if began is not None:
            pace.began, pace.prompt = began, 0
        took = self._clock() - pace.began
        if took <= PROMPT_S:
            pace.prompt += tokens
            pace.best = max(pace.best, pace.prompt / max(took, LEAST_S))

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
