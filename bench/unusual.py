"""Eviction policies on made-up traces of unusual kinds, which nothing was tuned to.

Popular documents amid floods of prompts that never come back; a circle of documents larger than the cache, once turned
round; a working set that is another every 1,200 requests; a prompt sampled many times behind a few examples, then never
again; trees of thought; chunks of which half go in a circle; tenants who do all of that at rates that change; texts
that are changed in the middle; three continents that sleep by turns; and five kinds around floods: working sets that
follow them, documents that come up amid them, circles with scans between, popularity that drifts, and talks by day
with a job that reads a corpus by night. Rules and columns are those of `replay.py`.

    python bench/unusual.py --out bench/results/unusual.json
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from common import arguments, finish
from replay import POLICIES, SHARES, Request, agents, conversations, one_size


def popular(rng: random.Random, count: int, exponent: float) -> int:
    """One of so many, the first ones often."""
    return min(count - 1, int(rng.paretovariate(exponent)) - 1)


def document(name: object, length: int) -> Request:
    """Blocks of a document."""
    return [(name, i) for i in range(length)]


def scans(rng: random.Random) -> list[Request]:
    """Popular documents, each with another question, and now and then a flood of documents that are read once."""
    requests: list[Request] = []
    unique = 0
    lengths = [rng.randrange(4, 40) for _ in range(600)]
    while len(requests) < 9000:
        if rng.random() < 0.004:
            for _ in range(rng.randrange(50, 250)):
                unique += 1
                requests.append([("sys", 0), *document(("scan", unique), rng.randrange(10, 60))])
        which = popular(rng, 600, 0.7)
        unique += 1
        requests.append([("sys", 0), *document(("d", which), lengths[which]), ("q", unique)])
    return requests


def loops(rng: random.Random) -> list[Request]:
    """All documents in turn, again and again; half way in the opposite order."""
    lengths = [rng.randrange(5, 60) for _ in range(400)]
    forth = list(range(400))
    order = [which for turn in range(20) for which in (forth if turn < 10 else forth[::-1])]
    return [
        [("sys", 0), *document(("d", which), lengths[which]), ("q", number)] for number, which in enumerate(order, 1)
    ]


def shifting(rng: random.Random) -> list[Request]:
    """What is popular is all new every 1,200 requests; a tenth goes back to what was before the last."""
    requests: list[Request] = []
    for phase in range(8):
        lengths = [rng.randrange(3, 50) for _ in range(500)]
        for _ in range(1200):
            which = popular(rng, 500, 0.6)
            back = phase >= 2 and rng.random() < 0.1
            name, length = (phase - 2 if back else phase, which), 20 if back else lengths[which]
            requests.append([("sys", phase % 2), *document(name, length), ("q", len(requests))])
    return requests


def samples(rng: random.Random) -> list[Request]:
    """Questions behind one of 40 sets of examples, each asked up to 16 times within a short while, and then no more."""
    requests: list[Request] = []
    pending: list[tuple[int, int, int]] = []
    unique = 0
    examples = [rng.randrange(10, 50) for _ in range(40)]
    while len(requests) < 9000:
        if len(pending) < 64:
            which = popular(rng, 40, 0.5)
            unique += 1
            pending += [(which, unique, rng.randrange(3, 12))] * rng.choice((1, 1, 4, 8, 16))
        if rng.random() < 0.05:
            rng.shuffle(pending)
        which, question, length = pending.pop(0)
        requests.append([*document(("pre", which), examples[which]), *document(("q", question), length)])
    return requests


def tenants(rng: random.Random) -> list[Request]:
    """Six tenants, each with another of these habits; who asks how often changes every 700 requests."""
    habits = (scans, loops, shifting, samples, conversations, agents)
    streams: list[Iterator[Request]] = [iter(habit(random.Random(rng.random()))) for habit in habits]
    requests: list[Request] = []
    weights = [1.0] * len(streams)
    while len(requests) < 20_000:
        if len(requests) % 700 == 0:
            weights = [rng.random() ** 3 + 0.02 for _ in streams]
        who = rng.choices(range(len(streams)), weights)[0]
        request = next(streams[who], None)
        if request is not None:
            requests.append([(who, block) for block in request])
            continue
        weights[who] = 1e-9
        if max(weights) < 1e-6:
            break
    return requests


def trees(rng: random.Random) -> list[Request]:
    """Trees of thought: of each step the three best branches are gone on with; 16 trees at a time."""
    steps: list[Request] = []
    unique = 0
    while len(steps) < 9000:
        unique += 1
        paths: list[Request] = [[("t", unique, 0)]]
        for _ in range(rng.randrange(3, 10)):
            new: list[Request] = []
            for path in paths[:3]:
                for _ in range(rng.randrange(1, 4)):
                    unique += 1
                    new.append([*path, *document(unique, rng.randrange(1, 6))])
                    steps.append([("sys", 0), ("sys", 1), *new[-1]])
            rng.shuffle(new)
            paths = new
    each = len(steps) // 16
    return [steps[tree * each + step] for step in range(each) for tree in range(16)]


def chunk_loops(rng: random.Random) -> list[Request]:
    """Prompts of chunks: three popular ones, others every 3,000 requests, and three of a circle of 2,500."""
    requests: list[Request] = []
    for number in range(12_000):
        some: Request = [("c", number // 3000, popular(rng, 4000, 0.6)) for _ in range(3)]
        circle: Request = [("l", (number * 3 + i) % 2500) for i in range(3)]
        requests.append([("sys", 0), *some, *circle, ("u", number)])
    return requests


def edits(rng: random.Random) -> list[Request]:
    """Projects whose text is in the prompt: most requests go on behind it, some after a change, which is rarely far in
    front, and everything behind a change is new. Some changes are taken back."""
    texts = [[(which, i, 0) for i in range(rng.randrange(20, 150))] for which in range(60)]
    before = [list(text) for text in texts]
    requests: list[Request] = []
    for number in range(9000):
        which = popular(rng, len(texts), 0.5)
        text = texts[which]
        if rng.random() < 0.3:
            if rng.random() < 0.2:
                texts[which], before[which] = before[which], text
            else:
                at = max(1, len(text) - 1 - popular(rng, len(text), 0.5))
                before[which] = text
                texts[which] = text[:at] + [(which, i, number) for i in range(at, len(text) + rng.choice((-1, 0, 1)))]
        requests.append([("sys", 0), *texts[which], *document(("q", number), rng.randrange(1, 6))])
    return requests


def days(rng: random.Random) -> list[Request]:
    """Three continents, each with documents of its own and awake at another time of a day of 3,000 requests; of each
    a few documents are replaced every day, and in the night a job reads some of them all."""
    lengths = [[rng.randrange(3, 50) for _ in range(300)] for _ in range(3)]
    requests: list[Request] = []
    for number in range(12_000):
        day, hour = divmod(number, 3000)
        awake = [1.02 + math.sin(2 * math.pi * (hour / 3000 + where / 3)) for where in range(3)]
        where = rng.choices(range(3), awake)[0]
        which = number % 300 if rng.random() < 0.1 and awake[where] < 0.5 else popular(rng, 300, 0.6)
        name = where, which, day if which % 10 == 0 else 0
        requests.append([("sys", 0), ("sys", where), *document(name, lengths[where][which]), ("q", number)])
    return requests


def moves(rng: random.Random) -> list[Request]:
    """Working sets one after the other, all documents of one equally popular, and a flood before each."""
    requests: list[Request] = []
    for phase in range(10):
        for _ in range(rng.randrange(300, 900)):
            requests.append(document(("flood", len(requests)), rng.randrange(5, 40)))
        count = rng.choice((20, 60, 150, 400))
        lengths = [rng.randrange(3, 40) for _ in range(count)]
        for _ in range(rng.randrange(2, 8) * count):
            which = rng.randrange(count)
            requests.append([*document((phase, which), lengths[which]), ("q", len(requests))])
    return requests


def arrivals(rng: random.Random) -> list[Request]:
    """An endless flood; now and then a document comes up and is asked for amid it for a while, and never again."""
    requests: list[Request] = []
    asked: list[tuple[int, int, float]] = []
    for number in range(12_000):
        if rng.random() < 0.004:
            asked.append((number, rng.randrange(4, 30), rng.choice((0.02, 0.05, 0.2))))
            requests.append(document(("d", number), asked[-1][1]))
        elif asked and rng.random() < 0.15:
            found = rng.choice(asked)
            requests.append([*document(("d", found[0]), found[1]), ("q", number)])
            if rng.random() < found[2]:
                asked.remove(found)
        else:
            requests.append(document(("f", number), rng.randrange(2, 30)))
    return requests


def scan_loops(rng: random.Random) -> list[Request]:
    """Three circles of documents one after the other; in every other turn scans of what is read once between them."""
    requests: list[Request] = []
    for circle in range(3):
        lengths = [rng.randrange(5, 40) for _ in range(rng.choice((60, 150, 300)))]
        for turn in range(rng.randrange(5, 12)):
            for which, length in enumerate(lengths):
                requests.append([("sys", 0), *document((circle, which), length), ("q", len(requests))])
                if turn % 2 and rng.random() < 0.5:
                    requests.append([("sys", 0), *document(("scan", len(requests)), rng.randrange(5, 40))])
    return requests


def drift(rng: random.Random) -> list[Request]:
    """Documents by Zipf's law; with every request two of them change places."""
    lengths = [rng.randrange(3, 40) for _ in range(2000)]
    order = list(range(len(lengths)))
    weights = list(itertools.accumulate(1 / (rank + 1) ** 0.9 for rank in order))
    requests: list[Request] = []
    for number in range(9000):
        which = rng.choices(order, cum_weights=weights)[0]
        one, other = rng.randrange(len(order)), int(len(order) * rng.random() ** 2)
        order[one], order[other] = order[other], order[one]
        requests.append([("sys", 0), *document(("d", which), lengths[which]), ("q", number)])
    return requests


