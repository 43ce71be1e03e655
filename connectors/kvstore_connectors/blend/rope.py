"""Moving the keys of a chunk to another position, where that is exact; a refusal with its reason where it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError
from kvstore.rope import Rotary, rotary

if TYPE_CHECKING:
    from torch import Tensor

_REFUSED = {
    "dynamic": "dynamic NTK stretches its frequencies with the running length",
    "longrope": "LongRoPE switches its factors with the running length",
    "su": "LongRoPE switches its factors with the running length",
    "mrope": "M-RoPE has three positions a token, and an image moves them apart",
}


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why chunks of this model cannot be moved; None where they can.

    Parameters
    ----------
    config : mapping
        Fields of the model's Hugging Face configuration.
    """
    scaling = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if "mrope_section" in scaling:
        kind = "mrope"
    if kind in _REFUSED:
        return _REFUSED[kind]
    if config.get("position_embedding_type", "rotary") in ("absolute", "relative_key", "relative_key_query"):
        return "absolute positions are inside the hidden states and cannot be taken out of a key"
    if "rope_theta" not in config and "rope_theta" not in scaling and "rotary_emb_base" not in config:
        return "the model names no rotary frequencies: its positions are absolute or unknown"
    return None


def movable(config: Mapping[str, Any]) -> Rotary:
    """The rotation that moves this model's keys.

    Raises
    ------
    ConfigError
        If moving would not be exact; the message says why.
    """
    reason = refusal(config)
    if reason is not None:
        raise ConfigError(f"chunks of this model cannot be moved: {reason}", "Use exact prefix reuse for this model.")
    return rotary(config)


def move(rotation: Rotary, layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Keys ``[token, head, dim]`` stored for positions ``old``, turned once, in float32, for positions ``new``.

    The turn has unit magnitude: YaRN's attention factor is in the stored key and stays. Keys that do not move keep
    their bytes.
    """
    if layer in rotation.skipped_layers or bool((old == new).all()):
        return keys
    return rotation.turn(keys, rotation.table(new - old)).to(keys.dtype)


class Turning:
    """How a model turns its queries and keys, in plain torch: `Model.ready` and `Model.rope`.

    Parameters
    ----------
    config : mapping
        Fields of the model's Hugging Face configuration.

    Raises
    ------
    ConfigError
        As `movable`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.rotary = movable(config)
        self._magnitude = attention_factor(config)
        self._rows: Tensor | None = None
        self._table: Any = None

    def ready(self, rows: Tensor) -> None:
        """Make the table of these positions: the same rows pass one layer after the other."""
        self._rows, self._table = rows, self.rotary.table(rows)

    def rope(self, layer: int, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both turned; unchanged in layers without positions."""
        if layer in self.rotary.skipped_layers:
            return queries, keys
        if positions is not self._rows:
            self.ready(positions)
        return self._turned(queries), self._turned(keys)

    def _turned(self, rows: Tensor) -> Tensor:
        turned = self.rotary.turn(rows, self._table)
        return (turned if self._magnitude == 1 else turned * self._magnitude).to(rows.dtype)


def attention_factor(config: Mapping[str, Any]) -> float:
    """Magnitude of a model's rotation: 1 but for YaRN, whose cosines and sines carry a factor."""
    scaling = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, low, high = float(scaling["factor"]), scaling.get("mscale_all_dim"), scaling.get("mscale")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return magnitude(float(high)) / magnitude(float(low)) if high and low else magnitude(1.0)
