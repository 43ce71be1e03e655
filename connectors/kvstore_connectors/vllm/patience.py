"""How long a load is waited for: as long as what has not come promises to come sooner than it would be computed.

How fast a tier is now shows only once something is read from it, and a load that was worth it may not be any more. So
whoever waits looks up now and then, first after a small part of the time at stake, and asks the daemon what a block
costs at the pace of the reads under way. What has been waited already is lost either way and does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

LOOK = 0.03
"""The first look comes after this share of the computing that a load saves: so much is lost by a tier that has become
slow. Each look that finds it worth waiting makes the next wait twice as long."""

FIRST_S, ROUND_S = 0.005, 0.1
"""Shortest and longest wait for blocks on their way up from a lower tier. Then the daemon is asked again, and has to
answer."""


class Patience:
    """Of one load, from now on.

    Parameters
    ----------
    saves_s : sequence of float
        Of each block, what computing it and those behind it takes. Empty: only the deadline counts.
    deadline : float
        When the load is given up whatever it promises.
    ranks : int
        Ranks that load at the same time, each blocks of its own.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self, saves_s: Sequence[float], deadline: float, ranks: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._saves_s = saves_s
        self._ranks = ranks
        self._deadline = deadline
        self._came_at = clock()
        """When a block came last."""
        self._round_s = min(max(LOOK * saves_s[0], FIRST_S), ROUND_S) if saves_s else ROUND_S
        self._gave_up = False

    @property
    def ended(self) -> bool:
        """Whether nothing more is waited for."""
        return self._gave_up or self._clock() >= self._deadline

    def next_round_s(self) -> float:
        """How long to wait before the next look."""
        round_s, self._round_s = self._round_s, min(2 * self._round_s, ROUND_S)
        return max(min(round_s, self._deadline - self._clock()), 0.0)

    def came(self) -> None:
        """Blocks have come."""
        self._came_at = self._clock()

    def look(self, first: int, left_s: float) -> None:
        """Give up unless the blocks from `first` on are worth waiting for.

        Parameters
        ----------
        left_s : float
            What reading them takes, by the daemon's word of what a block costs now; 0 where it does not know.
        """
        if first < len(self._saves_s):
            waited_s = self._clock() - self._came_at
            # The block that is waited for has come in part. But what has let us wait for so long may do so again.
            self._gave_up = max(self._ranks * left_s - waited_s, waited_s) > self._saves_s[first]
