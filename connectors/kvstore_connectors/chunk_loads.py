"""Stored chunks of a prompt, copied out of the daemon's memory into its cache, keys moved to where they stand now.

A chunk is believed only if its header says the very tokens that stand in the prompt, all its bytes have come, and the
lease was valid until the last was copied. Anything else is a load that failed: the prompt is then computed.

To a device the first layers are copied first, and while they are computed on the next ones come; the calls for these
are made then, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvstore.client import LeasedBlock, chunk_keys
from kvstore.types import ChunkInfo, Miss, Namespace
from kvstore_connectors.base import Tally
from kvstore_connectors.blend.prompt import Capture, LayerKV, Span, brought
from kvstore_connectors.clock import Moment
from kvstore_gpu import host
from kvstore_gpu.place import Piece, placing
from kvstore_gpu.rope import Turn

if TYPE_CHECKING:
    from kvstore.rope import Rotary

HEADERS_AT_ONCE = 24
BLOCKS_AT_ONCE = 256
"""Blocks leased in one call: with their headers, and for their bytes."""

LAYERS_AT_ONCE = 4
"""Layers that are copied to a device together, at most: fewer and larger copies cost the host less. The first come in
smaller groups, since until they are there nothing is computed."""

GROUPS_AHEAD = 2
"""Groups of layers that are on their way while one is computed on."""

TTL_S = 30.0


class Wanted(NamedTuple):
    """Tokens `start` to `stop` of a prompt, to be taken from a stored chunk.

    Attributes
    ----------
    offset : int
        Tokens at the start of the chunk that are not wanted.
    key : bytes
        Of the chunk's last block.
    exact : bool
        The chunk was computed behind exactly the tokens that are before it here.
    """

    start: int
    stop: int
    offset: int
    key: bytes
    exact: bool


class Described(NamedTuple):
    """A wanted chunk, and what its header says."""

    wanted: Wanted
    info: ChunkInfo


def describe(
    client: Any, namespace: Namespace, chunks: Sequence[Wanted], tokens: bytes, deadline_s: float, tally: Tally
) -> list[Described] | None:
    """The chunks' headers; None if one is gone, or is not of the tokens that stand in the prompt.

    Parameters
    ----------
    tokens : bytes
        Token ids of the prompt, int32 little-endian.
    """
    out: list[Described] = []
    for at in range(0, len(chunks), HEADERS_AT_ONCE):
        some = chunks[at : at + HEADERS_AT_ONCE]
        keys = [one.key for one in some]
        with client.lease(keys, namespace=namespace, ttl_s=TTL_S, wait_s=deadline_s, headers=True) as lease:
            for block, one in zip(lease.blocks, some, strict=True):
                info = None if isinstance(block, Miss) or block.header is None else block.header.chunk
                if info is None:
                    tally.add("blend_chunk_missing")
                    return None
                stored = info.tokens[4 * one.offset : 4 * (one.offset + one.stop - one.start)]
                if stored != tokens[4 * one.start : 4 * one.stop]:
                    tally.add("blend_wrong_tokens")
                    return None
                out.append(Described(one, info))
    return out


def begin_load(
    client: Any,
    namespace: Namespace,
    chunks: Sequence[Wanted],
    tokens: bytes,
    cache: Sequence[LayerKV],
    rotation: Rotary,
    deadline_s: float,
    tally: Tally,
    stream: torch.cuda.Stream | None = None,
) -> ChunkLoad | None:
    """Have chunks copied into a prompt's cache, by their headers; None if one of them can not be had as it should be.

    Parameters as of `describe` and `ChunkLoad`.
    """
    deadline = time.monotonic() + deadline_s
    described = describe(client, namespace, chunks, tokens, deadline_s, tally)
    if described is None:
        return None
    load = ChunkLoad(namespace, described, cache, rotation, tally, stream)
    return load if load.begin(client, deadline) else None


class _Wish(NamedTuple):
    """Tokens of one stored block that stand together in the prompt, and how far from where they were computed."""

    key: bytes
    piece: Piece
    distance: int


class ChunkLoad:
    """Chunks on their way into a prompt's cache: `begin`, `wait` for layers and look `ahead` behind each, `finish`.

    Parameters
    ----------
    namespace : Namespace
    chunks : sequence of Described
    cache : sequence of LayerKV
        Of the prompt, from its first token on; dense.
    rotation : Rotary
        The model's.
    tally : Tally
    stream : torch.cuda.Stream, optional
        What copies to a device run on. They begin behind what the current stream was given.

    Attributes
    ----------
    spans : list of Span
        What the chunks are in the prompt.
    seconds : float
        Time that asking and copying took; complete when it is finished.
    """

    def __init__(
        self,
        namespace: Namespace,
        chunks: Sequence[Described],
        cache: Sequence[LayerKV],
        rotation: Rotary,
        tally: Tally,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._namespace = namespace
        self._rows = [(held.keys, held.values) for held in cache]
        self._device = cache[0].keys.device
        self._rotation = rotation
        self._tally = tally
        self._stream = stream
        self._wishes = [wish for one in chunks for wish in _wishes(one, namespace.block_tokens)]
        self._groups = _grown(len(cache), LAYERS_AT_ONCE) if stream is not None else [range(len(cache))]
        self._rest: Iterator[None] = iter(())
        """Calls for the groups of layers that are not on their way yet."""
        self._came: list[tuple[Moment, Moment]] = []
        """When the copying of each group began and ended."""
        self._waits: list[tuple[Moment, Moment]] = []
        self._reached = 0
        """Groups that were waited for."""
        self._lease: Any = None
        self._held: list[torch.Tensor] = []  # what copies read that is not leased
        self.seconds = 0.0
        self.spans = [_span(one, self._device) for one in chunks]

    def begin(self, client: Any, deadline: float) -> bool:
        """Have all chunks copied; whether they could be had. On the CPU they have come when this returns.

        Parameters
        ----------
        deadline : float
            On the monotonic clock.
        """
        begun = False
        try:
            begun = self._begin(client, deadline)
        finally:
            if not begun:
                self.finish()
        return begun

    def _begin(self, client: Any, deadline: float) -> bool:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        left = self._wishes
        while left:
            if not self.finish():  # the memory that was leased for the blocks before may be needed for the next
                return False
            self._came.clear()
            begun = time.monotonic()
            wait_s = max(deadline - begun, 0.0)
            keys = [wish.key for wish in left[:BLOCKS_AT_ONCE]]
            self._lease = client.lease(keys, namespace=self._namespace, ttl_s=TTL_S, wait_s=wait_s)
            found: list[LeasedBlock] = []
            for block in self._lease.blocks:
                if isinstance(block, Miss) or block.nbytes != self._nbytes(left[len(found)].piece.block_tokens):
                    break
                found.append(block)
            if not found:
                self._tally.add("blend_chunk_missing")
                return False
            self.seconds += time.monotonic() - begun
            self._rest = self._land(client, found, left[: len(found)])
            left = left[len(found) :]
            self._bring(1)
        return True

    def ahead(self) -> None:
        """Have the layers behind the last one waited for on their way: for when the device has got work to do."""
        self._bring(self._reached + GROUPS_AHEAD)

    def wait(self, layer: int) -> None:
        """Let what is given to the device from here on wait for a layer."""
        group = next((number for number, one in enumerate(self._groups) if one.start == layer), None)
        if group is None:
            return
        self._reached = group + 1
        self._bring(self._reached)
        came = self._came[group][1].event if self._came else None
        if came is not None:
            before = Moment(self._device)
            torch.cuda.current_stream(self._device).wait_event(came)
            self._waits.append((before, Moment(self._device)))

    def _bring(self, groups: int) -> None:
        """Have so many groups on their way, of those that there are."""
        for _ in islice(self._rest, max(0, groups - len(self._came))):
            pass

    def waited(self) -> float:
        """Seconds that the device waited for layers; for when it is through."""
        return sum(before.until(after) for before, after in self._waits)

    def finish(self) -> bool:
        """Wait until all has come and end the lease; whether the bytes were right until the last was copied."""
        if self._lease is None:
            return True
        with self._lease as lease:
            try:
                self._bring(len(self._groups))
            finally:
                if self._stream is not None:
                    self._stream.synchronize()  # behind an error, too: it reads leased memory, fills the cache
            self.seconds += sum(begun.until(ended) for begun, ended in self._came)
            valid = bool(lease.valid())
        self._lease = None
        if not valid:
            self._tally.add("load_expired")
        return valid

    def _nbytes(self, tokens: int) -> int:
        return 2 * len(self._rows) * tokens * self._rows[0][0][0].nbytes

    def _land(self, client: Any, found: Sequence[LeasedBlock], wishes: Sequence[_Wish]) -> Iterator[None]:
        """Copy leased blocks to their places, a group of layers at each step."""
        layers, device, stream = len(self._rows), self._device, self._stream
        with torch.cuda.stream(stream):
            turn = Turn.of(self._rotation, brought(torch.tensor([wish.distance for wish in wishes]), device))
            place = placing(self._rows, [wish.piece for wish in wishes], turn)
        held = None if stream is None else host.Held([self._runs(client, block) for block in found])
        layer = np.array([block.nbytes // layers for block in found])
        for group in self._groups:
            first, last = group.start, group.stop
            with torch.cuda.stream(stream):
                begun = Moment(device)
                if stream is None or held is None:
                    blocks: Sequence[torch.Tensor] | torch.Tensor = [self._bytes(client, block) for block in found]
                else:
                    blocks = torch.empty(int(layer.sum()) * (last - first), dtype=torch.uint8, device=device)
                    held.bring(layer * first, layer * last, blocks, stream)
                place(group, blocks)
                self._came.append((begun, Moment(device)))
            yield

    def _runs(self, client: Any, block: LeasedBlock) -> list[host.Run]:
        """Where copies to a device find a leased block: in its own memory if it is there, else in the daemon's."""
        if isinstance(block.device, torch.Tensor) and block.device.device == self._device:
            return [(block.device.data_ptr(), block.nbytes)]
        if not block.parts:
            self._held.append(self._bytes(client, block).pin_memory())
            return [(self._held[-1].data_ptr(), block.nbytes)]
        return [(run.ctypes.data, run.nbytes) for part in block.parts for run in host.reach(part, self._device)]

    def _bytes(self, client: Any, block: LeasedBlock) -> torch.Tensor:
        """A leased block's bytes in host memory, in place if they lie there together."""
        if block.array is not None:
            return torch.from_numpy(block.array)
        whole = np.empty(block.nbytes, dtype=np.uint8)
        client.read(self._lease, block, whole)
        return torch.from_numpy(whole)


