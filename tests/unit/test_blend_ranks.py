"""Ranks that hold a part of the heads each choose the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blend_kit import QUESTION, SYSTEM, captured, repaired, tiny
from torch import Tensor

from kvstore_connectors.blend import LayerKV, Work
from kvstore_connectors.blend.attention import attend, column_sums
from kvstore_connectors.blend.capture import assemble
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.selectors.planner import SELECTORS


@pytest.mark.parametrize("name", ["v-deviation", "k-deviation", "question", "initial", "relay"])
def test_shards_choose_the_same_tokens(name: str) -> None:
    """Scores of two head shards, summed as `total` does, choose what the whole model chooses."""
    model = tiny()
    _, whole = repaired(model, "isolated", SELECTORS[name], 0.3)
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    barrier = Meeting(2)
    works = [Work(Shard(model, rank, barrier), prompt, shard(cache, rank)) for rank in (0, 1)]
    barrier.run([lambda w=w: [None for _ in w.repair(SELECTORS[name], 0.3)] for w in works])
    for work in works:
        assert torch.equal(work.changed, whole.changed)
        assert torch.equal(work.rows, whole.rows)
        torch.testing.assert_close(work.hidden, whole.hidden, rtol=1e-4, atol=1e-4)


def shard(cache: Any, rank: int) -> list[LayerKV]:
    return [LayerKV(held.keys[:, rank : rank + 1].clone(), held.values[:, rank : rank + 1].clone()) for held in cache]


class Meeting:
    """Threads that exchange tensors: every rank gives one and gets all."""

    def __init__(self, ranks: int) -> None:
        self._given: list[Tensor] = [torch.empty(0)] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def all(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self._given[rank] = tensor
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def run(self, parts: list[Callable[[], Any]]) -> None:
        with ThreadPoolExecutor(len(parts)) as pool:
            for done in [pool.submit(part) for part in parts]:
                done.result()


class Shard:
    """One of two ranks: KV head ``rank`` and its three query heads."""

    def __init__(self, model: Llama, rank: int, meeting: Meeting) -> None:
        self._model, self._rank, self._meeting = model, rank, meeting
        self.layers, self.scale, self.rotary = model.layers, model.scale, model.rotary
        self.ready, self.embed, self.rope, self.logits = model.ready, model.embed, model.rope, model.logits

    def qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._model.qkv(layer, hidden)
        r = self._rank
        return q[:, 3 * r : 3 * r + 3], k[:, r : r + 1], v[:, r : r + 1]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        return attend(queries, keys, values, positions, self.scale)

    def looked_at(self, queries: Tensor, keys: Tensor, tokens: int, values: Tensor | None = None) -> Tensor:
        return column_sums(queries, keys[:tokens], self.scale, values)

    def post(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        return self._model.post(layer, hidden, torch.cat(self._meeting.all(self._rank, attended), 1))

    def total(self, scores: Tensor, how: str) -> Tensor:
        given = torch.stack(self._meeting.all(self._rank, scores))
        return given.sum(0) if how == "sum" else given.amax(0)
