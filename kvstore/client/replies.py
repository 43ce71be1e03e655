"""Replies of the daemon as what callers of the client get."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.client.blocks import Buffer, LeasedBlock, Loaded, as_bytes
from kvstore.errors import InvalidParams, ProtocolError
from kvstore.types import (
    DIGEST_BYTES,
    BlockHeader,
    Dropped,
    DropReason,
    Exists,
    Hit,
    LoadOutcome,
    Miss,
    MissReason,
    Stored,
    StoreOutcome,
    TierCode,
)
from kvstore.wire import messages as m

TIERS = {code.value: code for code in TierCode}


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as they travel; raises `InvalidParams` if one is not a digest or there are too many."""
    joined = b"".join(keys)
    if set(map(len, keys)) - {DIGEST_BYTES}:
        raise InvalidParams(f"keys: each must be {DIGEST_BYTES} bytes.", "")
    if len(keys) > m.MAX_KEYS:
        raise InvalidParams(f"keys: {len(keys)} are more than the {m.MAX_KEYS} of one request.", "")
    return joined


def codes(reply: m.LookupReply, asked: int) -> list[TierCode]:
    """Tiers of a lookup's answer; raises `ProtocolError` if it is none to this question."""
    if len(reply.tiers) > asked:
        raise ProtocolError("a lookup was answered for more keys than it named.")
    try:
        return [TIERS[code] for code in reply.tiers]
    except KeyError as error:
        raise ProtocolError(f"a lookup was answered with the unknown tier {error}.") from None


def speeds(replies: Sequence[m.LookupReply]) -> dict[TierCode, tuple[float, float, float]]:
    """What loads cost from the lower tiers that some lookups named; what this client has no name for is passed over."""
    return {TIERS[code]: speed for reply in replies for code, speed in reply.speeds.items() if code in TIERS}


def outcome_of(status: str) -> StoreOutcome:
    """What became of an offered block; raises `ValueError` for words that there are not."""
    if status == "stored":
        return Stored()
    if status == "exists":
        return Exists()
    return Dropped(DropReason(status))


def target(block: LeasedBlock, into: Buffer | None) -> memoryview:
    """Where a block is copied to: the caller's buffer, which has to fit, or a new one."""
    if into is None:
        return memoryview(bytearray(block.nbytes))
    view = as_bytes(into, writable=True)
    if len(view) != block.nbytes:
        raise InvalidParams(f"into: a buffer of {len(view)} bytes was given for a block of {block.nbytes}.", "")
    return view


def outcome(block: LeasedBlock | Miss, target: memoryview | None, keep: bool) -> Loaded | LoadOutcome:
    """What the caller gets of a block; with `keep` its bytes, too."""
    if isinstance(block, Miss) or target is None:
        return block if isinstance(block, Miss) else Miss(MissReason.LOST)
    header = block.header or BlockHeader()
    return Loaded(target.obj, header, block.tier) if keep else Hit(header, block.nbytes)  # type: ignore[arg-type]
