"""Stored chunks of a prompt, copied out of the daemon's memory into its cache, keys moved to where they stand now.

A chunk is believed only if its header says the very tokens that stand in the prompt, all its bytes have come, and the
lease was valid until the last was copied. Anything else is None: the prompt is then computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvstore.client import LeasedBlock, chunk_keys
from kvstore.types import ChunkInfo, Miss, Namespace
from kvstore_connectors.base import Tally
from kvstore_connectors.blend.prompt import Capture, LayerKV, Span
from kvstore_connectors.blend.rope import move
from kvstore_gpu import host

if TYPE_CHECKING:
    from kvstore.rope import Rotary

HEADERS_AT_ONCE = 24
BLOCKS_AT_ONCE = 16
"""Blocks leased in one call: with their headers, and for their bytes."""

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


def load_chunks(
    client: Any,
    namespace: Namespace,
    chunks: Sequence[Described],
    cache: Sequence[LayerKV],
    rotation: Rotary,
    deadline: float,
    tally: Tally,
) -> list[Span] | None:
    """Copy chunks into a prompt's cache; None if one of them can not be had as it should be.

    Parameters
    ----------
    cache : sequence of LayerKV
        Of the prompt, from its first token on.
    deadline : float
        On the monotonic clock.
    """
    pieces: list[tuple[bytes, Described, int]] = []
    for one in chunks:
        keys = chunk_keys(one.wanted.key, one.info)
        pieces += [(key, one, place * namespace.block_tokens) for place, key in enumerate(keys)]
    for at in range(0, len(pieces), BLOCKS_AT_ONCE):
        some = pieces[at : at + BLOCKS_AT_ONCE]
        wait_s = max(deadline - time.monotonic(), 0.0)
        with client.lease([key for key, _, _ in some], namespace=namespace, ttl_s=TTL_S, wait_s=wait_s) as lease:
            for block, (_, one, first) in zip(lease.blocks, some, strict=True):
                room = namespace.block_tokens
                found = not isinstance(block, Miss) and _place(
                    _bytes(client, lease, block, cache[0].keys.device), one, first, room, cache, rotation
                )
                if not found:
                    tally.add("blend_chunk_missing")
                    return None
            if cache[0].keys.is_cuda:
                torch.cuda.current_stream(cache[0].keys.device).synchronize()  # it reads the daemon's memory up to here
            if not lease.valid():
                tally.add("load_expired")
                return None
    return [_span(one, cache[0].keys.device) for one in chunks]


def _bytes(client: Any, lease: Any, block: LeasedBlock, device: torch.device) -> torch.Tensor:
    """A leased block's bytes: in place, on the cache's device if they are there; or copied together from elsewhere."""
    if isinstance(block.device, torch.Tensor) and block.device.device == device:
        return block.device
    if device.type == "cuda" and block.parts:
        return _brought(block, device)
    if block.array is not None:
        return torch.from_numpy(block.array)
    whole = np.empty(block.nbytes, dtype=np.uint8)
    client.read(lease, block, whole)
    return torch.from_numpy(whole)


def _brought(block: LeasedBlock, device: torch.device) -> torch.Tensor:
    """A block's bytes brought to a device straight from the daemon's memory; who ends the lease waits for it."""
    out = torch.empty(block.nbytes, dtype=torch.uint8, device=device)
    at = 0
    for run in (run for part in block.parts for run in host.reach(part, device)):
        out[at : at + len(run)].copy_(torch.from_numpy(run), non_blocking=True)
        at += len(run)
    return out


def _place(
    payload: torch.Tensor, one: Described, first: int, room: int, cache: Sequence[LayerKV], rotation: Rotary
) -> bool:
    """Copy a block of at most `room` tokens, the first of them the chunk's `first`, to where its tokens stand."""
    wanted, info, held = one.wanted, one.info, cache[0].keys
    shape = held.shape[1:]
    count = min(len(info.tokens) // 4 - first, room)
    if len(payload) != 2 * len(cache) * count * shape.numel() * held.dtype.itemsize:
        return False
    a, b = max(wanted.offset, first), min(wanted.offset + wanted.stop - wanted.start, first + count)
    if a >= b:
        return True
    stored = payload.view(held.dtype).view(len(cache), 2, count, *shape)
    stored = stored[:, :, a - first : b - first].to(held.device)
    to = wanted.start - wanted.offset + a
    new = torch.arange(to, to + b - a, device=held.device)
    old = torch.arange(info.position + a, info.position + b, device=held.device)
    moved = _moved(rotation, stored[:, 0], old, new)
    for layer, target in enumerate(cache):
        target.keys[to : to + b - a] = moved[layer]
        target.values[to : to + b - a] = stored[layer, 1]
    return True


def _moved(rotation: Rotary, keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Keys ``[layer, token, head, dim]`` moved; where all layers have RoPE in one go, as if they were heads."""
    if rotation.skipped_layers:
        return torch.stack([move(rotation, layer, one, old, new) for layer, one in enumerate(keys)])
    layers, tokens, heads, dim = keys.shape
    flat = keys.transpose(0, 1).reshape(tokens, layers * heads, dim)
    return move(rotation, 0, flat, old, new).view(tokens, layers, heads, dim).transpose(0, 1)


def _span(one: Described, device: torch.device) -> Span:
    wanted, info = one.wanted, one.info
    external = None
    if info.external:
        part = np.frombuffer(info.external, dtype="<f2")[wanted.offset : wanted.offset + wanted.stop - wanted.start]
        external = torch.from_numpy(part.astype(np.float32)).to(device)
    return Span(wanted.start, wanted.stop, Capture.EXACT if wanted.exact else Capture(info.capture), external)
