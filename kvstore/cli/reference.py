"""Pages of the reference that are made from code: the command line, HTTP, metrics."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvstore.obs import metrics

_NOTE = "<!-- Made by `python -m kvstore.cli.docs`; change the code, not this page. -->"


def cli_page() -> str:
    """docs/cli.md: every command with its flags."""
    from kvstore.cli.app import app

    lines = ["# Command line", "", _NOTE, "", "Exit codes: 0 done, 1 something is wrong, 2 command line or setting, 3"]
    lines += ["daemon not reachable. `--json` prints the same for programs. The words are those of the wire.", ""]
    for words, command in _commands(app):
        lines += [f"## {' '.join(('kvstore', *words))}", "", inspect.cleandoc(str(command.help or "")), ""]
        rows = list(_flags(command))
        if rows:
            lines += ["| argument | what it does | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(app: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in sorted(each for each in app if not each.startswith("-")):
        inner = list(_commands(app[name], *words, name))
        yield from inner or [((*words, name), app[name])]


def _flags(command: Any) -> Iterator[str]:
    from kvstore.settings import RULES, flag_names

    settings = {name for key in RULES for name in flag_names(key)}
    shortened = False
    for argument in command.assemble_argument_collection():
        if settings & set(argument.names) and "--address" not in argument.names:
            shortened = True
            continue
        if argument.names == ("*",):
            continue
        names = "<br>".join(f"`{name}`" for name in argument.names)
        default = argument.field_info.default
        shown = "required" if argument.required else "" if default in (None, False, "") else f"`{default}`"
        text = " ".join(str(argument.parameter.help or "").split()).replace("|", r"\|").replace("<", "&lt;")
        yield f"| {names} | {text} | {shown} |"
    if shortened:
        yield "| the flags of [every setting](settings.md) | | |"


def metrics_page() -> str:
    """docs/metrics.md: the daemon's metrics, and what its connector adds to those of vLLM."""
    lines = [
        metrics.markdown(),
        "## In vLLM",
        "",
        "vLLM's own `/metrics` has these beside its own, one for each engine, where the connector is in use.",
        "",
        "| metric | meaning |",
        "|---|---|",
        *(f"| `vllm:kvstore_{name}_total` | {text} |" for name, text in engine_counters().items()),
        "",
    ]
    return "\n".join(lines)


def engine_counters() -> dict[str, str]:
    """Counters that vLLM shows, with what they mean; read, not imported, since that module needs vLLM."""
    found = find_spec("kvstore_connectors")
    places = [] if found is None else found.submodule_search_locations or []
    for file in (Path(place) / "vllm" / "stats.py" for place in places):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "COUNTERS":
                return ast.literal_eval(node.value) if node.value is not None else {}
    return {}


def http_page() -> str:
    """docs/http.md: every route."""
    from kvstore.http.access import Access
    from kvstore.http.routes import TABLE

    who = {
        Access.OPEN: "anybody",
        Access.READ: "anybody on this machine; beyond it, the token",
        Access.ACT: "the token, as Bearer",
    }
    lines = [
        "# HTTP",
        "",
        _NOTE,
        "",
        "The daemon serves HTTP on `http.address`, by default 127.0.0.1:7070. It refuses to listen beyond loopback",
        "without a token (`listen.token`). `/v1/openapi.json` describes everything as OpenAPI 3.1. An error is always",
        '`{"code", "cause", "remedy"}`, with a code of [errors.md](errors.md).',
        "",
        "The token is shown as `Authorization: Bearer TOKEN`; for reading, HTTP Basic with the token as password will",
        "do, so that a browser can ask for it. What changes something takes Bearer only: no page of another site can",
        "send it.",
        "",
        "| method | path | who | what |",
        "|---|---|---|---|",
        *(f"| {route.method} | `{route.path}` | {who[route.access]} | {route.summary} |" for route in TABLE),
        "",
        "Nothing executes code, shows the environment, or asks another server.",
        "",
    ]
    return "\n".join(lines)
