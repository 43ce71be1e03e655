"""Fixtures of the engine tests. They need vLLM; without it there is nothing to collect here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import Daemon, set_environment

set_environment()

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines start slowly, so these tests have a longer time limit."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(240))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for the tests of a module, host tier only."""
    made = Daemon(tmp_path_factory.mktemp("kvstore"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Directory of the tiny random model."""
    from model import tiny_llama

    return tiny_llama()
