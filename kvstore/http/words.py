"""Sentences that the dashboard shows beside a reason or an error code."""

from __future__ import annotations

from kvstore.errors import BY_CODE
from kvstore.types import DropReason, Gone, MissReason

DROPS: dict[str, str] = {
    DropReason.HOST_FULL: "Host memory was full of blocks that are read, pinned or not yet written below.",
    DropReason.OVER_LIMIT: "The limit of its quota rule was reached, and none of its own blocks could leave.",
    DropReason.TOO_LARGE: "The block is larger than the largest the daemon takes.",
    DropReason.UNDECODABLE: "An engine had encoded it in a way that the profile of its namespace does not know.",
    DropReason.IN_FLIGHT: "Another client was storing the same block at that moment.",
    DropReason.EXPIRED: "The client did not finish within the time of its reservation.",
    DropReason.NOT_DURABLE: "It is in memory, but the lower tier could not promise to keep it.",
    DropReason.TIER_FULL: "The tier had no room that it could free.",
    DropReason.TIER_DOWN: "The tier's breaker was open, so it was not asked.",
    DropReason.IO_ERROR: "The medium answered with an error; the daemon's log has it.",
    DropReason.ABORTED: "The client gave up, or its connection ended, before it committed.",
    DropReason.UNREACHABLE: "The client could not reach the daemon.",
}
"""What it means that a block was not stored."""

MISSES: dict[str, str] = {
    MissReason.ABSENT: "Never stored here, or evicted since. This is the ordinary miss.",
    MissReason.CORRUPT: "The stored bytes were damaged; the copy was put aside and not handed out.",
    MissReason.NO_SPACE: "It is in a lower tier, but host memory had no room to bring it up.",
    MissReason.TIER_DOWN: "It is in a tier whose breaker is open.",
    MissReason.DEADLINE: "It did not arrive within the time that the client gave.",
    MissReason.LOST: "It was found at first and gone when it was read.",
}
"""What it means that a block was not handed out."""

GONE: dict[str, str] = {
    "never_stored": "Nothing is remembered of it: never stored here, or gone for long.",
    Gone.EVICTED: "It left to make room for others.",
    Gone.EXPIRED: "It was not used for as long as its quota rule allows.",
    Gone.DROPPED: "Somebody dropped it, or its namespace.",
    Gone.CORRUPT: "Its bytes were damaged; they were put aside and not handed out.",
    Gone.LOST: "Its medium no longer had it.",
}
"""What became of a block that is nowhere."""

UNKNOWN_REASON = "A reason that this version of the page does not know."


def error_words(code: str) -> tuple[str, str]:
    """Name and remedy of an error code."""
    found = BY_CODE.get(code)
    return (found.__name__, found.default_remedy) if found else ("Unknown", "See docs/errors.md.")
