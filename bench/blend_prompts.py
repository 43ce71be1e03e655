"""Prompts that blending is judged by: questions over several chunks in four wordings, and natural text."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvstore_connectors.blend.samples import Shape, cut
from kvstore_connectors.blend.trial import Sample

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
    {
        r"([A-Z]\w+ [A-Z]\w+) works for (\w+)\.": r"\1 is on the payroll of \2.",
        r"The main office of (\w+) is in (\w+)\.": r"\1 keeps its main office in the city of \2.",
        r"Next we turn to ([\w ]+), who leads project (\w+)\.": r"We now come to \1, in charge of project \2.",
        r"The animal in that project's badge is the (\w+), and": r"On that project's badge there is the \1, and",
        r"In which city is the main office of the company that ([\w ]+) works for\?": (
            r"In which city is the main office of the employer of \1?"
        ),
        r"Which animal is in the badge of project (\w+)\?": r"Which animal is there on the badge of project \1?",
    },
)
WORDINGS = ("as trained", "reworded", "reworded more", "reworded to judge")


class Case(NamedTuple):
    """A prompt, and the wording of its question."""

    wording: str
    sample: Sample


def sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return [
        s for s in found if 40 < len(s) < 200 and re.match(r"^[A-Z].*[.]$", s) and not re.search(r"[*|`=~^]{2}|::", s)
    ]


def manual() -> str:
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics))


DOCUMENTED = "argparse csv decimal email.message inspect json logging pathlib pdb shutil tarfile urllib.request"
TO_JUDGE = "asyncio collections datetime difflib fractions mailbox optparse sched smtplib threading typing unittest"


def docstrings(modules: str) -> str:
    texts = []
    for name in modules.split():
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
    fillers = {"manual": manual(), "docstrings": docstrings(DOCUMENTED), "to judge": docstrings(TO_JUDGE)}
    filled = [sentences(text) for text in fillers.values()]
    for wording in range(1 + len(REWORDED)):
        rng = random.Random(options.seed + wording)
        count = options.count if wording == 0 else options.reworded
        for kind in options.kinds:
            for i in range(count):
                task = tasks.make_task(rng, filled[i % len(filled)], kind)
                if wording:
                    if kind == "single":
                        continue
                    task = replace(task, chunks=tuple(map(reword(wording - 1), task.chunks)))
                    task = replace(task, question=reword(wording - 1)(task.question))
                system, chunks, question = tasks.render(task)
                parts = encode(system), tuple(map(encode, chunks)), encode(question)
                yield Case(WORDINGS[wording], Sample(kind, *parts, torch.cat([encode(task.answer), end])))

    def encoded(text: str) -> list[int]:
        return encode(text).tolist()

    texts = natural_texts() if options.natural else {}
    for sample in cut(texts, encoded, options.natural, shape=Shape(), seed=options.seed) if texts else ():
        parts = {name: getattr(sample, name).to(options.device) for name in ("system", "question", "answer")}
        chunks, *others = (tuple(one.to(options.device) for one in some) for some in (sample.chunks, *sample.others))
        yield Case(sample.kind, replace(sample, kind="natural", chunks=chunks, others=tuple(others), **parts))


def reword(which: int) -> Any:
    def change(text: str) -> str:
        for pattern, other in REWORDED[which].items():
            text = re.sub(pattern, other, text)
        return text

    return change
