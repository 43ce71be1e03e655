"""The repair of one prompt: passes over its layers, what they cost, and who decides which rows they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend.carried import carried_from
from kvstore_connectors.blend.prompt import brought
from kvstore_connectors.blend.recompute import Narrow, Pass, Watch

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import Cache, Prompt


class Selector(Protocol):
    """Decides which cached rows of a prompt are recomputed, and runs the passes that do it.

    Attributes
    ----------
    name : str
        Word for settings, metrics and tables.
    """

    @property
    def name(self) -> str: ...

    def repair(self, work: Work, count: int) -> Iterator[int]:
        """Run passes until the missing rows and about ``count`` rows of the spans are recomputed.

        Yields once for every layer of every pass. The last pass computes all missing rows.
        """
        ...


class Work:
    """The repair of one prompt.

    Parameters
    ----------
    model : Model
    prompt : Prompt
    cache : Cache
        Written in place; half repaired if a pass raises.
    wait_layer : callable, optional
        Called with a layer before it is first read.
    kv_only : bool
        Only the cache is wanted, not what is behind the last layer: `hidden` is not computed to the end.
    asked : bool
        Whether the prompt before asked something, as its `asked` told.
    reach : int, optional
        Layers in which the model reads chunks, as `blend.reach` measures them; all if that is not known.

    Attributes
    ----------
    rows, hidden : Tensor
        Positions that the last pass computed to the end, and their hidden states behind its last layer.
    changed : Tensor
        Mask ``[n]`` of rows that any pass wrote.
    token_layers : int
        Rows computed, summed over layers and passes, those without KV included.
    notes : dict of str to Tensor
        What selectors have measured, so that several which need the same measure it once.
    asked : bool
        Whether this prompt asks something, once a selector has told that: until then a guess, which changes what is
        computed first, and not the rule of choosing; what is read by then has been repaired by words, if so guessed.
    reach : int
        Layers to recompute chunks in where something is asked. More than half of them: before, that is not known.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        cache: Cache,
        wait_layer: Callable[[int], None] | None = None,
        *,
        kv_only: bool = False,
        asked: bool = False,
        reach: int | None = None,
    ) -> None:
        self.model, self.prompt, self.cache = model, prompt, cache
        self.asked = asked
        self.reach = model.layers if reach is None else min(max(reach, model.layers // 2 + 1), model.layers)
        self._wait_layer, self._kv_only = wait_layer, kv_only
        self._loaded = 0
        self._running: Pass | None = None
        self.rows = prompt.missing
        self.hidden = model.embed(prompt.ids[:0])
        self.changed = torch.zeros(len(prompt.ids), dtype=torch.bool, device=prompt.ids.device)
        self.token_layers = 0
        self.notes: dict[str, Tensor] = {}

    def repair(self, selector: Selector, share: float) -> Iterator[int]:
        """Recompute the missing rows and this share of the reused ones; yields once a layer.

        Raises
        ------
        ConfigError
            If the share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"a share of {share} is not between 0 and 1", "Give the share of tokens to recompute.")
        count = int(share * self.prompt.reused + 0.5)
        if count >= int(self.prompt.host_repairable.sum()):
            yield from self.steps(self.all_rows())
        else:
            yield from selector.repair(self, count)

    def steps(
        self,
        rows: Tensor,
        *,
        narrow: Narrow | None = None,
        watch: Watch | None = None,
        tries: bool = False,
        carries: bool = False,
        reaches: bool = False,
    ) -> Iterator[int]:
        """One pass over these rows; yields once a layer. Who needs no more of it may leave it there.

        With `tries` it may turn out to be the wrong rows: until `accept` or `take_back`, what it overwrites is kept.
        With `carries` cached tokens that are not among the rows change, too, by what the rows tell of them. With
        `reaches` only missing rows are computed above `reach`.
        """
        carried = carried_from(self.prompt, self.model.rotary, rows) if carries else None
        one = Pass(
            self.model,
            self.prompt.ids,
            self.cache,
            rows,
            narrow,
            watch,
            self._wait,
            kv_only=self._kv_only,
            tries=tries,
            carried=carried,
            reach=self.reach if reaches else None,
            beyond=self.prompt.missing if reaches else None,
        )
        self._running = one
        self.changed[rows] = True
        before = 0
        for layer in one.steps():
            self.token_layers += one.token_layers - before
            before = one.token_layers
            self.rows, self.hidden = one.rows, one.hidden
            yield layer

    def accept(self) -> None:
        """Between two layers of a pass that tries: these are the right rows."""
        if self._running is not None:
            self._running.accept()

    def take_back(self, rows: Tensor) -> None:
        """Between two layers of a pass that tries: put back what it overwrote, and go on with these of its rows."""
        if self._running is not None:
            self.changed[self._running.rows] = False
            self.changed[rows] = True
            self._running.take_back(rows)

    def with_missing(self, rows: Tensor) -> Tensor:
        """These rows and the missing ones, sorted."""
        return torch.cat([rows, self.prompt.missing]).unique()

    def all_rows(self) -> Tensor:
        """The missing rows and all that may need repair, sorted."""
        return self.with_missing(brought(self.prompt.host_repairable.nonzero()[:, 0], self.prompt.ids.device))

    @property
    def cost(self) -> float:
        """Work beyond computing the missing rows once, as a share of computing all reused rows; choosing included."""
        least = len(self.prompt.missing) * self.model.layers
        return (self.token_layers - least) / max(1, self.prompt.reused * self.model.layers)

    def _wait(self, layer: int) -> None:
        if layer == self._loaded:
            if self._wait_layer is not None:
                self._wait_layer(layer)
            self._loaded = layer + 1
