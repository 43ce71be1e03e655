"""Fixtures of the SGLang tests. They need SGLang; without it there is nothing to collect here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

AVAILABLE = importlib.util.find_spec("sglang") is not None
collect_ignore_glob = [] if AVAILABLE else ["test_*.py"]

if AVAILABLE:
    sys.path.insert(1, str(Path(__file__).parents[1] / "engines"))
    import stubs
    from kit import Daemon, set_environment

    set_environment()
    stubs.install()

    @pytest.fixture(scope="module")
    def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
        """A daemon for the tests of a module that do it no harm; host memory only."""
        made = Daemon(tmp_path_factory.mktemp("kv"))
        made.start()
        yield made
        made.stop()

    @pytest.fixture
    def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
        """A daemon with a disk tier for one test, to be killed and stopped."""
        made = Daemon(tmp_path, disk=True)
        made.start()
        yield made
        made.stop()

    @pytest.fixture
    def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
        """Makes backends that are closed at the end; parameters as of `pools.backend`."""
        import pools

        made: list[Any] = []

        def one(*args: Any, **how: Any) -> Any:
            made.append(pools.backend(*args, **how))
            return made[-1]

        yield one
        for each in made:
            each.close()
