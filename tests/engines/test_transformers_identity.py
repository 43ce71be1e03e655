"""Whatever changes a model's KV makes it another model, when it is changed in use, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from cache_kit import prompt, run

from kvstore.errors import InvalidParams


def test_salts_are_apart(small: Any, attach: Any) -> None:
    ids = prompt(100)
    run(attach(small, salt="a").generate, ids)
    assert attach(small, salt="a").load(ids).loaded_tokens == 96
    assert attach(small, salt="b").load(ids).loaded_tokens == 0
    plain = attach(small)
    assert plain.load(ids).loaded_tokens == 0
    assert plain.load(ids, salt="a").loaded_tokens == 96
    assert "a" not in (plain.load(ids, salt="a").namespace.salt, "")


def test_whatever_changes_kv_changes_the_namespace(small: Any, attach: Any) -> None:
    first = attach(small).namespace
    found = {
        "revision": attach(small, revision="v2").namespace,
        "block_tokens": attach(small, block_tokens=32).namespace,
        "tenant": attach(small, tenant="other").namespace,
        "dtype": attach(copy.deepcopy(small).to(torch.bfloat16)).namespace,
    }
    for field, value in (("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}), ("rms_norm_eps", 1e-4)):
        changed = copy.deepcopy(small.config)
        setattr(changed, field, value)
        other = transformers.LlamaForCausalLM(changed).eval()
        other.load_state_dict(small.state_dict())
        found[field] = attach(other).namespace
    edited = copy.deepcopy(small)
    with torch.no_grad():
        edited.model.layers[1].self_attn.k_proj.weight[3, 5] += 1e-3
    found["weights"] = attach(edited).namespace
    assert len({first, *found.values()}) == len(found) + 1
    assert found["dtype"].dtype == "bfloat16"
    assert found["rope_parameters"].rope != first.rope
    assert attach(copy.deepcopy(small)).namespace == first


def test_weights_changed_after_loading_are_another_model(small: Any, attach: Any) -> None:
    kv = attach(small)
    ids = prompt(100)
    before, _ = run(kv.generate, ids)
    with torch.no_grad():
        small.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    truth, _ = run(small.generate, ids)
    assert run(kv.generate, ids)[0] == truth != before
    assert kv.last.loaded_tokens == 0
    # A change that torch does not count needs a word.
    small.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    known = kv.namespace
    kv.refresh()
    assert kv.namespace != known


def test_weights_changed_while_a_cache_is_in_use(small: Any, attach: Any) -> None:
    kv = attach(small)
    run(kv.generate, prompt(100))
    past, held = kv.load(prompt(100, 5)), kv.load(prompt(100))
    run(small.generate, prompt(100, 5), past_key_values=past)
    with torch.no_grad():
        small.model.norm.weight.mul_(2.0)
    assert "changed since" in past.store().refused
    with pytest.raises(InvalidParams, match="not those"):
        run(small.generate, prompt(100), past_key_values=held)


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, built as PEFT builds them."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: Any, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(base_layer.in_features, 4, bias=False)})
        self.lora_B = torch.nn.ModuleDict({name: torch.nn.Linear(4, base_layer.out_features, bias=False)})
        self.scaling = {name: 1.0}
        self.active_adapters, self.merged_adapters, self.disable_adapters = [name], [], False

    def forward(self, x: Any) -> Any:
        out = self.base_layer(x)
        if not self.disable_adapters:
            for name in self.active_adapters:
                out = out + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return out


def test_adapters_are_part_of_the_identity(small: Any, attach: Any) -> None:
    def adapted(name: str, seed: int) -> tuple[Any, Adapted]:
        model = copy.deepcopy(small)
        attention = model.model.layers[0].self_attn
        attention.k_proj = Adapted(attention.k_proj, name, seed)
        return model.eval(), attention.k_proj

    ids = prompt(100)
    run(attach(small).generate, ids)
    model, layer = adapted("law", 1)
    kv = attach(model)
    assert kv.load(ids).loaded_tokens == 0
    assert kv.namespace.lora.startswith("law@")
    assert kv.namespace.revision == attach(small).namespace.revision
    same, other, renamed = (attach(adapted(*which)[0]).namespace for which in (("law", 1), ("law", 2), ("tax", 1)))
    assert same == kv.namespace
    assert len({same, other, renamed}) == 3
    layer.scaling["law"] = 2.0
    assert kv.load(ids).namespace.lora not in ("", same.lora)
    layer.disable_adapters = True
    assert kv.load(ids).loaded_tokens == 96  # without its adapter it is the plain model


def test_real_peft_adapters(small: Any, attach: Any) -> None:
    peft = pytest.importorskip("peft")
    ids = prompt(100)
    plain = attach(small)
    run(plain.generate, ids)
    torch.manual_seed(0)
    model = peft.get_peft_model(small, peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    kv = attach(model.eval())
    adapted, _ = run(kv.generate, ids)
    assert kv.last.loaded_tokens == 0
    assert kv.last.store.stored == 6
    assert run(kv.generate, ids)[0] == adapted == run(model.generate, ids)[0]
    assert kv.last.loaded_tokens == 96
    with model.disable_adapter():
        assert kv.load(ids).loaded_tokens == 96
        assert kv.load(ids).namespace == plain.namespace
