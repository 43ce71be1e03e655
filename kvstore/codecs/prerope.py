"""prerope: keys turned back to before RoPE, where they have lower rank and quantize better per channel; values
untouched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from kvstore.codecs.base import BlockSpec, BlockStep, Context, need
from kvstore.errors import CannotDecode, CannotEncode
from kvstore.rope import Rotary


@dataclass(frozen=True)
class PreRope(BlockStep):
    """Turn keys back by the block's positions; turn them forward on the way out."""

    name: ClassVar[str] = "prerope"
    keys_only: ClassVar[bool] = True
    lossy: ClassVar[bool] = True  # float32 rounding, far below that of bfloat16

    def reference(self, context: Context) -> str:
        return context.rotary.digest if context.rotary else ""

    def forward(self, unit: torch.Tensor, spec: BlockSpec, layer: int, context: Context) -> torch.Tensor:
        return _turned(unit.clone(), spec, layer, context, back=True)

    def inverse(self, unit: torch.Tensor, spec: BlockSpec, layer: int, context: Context) -> torch.Tensor:
        rotary = context.rotary
        plain = rotary is not None and not rotary.interleaved and not rotary.skipped_layers
        if rotary is None or not plain or 2 * len(rotary.frequencies) != spec.head_dim:
            return _turned(unit, spec, layer, context, back=False)
        cos, sin = _whole_table(rotary, spec.position, spec.tokens, spec.kv_heads)
        keys = unit[:, 0]
        halves = keys.reshape(-1, 2, spec.head_dim // 2).index_select(1, _SWAPPED)
        keys.mul_(cos).addcmul_(halves.view(keys.shape), sin)
        return unit


_SWAPPED = torch.tensor([1, 0])


@lru_cache(maxsize=8)
def _table(rotary: Rotary, position: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary.table(torch.arange(position, position + tokens))


@lru_cache(maxsize=8)
def _whole_table(rotary: Rotary, position: int, tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The table for whole keys ``[token, head, dim]``: long runs are turned at twice the speed of halves of heads."""
    cos, sin = _table(rotary, position, tokens)
    both = torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)
    return both[0][:, None].repeat(1, heads, 1), both[1][:, None].repeat(1, heads, 1)


def _turned(unit: torch.Tensor, spec: BlockSpec, layer: int, context: Context, *, back: bool) -> torch.Tensor:
    rotary = need(context.rotary, "the model's rotation", encoding=back)
    if 2 * len(rotary.frequencies) > spec.head_dim:
        error = CannotEncode if back else CannotDecode
        raise error(f"{2 * len(rotary.frequencies)} rotary dimensions do not fit a head of {spec.head_dim}.")
    table = _table(rotary, spec.position, spec.tokens)
    if not rotary.skipped_layers:
        rotary.turn_(unit[:, 0], table, back=back)
        return unit
    for index in range(spec.layers):
        if layer + index not in rotary.skipped_layers:
            rotary.turn_(unit[index, 0], table, back=back)
    return unit
