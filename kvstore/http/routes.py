"""Every route: its method, path, level of access, question and answer. Nothing else is served.

The server answers by this table, `/v1/openapi.json` is made from it, and tests walk it. A path is looked up by exact
match, so there is nothing to traverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from kvstore.http import answers as a
from kvstore.http.access import Access

HTML, JSON, EVENTS, TEXT, SCRIPT, STYLE = (
    "text/html",
    "application/json",
    "text/event-stream",
    "text/plain",
    "text/javascript",
    "text/css",
)


@dataclass(frozen=True, slots=True)
class Route:
    """One route.

    Attributes
    ----------
    method, path : str
        What it answers to; where there is a GET there is a HEAD.
    name : str
        Method of `kvstore.http.face.Face` that answers, and the name of the operation.
    access : Access
        What it takes to be answered.
    summary : str
        One sentence.
    answer : type
        Type of the body of a 200 answer; str and dict where it is not one of ours.
    media : str
        Its media type.
    query, body : type, optional
        What is asked, in the query or as a JSON body.
    max_body : int
        Longest body.
    unavailable : bool
        Whether 503 may be the answer.
    """

    method: str
    path: str
    name: str
    access: Access
    summary: str
    answer: type[Any] = dict
    media: str = JSON
    query: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    max_body: int = 0
    unavailable: bool = False


_SMALL, _PROMPT = 64 << 10, 12 << 20

TABLE: tuple[Route, ...] = (
    Route("GET", "/", "page", Access.READ, "The dashboard.", str, HTML, query=a.PageQuery),
    Route("GET", "/dashboard/app.js", "asset", Access.READ, "Script of the dashboard.", str, SCRIPT),
    Route("GET", "/dashboard/style.css", "asset", Access.READ, "Style of the dashboard.", str, STYLE),
    Route("GET", "/livez", "livez", Access.OPEN, "Whether the daemon's own work goes on.", a.Live, unavailable=True),
    Route("GET", "/readyz", "readyz", Access.OPEN, "Whether clients may come.", a.Ready, unavailable=True),
    Route("GET", "/healthz", "readyz", Access.OPEN, "The same as /readyz.", a.Ready, unavailable=True),
    Route("GET", "/metrics", "metrics", Access.READ, "Prometheus metrics (docs/metrics.md).", str, TEXT),
    Route("GET", "/v1/openapi.json", "openapi", Access.READ, "This description."),
    Route("GET", "/v1/stats", "stats", Access.READ, "State and counters, as one consistent picture."),
    Route("GET", "/v1/config", "config", Access.READ, "Every setting and where it came from.", a.Config),
    Route("GET", "/v1/events", "events", Access.READ, "The dashboard's numbers, once a second.", str, EVENTS),
    Route(
        "GET", "/v1/where", "where_get", Access.READ, "How much of a prompt each daemon has.", a.Where,
        query=a.KeysQuery,
    ),
    Route(
        "POST", "/v1/where", "where", Access.READ, "The same for a whole prompt.", a.Where, body=a.Question,
        max_body=_PROMPT,
    ),
    Route(
        "GET", "/v1/explain", "explain_get", Access.READ, "Where each block of a prompt is, and why the rest missed.",
        a.Explained, query=a.KeysQuery,
    ),
    Route(
        "POST", "/v1/explain", "explain", Access.READ, "The same for a whole prompt.", a.Explained, body=a.Question,
        max_body=_PROMPT,
    ),
    Route("GET", "/v1/leases", "leases", Access.READ, "Rights to read that are held now.", a.Leases),
    Route("GET", "/v1/quotas", "quotas", Access.READ, "The rules about quotas.", a.Quotas),
    Route(
        "PUT", "/v1/quotas", "set_quota", Access.ACT, "Add a rule, or replace the one of that name.", a.Quotas,
        body=a.QuotaRule, max_body=_SMALL,
    ),
    Route("DELETE", "/v1/quotas", "remove_quota", Access.ACT, "Remove a rule.", a.Quotas, query=a.RuleQuery),
    Route("GET", "/v1/policy", "policy", Access.READ, "The eviction policy of each tier.", a.Policies),
    Route(
        "PUT", "/v1/policy", "set_policy", Access.ACT, "Give a tier another eviction policy.", a.Policies,
        body=a.PolicyOrder, max_body=_SMALL,
    ),
    Route(
        "POST", "/v1/drop", "drop", Access.ACT, "Forget a namespace in every tier.", a.Dropped, body=a.DropOrder,
        max_body=_SMALL,
    ),
    Route(
        "PUT", "/v1/drain", "drain", Access.ACT, "Refuse new blocks and say so, or take them again.", a.Drained,
        body=a.DrainOrder, max_body=_SMALL,
    ),
)  # fmt: skip

PATHS: dict[str, dict[str, Route]] = {}
"""Routes by path and method."""
for _route in TABLE:
    PATHS.setdefault(_route.path, {})[_route.method] = _route


def find(method: str, path: str) -> Route | None:
    """The route that answers a request, if there is one."""
    return PATHS.get(path, {}).get("GET" if method == "HEAD" else method)


def methods(path: str) -> tuple[str, ...]:
    """Methods that a path answers to."""
    listed = tuple(PATHS.get(path, ()))
    return (*listed[:1], "HEAD", *listed[1:]) if "GET" in listed else listed or ("GET", "HEAD")
