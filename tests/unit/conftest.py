"""Fixtures of unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from client_kit import Face, MakeFace
from daemons import DaemonProcess
from houses import House, Houses

from kvstore.tiers.base import Tier


@pytest.fixture
async def houses() -> AsyncIterator[Houses]:
    """Makes small stores, and looks at the end whether all was given back."""
    made: list[House] = []

    def make(*below: Tier, **how: Any) -> House:
        made.append(House(*below, **how))
        return made[-1]

    yield make
    for house in made:
        await house.settle()
        house.host.check()
        assert house.host.dirty_bytes == house.host.leased_bytes == 0
        assert house.chain._arrivals == {}
        assert house.chain._forgotten == set()
        await house.chain.close()


@pytest.fixture(params=["sync", "async"])
async def make_face(request: pytest.FixtureRequest) -> AsyncIterator[MakeFace]:
    """Makes clients of one face."""
    made: list[Face] = []

    def make(address: str, **how: Any) -> Face:
        made.append(Face(request.param == "async", address, **how))
        return made[-1]

    yield make
    for face in made:
        await face.close()


@pytest.fixture
async def face(make_face: MakeFace, shared_daemon: DaemonProcess) -> Face:
    """A client of the shared daemon."""
    return make_face(shared_daemon.socket)
