"""`kvstore eval` on a GPU, whose kernels code, move and choose, against the CPU: figures equal within their intervals.

The same model, texts and seed on both, each in a process of its own. Blending: how far each selector is from full
prefill. Codecs: what each chain costs; without a basis fitted to the model, whose chains no kernel knows. A figure is
equal if each of the two means lies within the other's 95 % interval.

    python bench/gpu_eval.py --model SmolLM2-135M-Instruct --texts docs --out bench/results/h200/eval.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SELECTORS = ("none", "initial", "external", "question", "trail", "v-deviation")
DEVICES = ("cpu", "cuda")


def blending(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `kvstore eval`."""
    from kvstore_connectors.blend.evaluate import evaluate
    from kvstore_connectors.blend.samples import SYSTEM, Shape, cut, read_texts
    from kvstore_connectors.build_model import load_model, load_tokenizer

    tokenizer = load_tokenizer(options.model)
    model, _ = load_model(options.model, options.device)
    samples = cut(
        read_texts([options.texts]), lambda text: tokenizer.encode(text, add_special_tokens=False).ids, options.prompts,
        shape=Shape(6, 128, 48), system=SYSTEM, seed=options.seed, device=options.device,
    )  # fmt: skip
    found = evaluate(model, model.rotary, samples, selectors=SELECTORS, kinds=("system", "live"), shares=(0.15,))
    return found.to_json()["rows"]


def codecs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `kvstore eval --codecs`."""
    from kvstore_connectors.transformers.codec_eval import CHAINS, evaluate

    found = evaluate(
        options.model, [options.texts], contexts=options.prompts, fit_contexts=0, device=options.device,
        chains=("lossless", *CHAINS), steps=(), weighed=True, seed=options.seed,
    )  # fmt: skip
    return found.to_json()["chains"]  # type: ignore[return-value]


def figures(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Mean, and the ends of its interval, of what says how good it is."""
    found = {}
    for name in ("kl", "top1", "nll"):
        interval = row[f"{name}_interval"]
        low, high = interval if isinstance(interval, list) else (row[name] - interval, row[name] + interval)
        found[name] = (row[name], low, high)
    return found


def compared(what: str, one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both, side by side."""
    keys = ("capture", "selector", "share") if what == "blending" else ("chain",)
    there = {tuple(row[key] for key in keys): row for row in other}
    rows = []
    for row in one:
        key = tuple(row[key] for key in keys)
        mine, yours = figures(row), figures(there[key])
        equal = all(
            mine[name][1] - 1e-6 <= yours[name][0] <= mine[name][2] + 1e-6
            and yours[name][1] - 1e-6 <= mine[name][0] <= yours[name][2] + 1e-6
            for name in mine
        )
        rows.append({"what": " ".join(map(str, key)), "cpu": mine, "cuda": yours, "equal": equal})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="kvstore eval on a GPU against the CPU.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--timeout", type=float, default=280.0, help="seconds that all may take together")
    parser.add_argument("--threads", type=int, default=6, help="of each process on the CPU")
    parser.add_argument("--devices", nargs=2, default=DEVICES, help="what is compared")
    parser.add_argument("--what", choices=["blending", "codecs"], help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what:
        print(json.dumps((blending if options.what == "blending" else codecs)(options)))
        return
    result: dict[str, Any] = {"command": " ".join(sys.argv), "seed": options.seed, "prompts": options.prompts}
    result["device"] = device_name()
    begun = time.monotonic()
    running = {(what, place): start(what, device, options) for what in ("blending", "codecs")
               for place, device in enumerate(options.devices)}  # fmt: skip
    found = {}
    for key, process in running.items():
        told, _ = process.communicate(timeout=max(1.0, options.timeout - (time.monotonic() - begun)))
        found[key] = json.loads(told)
    for what in ("blending", "codecs"):
        result[what] = compared(what, found[what, 0], found[what, 1])
        result[f"{what}_rows"] = {device: found[what, place] for place, device in enumerate(options.devices)}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = result["blending"] + result["codecs"]
    for row in rows:
        shown = "  ".join(f"{name} {row['cpu'][name][0]:8.5f} {row['cuda'][name][0]:8.5f}" for name in row["cpu"])
        print(f"{row['what']:<28} {shown}  {'' if row['equal'] else 'NOT EQUAL'}")
    if not all(row["equal"] for row in rows):
        raise SystemExit("not as it has to be")


def start(what: str, device: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that measures one thing on one device."""
    command = [sys.executable, __file__, "--model", str(options.model), "--texts", str(options.texts), "--prompts",
               str(options.prompts), "--seed", str(options.seed), "--what", what, "--device", device]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(options.threads if device == "cpu" else 2)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads)


def device_name() -> str:
    """The card, for the record."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
