"""Rotary position embedding as arithmetic: the frequencies of a model, and keys turned back and forth.

Keys are turned in float32 with angles made in float64: float32 angles are off by an ulp of 0.0156 rad at position
131,072. A turn has unit magnitude always: YaRN's attention factor is in the stored key already and stays there.
Variants whose frequencies depend on the running length (dynamic NTK, LongRoPE) are refused, since a key turned under
one regime cannot be turned back under another.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rotary:
    """How a model turns its keys.

    Attributes
    ----------
    frequencies : tuple of float
        One angle a position for each rotary pair; twice as many dimensions are turned, the others pass through.
    interleaved : bool
        Whether pair i is (2i, 2i+1), as in GPT-J, or (i, i + pairs), as in NeoX and Llama.
    skipped_layers : frozenset of int
        Layers without positions (NoPE), which are not turned.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    skipped_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.frequencies or not all(math.isfinite(f) for f in self.frequencies):
            raise ConfigError("rotary frequencies must be finite and at least one.", "Check the model's RoPE settings.")

    @property
    def digest(self) -> str:
        """Identity of the rotation: two keys may be mixed only if it is equal."""
        return _digest(self)

    def table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines in float32, ``[token, pair]``, of these positions (or differences of positions)."""
        import torch

        rates = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        angles = positions.to(torch.float64)[:, None] * rates
        return angles.cos().float(), angles.sin().float()

    def turn(self, keys: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], *, back: bool = False) -> torch.Tensor:
        """Turn keys ``[token, head, dim]`` by a table made with `table`, in float32; ``back`` undoes it."""
        import torch

        return self.turn_(keys.to(torch.float32, copy=True), table, back=back)

    def turn_(
        self, keys: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], *, back: bool = False
    ) -> torch.Tensor:
        """As `turn`, in place: keys ``[…, token, head, dim]`` in float32."""
        pairs = len(self.frequencies)
        if keys.shape[-1] < 2 * pairs:
            raise ConfigError(
                f"{2 * pairs} rotary dimensions do not fit a head of {keys.shape[-1]}", "Check the RoPE settings."
            )
        cos, sin = table[0][:, None, :], table[1][:, None, :]
        if back:
            sin = -sin
        turned = keys[..., : 2 * pairs]
        first, second = (
            (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else (turned[..., :pairs], turned[..., pairs:])
        )
        new = (first * cos).sub_(second * sin)
        second.mul_(cos).addcmul_(first, sin)
        first.copy_(new)
        return keys


@lru_cache(maxsize=64)
def _digest(rotary: Rotary) -> str:
    text = struct.pack(f"<?{len(rotary.frequencies)}d", rotary.interleaved, *rotary.frequencies)
    return hashlib.sha256(text + repr(sorted(rotary.skipped_layers)).encode()).hexdigest()[:32]


def rotary(config: Mapping[str, Any]) -> Rotary:
    """The rotation of a model from the fields of its Hugging Face configuration.

    Parameters
    ----------
    config : mapping
        ``rope_theta``, ``rope_scaling`` (or ``rope_parameters``), ``head_dim`` or ``hidden_size`` and
        ``num_attention_heads``, ``partial_rotary_factor``, ``max_position_embeddings``, ``no_rope_layers``.
    """
    scaling = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    share = float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
    dims = int(head * share) // 2 * 2
    theta = float(scaling.get("rope_theta", config.get("rope_theta") or 10_000.0))
    plain = [theta ** (-i / dims) for i in range(0, dims, 2)]
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind == "default":
        found = plain
    elif kind == "linear":
        found = [f / float(scaling["factor"]) for f in plain]
    elif kind == "llama3":
        found = [_llama3(f, scaling) for f in plain]
    elif kind == "yarn":
        found = _yarn(plain, theta, dims, scaling, config)
    else:
        raise ConfigError(
            f"RoPE of kind {kind!r} depends on the running length, so keys cannot be turned back",
            "Use chains that keep keys as they are: raw, lossless or fp8.",
        )
    used = config.get("no_rope_layers") or ()  # despite its name: 1 where a layer has RoPE
    skipped = frozenset(i for i, has in enumerate(used) if not has)
    return Rotary(tuple(found), bool(config.get("rope_interleave", False)), skipped)


def _llama3(frequency: float, scaling: Mapping[str, Any]) -> float:
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    old = float(scaling["original_max_position_embeddings"])
    wave = 2 * math.pi / frequency
    if wave < old / high:
        return frequency
    if wave > old / low:
        return frequency / factor
    smooth = (old / wave - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(
    plain: list[float], theta: float, dims: int, scaling: Mapping[str, Any], config: Mapping[str, Any]
) -> list[float]:
    factor = float(scaling["factor"])
    old = float(scaling.get("original_max_position_embeddings") or config["max_position_embeddings"])

    def turns_at(turns: float) -> float:
        return dims * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns_at(float(scaling.get("beta_fast") or 32)), turns_at(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if high == low else 0
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
    return [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
