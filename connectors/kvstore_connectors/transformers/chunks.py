"""Reuse at any position in `generate()`: chunks are stored, found by content, blended, and a share computed again.

Approximate, so it is asked for by calling `Chunks` and nothing else: `KVStoreCache` never sees a chunk. What was
blended is stored under no name at all, the tokens that are generated behind it included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvstore.client import report_blend
from kvstore.errors import ConfigError, InvalidParams
from kvstore_connectors.base import report_defect
from kvstore_connectors.blend.amount import AMOUNTS, Amount, Controller, chunk_bytes
from kvstore_connectors.blend.prompt import LayerKV, Prompt
from kvstore_connectors.blend.reach import REACHED, reach_of
from kvstore_connectors.blend.recompute import empty_cache
from kvstore_connectors.blend.selectors.planner import selector_for
from kvstore_connectors.blend.trial import Sample
from kvstore_connectors.blend.work import Work
from kvstore_connectors.chunk_loads import ChunkLoad, Wanted, begin_load
from kvstore_connectors.clock import Moment
from kvstore_connectors.transformers.cache import KVStoreCache
from kvstore_connectors.transformers.chunk_store import ChunkStore, check_spans
from kvstore_connectors.transformers.prefix import PrefixCache
from kvstore_connectors.transformers.support import token_rows

if TYPE_CHECKING:
    from kvstore.types import ChunkMatch, Namespace

TAINT = "it was blended from chunks, so its KV is approximate"
LOAD_DEADLINE_S = 3.0
"""Longest wait for chunks in lower tiers."""
MEASURED = 4
"""Passages in a prompt that is made to measure."""


class Blend(NamedTuple):
    """What became of one prompt.

    Attributes
    ----------
    prompt_tokens : int
    exact_tokens : int
        Leading tokens whose exact KV was loaded.
    chunks, reused_tokens : int
        Chunks behind them, and their tokens.
    computed_tokens : int
        Tokens that were computed before `generate` began; it computes the last one. 0 if nothing was blended.
    """

    prompt_tokens: int = 0
    exact_tokens: int = 0
    chunks: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0


class Chunks(ChunkStore):
    """Chunks of one model, behind one system prompt: stored (`ChunkStore`, of whom the parameters and errors are), and
    put together. Exact prefixes in front of chunks come from the model's connector.

    Attributes
    ----------
    last : Blend
        What became of the last prompt.
    reach : int or None
        Layers in which the model reads chunks, once `measure` was called; who knows may set it.

    Examples
    --------
    >>> chunks = Chunks(kv, system=system_ids)                                # doctest: +SKIP
    >>> chunks.store([passage_ids, other_ids])                                # doctest: +SKIP
    >>> out = chunks.generate(input_ids=ids, max_new_tokens=64)               # doctest: +SKIP
    """

    def __init__(
        self, kv: KVStoreCache, *, system: Any = (), labels: Sequence[str] = (), salt: str | None = None
    ) -> None:
        super().__init__(kv, system=system, labels=labels, salt=salt)
        self._copies = torch.cuda.Stream(kv.model.device) if kv.model.device.type == "cuda" else None
        self._controller = Controller()
        self.last = Blend()
        self.reach: int | None = None

    def measure(self, passages: Sequence[Any]) -> int:
        """Find out in how many layers the model reads chunks (`blend.reach`), and repair questions in those only.

        Takes as long as computing the passages twice; a dozen of 40 tokens and more are enough.

        Parameters
        ----------
        passages : sequence of ids
            Any text of the kind that chunks are of, cut as they are.

        Raises
        ------
        InvalidParams
            If there is none.
        """
        device = self._kv.model.device
        ids = [torch.tensor(token_rows(one)[0].tolist(), dtype=torch.int64, device=device) for one in passages]
        if not ids:
            raise InvalidParams("measure: there is no passage.", "Give some that you store as chunks.")
        lead = torch.tensor(self._system, dtype=torch.int64, device=device)
        groups = [tuple(ids[at : at + MEASURED]) for at in range(0, len(ids), MEASURED)][:REACHED]
        self.reach = reach_of(self._opened, [Sample("passages", lead, one, lead[:0], lead[:0]) for one in groups])
        return self.reach

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        spans: Sequence[tuple[int, int]] = (),
        separator: Sequence[int] = (),
        find: bool = True,
        share: float = 0.15,
        selector: str = "auto",
        amount: Amount = "share",
        **kwargs: Any,
    ) -> Any:
        """`model.generate` behind a blended prompt; without chunks, or without the daemon, behind an exact one.

        Takes what `model.generate` and `load` take, for one prompt.
        """
        wish = partial(self.load, spans=spans, separator=separator, find=find)
        return self._kv.serve(inputs, kwargs, partial(wish, share=share, selector=selector, amount=amount))

    def load(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        spans: Sequence[tuple[int, int]] = (),
        separator: Sequence[int] = (),
        find: bool = True,
        share: float = 0.15,
        selector: str = "auto",
        amount: Amount = "share",
        copies: int = 1,
    ) -> PrefixCache:
        """A cache for `generate(past_key_values=...)` with the KV of all tokens but the last, put together from chunks.

        Where no chunk is found, one is gone before it is loaded, or the daemon is not there, it is what
        `KVStoreCache.load` gives.

        Parameters
        ----------
        input_ids, attention_mask, copies
            As of `KVStoreCache.load`; one prompt.
        spans : sequence of (int, int)
            Half-open ranges of token positions that are chunks, in order.
        separator : sequence of int
            Token ids between which chunks stand.
        find : bool
            Look for stored chunks at any other position.
        share : float
            Share of the reused tokens to compute again.
        selector : str
            How these are chosen; ``auto`` is the planner's choice.
        amount : {"share", "loading"}
            That share, or as many as take as long as loading the chunks does, but no less than that share.

        Raises
        ------
        InvalidParams
            If it is a batch of several prompts, or spans overlap or leave the prompt.
        ConfigError
            If there is no such selector, it does not fit the chunks, or the share is not between 0 and 1.
        """
        row = self._one(input_ids)
        check_spans(spans, len(row))
        if not 0 <= share <= 1:
            raise InvalidParams(f"share: {share} is not between 0 and 1.", "")
        if amount not in AMOUNTS:
            raise InvalidParams(f"amount: {amount!r} is none of {', '.join(AMOUNTS)}.", "")
        selector_for(selector, Prompt(torch.zeros(1, dtype=torch.int64), ()))  # an unknown name is told at once
        past = self._kv.load(input_ids, attention_mask, salt=self._salt)
        exact = past.loaded_tokens
        self.last = Blend(len(row), exact)
        namespace = past.namespace
        if namespace is not None and not self._unsteady():
            ask = partial(_match, row=row, spans=spans, separator=separator, find=find, labels=self._labels)
            try:
                found = self._kv.link.run("search", partial(ask, namespace=namespace)) or []
                gathered = self._gather(namespace, row, past, _wanted(found, exact, len(row) - 1))
                if gathered is not None:
                    if amount == "loading":
                        share = self._controller.share(*gathered[:2], share)
                    self._blend(namespace, past, *gathered, share, selector)
            except ConfigError:  # a selector that does not fit these chunks
                raise
            except Exception:  # nothing has been put into the cache yet: the prompt is computed
                report_defect("blending")
        if copies > 1:
            past.batch_repeat_interleave(copies)
        return past

    def _gather(
        self, namespace: Namespace, row: Any, past: PrefixCache, wanted: Sequence[Wanted]
    ) -> tuple[Prompt, list[LayerKV], ChunkLoad] | None:
        """The prompt and its KV as far as it is stored; None if it is no more than the exact beginning."""
        link, exact = self._kv.link, past.loaded_tokens
        if not wanted:
            return None
        ids = torch.as_tensor(row, dtype=torch.int64, device=self._kv.model.device)
        with torch.no_grad():
            cache = empty_cache(self._opened, ids)
            for held, (keys, values) in zip(cache, past.pairs(), strict=False):
                held.keys[:exact], held.values[:exact] = (x[0, :, :exact].transpose(0, 1) for x in (keys, values))
            work = partial(begin_load, namespace=namespace, chunks=wanted, tokens=row.tobytes(), cache=cache)
            how = {"rotation": self._opened.rotary, "deadline_s": LOAD_DEADLINE_S, "tally": self._kv.tally}
            load = link.run("blend", partial(work, **how, stream=self._copies))
        return None if load is None else (Prompt(ids, tuple(load.spans), exact), cache, load)

    @torch.no_grad()
    def _blend(
        self,
        namespace: Namespace,
        past: PrefixCache,
        prompt: Prompt,
        cache: list[LayerKV],
        load: ChunkLoad,
        share: float,
        name: str,
    ) -> None:
        device = prompt.ids.device
        begun = Moment(device)
        try:
            work = Work(self._opened, prompt, cache, load.wait, reach=self.reach)
            for _ in work.repair(selector_for(name, prompt), share):
                pass
        finally:
            sound = load.finish()
        if not sound:  # the prompt is computed
            return
        ended = Moment(device)
        count, computed = len(prompt.ids) - 1, int(work.changed.sum())  # waits for the device
        self._controller.loaded(chunk_bytes(prompt.spans, cache), load.seconds)
        self._controller.repaired(work.token_layers, begun.until(ended) - load.waited())
        past.fill([(held.keys.transpose(0, 1)[None], held.values.transpose(0, 1)[None]) for held in cache], count)
        past.taint(TAINT)
        self.last = Blend(count + 1, prompt.exact, len(prompt.spans), prompt.reused, computed)
        tally = self._kv.tally
        tally.add("blend_prompts")
        tally.add("blended_tokens", count - prompt.exact)
        tally.add("blend_computed_tokens", computed)
        tell = partial(report_blend, namespace=namespace, prompts=1, tokens=count - prompt.exact, computed=computed)
        self._kv.link.run("report", tell)


def _match(client: Any, *, row: Any, **where: Any) -> list[ChunkMatch]:
    return client.match(row, **where)[0]


def _wanted(found: Sequence[ChunkMatch], exact: int, end: int) -> list[Wanted]:
    """What to load of the chunks that were found: behind the exact part, and never the prompt's last token."""
    cut = [(max(one.start, exact), min(one.stop, end), one) for one in found]
    return [
        Wanted(start, stop, start - one.start, one.key, one.overhead == 0.0) for start, stop, one in cut if start < stop
    ]