def _grown(layers: int, most: int) -> list[range]:
    """Layers in groups: of one, as many as came before, and so on up to `most`."""
    groups = [range(min(1, layers))]
    while (first := groups[-1].stop) < layers:
        groups.append(range(first, min(first + min(first, most), layers)))
    return groups


def _wishes(one: Described, room: int) -> list[_Wish]:
    """What of each of a chunk's blocks, of at most `room` tokens, is wanted."""
    wanted, info = one
    begin, end = wanted.offset, wanted.offset + wanted.stop - wanted.start
    out = []
    for number, key in enumerate(chunk_keys(wanted.key, info)):
        first = number * room
        count = min(len(info.tokens) // 4 - first, room)
        a, b = max(begin, first), min(end, first + count)
        if a < b:
            row = wanted.start - begin + a
            distance = row - info.position - a
            out.append(_Wish(key, Piece(count, a - first, b - a, row, moved=distance != 0), distance))
    return out


def _span(one: Described, device: torch.device) -> Span:
    wanted, info = one.wanted, one.info
    external = None
    if info.external:
        part = np.frombuffer(info.external, dtype="<f2")[wanted.offset : wanted.offset + wanted.stop - wanted.start]
        external = torch.from_numpy(part.astype(np.float32)).to(device)
    return Span(wanted.start, wanted.stop, Capture.EXACT if wanted.exact else Capture(info.capture), external)
