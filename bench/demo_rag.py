"""A RAG workload on a real vLLM: passages in any order, reused as chunks, against full prefill and prefix reuse.

``make demo-rag`` runs it: vLLM on the CPU with SmolLM2-135M-Instruct, in float32. Sixteen passages are built ahead by
``kvstore build`` behind the system prompt, which also measures what blending costs on them and so opens the gate. Then
prompts of about 2,000 tokens, each of seven passages in an order of its own and a question about one of them, are asked
in turns: computed in full, with the system prompt from the cache, and blended with 15 % (and, to compare, 30 %) of the
reused tokens computed again. Ends with a table of first-token times and of how far the answers are from those of
full prefill. Exit code 1 if a prompt was not blended, or an exact prompt afterwards answered differently.

    python bench/demo_rag.py --out bench/results/demo_rag.json
    python bench/demo_rag.py --device cuda --dtype bfloat16    (vLLM for CUDA; kvstore installed)
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests" / "engines"))

import msgspec  # noqa: E402
from common import facts  # noqa: E402
from demo import TEXT, say  # noqa: E402
from kit import Daemon, Engine, set_environment  # noqa: E402

from kvstore.keys import hash_salt  # noqa: E402

SHARE = 0.15
PASSAGES, EACH = 16, 7
ANSWER_TOKENS = 16
LOGPROBS = 20
SYSTEM = (
    "<|im_start|>system\nYou answer questions about a town. Use only the notes that follow, and answer with one short "
    "sentence.<|im_end|>\n<|im_start|>user\nNotes:\n\n"
)
FACTS = (
    ("What is known of the bell?", "The bell of the chapel was cast in", "Lisbon"),
    ("What is known of the mill?", "The roof of the mill is covered with", "copper"),
    ("What grows behind the school?", "The garden behind the school is full of", "tulips"),
    ("How is the ferryman's boat named?", "The boat of the ferryman is named", "Falcon"),
    ("What does the sign above the bakery show?", "The sign above the bakery shows a sleeping", "otter"),
    ("Where was the station's clock made?", "The clock in the station was made in", "Vienna"),
    ("Which colour has the library's door?", "The door of the library is painted", "yellow"),
    ("How is the doctor's dog called?", "The dog of the doctor is called", "Biscuit"),
    ("What is the bridge made of?", "The bridge over the canal is made of", "granite"),
    ("When does the choir sing?", "The choir of the town sings every", "Thursday"),
    ("What does the statue hold?", "The statue in the market holds a broken", "lantern"),
    ("Where does the smith's apprentice come from?", "The apprentice of the smith comes from", "Norway"),
    ("What is in the inn's soup?", "The soup of the inn is made with", "pumpkin"),
    ("Which bird is on the flag?", "The flag on the tower carries a white", "heron"),
    ("What does the teacher of music play?", "The teacher of music plays the", "cello"),
    ("What is stored under the town hall?", "The cellar of the town hall is full of", "vinegar"),
)
"""A question, how the sentence that answers it begins, and how it ends; a note has one of these sentences."""


def passages() -> list[str]:
    """Notes of about 260 tokens: a fact that is asked for, and some of the story of a town."""
    paragraphs = TEXT.strip().split("\n\n")
    notes = []
    for number, (_, begin, end) in enumerate(FACTS):
        filler = " ".join(paragraphs[(number + step) % len(paragraphs)] for step in range(3)).replace("\n", " ")
        sentences = filler.split(". ")[: 10 + number % 3]
        sentences.insert(2 + number % 4, f"{begin} {end}")
        notes.append(". ".join(sentences).rstrip(".") + ".\n\n")
    return notes


def question(number: int) -> str:
    """About one passage; the answer is begun, so that its next word is the end of the fact."""
    asked, begin, _ = FACTS[number]
    return f"{asked}<|im_end|>\n<|im_start|>assistant\n{begin}"


class Asked:
    """What an engine said to one prompt, and when."""

    def __init__(self, engine: Engine, prompt: list[int], wish: dict[str, Any] | None, salt: str | None) -> None:
        from vllm import SamplingParams

        extra = None if wish is None else {"kv_transfer_params": {"kvstore": wish}}
        sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, logprobs=LOGPROBS, extra_args=extra)
        inputs: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            inputs["cache_salt"] = salt
        core = engine.llm.llm_engine
        begun = time.perf_counter()
        self.first_s = 0.0
        core.add_request(str(begun), inputs, sampling)
        while core.has_unfinished_requests():
            for output in core.step():
                if not self.first_s and output.outputs[0].token_ids:
                    self.first_s = time.perf_counter() - begun
                self.tokens = list(output.outputs[0].token_ids)
                self.text = output.outputs[0].text.strip()
                self.cached = output.num_cached_tokens or 0
                self.told = (output.kv_transfer_params or {}).get("kvstore", {})
                self.first = {token: one.logprob for token, one in output.outputs[0].logprobs[0].items()}

    def far_from(self, truth: Asked) -> float:
        """Divergence of the first token's distribution from the true one, over the true one's likeliest tokens."""
        least = min(self.first.values())
        return sum(math.exp(p) * (p - self.first.get(token, least)) for token, p in truth.first.items())


WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "full": ("full prefill", None),
    "prefix": ("system prompt from the cache", None),
    "blend": (f"blended, {SHARE:.0%} computed again", {"blend": True, "share": SHARE}),
    "more": (f"blended, {2 * SHARE:.0%} computed again", {"blend": True, "share": 2 * SHARE}),
}


def build(model: Path, device: str, daemon: Daemon, folder: Path, verdict: Path) -> dict[str, Any]:
    """`kvstore build` in a process of its own."""
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in passages()), "utf-8")
    (folder / "system.txt").write_text(SYSTEM, "utf-8")
    command = [sys.executable, "-m", "kvstore", "build", str(folder / "docs.jsonl"), "--model", str(model)]
    command += ["--system", str(folder / "system.txt"), "--address", daemon.address, "--probe", str(verdict)]
    command += ["--share", str(SHARE), "--device", device, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kvstore build failed:\n{done.stderr}")
    return json.loads(done.stdout)


def forget_salted(engine: Engine, daemon: Daemon, salts: list[str]) -> None:
    """Exact prompts are asked under salts of their own, so that none finds another's; what they stored can go."""
    mine = engine.worker_connector._worker._namespace
    with daemon.client() as client:
        for salt in salts:
            client.drop(None, namespace=msgspec.structs.replace(mine, salt=hash_salt(salt)))


