"""The Prometheus metrics: one table, read from the daemon's snapshot when somebody scrapes.

`TABLE` is the whole truth. `/metrics` and `docs/metrics.md` are made from it; nothing is counted here. Ratios are not
exported: divide rates in PromQL, where the window is the reader's choice. Write `docs/metrics.md` anew with
``python -m kvstore.obs.metrics > docs/metrics.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from kvstore.obs import Snapshot, count, namespaces, number, numbers, part

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_NAMESPACES = 64
"""Above this many namespaces they are exported as one sum, so that tenants cannot fill a Prometheus server."""
MAX_LABEL = 120
"""Characters of a label value that came from a user, such as a model name."""
BREAKER_STATES = ("closed", "half_open", "open")

Labels = tuple[str, ...]
Sample = tuple[Labels, Any]
Read = Callable[[Snapshot], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Row:
    """One metric.

    Attributes
    ----------
    name : str
        Full name as exposed, with ``_total`` on counters.
    type : str
        ``gauge``, ``counter`` or ``histogram``.
    help : str
        One sentence, shown by Prometheus and in the docs.
    labels : tuple of str
        Label names, in the order in which `read` gives their values.
    read : callable
        Takes (label values, value) out of a snapshot. A histogram's value is (buckets, sum).
    source : str
        Where in the snapshot the value stands, for the docs.
    """

    name: str
    type: str
    help: str
    labels: Labels
    read: Read
    source: str


# -- ways to read ------------------------------------------------------------------------------------------------------


def _one(*path: str) -> tuple[Read, str]:
    """A single number without labels; absent from the exposition where the snapshot has none."""

    def read(snapshot: Snapshot) -> Iterator[Sample]:
        value = number(snapshot, *path)
        if value is not None:
            yield (), value

    return read, ".".join(path)


def _each(*path: str) -> tuple[Read, str]:
    """A mapping of label value to number."""

    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for label, value in numbers(snapshot, *path).items():
            yield (label,), value

    return read, ".".join(path) + ".*"


def _tiers(*path: str) -> tuple[Read, str]:
    """The same number of each tier that has it."""

    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            value = number(state, *path)
            if value is not None:
                yield (tier,), value

    return read, "tiers.*." + ".".join(path)


def _tiers_split(fields: dict[str, str]) -> tuple[Read, str]:
    """Several numbers of each tier, told apart by a second label; `fields` maps its values to names in the snapshot."""

    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            for label, name in fields.items():
                value = number(state, name)
                if value is not None:
                    yield (tier, label), value

    return read, "tiers.*.{" + ",".join(fields.values()) + "}"


def _dropped(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, state in part(snapshot, "tiers").items():
        for reason, value in numbers(state, "dropped").items():
            yield (tier, reason), value


def _breakers(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, state in part(snapshot, "tiers").items():
        now = part(state, "breaker").get("state")
        if now is not None:
            for each in BREAKER_STATES:
                yield (tier, each), float(str(now).replace("-", "_") == each)


def _outcomes(snapshot: Snapshot) -> Iterator[Sample]:
    for verb, state in part(snapshot, "requests").items():
        errors = count(state, "errors")
        yield (verb, "ok"), max(0, count(state, "count") - errors)
        yield (verb, "error"), errors


def _latencies(snapshot: Snapshot) -> Iterator[Sample]:
    for verb, state in part(snapshot, "requests").items():
        buckets = [(f"{le:g}", below) for le, below in _buckets(state) if math.isfinite(le)]
        yield (verb,), ([*buckets, ("+Inf", count(state, "count"))], count(state, "seconds"))


def _buckets(state: Any) -> Iterator[tuple[float, float]]:
    """Pairs of (upper bound in seconds, requests at or below it); a list of anything else counts as no buckets."""
    listed = part(state).get("buckets")
    for pair in listed if isinstance(listed, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            yield float(pair[0]), float(pair[1])


def _version(snapshot: Snapshot) -> Iterator[Sample]:
    yield (_short(snapshot.get("version", "unknown")),), 1


def _short(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text[:MAX_LABEL]


def _digest(namespace: Mapping[str, Any]) -> str:
    return _short(namespace.get("digest", "unknown"))[:12]


def _owner(snapshot: Snapshot) -> Callable[[Mapping[str, Any]], Labels]:
    """How namespaces are told apart in this scrape: one by one, or not at all where there are too many."""
    if len(namespaces(snapshot)) > MAX_NAMESPACES:
        return lambda namespace: ("all", "all")
    return lambda namespace: (_short(namespace.get("domain", "")), _digest(namespace))


def _spaces(name: str) -> tuple[Read, str]:
    """A number of each namespace."""

    def read(snapshot: Snapshot) -> Iterator[Sample]:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            yield owner(each), count(each, name)

    return read, f"namespaces[].{name}"


def _spaces_by_tier(name: str) -> tuple[Read, str]:
    """A number of each namespace and tier."""

    def read(snapshot: Snapshot) -> Iterator[Sample]:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            for tier, value in numbers(each, name).items():
                yield (*owner(each), tier), value

    return read, f"namespaces[].{name}.*"


def _space_info(snapshot: Snapshot) -> Iterator[Sample]:
    if len(namespaces(snapshot)) <= MAX_NAMESPACES:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            about = (_short(each.get(name, "")) for name in ("model", "dtype", "tp_rank", "tp_size", "lora"))
            yield (*owner(each), *about), 1


def _space_count(snapshot: Snapshot) -> Iterator[Sample]:
    yield (), len(namespaces(snapshot))


# -- the table ---------------------------------------------------------------------------------------------------------

_STATES = {
    "used": "used",
    "free": "free",
    "leased": "leased_bytes",
    "dirty": "dirty_bytes",
    "pinned": "pinned_bytes",
    "dropping": "dropping_bytes",
}
_EVENTS = {
    "hit": "hits",
    "miss": "misses",
    "stored": "stored",
    "exists": "exists",
    "evicted": "evicted",
    "corrupt": "corrupt",
}
_NS = ("domain", "ns")

TABLE: tuple[Row, ...] = (
    Row("kvstore_build_info", "gauge", "Always 1; the version is in the label.", ("version",), _version, "version"),
    Row("kvstore_uptime_seconds", "gauge", "Time since the daemon started.", (), *_one("uptime_s")),
    Row("kvstore_ready", "gauge", "1 when the daemon serves, 0 while it starts or drains.", (), *_one("ready")),
    Row("kvstore_draining", "gauge", "1 while the daemon finishes before it stops.", (), *_one("draining")),
    Row("kvstore_sessions", "gauge", "Connected clients.", (), *_one("sessions")),
    Row("kvstore_leases", "gauge", "Rights to read that are held now.", (), *_one("leases")),
    Row("kvstore_reservations", "gauge", "Rights to fill that are held now.", (), *_one("reservations")),
    Row("kvstore_requests_total", "counter", "Requests answered.", ("verb", "outcome"), _outcomes, "requests.*"),
    Row(
        "kvstore_request_seconds",
        "histogram",
        "Time from a request's arrival to its reply.",
        ("verb",),
        _latencies,
        "requests.*.{seconds,count,buckets}",
    ),
    Row("kvstore_errors_total", "counter", "Errors sent to clients, by code.", ("code",), *_each("errors")),
    Row("kvstore_asked_blocks_total", "counter", "Blocks that clients asked for.", (), *_one("asked_blocks")),
    Row(
        "kvstore_hit_blocks_total",
        "counter",
        "Blocks handed out, by the tier they were found in.",
        ("tier",),
        *_each("hit_blocks"),
    ),
    Row(
        "kvstore_missed_blocks_total",
        "counter",
        "Blocks asked for and not handed out, by reason.",
        ("reason",),
        *_each("missed"),
    ),
    Row("kvstore_hit_tokens_total", "counter", "Tokens in blocks handed out.", (), *_one("hit_tokens")),
    Row("kvstore_tier_capacity_bytes", "gauge", "Byte budget of a tier.", ("tier",), *_tiers("capacity")),
    Row(
        "kvstore_tier_bytes",
        "gauge",
        "Bytes of a tier by state. Leased, dirty and pinned are parts of used and may overlap: do not add them up.",
        ("tier", "state"),
        *_tiers_split(_STATES),
    ),
    Row("kvstore_tier_blocks", "gauge", "Blocks in a tier.", ("tier",), *_tiers("blocks")),
    Row("kvstore_tier_slabs", "gauge", "Memory slabs of a tier.", ("tier",), *_tiers("slabs")),
    Row(
        "kvstore_tier_huge_pages",
        "gauge",
        "1 when the tier's memory is in huge pages.",
        ("tier",),
        *_tiers("huge_pages"),
    ),
    Row(
        "kvstore_tier_direct_io",
        "gauge",
        "1 when the tier reads and writes with O_DIRECT.",
        ("tier",),
        *_tiers("direct_io"),
    ),
    Row(
        "kvstore_tier_events_total",
        "counter",
        "What happened to blocks in a tier.",
        ("tier", "event"),
        *_tiers_split(_EVENTS),
    ),
    Row(
        "kvstore_tier_dropped_blocks_total",
        "counter",
        "Blocks offered to a tier and not stored, by reason.",
        ("tier", "reason"),
        _dropped,
        "tiers.*.dropped.*",
    ),
    Row(
        "kvstore_tier_read_bytes_total", "counter", "Payload bytes read from a tier.", ("tier",), *_tiers("bytes_read")
    ),
    Row(
        "kvstore_tier_written_bytes_total",
        "counter",
        "Payload bytes written to a tier.",
        ("tier",),
        *_tiers("bytes_written"),
    ),
    Row("kvstore_tier_read_seconds_total", "counter", "Time spent reading from a tier.", ("tier",), *_tiers("read_s")),
    Row("kvstore_tier_write_seconds_total", "counter", "Time spent writing to a tier.", ("tier",), *_tiers("write_s")),
    Row(
        "kvstore_breaker_state",
        "gauge",
        "1 for the state that a tier's circuit breaker is in, 0 for the others.",
        ("tier", "state"),
        _breakers,
        "tiers.*.breaker.state",
    ),
    Row(
        "kvstore_breaker_failures",
        "gauge",
        "Failures that a tier's circuit breaker has counted.",
        ("tier",),
        *_tiers("breaker", "failures"),
    ),
    Row("kvstore_write_behind_blocks", "gauge", "Blocks on their way to lower tiers.", (), *_one("queue", "blocks")),
    Row("kvstore_write_behind_bytes", "gauge", "Bytes on their way to lower tiers.", (), *_one("queue", "bytes")),
    Row("kvstore_namespaces", "gauge", "Namespaces known.", (), _space_count, "namespaces"),
    Row(
        "kvstore_namespace_info",
        "gauge",
        f"Always 1; joins a namespace to its model. Absent above {MAX_NAMESPACES} namespaces.",
        (*_NS, "model", "dtype", "tp_rank", "tp_size", "lora"),
        _space_info,
        "namespaces[]",
    ),
    Row(
        "kvstore_namespace_blocks",
        "gauge",
        "Blocks of a namespace in a tier.",
        (*_NS, "tier"),
        *_spaces_by_tier("blocks"),
    ),
    Row(
        "kvstore_namespace_bytes", "gauge", "Bytes of a namespace in a tier.", (*_NS, "tier"), *_spaces_by_tier("bytes")
    ),
    Row("kvstore_namespace_asked_blocks_total", "counter", "Blocks asked for in a namespace.", _NS, *_spaces("asked")),
    Row(
        "kvstore_namespace_hit_blocks_total",
        "counter",
        "Blocks handed out in a namespace, by the tier they were found in.",
        (*_NS, "tier"),
        *_spaces_by_tier("hit"),
    ),
    Row("kvstore_namespace_stored_blocks_total", "counter", "Blocks stored in a namespace.", _NS, *_spaces("stored")),
)


# -- exposition --------------------------------------------------------------------------------------------------------


class SnapshotCollector(Collector):
    """Prometheus collector that asks for one snapshot a scrape, so all numbers of a scrape belong together."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing: without this, registering would already take a snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric of the table."""
        snapshot = self._snapshot()
        for row in TABLE:
            yield _family(row, snapshot)


