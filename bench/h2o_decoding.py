"""H2O decoding against full attention: what a budget of tokens costs in KL, in exact answers, and in time a token.

The same contexts, the same text behind them, token by token; then questions whose answers stand in the context
(`bench/codec_tasks.py` makes them), decoded greedily.

    python bench/h2o_decoding.py MODEL --tasks tasks.json --tasks-model DIR --out bench/results/h2o_decoding.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import texts
import torch
from common import arguments, finish
from transformers import AutoModelForCausalLM, DynamicCache

from kvstore.codecs.h2o import H2O
from kvstore_connectors.transformers.calibrate import cut, half_width
from kvstore_connectors.transformers.h2o import HeavyHitterCache

FOLLOWING = 32
ANSWER = 12
WAYS = {
    "50 %, mean by visibility": (0.5, True),
    "50 %, sum": (0.5, False),
    "25 %, mean by visibility": (0.25, True),
    "25 %, sum": (0.25, False),
}


def rule(share: float, tokens: int) -> H2O:
    """A budget of a share of the context, a quarter of it for recent tokens."""
    budget = int(share * tokens)
    return H2O(budget, recent=budget // 4)


@torch.no_grad()
def stepwise(model: Any, past: Any, tokens: list[int], following: list[int]) -> tuple[torch.Tensor, float]:
    """Log-probabilities after each token that follows, and seconds a token."""
    model(torch.tensor([tokens]), past_key_values=past, use_cache=True, logits_to_keep=1)
    began = time.perf_counter()
    logits = [model(torch.tensor([[t]]), past_key_values=past, use_cache=True).logits[0, 0] for t in following]
    return torch.stack(logits).log_softmax(-1), (time.perf_counter() - began) / len(following)


def natural(model: Any, contexts: int, tokens: int, halves: Any) -> dict[str, Any]:
    """KL to full attention on real texts."""
    samples = cut(halves[1], -(-contexts // 4), (tokens, tokens), FOLLOWING, seed=5)
    kl: dict[str, list[float]] = {way: [] for way in WAYS}
    top1: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in ("full attention", *WAYS)}
    for sample in samples:
        full, took = stepwise(model, DynamicCache(config=model.config), sample.tokens, sample.following)
        seconds["full attention"].append(took)
        for way, (share, by_visibility) in WAYS.items():
            with HeavyHitterCache(model, rule(share, tokens), by_visibility=by_visibility) as past:
                found, took = stepwise(model, past, sample.tokens, sample.following)
            seconds[way].append(took)
            kl[way].append(float((full.exp() * (full - found)).sum(-1).mean()))
            top1[way].append(float((full.argmax(-1) == found.argmax(-1)).float().mean()))
    return {
        "contexts": len(samples),
        "tokens": tokens,
        "ms_a_token": {way: 1e3 * mean(took) for way, took in seconds.items()},
        "ways": {
            way: {"kl": mean(kl[way]), "kl_interval": half_width(kl[way]), "top1": mean(top1[way])} for way in WAYS
        },
    }


@torch.no_grad()
def answers(model: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of questions answered exactly; the context is cut down before the question comes."""
    right: dict[str, list[bool]] = {way: [] for way in ("full attention", *WAYS)}
    for task in tasks:
        context = torch.tensor([task["context"]])
        for way in right:
            if way == "full attention":
                right[way].append(_answered(model, DynamicCache(config=model.config), context, task))
                continue
            share, by_visibility = WAYS[way]
            cache = HeavyHitterCache(model, rule(share, context.shape[1]), by_visibility=by_visibility)
            with cache as past:
                right[way].append(_answered(model, past, context, task))
    return {way: mean(map(float, each)) for way, each in right.items()} | {"questions": len(tasks)}


def _answered(model: Any, past: Any, context: torch.Tensor, task: dict[str, Any]) -> bool:
    model(context, past_key_values=past, use_cache=True, logits_to_keep=1)
    fed, said = task["question"], []
    for _ in task["answer"][:ANSWER]:
        logits = model(torch.tensor([fed]), past_key_values=past, use_cache=True, logits_to_keep=1).logits[0, -1]
        fed = [int(logits.argmax())]
        said += fed
    return said == task["answer"][:ANSWER]


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--tasks-model")
    parser.add_argument("--questions", type=int, default=30)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    results: dict[str, Any] = {
        "natural": natural(model, args.contexts, args.tokens, texts.tokenized(texts.encoder(args.model)))
    }
    if args.tasks is not None:
        tuned = AutoModelForCausalLM.from_pretrained(
            args.tasks_model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        results["answers"] = answers(tuned, json.loads(args.tasks.read_text())[: args.questions])
    found, told = results["natural"], results.get("answers", {})
    rows = [("full attention", "0", "", "1.000", f"{found['ms_a_token']['full attention']:.0f}",
             told.get("full attention", ""))]  # fmt: skip
    rows += [
        (way, f"{c['kl']:.4f}", f"{c['kl_interval']:.4f}", f"{c['top1']:.3f}", f"{found['ms_a_token'][way]:.0f}",
         told.get(way, ""))
        for way, c in found["ways"].items()
    ]  # fmt: skip
    finish(args, "h2o_decoding", results, ("budget of the context", "KL", "±", "top-1", "ms/token", "exact"), rows)


if __name__ == "__main__":
    main()
