"""What the scheduler's side knows of each request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.types import TierCode
from kvstore_connectors.choice import Choice
from kvstore_connectors.vllm.identity import Scope
from kvstore_connectors.vllm.lookups import Query


@dataclass(slots=True)
class Tracked:
    """What is known of a request from its arrival to its end.

    Attributes
    ----------
    query : Query or None
        The lookup of its blocks.
    n_local : int
        Tokens that the engine had by itself when it last asked.
    loading : list of int
        Engine blocks of the last load, to recognise it when blocks are reported as failed.
    engine_ids : list of int
        The request's block table.
    computed : int
        Tokens that are computed after the last step in which the request was looked at; -1 before.
    due : int
        Step in which it is to be looked at again.
    saved : int
        kvstore blocks from the start that need no save.
    present : int
        Blocks, bitwise, that the daemon was known to have.
    given_up : bool
        A load failed: this request computes for itself.
    private : bool
        Its KV may stem from weights that are gone: it is not stored.
    sources : list of TierCode
        Where the blocks of the last promise are.
    choice : Choice or None
        How much of what the daemon has is loaded, as last decided.
    matched : list of TierCode
        Where the blocks are that were decided about.
    taken : Choice or None
        The choice that the engine goes by.
    """

    request: Any
    scope: Scope
    query: Query | None = None
    n_local: int = 0
    loading: list[int] = field(default_factory=list)
    engine_ids: list[int] = field(default_factory=list)
    computed: int = -1
    due: int = 0
    saved: int = 0
    present: int = 0
    given_up: bool = False
    private: bool = False
    sources: list[TierCode] = field(default_factory=list)
    choice: Choice | None = None
    taken: Choice | None = None
    matched: list[TierCode] = field(default_factory=list)
