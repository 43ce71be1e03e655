"""What an operation of the client asks of the outside: calls, notices, work on memory; and over which connection."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kvstore.client.slabs import SlabMap
from kvstore.wire import messages as m

if TYPE_CHECKING:
    from kvstore.client.device import DeviceMap

T = TypeVar("T")


class Call(NamedTuple):
    """Run a verb. `send` is the payload of the request, `into` the places for the payload of the reply."""

    method: str
    params: m.Message
    send: Sequence[memoryview] = ()
    into: Sequence[memoryview] = ()


class Calls(NamedTuple):
    """Run several verbs in one round trip; answered with the list of results."""

    calls: list[Call]


class Arrivals(NamedTuple):
    """Wait for the next notice of a lease; answered with it, or None once the monotonic `deadline` has passed."""

    lease: int
    deadline: float


class Work(NamedTuple):
    """Run a function that copies `nbytes` of memory, or blocks otherwise (then 0)."""

    function: Callable[[], Any]
    nbytes: int


Effect = Call | Calls | Arrivals | Work
Flow = Generator[Effect, Any, T]


@dataclass(slots=True)
class Link:
    """One established connection.

    Attributes
    ----------
    epoch : int
        Rises with every connection; leases and reservations of an earlier one are worthless.
    slabs : SlabMap or None
        Shared memory; None for a remote client.
    device : DeviceMap or None
        GPU memory, for a client that can reach it.
    """

    epoch: int
    boot: bytes
    slabs: SlabMap | None
    max_block_bytes: int
    known: set[bytes]
    device: DeviceMap | None = None
