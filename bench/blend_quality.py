"""What each selector costs in answers and in KL: exact match on questions across chunks, and KL on natural text.

    python bench/blend_quality.py --model DIR [--adapter DIR] --tasks rag_tasks.py [--count 200] [--natural 60]

Every selector, every capture mode, 15 % of the chunks' tokens recomputed; once with choosing on top, once with choosing
counted in the 15 %. Answers are decoded greedily. Questions come in the wording of the task file and in two others,
over filler of two kinds; those that full prefill gets wrong are left out and counted. Intervals are 95 %: Wilson's for
answers, bootstrap for KL.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kvstore_connectors.blend import Capture, LayerKV, Prompt, Work
from kvstore_connectors.blend.capture import Chunk, assemble, capture
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.prompt import Cache
from kvstore_connectors.blend.recompute import Pass, prefill
from kvstore_connectors.blend.selectors.choice import Choice
from kvstore_connectors.blend.selectors.deviation import Deviation
from kvstore_connectors.blend.selectors.planner import GRADUAL, SELECTORS, planner
from kvstore_connectors.blend.stack import prefill_stacked, run_stacked, stack

SHARE = 0.15
TIMES = 200
"""Resamplings of a bootstrap."""

DOCUMENTED = [
    "argparse",
    "csv",
    "decimal",
    "email.message",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "shutil",
    "tarfile",
]
CODE = ["argparse", "difflib", "heapq", "shutil", "textwrap"]

REWORDED = (
    {
        r"works for (\w+)\.": r"is employed by \1.",
        r"The main office of (\w+) is in (\w+)\.": r"\1 has its headquarters in \2.",
        r"Next we turn to ([\w ]+), who leads project (\w+)\.": r"The next page is about \1, who heads project \2.",
        r"The animal in that project's badge is the (\w+), and": r"The badge of that project shows the \1, and",
        r"In which city is the main office of the company that ([\w ]+) works for\?": (
            r"In which city is the headquarters of the company that \1 is employed by?"
        ),
        r"Which animal is in the badge of project (\w+)\?": r"Which animal is shown in the badge of project \1?",
    },
    {
        r"([A-Z]\w+ [A-Z]\w+) works for (\w+)\.": r"\1 joined \2 two years ago.",
        r"The main office of (\w+) is in (\w+)\.": r"Visitors find \1 in \2.",
        r"Next we turn to ([\w ]+), who leads project (\w+)\.": r"Then there is \1 with project \2.",
        r"The animal in that project's badge is the (\w+), and its": r"They chose the \1 as its animal, and its",
        r"In which city is the main office of the company that ([\w ]+) works for\?": (
            r"In which city is the company that \1 works for?"
        ),
        r"Which animal is in the badge of project (\w+)\?": r"Which animal has project \1?",
    },
)


@dataclass
class Case:
    """Ids of a prompt in parts. ``answer`` is empty for natural text, where the question is the text that follows."""

    kind: str
    wording: str
    system: Tensor
    chunks: list[Tensor]
    question: Tensor
    answer: Tensor
    others: list[list[Tensor]]


def sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return [
        s for s in found if 40 < len(s) < 200 and re.match(r"^[A-Z].*[.]$", s) and not re.search(r"[*|`=~^]{2}|::", s)
    ]


def manual() -> str:
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics))


def docstrings() -> str:
    texts = []
    for name in [
        "argparse",
        "csv",
        "decimal",
        "email.message",
        "inspect",
        "json",
        "logging",
        "pathlib",
        "pdb",
        "shutil",
        "tarfile",
        "urllib.request",
    ]:
        module = importlib.import_module(name)
        for _, member in sorted(inspect.getmembers(module)):
            if inspect.isclass(member) or inspect.isfunction(member):
                texts.append(inspect.getdoc(member) or "")
    return " ".join(texts)


def natural_texts() -> dict[str, str]:
    code = [
        inspect.getsource(importlib.import_module(name))
        for name in ["argparse", "difflib", "heapq", "shutil", "textwrap"]
    ]
    root = Path(__file__).resolve().parents[1]
    prose = [path.read_text() for path in sorted(root.glob("docs/*.md"))]
    return {"manual": re.sub(r"\s+", " ", manual()), "code": "\n".join(code), "prose": "\n".join(prose)}


def make_cases(options: argparse.Namespace, encode: Any) -> Iterator[Case]:
    spec = importlib.util.spec_from_file_location("rag_tasks", options.tasks)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot import {options.tasks}")
    tasks = importlib.util.module_from_spec(spec)
    sys.modules["rag_tasks"] = tasks
    spec.loader.exec_module(tasks)
    end = encode("<|im_end|>")
    fillers = {"manual": sentences(manual()), "docstrings": sentences(docstrings())}
    for wording in range(1 + len(REWORDED)):
        rng = random.Random(options.seed + wording)
        count = options.count if wording == 0 else options.reworded
        for kind in ("single", "two_hop", "carry_over"):
            for i in range(count):
                task = tasks.make_task(rng, fillers[("manual", "docstrings")[i % 2]], kind)
                if wording:
                    if kind == "single":
                        continue
                    task = replace(task, chunks=tuple(map(reword(wording - 1), task.chunks)))
                    task = replace(task, question=reword(wording - 1)(task.question))
                system, chunks, question = tasks.render(task)
                answer = torch.cat([encode(task.answer), end])
                name = ("as trained", "reworded", "reworded more")[wording]
                yield Case(kind, name, encode(system), [encode(c) for c in chunks], encode(question), answer, [])
    for name, text in natural_texts().items():
        ids, rng = encode(text[:400_000]), random.Random(f"{name} {options.seed}")
        for _ in range(options.natural // 3):
            at = rng.randrange(len(ids) - 6 * 128 - 48)
            chunks = [ids[at + 128 * j : at + 128 * (j + 1)] for j in range(6)]
            others = [[ids[o : o + 128] for o in (rng.randrange(len(ids) - 128) for _ in range(2))] for _ in chunks]
            question = ids[at + 768 : at + 768 + 48]
            yield Case("natural", name, encode("Continue the text.\n\n"), chunks, question, ids[:0], others)


def reword(which: int) -> Any:
    def change(text: str) -> str:
        for pattern, other in REWORDED[which].items():
            text = re.sub(pattern, other, text)
        return text

    return change


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
    return Llama(
        json.loads((folder / "config.json").read_text()), {k: v.to(options.device) for k, v in tensors.items()}
    )


def divergence(p: Tensor, q: Tensor) -> float:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class Trial:
    """One prompt in one capture mode, and what became of it under each selector."""

    def __init__(self, model: Llama, case: Case, chunks: list[Chunk], full: Tensor) -> None:
        self.model, self.case, self.full = model, case, full
        room = max(0, len(case.answer) - 1)
        self.prompt, self.cache = assemble(model, model.rotary, case.system, chunks, case.question, room)
        self.ids = torch.cat([self.prompt.ids, case.answer[:-1]])
        self.work = Work(model, self.prompt, self.copy())

    def copy(self) -> list[LayerKV]:
        return [LayerKV(held.keys.clone(), held.values.clone()) for held in self.cache]

    def choices(self, selectors: dict[str, tuple[Choice, float, bool]]) -> Iterator[dict[str, Any]]:
        """Rows from each selector, all repaired side by side."""
        reading = len(self.prompt.question) / self.prompt.reused
        names, rows, costs = [], [], []
        for name, (selector, share, counted) in selectors.items():
            extra = reading if selector.reads_question else 0.0
            count = max(0, int((share - extra * counted) * self.prompt.reused + 0.5))
            found = drain(selector.choose(self.work, count))
            names.append(name)
            rows.append(self.work.with_missing(found))
            costs.append(len(found) / self.prompt.reused + extra)
        several = stack(self.cache, len(rows))
        hidden = run_stacked(self.model, self.prompt.ids, several, rows)
        follow: list[Tensor | None] = [None] * len(rows)
        if len(self.case.answer) > 1:
            behind = torch.arange(len(self.prompt.ids), len(self.ids), device=self.ids.device)
            follow = list(run_stacked(self.model, self.ids, several, [behind] * len(rows)))
        for name, h, f, cost in zip(names, hidden, follow, costs, strict=True):
            yield self.verdict(name, h, f, cost)

    def deviation(self, selector: Deviation) -> dict[str, Any]:
        cache = self.copy()
        work = Work(self.model, self.prompt, cache)
        drain(work.repair(selector, SHARE))
        return self.verdict(selector.name, work.hidden, self.follow(cache), work.cost)

    def follow(self, cache: Cache) -> Tensor | None:
        if len(self.case.answer) < 2:
            return None
        behind = torch.arange(len(self.prompt.ids), len(self.ids), device=self.ids.device)
        return Pass(self.model, self.ids, cache, behind).run().hidden

    def verdict(self, name: str, hidden: Tensor, follow: Tensor | None, cost: float) -> dict[str, Any]:
        found: dict[str, Any] = {"selector": name, "cost": cost}
        if len(self.case.answer):
            logits = self.model.logits(hidden[-1:] if follow is None else torch.cat([hidden[-1:], follow]))
            found |= {"kl": divergence(self.full[:1], logits[:1]), "hit": greedy(logits, self.case.answer)}
        else:
            logits = self.model.logits(hidden[-len(self.case.question) :])
            true = self.case.question[1:]
            nll = -logits[:-1].log_softmax(-1).gather(1, true[:, None]).mean()
            agree = (logits.argmax(-1) == self.full.argmax(-1)).float().mean()
            found |= {"kl": divergence(self.full, logits), "hit": float(agree), "nll": float(nll)}
        return found


def greedy(logits: Tensor, answer: Tensor) -> bool:
    """Whether greedy decoding gives the answer: it does if each token is the best one behind those before it."""
    return bool((logits.argmax(-1) == answer).all())


def drain(steps: Any) -> Any:
    """Run a generator to its end: what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Nothing(Choice):
    def scores(self, work: Work) -> Any:
        yield from ()
        return torch.full((len(work.prompt.ids),), -torch.inf, device=work.prompt.ids.device)


