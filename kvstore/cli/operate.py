"""`kvstore leases`, `policy` and `drop`: who reads, in which order blocks leave, and what to forget."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kvstore.cli import out, spaces
from kvstore.cli.flags import Address, ConfigFile, Json
from kvstore.cli.status import fetch, resolve
from kvstore.errors import InvalidParams
from kvstore.units import format_duration, format_size


def leases(*, json: Json = False, address: Address = None, config: ConfigFile = None) -> None:
    """Show who holds the right to read which blocks, and until when. What is leased cannot be evicted."""
    from kvstore.client import KVStoreClient, operator

    with KVStoreClient(resolve(address, config)) as client:
        held = operator.leases(client)
    if json:
        out.print_json(held)
        return
    if not held:
        out.console().print("Nobody reads at this moment.")
        return
    from rich.table import Table

    columns = ("Client", "Model", "Namespace", "Blocks", "Bytes", "On their way", "Ends in")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for each in held:
        row = (each["client"] or "unnamed", each["model"] or "-", each["namespace"][:12], f"{each['blocks']:,}")
        rest = (format_size(each["bytes"]), f"{each['pending']:,}", format_duration(each["expires_s"]))
        table.add_row(*(out.clean(cell) for cell in (*row, *rest)))
    out.console().print(table)


def policy(
    tier: Annotated[str, Parameter(help="Tier to change.")] = "",
    name: Annotated[str, Parameter(help="Policy it gets; `kvstore policy` shows what there is.")] = "",
    /,
    *,
    json: Json = False,
    address: Address = None,
    config: ConfigFile = None,
) -> None:
    """Show the eviction policy of each tier, or give a tier another one until the daemon ends.

    Blocks stay; only the order in which they will leave is made anew. `host.policy` and `disk.policy` are the settings.
    """
    from kvstore.client import KVStoreClient, operator
    from kvstore.eviction import names

    if bool(tier) != bool(name):
        raise InvalidParams("policy: a tier needs the name of a policy.", f"One of {', '.join(names())}.")
    with KVStoreClient(resolve(address, config)) as client:
        policies = operator.policy(client, tier, name)
    if json:
        out.print_json({"policies": policies, "names": names()})
        return
    for each, chosen in policies.items():
        out.console().print(f"{out.clean(each):<8} {out.clean(chosen)}", markup=False)
    out.console().print(f"There is: {', '.join(names())}.", style="dim", markup=False)


def drop(
    *,
    namespace: spaces.Digest = "",
    model: spaces.Model = "",
    key: Annotated[list[str] | None, Parameter(help="Only this block; can be given again.", negative=())] = None,
    yes: Annotated[bool, Parameter(negative=(), help="Do not ask.")] = False,
    json: Json = False,
    address: Address = None,
    config: ConfigFile = None,
) -> int:
    """Forget blocks in every tier: those of a namespace, or only some of it. Who reads them now reads on."""
    from kvstore.client import KVStoreClient, operator

    target = resolve(address, config)
    space = spaces.choose(fetch(target), namespace, model)
    try:
        keys = None if key is None else [bytes.fromhex(each) for each in key]
    except ValueError:
        raise InvalidParams("--key: not hexadecimal.", "A key has 64 hexadecimal digits.") from None
    what = "every block" if keys is None else f"{len(keys)} blocks"
    if not yes and not json and not _sure(f"Forget {what} of {space.get('model') or 'unnamed'}?"):
        out.console().print("Nothing was dropped.")
        return 1
    with KVStoreClient(target) as client:
        dropped = operator.drop(client, bytes.fromhex(space["digest"]), keys)
    if json:
        out.print_json({"namespace": space["digest"], "blocks": dropped})
    else:
        out.console().print(f"{dropped:,} blocks were forgotten.")
    return 0


def _sure(question: str) -> bool:
    out.console().print(f"{out.clean(question)} [y/N] ", end="", markup=False)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
