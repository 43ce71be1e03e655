"""The same questions to a real vLLM: cold, warm, after the engine was restarted, after the daemon was killed.

``make demo`` runs it: vLLM on the CPU with SmolLM2-135M-Instruct, in float32, answers three questions about one long
text. Engines are processes of their own, so that a restart is a restart; the daemon is a process that gets ``kill -9``.
Ends with a table of first-token times and where the tokens came from. Exit code 1 if an answer changed or nothing was
served.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests" / "engines"))

from common import facts  # noqa: E402
from kit import ENVIRONMENT, Daemon, Engine, numbers, set_environment  # noqa: E402

QUESTIONS = (
    "How many basins does the harbour have?",
    "What is the old station now?",
    "What does the mayor carry along the dike?",
)
MAX_TOKENS = 32

TEXT = """\
The town of Selm lies where the river Arn meets the northern sea. It is a small town, and it would hardly be
known to anybody if it had not kept its books so carefully. Every ship that entered the harbour in the last
three hundred years was written down, with its name, its master, its cargo, and the weather of the day. The
books fill a whole room above the customs house, and people come from far away to read in them.

The first lighthouse of Selm was built by Marit Halvorsen, the widow of a pilot, who paid for it with the money
that the pilots' guild had given her after her husband was lost. It was a wooden tower with an iron basket for
the fire, and it stood on the eastern rock for forty-one years until a winter storm took it. The second one was
built of stone by the town itself, and it still stands. Its lamp was first fed with rape oil, later with
petroleum, and today it is electric. The keeper's house beside it is a museum where the old lamp can be seen,
with its eight lenses and its clockwork.

The harbour of Selm has three basins. The oldest is the herring basin, with its low quay of oak beams, where
small boats land their fish before sunrise. The second is the timber basin, made when the forests up the river
were cut and the logs came down in rafts. The third is the deep basin, which was blasted out of the rock by
engineers from the south, and in which the ferries turn. Between the timber basin and the deep basin stands a
crane that was once the largest of the coast. It can lift thirty tons, and it is driven by steam on one Sunday
of each summer, when the town has its feast.

The harbour master has an office on the second floor of the customs house, with windows on three sides. He keeps
two books. Into the red book he writes the ships that arrive and those that leave, as has always been done. Into
the grey book he writes the height of the water, four times a day, and what he sees of ice, drifting wood and
birds. The grey book is the older custom, although nobody knows any more who began it. Scientists who study the
sea have copied its columns, and they say that few places on the earth have such a long record of the water's
height.

On the wall of the customs house hangs the tide bell. It is rung when the water begins to fall, so that the
boats in the herring basin leave before they sit on the mud. It is rung twice, with a pause between, since one
stroke alone had been taken for the fire bell of the timber yard, and half of the town had come running with
buckets. That was in the year when the new church was consecrated, and the story is told to every child. The
bell itself came from a ship that broke up on the eastern rock, and the name of that ship, the Patience, can be
read on its rim.

The people of Selm eat much fish, and they eat it in three ways: salted, smoked, and in a soup with potatoes,
cream and dill. The soup is called the pilot's supper. It is said that it has to be cooked in a pot that is
never quite emptied, so that some of the soup of yesterday is in the soup of today. In the inn by the bridge
they claim that their pot has not been empty for ninety years, apart from one week in a war, when it was buried
in the garden to save it from soldiers.

In winter the river freezes above the bridge, and the children skate as far as the mill. The mill has not ground
corn for a long time. A clockmaker lives in it, who repairs the instruments of the ships: compasses, barometers,
chronometers and the logs that are towed behind to measure the speed. He has a cupboard with two hundred
drawers, and in each of them are the parts of one instrument that nobody came back for. He says that he will
wait another year and then begin to build one large clock of all of them, and he has said so every year since he
came.

Behind the church begins the dike, which is nine miles long and belongs to everybody. Each household has to keep
one stretch of it, marked by posts with the household's number, and on the first Saturday of October the whole
town walks along the dike with the mayor in front, who carries a spade. Where the spade goes in too easily, the
household has until All Saints' Day to mend its stretch. Whoever mends it well gets a loaf of white bread, and
whoever does not has to pay for the beer of the others. The dike broke only once, in the night after a wedding,
and since then nobody in Selm marries in the autumn.

The school of Selm teaches what other schools teach, and also knots, the reading of charts, and the old art of
telling the weather from the colour of the evening. For the last examination each pupil has to row alone around
the eastern rock and write a page about what was to be seen there. The best of these pages are kept with the
harbour books. One of them, written by a girl of twelve, describes a whale that lay beside her boat and
breathed, slowly, as if it were asleep, and how she waited until it had gone, so that she came back last of all
and was given the first prize.