def expose(snapshot: Snapshot) -> bytes:
    """Prometheus text of a snapshot."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(lambda: snapshot))
    return generate_latest(registry)


def _family(row: Row, snapshot: Snapshot) -> Metric:
    if row.type == "histogram":
        histogram = HistogramMetricFamily(row.name, row.help, labels=row.labels)
        for labels, (buckets, total) in row.read(snapshot):
            histogram.add_metric([_short(value) for value in labels], buckets=buckets, sum_value=total)
        return histogram
    # Two sources of one series (namespaces summed, or digests with the same head) are added: Prometheus refuses doubles.
    # An info series says 1 however often it was named.
    sums: dict[Labels, float] = {}
    for labels, value in row.read(snapshot):
        key = tuple(_short(value) for value in labels)
        sums[key] = 1 if row.name.endswith("_info") else sums.get(key, 0) + value
    family = (CounterMetricFamily if row.type == "counter" else GaugeMetricFamily)(
        row.name, row.help, labels=row.labels
    )
    for key, value in sums.items():
        family.add_metric(list(key), float(value))
    return family


def markdown() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Generated from the table in `kvstore/obs/metrics.py`; do not edit. `GET /metrics` gives these in Prometheus' text",
        "format, all numbers of one scrape from one instant. The last column names the field of `GET /v1/stats` that a",
        "metric is read from.",
        "",
        "Ratios are not exported. The hit rate of the last five minutes by tier is",
        "`rate(kvstore_hit_blocks_total[5m]) / ignoring(tier) group_left rate(kvstore_asked_blocks_total[5m])`.",
        "",
        f"`ns` is the first 12 digits of a namespace's digest. Above {MAX_NAMESPACES} namespaces `domain` and `ns` are",
        "`all`, and the values are sums.",
        "",
        "| metric | type | labels | meaning | field |",
        "|---|---|---|---|---|",
    ]
    for row in TABLE:
        labels = ", ".join(f"`{label}`" for label in row.labels) or " "
        lines.append(f"| `{row.name}` | {row.type} | {labels} | {row.help} | `{row.source}` |")
    return "\n".join(lines) + "\n"


NAME = re.compile(r"kvstore_[a-z]+(_[a-z]+)*")
"""What a metric may be called."""


if __name__ == "__main__":
    print(markdown(), end="")
