"""A rank that fails while all blend: the others are told, or wait for it and it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.types import Namespace
from kvstore_connectors.base import Tally
from kvstore_connectors.vllm.blend_worker import Blender


class Ended:
    """Chunks on their way; counts how often they were waited for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.count, self._error = 0, error

    def finish(self) -> bool:
        self.count += 1
        if self._error is not None:
            raise self._error
        return True


def ranks_of(monkeypatch: pytest.MonkeyPatch, ranks: int, load: Ended, repair: Any) -> tuple[Any, list[bool]]:
    """A blend of one of several ranks, with a pass of our own; and what this rank told the others."""
    told: list[bool] = []

    def agree(sound: bool) -> bool:
        told.append(sound)
        return sound

    rows: Any = SimpleNamespace(
        device=torch.device("cpu"), layers=1, shape=(1, 8), dtype=torch.float32, engine_block=16
    )
    model: Any = SimpleNamespace(ranks=ranks, agree=agree)
    monkeypatch.setattr(Blender, "_load_exact", lambda *_: [])
    monkeypatch.setattr(Blender, "_gather", lambda *_: SimpleNamespace(load=load))
    monkeypatch.setattr(Blender, "_repair", repair)
    blender = Blender(rows, Namespace(model="m"), Tally(), 1.0, model)
    job: Any = SimpleNamespace(sound=True, table=[4, 5], begin=0, exact=0, tokens=bytes(4 * 32))
    link: Any = None
    return lambda: blender.blend(link, job, lambda _: set()), told


def broken(*_: Any) -> None:
    raise RuntimeError("broken on purpose")


def test_a_rank_that_fails_in_the_middle_ends_since_the_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Ended()
    blend, _ = ranks_of(monkeypatch, 2, load, broken)
    with pytest.raises(SystemExit):
        blend()
    assert load.count == 1
    blend, _ = ranks_of(monkeypatch, 1, load, broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        blend()


def test_a_rank_whose_load_ends_in_an_error_says_so_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    blend, told = ranks_of(monkeypatch, 2, Ended(RuntimeError("broken on purpose")), lambda *_: object())
    assert blend() == {4, 5}
    assert told == [True, False]
