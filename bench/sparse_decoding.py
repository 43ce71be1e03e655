"""Decoding that reads a part of the context against full attention: H2O, ShadowKV, Squeezed Attention.

The same contexts, whose KV is computed once; the same text behind them, token by token: KL, top-1, bytes of keys,
values and index that a step reads, time a token. Then questions whose answers stand in the context
(`bench/codec_tasks.py` makes them): the question comes token by token, too, and the answer is decoded greedily.

    python bench/sparse_decoding.py MODEL --state DIR --tasks tasks.json --tasks-model DIR \
        --out bench/results/sparse_decoding.json

What is measured is written down context by context; the same command goes on where the last one stopped, and several
may run at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import texts
import torch
from codec_state import State
from common import arguments, finish
from transformers import AutoModelForCausalLM, DynamicCache

from kvstore.codecs.clusters import Squeezed
from kvstore.codecs.h2o import H2O
from kvstore_connectors.transformers.attention import Detour
from kvstore_connectors.transformers.calibrate import Sample, cut, half_width
from kvstore_connectors.transformers.h2o import HeavyHitterCache
from kvstore_connectors.transformers.probe import Probe
from kvstore_connectors.transformers.shadow import ShadowCache, ShadowKV
from kvstore_connectors.transformers.squeezed import SqueezedCache

FOLLOWING = 32
ANSWER = 12
FULL = "full attention"


def _h2o(share: float, recent: float = 0.25, **options: bool) -> Callable[[Any, int], Any]:
    """A budget of a share of the context, a share of that for recent tokens."""

    def made(model: Any, tokens: int) -> HeavyHitterCache:
        budget = int(share * tokens)
        return HeavyHitterCache(model, H2O(budget, recent=int(recent * budget), sinks=4), **options)

    return made


def _shadow(share: float, rank: int) -> Callable[[Any, int], Any]:
    return lambda model, tokens: ShadowCache(model, ShadowKV(budget=int(share * tokens), rank=rank))


def _squeezed(sparsity: int, coarse: int = 0) -> Callable[[Any, int], Any]:
    return lambda model, tokens: SqueezedCache(model, Squeezed(sparsity=sparsity, coarse=coarse))


WAYS: dict[str, Callable[[Any, int], Any]] = {
    FULL: lambda model, tokens: DynamicCache(config=model.config),
    "H2O, 50 %, by sum, half recent": _h2o(0.5, 0.5, by_visibility=False),
    "H2O, 50 %": _h2o(0.5),
    "H2O, 25 %": _h2o(0.25),
    "ShadowKV, 25 %, rank 16 %": _shadow(0.25, 16),
    "ShadowKV, 25 %, rank 50 %": _shadow(0.25, 50),
    "ShadowKV, 10 %, rank 50 %": _shadow(0.10, 50),
    "Squeezed, 50 % left out": _squeezed(50),
    "Squeezed, 70 % left out": _squeezed(70),
    "Squeezed, 70 % left out, 10 of it by groups": _squeezed(70, 10),
    "Squeezed, 90 % left out": _squeezed(90),
}


def primed(past: Any, block: torch.Tensor, queries: list[torch.Tensor]) -> None:
    """Bring a cache to where a first pass over the context would have brought it."""
    scale = block.shape[-1] ** -0.5
    for layer, (keys, values) in enumerate(block.transpose(2, 3)):
        past.update(keys[None].clone(), values[None].clone(), layer)
        if isinstance(past, HeavyHitterCache):
            past.layers[layer].attended(queries[layer])
        elif not isinstance(past, DynamicCache):
            past.layers[layer].index(queries[layer], scale)
    if isinstance(past, ShadowCache | SqueezedCache):
        past.complete()


def read(past: Any) -> int:
    """Bytes that the last step read."""
    if isinstance(past, DynamicCache):
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in past.layers)
    return past.touched


def context(probe: Probe, tokens: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """KV of a context, and the queries of each layer, in one pass."""
    queries: list[torch.Tensor] = []

    def seen(inner: Any, module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        queries.append(query[0].transpose(0, 1))
        return inner(module, query, *rest, **options)

    with Detour(probe.model, seen, "sdpa"):
        return probe.prefill(tokens), queries


class Entered:
    """A primed cache, entered if it is to be."""

    def __init__(self, past: Any, block: torch.Tensor, queries: list[torch.Tensor]) -> None:
        self._past = past
        primed(past, block, queries)

    def __enter__(self) -> Any:
        return self._past if isinstance(self._past, DynamicCache) else self._past.__enter__()

    def __exit__(self, *exc: object) -> None:
        if not isinstance(self._past, DynamicCache):
            self._past.__exit__(*exc)


@torch.no_grad()
def natural(probe: Probe, tokens: list[int], following: list[int]) -> dict[str, Any]:
    """By way: divergence from full attention, bytes a step, milliseconds a token."""
    block, queries = context(probe, tokens)
    found: dict[str, Any] = {}
    full = torch.zeros(0)
    for way, make in WAYS.items():
        with Entered(make(probe.model, len(tokens)), block, queries) as past:
            began, logits, nbytes = time.perf_counter(), [], []
            for token in following:
                out = probe.model(torch.tensor([[token]], device=probe.device), past_key_values=past, use_cache=True)
                logits.append(out.logits[0, 0].float().cpu())
                nbytes.append(read(past))
            took = time.perf_counter() - began
        logs = torch.stack(logits).log_softmax(-1)
        full = logs if way == FULL else full
        found[way] = {
            "kl": max(0.0, float((full.exp() * (full - logs)).sum(-1).mean())),
            "top1": float((full.argmax(-1) == logs.argmax(-1)).float().mean()),
            "bytes": mean(nbytes),
            "ms": 1e3 * took / len(following),
        }
    return found


@torch.no_grad()
def answered(probe: Probe, task: dict[str, Any]) -> dict[str, float]:
    """By way: whether the answer comes out exactly."""
    block, queries = context(probe, task["context"])
    found = {}
    for way, make in WAYS.items():
        with Entered(make(probe.model, len(task["context"])), block, queries) as past:
            fed, said = list(task["question"]), []
            for step in range(len(fed) + len(task["answer"][:ANSWER]) - 1):
                ids = torch.tensor([[fed[step]]], device=probe.device)
                out = probe.model(ids, past_key_values=past, use_cache=True)
                if step >= len(task["question"]) - 1:
                    said.append(int(out.logits[0, -1].argmax()))
                    fed.append(said[-1])
        found[way] = float(said == task["answer"][:ANSWER])
    return found


def measured(probe: Probe, sample: Sample) -> dict[str, Any]:
    """What `natural` finds, and on what."""
    return {
        "kind": sample.kind, "tokens": len(sample.tokens), "ways": natural(probe, sample.tokens, sample.following)
    }  # fmt: skip


def started(path: str) -> Probe:
    """A model in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return Probe(model.to(device))


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("--state", type=Path, required=True, help="folder of what was measured so far")
    parser.add_argument("--tokens", type=Path, help="tokenized texts (bench/texts.py)")
    parser.add_argument("--per-kind", type=int, default=5, help="contexts of each of the four kinds (default 5)")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest context (default 4000)")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--tasks-model")
    parser.add_argument("--questions", type=int, default=36)
    parser.add_argument("--seed", type=int, default=9, help="of the places in the texts (default 9)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    args = parser.parse_args()
    state = State(args.state, args.seconds)
    probe = started(args.model)
    halves = texts.load(args.tokens) if args.tokens else texts.tokenized(texts.encoder(args.model))
    by_kind = cut(halves[1], args.per_kind, (1000, args.longest), FOLLOWING, args.seed)
    samples = [by_kind[kind + i] for i in range(args.per_kind) for kind in range(0, len(by_kind), args.per_kind)]
    state.every({f"natural-{n:03}": partial(measured, probe, sample) for n, sample in enumerate(samples)})
    if args.tasks is not None:
        tuned, wanted = started(args.tasks_model), json.loads(args.tasks.read_text())[: args.questions]
        state.every({f"answers-{n:03}": partial(answered, tuned, task) for n, task in enumerate(wanted)})
    show(args, state.all("natural"), state.all("answers"))


def show(args: Any, texted: list[dict[str, Any]], asked: list[dict[str, float]]) -> None:
    """Print the table, write the JSON."""
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "contexts": [(one["kind"], one["tokens"]) for one in texted],
    }
    rows = []
    for way in WAYS:
        found = [one["ways"][way] for one in texted]
        kl, top1 = ([one[name] for one in found] for name in ("kl", "top1"))
        share = mean(one["ways"][way]["bytes"] / one["ways"][FULL]["bytes"] for one in texted)
        right = [one[way] for one in asked if way in one]
        exact = mean(right) if right else None
        results[way] = {
            "kl": mean(kl), "kl_interval": half_width(kl), "kl_worst": max(kl),
            "top1": mean(top1), "top1_interval": half_width(top1),
            "bytes_share": share, "bytes_a_step": mean(one["bytes"] for one in found),
            "ms_a_token": mean(one["ms"] for one in found),
            "exact": exact, "exact_interval": half_width(right) if right else None, "questions": len(right),
            "by_context": kl,
        }  # fmt: skip
        rows.append(
            (way, f"{100 * share:.0f} %", f"{mean(kl):.4f}", f"{half_width(kl):.4f}", f"{mean(top1):.3f}",
             "" if exact is None else f"{100 * exact:.0f} %", f"{results[way]['ms_a_token']:.0f}")
        )  # fmt: skip
    finish(args, "sparse_decoding", results, ("way", "bytes", "KL", "±", "top-1", "exact", "ms/token"), rows)


if __name__ == "__main__":
    main()
