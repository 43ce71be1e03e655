"""Chunks of one model that are computed and stored, each behind the system prompt or as it stands in a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvstore.client import chunk_parts
from kvstore.errors import InvalidParams, StorageError, Unavailable
from kvstore.keys import content_key
from kvstore_connectors.blend.influence import Influences
from kvstore_connectors.blend.prompt import LayerKV
from kvstore_connectors.blend.recompute import prefill
from kvstore_connectors.build import PACK_TOKENS, Builder, Progress, store_chunk
from kvstore_connectors.transformers.cache import KVStoreCache
from kvstore_connectors.transformers.history import autocast
from kvstore_connectors.transformers.opened import OpenedModel
from kvstore_connectors.transformers.support import token_rows

if TYPE_CHECKING:
    from kvstore.types import Namespace

T = TypeVar("T")


class ChunkStore:
    """Computes chunks and stores them.

    Parameters
    ----------
    kv : KVStoreCache
        The model's connector.
    system : ids, optional
        Token ids that stand in front of every prompt. Chunks that `store` computes have seen them.
    labels : sequence of str
        Rights that are needed to read what is stored here, and that whoever loads here has.
    salt : str, optional
        In place of the connector's own.

    Raises
    ------
    ConfigError
        If chunks of this model can not be moved, or it is of a kind that can not be opened.
    """

    def __init__(
        self, kv: KVStoreCache, *, system: Any = (), labels: Sequence[str] = (), salt: str | None = None
    ) -> None:
        self._kv = kv
        self._opened = OpenedModel(kv.model, kv.decoder)
        self._system: list[int] = token_rows(system)[0].tolist() if len(system) else []
        self._labels = list(labels)
        self._salt = salt

    def store(
        self,
        chunks: Sequence[Any],
        *,
        pack_tokens: int = PACK_TOKENS,
        told: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """Compute chunks behind the system prompt, many in one pass, and store them; what is stored is passed over.

        Parameters
        ----------
        chunks : sequence of ids
            Token ids of each.
        pack_tokens : int
            Tokens in one forward pass, at most.
        told : callable
            Called after each pass.

        Raises
        ------
        Unavailable
            If the daemon can not be reached.
        StorageError
            If it has no room.
        InvalidParams
            If a chunk is empty or too long.
        """
        ids = [token_rows(chunk)[0].tolist() for chunk in chunks]
        namespace = self._exact_namespace()

        def build(client: Any) -> Progress:
            device = str(self._kv.model.device)
            builder = Builder(
                self._opened, [namespace], client, system=self._system, labels=self._labels, device=device
            )
            progress = Progress(0, len(ids), 0, 0, 0.0)
            for progress in builder.build(ids, pack_tokens):
                told(progress)
            return progress

        return self._must("store", build)

    @torch.no_grad()
    def capture(self, input_ids: Any, spans: Sequence[tuple[int, int]]) -> None:
        """Compute a prompt exactly and store spans of it as chunks, each with how those before it shaped it.

        Cache-Craft's statistics: by them the daemon offers the variant that fits a prompt best, and the selector
        ``external`` chooses tokens.

        Parameters
        ----------
        input_ids : ids
            One prompt.
        spans : sequence of (int, int)
            Half-open ranges, in order; what is before the first is the system prompt.

        Raises
        ------
        Unavailable, StorageError, InvalidParams
            As `store`; also for spans that overlap or leave the prompt.
        """
        row = self._one(input_ids)
        check_spans(spans, len(row))
        if not spans:
            return
        namespace = self._exact_namespace()
        ids = torch.as_tensor(row, dtype=torch.int64, device=self._kv.model.device)[: spans[-1][1]]
        measured = Influences(self._opened, spans)
        _, cache = prefill(self._opened, ids, watch=measured)

        def put(client: Any) -> None:
            for place, one in enumerate(measured.chunks):
                start, stop = one.span
                parts = chunk_parts(
                    namespace,
                    row[start:stop],
                    before=row[:start],
                    lineage=[content_key(namespace, row[a:b]) for a, b in one.before],
                    inter=one.inter.tolist(),
                    cci=one.cci if place else 0.0,
                    external=one.external.numpy() if place else None,
                    labels=self._labels,
                )
                own = [LayerKV(held.keys[start:stop], held.values[start:stop]) for held in cache]
                store_chunk(client, namespace, parts, own)

        self._must("store", put)

    def _one(self, input_ids: Any) -> Any:
        rows = token_rows(input_ids)
        if len(rows) != 1:
            raise InvalidParams(f"input_ids: a batch of {len(rows)}; chunks are put together for one prompt.", "")
        return rows[0]

    def _exact_namespace(self) -> Namespace:
        """Identity of the model as it is now, if what it computes now is worth storing."""
        namespace = self._kv.namespace_now(self._salt)
        if namespace is None or self._unsteady():
            raise InvalidParams(
                "chunks: the model has no identity, is in training mode, or under autocast.", "Call model.eval()."
            )
        return namespace

    def _unsteady(self) -> bool:
        """Whether what the model computes now depends on more than its weights."""
        return self._kv.model.training or autocast(self._kv.model.device)

    def _must(self, operation: str, work: Callable[[Any], T]) -> T:
        """Work with the daemon that was asked for by itself: what goes wrong is raised."""
        errors: list[Exception] = []

        def run(client: Any) -> list[T]:
            try:
                return [work(client)]
            except (InvalidParams, StorageError) as error:
                errors.append(error)
                return []

        done = self._kv.link.run(operation, run)
        if errors:
            raise errors[0]
        if not done:
            raise Unavailable("chunks: the daemon did not answer, so nothing was stored.", "Start it: kvstore serve.")
        return done[0]


def check_spans(spans: Sequence[tuple[int, int]], tokens: int) -> None:
    """Refuse spans that are no ranges of so many tokens, in order."""
    end = 0
    for start, stop in spans:
        if not end <= start < stop <= tokens:
            raise InvalidParams(
                f"spans: {start}..{stop} is empty, overlaps what is before it, or leaves the prompt.",
                "Name half-open ranges of token positions, in order.",
            )
        end = stop
