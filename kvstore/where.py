"""How much of a prompt each daemon has, for a router: this one by looking, the others by the events they publish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import msgspec

from kvstore.chain import TierChain
from kvstore.errors import InvalidParams, LimitExceeded
from kvstore.keys import PrefixChain, TokenIds, is_digest, namespace_digest
from kvstore.namespaces import NamespaceRegistry
from kvstore.peers import Peer
from kvstore.types import BlockId, Namespace, Scope, TierCode

MAX_KEYS = 4096
"""Blocks of one prompt that are looked at: a million tokens at 256 a block."""

Place = tuple[TierCode, int]
"""Where a block is, and its payload bytes."""


class Held(msgspec.Struct, frozen=True):
    """What of a prompt lies in one tier."""

    blocks: int
    bytes: int


class Score(msgspec.Struct, frozen=True):
    """What one daemon has of a prompt.

    Attributes
    ----------
    daemon, address : str
        Its name, and where its status page is.
    own : bool
        Whether it is the daemon that was asked.
    blocks, tokens : int
        The longest prefix that it has; tokens are 0 where it is not known how many are in a block.
    tiers : dict
        Where those blocks are.
    load_bytes : int
        What would have to be brought up into its memory.
    load_s : float or None
        How long that would take, as far as it has been measured.
    """

    daemon: str
    address: str
    own: bool
    blocks: int
    tokens: int
    tiers: dict[str, Held]
    load_bytes: int
    load_s: float | None = None


class Where:
    """Scores daemons for a prompt. Changes nothing.

    Parameters
    ----------
    chain : TierChain
        What this daemon has.
    namespaces : NamespaceRegistry
        Says how many tokens a block has.
    domain : str
        Trust domain that is asked about: that of the daemon's own user.
    name : str
        What this daemon is called.
    peers : callable
        The other daemons, by name.
    """

    def __init__(
        self,
        chain: TierChain,
        namespaces: NamespaceRegistry,
        domain: str,
        name: str,
        peers: Callable[[], Iterable[tuple[str, Peer]]] = tuple,
    ) -> None:
        self._chain = chain
        self._namespaces = namespaces
        self._domain = domain
        self._name = name
        self._peers = peers
        self.address = ""

    def keys(self, namespace: Namespace | bytes, tokens: TokenIds) -> list[bytes]:
        """Prefix keys of a prompt; raises `InvalidParams` if the daemon cannot tell the size of a block."""
        fields = namespace if isinstance(namespace, Namespace) else self._fields(namespace)
        if fields is None:
            raise InvalidParams(
                "namespace: this digest is not known here, so tokens cannot be cut into blocks.",
                "Give the namespace's fields, or keys instead of tokens.",
            )
        chain = PrefixChain(fields)
        if len(tokens) > MAX_KEYS * fields.block_tokens:
            raise LimitExceeded(f"tokens: {len(tokens)} are more than {MAX_KEYS} blocks.", "Ask for a shorter prefix.")
        chain.extend(tokens)
        return chain.keys

    async def scores(self, namespace: Namespace | bytes, keys: Sequence[bytes]) -> list[Score]:
        """Every daemon that is known, the best one first; one that has nothing counts, too.

        Raises
        ------
        InvalidParams, LimitExceeded
        """
        if len(keys) > MAX_KEYS:
            raise LimitExceeded(f"keys: {len(keys)} are more than {MAX_KEYS}.", "Ask for a shorter prefix.")
        if not all(map(is_digest, keys)):
            raise InvalidParams("keys: each must have 64 hexadecimal digits.", "")
        ns = namespace if isinstance(namespace, bytes) else namespace_digest(namespace)
        fields = namespace if isinstance(namespace, Namespace) else self._fields(ns)
        block_tokens = 0 if fields is None else fields.block_tokens
        scope = Scope(self._domain, ns)
        own = self._score(self._name, self.address, self._locate(scope, keys), block_tokens, own=True)
        scores = [own]
        for name, peer in list(self._peers()):
            scores.append(self._score(name, peer.address, self._theirs(peer, scope, keys), block_tokens))
            await asyncio.sleep(0)  # there may be hundreds
        return sorted(scores, key=lambda score: (-score.blocks, score.load_bytes, not score.own, score.daemon))

    def _fields(self, ns: bytes) -> Namespace | None:
        return self._namespaces.fields(Scope(self._domain, ns))

    def _locate(self, scope: Scope, keys: Sequence[bytes]) -> list[Place]:
        host = self._chain.host.blocks(scope)
        places: list[Place] = []
        for key in keys:
            block = host.get(key)
            place = (TierCode.HOST, block.nbytes) if block is not None else self._below(scope, key)
            if place is None:
                break
            places.append(place)
        return places

    def _below(self, scope: Scope, key: bytes, shared: bool = False) -> Place | None:
        """The nearest lower tier with a block; with `shared` only those that all daemons have."""
        for tier in self._chain.below:
            nbytes = tier.size(BlockId(scope, key)) if not shared or tier.code == TierCode.REDIS else None
            if nbytes is not None:
                return tier.code, nbytes
        return None

    def _theirs(self, peer: Peer, scope: Scope, keys: Sequence[bytes]) -> list[Place]:
        held = [(tier, spaces.get(scope.ns, {})) for tier, spaces in sorted(peer.mirror.tiers.items())]
        places: list[Place] = []
        for key in keys:
            place = next(((tier, blocks[key]) for tier, blocks in held if key in blocks), None)
            place = place or self._below(scope, key, shared=True)
            if place is None:
                break
            places.append(place)
        return places

    def _score(self, name: str, address: str, places: list[Place], block_tokens: int, own: bool = False) -> Score:
        tiers: dict[str, Held] = {}
        for tier in sorted({tier for tier, _ in places}):
            sizes = [nbytes for where, nbytes in places if where == tier]
            tiers[tier.name.lower()] = Held(len(sizes), sum(sizes))
        load_bytes = sum(nbytes for tier, nbytes in places if tier != TierCode.HOST)
        load_s = self._load_s(places) if own else None
        return Score(name, address, own, len(places), len(places) * block_tokens, tiers, load_bytes, load_s)

    def _load_s(self, places: list[Place]) -> float | None:
        """What a load of these blocks would take now; None if it was never measured."""
        below = [(tier, nbytes) for tier, nbytes in places if tier != TierCode.HOST]
        speeds = self._chain.speeds(bytes(sorted({int(tier) for tier, _ in below})))
        if any(int(tier) not in speeds for tier, _ in below):
            return None
        waits = sum(wait_s for wait_s, _, _ in speeds.values())
        return waits + sum(speeds[int(tier)][1] + nbytes * speeds[int(tier)][2] for tier, nbytes in below)
