"""Another daemon, as far as its events tell."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from kvstore.client.events import Mirror, read_event
from kvstore.errors import ProtocolError
from kvstore.wire import messages as m

DEAD_S = 10.0
"""A daemon that has not shown itself for so long is not there."""
MAX_BLOCKS = 1 << 22
"""Blocks of all daemons together that are remembered, at about 150 bytes each; who says he has more is not believed."""


@dataclass(slots=True, eq=False)
class Peer:
    """Another daemon.

    Attributes
    ----------
    boot : bytes
        Which life of it.
    at : bytes
        How far its stream has been read.
    beat, heard : int, float
        What its card said last, and when that was new.
    expected : int
        Number of its next entry; negative after something was missed.
    believed : bool
        Whether nothing was missed since its last snapshot, and that was whole.
    mirror : Mirror
        What it has where.
    """

    boot: bytes
    at: bytes
    address: str = ""
    beat: int = -1
    heard: float = -math.inf
    expected: int = 0
    believed: bool = False
    mirror: Mirror = field(default_factory=Mirror)

    def alive(self) -> bool:
        """Whether it is there."""
        return time.monotonic() - self.heard < DEAD_S

    def take(self, number: int, reply: m.EventsReply, others: int = 0) -> None:
        """Take in an entry of its stream, where so many blocks of `others` are remembered.

        Raises
        ------
        ProtocolError
            If it makes no sense, or would be too much.
        """
        if reply.reset:
            self.mirror = Mirror()
            self.boot = reply.boot
        elif number != self.expected or reply.boot != self.boot:
            self.lose()
            return
        self.expected = number + 1
        for event in reply.events:
            self.mirror.apply(read_event(event))
        if self.mirror.blocks + others > MAX_BLOCKS:
            raise ProtocolError(f"the daemons say they have more than {MAX_BLOCKS} blocks.")
        self.believed = not reply.snapshot

    def lose(self) -> None:
        """Something was missed, or made no sense: forget all until its next snapshot."""
        self.believed = False
        self.expected = -1
        self.mirror = Mirror()
