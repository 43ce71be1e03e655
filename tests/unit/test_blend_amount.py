"""The loading controller: what is computed again takes no longer than the loading, and no less than was asked for."""

from __future__ import annotations

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend import Capture, LayerKV, Prompt, Span
from kvstore_connectors.blend.amount import Controller, chunk_bytes, hidden_share

TOKENS, LAYERS = 400, 4
PROMPT = Prompt(torch.zeros(TOKENS + 20, dtype=torch.int64), (Span(10, TOKENS + 10, Capture.ISOLATED),))
CACHE = [LayerKV(*(torch.zeros(TOKENS + 20, 2, 8) for _ in range(2))) for _ in range(LAYERS)]
BYTES = TOKENS * LAYERS * 2 * 2 * 8 * 4


def test_bytes_are_those_of_the_spans() -> None:
    assert chunk_bytes(PROMPT.spans, CACHE) == BYTES


@pytest.mark.parametrize(
    ("load_s", "compute_s", "share"),
    [(0.077, 0.125, 0.616), (0.0107, 0.125, 0.15), (1.0, 0.125, 0.9), (1.0, 0.0, 0.15), (0.0, 1.0, 0.15)],
)
def test_the_share_is_what_loading_takes_of_computing_all(load_s: float, compute_s: float, share: float) -> None:
    assert hidden_share(load_s, compute_s, 0.15, 0.9) == pytest.approx(share)


@pytest.mark.parametrize(("least", "most"), [(-0.1, 1.0), (0.5, 0.4), (0.5, 1.1)])
def test_bounds_that_make_no_sense(least: float, most: float) -> None:
    with pytest.raises(ConfigError):
        hidden_share(1.0, 1.0, least, most)


def measured(bytes_per_s: float, rows_per_s: float, *, call_s: float = 0.0) -> Controller:
    """A controller that has seen loads and repairs of several sizes."""
    controller = Controller()
    for part in (4, 2, 3, 1, 4):
        controller.loaded(BYTES // part, BYTES // part / bytes_per_s + call_s)
        controller.repaired(TOKENS * LAYERS // part, TOKENS * LAYERS // part / rows_per_s + call_s)
    return controller


def test_until_both_speeds_are_known_the_least_is_taken() -> None:
    controller = Controller()
    assert controller.share(PROMPT, CACHE, 0.2) == 0.2
    controller.loaded(BYTES, 10.0)
    assert controller.share(PROMPT, CACHE, 0.2) == 0.2
    controller.repaired(TOKENS * LAYERS, 20.0)
    assert controller.share(PROMPT, CACHE, 0.2) == pytest.approx(0.5, rel=0.01)


def test_slow_loads_leave_time_for_more() -> None:
    shares = [measured(BYTES / s, TOKENS * LAYERS).share(PROMPT, CACHE, 0.1) for s in (0.01, 0.3, 0.6, 5.0)]
    assert shares == pytest.approx([0.1, 0.3, 0.6, 1.0], rel=0.02)
    assert measured(BYTES / 5.0, TOKENS * LAYERS).share(PROMPT, CACHE, 0.1, 0.65) == 0.65


def test_what_a_call_costs_whatever_its_size_is_told_apart() -> None:
    """A slow first byte is time to compute in; the fixed cost of a repair is there at any share."""
    share = measured(BYTES / 0.2, TOKENS * LAYERS, call_s=0.1).share(PROMPT, CACHE, 0.1)
    assert share == pytest.approx(0.3, rel=0.03)


def test_speeds_that_change_are_followed() -> None:
    controller = measured(BYTES / 0.8, TOKENS * LAYERS)
    for _ in range(60):
        controller.loaded(BYTES, 0.2)
    assert controller.share(PROMPT, CACHE, 0.1) == pytest.approx(0.2, rel=0.1)


def test_what_tells_nothing_is_not_learned() -> None:
    controller = measured(BYTES / 0.3, TOKENS * LAYERS)
    before = controller.share(PROMPT, CACHE, 0.1)
    for _ in range(50):
        controller.loaded(0, 9.0)
        controller.repaired(0, 9.0)
    assert controller.share(PROMPT, CACHE, 0.1) == before
