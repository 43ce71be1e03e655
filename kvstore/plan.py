"""Plan a batch of prompts: which prefixes they share, and an order that computes and keeps each of these once.

As BatchLLM (arXiv 2412.03594, section 4) does for a whole list of prompts: what the batch shares is known before it
runs, so prefixes are pinned for exactly as long as they are needed instead of guessed by an eviction policy. The tree
of common prefixes is walked depth-first. Then the prompts of a prefix stand one after the other, and at each step no
shared block is alive but those of the prompt that runs; no order can do with fewer, so the peak is the least possible.

A pure function of keys: a daemon is only needed to carry a plan out (`KVStoreClient.run`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.errors import InvalidParams
from kvstore.keys import TokenIds, prefix_keys
from kvstore.types import Namespace


@dataclass(frozen=True, slots=True)
class Step:
    """One prompt, in its turn.

    Attributes
    ----------
    prompt : int
        Its index in the list that was planned.
    shared : int
        Its leading blocks that other prompts have, too.
    begins : list of bytes
        Keys of shared blocks that no earlier step had: pin them from here on, and as soon as they are stored.
    ends : list of bytes
        Keys of shared blocks that no later step has: unpin them after this step.
    """

    prompt: int
    shared: int
    begins: list[bytes]
    ends: list[bytes]


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that begin with the same block, as a run of steps.

    Attributes
    ----------
    first, count : int
        The steps.
    common : int
        Leading blocks that all of them share.
    """

    first: int
    count: int
    common: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run in which order, and what to keep meanwhile.

    Attributes
    ----------
    keys : sequence of sequences of bytes
        Prefix keys of each prompt, as planned.
    steps : list of Step
        The order.
    groups : list of Group
        Runs of steps that begin alike.
    blocks, distinct : int
        Full blocks of all prompts; those that have to be computed if each is computed once.
    peak : int
        Most shared blocks alive at one time.
    """

    keys: Sequence[Sequence[bytes]]
    steps: list[Step]
    groups: list[Group]
    blocks: int
    distinct: int
    peak: int

    @property
    def order(self) -> list[int]:
        """Indexes of the prompts in the order in which to run them."""
        return [step.prompt for step in self.steps]


def plan_tokens(namespace: Namespace, prompts: Sequence[TokenIds], outputs: Sequence[int] | None = None) -> Plan:
    """`plan` of prompts given as token ids."""
    return plan([prefix_keys(namespace, prompt) for prompt in prompts], outputs)


def plan(prompts: Sequence[Sequence[bytes]], outputs: Sequence[int] | None = None) -> Plan:
    """Plan a batch.

    Parameters
    ----------
    prompts : sequence of sequences of bytes
        Prefix keys of each prompt: equal keys mean equal prefixes.
    outputs : sequence of int, optional
        Tokens that each prompt is expected to generate. Groups with much to generate for what they compute go first,
        so that decoding is spread over the whole batch; without it groups keep the order of the list.

    Raises
    ------
    InvalidParams
        If a key follows two different ones, so that they are no prefix keys, or the lengths differ.
    """
    if outputs is not None and len(outputs) != len(prompts):
        raise InvalidParams(f"outputs: {len(outputs)} for {len(prompts)} prompts.", "")
    numbered, uses = _number(prompts)
    shared = [bisect_left(ids, True, key=lambda node: uses[node] < 2) for ids in numbered]
    # Numbers rise in the order of the list, so what came first in it comes first among its siblings.
    order = sorted(range(len(prompts)), key=lambda at: (numbered[at][: shared[at]], at))
    runs = _runs(order, numbered, shared)
    if outputs is not None:
        runs.sort(key=lambda run: _decode_share(run, numbered, outputs), reverse=True)
    order = [at for run in runs for at in run]
    steps = list(_steps(order, prompts, shared))
    return Plan(
        keys=prompts,
        steps=steps,
        groups=list(_groups(runs, numbered)),
        blocks=sum(map(len, numbered)),
        distinct=len(uses),
        peak=max(shared, default=0),
    )


def _number(prompts: Sequence[Sequence[bytes]]) -> tuple[list[list[int]], list[int]]:
    """Each prompt's blocks as numbers, in the order in which they were first met; and how many prompts have each."""
    numbers: dict[bytes, int] = {}
    parents: list[int] = []
    uses: list[int] = []
    numbered: list[list[int]] = []
    for at, keys in enumerate(prompts):
        ids: list[int] = []
        parent = -1
        for key in keys:
            node = numbers.get(key)
            if node is None:
                node = numbers[key] = len(parents)
                parents.append(parent)
                uses.append(1)
            elif parents[node] != parent:
                raise InvalidParams(f"prompts: a key of prompt {at} follows different keys; these are no prefix keys.")
            else:
                uses[node] += 1
            ids.append(node)
            parent = node
        numbered.append(ids)
    return numbered, uses


def _runs(order: list[int], numbered: list[list[int]], shared: list[int]) -> list[list[int]]:
    """The order cut where the first block changes; a prompt that shares nothing is a run of its own."""
    runs: list[list[int]] = []
    root = -1
    for at in order:
        first = numbered[at][0] if shared[at] else -1
        if first < 0 or first != root:
            runs.append([])
        runs[-1].append(at)
        root = first
    # Runs that share nothing were sorted to the front: back to where they stand in the list.
    runs.sort(key=min)
    return runs


def _decode_share(run: list[int], numbered: list[list[int]], outputs: Sequence[int]) -> float:
    """Tokens that a group generates for each block that has to be computed for it."""
    computed = len({node for at in run for node in numbered[at]})
    return sum(outputs[at] for at in run) / max(1, computed)


def _groups(runs: list[list[int]], numbered: list[list[int]]) -> Iterator[Group]:
    first = 0
    for run in runs:
        low, high = min(numbered[at] for at in run), max(numbered[at] for at in run)
        common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        yield Group(first, len(run), common)
        first += len(run)


def _steps(order: list[int], prompts: Sequence[Sequence[bytes]], shared: list[int]) -> Iterator[Step]:
    """Where pins begin and end: a shared block is alive from the first prompt that has it to the last."""
    alive: Sequence[bytes] = ()
    for at, following in zip(order, [*order[1:], -1], strict=False):
        mine = prompts[at][: shared[at]]
        others = prompts[following][: shared[following]] if following >= 0 else ()
        begins, ends = _common(alive, mine), _common(mine, others)
        yield Step(at, len(mine), list(mine[begins:]), list(mine[ends:]))
        alive = mine


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Leading keys that two prompts share. As keys are of prefixes, it is enough to find the last one that is equal."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda i: one[i] != other[i])
