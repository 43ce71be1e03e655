"""Questions with exact answers for `bench/codec_quality.py`, and the model that answers them.

    python bench/codec_tasks.py MODEL --adapter LORA_DIR --tasks rag_tasks.py --count 60 --out DIR

writes ``DIR/model``, the model with the adapter merged, and ``DIR/tasks.json``. The task file has `make_task(rng,
filler, kind)` and `render(task)`, which gives the system prefix, the chunks and the suffix that asks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ("single", "two_hop", "carry_over")
END = "<|im_end|>"


def merged(path: str, adapter: Path) -> Any:
    """A model with a LoRA adapter added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = dict(model.named_parameters())
    lora = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, a in lora.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            delta = lora[name.replace("lora_A", "lora_B")].float() @ a.float()
            with torch.no_grad():
                weights[target] += delta * (config["lora_alpha"] / config["r"])
    return model


def main() -> None:
    """Merge, draw, write."""
    parser = argparse.ArgumentParser(description="Questions with exact answers, and the model that answers them.")
    parser.add_argument("model")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("rag_tasks", args.tasks)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{args.tasks}: no Python file.")
    sys.modules["rag_tasks"] = tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    from pydoc_data.topics import topics

    sentences = re.split(r"(?<=[.])\s+", " ".join(" ".join(topics.values()).split()))
    filler = [text for text in sentences if 40 < len(text) < 200 and "Document" not in text]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    rng = random.Random(args.seed)
    found = []
    for number in range(args.count):
        task = tasks.make_task(rng, filler, KINDS[number % len(KINDS)])
        system, chunks, question = tasks.render(task)
        context = [token for part in (system, *chunks) for token in encode(part)]
        answer = encode(task.answer + END)
        found.append({"kind": task.kind, "context": context, "question": encode(question), "answer": answer})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tasks.json").write_text(json.dumps(found))
    merged(args.model, args.adapter).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
