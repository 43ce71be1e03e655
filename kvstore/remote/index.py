"""Which blocks are in Redis: an index there that daemons change by script, and a copy of it here that needs no I/O.

Under one hash tag lie a hash (block to what it takes), a sorted set (block to last use: what leaves first), the sum of
bytes, and a stream of what was stored and removed. A daemon reads the hash once and then follows the stream; numbers in
it tell when it fell behind, and then it reads the hash again. The copy may be a moment old: a block it does not know
yet is a miss, one that is gone already is a miss when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from kvstore.remote.record import part_count
from kvstore.types import BlockId, Scope

_DIGEST = 32
WRITING_S = 60
"""A block that is being written may not leave; one whose writer died may, so many seconds later."""

_HEAD = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local function tell(kind, member, value)
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', 100000, '*',
    'n', redis.call('INCR', KEYS[5]), 'o', ARGV[1], 'k', kind, 'm', member, 'v', value)
end
local function take_out(member)
  local value = redis.call('HGET', KEYS[1], member)
  if not value then return false end
  redis.call('HDEL', KEYS[1], member)
  redis.call('ZREM', KEYS[2], member)
  redis.call('DECRBY', KEYS[3], string.match(value, '^%d+'))
  tell('removed', member, value)
  return value
end
"""

RESERVE = (
    _HEAD
    + """
local member, cost, capacity = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if redis.call('HEXISTS', KEYS[1], member) == 1 then return {'exists'} end
local need = tonumber(redis.call('GET', KEYS[3]) or '0') + cost - capacity
local gone, out, first, many = {}, {'room'}, 0, 4
local function look()
  local oldest = redis.call('ZRANGE', KEYS[2], first, first + many - 1, 'WITHSCORES')
  for i = 1, #oldest, 2 do
    local used = tonumber(oldest[i + 1])
    if used > now or (need <= 0 and used > now - tonumber(ARGV[6])) then return false end
    local value = redis.call('HGET', KEYS[1], oldest[i])
    if value then need = need - tonumber(string.match(value, '^%d+')) end
    gone[#gone + 1] = oldest[i]
  end
  first, many = first + many, 4 * many
  return #oldest > 0 and #gone < 4096
end
while look() do end
if need > 0 then return {'full'} end
for _, other in ipairs(gone) do
  local value = take_out(other)
  if value then out[#out + 1] = other; out[#out + 1] = value end
end
redis.call('HSET', KEYS[1], member, ARGV[5])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[7]), member)
redis.call('INCRBY', KEYS[3], cost)
return out
"""
)
"""Room for one block: what leaves for it (longest unused first; expired ones too), or 'exists', or 'full'."""

COMMIT = (
    _HEAD
    + """
if #KEYS > 5 and redis.call('EXISTS', unpack(KEYS, 6)) < #KEYS - 5 then return 0 end
if redis.call('HGET', KEYS[1], ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('ZADD', KEYS[2], ARGV[4] == '' and now or ARGV[4], ARGV[2])
tell('stored', ARGV[2], ARGV[3])
return 1
"""
)
"""Tell everybody of a block, used now or, given that, at another time. 0 if it was evicted, or if any of the values
that are named behind the index is not there."""

OLDEST = _HEAD + "return redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[2])"
"""Blocks unused for longest, without those that are pinned or being written."""

TAKE = (
    _HEAD
    + """
local used = redis.call('ZSCORE', KEYS[2], ARGV[2])
if redis.call('HGET', KEYS[1], ARGV[2]) ~= ARGV[3] or not used or tonumber(used) > now then return {} end
take_out(ARGV[2])
return {ARGV[3], used}
"""
)
"""Take one write of a block out, unless it is pinned, so that one daemon may write it anew; its value and last use."""

REMOVE = (
    _HEAD
    + """
local out = {}
for i = 3, #ARGV do
  local value = redis.call('HGET', KEYS[1], ARGV[i])
  if value and (ARGV[2] == '' or ARGV[2] == value) then
    take_out(ARGV[i])
    out[#out + 1] = ARGV[i]; out[#out + 1] = value
  end
end
return out
"""
)
"""Take blocks out, all or those that are one write; those that were there, with what they took."""

