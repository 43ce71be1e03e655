"""What each chain of codecs costs a model: bytes against the next-token distribution, on real texts of four kinds.

Bases are fitted on one half of the texts; form and steps are chosen on contexts of that half that the fit has not seen;
only then is the other half looked at. Each block goes through the product's own encoder and decoder.

    python bench/codec_quality.py MODEL --state DIR --out bench/results/codec_quality.json --plot docs/img/codecs.svg
    python bench/codec_quality.py MODEL --state DIR --tokens tokens.npz --tasks tasks.json --tasks-model OTHER …

What is measured is written down context by context; the same command goes on where the last one stopped, and several
may run at a time. ``--tasks`` are questions whose answer must come out exactly (`bench/codec_tables.py` says the
format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
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
from kvstore_connectors.transformers.calibrate import Cost, Reference, Sample, cut, fit, half_width, measure
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
SAME = ("raw", "kv4", "prerope|kv4|zstd")
"""What the plot leaves out: no loss to draw, or the place of another."""
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
    with state.claimed("bases", wait=True):
        if not all(path.exists() for path in paths):
            samples = cut(half, args.calibration, (768, 768), 256, seed=1)
            for path, basis in zip(paths, fit(probe, samples, FORMS, model="bench", revision=""), strict=True):
                path.write_bytes(basis.to_bytes())
    return [load_basis(path) for path in paths]


def choose(state: State, probe: Probe, bases: list[Basis], half: texts.Documents, threads: int) -> dict[str, Any]:
    """The form of the basis with the fewest bytes at a divergence, on held-out calibration texts, and its curve."""
    chains: dict[str, Chain] = {}
    for form, basis in enumerate(bases):
        chains |= {f"{form},{step}": parse(pca(basis, step)) for step in TRIED}
    context = Context(rotary=probe.rotary, bases={b.digest: b for b in bases})
    samples = cut(half, 1, (1000, 1500), 64, seed=77)
    wanted = {f"choose-{n:03}": partial(costs, probe, one, chains, context, threads) for n, one in enumerate(samples)}
    if not state.every(wanted):
        raise SystemExit("No basis is chosen yet: run the same command again.")
    found = joined(state.all("choose"))
    curves = {label: cost.summary() for label, cost in found.items()}
    best = max(
        (label for label in curves if curves[label]["kl"] <= TARGET * MARGIN),
        key=lambda label: curves[label]["ratio"],
        default="2,10",
    )
    return {"form": int(best.split(",")[0]), "chosen": best, "held_out": curves}


def costs(
    probe: Probe, sample: Sample, chains: Mapping[str, Chain], context: Context, threads: int, *, weighed: bool = False
) -> dict[str, Any]:
    """What chains cost on one context."""
    weights = mean_attention if weighed else None
    found = measure([Reference(probe, sample)], chains, context, importance=weights, threads=threads)
    about = {"kind": sample.kind, "tokens": len(sample.tokens)}
    return {**about, "costs": {label: asdict(cost) for label, cost in found.items()}}


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


def chains_of(basis: Basis, layers: int) -> dict[str, Chain]:
    """The chains by their labels."""
    names = {name: name for name in FIXED} | {f"pca(step={step})": pca(basis, step) for step in STEPS}
    names |= {
        f"minicache({start} %, {bits} bits)": f"prerope|minicache(layers={layers},start={start},bits={bits})"
        for start, bits in ((50, 4), (87, 8))
    }
    return {label: parse(name) for label, name in names.items()}


def asked(args: Any, tuned: Probe, chains: Mapping[str, Chain], context: Context) -> dict[str, Callable[[], Any]]:
    """Questions to the model that answers them, now that it is known which chains pass."""
    wanted = json.loads(args.tasks.read_text())[: args.questions]
    answers = {f"tasks-{n:03}": partial(tables.tasks, [one], tuned, chains, context, args.threads)
               for n, one in enumerate(wanted)}  # fmt: skip
    return answers | {f"retrieval-{n:03}": partial(tables.retrieval, one, tuned) for n, one in enumerate(wanted)}


def apart(probe: Probe, sample: Sample, bases: list[Basis]) -> dict[str, Any]:
    """Single tensors on one context."""
    return tables.tensors([Reference(probe, sample)], bases, FORMS)


def evicted(probe: Probe, sample: Sample) -> dict[str, Any]:
    """Evictions on one context."""
    return tables.evictions([Reference(probe, sample)])


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
    parser.add_argument("--seed", type=int, nargs="+", default=[5], help="of the contexts that are judged (default 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--plot", type=Path, help="draw size against loss into this SVG file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    state = State(args.state, args.seconds)
    probe = started(args.model, device)
    halves = texts.load(args.tokens) if args.tokens else texts.tokenized(texts.encoder(args.model))
    bases = fitted(args, state, probe, halves[0])
    chosen = choose(state, probe, bases, halves[0], args.threads)
    basis = bases[chosen["form"]]
    chains = chains_of(basis, probe.shape.layers)
    context = Context(rotary=probe.rotary, bases={basis.digest: basis})
    samples: list[Sample] = []
    for seed in args.seed:
        by_kind = cut(halves[1], args.per_kind, (1000, args.longest), 64, seed=seed)
        samples += [by_kind[kind + i] for i in range(args.per_kind) for kind in range(0, len(by_kind), args.per_kind)]
    one = partial(costs, probe, chains=chains, context=context, threads=args.threads, weighed=True)
    complete = state.every({f"chains-{n:03}": partial(one, sample) for n, sample in enumerate(samples)})
    found = joined(state.all("chains"))
    summary = {label: cost.summary(found["raw"]) for label, cost in found.items()}
    if complete:
        state.every(
            (asked(args, started(args.tasks_model, device), within(summary, chains), context) if args.tasks else {})
            | {f"tensors-{n:03}": partial(apart, probe, sample, bases) for n, sample in enumerate(samples[: args.few])}
            | {f"eviction-{n:03}": partial(evicted, probe, sample) for n, sample in enumerate(samples[: args.few])}
        )
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "contexts": [(one["kind"], one["tokens"]) for one in state.all("chains")],
        "bases": {f"{s},{j}": len(b.to_bytes()) for (s, j), b in zip(FORMS, bases, strict=True)},
        "model_bytes": sum(2 * p.numel() for p in probe.model.parameters()),
        **chosen,
        "chains": summary,
        "by_context": {label: cost.kl for label, cost in found.items()},
        **{stage: means(state.all(stage)) for stage in ("tasks", "tensors", "eviction", "retrieval")},
    }
    show(args, results)


def show(args: Any, results: Mapping[str, Any]) -> None:
    """Print the tables, write the JSON, draw."""
    if args.plot is not None:
        chains = {label: found for label, found in results["chains"].items() if label not in SAME}
        points = [SimpleNamespace(chain=label, **found) for label, found in chains.items()]
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
