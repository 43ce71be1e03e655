"""What each chain of codecs costs a model: bytes against the next-token distribution, on real texts of four kinds.

Bases are fitted on one half of the texts; form and steps are chosen on contexts of that half that the fit has not seen;
only then is the other half looked at. Each block goes through the product's own encoder and decoder.

    python bench/codec_quality.py MODEL --state DIR --out bench/results/codec_quality.json --plot docs/img/codecs.svg
    python bench/codec_quality.py MODEL --state DIR --tokens tokens.npz --tasks tasks.json --tasks-model OTHER …

What is measured is written down context by context; the same command goes on where the last one stopped, several may
run at a time (``--part 0/2``, ``--part 1/2``), and each prints what there is. ``--tasks`` are questions whose answer
must come out exactly (`bench/codec_tables.py` says the format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import codec_tables as tables
import texts
import torch
from codec_state import State
from common import arguments, finish
from transformers import AutoModelForCausalLM

from kvstore.cli import codec_plot
from kvstore.codecs import Chain, Context, parse
from kvstore.codecs.basis import Basis, load_basis
from kvstore_connectors.transformers.calibrate import Cost, Reference, cut, fit, half_width, measure
from kvstore_connectors.transformers.codec_eval import mean_attention, pca
from kvstore_connectors.transformers.probe import Probe

FORMS = ((1, False), (5, False), (5, True))
TRIED = (5, 10, 20, 40)
STEPS = (5, 10, 15, 20, 30, 40, 80)
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


def fitted(args: Any, state: State, probe: Probe, half: texts.Documents) -> list[Basis]:
    """The bases of all forms, out of the state's folder if they are there."""
    paths = [state.folder / f"{span}-{'kv' if joint else 'k-v'}.basis" for span, joint in FORMS]
    if not all(path.exists() for path in paths):
        samples = cut(half, args.calibration, (768, 768), 256, seed=1)
        for path, basis in zip(paths, fit(probe, samples, FORMS, model="bench", revision=""), strict=True):
            path.write_bytes(basis.to_bytes())
    return [load_basis(path) for path in paths]


def choose(probe: Probe, bases: list[Basis], half: texts.Documents, threads: int) -> dict[str, Any]:
    """The form of the basis with the fewest bytes at a divergence, on held-out calibration texts, and its curve."""
    samples = cut(half, 1, (1000, 1500), 64, seed=77)
    chains: dict[str, Chain] = {}
    for form, basis in enumerate(bases):
        chains |= {f"{form},{step}": parse(pca(basis, step)) for step in TRIED}
    context = Context(rotary=probe.rotary, bases={b.digest: b for b in bases})
    found = measure([Reference(probe, s) for s in samples], chains, context, threads=threads)
    curves = {label: cost.summary() for label, cost in found.items()}
    best = max(
        (label for label in curves if curves[label]["kl"] <= TARGET * MARGIN),
        key=lambda label: curves[label]["ratio"],
        default="2,10",
    )
    return {"form": int(best.split(",")[0]), "chosen": best, "held_out": curves}


def within(costs: Mapping[str, Mapping[str, float]], chains: Mapping[str, Chain]) -> dict[str, Chain]:
    """The lossy chains that would pass the gate, and the first that would not."""
    lossy = sorted((costs[label]["kl"], label) for label, chain in chains.items() if chain.lossy)
    good = [label for _, label in lossy if costs[label]["kl"] + costs[label]["kl_interval"] <= TARGET]
    return {
        label: chains[label] for label in [*good, *(label for _, label in lossy if label not in good)][: len(good) + 1]
    }


def joined(parts: list[dict[str, Any]]) -> dict[str, Cost]:
    """Costs of chains over the contexts that were measured."""
    found: dict[str, Cost] = {}
    for label, one in ((label, one) for part in parts for label, one in part["costs"].items()):
        cost = found.setdefault(label, Cost())
        for name, value in one.items():
            setattr(cost, name, getattr(cost, name) + value)
    return found


