"""The cache that `generate()` gets: a `DynamicCache` that knows which tokens it holds and where they came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from kvstore.errors import InvalidParams
from kvstore.types import Namespace
from kvstore_connectors.transformers.history import History, Witness, hides_tokens
from kvstore_connectors.transformers.importance import Shares
from kvstore_connectors.transformers.layout import LayerKV
from kvstore_connectors.transformers.support import Rows

if TYPE_CHECKING:
    from kvstore_connectors.transformers.cache import KVStoreCache


class StoreReport(NamedTuple):
    """What became of the full blocks of a cache.

    Attributes
    ----------
    stored, existed, dropped : int
        Blocks that are stored now, were stored before, and are not stored.
    refused : str
        Why nothing was offered: the cache was changed, or made in a way that its tokens do not tell of. Else empty.
    """

    stored: int = 0
    existed: int = 0
    dropped: int = 0
    refused: str = ""


class PrefixCache(DynamicCache):
    """KV of a prompt and of what was generated behind it.

    Made by `KVStoreCache.load`. Used as a context manager it stores its full blocks at the end, unless there was an
    exception; `store` does the same at any time. It can be cropped, reordered, repeated and copied as any cache, and
    still knows its tokens then. A cache whose tensors were changed in another way is not stored.

    Attributes
    ----------
    namespace : Namespace or None
        Where its blocks belong; None if nothing is loaded or stored.
    mark : object
        The model's state when it was made; only for that state the namespace is right.
    prompt_tokens, loaded_tokens : int
        Tokens of the prompt, and how many of them came out of the store.
    shares : Shares or None
        Attention that its tokens got, if the keeper measures that.
    """

    def __init__(
        self,
        keeper: KVStoreCache,
        config: Any,
        namespace: Namespace | None,
        mark: object,
        prompt: Rows,
        shares: Shares | None = None,
    ) -> None:
        super().__init__(config=config)
        self.namespace = namespace
        self.mark = mark
        self.prompt_tokens = prompt.shape[1]
        self.loaded_tokens = 0
        self.shares = shares
        self._keeper = keeper
        self._config = config
        self._prompt = prompt
        self._history = History(prompt[:, :0])
        self._witness = Witness()
        self._unused = True
        self._tainted = ""

    def store(self) -> StoreReport:
        """Store the full blocks that are not stored yet. Never raises."""
        return StoreReport(refused=self._tainted) if self._tainted else self._keeper.store(self)

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.store()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        """A copy that goes on independently; both may be stored."""
        twin = PrefixCache(self._keeper, self._config, self.namespace, self.mark, self._prompt)
        twin.shares = None if self.shares is None else self.shares.copy()
        twin.layers = copy.deepcopy(self.layers, memo)
        twin.loaded_tokens, twin._unused, twin._tainted = self.loaded_tokens, self._unused, self._tainted
        self._check_untouched()
        twin._history = self._history.copy()
        twin._witness = Witness(twin.layers)
        return twin

    # -- for the keeper ------------------------------------------------------------------------------------------------

    @property
    def keeper(self) -> KVStoreCache:
        """Who made it."""
        return self._keeper

    def fill(self, kv: Sequence[LayerKV], tokens: int) -> None:
        """Begin with the first tokens of the prompt.

        Parameters
        ----------
        kv : sequence of (Tensor, Tensor)
            For each layer, each [batch, kv_head, at least `tokens`, dim].
        tokens : int
        """
        for layer, (keys, values) in zip(self.layers, kv, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[:, :, :tokens], values[:, :, :tokens]
        self.loaded_tokens = tokens
        self._history = History(self._prompt[:, :tokens])
        self._witness = Witness(self.layers)

    def taint(self, reason: str) -> None:
        """Nothing of this cache is stored from now on, nor of its copies: its KV is not what its tokens alone make."""
        self._tainted = reason
        self.namespace = None

    def before_forward(self, inputs: Mapping[str, Any], training: bool) -> None:
        """The model is about to run with this cache.

        Raises
        ------
        InvalidParams
            If KV was loaded that does not belong to these inputs: going on would give a wrong answer.
        """
        if self._unused and self.loaded_tokens:
            self._fit(inputs)
        self._unused = False
        self._check_untouched()
        self._history.begin(inputs, self.get_seq_length(), training)

    def after_forward(self) -> None:
        """The model has run with this cache."""
        self._history.end(self.get_seq_length())
        self._witness = Witness(self.layers)

    def content(self) -> tuple[Rows, str]:
        """Token ids of all positions, [batch, token], and why they can not be trusted, if they can not."""
        self._check_untouched()
        rows = self._history.settle()
        if not self._history.broken and rows.shape[1] != self.get_seq_length():
            self._history.spoil(f"the cache holds {self.get_seq_length()} tokens where {rows.shape[1]} were seen")
        return rows, self._history.broken

    def pairs(self) -> list[LayerKV]:
        """Keys and values of the layers, each [batch, kv_head, token, dim]; of those that hold any."""
        return [(layer.keys.detach(), layer.values.detach()) for layer in self.layers if layer.is_initialized]

    def _check_untouched(self) -> None:
        if not self._witness.agrees(self.layers):
            self._history.spoil("the cache was changed by other means than its own methods and the model")

    # -- the first forward pass ----------------------------------------------------------------------------------------

    def _fit(self, inputs: Mapping[str, Any]) -> None:
        """See to it that what was loaded is the beginning of what the model is given."""
        remedy = "Give generate() the same input_ids and attention_mask as load()."
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if not self._keeper.same_model(self):
            raise InvalidParams("model: its weights or adapters are not those that KV was loaded for.", "Load again.")
        if hides_tokens(mask := inputs.get("attention_mask")) and getattr(mask, "ndim", 0) == 2:
            raise InvalidParams("attention_mask: it hides tokens of a prompt that was loaded.", remedy)
        if not isinstance(ids, torch.Tensor):
            raise InvalidParams("inputs_embeds: this cache was loaded for token ids.", remedy)
        if ids.shape[0] != self._prompt.shape[0]:
            raise InvalidParams(
                f"input_ids: a batch of {ids.shape[0]} for a cache that was loaded for {self._prompt.shape[0]}.",
                "For beams or several sequences use KVStoreCache.generate(), or load(..., copies=n).",
            )
        given = ids.detach().cpu().numpy()
        first = self.get_seq_length() if positions is None else int(positions.reshape(-1)[0])
        if first == 0 and _begins(self._prompt, given):
            self.reset()  # assisted decoding and prefill in chunks begin at the beginning, whatever the cache holds
        elif first != self.get_seq_length() or not _begins(self._prompt[:, first:], given):
            raise InvalidParams("input_ids: this cache was loaded for another prompt.", remedy)

    # -- what a cache can do -------------------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change that keeps it known which tokens the cache holds."""
        self._check_untouched()
        yield
        self._witness = Witness(self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens away from the end."""
        with self._change():
            super().crop(tokens_to_remove)
            self._history.crop(self.get_seq_length())
            if self.shares is not None:
                self.shares.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the prompts of the batch into another order."""
        with self._change():
            super().reorder_cache(beam_idx)
            self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some prompts of the batch."""
        with self._change():
            super().batch_select_indices(indices)
            self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each prompt of the batch."""
        with self._change():
            super().batch_repeat_interleave(repeats)
            self._select(np.repeat(np.arange(len(self._prompt)), repeats))

    def _select(self, indices: Any) -> None:
        chosen = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
        self._history.select(chosen)
        if self.shares is not None:
            self.shares.select(chosen)
        self._prompt = self._prompt[chosen]

    def reset(self) -> None:
        """Begin anew, with an empty cache."""
        super().reset()
        self.loaded_tokens = 0
        self.shares = None if self.shares is None else Shares()
        self._history = History(self._prompt[:, :0])
        self._witness = Witness(self.layers)


def _begins(expected: Rows, given: Rows) -> bool:
    """Whether two batches of token ids agree as far as both reach, and have anything in common."""
    count = min(expected.shape[1], given.shape[1])
    return count > 0 and bool((expected[:, :count] == given[:, :count]).all())
