"""Reuse of KV at any position: moving chunks, choosing what to recompute among them, recomputing it. Pure torch.

How a connector repairs a prompt:

>>> rotation = movable(config)                     # refuses models whose keys cannot be moved      # doctest: +SKIP
>>> prompt = Prompt(ids, spans, exact=256)         # which positions have cached KV                 # doctest: +SKIP
>>> keys[a:b] = move(rotation, layer, stored, old_positions, new_positions)                         # doctest: +SKIP
>>> work = Work(model, prompt, cache, wait_layer)                                                   # doctest: +SKIP
>>> for _ in work.repair(planner(prompt), 0.15):   # one step a layer; stop and go on as you like   # doctest: +SKIP
...     pass
>>> work.hidden, work.rows, work.changed, work.cost                                                 # doctest: +SKIP

It brings three things.

`model.Model`
    The decoder opened between projections and attention: ``layers, scale, rotary, embed, qkv, rope, attend, post,
    logits``, and ``total``, which sums (or takes the maximum of) scores over tensor parallel ranks, so that all choose
    the same tokens.
`prompt.Cache`
    A `LayerKV` a layer, ``[n, kv_heads, dim]``; rows are positions of the prompt, and there may be more of them. Keys
    are rotated for those positions. Rows of spans and of the exact prefix hold loaded KV, the others anything. Repaired
    rows are written in place, and other rows of their chunks may be moved by what these tell (`carried`); exact ones
    never change.
``wait_layer(layer)``
    Called once before a layer is first read, in order; returns when its rows have come. What it raises ends the work:
    the cache is then half repaired and must be thrown away, the prompt recomputed.

A `work.Selector` has one method, ``repair(work, count)``: an iterator that runs passes over the layers (``work.steps``)
until the rows without cached KV and about ``count`` of the others are recomputed. It yields once for every layer of
every pass, knows no engine, and is deterministic, so ranks in lock-step stay so. Selectors that read the question need
it in the prompt: give all token ids, or all but the last.

What is recomputed sees true causal positions. When all of a prompt is recomputed the result is full prefill.
"""

from kvstore_connectors.blend.prompt import Cache, Capture, LayerKV, Prompt, Span
from kvstore_connectors.blend.rope import movable, move
from kvstore_connectors.blend.selectors.planner import planner, selector_for, selector_named
from kvstore_connectors.blend.work import Selector, Work

__all__ = ["Cache", "Capture", "LayerKV", "Prompt", "Selector", "Span", "Work", "movable", "move", "planner"]
__all__ += ["selector_for", "selector_named"]
