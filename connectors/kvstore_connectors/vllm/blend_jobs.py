"""What a step tells the workers of blending: prompts to blend, spans to capture. Plain data: it crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore_connectors.blend.amount import Amount
from kvstore_connectors.vllm.identity import Scope


class BlendSpan(NamedTuple):
    """Tokens `start` to `stop` of a prompt, to be taken from a stored chunk.

    Attributes
    ----------
    offset : int
        Tokens at the start of the chunk that are not wanted: the engine has them.
    keys : dict of bytes to bytes
        Key of the chunk's last block, by namespace digest of each rank.
    exact : bool
        The chunk was computed behind exactly the tokens that are before it here.
    """

    start: int
    stop: int
    offset: int
    keys: dict[bytes, bytes]
    exact: bool


@dataclass
class BlendJob:
    """A prompt whose KV is put together from chunks.

    Attributes
    ----------
    tokens : bytes
        Token ids up to the end of what was promised, int32 little-endian.
    hashes : list of bytes
        vLLM's hash of each kvstore block to load exactly, in front of the first chunk.
    skip : int
        Engine blocks at the start of the first of these that the engine has.
    begin : int
        Tokens that the engine had by itself; from here on KV is promised.
    exact : int
        Tokens in front whose KV is exact: the engine's own, and those of `hashes`.
    table : list of int
        The request's engine blocks from token 0 on, as far as `tokens` reach.
    share : float
        Share of reused tokens to compute again.
    selector : str
        How they are chosen.
    amount : {"share", "loading"}
        That share, or what loading takes time for, but no less than that share.
    reach : int or None
        Layers in which the model reads chunks, if that was measured.
    sound : bool
        False if the promise can not be kept: all is computed.
    """

    request: str
    scope: Scope
    tokens: bytes
    hashes: list[bytes]
    skip: int
    begin: int
    exact: int
    table: list[int]
    spans: list[BlendSpan]
    share: float
    selector: str
    amount: Amount = "share"
    reach: int | None = None
    sound: bool = True


@dataclass
class CaptureJob:
    """A span of a prompt whose exact KV is in the engine's cache, to be stored as a chunk.

    Attributes
    ----------
    tokens : bytes
        Token ids of the prompt up to the end of the span, int32 little-endian.
    start : int
        First token of the span.
    table : list of int
        The request's engine blocks from token 0 on.
    lineage : list of bytes
        Content keys of the chunks before it.
    labels : tuple of str
    hashes : dict of int to bytes
        vLLM's hash of blocks of the chunk that are stored under a prefix, too, by place.
    """

    request: str
    scope: Scope
    tokens: bytes
    start: int
    table: list[int]
    lineage: list[bytes] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    hashes: dict[int, bytes] = field(default_factory=dict)