TOUCH = (
    _HEAD
    + """
for i = 2, #ARGV, 3 do
  if ARGV[i + 2] == '0' then redis.call('ZADD', KEYS[2], 'XX', 'GT', now + tonumber(ARGV[i + 1]), ARGV[i])
  else redis.call('ZADD', KEYS[2], 'XX', now + tonumber(ARGV[i + 1]), ARGV[i]) end
end
return 1
"""
)
"""Note uses and pins: member, seconds from now, whether it also may move back. A time to come is a pin."""


class Place(NamedTuple):
    """What the index knows of a block: bytes of the budget, payload bytes, write id."""

    cost: int
    nbytes: int
    write: int

    def pack(self) -> bytes:
        """As the value of the hash; the cost first, which the scripts read."""
        return f"{self.cost}:{self.nbytes}:{self.write:016x}".encode()

    @classmethod
    def unpack(cls, value: bytes) -> Place | None:
        """Out of a value of the hash; None if it is not one."""
        fields = value.split(b":") if len(value) < 80 else []
        try:
            place = cls(int(fields[0]), int(fields[1]), int(fields[2], 16))
        except (IndexError, ValueError):
            return None
        return place if len(fields) == 3 and min(place) >= 0 else None


def cost_of(nbytes: int) -> int:
    """Bytes of the budget that a block takes: payload, record, index, and what Redis adds to each value."""
    return nbytes + 1024 + 128 * part_count(nbytes)


class Names:
    """The keys of one deployment."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        tag = "{" + prefix + "}"
        self.index = [f"{tag}:blocks", f"{tag}:used", f"{tag}:bytes", f"{tag}:log", f"{tag}:seq"]
        self.blocks, _, self.sum, self.log, self.seq = self.index
        self.about = f"{tag}:about"

    def record(self, member: bytes) -> str:
        """Key of a block's record."""
        return f"{self._tag(member)}:r"

    def parts(self, member: bytes, place: Place) -> list[str]:
        """Keys of a block's parts, of one write."""
        tag = self._tag(member)
        return [f"{tag}:{place.write:016x}:{number}" for number in range(part_count(place.nbytes))]

    def _tag(self, member: bytes) -> str:
        return self._prefix + ":{" + hashlib.sha256(member).hexdigest()[:32] + "}"


def member_of(block: BlockId, domain: str) -> bytes:
    """A block as a member of the index; `domain` is what its domain is called there."""
    return domain.encode() + block.scope.ns + block.key


def block_of(member: bytes, domain: str) -> BlockId | None:
    """The block of a member, in the domain called `domain` here; None if it is not one."""
    if len(member) <= 2 * _DIGEST:
        return None
    return BlockId(Scope(domain, member[-2 * _DIGEST : -_DIGEST]), member[-_DIGEST:])


def domain_of(member: bytes) -> str:
    """What a member's domain is called in Redis."""
    return member[: -2 * _DIGEST].decode(errors="replace")


class Mirror:
    """The copy of the index."""

    def __init__(self) -> None:
        self.scopes: dict[Scope, dict[bytes, Place]] = {}
        self.used = 0
        self.count = 0

    def find(self, block: BlockId) -> Place | None:
        """What is known of a block."""
        return self.scopes.get(block.scope, {}).get(block.key)

    def blocks(self) -> Iterator[BlockId]:
        """All that are known."""
        return (BlockId(scope, key) for scope, keys in self.scopes.items() for key in keys)

    def add(self, block: BlockId, place: Place) -> None:
        """A block is there, in place of what was known of it before."""
        self.remove(block)
        self.scopes.setdefault(block.scope, {})[block.key] = place
        self.used += place.cost
        self.count += 1

    def remove(self, block: BlockId, write: int | None = None) -> bool:
        """A block is gone; with `write` only if it is that write of it. Whether it was known."""
        blocks = self.scopes.get(block.scope, {})
        place = blocks.get(block.key)
        if place is None or (write is not None and place.write != write):
            return False
        del blocks[block.key]
        if not blocks:
            del self.scopes[block.scope]
        self.used -= place.cost
        self.count -= 1
        return True
