"""Rules in force: the table, the tiers it divides, and the file it is kept in. CLI and HTTP change them at run time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvstore.errors import QuotaRefused
from kvstore.eviction.partitions import Partitions
from kvstore.namespaces import NamespaceRegistry
from kvstore.quotas import QuotaRule, QuotaTable, load_table, save_table
from kvstore.types import Scope


class QuotaDesk:
    """Takes changes of the rules: checked against every tier, written to the file, and only then in force.

    Parameters
    ----------
    tiers : mapping of str to (Partitions, int)
        Order and capacity of each tier that can be divided.
    namespaces : NamespaceRegistry
        What is known of the namespaces.
    """

    def __init__(self, tiers: Mapping[str, tuple[Partitions, int]], namespaces: NamespaceRegistry) -> None:
        self._orders = {name: order for name, (order, _) in tiers.items()}
        self._capacities = {name: capacity for name, (_, capacity) in tiers.items()}
        self._namespaces = namespaces
        self._path: Path | None = None
        self._table = QuotaTable()

    def load(self, path: Path) -> None:
        """Put the rules of a file in force, and keep changes there.

        Raises
        ------
        QuotaRefused
            If the file is bad, or its rules do not fit the tiers; it names the file.
        """
        table = load_table(path)
        try:
            self._enforce(table)
        except QuotaRefused as error:
            raise QuotaRefused(f"{path}: {error.cause}", error.remedy) from None
        self._path = path

    def set(self, rule: QuotaRule) -> None:
        """Add a rule, or put it in the place of the one of its name; raises `QuotaRefused`."""
        self._change(self._table.with_rule(rule))

    def remove(self, name: str) -> None:
        """Remove a rule. Its blocks stay, without it; raises `QuotaRefused` if there is none."""
        self._change(self._table.without(name))

    def _change(self, table: QuotaTable) -> None:
        table.shares(self._capacities)
        if self._path is not None:
            save_table(self._path, table)
        self._enforce(table)

    def _enforce(self, table: QuotaTable) -> None:
        shares = table.shares(self._capacities)
        self._table = table
        for name, order in self._orders.items():
            order.arrange(shares[name], self._assign)

    def _assign(self, scope: Scope) -> str:
        return self._table.match(scope, self._namespaces.fields(scope))

    def introduced(self, scope: Scope) -> None:
        """Note that a namespace is known now, whose blocks may have been here before."""
        for order in self._orders.values():
            order.reassign(scope)

    @property
    def rules(self) -> list[QuotaRule]:
        """The rules, in the order in which they were set."""
        return list(self._table)

    def state(self) -> dict[str, dict[str, Any]]:
        """By tier: bytes, blocks, guarantee, limit and expired blocks of each partition; empty without rules."""
        return {name: order.state() for name, order in self._orders.items() if order.ruled}

    def evicted(self) -> Iterable[tuple[str, str, str, int]]:
        """(tier, partition that made room, partition that gave it, blocks)."""
        for name, order in self._orders.items():
            for (by, victim), count in order.evicted.items():
                yield name, by, victim, count
