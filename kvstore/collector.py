"""When the interpreter looks for cycles among everything there is: while nobody waits for the daemon.

Objects are freed when the last reference to them goes; what refers to itself in a circle is found by looking at all
objects, now and then. Young ones are looked at often and quickly. To look at all of them stops the event loop for as
long as there are blocks in the index: 50 ms for 32,000 of them. That waits for a quiet moment, but not for ever.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

NEVER_BY_ITSELF = 1 << 30
"""Collections of the middle generation after which the interpreter would look at all objects of its own accord."""
BEAT_S = 5.0
"""Nothing may have been asked for so long: then it is quiet."""
AGAIN_S = 600.0
"""All objects are looked at no sooner than so long after the last time."""
LATEST_S = 4 * 3600.0
"""After so long it is done although it is not quiet."""


class QuietCollector:
    """Looks at all objects when it is quiet.

    Parameters
    ----------
    asked : callable
        How many calls there have been.
    clock : callable
        Monotonic seconds.
    """

    def __init__(self, asked: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._asked = asked
        self._clock = clock
        self._seen = -1
        self._last = clock()
        gc.set_threshold(*gc.get_threshold()[:2], NEVER_BY_ITSELF)

    async def run(self) -> None:
        """Look, for as long as the daemon lives."""
        while True:
            await asyncio.sleep(BEAT_S)
            self.beat()

    def beat(self) -> bool:
        """Look at all objects if it is time to; whether it was."""
        asked, since = self._asked(), self._clock() - self._last
        quiet, self._seen = asked == self._seen, asked
        if since < AGAIN_S or (not quiet and since < LATEST_S):
            return False
        gc.collect()
        self._last = self._clock()
        return True
