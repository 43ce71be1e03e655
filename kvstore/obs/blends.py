"""What engines put together from chunks, as they report it, and by which verdict they may.

Engines blend, the daemon only lends them chunks: so these numbers are theirs. They are kept by namespace, which is
by model and rank, and summed since the daemon started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from kvstore.types import Scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.types import Namespace
    from kvstore.wire.messages import Report, Verdict

LARGEST = 1 << 53
"""No sum grows beyond this, whatever is reported."""

MOST = 1024
"""Namespaces that are remembered; the one that reported longest ago is forgotten first."""


@dataclass(slots=True)
class Blended:
    """Sums of one namespace, and the last verdict that came with a report."""

    prompts: int = 0
    tokens: int = 0
    computed: int = 0
    verdict: Verdict | None = None


class Blends:
    """Reports of engines, summed by namespace."""

    def __init__(self) -> None:
        self._sums: dict[Scope, Blended] = {}

    def add(self, scope: Scope, report: Report) -> None:
        """Add a report."""
        sums = self._sums.pop(scope, None) or Blended()
        sums.prompts = min(LARGEST, sums.prompts + report.prompts)
        sums.tokens = min(LARGEST, sums.tokens + report.tokens)
        sums.computed = min(sums.tokens, sums.computed + report.computed)
        sums.verdict = report.verdict or sums.verdict
        self._sums[scope] = sums
        if len(self._sums) > MOST:
            del self._sums[next(iter(self._sums))]

    def state(self, fields: Callable[[Scope], Namespace | None]) -> list[dict[str, Any]]:
        """For the snapshot: the sums with the model and rank they are of."""
        return [_row(scope, sums, fields(scope)) for scope, sums in self._sums.items()]


def _row(scope: Scope, sums: Blended, fields: Namespace | None) -> dict[str, Any]:
    about = {} if fields is None else {"model": fields.model, "tp_rank": fields.tp_rank, "tp_size": fields.tp_size}
    verdict = {} if sums.verdict is None else {"verdict": msgspec.structs.asdict(sums.verdict)}
    counts = {"prompts": sums.prompts, "tokens": sums.tokens, "computed": sums.computed}
    return {"digest": scope.ns.hex(), "domain": scope.domain} | about | counts | verdict
