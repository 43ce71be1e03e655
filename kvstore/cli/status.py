"""`kvstore status` and `kvstore top`: what the running daemon holds and does."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import Address, ConfigFile, Json, settings
from kvstore.errors import ConfigError, Unavailable
from kvstore.units import parse_duration


def status(*, json: Json = False, address: Address = None, config: ConfigFile = None) -> None:
    """Show tiers, sessions, queue and namespaces of the running daemon."""
    snapshot = fetch(resolve(address, config))
    if json:
        out.print_json(snapshot)
        return
    from kvstore.cli.view import render

    out.console().print(render(snapshot))


def top(
    *,
    once: Annotated[bool, Parameter(negative=(), help="Print once, with the rates of one interval, and end.")] = False,
    interval: Annotated[str, Parameter(help="Time between two looks.")] = "1s",
    json: Annotated[bool, Parameter(negative=(), help="Print JSON, a snapshot a line.")] = False,
    address: Address = None,
    config: ConfigFile = None,
) -> None:
    """Watch the running daemon. Ctrl-C ends it."""
    pause = _interval(interval)
    from kvstore.cli.view import render

    target = resolve(address, config)
    if json:
        with contextlib.suppress(KeyboardInterrupt):
            _lines(target, pause, once)
        return
    before, since = fetch(target), time.monotonic()
    if once:
        time.sleep(pause)
        out.console().print(render(fetch(target), before, time.monotonic() - since))
        return
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        _watch(target, pause, before, since)


def _lines(target: str, pause: float, once: bool) -> None:
    while True:
        print(msgspec.json.encode(out.plain(fetch(target))).decode(), flush=True)
        if once:
            return
        time.sleep(pause)


def _watch(target: str, pause: float, before: Mapping[str, Any], since: float) -> NoReturn:
    from rich.live import Live
    from rich.text import Text

    from kvstore.cli.view import render

    with Live(render(before), console=out.console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(pause)
            try:
                now, at = fetch(target), time.monotonic()
            except Unavailable as error:  # it may come back; keep watching
                live.update(Text(out.clean(error.cause), "bold red"), refresh=True)
                continue
            live.update(render(now, before, at - since), refresh=True)
            before, since = now, at


def resolve(address: str | None, config: Path | None = None) -> str:
    """Address of the daemon that is meant."""
    return address or os.environ.get("KVSTORE_CLIENT_ADDRESS") or str(settings(config).settings.listen.socket)


def fetch(address: str) -> Mapping[str, Any]:
    """The daemon's snapshot.

    Raises
    ------
    Unavailable
        If there is no daemon.
    """
    from kvstore.client import KVStoreClient

    with KVStoreClient(address) as client:
        return client.stats()


def _interval(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--interval: {text!r} {error}.", "Write for example 500ms or 2s.") from None
    if not 0.1 <= seconds <= 3600:
        raise ConfigError(f"--interval: {text!r} is not between 100ms and 1h.", "Write for example 500ms or 2s.")
    return seconds