def ask_all(engine: Engine, daemon: Daemon, count: int, encode: Any) -> list[dict[str, Any]]:
    """Each prompt in each way, in turns; the engine's own cache is emptied before each but the prefix way."""
    system = encode(SYSTEM)
    notes = [encode(note) for note in passages()]
    chance = random.Random(5)
    rounds = []
    for number in range(count):
        chosen = chance.sample(range(PASSAGES), EACH)
        about = chance.choice(chosen)
        prompt = [*system, *(token for one in chosen for token in notes[one]), *encode(question(about))]
        row: dict[str, Any] = {"prompt_tokens": len(prompt), "fact": FACTS[about][2], "ways": {}}
        for way, (_, wish) in WAYS.items():
            engine.forget()
            salt = f"{way}-{number}" if way in ("full", "prefix") else None
            if way == "prefix":
                Asked(engine, [*system, *encode("Hello")], None, salt)  # so that the system prompt is in the cache
            row["ways"][way] = Asked(engine, prompt, wish, salt)
        engine.forget()
        row["after"] = Asked(engine, prompt, None, f"after-{number}")
        forget_salted(engine, daemon, [f"{way}-{number}" for way in ("full", "prefix", "after")])
        full, blend = row["ways"]["full"], row["ways"]["blend"]
        say(f"   {number + 1:2}. {len(prompt)} tokens: full {1e3 * full.first_s:6,.0f} ms, blended "
            f"{1e3 * blend.first_s:6,.0f} ms; {row['fact']}: {full.text[:8]!r} / {blend.text[:8]!r}")  # fmt: skip
        rounds.append(row)
    return rounds


