"""`kvstore doctor`: is this machine fit for kvstore, and what to do where it is not."""

from __future__ import annotations

from kvstore.cli import out, probes
from kvstore.cli.flags import AllFlags, ConfigFile, Flags, Json, settings

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(*, json: Json = False, config: ConfigFile = None, flags: AllFlags = Flags()) -> int:  # noqa: B008 - frozen
    """Examine this machine: memory, files, disk, socket, GPU, engine and daemon. Takes the flags of `kvstore serve`.

    Each line says what is the case, what it means and what to do. Exits with 1 if something has to be fixed first.
    """
    loaded = settings(config, flags)
    results = {name: probes.run(probe, loaded) for name, probe in probes.PROBES.items()}
    failed = any(result.state == "fail" for result in results.values())
    if json:
        out.print_json({name: result._asdict() for name, result in results.items()})
        return int(failed)
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, result in results.items():
        style = _STYLES[result.state]
        lines = Text(out.clean(result.found), overflow="fold")
        for label, text in (("", result.meaning), ("fix: ", result.fix if result.state != "ok" else "")):
            if text:
                lines.append(f"\n{label}{out.clean(text)}", "dim" if not label else style)
        table.add_row(Text(result.state, style), Text(name, "bold"), lines)
    out.console().print(table)
    return int(failed)
