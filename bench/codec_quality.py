"""What each chain of codecs costs a model: bytes against the next-token distribution, on real texts of four kinds.

Bases are fitted on one half of the texts; form and steps are chosen on contexts of that half that the fit has not seen;
only then is the other half looked at. Each block goes through the product's own encoder and decoder.

    python bench/codec_quality.py MODEL --out bench/results/codec_quality.json
    python bench/codec_quality.py MODEL --tokens tokens.npz --tasks tasks.json --tasks-model OTHER …

``--tasks`` are questions whose answer must come out exactly (`bench/codec_tables.py` says the format).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import codec_tables as tables
import texts
import torch
from common import arguments, finish
from transformers import AutoModelForCausalLM

from kvstore.codecs import Chain, Context, parse
from kvstore.codecs.basis import Basis
from kvstore_connectors.transformers.calibrate import Reference, cut, fit, measure
from kvstore_connectors.transformers.codec_eval import mean_attention, pca
from kvstore_connectors.transformers.probe import Probe

FORMS = ((1, False), (5, False), (5, True))
STEPS = (5, 10, 20, 40)
FIXED = (
    "raw", "lossless", "fp8", "kv4",
    "prerope|kv4(k=8,v=8)", "prerope|kv4(k=8,v=4)", "prerope|kv4", "prerope|kv4|zstd", "prerope|kv4(k=4,v=3)",
    "prerope|kv4(k=3,v=3)", "prerope|kv4(k=2,v=2)",
    "prerope|mikv(hi=8,lo=4)", "prerope|mikv(hi=4,lo=2)", "prerope|lowrank(rank=50)", "prerope|lowrank(rank=50,v=4)",
)  # fmt: skip
TARGET = 0.012
MARGIN = 0.75
"""Share of the target that a chain may cost on the held-out calibration texts to be chosen for it."""


def started(path: str, device: str) -> Probe:
    """A model in float32, so that nothing but the codec differs."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return Probe(model.to(device))


def choose(probe: Probe, bases: list[Basis], half: texts.Documents, threads: int, contexts: int) -> dict[str, Any]:
    """The form of the basis with the fewest bytes at a divergence, on held-out calibration texts, and its curve."""
    samples = cut(half, contexts, (1000, 1500), 64, seed=77)
    chains: dict[str, Chain] = {}
    for (span, joint), basis in zip(FORMS, bases, strict=True):
        chains |= {f"{span},{joint},{step}": parse(pca(basis, step)) for step in STEPS}
    context = Context(rotary=probe.rotary, bases={b.digest: b for b in bases})
    found = measure([Reference(probe, s) for s in samples], chains, context, threads=threads)
    curves = {label: cost.summary() for label, cost in found.items()}
    best = max(
        (label for label in curves if curves[label]["kl"] <= TARGET * MARGIN),
        key=lambda label: curves[label]["ratio"],
        default=next(iter(curves)),
    )
    return {"chosen": best, "held_out": curves}


def within(costs: Mapping[str, Mapping[str, float]], chains: Mapping[str, Chain]) -> dict[str, Chain]:
    """The lossy chains that would pass the gate, and the first that would not."""
    lossy = sorted((costs[label]["kl"], label) for label, chain in chains.items() if chain.lossy)
    good = [label for _, label in lossy if costs[label]["kl"] + costs[label]["kl_interval"] <= TARGET]
    return {
        label: chains[label] for label in [*good, *(label for _, label in lossy if label not in good)][: len(good) + 1]
    }


def main() -> None:
    """Fit, choose, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=Path, help="tokenized texts (bench/texts.py)")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--tasks-model")
    parser.add_argument("--per-kind", type=int, default=6, help="contexts of each of the four kinds (default 6)")
    parser.add_argument("--calibration", type=int, default=10, help="contexts of each kind to fit on (default 10)")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest context (default 4000)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="leave out what would begin after so long")
    parser.add_argument("--bases", type=Path, help="folder to keep the chosen basis in")
    args = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    probe = started(args.model, device)
    halves = texts.load(args.tokens) if args.tokens else texts.tokenized(texts.encoder(args.model))
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}

    def done(stage: str) -> None:
        results.setdefault("seconds", {})[stage] = round(time.monotonic() - began, 1)
        print(stage, results["seconds"][stage], flush=True)
        if args.out is not None:
            args.out.with_suffix(".part.json").write_text(json.dumps(results))

    samples = cut(halves[0], args.calibration, (768, 768), 256, seed=1)
    bases = fit(probe, samples, FORMS, model="bench", revision="")
    results["bases"] = {f"{s},{j}": len(b.to_bytes()) for (s, j), b in zip(FORMS, bases, strict=True)}
    results["model_bytes"] = sum(2 * p.numel() for p in probe.model.parameters())
    done("fit")
    results |= choose(probe, bases, halves[0], args.threads, 1)
    done("choose")
    span, joint, _ = results["chosen"].split(",")
    basis = bases[FORMS.index((int(span), joint == "True"))]
    if args.bases is not None:
        args.bases.mkdir(parents=True, exist_ok=True)
        (args.bases / f"{basis.digest}.basis").write_bytes(basis.to_bytes())
    steps = (5, 10, 15, 20, 30, 40, 80)
    names = {name: name for name in FIXED} | {f"pca(step={step})": pca(basis, step) for step in steps}
    layers = probe.shape.layers
    names |= {
        f"minicache({start} %, {bits} bits)": f"prerope|minicache(layers={layers},start={start},bits={bits})"
        for start, bits in ((50, 4), (87, 8))
    }
    context = Context(rotary=probe.rotary, bases={basis.digest: basis})
    references = [Reference(probe, s) for s in cut(halves[1], args.per_kind, (1000, args.longest), 64, seed=5)]
    results["contexts"] = [(r.sample.kind, len(r.sample.tokens)) for r in references]
    chains = {label: parse(name) for label, name in names.items()}
    costs = measure(references, chains, context, importance=mean_attention, threads=args.threads)
    results["chains"] = {label: cost.summary(costs["raw"]) for label, cost in costs.items()}
    results["by_context"] = {label: cost.kl for label, cost in costs.items()}
    done("chains")
    for stage, run in {
        "tasks": lambda: (
            tables.tasks(args, started(args.tasks_model, device), within(results["chains"], chains), context)
            if args.tasks
            else {}
        ),
        "tensors": lambda: tables.tensors(references[:: max(1, len(references) // 8)], bases, FORMS),
        "eviction": lambda: tables.evictions(references[:: max(1, len(references) // 8)]),
    }.items():
        if time.monotonic() - began < args.seconds:
            results[stage] = run()
            done(stage)
    show(args, results)


def show(args: Any, results: Mapping[str, Any]) -> None:
    """Print the tables, and write the JSON."""
    rows = [
        (label, f"{c['ratio']:.2f}", f"{c['kl']:.4f}", f"{c['kl_interval']:.4f}", f"{c['top1']:.3f}", f"{c['nll']:.3f}",
         f"{c['encode_gib_s']:.2f}", f"{c['decode_gib_s']:.2f}", results.get("tasks", {}).get(label, ""))
        for label, c in results["chains"].items()
    ]  # fmt: skip
    for name in ("tensors", "eviction"):
        rows += [(f"{name}: {label}", "", f"{mean(v):.4f}", *[""] * 6) for label, v in results.get(name, {}).items()]
    finish(args, "codec_quality", results, ("chain", "smaller", "KL", "±", "top-1", "NLL", "enc", "dec", "tasks"), rows)


if __name__ == "__main__":
    main()
