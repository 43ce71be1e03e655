"""Events between daemons: each publishes its own as a Redis stream and follows those of the others.

A daemon is a subscriber of its own feed: what a client would be answered goes into its stream, reply by reply, numbered
without a hole. The replies of a snapshot are there too, at the beginning, after anything that was missed, and again
before trimming could reach the last one; a card in a hash says where that one begins, and by its beat that the daemon
lives. So a follower needs nothing but the stream, and knows when he missed something: then he believes nothing of that
daemon until its next snapshot.

Nothing waits for Redis. The feed's ring is the queue; who falls behind it publishes a snapshot. What others publish is
used to say where prefixes are, never to read a block: a lie costs a detour.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, cast

import msgspec

from kvstore.errors import CorruptBlock, ProtocolError
from kvstore.feed import Feed
from kvstore.peers import DEAD_S, Peer
from kvstore.remote.clients import FAILURES, LIES, make_client
from kvstore.remote.record import Seal
from kvstore.wire import messages as m

log = logging.getLogger("kvstore.events")

BEAT_S = 2.0
FORGET_S = 3600
"""After so long it is forgotten in Redis, too."""
PAGE = 1024
"""Blocks in one entry of a stream: 45 KB at most."""
MAX_PEERS = 256
_MAX_NAME = 256
_PLACE = re.compile(rb"(\d{1,20})-(\d{1,20})", re.ASCII)
_MAX_ENTRY = 1 << 20
_BACK_OFF_S = 5.0

_LIES = (*LIES, msgspec.MsgspecError)
_FAILURES = (*FAILURES, ProtocolError, msgspec.MsgspecError)


class Card(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a daemon says of itself: where its last snapshot begins in its stream, and that it lives."""

    boot: Annotated[bytes, msgspec.Meta(max_length=16)]
    address: Annotated[str, msgspec.Meta(max_length=1024)]
    beat: int
    start: Annotated[str, msgspec.Meta(max_length=41)]


_card = msgspec.msgpack.Decoder(Card)
_reply = msgspec.msgpack.Decoder(m.EventsReply)


