"""The OpenAPI 3.1 description, made from the table of routes and the types it names."""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore import __version__
from kvstore.http import answers
from kvstore.http.access import Access
from kvstore.http.routes import JSON, TABLE, Route

_REF = "#/components/schemas/{name}"
_ALWAYS = {
    "400": "Not a request within the limits, or one with wrong parameters.",
    "403": "The Host header does not name this server.",
    "413": "A body where there may be none, or a longer one than allowed.",
    "500": "A defect of the daemon; its log has it.",
}


def describe(wide: bool = False) -> dict[str, Any]:
    """The description.

    Parameters
    ----------
    wide : bool
        Whether the server can be reached beyond loopback; reading then asks for the token, too.
    """
    types = {answers.Problem}
    for route in TABLE:
        types |= {kind for kind in (route.answer, route.body, route.query) if _ours(kind)}
    _, schemas = msgspec.json.schema_components(sorted(types, key=lambda kind: kind.__name__), ref_template=_REF)
    for query in {route.query.__name__ for route in TABLE if route.query is not None}:
        schemas.pop(query)  # written out as parameters
    paths: dict[str, dict[str, Any]] = {}
    for route in TABLE:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, wide)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvstore",
            "version": __version__,
            "summary": "What a kvstore daemon tells about itself, and the little that can be changed.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "listen.token of the daemon"},
                "basic": {"type": "http", "scheme": "basic", "description": "any user; the token as password"},
            },
        },
    }


def _ours(kind: type | None) -> bool:
    return kind is not None and issubclass(kind, msgspec.Struct)


def _operation(route: Route, wide: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{route.path.strip('/').replace('/', '_').replace('.', '_') or 'page'}",
        "summary": route.summary,
        "tags": ["actions" if route.access is Access.ACT else "reading"],
        "responses": _responses(route, wide),
        "security": _security(route.access, wide),
    }
    if route.query is not None:
        operation["parameters"] = _parameters(route.query)
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": {"$ref": _REF.format(name=route.body.__name__)}}},
        }
    return operation


def _security(access: Access, wide: bool) -> list[dict[str, list[str]]]:
    if access is Access.ACT:
        return [{"bearer": []}]
    return [{"bearer": []}, {"basic": []}] if access is Access.READ and wide else []


def _responses(route: Route, wide: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string" if route.answer is str else "object"}
    if _ours(route.answer):
        schema = {"$ref": _REF.format(name=route.answer.__name__)}
    problem = {JSON: {"schema": {"$ref": _REF.format(name="Problem")}}}
    said = dict(_ALWAYS)
    if _security(route.access, wide):
        said["401"] = "The token is missing or wrong."
    if route.access is Access.ACT or route.body is not None:
        said["409"] = "It is well written, but cannot be as things are."
    if route.access is Access.ACT:
        said["403"] = "The Host header does not name this server, or the daemon has no token."
    if route.body is not None or route.query is not None or route.name == "events":
        said["429"] = "More than is allowed at once."
    if route.body is not None:
        said["503"] = "The body did not arrive in time, or the daemon is stopping."
    if route.unavailable:
        said["503"] = "Not now; the cause says why."
    answers = {"200": {"description": route.summary, "content": {route.media: {"schema": schema}}}}
    return answers | {status: {"description": text, "content": problem} for status, text in sorted(said.items())}


def _parameters(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    (_,), schemas = msgspec.json.schema_components([query], ref_template=_REF)
    schema = schemas[query.__name__]
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": each}
        for name, each in schema["properties"].items()
    ]
