"""Where only the cache is wanted, nothing is computed behind the keys and values of the last layer; it is the same."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from blend_kit import QUESTION, SYSTEM, captured, tiny, usable  # noqa: E402
from torch import Tensor  # noqa: E402

from kvstore_connectors.blend import LayerKV, Work  # noqa: E402
from kvstore_connectors.blend.capture import assemble  # noqa: E402


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_last_layer_ends_at_its_keys_and_values(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    attended: list[int] = []
    attend = model.attend

    def noted(layer: int, *tensors: Tensor) -> Tensor:
        attended.append(layer)
        return attend(layer, *tensors)

    monkeypatch.setattr(model, "attend", noted)
    for selector in usable("system"):
        caches: list[list[LayerKV]] = []
        for kv_only in (False, True):
            prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
            attended.clear()
            for _ in Work(model, prompt, cache, kv_only=kv_only).repair(selector, share):
                pass
            assert (model.layers - 1 in attended) != kv_only
            caches.append(list(cache))
        for whole, short in zip(*caches, strict=True):
            assert torch.equal(whole.keys, short.keys)
            assert torch.equal(whole.values, short.values)