class Chance(Choice):
    def scores(self, work: Work) -> Any:
        yield from ()
        rng = torch.Generator().manual_seed(len(work.prompt.ids))
        return torch.rand(len(work.prompt.ids), generator=rng).to(work.prompt.ids.device)


def selectors_for(prompt: Prompt, extra: str | None) -> dict[str, tuple[Choice, float, bool]]:
    found: dict[str, tuple[Choice, float, bool]] = {"none": (Nothing(), 0.0, False), "random": (Chance(), SHARE, False)}
    found["everything"] = (SELECTORS["initial"], 1.0, False)  # type: ignore[assignment]
    for selector in SELECTORS.values():
        if isinstance(selector, Choice) and (selector.name != "external" or prompt.spans[-1].external is not None):
            found[selector.name] = (selector, SHARE, False)
            if selector.reads_question:
                found[f"{selector.name}, counted"] = (selector, SHARE, True)
    ours = planner(prompt)
    if isinstance(ours, Choice):
        found["planner"], found["planner, counted"] = (ours, SHARE, False), (ours, SHARE, True)
    if extra:
        space: dict[str, Any] = {}
        exec(Path(extra).read_text(), space)
        found |= space["variants"](prompt)
    return found


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
    begun = time.monotonic()
    with open(options.out, "w") as out:
        for done, (number, case) in enumerate(cases):
            if time.monotonic() - begun > options.seconds:
                break
            for line in one_case(models[case.kind != "natural"], case, options.extra):
                out.write(json.dumps({"case": number, "kind": case.kind, "wording": case.wording} | line) + "\n")
            if shard == 0 and done % 10 == 0:
                print(
                    f"{done + 1} of {len(cases)} prompts, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True
                )


