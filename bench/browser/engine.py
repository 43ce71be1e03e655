"""A real vLLM to look at on the dashboard: passages built ahead as chunks, exact prompts asked again, and blended ones.

On the CPU with SmolLM2-135M-Instruct, in the environment of `make engines`, against a daemon that runs already:

    .venv-vllm/bin/python bench/browser/engine.py SOCKET SECONDS [FIDELITY]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2] / "tests" / "engines")]

from demo_rag import SYSTEM, Asked, build, passages, question  # noqa: E402
from kit import Engine, set_environment  # noqa: E402

EACH = 4


def main() -> None:
    """Build, then ask until the time is over."""
    address, seconds = sys.argv[1], float(sys.argv[2])
    fidelity = sys.argv[3] if len(sys.argv) > 3 else "exact"
    set_environment()
    from model import smollm2

    chance, model = random.Random(1), smollm2()
    with tempfile.TemporaryDirectory(prefix="kvstore-look-") as folder:
        verdict = Path(folder) / "verdict.json"
        extra = {"blend_gate": str(verdict), "lookup_deadline_ms": 500.0, "fidelity": fidelity}
        engine = Engine(model, address, extra, max_num_batched_tokens=4096, max_model_len=4096)
        try:
            if not engine.connected(20.0):
                raise SystemExit("the engine did not reach the daemon")
            tokenizer = engine.llm.get_tokenizer()
            notes = [tokenizer.encode(note, add_special_tokens=False) for note in passages()]
            system = tokenizer.encode(SYSTEM, add_special_tokens=False)
            engine.ask([*system, *notes[0], *notes[1]], max_tokens=2)  # so that it introduces itself
            print(build(model, SimpleNamespace(address=address), Path(folder), verdict)["verdict"], flush=True)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for wish in (None, {"blend": True}):
                    first = chance.randrange(4)
                    chosen = [first, first + 4, first + 8] if wish is None else chance.sample(range(len(notes)), EACH)
                    asked = tokenizer.encode(question(chosen[-1]), add_special_tokens=False)
                    engine.forget()  # vLLM's own cache, so that the daemon's is asked
                    answer = Asked(
                        engine, [*system, *(token for one in chosen for token in notes[one]), *asked], wish, None
                    )
                    print(f"{'exact' if wish is None else 'blend'} {answer.first_s:.2f} s", flush=True)
        finally:
            engine.close()


if __name__ == "__main__":
    main()
