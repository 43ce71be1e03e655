"""The transformers connector reads leased blocks on its device where the daemon has them there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import LeasedBlock
from kvstore.types import Miss, Namespace, TierCode
from kvstore_connectors.base import Tally
from kvstore_connectors.transformers.layout import Layout
from kvstore_connectors.transformers.transfers import Transfers

LAYOUT = Layout(layers=2, kv_heads=2, head_dim=8, block_tokens=4, dtype=torch.float32)
CPU, META = torch.device("cpu"), torch.device("meta")


class FakeLease:
    """A lease of blocks that hold one thing in host memory and another on a device."""

    id = 1

    def __init__(self, blocks: list[LeasedBlock | Miss], valid: bool) -> None:
        self.blocks = blocks
        self._valid = valid

    def valid(self) -> bool:
        return self._valid

    def __enter__(self) -> FakeLease:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class FakeLink:
    """Answers every operation with the same blocks."""

    def __init__(self, near: torch.Tensor | None, valid: bool = True) -> None:
        host = np.full(LAYOUT.nbytes // 4, 1.0, np.float32).view(np.uint8)
        self._lease = FakeLease([LeasedBlock(0, LAYOUT.nbytes, TierCode.GPU, [host], None, near)], valid)

    def run(self, operation: str, work: Any) -> Any:
        return work(self)

    def lookup_many(self, queries: Any) -> Any:
        return [[TierCode.HOST] for _ in queries]

    def lease(self, keys: Any, **how: Any) -> FakeLease:
        return self._lease


def load(link: FakeLink) -> tuple[list[Any], int]:
    transfers = Transfers(link, LAYOUT, Tally(), 1.0)  # type: ignore[arg-type]
    return transfers.load(Namespace(model="m"), [[b"k" * 32]], CPU)


@pytest.mark.parametrize(("where", "read"), [(CPU, 2.0), (META, 1.0), (None, 1.0)])
def test_it_reads_on_the_same_device_only(where: torch.device | None, read: float) -> None:
    near = None if where is None else torch.full((LAYOUT.nbytes // 4,), 2.0, device=where).view(torch.uint8)
    kv, blocks = load(FakeLink(near))
    assert blocks == 1
    assert all(bool((tensor == read).all()) for pair in kv for tensor in pair)


def test_what_a_lease_that_ran_out_gave_counts_for_nothing() -> None:
    near = torch.full((LAYOUT.nbytes // 4,), 2.0).view(torch.uint8)
    assert load(FakeLink(near, valid=False))[1] == 0