class EventExchange:
    """Publishes this daemon's events and follows those of others.

    Parameters
    ----------
    url : str
        Of the server, as for the Redis tier.
    cluster : bool
        Whether it is a cluster.
    prefix : str
        What the names of all keys begin with.
    name : str
        What this daemon is called; no two may have the same name.
    feed : Feed
        Its events.
    domain : str
        Trust domain whose events are shared: that of the daemon's own user.
    length : int
        Entries kept in the stream, roughly.
    key : bytes
        Seals entries with AES-256-GCM, if there is one.
    timeout_s : float
        Longest time one command may take.
    """

    def __init__(
        self,
        url: str,
        *,
        cluster: bool = False,
        prefix: str,
        name: str,
        feed: Feed,
        domain: str,
        length: int = 4096,
        key: bytes = b"",
        timeout_s: float = 2.0,
    ) -> None:
        self.name = name
        self.address = ""
        self.peers: dict[str, Peer] = {}
        self.counts = {"published": 0, "followed": 0, "snapshots": 0, "missed": 0, "garbage": 0, "failures": 0}
        self.error = ""
        self._client = make_client(url, cluster, timeout_s, 4)
        self._cards = "{" + prefix + "}:daemons"
        self._prefix = "{" + prefix + "}:events:"
        self._feed = feed
        self._domain = domain
        self._length = length
        self._seal = Seal(key) if key else None
        self._timeout_s = timeout_s
        self._patience_ms = max(1, min(500, int(500 * timeout_s)))
        self._closed = False
        self._number = 0
        self._beat = 0
        self._start = "0-0"
        self._tasks: list[asyncio.Task[None]] = []

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; connects by itself, now or whenever the server is there."""
        self._tasks = [asyncio.create_task(self._forever(work)) for work in (self._publish, self._follow)]

    async def close(self) -> None:
        """Say goodbye and disconnect. May be called twice."""
        self._closed = True
        for task in self._tasks:
            task.cancel()  # they look at `_closed` too: a command whose time ends just then would swallow this
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks and not self.error:
            with contextlib.suppress(*_FAILURES):
                await self._leave()
        self._tasks = []
        with contextlib.suppress(*_FAILURES):
            await self._client.aclose()

    async def _forever(self, work: Callable[[], Awaitable[None]]) -> None:
        wait_s = 0.1
        while not self._closed:
            began = time.monotonic()
            try:
                await work()
            except _FAILURES as error:
                self.counts["failures"] += 1
                if not self.error:
                    log.warning("events are not shared: %s", error)
                self.error = str(error) or type(error).__name__
            wait_s = 0.1 if time.monotonic() - began > _BACK_OFF_S else min(_BACK_OFF_S, 2 * wait_s)
            await asyncio.sleep(wait_s)

    def known(self) -> list[tuple[str, Peer]]:
        """The daemons that are there and believed."""
        return [(name, peer) for name, peer in self.peers.items() if peer.believed and peer.alive()]

    def state(self) -> dict[str, Any]:
        """What an operator should know of it."""
        alive = sum(peer.alive() for peer in self.peers.values())
        return {**self.counts, "name": self.name, "error": self.error, "peers": alive, "believed": len(self.known())}

    # -- publishing ----------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Begins with a snapshot, always: whether what was sent last arrived is not known after a failure."""
        if not self._number:  # what an earlier life has left there
            await self._leave()
        ask = m.Events(limit=PAGE)
        since_snapshot, beaten = 0, -math.inf
        while not self._closed:
            reply = self._feed.answer(self, self._domain, ask)
            if inspect.isawaitable(reply):
                reply = await reply
            if reply.reset or ask.snapshot or reply.events:  # the last page of a snapshot may be empty
                place = await self._add(reply)
                since_snapshot = 0 if reply.reset or reply.snapshot else since_snapshot + 1
                if reply.reset:
                    self.counts["snapshots"] += 1
                    self._start, beaten = place, -math.inf
            if time.monotonic() - beaten >= BEAT_S and not reply.snapshot:
                await self._show_card()
                beaten = time.monotonic()
            ask = m.Events(reply.boot, reply.after, reply.snapshot, BEAT_S, PAGE)
            if since_snapshot > self._length // 2:  # before the last one is trimmed away
                ask, since_snapshot = m.Events(limit=PAGE), 0

    async def _add(self, reply: m.EventsReply) -> str:
        """Append an entry; its place in the stream."""
        self._number += 1
        body = msgspec.msgpack.encode(reply)
        if self._seal is not None:
            body = self._seal.close(body, self._about(self.name, self._number))
        entry = {"n": self._number, "e": body}
        adding = self._client.xadd(self._prefix + self.name, cast(Any, entry), maxlen=self._length, approximate=True)
        place = (await self._ask(adding)).decode()
        self.counts["published"] += 1
        self.error = ""
        return place

    async def _leave(self) -> None:
        await self._ask(self._client.hdel(self._cards, self.name))
        await self._ask(self._client.unlink(self._prefix + self.name))

    async def _show_card(self) -> None:
        self._beat += 1
        card = msgspec.msgpack.encode(Card(self._feed.boot, self.address, self._beat, self._start))
        await self._ask(self._client.hset(self._cards, key=self.name, value=cast(Any, card)))
        await self._ask(self._client.expire(self._prefix + self.name, FORGET_S))
        await self._ask(self._client.xtrim(self._prefix + self.name, minid=self._start))

    # -- following -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        looked = -math.inf
        while not self._closed:
            if time.monotonic() - looked >= BEAT_S / 2:
                await self._read_cards()
                looked = time.monotonic()
            if not self.peers:
                await asyncio.sleep(BEAT_S / 2)
                continue
            places = {self._prefix + name: peer.at for name, peer in self.peers.items()}
            reading = self._client.xread(cast(Any, places), count=16, block=self._patience_ms)
            for stream, entries in await self._ask(reading) or ():
                name = stream.decode()[len(self._prefix) :]
                for place, entry in entries:
                    self._take(name, self.peers[name], place, entry)
                    await asyncio.sleep(0)  # others go on meanwhile

    async def _read_cards(self) -> None:
        """Note who is there, forget who is not, and begin anew with those that began anew."""
        if await self._ask(self._client.hlen(self._cards)) > 4 * MAX_PEERS:
            raise ProtocolError(f"{self._cards} names more than {4 * MAX_PEERS} daemons.")
        cards = await self._ask(self._client.hgetall(self._cards))
        now = time.monotonic()
        for title, value in cards.items():
            try:
                name, card = _name(title), _card.decode(value)
                start = _before(card.start)
            except _LIES:
                self.counts["garbage"] += 1
                continue
            peer = self.peers.get(name)
            if name != self.name and peer is None and len(self.peers) < MAX_PEERS:
                peer = self.peers[name] = Peer(
                    card.boot, start, beat=card.beat, heard=now - DEAD_S
                )  # until its beat changes
            if peer is not None:
                self._note(peer, card, start, now)
        for name in [name for name in self.peers if name.encode() not in cards]:
            del self.peers[name]
        for name in [name for name, peer in self.peers.items() if now - peer.heard > FORGET_S]:
            await self._ask(self._client.hdel(self._cards, name))

    def _note(self, peer: Peer, card: Card, start: bytes, now: float) -> None:
        if card.beat != peer.beat:
            peer.heard, peer.beat, peer.address = now, card.beat, card.address[:200]
        if card.boot != peer.boot or (not peer.believed and peer.expected < 0 and _number(start) > _number(peer.at)):
            peer.boot, peer.at = card.boot, start
            peer.lose()

    def _take(self, name: str, peer: Peer, place: bytes, entry: dict[bytes, bytes]) -> None:
        peer.at = place
        before = peer.believed
        try:
            body, number = entry[b"e"], int(entry[b"n"])
            if len(body) > _MAX_ENTRY:
                raise ProtocolError("an entry is longer than a daemon makes them.")
            if self._seal is not None:
                body = self._seal.open(body, self._about(name, number))
            others = sum(each.mirror.blocks for each in self.peers.values()) - peer.mirror.blocks
            peer.take(number, _reply.decode(body), others)
        except (*_LIES, ProtocolError, CorruptBlock):
            self.counts["garbage"] += 1
            peer.lose()
            return
        self.counts["followed"] += 1
        self.counts["missed"] += before and peer.expected < 0

    # -- help ----------------------------------------------------------------------------------------------------------

    def _about(self, name: str, number: int) -> bytes:
        return b"kvstore/events/1" + number.to_bytes(8, "little") + name.encode()

    async def _ask(self, reply: Any) -> Any:
        return await asyncio.wait_for(reply, 2 * self._timeout_s)


def _name(title: bytes) -> str:
    """The daemon that a card is of; raises ValueError if no daemon can be called so."""
    if len(title) > _MAX_NAME:
        raise ValueError("a name is too long.")
    return title.decode()


def _number(place: bytes) -> tuple[int, int]:
    """A place in a stream as numbers; raises ValueError if it is none: one such would fail the reading of all."""
    match = _PLACE.fullmatch(place)
    first, second = (int(match[1]), int(match[2])) if match else (-1, -1)
    if not 0 <= max(first, second) < 1 << 64:
        raise ValueError("a card names no place in a stream.")
    return first, second


def _before(place: str) -> bytes:
    """The place just before one, since reading begins after what it is told."""
    first, second = _number(place.encode())
    return b"%d-%d" % ((first, second - 1) if second else (max(0, first - 1), (1 << 64) - 1))
