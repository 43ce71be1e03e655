"""CacheBlend's loading controller (EuroSys'25): compute again as many tokens as take no longer than the loading.

Computing share r of a prompt again takes r times what computing all of it takes, and loading takes what the bytes take
from where they are. The largest share that is hidden behind the loading is the quotient of the two; less than the share
that quality asks for is never taken. Both speeds are measured on what was loaded and repaired lately, nothing is
configured; until both have been measured the least share is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from kvstore.errors import ConfigError
from kvstore.fit import MovingFit

if TYPE_CHECKING:
    from kvstore_connectors.blend.prompt import Cache, Prompt, Span

Amount = Literal["share", "loading"]
"""How much is computed again: the share that is asked for, or what the loading hides but no less than that share."""

AMOUNTS: dict[str, Amount] = {"share": "share", "loading": "loading"}
"""By the words of settings."""

DECAY = 0.9
"""Weight that a measurement keeps when the next one comes."""


def hidden_share(load_s: float, compute_all_s: float, least: float, most: float = 1.0) -> float:
    """The largest share of reused tokens whose computing is done when loading is.

    Parameters
    ----------
    load_s : float
        Seconds that loading all reused tokens takes.
    compute_all_s : float
        Seconds that computing all of them would take; not positive if it is not known.
    least, most : float
        Bounds of the share.

    Raises
    ------
    ConfigError
        If not ``0 <= least <= most <= 1``.
    """
    if not 0 <= least <= most <= 1:
        raise ConfigError(f"shares from {least} to {most} are not between 0 and 1.", "Give the least share first.")
    if compute_all_s <= 0:
        return least
    return min(max(load_s / compute_all_s, least), most)


def chunk_bytes(spans: Sequence[Span], cache: Cache) -> int:
    """Bytes of the KV that a prompt takes from chunks."""
    tokens = sum(span.stop - span.start for span in spans)
    return tokens * sum(held[0].nbytes for layer in cache for held in (layer.keys, layer.values))


class Controller:
    """Measures loads and repairs of one engine, and says how much the next loading hides."""

    def __init__(self) -> None:
        self._loads = MovingFit(2, main=1, decay=DECAY)
        self._repairs = MovingFit(2, main=1, decay=DECAY)

    def loaded(self, nbytes: int, seconds: float) -> None:
        """So many bytes of chunks have come."""
        if nbytes > 0 and seconds > 0:
            self._loads.add((1.0, float(nbytes)), seconds)

    def repaired(self, token_layers: int, seconds: float) -> None:
        """So many rows, summed over layers, were computed."""
        if token_layers > 0 and seconds > 0:
            self._repairs.add((1.0, float(token_layers)), seconds)

    def share(self, prompt: Prompt, cache: Cache, least: float, most: float = 1.0) -> float:
        """Share of a prompt's reused tokens to compute again.

        Parameters
        ----------
        prompt : Prompt
        cache : Cache
        least, most : float
            Bounds of the share.

        Raises
        ------
        ConfigError
            If not ``0 <= least <= most <= 1``.
        """
        load_s = self._loads((1.0, float(chunk_bytes(prompt.spans, cache))))
        row_s = self._repairs.coefficients[1]
        return hidden_share(load_s, row_s * prompt.reused * len(cache), least, most)
