"""`kvstore quota`: who may have how much, on the running daemon."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import Address, ConfigFile, Json
from kvstore.cli.status import resolve
from kvstore.errors import QuotaRefused
from kvstore.patterns import in_words
from kvstore.quotas import QuotaRule
from kvstore.units import format_size

Name = Annotated[str, Parameter(help="What the rule is called.")]


def quota_list(*, json: Json = False, address: Address = None, config: ConfigFile = None) -> None:
    """Show the rules and what each of them holds."""
    _show(*_ask(resolve(address, config)), json)


def quota_set(
    name: Name,
    /,
    *,
    tenant: Annotated[str, Parameter(help="Tenant it is about.")] = "",
    domain: Annotated[str, Parameter(help="Trust domain it is about, such as uid-1000.")] = "",
    model: Annotated[str, Parameter(help="Pattern of the model it is about, with * and ?.")] = "",
    namespace: Annotated[str, Parameter(help="First digits of the namespace digest it is about, 8 or more.")] = "",
    guarantee: Annotated[str, Parameter(help="Never taken by others: 30%, 2GiB, or host=2GiB,disk=40%.")] = "",
    limit: Annotated[str, Parameter(help="The most it may have, written the same way.")] = "",
    priority: Annotated[int, Parameter(help="Lower ones give way first; 0 is everybody's.")] = 0,
    ttl: Annotated[str, Parameter(help="Blocks unused for so long are forgotten: 30m, 7d.")] = "",
    json: Json = False,
    address: Address = None,
    config: ConfigFile = None,
) -> None:
    """Add a rule, or replace the one of that name. In force at once, and after a restart."""
    given = {
        "name": name,
        "tenant": tenant,
        "domain": domain,
        "model": model,
        "namespace": namespace,
        "guarantee": guarantee,
        "limit": limit,
        "priority": priority,
        "ttl": ttl,
    }
    try:
        rule = msgspec.convert(given, QuotaRule)
    except msgspec.ValidationError as error:
        raise QuotaRefused(f"quota: {in_words(error)}.") from None
    _show(*_ask(resolve(address, config), rule), json)


def quota_remove(name: Name, /, *, json: Json = False, address: Address = None, config: ConfigFile = None) -> None:
    """Remove a rule. What it held stays, without it."""
    _show(*_ask(resolve(address, config), remove=name), json)


def _ask(address: str, rule: QuotaRule | None = None, remove: str = "") -> tuple[list[QuotaRule], dict[str, Any]]:
    from kvstore.client import KVStoreClient

    with KVStoreClient(address) as client:
        return client.quota(rule, remove=remove)


def _show(rules: list[QuotaRule], tiers: dict[str, Any], json: bool) -> None:
    if json:
        out.print_json({"rules": msgspec.to_builtins(rules), "tiers": tiers})
        return
    if not rules:
        out.console().print("No rules: everybody shares each tier.")
        return
    from rich.table import Table

    table = Table("rule", "about", "guarantee", "limit", "priority", "ttl", "holds", box=None)
    for rule in rules:
        fields = {"tenant": rule.tenant, "domain": rule.domain, "model": rule.model, "namespace": rule.namespace}
        about = " ".join(f"{field}={text}" for field, text in fields.items() if text)
        held = ", ".join(f"{tier} {format_size(state[rule.name]['bytes'])}" for tier, state in tiers.items())
        row = (rule.name, about, rule.guarantee, rule.limit, str(rule.priority), rule.ttl, held)
        table.add_row(*(out.clean(cell) for cell in row))
    out.console().print(table)
