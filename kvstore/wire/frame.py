"""Frames: an 8-byte prefix, a msgpack head, and for clients without shared memory a raw payload.

    | head length: u32 LE | payload length: u32 LE | head: msgpack | payload: raw bytes |

`FrameReader` is the only parser. It does no I/O: the owner asks it where the next bytes go (`buffer`), puts them
there and says how many came (`advance`). Lengths are checked before anything is allocated. A payload is never
buffered: when the head is complete, the owner is asked where the payload goes and it is received straight into that
place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from kvstore.errors import FrameTooLarge, ProtocolError

PREFIX = struct.Struct("<II")
MAX_HEAD_BYTES = 4 << 20
"""Largest head. 16,384 keys and their answers fit several times."""

_FIRST_BYTES, _BUFFER_BYTES = 8 * 1024, 64 * 1024
"""What a reader receives into at first, and once it has seen traffic: an idle connection costs little."""

FD_REQUEST = struct.Struct("<16sQ")
"""On the descriptor socket: session token and slab id."""

FD_REPLY = struct.Struct("<Q")
"""On the descriptor socket: size of the slab, whose descriptor comes along; 0 for a refusal."""

OnHead = Callable[[bytes, int], Sequence[memoryview]]
"""Called with (head, payload length); answers the places, of together that length, where the payload goes."""
OnFrame = Callable[[], None]
"""Called when the payload announced by the last head is complete; not called for frames without payload."""


def pack(head: bytes, payload_bytes: int = 0) -> bytes:
    """Prefix and head of one frame; the payload, if any, follows as it is."""
    return PREFIX.pack(len(head), payload_bytes) + head


class FrameReader:
    """Sans-I/O parser of a stream of frames.

    Parameters
    ----------
    on_head : callable
        Receives each head. For a frame with payload it returns the destinations.
    on_frame : callable
        Told when such a payload has arrived.
    max_head : int
        Larger heads raise `FrameTooLarge`.
    max_payload : int
        Larger payloads raise `FrameTooLarge`; 0 on connections with shared memory.

    Attributes
    ----------
    paused : bool
        Set by the owner, also from within `on_head`, to have no more frames parsed. It must not receive meanwhile, and
        calls ``advance(0)`` to go on.
    """

    def __init__(
        self, on_head: OnHead, on_frame: OnFrame, max_head: int = MAX_HEAD_BYTES, max_payload: int = 0
    ) -> None:
        self._on_head = on_head
        self._on_frame = on_frame
        self.max_head = max_head
        self.max_payload = max_payload
        self.paused = False
        self._buffer = bytearray(_FIRST_BYTES)
        self._start = 0  # first byte not yet parsed
        self._end = 0  # one past the last byte received
        self._payload: list[memoryview] = []  # places still to be filled

    def buffer(self) -> memoryview:
        """Where the next bytes from the peer go; never empty."""
        if self._payload:
            return self._payload[0]
        if self._start == self._end:
            self._start = self._end = 0
        if len(self._buffer) - self._end < 4096:
            self._make_room()
        return memoryview(self._buffer)[self._end :]

    def advance(self, nbytes: int) -> None:
        """Take in `nbytes` that were put into the last `buffer`.

        Raises
        ------
        ProtocolError
            If the stream breaks a rule. The connection cannot be used any more.
        """
        if self._payload:
            self._fill(nbytes)
            return
        self._end += nbytes
        while not self._payload and not self.paused and self._parse_one():
            pass
        if self._start == self._end and len(self._buffer) > _BUFFER_BYTES:  # it held a large head; most are small
            self._buffer, self._start, self._end = bytearray(_BUFFER_BYTES), 0, 0

    def _parse_one(self) -> bool:
        have = self._end - self._start
        if have < PREFIX.size:
            return False
        head_bytes, payload_bytes = PREFIX.unpack_from(self._buffer, self._start)
        if head_bytes > self.max_head:
            raise FrameTooLarge(f"frame head of {head_bytes} bytes exceeds the limit of {self.max_head}.")
        if payload_bytes > self.max_payload:
            raise FrameTooLarge(f"frame payload of {payload_bytes} bytes exceeds the limit of {self.max_payload}.")
        if have < PREFIX.size + head_bytes:
            return False
        begin = self._start + PREFIX.size
        self._start = begin + head_bytes
        head = bytes(memoryview(self._buffer)[begin : self._start])
        places = self._on_head(head, payload_bytes)
        if payload_bytes:
            self._expect(places, payload_bytes)
        return True

    def _expect(self, places: Sequence[memoryview], payload_bytes: int) -> None:
        if sum(len(p) for p in places) != payload_bytes:
            raise ProtocolError(f"a payload of {payload_bytes} bytes was announced, which is not what is awaited.")
        self._payload = [p for p in places if len(p)]
        while self._payload and self._start < self._end:  # what came along with the head
            place = self._payload[0]
            take = min(len(place), self._end - self._start)
            place[:take] = self._buffer[self._start : self._start + take]
            self._start += take
            self._fill(take)

    def _fill(self, nbytes: int) -> None:
        place = self._payload[0]
        if nbytes < len(place):
            self._payload[0] = place[nbytes:]
            return
        self._payload.pop(0)
        if not self._payload:
            self._on_frame()

    def _make_room(self) -> None:
        """Move the unparsed rest to the front, and grow only as far as a head already announced within the limit."""
        rest = self._end - self._start
        need = _BUFFER_BYTES
        if rest >= PREFIX.size:
            need = max(need, PREFIX.size + PREFIX.unpack_from(self._buffer, self._start)[0] + 4096)
        fresh = bytearray(need)
        fresh[:rest] = memoryview(self._buffer)[self._start : self._end]
        self._buffer, self._start, self._end = fresh, 0, rest

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun that is not complete."""
        return bool(self._payload) or self._start != self._end
