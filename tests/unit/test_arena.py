"""The arena: whatever is allocated and released in whatever order, every byte is lent once or free."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.errors import ConfigError, InternalError
from kvstore.types import Extent

SLAB = 4 * PAGE_BYTES
DOMAINS = ("uid-1", "uid-2")

Lent = list[tuple[str, tuple[Extent, ...], int]]

sizes = st.one_of(
    st.integers(1, 3 * SLAB),
    st.sampled_from([1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, SLAB, SLAB + 1, 2 * SLAB]),
)
steps = st.lists(
    st.one_of(st.tuples(st.just("allocate"), sizes), st.tuples(st.just("release"), st.integers(0, 1 << 16))),
    max_size=60,
)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(8 * SLAB, SLAB, ahead_bytes=0)
    yield made
    made.close()


def pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES)


def stamp(number: int, nbytes: int) -> bytes:
    """Bytes that tell which allocation they belong to."""
    return (number.to_bytes(4, "little") * (nbytes // 4 + 1))[:nbytes]


def fill(arena: Arena, extents: tuple[Extent, ...], content: bytes) -> None:
    for view in arena.views(extents):
        view[:], content = content[: len(view)], content[len(view) :]


def read(arena: Arena, extents: tuple[Extent, ...]) -> bytes:
    return b"".join(bytes(view) for view in arena.views(extents))


def check(arena: Arena, lent: Lent) -> None:
    arena.check(extent for _, extents, _ in lent for extent in extents)
    assert arena.used() == sum(pages(e.nbytes) for _, extents, _ in lent for e in extents) * PAGE_BYTES
    assert arena.total <= arena.capacity


@given(steps)
def test_nothing_overlaps_and_only_the_sum_decides(todo: list[tuple[str, int]]) -> None:
    """One domain. Each allocation keeps its bytes until released; one fails only where too few pages are free."""
    arena = Arena(8 * SLAB, SLAB, ahead_bytes=0)
    lent: Lent = []
    try:
        for number, (what, value) in enumerate(todo):
            if what == "release" and lent:
                _, extents, stamped = lent.pop(value % len(lent))
                nbytes = sum(e.nbytes for e in extents)
                assert read(arena, extents) == stamp(stamped, nbytes)
                arena.release(extents)
            elif what == "allocate":
                free = arena.free(DOMAINS[0])
                extents = arena.allocate(DOMAINS[0], value)
                assert (extents is None) == (pages(value) * PAGE_BYTES > free)
                if extents is not None:
                    assert sum(e.nbytes for e in extents) == value
                    assert all(e.offset % PAGE_BYTES == 0 for e in extents)
                    assert all(e.nbytes % PAGE_BYTES == 0 for e in extents[:-1])
                    fill(arena, extents, stamp(number, value))
                    lent.append((DOMAINS[0], extents, number))
            check(arena, lent)
        for _, extents, _ in lent:
            arena.release(extents)
        assert arena.free(DOMAINS[0]) == arena.capacity
        assert arena.used() == 0
    finally:
        arena.close()


@given(st.lists(st.tuples(st.sampled_from(DOMAINS), st.sampled_from(["allocate", "release"]), sizes), max_size=60))
def test_two_domains_never_share_a_slab(todo: list[tuple[str, str, int]]) -> None:
    """What fits without eviction is granted, also from slabs that the other domain has wholly freed."""
    arena = Arena(6 * SLAB, SLAB, ahead_bytes=0)
    lent: Lent = []
    owner: dict[int, str] = {}
    try:
        for number, (domain, what, value) in enumerate(todo):
            mine = [entry for entry in lent if entry[0] == domain]
            if what == "release" and mine:
                entry = mine[value % len(mine)]
                lent.remove(entry)
                assert read(arena, entry[1]) == stamp(entry[2], sum(e.nbytes for e in entry[1]))
                arena.release(entry[1])
            elif what == "allocate":
                free = arena.free(domain)
                extents = arena.allocate(domain, value)
                assert extents is not None or pages(value) * PAGE_BYTES > free
                if extents is not None:
                    fill(arena, extents, stamp(number, value))
                    lent.append((domain, extents, number))
                    for extent in extents:
                        assert owner.setdefault(extent.slab, domain) == domain
            check(arena, lent)
    finally:
        arena.close()


def test_a_split_block_holds_its_bytes_in_order(arena: Arena) -> None:
    singles = [arena.allocate("d", PAGE_BYTES) for _ in range(arena.capacity // PAGE_BYTES)]
    for extents in singles[::2]:
        assert extents is not None
        arena.release(extents)
    nbytes = 5 * PAGE_BYTES + 17
    split = arena.allocate("d", nbytes)
    assert split is not None
    assert len(split) == 6
    content = os.urandom(nbytes)
    fill(arena, split, content)
    assert read(arena, split) == content


def test_free_neighbours_join_again(arena: Arena) -> None:
    whole = [arena.allocate("d", PAGE_BYTES) for _ in range(SLAB // PAGE_BYTES)]
    for at in (2, 0, 3, 1):
        arena.release(whole[at] or ())
    extents = arena.allocate("d", SLAB)
    assert extents is not None
    assert len(extents) == 1
    assert arena.total == SLAB


def test_a_wholly_free_slab_changes_domain(arena: Arena) -> None:
    held = [arena.allocate("a", SLAB) for _ in range(8)]
    assert arena.allocate("b", 1) is None
    arena.release(held[3] or ())
    extents = arena.allocate("b", SLAB)
    assert extents is not None
    assert extents[0].slab == 9
    assert arena.slab(held[3][0].slab) is None  # type: ignore[index]
    arena.check([e for h in [*held[:3], *held[4:], extents] for e in h or ()])


def test_a_slab_that_a_client_holds_does_not_change_domain(arena: Arena) -> None:
    held = [arena.allocate("a", SLAB) for _ in range(8)]
    extents = held[0]
    assert extents is not None
    arena.hold(extents[0].slab, session=1)
    arena.release(extents)
    assert arena.allocate("b", 1) is None
    arena.unhold(session=1)
    assert arena.allocate("b", 1) is not None
    assert arena.total <= arena.capacity


def test_slabs_are_sealed(arena: Arena) -> None:
    extents = arena.allocate("d", 1)
    assert extents is not None
    slab = arena.slab(extents[0].slab)
    assert slab is not None
    seals = fcntl.fcntl(slab.fd, fcntl.F_GET_SEALS)
    for seal in (fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW):
        assert seals & seal
    for nbytes in (0, 2 * SLAB):
        with pytest.raises(PermissionError):
            os.ftruncate(slab.fd, nbytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(slab.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(slab.fd)


def test_check_finds_what_is_lent_twice(arena: Arena) -> None:
    extents = arena.allocate("d", 2 * PAGE_BYTES) or ()
    with pytest.raises(InternalError, match="lent twice"):
        arena.check([*extents, Extent(extents[0].slab, PAGE_BYTES, PAGE_BYTES)])
    with pytest.raises(InternalError, match="lent twice"):
        arena.check([*extents, Extent(extents[0].slab, 3 * PAGE_BYTES, PAGE_BYTES)])  # which is free


def test_check_finds_what_is_lost(arena: Arena) -> None:
    extents = arena.allocate("d", SLAB) or ()
    arena.check(extents)
    with pytest.raises(InternalError, match="lost"):
        arena.check([])
    with pytest.raises(InternalError, match="lost"):
        arena.check([extents[0]._replace(nbytes=3 * PAGE_BYTES)])
    with pytest.raises(InternalError, match="does not exist"):
        arena.check([*extents, Extent(99, 0, 1)])


def test_memory_made_ahead_is_usable_at_once() -> None:
    asked: list[str] = []
    arena = Arena(4 * SLAB, SLAB, ahead_bytes=2 * SLAB)
    arena.on_low = asked.append
    try:
        while arena.wants_ahead("d"):
            arena.make_ahead("d")
        assert arena.total == 2 * SLAB
        assert arena.free("d") == arena.capacity
        assert arena.allocate("d", 3 * SLAB) is not None
        assert asked == []
        assert arena.allocate("d", 1) is not None
        assert asked == ["d"]
        assert arena.total <= arena.capacity
    finally:
        arena.close()


def test_slab_size_follows_the_budget() -> None:
    small = Arena(3 * PAGE_BYTES + 5, 64 << 20)
    assert (small.slab_bytes, small.capacity) == (3 * PAGE_BYTES, 3 * PAGE_BYTES)
    uneven = Arena(10 * SLAB - 1, SLAB)
    assert uneven.capacity == 9 * SLAB
    with pytest.raises(ConfigError):
        Arena(PAGE_BYTES - 1)


def test_nothing_grows_after_close(arena: Arena) -> None:
    arena.close()
    assert arena.allocate("d", 1) is None
    arena.close()
