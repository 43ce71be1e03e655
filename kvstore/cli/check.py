"""`kvstore check`: walk the disk tier of a stopped daemon and report, or mend, what is wrong."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import AllFlags, ConfigFile, Flags, Json, settings
from kvstore.config import Loaded
from kvstore.errors import ConfigError
from kvstore.units import format_size

_NO_BOUND = 1 << 62


def check(
    *,
    fix: Annotated[bool, Parameter(negative=(), help="Mend what can be mended; damaged blocks are put aside.")] = False,
    json: Json = False,
    config: ConfigFile = None,
    flags: AllFlags = Flags(),  # noqa: B008 - frozen
) -> int:
    """Walk the disk tier both ways, index and files, and verify every checksum. The daemon must not be running.

    Exits with 1 if something is wrong and was not mended.
    """
    loaded = settings(config, flags)
    if loaded.settings.disk.bytes == 0:
        raise ConfigError("disk.bytes: 0 means that there is no disk tier to check.", "Name one with --disk-bytes.")
    if not loaded.settings.disk.path.is_dir():
        raise ConfigError(f"disk.path: {loaded.settings.disk.path} does not exist.", "Name the tier with --disk-path.")
    report = asyncio.run(_walk(loaded, fix, quiet=json))
    left = sum(not finding["fixed"] for finding in report["findings"])
    if json:
        out.print_json(report)
    else:
        _print(report, left)
    return int(left > 0)


async def _walk(loaded: Loaded, fix: bool, quiet: bool) -> dict[str, Any]:
    from rich.console import Console

    from kvstore.tiers.disk import DiskTier

    disk = loaded.settings.disk
    # Without a bound on bytes: a check must not evict because the budget was lowered since.
    tier = DiskTier(disk.path, _NO_BOUND, threads=disk.threads, policy=disk.policy)
    console = Console(stderr=True, quiet=quiet)
    try:
        with console.status("Reading the directory"):
            await tier.start()
        usage = tier.usage()
        with console.status(f"Verifying {usage.blocks:,} blocks, {format_size(usage.used)}"):
            findings = await tier.check(fix)
    finally:
        await tier.close()
    return {
        "path": str(disk.path),
        "blocks": usage.blocks,
        "bytes": usage.used,
        "findings": [{"what": each.what, "where": each.where, "fixed": each.fixed} for each in findings],
    }


def _print(report: dict[str, Any], left: int) -> None:
    from rich.table import Table
    from rich.text import Text

    findings = report["findings"]
    if findings:
        table = Table("What", "Where", "Mended", box=None, pad_edge=False, header_style="bold")
        for each in findings:
            mended = Text("yes", "green") if each["fixed"] else Text("no", "red")
            where = Text(out.clean(each["where"]), overflow="fold")
            table.add_row(Text(out.clean(each["what"]), overflow="fold"), where, mended)
        out.console().print(table)
    mended = len(findings) - left
    verdict = "nothing wrong" if not findings else f"{left:,} wrong, {mended:,} mended"
    held = f"{report['blocks']:,} blocks, {format_size(report['bytes'])} in {out.clean(report['path'])}"
    out.console().print(Text(f"{held}: {verdict}.", "bold red" if left else "bold green"), soft_wrap=True)
    if left:
        out.console().print("`kvstore check --fix` mends what can be mended.")
