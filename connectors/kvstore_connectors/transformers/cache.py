"""The connector's front: one `KVStoreCache` for each model."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch

from kvstore.client import KVStoreClient
from kvstore.errors import ConfigError
from kvstore.keys import PrefixChain, hash_salt
from kvstore.types import BlockHeader, Namespace
from kvstore_connectors.base import Breaker, Link, Tally, check_fidelity, log, shielded
from kvstore_connectors.transformers.history import autocast
from kvstore_connectors.transformers.hooks import watch
from kvstore_connectors.transformers.identity import model_layout, model_namespace, stamp
from kvstore_connectors.transformers.importance import Shares, Watch
from kvstore_connectors.transformers.layout import Layout
from kvstore_connectors.transformers.prefix import PrefixCache, StoreReport
from kvstore_connectors.transformers.support import (
    Rows,
    base_model,
    check_adapters,
    check_model,
    check_padding,
    token_rows,
)
from kvstore_connectors.transformers.transfers import Offer, Transfers
from kvstore_gpu.shared import importer

FIRST_CONTACT_S = 0.5
"""Longest wait for the daemon when the connector is made; later it is met in the background."""


class Summary(NamedTuple):
    """What the store did for one call of `generate`.

    Attributes
    ----------
    prompt_tokens, loaded_tokens : int
        Tokens of the prompt, and how many of them were not computed.
    store : StoreReport
    """

    prompt_tokens: int
    loaded_tokens: int
    store: StoreReport


class KVStoreCache:
    """Prefix reuse for one transformers model.

    Whatever happens to the daemon, `generate` works as without it. What raises is misuse: a model or a prompt that is
    not supported, and KV that was loaded for another prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    address : str, optional
        Path of the daemon's socket, or ``tcp://host:port``. Default: KVSTORE_CLIENT_ADDRESS, else the user's daemon.
    token : str, optional
        Secret of a daemon reached over TCP. Default: KVSTORE_CLIENT_TOKEN.
    block_tokens : int
        Tokens in a stored block. Only whole blocks are stored and found again.
    revision : str
        Added to the identity of the model, which has a digest of its weights already.
    salt : str, optional
        Who has another salt finds nothing of what is stored here. `load` and `generate` take one for a single prompt.
    tenant : str
        Blocks are shared only inside one tenant.
    weights : str
        How the weights are told apart: ``full`` reads every byte once, ``sample`` a little of every tensor.
    fidelity : str
        ``exact``, or ``lossy:PROFILE``: the daemon's lower tiers may keep blocks by the rungs of a profile that
        `kvstore calibrate` wrote for this model. Without such a profile the daemon refuses, and nothing is cached.
    importance : bool
        Measure how much attention each token gets and store it with the blocks, for `mikv` and for eviction by cost.
        While the connector is open the model's attention goes through it (see `kvstore_connectors.transformers
        .importance` for what that takes).
    timeout_s : float
        Longest time that a daemon which does not answer can cost, once.
    load_deadline_s : float
        Longest time a load may take; what has not arrived then is computed.

    Raises
    ------
    ConfigError
        If the model is not supported, with the reason in one sentence.

    Examples
    --------
    >>> kv = KVStoreCache(model)                                             # doctest: +SKIP
    >>> out = kv.generate(**inputs, max_new_tokens=64)                       # doctest: +SKIP

    >>> with kv.load(inputs["input_ids"]) as past:                           # doctest: +SKIP
    ...     out = model.generate(**inputs, past_key_values=past)
    """

    def __init__(
        self,
        model: Any,
        *,
        address: str | None = None,
        token: str | None = None,
        block_tokens: int = 256,
        revision: str = "",
        salt: str | None = None,
        tenant: str = "",
        weights: str = "full",
        fidelity: str = "exact",
        importance: bool = False,
        timeout_s: float = 0.25,
        load_deadline_s: float = 3.0,
    ) -> None:
        if block_tokens <= 0:
            raise ConfigError(f"block_tokens: {block_tokens} is not positive.", "")
        if weights not in ("full", "sample"):
            raise ConfigError(f"weights: {weights!r} is neither 'full' nor 'sample'.", "")
        check_fidelity(fidelity)
        self._model = model
        self._base = base_model(model)
        self._decoder = check_model(self._base)
        self._identity = {
            "revision": revision, "tenant": tenant, "salt": salt, "weights": weights, "fidelity": fidelity
        }  # fmt: skip
        self._tally = Tally()
        self._breaker = Breaker("transformers", self._tally)
        device = importer(self._base.device)
        self._link = Link(
            lambda: KVStoreClient(address, token=token, timeout_s=timeout_s, name="transformers", device=device),
            self._breaker,
            self._tally,
        )
        begun = time.monotonic()
        self._breaker.start()
        self.last = Summary(0, 0, StoreReport())
        self._layout = model_layout(self._base, block_tokens)
        self._transfers = Transfers(self._link, self._layout, self._tally, load_deadline_s)
        self._named = threading.Lock()
        self._refused: set[str] = set()
        self.refresh()
        self.watch = Watch(self._base) if importance else None
        handles = watch(self._decoder, weakref.ref(self))
        self._end = weakref.finalize(self, _end, handles, self._breaker, self._link, self.watch)
        self._breaker.start(max(0.0, begun + FIRST_CONTACT_S - time.monotonic()))

    # -- use -----------------------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, *, salt: str | None = None, **kwargs: Any) -> Any:
        """`model.generate`, with the beginning of the prompt loaded and what is new stored.

        Takes and returns what `model.generate` does. Calls that have no use for a cache of ours (`use_cache=False`, a
        cache of their own, embeddings instead of token ids) go to the model as they are.

        Raises
        ------
        InvalidParams
            If the prompts are padded.
        """
        return self.serve(inputs, kwargs, partial(self.load, salt=salt))

    def serve(self, inputs: torch.Tensor | None, kwargs: dict[str, Any], load: Callable[..., PrefixCache]) -> Any:
        """`model.generate` with the cache that `load(ids, attention_mask, copies=)` gives; without it, if it is no use.

        For `generate`, here and of `Chunks`.
        """
        given = {} if inputs is None else {"inputs": inputs}
        if kwargs.get("past_key_values", self) is None:
            del kwargs["past_key_values"]
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        config = kwargs.get("generation_config") or self._base.generation_config
        if ids is None or not _serves(config, kwargs):
            return self._model.generate(**given, **kwargs)
        copies = max(_option("num_beams", config, kwargs) or 1, _option("num_return_sequences", config, kwargs) or 1)
        past = load(ids, kwargs.get("attention_mask"), copies=copies)
        out = self._model.generate(**given, **kwargs, past_key_values=past)
        self.last = Summary(past.prompt_tokens, past.loaded_tokens, past.store())
        return out

    def load(
        self, input_ids: Any, attention_mask: Any = None, *, salt: str | None = None, copies: int = 1
    ) -> PrefixCache:
        """A cache for `generate(past_key_values=...)` that holds the longest stored beginning of the prompt.

        At least the last token of a prompt is left to compute. Of a batch, as much is loaded as there is of every
        prompt.

        Parameters
        ----------
        input_ids : Tensor, ndarray or sequence of int, [token] or [batch, token]
        attention_mask : Tensor or ndarray, optional
            May only be ones.
        salt : str, optional
            In place of the connector's own.
        copies : int
            How often each prompt is there in the batch, as `num_beams` and `num_return_sequences` do.

        Raises
        ------
        InvalidParams
            If the prompts are padded, or are no token ids.
        """
        rows = token_rows(input_ids)
        check_padding(rows, attention_mask, getattr(self._base, "generation_config", None))
        namespace = self.namespace_now(salt)
        shares = None if self.watch is None else Shares()
        past = PrefixCache(self, self._base.config, namespace, self._stamp, rows, shares)
        self._fill(past, rows)
        if copies > 1:
            past.batch_repeat_interleave(copies)
        return past

    @shielded(lambda: StoreReport(refused="a defect of the connector"))
    def store(self, past: PrefixCache) -> StoreReport:
        """Store the full blocks of a cache that are not stored yet; the same as `past.store()`. Never raises."""
        begun = time.monotonic()
        rows, refused = past.content()
        kv = past.pairs()
        if not rows.size and not refused:
            return StoreReport()
        refused = refused or self._layout.mismatch(kv, *rows.shape)
        if not refused and not self.same_model(past):
            refused = "the model's weights or adapters were changed since the cache was made"
        if refused or past.namespace is None:
            return self._refuse(refused or "the model has no identity")
        report = self._transfers.store(past.namespace, self._offers(past.namespace, rows, past.shares), kv)
        for name, amount in report._asdict().items():
            if amount:
                self._tally.add(f"{name}_blocks", amount)
        self._tally.add("store_seconds", time.monotonic() - begun)
        return report

    def refresh(self) -> None:
        """Make the model's identity again, after its weights were changed through `.data` or NumPy.

        Every other change (training, adapters, moves to another device) is noticed without this.

        Raises
        ------
        ConfigError
            If the model is not supported any more.
        """
        with self._named:
            adapters = getattr(self._model, "peft_config", None) or {}
            check_adapters(adapters)
            mark = stamp(self._decoder)
            self._named_now = model_namespace(
                self._base, self._decoder, self._layout, adapters=adapters, **self._identity
            )
            self._stamp = mark

    @shielded()
    def namespace_now(self, salt: str | None = None) -> Namespace | None:
        """Identity of the model as it is at this moment, with a prompt's own salt; None if it has none."""
        if stamp(self._decoder) != self._stamp:
            self.refresh()
        return self._named_now if salt is None else msgspec.structs.replace(self._named_now, salt=hash_salt(salt))

    @property
    def namespace(self) -> Namespace:
        """Identity of the KV that the model makes, without a prompt's own salt."""
        return self._named_now

    @property
    def layout(self) -> Layout:
        """How its blocks lie in memory."""
        return self._layout

    @property
    def model(self) -> Any:
        """The transformers model, without a PEFT wrapper."""
        return self._base

    @property
    def link(self) -> Link:
        """The way to the daemon; it never raises."""
        return self._link

    @property
    def tally(self) -> Tally:
        """Where events are counted."""
        return self._tally

    @property
    def decoder(self) -> Any:
        """The module of the model that fills caches."""
        return self._decoder

    def same_model(self, past: PrefixCache) -> bool:
        """Whether the model is still the one that a cache was made for."""
        return stamp(self._decoder) == past.mark

    def counters(self) -> dict[str, float]:
        """What has happened so far: tokens asked for and loaded, blocks stored and dropped, outages."""
        return self._tally.peek()

    def close(self) -> None:
        """Leave the model as it was, and end the connection. May be called twice."""
        self._end()

    def __enter__(self) -> KVStoreCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    @shielded()
    def _fill(self, past: PrefixCache, rows: Rows) -> None:
        device = self._base.device
        blocks = (rows.shape[1] - 1) // self._layout.block_tokens
        self._tally.add("prompt_tokens", rows.size)
        if past.namespace is None or not blocks or self._base.training or autocast(device):
            return
        begun = time.monotonic()
        keys = [self._chain(past.namespace, row).keys[:blocks] for row in rows]
        with torch.no_grad():
            kv, loaded = self._transfers.load(past.namespace, keys, device)
        if loaded:
            past.fill(kv, loaded * self._layout.block_tokens)
        self._tally.add("loaded_tokens", past.loaded_tokens * rows.shape[0])
        self._tally.add("load_seconds", time.monotonic() - begun)

    @staticmethod
    def _chain(namespace: Namespace, tokens: Any) -> PrefixChain:
        chain = PrefixChain(namespace)
        chain.extend(tokens)
        return chain

    def _offers(self, namespace: Namespace, rows: Rows, shares: Shares | None) -> list[Offer]:
        size = self._layout.block_tokens
        offers = {}
        for row, tokens in enumerate(rows):
            for block, (key, parent) in enumerate(self._chain(namespace, tokens).blocks()):
                begin, end = block * size, (block + 1) * size
                weights = b"" if shares is None else shares.of(row, begin, end)
                ids = tokens[begin:end].tobytes()
                header = BlockHeader(parent=parent, tokens=ids, position=begin, importance=weights)
                offers.setdefault(key, Offer(key, header, row, block))
        return list(offers.values())

    def _refuse(self, reason: str) -> StoreReport:
        self._tally.add("refused_stores")
        if reason not in self._refused:
            self._refused.add(reason)
            log.warning("transformers: KV was not stored: %s.", reason)
        return StoreReport(refused=reason)


def _serves(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` leaves the cache to us."""
    own = ("past_key_values", "inputs_embeds")
    return (
        all(kwargs.get(name) is None for name in own)
        and _option("use_cache", config, kwargs) is not False
        and _option("cache_implementation", config, kwargs) is None
    )


def _option(name: str, config: Any, kwargs: dict[str, Any]) -> Any:
    """An option of `generate`, wherever it is set."""
    return kwargs[name] if name in kwargs else getattr(config, name, None)


def _end(handles: list[Any], breaker: Breaker, link: Link, watched: Watch | None) -> None:
    for handle in handles:
        handle.remove()
    if watched is not None:
        watched.end()
    breaker.close()
    link.close()
