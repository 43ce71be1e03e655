"""Compute the KV of documents ahead of time, behind the system prompt they will be used with, and store it as chunks.

>>> with KVStoreClient() as client:                                                         # doctest: +SKIP
...     builder = Builder(model, engine_namespaces(client, "SmolLM2")[0], client, system=system_ids)
...     for progress in builder.build(documents):
...         print(f"{progress.done} of {progress.total}")

What is stored already is passed over, so a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from kvstore.client import ChunkPart, KVStoreClient, Room, chunk_parts
from kvstore.errors import ConfigError, StorageError
from kvstore.keys import namespace_digest
from kvstore.types import Exists, Namespace, Stored, TierCode
from kvstore_connectors.blend.model import Model
from kvstore_connectors.blend.prompt import LayerKV
from kvstore_connectors.build_model import as_ids
from kvstore_connectors.build_pack import pack, packs

CANONICAL = "lkthd1"
"""[layer][K|V][token][kv_head][dim], keys after RoPE: the layout in which chunks are stored."""

PACK_TOKENS = 2048
"""Tokens computed in one forward pass."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Progress(NamedTuple):
    """How far a build is.

    Attributes
    ----------
    done, total : int
        Chunks.
    computed : int
        Tokens computed so far.
    skipped : int
        Chunks that were there already.
    seconds : float
        Since the build began.
    """

    done: int
    total: int
    computed: int
    skipped: int
    seconds: float


def engine_namespaces(client: KVStoreClient, model: str, revision: str = "") -> list[Namespace]:
    """The namespaces of an engine that runs a model and has used this daemon, one for each tensor parallel rank.

    Raises
    ------
    ConfigError
        If there is none, if engines differ, or if ranks are missing.
    """
    names = set(Namespace.__struct_fields__)
    known: list[Namespace] = []
    for record in client.stats()["namespaces"]:
        fields = {name: value for name, value in record.items() if name in names}
        if fields.get("model") == model and fields.get("layout") == CANONICAL and "salt" not in fields:
            namespace = msgspec.convert(fields, Namespace)
            if namespace_digest(namespace).hex() == record["digest"] and namespace.revision.startswith(revision):
                known.append(namespace)
    remedy = "Start the engine with kvstore's connector and send it one request; it then introduces itself."
    if not known:
        raise ConfigError(f"build: no engine that runs {model} has used this daemon.", remedy)
    kinds = {msgspec.structs.replace(namespace, tp_rank=0) for namespace in known}
    if len(kinds) > 1:
        raise ConfigError(f"build: {len(kinds)} different engines that run {model} have used this daemon.", remedy)
    if len(known) != known[0].tp_size or known[0].pp_size > 1:
        raise ConfigError(f"build: {len(known)} of {known[0].tp_size} tensor parallel ranks are known.", remedy)
    return sorted(known, key=lambda namespace: namespace.tp_rank)


