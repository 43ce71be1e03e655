"""vLLM's own model, opened layer by layer for the blend (`kvstore_connectors.blend.model.Model`).

Its modules compute; only attention does not run through vLLM, since a batch's queries can not be scattered there.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend.attention import attend, column_sums
from kvstore_connectors.blend.prompt import fetched
from kvstore_connectors.blend.varlen import PAGE, Ending, Plan, attend_by_runs, looked_at_by_kernel, merge
from kvstore_connectors.vllm.blend_layers import layer_parts
from kvstore_connectors.vllm.blend_paged import paged_attention
from kvstore_connectors.vllm.blend_varlen import flash_varlen, merge_kernel, reading_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore.rope import Rotary

_LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_REMEDY = "Remove `blend_gate` from kv_connector_extra_config; prefixes are reused without it."


def find_model() -> torch.nn.Module:
    """The model of the runner that is registering its caches, found among those who called.

    Raises
    ------
    ConfigError
        If there is none.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        runner = frame.f_locals.get("self")
        model = getattr(runner, "model", None)
        if isinstance(model, torch.nn.Module) and hasattr(runner, "kv_cache_config"):
            return model
        frame = frame.f_back
    raise ConfigError("blending: this vLLM's model runner is not known.", _REMEDY)


class EngineModel:
    """A decoder of the Llama or Qwen family as vLLM has loaded it, this rank's part of it.

    Parameters
    ----------
    model : Module
        For example `vllm.model_executor.models.llama.LlamaForCausalLM`.
    rotary : Rotary
        As its configuration says.

    Raises
    ------
    ConfigError
        If its layers are not of a kind that is known.
    """

    def __init__(self, model: torch.nn.Module, rotary: Rotary) -> None:
        self.rotary = rotary
        self._outer: Any = getattr(model, "runnable", model)
        self._inner: Any = getattr(self._outer, "model", None)
        self._layers: list[Any] = list(getattr(self._inner, "layers", ()))
        kinds = sorted({type(layer).__name__ for layer in self._layers})
        if not kinds or any(kind not in _LAYERS for kind in kinds):
            what = ", ".join(kinds) or type(model).__name__
            raise ConfigError(
                f"blending: layers of kind {what} are not known; known are {', '.join(_LAYERS)}.", _REMEDY
            )
        attention = self._layers[0].self_attn
        self._heads, self._kv_heads, self._dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.layers = len(self._layers)
        self.scale = float(attention.scaling)
        sample = next(self._inner.parameters())
        kind = (self._heads, self._kv_heads, self._dim, sample.dtype, sample.device)
        self._varlen, self._paged = flash_varlen(*kind), paged_attention(*kind)
        self._reading = reading_kernel(self._varlen, *kind)
        self._parts = layer_parts(self._layers[0], sample.dtype, sample.device)
        self._merge = merge_kernel(self._heads, self._dim, sample.dtype, sample.device) or merge
        nowhere = torch.arange(0)
        self._rows, self._come = nowhere, fetched(nowhere)
        self._plan: Plan | None = None
        self._end: tuple[tuple[int, int], Ending] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads of this rank, and size of a head."""
        return self._kv_heads, self._dim

    @property
    def ranks(self) -> int:
        """How many compute a layer together."""
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group().world_size

    def embed(self, ids: Tensor) -> Tensor:
        """See `Model.embed`."""
        return self._inner.embed_tokens(ids)

    def ready(self, rows: Tensor) -> None:
        """See `Model.ready`: the positions are sent for, while the device has nothing else to finish first."""
        self._rows, self._come, self._plan = rows, fetched(rows), None

    def qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Model.qkv`."""
        module = self._layers[layer]
        attention = module.self_attn
        both, _ = attention.qkv_proj(self._parts.norm(module.input_layernorm, hidden))
        q, k, v = both.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        q, k = q.reshape(-1, self._heads, self._dim), k.reshape(-1, self._kv_heads, self._dim)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q.contiguous()), attention.k_norm(k.contiguous())
        return q, k, v.reshape(-1, self._kv_heads, self._dim)

    def rope(self, layer: int, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Model.rope`; with the engine's own table, by its kernel and in place."""
        rotation = self._layers[layer].self_attn.rotary_emb
        turn = rotation.forward_cuda if keys.is_cuda else rotation.forward_cpu
        turned_queries, turned_keys = turn(positions, queries.flatten(1), keys.flatten(1))
        return turned_queries.view(queries.shape), turned_keys.view(keys.shape)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See `Model.attend`; by the engine's own attention where it can be had."""
        if keys.dtype == queries.dtype and self._paged is not None and len(positions):
            return self._paged(queries, keys, values, positions, self.scale)
        if self._varlen is None or len(keys) % PAGE or keys.dtype != queries.dtype or not len(positions):
            return attend(queries, keys, values, positions, self.scale)
        plan = self._planned(positions)
        return attend_by_runs(self._varlen, queries, keys, values, plan, self.scale, self._merge)

    def _planned(self, positions: Tensor) -> Plan:
        """How positions fall into sequences; the same rows pass one layer after the other."""
        if self._rows is not positions:
            self.ready(positions)
        if self._plan is None:
            self._plan = Plan.of(self._come(), positions.device)
        return self._plan

    def looked_at(self, queries: Tensor, keys: Tensor, tokens: int, values: Tensor | None = None) -> Tensor:
        """See `Model.looked_at`; on a device by kernels, where these can be had."""
        if self._reading is None or len(keys) % PAGE or keys.dtype != queries.dtype:
            return column_sums(queries, keys[:tokens], self.scale, values)
        if self._end is None or self._end[0] != (len(queries), tokens):  # of one prompt in all layers
            self._end = (len(queries), tokens), Ending.of(len(queries), tokens, keys.device)
        return looked_at_by_kernel(self._reading, queries, keys, self._end[1], self.scale, values)

    def post(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `Model.post`."""
        module = self._layers[layer]
        out, _ = module.self_attn.o_proj(attended.contiguous())
        normed, hidden = self._parts.norm_of_sum(module.post_attention_layernorm, out, hidden)
        both, _ = module.mlp.gate_up_proj(normed)
        added, _ = module.mlp.down_proj(self._parts.gate(module.mlp.act_fn, both))
        return added.add_(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self._outer.compute_logits(self._inner.norm(hidden))

    def total(self, scores: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """See `Model.total`."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        if group.world_size == 1:
            return scores
        summed = scores.clone()
        operation = torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(summed, operation, group=group.device_group)
        return summed

    def agree(self, sound: bool) -> bool:
        """Whether all ranks are; a pass that one of them can not begin would leave the others waiting."""
        if self.ranks == 1:
            return sound
        device = next(self._inner.parameters()).device
        return bool(self.total(torch.tensor([float(not sound)], device=device), "max").item() == 0.0)
