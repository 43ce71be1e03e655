"""What each selector costs in answers and in KL: exact match on questions across chunks, and KL on natural text.

    python bench/blend_quality.py --model DIR [--adapter DIR] --tasks rag_tasks.py [--count 200] [--natural 60]

Every selector, every capture mode, 15 % of the chunks' tokens recomputed; once with choosing on top, once with choosing
counted in the 15 %. Answers are decoded greedily. Questions come in the wording of the task file and in three others,
over filler of three kinds; the third wording and the third filler were used to judge only, never to develop. Those that
full prefill gets wrong are left out and counted. Intervals are 95 %: Wilson's for answers, bootstrap for KL. Lines are
written as prompts are done: what a run that was stopped has measured is shown by --from-lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as functional
from blend_prompts import Case, make_cases
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kvstore.cli import blend_plot
from kvstore_connectors.blend import Prompt, Selector, Work
from kvstore_connectors.blend.intervals import bootstrap, wilson
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.reach import REACHED, reach_of
from kvstore_connectors.blend.selectors.choice import Choice
from kvstore_connectors.blend.selectors.planner import SELECTORS
from kvstore_connectors.blend.trial import Trial, captures, greedy, reference

SHARE = 0.15
DRAWN = ("none", "random", "v-deviation", "initial", "external", "trail", "question", "relay, counted", "relay")
KINDS = ["single", "two_hop", "carry_over"]


class Fused(Llama):
    """The same model in fewer launches, in which a GPU's time goes: products of one input are one, and so are norms."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__(config, tensors)
        names = [f"model.layers.{layer}" for layer in range(self.layers)]
        self._in = [torch.cat([tensors[f"{name}.self_attn.{one}_proj.weight"] for one in "qkv"]) for name in names]
        self._up = [torch.cat([tensors[f"{name}.mlp.{one}_proj.weight"] for one in ("gate", "up")]) for name in names]

    def qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        heads = functional.linear(x, self._in[layer]).view(len(hidden), -1, self._dim)
        q, k, v = heads.split([self._heads, self._kv_heads, self._kv_heads], 1)
        return q, k, v

    def post(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        name = f"model.layers.{layer}"
        hidden = hidden + self._linear(attended, f"{name}.self_attn.o_proj")
        x = self._norm(hidden, f"{name}.post_attention_layernorm")
        gate, up = functional.linear(x, self._up[layer]).chunk(2, 1)
        return hidden + self._linear(functional.silu(gate) * up, f"{name}.mlp.down_proj")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._eps)


def load(options: argparse.Namespace, adapter: str | None) -> Llama:
    folder = Path(options.model)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if adapter:
        lora, config = (
            load_file(Path(adapter) / "adapter_model.safetensors"),
            json.loads((Path(adapter) / "adapter_config.json").read_text()),
        )
        for name, a in lora.items():
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                delta = lora[name.replace("lora_A", "lora_B")].float() @ a.float()
                tensors[target] = tensors[target] + delta * (config["lora_alpha"] / config["r"])
    return Fused(
        json.loads((folder / "config.json").read_text()), {k: v.to(options.device) for k, v in tensors.items()}
    )


@dataclass(frozen=True)
class Chance(Choice):
    """Tokens at random."""

    name: str = "random"

    def scores(self, work: Work) -> Any:
        yield from ()
        rng = torch.Generator().manual_seed(len(work.prompt.ids))
        return torch.rand(len(work.prompt.ids), generator=rng).to(work.prompt.ids.device)


@dataclass(frozen=True)
class Counted:
    """A selector that reads the question, with fewer tokens to choose: as many as the reading costs."""

    selector: Selector

    @property
    def name(self) -> str:
        return f"{self.selector.name}, counted"

    def repair(self, work: Work, count: int) -> Iterator[int]:
        return self.selector.repair(work, max(0, count - len(work.prompt.missing)))


def ways(prompt: Prompt, only: set[str]) -> Iterator[tuple[str, Selector, float]]:
    """Every selector that can serve a prompt, and its share."""
    known: list[tuple[str, Selector, float]] = [("none", SELECTORS["initial"], 0.0), ("random", Chance(), SHARE)]
    known.append(("everything", SELECTORS["initial"], 1.0))
    for selector in SELECTORS.values():
        if not selector.name.startswith("external") or all(span.external is not None for span in prompt.spans):
            known.append((selector.name, selector, SHARE))
            if getattr(selector, "reads_question", False):
                known.append((f"{selector.name}, counted", Counted(selector), SHARE))
    yield from (one for one in known if not only or one[0] in only)


def measure(options: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, device=options.device)

    shard, of = map(int, options.shard.split("/"))
    cases = [(i, case) for i, case in enumerate(make_cases(options, encode)) if i % of == shard]
    random.Random(shard).shuffle(cases)
    models = {False: load(options, None), True: load(options, options.adapter)}
    reaches = {tuned: reach_of(model, [case.sample for _, case in cases[:REACHED]]) for tuned, model in models.items()}
    begun, only = time.monotonic(), set(options.only)
    with open(options.lines, "a", buffering=1) as out:  # one file for all processes: a line is written in one piece
        for done, (number, case) in enumerate(cases):
            if time.monotonic() - begun > options.seconds:
                break
            tuned = case.sample.kind != "natural"
            for line in one_case(models[tuned], case, only, reaches[tuned]):
                found = {"case": number, "kind": case.sample.kind, "wording": case.wording} | line
                out.write(json.dumps(found) + "\n")
            if shard == 0 and done % 10 == 0:
                print(
                    f"{done + 1} of {len(cases)} prompts, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True
                )