def one_case(model: Llama, case: Case, extra: str | None) -> Iterator[dict[str, Any]]:
    asked = torch.cat([case.question, case.answer[:-1]])
    hidden, _ = prefill(model, torch.cat([case.system, *case.chunks, asked]))
    full = model.logits(hidden[-(len(case.answer) or len(case.question)) :])
    right = not len(case.answer) or greedy(full, case.answer)
    yield {"selector": "full prefill", "mode": "", "kl": 0.0, "hit": right, "cost": 1.0}
    if not right:
        return
    empty = case.system[:0]
    modes: dict[str, list[Chunk]] = {}
    for capture_mode, lead in ((Capture.ISOLATED, empty), (Capture.SYSTEM, case.system)):
        kv = prefill_stacked(model, lead, case.chunks)
        modes[capture_mode.value] = [
            Chunk(ids, tuple(one), len(lead), capture_mode) for ids, one in zip(case.chunks, kv, strict=True)
        ]
    if case.others:
        modes["live"] = [capture(model, ids, case.system, o) for ids, o in zip(case.chunks, case.others, strict=True)]
    for mode, chunks in modes.items():
        trial = Trial(model, case, chunks, full)
        for line in trial.choices(selectors_for(trial.prompt, extra)):
            yield line | {"mode": mode}
        for deviation in (Deviation(), Deviation("keys"), Deviation("values", GRADUAL)):
            yield trial.deviation(deviation) | {"mode": mode}


def wilson(hits: float, n: int) -> tuple[float, float]:
    p, z = hits / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def bootstrap(values: list[float]) -> tuple[float, float]:
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(TIMES))
    return means[int(0.025 * TIMES)], means[int(0.975 * TIMES) - 1]


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
                **({"nll": sum(one["nll"] for one in some) / len(some)} if "nll" in some[0] else {}),
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
    parser.add_argument(
        "--model", required=True, help="directory of a Llama: config.json, tokenizer.json, *.safetensors"
    )
    parser.add_argument(
        "--adapter", help="LoRA directory, merged for the questions; natural text uses the model as it is"
    )
    parser.add_argument("--tasks", required=True, help="rag_tasks.py")
    parser.add_argument("--count", type=int, default=200, help="questions of each kind")
    parser.add_argument("--reworded", type=int, default=100, help="questions of each kind in each other wording")
    parser.add_argument("--natural", type=int, default=60, help="prompts of natural text")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no prompt later than this")
    parser.add_argument("--extra", help="Python file with variants(prompt), for experiments")
    parser.add_argument("--keep-lines", help="write what was measured of each prompt here, as JSON lines")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench/results/blend_quality.json")
    options = parser.parse_args()
    if options.shard:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{i}.jsonl" for i in range(options.processes)]
        running = [
            subprocess.Popen([sys.executable, *sys.argv, "--shard", f"{i}/{options.processes}", "--out", file])
            for i, file in enumerate(files)
        ]
        failed = [process.args for process in running if process.wait()]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(running)} processes failed")
        lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    if options.keep_lines:
        Path(options.keep_lines).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table(lines)
    show(rows)
    command = f"python {' '.join(sys.argv)}"
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    Path(options.out).write_text(json.dumps({"command": command, "device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
