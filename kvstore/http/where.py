"""`/v1/where`: how much of a prompt each daemon has. GET for a few keys, POST with a JSON body for a whole prompt.

Only a page of this server can post JSON here from a browser: from another site the browser would ask us first, and we
answer no such question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from kvstore.errors import DeadlineExceeded, InvalidParams, RequestError
from kvstore.http import guard
from kvstore.types import Namespace

PATH = "/v1/where"
BODY_S = 10.0
"""How long a body may take to arrive."""


class Desk(Protocol):
    """Who knows (`kvstore.where.Where`)."""

    def keys(self, namespace: Namespace | bytes, tokens: Sequence[int]) -> list[bytes]:
        """Prefix keys of a prompt."""
        ...

    async def scores(self, namespace: Namespace | bytes, keys: Sequence[bytes]) -> Sequence[Any]:
        """What each daemon has of it, the best first."""
        ...


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt: a namespace, by its digest or its fields, and keys or token ids."""

    namespace: str | Namespace
    keys: list[str] | None = None
    tokens: list[int] | None = None


_question = msgspec.json.Decoder(Question)


async def answer(desk: Desk | None, request: web.BaseRequest) -> web.StreamResponse:
    """The daemons as JSON, the best first."""
    if desk is None:
        raise RequestError("This server does not know where prefixes are.", "Ask the daemon's.")
    question = await _posted(request) if request.method == "POST" else _asked(request)
    namespace = _digest(question.namespace) if isinstance(question.namespace, str) else question.namespace
    if (question.keys is None) == (question.tokens is None):
        raise InvalidParams("Give either keys or tokens.", "docs/events.md shows both.")
    if question.keys is not None:
        keys = [_bytes("keys", key) for key in question.keys]
    else:
        keys = desk.keys(namespace, question.tokens or [])
    scores = await desk.scores(namespace, keys)
    return guard.json_response({"blocks": len(keys), "daemons": [msgspec.to_builtins(score) for score in scores]})


def _asked(request: web.BaseRequest) -> Question:
    keys = [key for key in request.query.get("keys", "").split(",") if key]
    return Question(request.query.get("namespace", ""), keys)


async def _posted(request: web.BaseRequest) -> Question:
    if request.content_type != "application/json":
        raise InvalidParams("The body is not said to be JSON.", "Send `Content-Type: application/json`.")
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.content.read()  # as long as its header said, which the guard has seen
        return _question.decode(body)
    except TimeoutError:
        raise DeadlineExceeded(f"The body did not arrive within {BODY_S:g} s.", "Send it faster.") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidParams(f"where: {error}.", "docs/events.md shows what a question looks like.") from None


def _digest(text: str) -> bytes:
    digest = _bytes("namespace", text)
    if len(digest) != 32:
        raise InvalidParams("namespace: a digest has 64 hexadecimal digits.", "Or give the fields of the namespace.")
    return digest


def _bytes(name: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidParams(f"{name}: not hexadecimal.", "") from None