def nights(rng: random.Random) -> list[Request]:
    """Talks that go on by day; by night a job reads a corpus once, every other night the same one."""
    corpus = [rng.randrange(5, 40) for _ in range(400)]
    requests: list[Request] = []
    for day in range(10):
        talks: list[Request] = []
        for number in range(800):
            if not talks or rng.random() < 0.3:
                talks.append([])
            talk = rng.choice(talks[-60:])
            talk += [("t", day, number, i) for i in range(rng.randrange(2, 7))]
            requests.append([("sys", 0), *talk])
        edition = 0 if day % 2 else day
        requests += [[("sys", 1), *document(("c", edition, i), length)] for i, length in enumerate(corpus)]
    return requests


KINDS: dict[str, tuple[Callable[[random.Random], list[Request]], bool]] = {
    "scans": (scans, True),
    "loops": (loops, True),
    "shifting": (shifting, True),
    "samples": (samples, True),
    "tenants": (tenants, True),
    "trees": (trees, True),
    "chunk loops": (chunk_loops, False),
    "edits": (edits, True),
    "days": (days, True),
    "moves": (moves, True),
    "arrivals": (arrivals, True),
    "scan loops": (scan_loops, True),
    "drift": (drift, True),
    "nights": (nights, True),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=11, help="seed of the traces (default 11)")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="traces to replay (default all)")
    parser.add_argument("--policies", nargs="*", default=POLICIES, help="policies to replay, the default one first")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for name in args.kinds:
        make, chained = KINDS[name]
        requests = make(random.Random(args.seed))
        distinct = len({block for blocks in requests for block in blocks})
        print(f"{name}: {len(requests)} requests, {distinct} distinct", flush=True)
        results[name] = {"distinct": distinct, "sizes": {}}
        for share in SHARES:
            row = one_size(requests, max(1, distinct * share // 100), chained, args.policies)
            results[name]["sizes"][share] = row
            hit = row["hit_percent"]
            behind = max(hit[p] for p in args.policies) - hit[args.policies[0]]
            cells = [f"{hit[p]:.1f}" for p in ("fifo", *args.policies)]
            rows.append((name, f"{share} %", *cells, f"{row['belady']:.1f}", f"{behind:.2f}"))
    finish(args, "unusual", results, ("trace", "size", "fifo", *args.policies, "belady", "behind"), rows)


if __name__ == "__main__":
    main()
