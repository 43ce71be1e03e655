"""The answers to each route: what the daemon tells about itself, and what an operator changes.

The daemon is known by protocols only. Nothing executes, nothing is proxied, and no environment is shown.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import web

from kvstore.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidParams,
    KVStoreError,
    QuotaRefused,
    RequestError,
    ShuttingDown,
    Unavailable,
)
from kvstore.eviction import names
from kvstore.http import answers, guard, openapi, page, tables, view
from kvstore.http.build import build
from kvstore.http.events import Hub
from kvstore.http.routes import Route
from kvstore.keys import namespace_digest
from kvstore.obs import metrics
from kvstore.obs.history import History
from kvstore.patterns import in_words
from kvstore.quotas import QuotaRule
from kvstore.sightings import HeldLease, Sighting
from kvstore.types import Namespace, Scope

Part = TypeVar("Part")

BODY_S = 10.0
"""How long a body may take to arrive."""


class Source(Protocol):
    """What is asked of the daemon. All of it is called on the event loop and must return at once."""

    def snapshot(self) -> dict[str, Any]:
        """State and counters, as one consistent picture."""
        ...

    def readiness(self) -> tuple[bool, str]:
        """Whether clients may come, and the reason in words."""
        ...

    def liveness(self) -> bool:
        """Whether the daemon's own work goes on."""
        ...

    def settings(self) -> list[tuple[str, str, str]]:
        """(name, value as it may be shown, origin) of every setting; secrets are masked already."""
        ...


class Rules(Protocol):
    """Where the rules about quotas are (`kvstore.quota_desk.QuotaDesk`)."""

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


class Places(Protocol):
    """Who knows which daemon has a prefix (`kvstore.where.Where`)."""

    def keys(self, namespace: Namespace | bytes, tokens: Sequence[int]) -> list[bytes]:
        """Prefix keys of a prompt."""
        ...

    async def scores(self, namespace: Namespace | bytes, keys: Sequence[bytes]) -> Sequence[Any]:
        """What each daemon has of it, the best first."""
        ...


class Operator(Protocol):
    """The operator's desk (`kvstore.desk.Desk`)."""

    def explain(self, scope: Scope, keys: Sequence[bytes]) -> list[Sighting]:
        """Each block of a prompt."""
        ...

    def leases(self) -> list[HeldLease]:
        """Open leases."""
        ...

    def policies(self) -> dict[str, str]:
        """Policy by tier."""
        ...

    def set_policy(self, tier: str, policy: str) -> None:
        """Give a tier another policy."""
        ...

    async def drop(self, ns: bytes, domain: str = "") -> int:
        """Forget a namespace."""
        ...

    def drain(self, on: bool) -> int:
        """Refuse new blocks, or take them again."""
        ...


