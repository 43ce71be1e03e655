"""How the values of a metric are taken out of the daemon's snapshot: one way for each shape that there is in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.obs import Snapshot, count, listed, namespaces, number, numbers, part

MAX_NAMESPACES = 64
"""Above this many namespaces they are exported as one sum, so that tenants cannot fill a Prometheus server."""
MAX_LABEL = 120
"""Characters of a label value that came from a user, such as a model name."""
BREAKER_STATES = ("closed", "half_open", "open")
NS = ("domain", "ns")
ABOUT = ("model", "dtype", "tp_rank", "tp_size", "lora")

Labels = tuple[str, ...]
Sample = tuple[Labels, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """How the values of a metric are taken out of a snapshot.

    Attributes
    ----------
    labels : tuple of str
        Label names, in the order in which `samples` gives their values.
    source : str
        Where in the snapshot the values stand, for the docs.
    samples : callable
        Gives (label values, value) of a snapshot. A histogram's value is (buckets, sum).
    """

    labels: Labels
    source: str
    samples: Callable[[Snapshot], Iterable[Sample]]


def one(*path: str) -> Reading:
    """A single number without labels; absent from the exposition where the snapshot has none."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        value = number(snapshot, *path)
        if value is not None:
            yield (), value

    return Reading((), ".".join(path), samples)


def by_label(name: str, label: str) -> Reading:
    """A mapping of label value to number."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for each, value in numbers(snapshot, name).items():
            yield (each,), value

    return Reading((label,), f"{name}.*", samples)


def tiers(*path: str) -> Reading:
    """The same number of each tier that has it."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            value = number(state, *path)
            if value is not None:
                yield (tier,), value

    return Reading(("tier",), "tiers.*." + ".".join(path), samples)


def tiers_split(label: str, fields: dict[str, str]) -> Reading:
    """Several numbers of each tier, told apart by a second label; `fields` maps its values to names in the snapshot."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            for each, name in fields.items():
                value = number(state, name)
                if value is not None:
                    yield (tier, each), value

    return Reading(("tier", label), "tiers.*.{" + ",".join(fields.values()) + "}", samples)


def dropped(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, state in part(snapshot, "tiers").items():
        for reason, value in numbers(state, "dropped").items():
            yield (tier, reason), value


def breakers(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, state in part(snapshot, "tiers").items():
        now = part(state, "breaker").get("state")
        if now is not None:
            for each in BREAKER_STATES:
                yield (tier, each), float(str(now).replace("-", "_") == each)


def outcomes(snapshot: Snapshot) -> Iterator[Sample]:
    for verb, state in part(snapshot, "requests").items():
        errors = count(state, "errors")
        yield (verb, "ok"), max(0, count(state, "count") - errors)
        yield (verb, "error"), errors


def latencies(snapshot: Snapshot) -> Iterator[Sample]:
    for verb, state in part(snapshot, "requests").items():
        buckets = [(f"{le:g}", below) for le, below in _buckets(state) if math.isfinite(le)]
        yield (verb,), ([*buckets, ("+Inf", count(state, "count"))], count(state, "seconds"))


def _buckets(state: Any) -> Iterator[tuple[float, float]]:
    """Pairs of (upper bound in seconds, requests at or below it); a list of anything else counts as no buckets."""
    found = part(state).get("buckets")
    for pair in found if isinstance(found, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            yield float(pair[0]), float(pair[1])


def policies(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, policy in part(snapshot, "policies").items():
        yield (short(tier), short(policy)), 1


def version(snapshot: Snapshot) -> Iterator[Sample]:
    yield (short(snapshot.get("version", "unknown")),), 1


def short(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text[:MAX_LABEL]


def digest(namespace: Mapping[str, Any]) -> str:
    return short(namespace.get("digest", "unknown"))[:12]


def _owner(snapshot: Snapshot) -> Callable[[Mapping[str, Any]], Labels]:
    """How namespaces are told apart in this scrape: one by one, or not at all where there are too many."""
    if len(namespaces(snapshot)) > MAX_NAMESPACES:
        return lambda namespace: ("all", "all")
    return lambda namespace: (short(namespace.get("domain", "")), digest(namespace))


def spaces(name: str) -> Reading:
    """A number of each namespace."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            yield owner(each), count(each, name)

    return Reading(NS, f"namespaces[].{name}", samples)


def spaces_by_tier(name: str) -> Reading:
    """A number of each namespace and tier."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            for tier, value in numbers(each, name).items():
                yield (*owner(each), tier), value

    return Reading((*NS, "tier"), f"namespaces[].{name}.*", samples)


def space_info(snapshot: Snapshot) -> Iterator[Sample]:
    if len(namespaces(snapshot)) <= MAX_NAMESPACES:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            about = (short(each.get(name, "")) for name in ABOUT)
            yield (*owner(each), *about), 1


def space_count(snapshot: Snapshot) -> Iterator[Sample]:
    yield (), len(namespaces(snapshot))


def partitions(name: str) -> Reading:
    """A number of each partition of each tier; there are at most as many as rules."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, partitions in part(snapshot, "quotas").items():
            for rule, state in part(partitions).items():
                yield (tier, rule or "none"), count(state, name)

    return Reading(("tier", "rule"), f"quotas.*.*.{name}", samples)


def quota_evictions(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, by, victim, blocks in snapshot.get("quota_evictions", ()):
        yield (tier, by or "none", victim or "none"), blocks


# -- codecs, profiles and blending -------------------------------------------------------------------------------------


def chains(where: str, name: str) -> Reading:
    """A number of each chain in each tier, of what it `held` or what went through it `since_start`."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            for chain, counts in part(state, "codecs", where).items():
                yield (tier, chain), count(counts, name)

    return Reading(("tier", "chain"), f"tiers.*.codecs.{where}.*.{name}", samples)


def rungs(snapshot: Snapshot) -> Iterator[Sample]:
    """How many rungs of each profile passed the gate, and how many did not."""
    for profile in listed(snapshot, "profiles"):
        passed = [bool(rung.get("passed")) for rung in listed(profile, "rungs")]
        for verdict in (True, False):
            yield (short(profile.get("name", "")), "passed" if verdict else "refused"), passed.count(verdict)


def blended(name: str) -> Reading:
    """A number of what each namespace's engines put together from chunks."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for each in listed(snapshot, "blends")[:MAX_NAMESPACES]:
            yield (short(each.get("domain", "")), digest(each)), count(each, name)

    return Reading(NS, f"blends[].{name}", samples)


def gates(snapshot: Snapshot) -> Iterator[Sample]:
    """Whether the probe of each namespace's model passed, where its engine told."""
    for each in listed(snapshot, "blends")[:MAX_NAMESPACES]:
        verdict = part(each, "verdict")
        if verdict:
            passed = count(verdict, "kl") <= count(verdict, "most_kl")
            passed = passed and count(verdict, "top1") >= count(verdict, "least_top1") and count(verdict, "prompts") > 0
            yield (short(each.get("domain", "")), digest(each)), float(passed)