def summary(rounds: list[dict[str, Any]], built: dict[str, Any]) -> dict[str, Any]:
    """What the table shows."""
    ways = {}
    for way, (name, _) in WAYS.items():
        asked = [row["ways"][way] for row in rounds]
        full = [row["ways"]["full"] for row in rounds]
        ways[way] = {
            "name": name,
            "first_token_ms": [round(1e3 * one.first_s, 1) for one in asked],
            "first_token_median_ms": round(1e3 * median(one.first_s for one in asked), 1),
            "times_sooner": round(median(f.first_s / one.first_s for f, one in zip(full, asked, strict=True)), 2),
            "first_token_kl": round(fmean(one.far_from(f) for f, one in zip(full, asked, strict=True)), 4),
            "same_first_token": fmean(one.tokens[0] == f.tokens[0] for f, one in zip(full, asked, strict=True)),
            "same_answer": fmean(one.tokens == f.tokens for f, one in zip(full, asked, strict=True)),
            "right_fact": fmean(row["ways"][way].text.startswith(row["fact"]) for row in rounds),
            "tokens_not_computed": round(fmean(one.cached for one in asked)),
        }
    return {
        "share": SHARE,
        "prompts": len(rounds),
        "prompt_tokens": [row["prompt_tokens"] for row in rounds],
        "build": built,
        "ways": ways,
        "blended": all(row["ways"]["blend"].told.get("chunks") == EACH for row in rounds),
        "exact_after": all(row["after"].tokens == row["ways"]["full"].tokens for row in rounds),
    }


def run(folder: Path, count: int, device: str, dtype: str) -> dict[str, Any]:
    """Daemon, engine, build, prompts."""
    from model import smollm2

    model = smollm2(dtype)
    verdict = folder / "verdict.json"
    daemon = Daemon(folder, host_bytes="1GiB")
    daemon.start()
    engine = None
    try:
        say("starting vLLM with the connector ...")
        extra = {"blend_gate": str(verdict), "lookup_deadline_ms": 500.0, "load": "always"}
        options: dict[str, Any] = {"dtype": dtype, "max_num_batched_tokens": 4096, "max_model_len": 4096}
        engine = Engine(model, daemon.address, extra, **options)
        if not engine.connected(20.0):
            raise SystemExit("the engine did not reach the daemon")
        tokenizer = engine.llm.get_tokenizer()

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        engine.ask(encode(SYSTEM + TEXT)[:600], max_tokens=2)  # the engine introduces itself with its first blocks
        say("kvstore build: passages behind the system prompt, and the probe ...")
        built = build(model, device, daemon, folder, verdict)
        kl, top1 = built["verdict"]["kl"], built["verdict"]["top1"]
        say(f"   {built['total']} chunks, {built['computed']} tokens in {built['seconds']:.1f} s; probe: KL {kl:.3f}, "
            f"same first choice {top1:.1%}")  # fmt: skip
        say(f"{count} prompts, each computed in full, with a cached system prompt, and blended:")
        rounds = ask_all(engine, daemon, count, encode)
        counters = {name: value for name, value in engine.metrics().items() if "blend" in name or "outages" in name}
    finally:
        if engine is not None:
            engine.close()
        daemon.stop()
    named = {"model": f"SmolLM2-135M-Instruct, {dtype}", "device": device}
    return named | summary(rounds, built) | {"counters": counters}


def show(result: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="time to first token, and how far from full prefill", title_justify="left")
    table.add_column("way")
    for column in ("first token, ms", "sooner", "KL of it", "same token", "same 16 tokens", "right fact"):
        table.add_column(column, justify="right")
    for way in result["ways"].values():
        shares = [f"{way[name]:.0%}" for name in ("same_first_token", "same_answer", "right_fact")]
        times = [f"{way['first_token_median_ms']:,.0f}", f"{way['times_sooner']:.2f}x", f"{way['first_token_kl']:.4f}"]
        table.add_row(way["name"], *times, *shares)
    Console(width=max(Console().width, 120)).print(table)
    say(f"the exact prompt after the blended one answers as before: {'yes' if result['exact_after'] else 'NO'}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--prompts", type=int, default=8, help="how many prompts (default 8)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="what vLLM here is made for")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    set_environment()
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as folder:
        result = run(Path(folder), options.prompts, options.device, options.dtype)
    show(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"bench": "demo_rag", "machine": facts(), "results": result}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if result["blended"] and result["exact_after"] else 1


if __name__ == "__main__":
    sys.exit(main())