class Face:
    """Answers requests. Each method of the name of a route takes the request and what was asked.

    Parameters
    ----------
    source : Source
        The daemon.
    rules, places, operator : optional
        Parts of it; without one, what it would answer is refused.
    wide : bool
        Whether others than this machine can reach the server.
    """

    def __init__(
        self,
        source: Source,
        rules: Rules | None = None,
        places: Places | None = None,
        operator: Operator | None = None,
        wide: bool = False,
    ) -> None:
        self._source = source
        self._rules = rules
        self._places = places
        self._operator = operator
        self.history = History()
        self.hub = Hub()
        self._template = page.load_template()
        self._assets = page.load_assets()
        self._description = openapi.describe(wide)

    async def answer(self, route: Route, request: web.BaseRequest) -> web.StreamResponse:
        """Decode what is asked and answer it."""
        asked = await _asked(route, request)
        return await getattr(self, route.name)(request, asked)

    # -- health --------------------------------------------------------------------------------------------------------

    async def livez(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        if not self._source.liveness():
            raise Unavailable("The daemon's work has stopped.", "Restart it; its log tells what came before.")
        return guard.json_response(answers.Live(live=True))

    async def readyz(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        ready, reason = self._source.readiness()
        snapshot = self._source.snapshot()
        if not ready:
            if snapshot.get("draining"):
                raise ShuttingDown(reason)
            raise Unavailable(reason, "Wait; ask again until this answers 200.")
        return guard.json_response(answers.Ready(ready=True, reason=reason, degraded=view.degraded(snapshot)))

    # -- what there is -------------------------------------------------------------------------------------------------

    async def metrics(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        body = metrics.expose(self._source.snapshot())
        return web.Response(body=body, headers={**guard.HEADERS, "Content-Type": metrics.CONTENT_TYPE})

    async def stats(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return guard.json_response(self._source.snapshot())

    async def openapi(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return guard.json_response(self._description)

    async def config(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return guard.json_response(answers.Config([answers.Setting(*each) for each in self._source.settings()]))

    async def events(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return await self.hub.serve(request, self.event(self._source.snapshot()))

    async def page(self, request: web.BaseRequest, asked: answers.PageQuery) -> web.StreamResponse:
        snapshot = self._source.snapshot()
        shown = build(snapshot, self.history, self._source.readiness(), self._leases())
        shown.rows["found"] = self._found(asked)
        spaces = tables.choices(snapshot)
        given = asked.namespace, asked.prompt
        text = page.render(self._template, shown, view.tier_names(snapshot), self._source.settings(), spaces, given)
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=guard.HEADERS)

    def _found(self, asked: answers.PageQuery) -> list[list[str]]:
        """The blocks of a prompt that was looked up on the page, or one line that says why not."""
        if not asked.prompt.strip() or self._operator is None:
            return []
        try:
            question = msgspec.convert({"namespace": asked.namespace, **pasted(asked.prompt)}, answers.Question)
            _, blocks = self._explained(question)
        except (msgspec.ValidationError, KVStoreError) as error:
            return [[f"{in_words(error)}."]]
        return [tables.sighting(index, block) for index, block in enumerate(blocks)]

    async def asset(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        body, kind = self._assets[request.path.removeprefix("/dashboard/")]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=guard.HEADERS)

    # -- blocks --------------------------------------------------------------------------------------------------------

    async def where_get(self, request: web.BaseRequest, asked: answers.KeysQuery) -> web.StreamResponse:
        return await self.where(request, _question(asked))

    async def where(self, request: web.BaseRequest, asked: answers.Question) -> web.StreamResponse:
        places = _there(self._places, "where prefixes are")
        namespace, keys = _prompt(asked, places)
        scores = await places.scores(namespace, keys)
        return guard.json_response({"blocks": len(keys), "daemons": [msgspec.to_builtins(score) for score in scores]})

    async def explain_get(self, request: web.BaseRequest, asked: answers.KeysQuery) -> web.StreamResponse:
        return await self.explain(request, _question(asked))

    async def explain(self, request: web.BaseRequest, asked: answers.Question) -> web.StreamResponse:
        usable, blocks = self._explained(asked)
        rows = [tables.sighting(index, block) for index, block in enumerate(blocks)]
        return guard.json_response(answers.Explained(usable, blocks, rows))

    def _explained(self, asked: answers.Question) -> tuple[int, list[Sighting]]:
        operator = _there(self._operator, "where blocks are")
        namespace, keys = _prompt(asked, _there(self._places, "how to cut a prompt"))
        ns = namespace if isinstance(namespace, bytes) else namespace_digest(namespace)
        blocks = operator.explain(Scope(f"uid-{os.getuid()}", ns), keys)
        return sum(block.reachable and bool(block.tiers) for block in blocks), blocks

    async def leases(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return guard.json_response(answers.Leases(_there(self._operator, "who reads").leases()))

    # -- quotas --------------------------------------------------------------------------------------------------------

    async def quotas(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return _quotas(_there(self._rules, "of quotas"))

    async def set_quota(self, request: web.BaseRequest, asked: QuotaRule) -> web.StreamResponse:
        rules = _there(self._rules, "of quotas")
        rules.set(asked)
        return _quotas(rules)

    async def remove_quota(self, request: web.BaseRequest, asked: answers.RuleQuery) -> web.StreamResponse:
        rules = _there(self._rules, "of quotas")
        rules.remove(asked.name)
        return _quotas(rules)

    # -- what changes --------------------------------------------------------------------------------------------------

    async def policy(self, request: web.BaseRequest, asked: None) -> web.StreamResponse:
        return guard.json_response(answers.Policies(_there(self._operator, "of policies").policies(), names()))

    async def set_policy(self, request: web.BaseRequest, asked: answers.PolicyOrder) -> web.StreamResponse:
        _there(self._operator, "of policies").set_policy(asked.tier, asked.policy)
        return await self.policy(request, None)

    async def drop(self, request: web.BaseRequest, asked: answers.DropOrder) -> web.StreamResponse:
        dropped = await _there(self._operator, "of blocks").drop(bytes.fromhex(asked.namespace), asked.domain)
        return guard.json_response(answers.Dropped(dropped))

    async def drain(self, request: web.BaseRequest, asked: answers.DrainOrder) -> web.StreamResponse:
        waiting = _there(self._operator, "of draining").drain(asked.draining)
        return guard.json_response(answers.Drained(asked.draining, waiting))

    # -- live ----------------------------------------------------------------------------------------------------------

    def _leases(self) -> list[HeldLease]:
        return [] if self._operator is None else self._operator.leases()

    def event(self, snapshot: dict[str, Any]) -> bytes:
        """One server-sent event: what every element of the page shows now."""
        shown = build(snapshot, self.history, self._source.readiness(), self._leases())
        return b"data: " + msgspec.json.encode(shown) + b"\n\n"


# -- questions ---------------------------------------------------------------------------------------------------------

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}


async def _asked(route: Route, request: web.BaseRequest) -> msgspec.Struct | None:
    """What a request asks, in the type that its route names."""
    try:
        if route.query is not None:
            return msgspec.convert(_single(request.query.items()), route.query, strict=False)
        if route.body is None:
            return None
        if request.content_type != "application/json":
            raise InvalidParams("The body is not said to be JSON.", "Send `Content-Type: application/json`.")
        decoder = _decoders.setdefault(route.body, msgspec.json.Decoder(route.body))
        async with asyncio.timeout(BODY_S):
            body = await request.content.read()  # as long as its header said, which the guard has seen
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            # 2.0 is an integer to JSON Schema, but not to the decoder.
            return msgspec.convert(_whole(msgspec.json.decode(body)), route.body)
    except TimeoutError:
        raise DeadlineExceeded(f"The body did not arrive within {BODY_S:g} s.", "Send it faster.") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{route.path}: {in_words(error)}.", "/v1/openapi.json describes what it takes.") from None


def _whole(value: Any) -> Any:
    """A value with its whole floats as integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list) else value


def _single(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in items:
        if name in found:
            raise InvalidParams(f"{name[:40]!a} is given twice.", "Give it once.")
        found[name] = value
    return found


def pasted(prompt: str) -> dict[str, Any]:
    """Token ids or keys out of what somebody pasted: numbers, or words of 64 hexadecimal digits."""
    words = re.findall(r"[0-9A-Za-z-]+", prompt)
    if words and all(len(word) == 64 for word in words):
        return {"keys": [word.lower() for word in words]}
    return {"tokens": [int(word) if word.isascii() and word.isdigit() else word for word in words]}


def _question(asked: answers.KeysQuery) -> answers.Question:
    return answers.Question(asked.namespace, [key for key in asked.keys.split(",") if key])


def _prompt(asked: answers.Question, places: Places) -> tuple[Namespace | bytes, list[bytes]]:
    if (asked.keys is None) == (asked.tokens is None):
        raise RequestError("Give either keys or tokens.", "docs/events.md shows both.")
    namespace = bytes.fromhex(asked.namespace) if isinstance(asked.namespace, str) else asked.namespace
    if asked.keys is not None:
        return namespace, [bytes.fromhex(key) for key in asked.keys]
    try:
        return namespace, places.keys(namespace, asked.tokens or [])
    except InvalidParams as error:  # well written, but the size of a block is not known, or none
        raise RequestError(error.cause, error.remedy) from None


def _there(part: Part | None, what: str) -> Part:
    if part is None:
        raise RequestError(f"This server knows nothing {what}.", "Ask the daemon's.")
    return part


def _quotas(rules: Rules) -> web.Response:
    return guard.json_response({"rules": msgspec.to_builtins(rules.rules), "tiers": rules.state()})


def status_of(error: KVStoreError, route: Route) -> int:
    """The status of an error. What is well written, but cannot be as things are, is a conflict."""
    if route.method != "GET" and isinstance(error, ConfigError | QuotaRefused):
        return 409
    return error.http_status
