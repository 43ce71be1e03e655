"""Make kvstore.json, the Grafana board, out of the few lines below: ``python docker/grafana/board.py``.

A panel is a title, what its query says in words, a unit and its queries. A test reads every query and checks each name
in it against the table of metrics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = 'instance=~"$instance"'
RATE = "[$__rate_interval]"

Query = tuple[str, str]
Panel = tuple[str, str, str, list[Query]]


def rate(metric: str, by: str, extra: str = "") -> str:
    """The summed rate of a counter."""
    return f"sum by ({by}) (rate({metric}{{{HERE}{extra}}}{RATE}))"


def quantile(q: float) -> str:
    """A percentile of the request times, by verb."""
    return f"histogram_quantile({q}, {rate('kvstore_request_seconds_bucket', 'le, verb')})"


ROWS: dict[str, list[Panel]] = {
    "Value": [
        (
            "Hit rate by tier, and its ceiling",
            "Blocks handed out of blocks wanted. The ceiling is what a store without bounds would have served.",
            "percentunit",
            [
                (
                    (f"{rate('kvstore_hit_blocks_total', 'tier')} / ignoring (tier) group_left "
                    f"sum(rate(kvstore_wanted_blocks_total{{{HERE}}}{RATE}))"),
                    "{{tier}}",
                ),
                (
                    (f"sum(rate(kvstore_reusable_blocks_total{{{HERE}}}{RATE})) "
                    f"/ sum(rate(kvstore_wanted_blocks_total{{{HERE}}}{RATE}))"),
                    "ceiling",
                ),
            ],
        ),
        (
            "Tokens served instead of computed",
            "Tokens a second in blocks that were handed out.",
            "short",
            [(f"sum(rate(kvstore_hit_tokens_total{{{HERE}}}{RATE}))", "tokens/s")],
        ),
        (
            "Hit rate by namespace",
            "Each model, kind of KV, rank and tenant has its own.",
            "percentunit",
            [
                (
                    (f"{rate('kvstore_namespace_hit_blocks_total', 'domain, ns')} "
                    f"/ {rate('kvstore_namespace_asked_blocks_total', 'domain, ns')}"),
                    "{{domain}} {{ns}}",
                )
            ],
        ),
    ],
    "Speed": [
        (
            "Bytes read and written by tier",
            "Payload bytes a second; what is written is drawn below.",
            "Bps",
            [
                (rate("kvstore_tier_read_bytes_total", "tier"), "{{tier}} read"),
                (f"-{rate('kvstore_tier_written_bytes_total', 'tier')}", "{{tier}} written"),
            ],
        ),
        (
            "Time of a request, 99 of 100",
            "From a request's arrival to its reply.",
            "s",
            [(quantile(0.99), "{{verb}}")],
        ),
        ("Time of a request, median", "Half of them are faster.", "s", [(quantile(0.5), "{{verb}}")]),
        ("Requests", "Requests a second by verb.", "reqps", [(rate("kvstore_requests_total", "verb"), "{{verb}}")]),
    ],
    "Space": [
        (
            "Used of each tier",
            "What a tier takes of its budget.",
            "percentunit",
            [
                (
                    (f'sum by (tier) (kvstore_tier_bytes{{{HERE}, state="used"}}) '
                    f"/ sum by (tier) (kvstore_tier_capacity_bytes{{{HERE}}})"),
                    "{{tier}}",
                )
            ],
        ),
        (
            "Host memory by state",
            "States overlap: do not add them.",
            "bytes",
            [(f'sum by (state) (kvstore_tier_bytes{{{HERE}, tier="host"}})', "{{state}}")],
        ),
        (
            "What happened to blocks",
            "Stored, evicted, damaged and so on, a second.",
            "short",
            [(rate("kvstore_tier_events_total", "tier, event"), "{{tier}} {{event}}")],
        ),
        (
            "Held under each rule",
            "Bytes by quota rule; `none` is everybody without one.",
            "bytes",
            [(f"sum by (tier, rule) (kvstore_quota_bytes{{{HERE}}})", "{{tier}} {{rule}}")],
        ),
    ],
    "Precision": [
        (
            "Encoded blocks by chain",
            "What a tier holds encoded. Lossy chains only where an operator allowed them and the gate passed.",
            "bytes",
            [(f"sum by (tier, chain) (kvstore_codec_stored_bytes{{{HERE}}})", "{{tier}} {{chain}}")],
        ),
        (
            "Smaller by",
            "Bytes as engines have them, over bytes as they are kept.",
            "short",
            [
                (
                    (f"sum by (tier) (kvstore_codec_logical_bytes{{{HERE}}}) "
                    f"/ sum by (tier) (kvstore_codec_stored_bytes{{{HERE}}})"),
                    "{{tier}}",
                )
            ],
        ),
        (
            "Steps down the ladder, and evictions",
            "Blocks a second that became smaller, and that left.",
            "short",
            [
                (rate("kvstore_codec_steps_total", "tier"), "{{tier}} stepped down"),
                (rate("kvstore_tier_events_total", "tier", ', event="evicted"'), "{{tier}} evicted"),
            ],
        ),
        (
            "Lost or undecodable",
            "Blocks a second that were lost on the way down, or are of a chain or profile that is not here.",
            "short",
            [
                (rate("kvstore_codec_lost_blocks_total", "tier"), "{{tier}} lost"),
                (rate("kvstore_codec_undecodable_blocks_total", "tier"), "{{tier}} undecodable"),
            ],
        ),
    ],
    "Chunks and blending": [
        (
            "Chunks that can be found",
            "Contents, and their variants, each computed in another context.",
            "short",
            [
                (f"sum by (instance) (kvstore_chunks{{{HERE}}})", "{{instance}} chunks"),
                (f"sum by (instance) (kvstore_chunk_variants{{{HERE}}})", "{{instance}} variants"),
            ],
        ),
        (
            "Blended tokens",
            "Tokens a second of prompts that engines put together from chunks: computed, and taken as they are.",
            "short",
            [
                (f"sum(rate(kvstore_blended_computed_tokens_total{{{HERE}}}{RATE}))", "computed"),
                (
                    (f"sum(rate(kvstore_blended_tokens_total{{{HERE}}}{RATE})) "
                    f"- sum(rate(kvstore_blended_computed_tokens_total{{{HERE}}}{RATE}))"),
                    "reused",
                ),
            ],
        ),
        (
            "Gates",
            "Namespaces whose probe passed (1) or failed (0), and rungs of profiles by what the gate says.",
            "short",
            [
                (f"min by (domain, ns) (kvstore_blend_gate_passed{{{HERE}}})", "blend {{domain}} {{ns}}"),
                (f"max by (profile, gate) (kvstore_profile_rungs{{{HERE}}})", "{{profile}} {{gate}}"),
            ],
        ),
    ],
    "vLLM": [
        (
            "Load or recompute",
            "What vLLM's connector decided, prompts a second.",
            "short",
            [(f"sum(rate(vllm:kvstore_choice_{way}_total{RATE}))", way) for way in ("load", "part", "recompute")],
        ),
        (
            "Gained and regretted",
            "Seconds a second by which first tokens came sooner, or later, than the other choice promised.",
            "s",
            [
                (f"sum(rate(vllm:kvstore_gained_seconds_total{RATE}))", "gained"),
                (f"sum(rate(vllm:kvstore_regret_seconds_total{RATE}))", "regretted"),
            ],
        ),
        (
            "Tokens promised, by tier",
            "Tokens a second that the daemon had for vLLM's prompts.",
            "short",
            [(f"sum(rate(vllm:kvstore_hit_tokens_{tier}_total{RATE}))", tier) for tier in ("host", "disk", "redis")],
        ),
        (
            "Without the daemon",
            "Outages seen by vLLM, and loads of which a part had to be computed after all.",
            "short",
            [
                (f"sum(rate(vllm:kvstore_outages_total{RATE}))", "outages"),
                (f"sum(rate(vllm:kvstore_load_failures_total{RATE}))", "loads failed"),
            ],
        ),
    ],
    "Trouble": [
        ("Errors", "Sent to clients, by code: docs/errors.md.", "short",
         [(rate("kvstore_errors_total", "code"), "{{code}}")]),
        (
            "Blocks not stored",
            "Offered and not taken, by reason; `exists` is no trouble.",
            "short",
            [(rate("kvstore_unstored_blocks_total", "reason", ', reason!="exists"'), "{{reason}}")],
        ),
        (
            "Breakers",
            "Tiers that are cut off after repeated failures.",
            "short",
            [(f'max by (tier) (kvstore_breaker_state{{{HERE}, state="open"}})', "{{tier}}")],
        ),
        (
            "Waiting to be written below",
            "Bytes in the write-behind queue.",
            "bytes",
            [(f"sum by (instance) (kvstore_write_behind_bytes{{{HERE}}})", "{{instance}}")],
        ),
    ],
}  # fmt: skip


def panel(number: int, place: dict[str, int], spec: Panel) -> dict[str, Any]:
    """A graph over time."""
    title, about, unit, queries = spec
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": about,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": unit, "custom": {"fillOpacity": 8, "lineWidth": 2, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(65 + i), "expr": expr, "legendFormat": legend, "datasource": source}
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def board() -> dict[str, Any]:
    """The whole board."""
    panels: list[dict[str, Any]] = []
    y = number = 0
    for title, specs in ROWS.items():
        number += 1
        row = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": row, "panels": []})
        width = 24 // len(specs)
        for i, spec in enumerate(specs):
            number += 1
            panels.append(panel(number, {"x": i * width, "y": y + 1, "w": width, "h": 9}, spec))
        y += 10
    return {
        "uid": "kvstore",
        "title": "kvstore",
        "tags": ["kvstore", "llm"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "instance",
                    "type": "query",
                    "label": "Daemon",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": {"query": "label_values(kvstore_build_info, instance)", "refId": "instance"},
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                    "refresh": 2,
                },
            ]
        },
        "panels": panels,
    }


def text() -> str:
    """The board as it stands in the file."""
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("kvstore.json").write_text(text(), "utf-8")
