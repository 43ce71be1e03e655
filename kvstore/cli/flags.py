"""Flags of the settings, made from their rules: a new setting has its flag, its help and its default at once."""

from __future__ import annotations

import os
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from kvstore.config import Loaded, find_file, load
from kvstore.settings import GROUPS, RULES, Rule, flag_names, written_as


class SettingFlags:
    """What was given on the command line; None where nothing was."""

    def given(self) -> dict[str, str]:
        """Values by dotted key."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}  # pyright: ignore[reportArgumentType]
        return {key: named[_field(key)] for key in RULES if named[_field(key)] is not None}


def default_text(rule: Rule) -> str:
    """The default of a setting, in words."""
    if rule.auto_doc:
        return rule.auto_doc
    return rule.default or "none"


def _field(key: str) -> str:
    return key.replace(".", "_")


def _parameter(key: str, rule: Rule, panel: Group) -> tuple[str, Any, Any]:
    about = Parameter(
        name=flag_names(key),
        help=f"{rule.doc} Default: {default_text(rule)}.",
        group=panel,
        metavar=written_as(key),
        show_default=False,
        negative=(),
    )
    return _field(key), Annotated[str | None, about], field(default=None)


def _make() -> type[SettingFlags]:
    titles = {name: (kind.__doc__ or name).partition("\n")[0].rstrip(".") for name, kind in GROUPS.items()}
    panels = {name: Group(title, sort_key=place) for place, (name, title) in enumerate(titles.items())}
    rest = Group("Stopping", sort_key=len(panels))
    made = [_parameter(key, rule, panels.get(key.partition(".")[0], rest)) for key, rule in RULES.items()]
    kind = make_dataclass("Flags", made, bases=(SettingFlags,), frozen=True, kw_only=True)
    kind.__module__ = __name__  # it says "types", and cyclopts takes the types of that module for built-in ones
    return kind


if TYPE_CHECKING:
    Flags = SettingFlags
else:
    Flags = _make()

AllFlags = Annotated[Flags, Parameter(name="*")]
ConfigFile = Annotated[
    Path | None,
    Parameter(
        name="--config",
        help="TOML file to read. Default: $KVSTORE_CONFIG, else ~/.config/kvstore/kvstore.toml if it exists.",
    ),
]
Address = Annotated[
    str | None,
    Parameter(
        name=("--address", "--socket"),
        help="The daemon's Unix socket, or tcp://host:port. Default: $KVSTORE_CLIENT_ADDRESS, else where `kvstore "
        "serve` with the same settings listens.",
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON.")]


def settings(config: Path | None, flags: SettingFlags | None = None) -> Loaded:
    """Settings from flags, environment and file."""
    given = flags.given() if flags is not None else {}
    return load(given, os.environ, find_file(str(config) if config else None, os.environ))
