"""Exact answers with the context's KV on each rung of a profile: what a daemon would hand out.

`bench/codec_tasks.py` makes the questions and the model that answers all of them from uncompressed KV.

    python bench/codec_answers.py --profiles FOLDER --tasks tasks.json --tasks-model DIR --state DIR --out answers.json

What is answered is written down question by question; the same command goes on where the last one stopped, and several
may run at a time.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import codec_tables as tables
import torch
from codec_state import State
from common import arguments, finish
from transformers import AutoModelForCausalLM

from kvstore.cli.codec_plot import short
from kvstore.codecs import Context, parse
from kvstore.codecs.basis import load_basis
from kvstore.profile import load_profile
from kvstore_connectors.transformers.probe import Probe


def main() -> None:
    """Ask, print."""
    parser = arguments(__doc__)
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--tasks-model", required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder of what was answered so far")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (path,) = args.profiles.glob("*.json")
    profile = load_profile(path)
    bases = {profile.basis: load_basis(args.profiles / f"{profile.basis}.basis")} if profile.basis else {}
    model = AutoModelForCausalLM.from_pretrained(args.tasks_model, dtype=torch.float32, attn_implementation="sdpa")
    chains = {short(rung.chain): parse(rung.chain) for rung in profile.passed}
    context = Context(rotary=profile.rotary, bases=bases)
    probe, state = Probe(model), State(args.state, args.seconds)
    asked = json.loads(args.tasks.read_text())
    state.every(
        {
            f"answers-{n:03}": partial(tables.tasks, [task], probe, chains, context, args.threads)
            for n, task in enumerate(asked)
        }
    )
    right = state.all("answers")
    found = {name: mean(each for one in right for each in one[name]) for name in ("uncompressed", *chains)}
    rungs: dict[str, Any] = {short(rung.chain): rung for rung in profile.passed}
    rows = [
        (name, f"{rungs[name].ratio:.2f}" if name in rungs else "1.00", f"{100 * share:.1f}")
        for name, share in found.items()
    ]
    finish(args, "codec_answers", {"questions": len(right), **found}, ("rung", "smaller", "exact %"), rows)


if __name__ == "__main__":
    main()
