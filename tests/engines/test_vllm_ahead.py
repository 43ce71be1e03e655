"""Slabs are pinned in the background, new ones too, and a driver that refuses ends it with a word."""

from __future__ import annotations

import logging
import mmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import eventually

from kvstore.errors import DeviceUnavailable
from kvstore.types import Namespace
from kvstore_connectors.vllm import ahead, worker
from kvstore_connectors.vllm.device_pages import DevicePages
from kvstore_connectors.vllm.jobs import ConnectorMeta

CUDA = torch.device("cuda", 1)


def slab() -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, 8 * mmap.PAGESIZE), np.uint8)


def test_slabs_are_pinned_as_they_appear(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    there, pinned = [slab()], []

    def pin(one: np.ndarray, device: torch.device) -> Any:
        assert device == CUDA
        if len(pinned) == 4:
            raise DeviceUnavailable("no more memory can be pinned.", "")
        if not any(one is other for other in pinned):
            pinned.extend([one, one])
            yield

    monkeypatch.setattr(ahead, "LOOK_S", 0.01)
    monkeypatch.setattr(ahead.host, "ahead", pin)
    link = SimpleNamespace(close=lambda: None, run=lambda _, work: work(SimpleNamespace(map_all=lambda: list(there))))
    made = ahead.Ahead(link, CUDA)  # type: ignore[arg-type]
    assert eventually(lambda: len(pinned) == 2)
    with caplog.at_level(logging.WARNING):
        there.append(slab())
        assert eventually(lambda: not made._thread.is_alive())
    assert len(pinned) == 4
    assert "not pinned ahead" in caplog.text
    made.close()


def test_pinning_begins_when_the_engine_has_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """While CUDA graphs are captured no thread may register memory; the handshake comes after that."""
    made: list[Any] = []
    monkeypatch.setattr(worker, "Ahead", lambda *args: made.append(args) or args)
    side = worker.WorkerSide.__new__(worker.WorkerSide)
    pages = DevicePages.__new__(DevicePages)
    pages.device = CUDA
    pages.stored_nbytes = lambda _: 1  # type: ignore[method-assign]
    side._pages, side._saver, side._ahead, side._block_tokens = pages, None, None, 16
    side._namespace, side._ahead_link = Namespace(model="m"), SimpleNamespace()  # type: ignore[assignment]
    assert not made
    assert side.handshake() is not None
    assert made == [(side._ahead_link, CUDA)]
    side.begin(ConnectorMeta())
    assert len(made) == 1