class Builder:
    """Computes and stores chunks behind one system prompt.

    Parameters
    ----------
    model : Model
        All heads, on one device.
    namespaces : sequence of Namespace
        Of the engine's ranks, in order; each gets its share of the heads.
    client : KVStoreClient
    system : sequence of int
        Token ids that will stand in front of every prompt; may be empty.
    labels : sequence of str
        Rights needed to read the system prompt.
    device : str
        Where the model is.
    """

    def __init__(
        self,
        model: Model,
        namespaces: Sequence[Namespace],
        client: KVStoreClient,
        *,
        system: Sequence[int] = (),
        labels: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        self._model = model
        self._namespaces = list(namespaces)
        self._client = client
        self._system = list(system)
        self._labels = list(labels)
        self._device = device
        first = self._namespaces[0]
        if first.dtype not in _DTYPES or first.layers != model.layers:
            raise ConfigError(f"build: an engine with KV of {first.layers} layers in {first.dtype} does not fit.", "")
        self._dtype = _DTYPES[first.dtype]
        self._prefix: list[LayerKV] | None = None

    def build(self, chunks: Sequence[Sequence[int]], pack_tokens: int = PACK_TOKENS) -> Iterator[Progress]:
        """Store what is not stored yet; yields after each forward pass.

        Parameters
        ----------
        chunks : sequence of sequences of int
            Token ids; each one chunk.
        pack_tokens : int
            Tokens in one forward pass, at most.

        Raises
        ------
        StorageError
            If the daemon has no room.
        """
        begun = time.monotonic()
        todo = self._absent(chunks)
        computed, skipped = 0, len(chunks) - len(todo)
        yield Progress(skipped, len(chunks), 0, skipped, time.monotonic() - begun)
        done = skipped
        for group in packs([len(chunks[index]) for index in todo], pack_tokens):
            wanted = [chunks[todo[place]] for place in group]
            for chunk, kv in zip(wanted, self.compute(wanted), strict=True):
                self._store(chunk, kv)
                computed += len(chunk)
            done += len(group)
            yield Progress(done, len(chunks), computed, skipped, time.monotonic() - begun)

    @torch.inference_mode()
    def compute(self, chunks: Sequence[Sequence[int]]) -> list[list[LayerKV]]:
        """KV of chunks behind the system prompt, in one forward pass."""
        if self._prefix is None:
            self._prefix = pack(self._model, [self.ids(self._system)])[1] if self._system else []
        return pack(self._model, [self.ids(chunk) for chunk in chunks], self._prefix)[0]

    def ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids where the model is."""
        return as_ids(list(tokens), self._device)

    def _parts(self, namespace: Namespace, chunk: Sequence[int]) -> list[ChunkPart]:
        return chunk_parts(namespace, chunk, before=self._system, labels=self._labels)

    def _absent(self, chunks: Sequence[Sequence[int]]) -> list[int]:
        """Which chunks are to be computed: each once, and none that every rank has."""
        absent: list[int] = []
        seen: set[bytes] = set()
        for index, chunk in enumerate(chunks):
            whole = True
            for namespace in self._namespaces:
                keys = [part.key for part in self._parts(namespace, chunk)]
                if keys[-1] in seen:
                    break
                seen.add(keys[-1])
                whole &= TierCode.ABSENT not in self._client.lookup(keys, prefix=False, namespace=namespace)
            if not whole:
                absent.append(index)
        return absent

    def _store(self, chunk: Sequence[int], kv: list[LayerKV]) -> None:
        heads = int(kv[0].keys.shape[1]) // len(self._namespaces)
        for rank, namespace in enumerate(self._namespaces):
            mine = slice(rank * heads, (rank + 1) * heads)
            share = [LayerKV(one.keys[:, mine].to(self._dtype), one.values[:, mine].to(self._dtype)) for one in kv]
            store_chunk(self._client, namespace, self._parts(namespace, chunk), share)


def store_chunk(client: KVStoreClient, namespace: Namespace, parts: Sequence[ChunkPart], kv: Sequence[LayerKV]) -> None:
    """Store a chunk's blocks, those that are not there yet.

    Parameters
    ----------
    parts : sequence of ChunkPart
        As `chunk_parts` gives them.
    kv : sequence of LayerKV
        Of the chunk's tokens, in the namespace's dtype.

    Raises
    ------
    StorageError
        If the daemon has no room.
    """
    stacked = torch.stack([torch.stack([one.keys, one.values]) for one in kv]).cpu()
    token_bytes = stacked[:, :, 0].nbytes
    offers = [(part.key, (part.stop - part.start) * token_bytes, part.header) for part in parts]
    with client.reserve(offers, namespace=namespace, wait_s=5.0) as reservation:
        rooms = [room for room in reservation.blocks if isinstance(room, Room)]
        for room in rooms:
            part = parts[room.index]
            room.write(_as_bytes(stacked[:, :, part.start : part.stop]))
        outcomes: list[Any] = reservation.commit([room.index for room in rooms])
    refused = [one for one in [*reservation.blocks, *outcomes] if not isinstance(one, Room | Stored | Exists)]
    if refused:
        raise StorageError(f"build: a chunk was not stored ({refused[0]}).", "Give the daemon more memory.")


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
