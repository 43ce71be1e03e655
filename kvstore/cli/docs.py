"""Pages of the docs made from code. ``python -m kvstore.cli.docs`` writes them; a test says when one is old."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from kvstore import errors
from kvstore.cli.flags import default_text
from kvstore.cli.protocol import protocol_page
from kvstore.cli.reference import cli_page, http_page, metrics_page
from kvstore.settings import GROUPS, RULES, env_names, flag_names, written_as

_NOTE = "<!-- Made by `python -m kvstore.cli.docs`; change the code, not this page. -->"


def errors_page() -> str:
    """docs/errors.md: the tree, and each error with its code, meaning and remedy."""
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n")
    lines = [
        "# Errors",
        "",
        _NOTE,
        "",
        "An error has the same code in Python, on the wire, over HTTP and in the log. Its message says what is wrong",
        "and what to do about it.",
        "",
        "```text",
        inspect.cleandoc(tree[1]),
        "```",
        "",
        *(tree[2].splitlines()),
        "",
        "| code | error | HTTP | what it means | what to do |",
        "|---|---|---|---|---|",
    ]
    for code, kind in sorted(errors.BY_CODE.items()):
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        lines.append(f"| {code} | `{kind.__name__}` | {kind.http_status} | {meaning} | {kind.default_remedy} |")
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """docs/settings.md: every setting with its default, flag and environment name, and an example file."""
    lines = [
        "# Settings",
        "",
        _NOTE,
        "",
        "kvstore needs no settings. Where there are some, flags win over the environment, the environment over the",
        "file, the file over the defaults; `kvstore config show` tells each value and where it came from. An unknown",
        "name is an error.",
        "",
        "The file is TOML: the one named by `--config`, else by `KVSTORE_CONFIG`, else",
        "`$XDG_CONFIG_HOME/kvstore/kvstore.toml` (by default `~/.config/kvstore/kvstore.toml`) if it exists.",
        "",
        "- SIZE: `8GiB`, `500MB` or a number of bytes. `8G` is refused: it means two different numbers to two tools.",
        "- DURATION: `250ms`, `10s`, `5m` or a number of seconds.",
        "- `auto` stands for a default that depends on the machine.",
        "",
    ]
    for group, title in _titles():
        lines += [f"## {title}", "", "| setting | written as | default | what it does |", "|---|---|---|---|"]
        for key in _keys(group):
            rule = RULES[key]
            names = "<br>".join(f"`{name}`" for name in (key, *flag_names(key), *env_names(key)))
            default = default_text(rule) if rule.auto_doc else f"`{rule.default}`" if rule.default else "none"
            kind = written_as(key).replace("|", r"\|")
            lines.append(f"| {names} | {kind} | {default.replace('<uid>', '&lt;uid&gt;')} | {rule.doc} |")
        lines.append("")
    return "\n".join([*lines, "## Example", "", "```toml", *_example(), "```", ""])


def _titles() -> Iterator[tuple[str, str]]:
    for name, kind in GROUPS.items():
        yield name, (kind.__doc__ or "").partition("\n")[0].rstrip(".")
    yield "", "Stopping"


def _keys(group: str) -> list[str]:
    return [key for key in RULES if key.rpartition(".")[0] == group]


def _example() -> Iterator[str]:
    """A file that says what is the case anyway: every setting at its default."""
    for key in _keys(""):
        yield _line(key, key)
    for group in GROUPS:
        yield ""
        yield f"[{group}]"
        for key in _keys(group):
            yield _line(key, key.rpartition(".")[2])


def _line(key: str, name: str) -> str:
    default = RULES[key].default
    plain = written_as(key) == "N"
    return f"{name} = {default}" if plain else f'{name} = "{default}"'


PAGES = {
    "cli.md": cli_page,
    "errors.md": errors_page,
    "http.md": http_page,
    "metrics.md": metrics_page,
    "protocol.md": protocol_page,
    "settings.md": settings_page,
}


def main(folder: Path) -> None:
    """Write all pages into `folder`."""
    for name, make in PAGES.items():
        (folder / name).write_text(make(), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
