"""The metrics table, its exposition, and the history behind the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.cli.reference import engine_counters, metrics_page
from kvstore.obs import metrics, readings
from kvstore.obs.history import History, series

SNAPSHOT: dict[str, Any] = {
    "version": "1.2.3",
    "uptime_s": 12.5,
    "ready": True,
    "draining": False,
    "sessions": 2,
    "asked_blocks": 100,
    "hit_blocks": {"host": 40, "disk": 10},
    "missed": {"absent": 50},
    "hit_tokens": 12_800,
    "errors": {"KV401": 3},
    "queue": {"blocks": 4, "bytes": 8192},
    "tiers": {
        "host": {"capacity": 1000, "used": 600, "free": 400, "leased_bytes": 5, "hits": 40, "huge_pages": True},
        "disk": {
            "capacity": 9000,
            "used": 10,
            "dropped": {"io_error": 2},
            "bytes_read": 77,
            "breaker": {"state": "half-open", "failures": 5},
            "codecs": {"held": {"kv4": {"blocks": 1, "stored_bytes": 25, "logical_bytes": 100}}},
        },
    },
    "namespaces": [
        {"digest": "ab" * 32, "domain": "uid:1", "model": "m", "blocks": {"host": 7}, "asked": 9, "hit": {"host": 4}}
    ],
    "profiles": [{"name": "p", "rungs": [{"passed": True}, {"passed": False}, {}]}],
    "blends": [
        {
            "digest": "ab" * 32,
            "domain": "uid:1",
            "tokens": 100,
            "computed": 15,
            "verdict": {"prompts": 3, "kl": 0.5, "most_kl": 0.1, "top1": 1.0, "least_top1": 0.5},
        }
    ],
    "requests": {"lookup": {"count": 10, "errors": 1, "seconds": 0.5, "buckets": [[0.01, 4], [0.1, 9]]}},
}


def exposed(snapshot: dict[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the exposition as Prometheus' own parser reads it."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(metrics.expose(snapshot).decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def test_values_are_those_of_the_snapshot():
    got = exposed(SNAPSHOT)
    for key, value in {
        ("kvstore_build_info", (("version", "1.2.3"),)): 1,
        ("kvstore_codec_stored_bytes", (("chain", "kv4"), ("tier", "disk"))): 25,
        ("kvstore_profile_rungs", (("gate", "passed"), ("profile", "p"))): 1,
        ("kvstore_profile_rungs", (("gate", "refused"), ("profile", "p"))): 2,
        ("kvstore_blended_computed_tokens_total", (("domain", "uid:1"), ("ns", "abababababab"))): 15,
        ("kvstore_blend_gate_passed", (("domain", "uid:1"), ("ns", "abababababab"))): 0,
        ("kvstore_ready", ()): 1,
        ("kvstore_hit_blocks_total", (("tier", "disk"),)): 10,
        ("kvstore_missed_blocks_total", (("reason", "absent"),)): 50,
        ("kvstore_requests_total", (("outcome", "ok"), ("verb", "lookup"))): 9,
        ("kvstore_requests_total", (("outcome", "error"), ("verb", "lookup"))): 1,
        ("kvstore_request_seconds_bucket", (("le", "0.1"), ("verb", "lookup"))): 9,
        ("kvstore_request_seconds_bucket", (("le", "+Inf"), ("verb", "lookup"))): 10,
        ("kvstore_request_seconds_sum", (("verb", "lookup"),)): 0.5,
        ("kvstore_tier_bytes", (("state", "leased"), ("tier", "host"))): 5,
        ("kvstore_tier_dropped_blocks_total", (("reason", "io_error"), ("tier", "disk"))): 2,
        ("kvstore_breaker_state", (("state", "half_open"), ("tier", "disk"))): 1,
        ("kvstore_breaker_state", (("state", "open"), ("tier", "disk"))): 0,
        ("kvstore_write_behind_bytes", ()): 8192,
        ("kvstore_namespace_asked_blocks_total", (("domain", "uid:1"), ("ns", "ab" * 6))): 9,
    }.items():
        assert got[key] == value, key


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"tiers": None, "namespaces": "x", "requests": {"a": 3}, "errors": []},
        {
            "tiers": {"host": None},
            "uptime_s": float("nan"),
            "namespaces": [None, {}],
            "requests": {"a": {"buckets": [1, 2]}},
        },
    ],
)
def test_missing_and_odd_fields_are_tolerated(snapshot: dict[str, Any]):
    exposed(snapshot)


def test_a_number_that_the_snapshot_lacks_is_absent_not_zero():
    names = {name for name, _ in exposed({})}
    assert "kvstore_hit_tokens_total" not in names


def spaces(number: int) -> dict[str, Any]:
    return {
        "namespaces": [
            {"digest": f"{i:064x}"[::-1], "domain": "d", "asked": 2, "blocks": {"host": 1}} for i in range(number)
        ]
    }


def test_namespaces_are_told_apart_up_to_a_limit_and_summed_above():
    name = "kvstore_namespace_asked_blocks_total"
    few = [value for (each, _), value in exposed(spaces(readings.MAX_NAMESPACES)).items() if each == name]
    assert few == [2] * readings.MAX_NAMESPACES
    got = exposed(spaces(readings.MAX_NAMESPACES + 1))
    everyone = (("domain", "all"), ("ns", "all"))
    assert [(key, v) for key, v in got.items() if key[0] == name] == [
        ((name, everyone), 2 * (readings.MAX_NAMESPACES + 1))
    ]
    assert not any(each == "kvstore_namespace_info" for each, _ in got)


def test_digests_that_begin_alike_are_one_series():
    alike = [{"digest": "ab" * 32, "asked": 2}, {"digest": "ab" * 31 + "cd", "asked": 3}]
    assert (
        exposed({"namespaces": alike})[("kvstore_namespace_asked_blocks_total", (("domain", ""), ("ns", "ab" * 6)))]
        == 5
    )


def test_hostile_label_values_cannot_break_the_format():
    model = 'a"\n\\{} 1\nkvstore_fake 1' + "x" * 500
    got = exposed({"namespaces": [{"digest": "d", "model": model}]})
    labels = next(dict(labels) for name, labels in got if name == "kvstore_namespace_info")
    assert labels["model"] == model[: readings.MAX_LABEL]
    assert not any(name == "kvstore_fake" for name, _ in got)


def test_names_follow_the_conventions():
    names = [row.name for row in metrics.TABLE]
    assert len(names) == len(set(names))
    for row in metrics.TABLE:
        assert metrics.NAME.fullmatch(row.name), row.name
        assert row.name.endswith("_total") == (row.type == "counter"), row.name
        assert not any(word in row.name for word in ("ratio", "percent", "_ms", "_kb", "_mib")), row.name
        assert row.help.endswith("."), row.name


def test_the_docs_are_current():
    docs = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert docs.read_text("utf-8") == metrics_page(), "python -m kvstore.cli.docs"


def test_what_vllm_shows_is_in_the_docs():
    counters = engine_counters()
    assert "choice_recompute" in counters
    assert all(f"`vllm:kvstore_{name}_total`" in metrics_page() for name in counters)


# -- history -----------------------------------------------------------------------------------------------------------


def test_history_keeps_a_bounded_number_of_samples():
    history = History(length=10)
    for second in range(100):
        history.add(float(second), {"asked": second * 3.0})
    assert len(history) == 10
    assert history.last(1e9).grown == {"asked": 27.0}
    assert history.last(3).rate("asked") == 3.0


def test_a_counter_that_appears_later_was_zero_before():
    history = History()
    history.add(1, {"asked": 1})
    history.add(2, {"asked": 1, "hit.disk": 5})
    assert history.last(10).grown == {"asked": 0.0, "hit.disk": 5.0}


def test_a_late_sample_loses_nothing_and_a_clock_that_stands_still_adds_nothing():
    history = History()
    for at, value in ((0.0, 0), (1.0, 10), (7.0, 70), (7.0, 99)):
        history.add(at, {"asked": value})
    assert history.last(60).grown["asked"] == 70
    assert history.last(60).rate("asked") == 10


def test_buckets_say_where_nothing_was_sampled():
    history = History()
    assert history.buckets(10, 3) == [None] * 3
    for second in range(100, 116):
        history.add(float(second), {"asked": float(second)})
    spans = history.buckets(10, 4)
    assert [None if span is None else span.grown["asked"] for span in spans] == [None, None, 10.0, 5.0]


def test_names_from_outside_cannot_grow_the_history_without_end():
    history = History()
    for i in range(500):
        history.add(float(i), {f"hit.{i}": 1.0})
    assert len(history.last(1e9).grown) <= 64


def test_series_of_a_snapshot():
    found = series(SNAPSHOT)
    assert (found["asked"], found["hit.host"], found["read.disk"], found["requests"]) == (100, 40, 77, 10)
    assert series({})["asked"] == 0
