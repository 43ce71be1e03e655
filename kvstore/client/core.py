"""What both faces of the client share: every operation, written once.

An operation is a generator. It yields what it needs of the outside (`Call`, `Calls`, `Arrivals`, `Work`) and is sent
the answer; `kvstore.client.sync` and `kvstore.client.aio` drive it over a blocking socket and an event loop. So there
is no second implementation to drift from the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import msgspec

from kvstore.client import replies as answers
from kvstore.client.blocks import Buffer, LeasedBlock, Loaded, Room, as_bytes, copy_parts
from kvstore.client.connection import Connection
from kvstore.client.effects import Arrivals, Call, Calls, Flow, Link, Work
from kvstore.client.slabs import Bytes, Extents, SlabNotMapped
from kvstore.errors import InvalidParams, LimitExceeded, ProtocolError, UnknownNamespace
from kvstore.keys import TokenIds, as_token_array, namespace_digest
from kvstore.quotas import QuotaRule
from kvstore.types import (
    BlockHeader,
    ChunkMatch,
    Dropped,
    DropReason,
    Exists,
    LoadOutcome,
    Miss,
    MissReason,
    Namespace,
    StoreOutcome,
    TierCode,
)
from kvstore.wire import messages as m

T = TypeVar("T")
_header = msgspec.msgpack.Decoder(BlockHeader)


class Core(Connection):
    """State and operations of a client; parameters as of `Connection`."""

    # -- looking -------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes], prefix: bool, namespace: Namespace | None) -> Flow[list[TierCode]]:
        """Where blocks are."""
        joined = answers.join_keys(keys)
        reply: m.LookupReply = yield from self.in_namespace(
            namespace, lambda ns: Call("lookup", m.Lookup(ns, joined, prefix))
        )
        self.speeds = answers.speeds([reply])
        return answers.codes(reply, len(keys))

    def lookup_many(
        self, queries: Sequence[tuple[Namespace, Sequence[bytes]]], prefix: bool
    ) -> Flow[list[list[TierCode]]]:
        """Several lookups in one round trip."""
        link = self.need_link()
        fresh = [ns for ns, _ in queries if namespace_digest(ns) not in link.known]
        if fresh:
            yield from self.introduce(fresh)
        calls = [
            Call("lookup", m.Lookup(namespace_digest(ns), answers.join_keys(keys), prefix)) for ns, keys in queries
        ]
        try:
            replies = yield Calls(calls)
        except UnknownNamespace:
            yield from self.introduce([ns for ns, _ in queries])
            replies = yield Calls(calls)
        self.speeds = answers.speeds(replies)
        return [answers.codes(reply, len(keys)) for reply, (_, keys) in zip(replies, queries, strict=True)]

    def match(
        self,
        tokens: TokenIds,
        spans: Sequence[tuple[int, int]],
        separator: TokenIds,
        find: bool,
        labels: Sequence[str],
        namespace: Namespace | None,
    ) -> Flow[tuple[list[ChunkMatch], list[tuple[int, int]]]]:
        """Chunks in a prompt, and named spans that are none."""
        ids, between = as_token_array(tokens).tobytes(), as_token_array(separator).tobytes()
        if len(ids) > 4 * m.MAX_MATCH_TOKENS:
            raise InvalidParams(f"tokens: more than {m.MAX_MATCH_TOKENS} can not be matched.", "Match a part of them.")
        reply: m.MatchReply = yield from self.in_namespace(
            namespace, lambda ns: Call("match", m.Match(ns, ids, list(spans), between, find, list(labels)))
        )
        try:
            found = [
                ChunkMatch(f.start, f.stop, f.key, f.blocks, answers.TIERS[f.tier], f.capture, f.overhead)
                for f in reply.found
            ]
        except KeyError as error:
            raise ProtocolError(f"match: there is no tier {error}.") from None
        return found, reply.absent

    # -- reading -------------------------------------------------------------------------------------------------------

    def lease(
        self, keys: Sequence[bytes], namespace: Namespace | None, ttl_s: float, wait_s: float, headers: bool
    ) -> Flow[tuple[int, float, int, list[LeasedBlock | Miss]]]:
        """Lease blocks and wait for those on their way: (id, local expiry, epoch, blocks)."""
        sent = time.monotonic()
        joined = answers.join_keys(keys)
        reply: m.LeaseReply = yield from self.in_namespace(
            namespace, lambda ns: Call("lease", m.Lease(ns, joined, ttl_s, headers))
        )
        link = self.need_link()
        blocks: list[LeasedBlock | Miss] = [Miss(MissReason.DEADLINE)] * len(keys)
        pending = reply.pending
        try:
            yield from self._settle(link, reply.granted, reply.refused, blocks)
            while pending:
                notice: m.LeaseNotice | None = yield Arrivals(reply.lease, sent + wait_s)
                if notice is None:
                    break
                yield from self._settle(link, notice.granted, notice.refused, blocks)
                pending -= len(notice.granted) + len(notice.refused)
        except BaseException:  # nobody will ever know of this lease
            self.release(reply.lease, link.epoch)
            raise
        return reply.lease, sent + reply.ttl_s, link.epoch, blocks

    def _settle(
        self, link: Link, granted: list[m.Grant], refused: list[m.Refusal], blocks: list[LeasedBlock | Miss]
    ) -> Flow[None]:
        parts = yield from self._views(link, [(grant.extents, grant.nbytes) for grant in granted])
        try:
            for grant, bytes_in_place in zip(granted, parts, strict=True):
                header = _header.decode(grant.header) if grant.header else None
                blocks[grant.index] = LeasedBlock(
                    grant.index, grant.nbytes, answers.TIERS[grant.tier], bytes_in_place, header
                )
            for refusal in refused:
                blocks[refusal.index] = Miss(MissReason(refusal.reason))
        except (IndexError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise ProtocolError(f"a grant is not understood: {error}.") from None

    def map_all(self) -> Flow[list[Bytes]]:
        """The daemon's memory for this trust domain, as far as there is any, mapped."""
        link = self.need_link()
        reply: m.SlabsReply = yield Call("slabs", m.Slabs())
        slabs = link.slabs
        if slabs is None:
            return []
        yield Work(lambda: slabs.map([(slab, 0, 0) for slab in reply.slabs]), 0)
        return slabs.whole(reply.slabs)

    @staticmethod
    def _views(link: Link, places: list[tuple[Extents, int]]) -> Flow[list[list[Bytes]]]:
        """The memory of some blocks, given as extents and total length; nothing for a remote client."""
        slabs = link.slabs
        if slabs is None:
            return [[] for _ in places]
        try:
            return [slabs.parts(extents, nbytes) for extents, nbytes in places]
        except SlabNotMapped:
            yield Work(lambda: slabs.map([extent for extents, _ in places for extent in extents]), 0)
            return [slabs.parts(extents, nbytes) for extents, nbytes in places]

    def fetch(self, lease: int, block: LeasedBlock, into: memoryview) -> Flow[None]:
        """Copy a leased block into a buffer of its size."""
        if len(into) != block.nbytes:
            raise InvalidParams(f"into: a buffer of {len(into)} bytes was given for a block of {block.nbytes}.", "")
        if block.parts:
            yield Work(lambda: copy_parts(block.parts, into), block.nbytes)
        else:
            yield Call("fetch", m.Fetch(lease, block.index), into=[into])

    def get(
        self,
        keys: Sequence[bytes],
        into: Sequence[Buffer] | None,
        namespace: Namespace | None,
        wait_s: float,
        valid: Callable[[float, int], bool],
    ) -> Flow[list[Loaded | LoadOutcome]]:
        """Read whole blocks, into the caller's buffers or new ones. `valid` judges after the copies (expiry, epoch)."""
        try:
            return (yield from self._get(keys, into, namespace, wait_s, valid))
        except LimitExceeded:
            if len(keys) < 2:
                raise
        # The blocks' headers together are more than a reply holds.
        half = len(keys) // 2
        first = yield from self.get(keys[:half], into and into[:half], namespace, wait_s, valid)
        rest = yield from self.get(keys[half:], into and into[half:], namespace, wait_s, valid)
        return first + rest

    def _get(
        self,
        keys: Sequence[bytes],
        into: Sequence[Buffer] | None,
        namespace: Namespace | None,
        wait_s: float,
        valid: Callable[[float, int], bool],
    ) -> Flow[list[Loaded | LoadOutcome]]:
        lease, expires, epoch, blocks = yield from self.lease(keys, namespace, 30.0, wait_s, into is None)
        try:
            targets: list[memoryview | None] = []
            for index, block in enumerate(blocks):
                into_one = None if into is None else into[index]
                targets.append(None if isinstance(block, Miss) else answers.target(block, into_one))
            local = [
                (block.parts, target)
                for block, target in zip(blocks, targets, strict=True)
                if target is not None and isinstance(block, LeasedBlock) and block.parts
            ]
            if local:
                yield Work(lambda: [copy_parts(p, t) for p, t in local], sum(len(t) for _, t in local))
            for block, target in zip(blocks, targets, strict=True):
                if target is not None and isinstance(block, LeasedBlock) and not block.parts:
                    yield Call("fetch", m.Fetch(lease, block.index), into=[target])
            if not valid(expires, epoch):
                return [Miss(MissReason.LOST)] * len(keys)
            return [answers.outcome(b, t, into is None) for b, t in zip(blocks, targets, strict=True)]
        finally:
            self.release(lease, epoch)

    # -- writing -------------------------------------------------------------------------------------------------------

    def reserve(
        self,
        offers: Sequence[tuple[bytes, int, BlockHeader]],
        namespace: Namespace | None,
        ttl_s: float,
        wait_s: float,
    ) -> Flow[tuple[int, float, int, list[Room | Exists | Dropped]]]:
        """Ask for room: (id, local expiry, epoch, blocks)."""
        sent = time.monotonic()
        answers.join_keys([key for key, _, _ in offers])  # each is a digest, and they are not too many
        wire = [m.Offer(key, nbytes, msgspec.msgpack.encode(header)) for key, nbytes, header in offers]
        reply: m.ReserveReply = yield from self.in_namespace(
            namespace, lambda ns: Call("reserve", m.Reserve(ns, wire, ttl_s, wait_s))
        )
        link = self.need_link()
        blocks: list[Room | Exists | Dropped] = [Dropped(DropReason.UNREACHABLE)] * len(offers)
        try:
            parts = yield from self._views(link, [(room.extents, offers[room.index][1]) for room in reply.rooms])
            for room, bytes_in_place in zip(reply.rooms, parts, strict=True):
                blocks[room.index] = Room(room.index, offers[room.index][1], bytes_in_place)
            for other in reply.others:
                blocks[other.index] = cast(Any, answers.outcome_of(other.status))
        except (IndexError, ValueError) as error:
            self.abort(reply.reservation, link.epoch)
            raise ProtocolError(f"a reservation is not understood: {error}.") from None
        except BaseException:  # nobody will ever know of this reservation
            self.abort(reply.reservation, link.epoch)
            raise
        return reply.reservation, sent + reply.ttl_s, link.epoch, blocks

    def fill(self, reservation: int, room: Room, data: memoryview) -> Flow[None]:
        """Copy a block's bytes into its room."""
        if len(data) != room.nbytes:
            raise InvalidParams(f"data: {len(data)} bytes were given for a block of {room.nbytes}.", "")
        if room.parts:
            yield Work(lambda: room.write(data), room.nbytes)
        else:
            yield Call("fill", m.Fill(reservation, room.index), send=[data])

    def commit(self, reservation: int, indexes: Sequence[int], durable: bool) -> Flow[dict[int, StoreOutcome]]:
        """Make filled blocks visible; what became of each."""
        reply: m.CommitReply = yield Call("commit", m.Commit(reservation, list(indexes), durable))
        return {outcome.index: answers.outcome_of(outcome.status) for outcome in reply.outcomes}

    def put(
        self,
        items: Sequence[tuple[bytes, Buffer, BlockHeader]],
        namespace: Namespace | None,
        wait_s: float,
        durable: bool,
    ) -> Flow[list[StoreOutcome]]:
        """Store whole blocks, as many at a time as there is room for."""
        data = [as_bytes(buffer) for _, buffer, _ in items]
        offers = [(key, len(view), header) for (key, _, header), view in zip(items, data, strict=True)]
        reservation, _, epoch, blocks = yield from self.reserve(offers, namespace, 30.0, wait_s)
        rooms = [(index, block) for index, block in enumerate(blocks) if isinstance(block, Room)]
        local = [(room, data[index]) for index, room in rooms if room.parts]
        done: dict[int, StoreOutcome] = {}
        try:
            if local:
                yield Work(lambda: [room.write(view) for room, view in local], sum(room.nbytes for room, _ in local))
            for index, room in rooms:
                if not room.parts:
                    yield Call("fill", m.Fill(reservation, index), send=[data[index]])
            if rooms:
                done = yield from self.commit(reservation, [index for index, _ in rooms], durable)
        except BaseException:
            self.abort(reservation, epoch)
            raise
        return [done.get(i, Dropped(DropReason.ABORTED)) if isinstance(b, Room) else b for i, b in enumerate(blocks)]

    # -- keeping and forgetting ----------------------------------------------------------------------------------------

    def count(self, namespace: Namespace | None, build: Callable[[bytes], Call]) -> Flow[int]:
        """Run a verb that answers with a count."""
        reply: m.CountReply = yield from self.in_namespace(namespace, build)
        return reply.count

    def stats(self) -> Flow[dict[str, Any]]:
        """The daemon's snapshot."""
        reply: m.StatsReply = yield Call("stats", m.Stats())
        return reply.snapshot

    def quota(self, rule: QuotaRule | None, remove: str) -> Flow[tuple[list[QuotaRule], dict[str, Any]]]:
        """The rules about quotas and what each holds, after a change."""
        reply: m.QuotaReply = yield Call("quota", m.Quota(rule, remove))
        return reply.rules, reply.tiers
