"""The gate and the wishes: what is read from files and requests, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.errors import ConfigError, InvalidParams
from kvstore.types import Namespace
from kvstore_connectors.vllm import blend_gate
from kvstore_connectors.vllm.blend_gate import Gate, Verdict, read_verdict, why_closed
from kvstore_connectors.vllm.blend_scheduler import default_wish
from kvstore_connectors.vllm.blend_wish import Wish, read_wish

HERE = Namespace(model="m", revision="r")
GOOD = Verdict(
    model="m", revision="r", share=0.15, selector="auto", prompts=8, kl=0.05, top1=0.95, most_kl=0.1, least_top1=0.9
)


@pytest.mark.parametrize(
    ("fields", "share", "says"),
    [
        ({}, 0.15, ""),
        ({}, 0.5, ""),
        ({}, 0.1, "share"),
        ({"model": "other"}, 0.15, "model"),
        ({"revision": "other"}, 0.15, "model"),
        ({"kl": 0.2}, 0.15, "failed"),
        ({"kl": float("nan")}, 0.15, "failed"),
        ({"top1": 0.5}, 0.15, "failed"),
        ({"prompts": 0}, 0.15, "failed"),
    ],
)
def test_what_opens_the_gate(fields: dict[str, Any], share: float, says: str) -> None:
    reason = why_closed(msgspec.structs.replace(GOOD, **fields), HERE, share)
    assert says in reason
    assert bool(reason) == bool(says)


def test_a_file_that_is_no_verdict(tmp_path: Path) -> None:
    file = tmp_path / "verdict.json"
    with pytest.raises(ConfigError, match="read"):
        read_verdict(str(file))
    file.write_text('{"passed": true}')
    with pytest.raises(ConfigError, match="no verdict"):
        Gate(str(file))


def test_a_verdict_that_comes_changes_or_goes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_gate, "LOOK_S", 0.0)
    file = tmp_path / "verdict.json"
    gate = Gate(str(file))
    assert "no verdict" in gate.why_closed(HERE, 0.15)
    file.write_bytes(msgspec.json.encode(GOOD))
    assert gate.why_closed(HERE, 0.15) == ""
    assert gate.reach is None  # as of those that were written before it was measured
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(GOOD, kl=1.0, reach=24)))
    os.utime(file, ns=(1, 1))
    assert "failed" in gate.why_closed(HERE, 0.15)
    assert gate.reach == 24
    file.write_text("{")
    os.utime(file, ns=(2, 2))
    assert "no verdict" in gate.why_closed(HERE, 0.15)
    file.unlink()
    assert "no verdict" in gate.why_closed(HERE, 0.15)


def test_a_request_overrides_what_it_names() -> None:
    default = Wish(share=0.2, separator=[7])
    assert read_wish(None, default) == default
    assert read_wish({"other": {}}, default) == default
    assert read_wish({"kvstore": {"blend": True}}, default) == Wish(blend=True, share=0.2, separator=[7])


@pytest.mark.parametrize(
    "said",
    [[], 1, {"blnd": True}, {"blend": 1}, {"share": 1.5}, {"spans": [[1]]}, {"spans": [[-1, 2]]}, {"labels": [""]},
     {"amount": "all"}, {"separator": [1 << 31]}, {"spans": [[0, 1]] * 5000}],
)  # fmt: skip
def test_a_request_that_is_not_understood(said: Any) -> None:
    with pytest.raises(InvalidParams):
        read_wish({"kvstore": said}, Wish())


def test_the_servers_amount() -> None:
    assert default_wish(0.2, "auto", "", "loading", blend=True, capture=False).amount == "loading"
    with pytest.raises(ConfigError, match="blend_amount"):
        default_wish(0.2, "auto", "", "all", blend=True, capture=False)


def test_the_servers_separator() -> None:
    assert default_wish(0.1, "auto", "198, 198", blend=True, capture=False).separator == [198, 198]
    with pytest.raises(ConfigError, match="token ids"):
        default_wish(0.1, "auto", "# #", blend=True, capture=False)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        default_wish(1.1, "auto", "", blend=True, capture=False)
