"""`/v1/quotas`: the rules as JSON. Read by anybody who may read the rest; changed only with the daemon's token.

A page on another site cannot change a rule: a browser sends no Authorization header there without asking us first, and
we answer no such question.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from aiohttp import web

from kvstore.errors import RequestError
from kvstore.http import guard
from kvstore.quotas import QuotaRule, read_rule

PATH = "/v1/quotas"


class Desk(Protocol):
    """Where rules are kept (`kvstore.quota_desk.QuotaDesk`)."""

    @property
    def rules(self) -> list[QuotaRule]:
        """The rules."""
        ...

    def state(self) -> dict[str, dict[str, Any]]:
        """What each rule's namespaces hold, by tier."""
        ...

    def set(self, rule: QuotaRule) -> None:
        """Set a rule."""
        ...

    def remove(self, name: str) -> None:
        """Remove a rule."""
        ...

    def admit(self, authorization: str) -> None:
        """Raise unless the header shows the token."""
        ...


async def answer(desk: Desk | None, request: web.BaseRequest) -> web.StreamResponse:
    """GET the rules, PUT one, DELETE ``?name=`` one; each answers with the rules as they are then."""
    if desk is None:
        raise RequestError("This server has no quotas.", "Ask the daemon's.")
    if request.method in ("PUT", "DELETE"):
        desk.admit(request.headers.get("Authorization", ""))
    if request.method == "PUT":
        desk.set(read_rule(await request.read()))
    elif request.method == "DELETE":
        desk.remove(request.query.get("name", ""))
    return guard.json_response({"rules": msgspec.to_builtins(desk.rules), "tiers": desk.state()})