The ferry to the islands leaves from the deep basin at six in the morning and comes back at eight in the
evening. It carries the doctor on Tuesdays, the judge on the first Thursday of the month, and a piano tuner in
May. On the islands live four hundred people and nine thousand sheep. The islanders speak a dialect that the
people of the town pretend not to understand, and the other way round, but on market days both speak very fast
and in whispers, and in the end the wool has been sold.

The railway reached the town late and left it early. For thirty-four years a train went twice a day over the
moor to the junction, with one carriage for people and four for fish. When the road was built the trains became
shorter, and one spring they did not come any more. The station is a library now. Its reading room is the old
waiting room, and the benches stand as they stood before, back to back, so that readers hear one another turn
the pages but do not see each other. The timetable of the last summer still hangs beside the door, and strangers
sometimes wait in front of it.

Every seventh year the town chooses a keeper of the books. The keeper has to have a clear hand and no debts, and
must not own a ship. The keeper's duty is to read one volume each month from the first page to the last, and to
mend what the worms and the damp have done. In this way the whole room is read once in twenty-five years. The
present keeper, a retired teacher of arithmetic, found in this reading that a certain ship had entered the
harbour and never left it, in the year of the great frost. Divers went down in the deep basin and found nothing.
The ship stands in the red book to this day, and the harbour master says each New Year's Eve, when he counts,
that one guest is still in the house.
"""


def prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of the text with each question."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{TEXT}\n{question} Answer in one sentence."}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]


# -- the engine's process ----------------------------------------------------------------------------------------------


def serve_questions(model: str, address: str) -> None:
    """Body of an engine process: JSON commands by line on standard input, JSON answers by line on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to its log
    set_environment()
    engine = Engine(Path(model), address, max_num_batched_tokens=2560, max_model_len=2560)
    asked = prompts(engine.llm.get_tokenizer())
    engine.ask(numbers(40), max_tokens=2)  # the first request of a process is slow for reasons of its own
    reply: dict[str, Any] = {"ready": True, "tokens": [len(prompt) for prompt in asked]}
    while True:
        print(json.dumps(reply), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        command = json.loads(line)
        if command["do"] == "drop":
            drop_all(engine, address)
            reply = {}
        elif command["do"] == "wait":
            reply = {"connected": engine.connected(20.0)}
        else:
            reply = timed(engine, asked[command["question"]])
    engine.close()


def timed(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    """Answer one prompt without the engine's own cache, and say how long the first token took."""
    from vllm import SamplingParams

    engine.forget()
    before = engine.metrics()
    core, seconds, text, tokens, cached = engine.llm.llm_engine, 0.0, "", [], 0
    begun = time.perf_counter()
    core.add_request(str(begun), {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    while core.has_unfinished_requests():
        for output in core.step():
            if not seconds and output.outputs[0].token_ids:
                seconds = time.perf_counter() - begun
            text, tokens = output.outputs[0].text, list(output.outputs[0].token_ids)
            cached = output.num_cached_tokens or 0
    after = engine.metrics()
    tiers = {
        tier: int(after[f"kvstore_hit_tokens_{tier}"] - before[f"kvstore_hit_tokens_{tier}"])
        for tier in ("host", "disk")
    }
    return {"first_token_s": seconds, "text": text.strip(), "tokens": tokens, "cached": cached, "tiers": tiers}


def drop_all(engine: Engine, address: str) -> None:
    """Make the daemon forget what this engine stored."""
    from kvstore.client import KVStoreClient

    with KVStoreClient(address) as client:
        for namespace in engine.scheduler_connector._scheduler._ranks:
            client.drop(None, namespace=namespace)


# -- the demo's process ------------------------------------------------------------------------------------------------


class EngineProcess:
    """A vLLM engine in a process of its own.

    Parameters
    ----------
    script : Path
        Bench whose ``--engine`` mode is to run.
    model : Path
    address : str
    log : Path
        Takes what vLLM prints.
    """

    def __init__(self, script: Path, model: Path, address: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, str(script), "--engine", str(model), address]
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=_environment()
            )
        self.first = self._read()

    def tell(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        if self._process.stdin is None:
            raise RuntimeError("the engine has no input")
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._process.wait(30)
            tail = self._log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"the engine ended unexpectedly:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """End it, and wait for that."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def say(text: str) -> None:
    """Progress goes to the terminal as it happens."""
    print(text, flush=True)


def phase(name: str, what: str, engine: EngineProcess, forget: bool = False) -> dict[str, Any]:
    """Ask all questions; with `forget`, each of them of a daemon that knows nothing."""
    say(f"\n== {name}: {what}")
    answers = []
    for number, question in enumerate(QUESTIONS):
        if forget:
            engine.tell("drop")
        answer = engine.tell("ask", question=number)
        answers.append(answer)
        tiers = ", ".join(f"{tokens} from {tier}" for tier, tokens in answer["tiers"].items() if tokens) or "none"
        say(f"   {question}\n     {answer['text']}")
        say(f"     first token after {answer['first_token_s'] * 1000:,.0f} ms; tokens served: {tiers}")
    return {"name": name, "answers": answers}


def wait_for_disk(daemon: Daemon) -> None:
    """What was stored reaches the disk in the background; wait for the last of it."""
    deadline = time.monotonic() + 60
    with daemon.client() as client:
        while client.stats()["queue"]["blocks"] and time.monotonic() < deadline:
            time.sleep(0.1)


def run(folder: Path) -> dict[str, Any]:
    """All phases, in order."""
    from model import smollm2

    say("SmolLM2-135M-Instruct in float32 (unpacked once, about half a minute the first time) ...")
    model = smollm2()
    daemon = Daemon(folder, disk=True, host_bytes="1GiB")
    say("starting the daemon: kvstore serve, memory and disk ...")
    daemon.start()
    engine = None
    try:
        say("starting vLLM with the connector ...")
        engine = EngineProcess(HERE, model, daemon.address, folder / "engine.log")
        lengths = ", ".join(str(count) for count in engine.first["tokens"])
        say(f"three questions about one text; prompts of {lengths} tokens")
        phases = [phase("cold", "each question from nothing", engine, forget=True)]
        phases.append(phase("warm", "the engine's own cache is emptied before each question", engine))
        engine.close()
        say("\nrestarting the engine ...")
        engine = EngineProcess(HERE, model, daemon.address, folder / "engine.log")
        phases.append(phase("engine restarted", "a new vLLM process", engine))
        wait_for_disk(daemon)
        say("\nkill -9 for the daemon, and a new one in its place; the engine goes on ...")
        daemon.kill()
        daemon.start()
        if not engine.tell("wait")["connected"]:
            raise SystemExit("the engine did not meet the new daemon")
        phases.append(phase("daemon killed -9", "and restarted, with what is on its disk", engine))
        tokens = engine.first["tokens"]
    finally:
        if engine is not None:
            engine.close()
        daemon.stop()
    return summary(phases, tokens)


def summary(phases: list[dict[str, Any]], tokens: list[int]) -> dict[str, Any]:
    """What the table shows."""
    truth = [answer["tokens"] for answer in phases[0]["answers"]]
    cold = [answer["first_token_s"] for answer in phases[0]["answers"]]
    rows = []
    for one in phases:
        answers = one["answers"]
        times = [answer["first_token_s"] for answer in answers]
        rows.append(
            {
                "phase": one["name"],
                "first_token_ms": [round(seconds * 1000, 1) for seconds in times],
                "times_sooner": round(sum(cold) / sum(times), 2),
                "host_tokens": sum(answer["tiers"]["host"] for answer in answers),
                "disk_tokens": sum(answer["tiers"]["disk"] for answer in answers),
                "identical": [answer["tokens"] for answer in answers] == truth,
            }
        )
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "prompt_tokens": tokens,
        "rows": rows,
        "identical": all(row["identical"] for row in rows),
        "served": all(row["host_tokens"] + row["disk_tokens"] > 0 for row in rows[1:]),
        "served_from_disk": rows[-1]["disk_tokens"] > 0,
        "answers": dict(zip(QUESTIONS, [answer["text"] for answer in phases[0]["answers"]], strict=True)),
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="time to first token, milliseconds", title_justify="left")
    table.add_column("phase")
    for number in range(len(QUESTIONS)):
        table.add_column(f"question {number + 1}", justify="right")
    for column in ("sooner", "tokens from memory", "from disk", "identical"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        times = [f"{ms:,.0f}" for ms in row["first_token_ms"]]
        counts = [str(row["host_tokens"]), str(row["disk_tokens"])]
        table.add_row(row["phase"], *times, f"{row['times_sooner']}x", *counts, "yes" if row["identical"] else "NO")
    Console(width=max(Console().width, 120)).print(table)
    say(f"answers identical: {'yes' if result['identical'] else 'NO'}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--engine", nargs=2, metavar=("MODEL", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve_questions(*options.engine)
        return 0
    set_environment()
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as folder:
        result = run(Path(folder))
    show(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"bench": "demo", "machine": facts(), "results": result}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not result["identical"] or not result["served"] or not result["served_from_disk"]:
        say("FAILED: " + ("an answer changed" if not result["identical"] else "a phase was served nothing"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
