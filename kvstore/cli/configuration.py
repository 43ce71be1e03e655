"""`kvstore config show`: every setting, its value and where it came from."""

from __future__ import annotations

from kvstore.cli import out
from kvstore.cli.flags import AllFlags, ConfigFile, Flags, Json, settings


def config_show(*, json: Json = False, config: ConfigFile = None, flags: AllFlags = Flags()) -> None:  # noqa: B008
    """Show every setting, its value and where it came from. Takes the flags of `kvstore serve`; secrets are masked."""
    loaded = settings(config, flags)
    if json:
        rows = {key: {"value": value, "origin": origin} for key, value, origin in loaded.rows()}
        out.print_json({"file": str(loaded.file) if loaded.file else None, "settings": rows})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("Setting", "Value", "From", box=None, pad_edge=False, header_style="bold")
    for key, value, origin in loaded.rows():
        style = "dim" if origin.startswith("default") else "green"
        shown = Text(out.clean(value), overflow="fold") if value else Text("-", "dim")
        table.add_row(key, shown, Text(out.clean(origin), style, overflow="fold"))
    out.console().print(table)