def one_case(model: Llama, case: Case, only: set[str], reach: int) -> Iterator[dict[str, Any]]:
    sample = case.sample
    full = reference(model, sample).logits
    right = not len(sample.answer) or greedy(full, sample.answer)
    yield {"selector": "full prefill", "mode": "", "kl": 0.0, "hit": right, "cost": 1.0}
    if not right:
        return
    for mode, chunks in captures(model, sample).items():
        trial = Trial(model, model.rotary, sample, chunks, full, reach)
        for name, selector, share in ways(trial.prompt, only):
            yield {"selector": name, "mode": mode.value, **asdict(trial.repair(selector, share))}


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: defaultdict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        wording = "natural" if line["kind"] == "natural" else line["wording"]
        groups[(line["kind"], wording, line["mode"], line["selector"])].append(line)
    rows = []
    for (kind, wording, mode, selector), some in groups.items():
        hits, kl = [float(one["hit"]) for one in some], [one["kl"] for one in some]
        mean = sum(hits) / len(hits)
        rows.append(
            {
                "kind": kind,
                "wording": wording,
                "capture": mode,
                "selector": selector,
                "prompts": len(some),
                "hit": mean,
                "hit_interval": bootstrap(hits) if kind == "natural" else wilson(sum(hits), len(hits)),
                "kl": sum(kl) / len(kl),
                "kl_interval": bootstrap(kl),
                "cost": sum(one["cost"] for one in some) / len(some),
                **({"nll": sum(one["nll"] for one in some) / len(some)} if some[0].get("nll") is not None else {}),
            }
        )
    return sorted(rows, key=lambda r: (r["kind"], r["wording"], r["capture"]))


def show(rows: list[dict[str, Any]]) -> None:
    before = None
    for row in rows:
        group = (row["kind"], row["wording"], row["capture"])
        if group != before:
            print("\n" + ", ".join(filter(None, group)) + f" ({row['prompts']} prompts)")
            before = group
        low, high = row["hit_interval"]
        kl_low, kl_high = row["kl_interval"]
        print(
            f"  {row['selector']:26s} hit {row['hit']:.3f} ({low:.2f} to {high:.2f})  "
            f"KL {row['kl']:.4f} ({kl_low:.4f} to {kl_high:.4f})  computed {row['cost']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a Llama: config.json, tokenizer.json, *.safetensors")
    parser.add_argument(
        "--adapter", help="LoRA directory, merged for the questions; natural text uses the model as it is"
    )
    parser.add_argument("--tasks", help="rag_tasks.py")
    parser.add_argument("--count", type=int, default=200, help="questions of each kind")
    parser.add_argument("--reworded", type=int, default=100, help="questions of each kind in each other wording")
    parser.add_argument("--natural", type=int, default=60, help="prompts of natural text")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no prompt later than this")
    parser.add_argument("--only", nargs="*", default=[], help="selectors to measure (default all)")
    parser.add_argument("--lines", help="add what was measured of each prompt to this file, as JSON lines")
    parser.add_argument("--from-lines", action="store_true", help="measure nothing: take what --lines has")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="kinds of questions (default all)")
    parser.add_argument("--append", action="store_true", help="keep the runs that the file has")
    parser.add_argument("--plot", type=Path, help="measure nothing: draw the natural text in --out")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench/results/blend_quality.json")
    options = parser.parse_args()
    if options.plot:
        draw(Path(options.out), options.plot)
        return
    if not (options.lines if options.from_lines else options.model and options.tasks):
        parser.error("--model and --tasks are needed, or --lines with --from-lines")
    if options.shard:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = options.lines or f"{folder}/lines.jsonl"
        if not options.from_lines:
            Path(file).write_text("")
            shards = [f"{i}/{options.processes}" for i in range(options.processes)]
            commands = [[sys.executable, *sys.argv, "--lines", file, "--shard", shard] for shard in shards]
            running = [subprocess.Popen(command) for command in commands]
            failed = sum(process.wait() != 0 for process in running)
            if failed:
                print(f"{failed} of {len(running)} processes failed", file=sys.stderr)
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows = table(lines)
    show(rows)
    words = [word if "/" not in word else Path(word).name for word in sys.argv[1:]]
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    run = {"command": " ".join(["python bench/blend_quality.py", *words]), "device": device, "rows": rows}
    save(run, Path(options.out), earlier=options.append)


def save(run: dict[str, Any], path: Path, *, earlier: bool) -> None:
    """Write a run, behind those that the file has; a row a line."""
    runs = [*(json.loads(path.read_text())["runs"] if earlier and path.exists() else []), run]
    texts = []
    for one in runs:
        lines = ",\n".join(json.dumps(rounded(row)) for row in one["rows"])
        texts.append(f'{{"command": {json.dumps(one["command"])},\n"device": {json.dumps(one["device"])},\n"rows": [\n')
        texts[-1] += lines + "\n]}"
    path.write_text('{"runs": [\n' + ",\n".join(texts) + "\n]}\n")


def draw(path: Path, svg: Path) -> None:
    """Plot the natural text in a file: divergence over what was computed, by capture, as the last run has it."""
    found = [row for run in json.loads(path.read_text())["runs"] for row in run["rows"] if row["kind"] == "natural"]
    last = {(row["capture"], row["selector"]): row for row in found}
    rows = [
        SimpleNamespace(capture=capture, selector=selector, kl=row["kl"], computed=row["cost"])
        for (capture, selector), row in last.items()
        if capture and selector in DRAWN
    ]
    svg.write_text(blend_plot.svg(rows, "natural text"))


def rounded(value: Any) -> Any:
    """Figures with four digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
