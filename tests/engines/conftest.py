"""Fixtures of the engine tests. They need vLLM; without it there is nothing to collect here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    import torch
    import transformers
    from model import smollm2

    folder = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def small(tiny: Path) -> Any:
    """Two layers of random weights, fresh for each test."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture
def attach(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make connectors of transformers to the module's daemon; each test is a tenant of its own."""
    from cache_kit import SMALL, connected

    from kvstore_connectors.transformers import KVStoreCache

    made: list[KVStoreCache] = []

    def make(model: Any, **options: Any) -> KVStoreCache:
        defaults: dict[str, Any] = {"address": daemon.address, "block_tokens": SMALL, "tenant": request.node.name}
        made.append(connected(KVStoreCache(model, **{**defaults, **options})))
        return made[-1]

    yield make
    for one in made:
        one.close()