def means(parts: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Means of what was measured by context, with half of a 95 % interval."""
    values: dict[str, list[float]] = {}
    for label, found in ((label, found) for part in parts for label, found in part.items()):
        values.setdefault(label, []).extend(found)
    return {
        label: {"mean": mean(found), "interval": half_width(found), "count": len(found)}
        for label, found in values.items()
    }


def main() -> None:
    """Fit, choose, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("--state", type=Path, required=True, help="folder of what was measured so far")
    parser.add_argument("--tokens", type=Path, help="tokenized texts (bench/texts.py)")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--tasks-model")
    parser.add_argument("--questions", type=int, default=36)
    parser.add_argument("--per-kind", type=int, default=6, help="contexts of each of the four kinds (default 6)")
    parser.add_argument("--few", type=int, default=8, help="contexts for single tensors and evictions (default 8)")
    parser.add_argument("--calibration", type=int, default=6, help="contexts of each kind to fit on (default 6)")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest context (default 4000)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="which of how many processes this is")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--plot", type=Path, help="draw size against loss into this SVG file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    state = State(args.state, args.seconds)
    part, parts = map(int, args.part.split("/"))
    probe = started(args.model, device)
    halves = texts.load(args.tokens) if args.tokens else texts.tokenized(texts.encoder(args.model))
    bases = fitted(args, state, probe, halves[0])
    chosen = state.once("choose", lambda: choose(probe, bases, halves[0], args.threads)) or {"form": 2}
    basis = bases[chosen["form"]]
    names = {name: name for name in FIXED} | {f"pca(step={step})": pca(basis, step) for step in STEPS}
    layers = probe.shape.layers
    names |= {
        f"minicache({start} %, {bits} bits)": f"prerope|minicache(layers={layers},start={start},bits={bits})"
        for start, bits in ((50, 4), (87, 8))
    }
    context = Context(rotary=probe.rotary, bases={basis.digest: basis})
    chains = {label: parse(name) for label, name in names.items()}
    by_kind = cut(halves[1], args.per_kind, (1000, args.longest), 64, seed=5)
    samples = [by_kind[kind + i] for i in range(args.per_kind) for kind in range(0, len(by_kind), args.per_kind)]
    reference = cache(lambda number: Reference(probe, samples[number]))

    def chained(number: int) -> dict[str, Any]:
        one = reference(number)
        costs = measure([one], chains, context, importance=mean_attention, threads=args.threads)
        about = {"kind": one.sample.kind, "tokens": len(one.sample.tokens)}
        return {**about, "costs": {label: asdict(cost) for label, cost in costs.items()}}

    for number in range(part, len(samples), parts):
        state.once(f"chains-{number:02}", lambda n=number: chained(n))
        if number < args.few:
            state.once(f"tensors-{number:02}", lambda n=number: tables.tensors([reference(n)], bases, FORMS))
            state.once(f"eviction-{number:02}", lambda n=number: tables.evictions([reference(n)]))
        reference.cache_clear()
    costs = joined(state.all("chains"))
    summary = {label: cost.summary(costs["raw"]) for label, cost in costs.items()}
    if args.tasks and len(state.all("chains")) == len(samples):  # only now is it known what passes
        tuned = started(args.tasks_model, device)
        asked = json.loads(args.tasks.read_text())[: args.questions]
        passing = within(summary, chains)
        for number in range(part, len(asked), parts):
            one = [asked[number]]
            state.once(f"tasks-{number:02}", lambda o=one: tables.tasks(o, tuned, passing, context, args.threads))
            state.once(f"retrieval-{number:02}", lambda o=one: tables.retrieval(o[0], tuned))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "contexts": [(one["kind"], one["tokens"]) for one in state.all("chains")],
        "bases": {f"{s},{j}": len(b.to_bytes()) for (s, j), b in zip(FORMS, bases, strict=True)},
        "model_bytes": sum(2 * p.numel() for p in probe.model.parameters()),
        **chosen,
        "chains": summary,
        "by_context": {label: cost.kl for label, cost in costs.items()},
        **{stage: means(state.all(stage)) for stage in ("tasks", "tensors", "eviction", "retrieval")},
    }
    show(args, results)


def show(args: Any, results: Mapping[str, Any]) -> None:
    """Print the tables, write the JSON, draw."""
    if args.plot is not None:
        points = [SimpleNamespace(chain=label, **found) for label, found in results["chains"].items() if label != "raw"]
        args.plot.write_text(codec_plot.svg(points, Path(args.model).name, TARGET))
    told = {label: f"{100 * one['mean']:.1f} %" for label, one in results["tasks"].items()}
    rows = [
        (label, f"{c['ratio']:.2f}", f"{c['kl']:.4f}", f"{c['kl_interval']:.4f}", f"{c['top1']:.3f}", f"{c['nll']:.3f}",
         f"{c['encode_gib_s']:.2f}", f"{c['decode_gib_s']:.2f}", told.get(label, ""))
        for label, c in results["chains"].items()
    ]  # fmt: skip
    for name in ("tensors", "eviction", "retrieval"):
        rows += [
            (f"{name}: {label}", "", f"{one['mean']:.4f}", f"{one['interval']:.4f}", *[""] * 5)
            for label, one in results[name].items()
        ]
    finish(args, "codec_quality", results, ("chain", "smaller", "KL", "±", "top-1", "NLL", "enc", "dec", "tasks"), rows)


if __name__ == "__main__":
    main()
