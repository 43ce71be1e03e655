"""The connector's side in a vLLM worker: the page layout, the links to the daemon, and who copies when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from kvstore.errors import ConfigError
from kvstore.rope import rotary
from kvstore.types import Namespace
from kvstore_connectors.base import Breaker, Link, Tally, report_defect
from kvstore_connectors.blend.rope import movable
from kvstore_connectors.vllm.ahead import Ahead
from kvstore_connectors.vllm.blend_gate import Gate
from kvstore_connectors.vllm.blend_jobs import BlendJob
from kvstore_connectors.vllm.blend_model import EngineModel, find_model
from kvstore_connectors.vllm.blend_rows import Rows
from kvstore_connectors.vllm.blend_worker import Blender
from kvstore_connectors.vllm.code import Codes
from kvstore_connectors.vllm.device_pages import DevicePages
from kvstore_connectors.vllm.identity import Scope, rank_namespace, request_namespace
from kvstore_connectors.vllm.jobs import ConnectorMeta, Handshake, LoadJob, Report, SaveBlock
from kvstore_connectors.vllm.layout import CANONICAL, PageViews, WriteOp, layer_cache, learn, write_op
from kvstore_connectors.vllm.loader import Loader
from kvstore_connectors.vllm.pages import HostPages, Pages
from kvstore_connectors.vllm.saver import Saver
from kvstore_connectors.vllm.transfers import Fill, Transfers
from kvstore_gpu.shared import importer

IDLE_WAIT_S = 0.001
"""Pause of a step that has nothing but running loads; without it the engine's loop would spin."""

START_WAIT_S = 1.0
"""Time that the start of an engine waits for the daemon."""

LOAD_TIMEOUT_S = 0.1
"""Time the daemon has for an answer while loading, beyond the wait it was asked for."""


class WorkerSide:
    """Loads and stores for one rank.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
    spec : vllm.v1.kv_cache_interface.AttentionSpec
        Of the one group of layers.
    num_blocks : int
        Blocks in the engine's cache.
    block_tokens : int
    open_client : callable
        Makes a client, given the purpose, its time limit in seconds and how it reaches the daemon's GPU memory.
    config : ConnectorConfig
    """

    def __init__(
        self, vllm_config: Any, spec: Any, num_blocks: int, block_tokens: int, open_client: Any, config: Any
    ) -> None:
        self._vllm_config = vllm_config
        self._spec = spec
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._config = config
        self._open_client = open_client
        self.tally = Tally()
        self._breaker = Breaker("kvstore worker", self.tally)
        self._load_link = Link(lambda: open_client("load", LOAD_TIMEOUT_S, self._importer()), self._breaker, self.tally)
        self._save_link = Link(lambda: open_client("save", config.save_deadline_ms / 1e3), self._breaker, self.tally)
        self._pages: Pages | None = None
        self._transfers: Transfers | None = None
        self._namespace: Namespace | None = None
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._ahead: Ahead | None = None
        self._ahead_link: Link | None = None
        self._failed: set[int] = set()
        self._report = Report()
        self._blender: Blender | None = None

    # -- start ---------------------------------------------------------------------------------------------------------

    def register(self, caches: dict[str, Any], rank: tuple[int, int]) -> None:
        """Learn where KV lies and connect.

        Raises
        ------
        ConfigError
            If this cache can not be stored.
        """
        self._end_threads()  # of an earlier cache, should the engine have made a new one
        layers, page_tokens = self._learn(caches)
        pages = _pages(layers, self._block_tokens, self._spec.block_size, page_tokens)
        attention = "mla" if type(self._spec).__name__.startswith("MLA") else "full"
        self._namespace = rank_namespace(
            self._vllm_config,
            layout=pages.layout,
            dtype=str(pages.dtype).removeprefix("torch."),
            layers=len(layers),
            kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_size,
            block_tokens=self._block_tokens,
            attention=attention,
            rank=rank,
            tenant=self._config.tenant,
            weights=self._config.weights_digest,
            fidelity=self._config.fidelity,
        )
        if self._config.chain or (self._config.fidelity != "exact" and pages.layout == CANONICAL):
            rotation = rotary(self._vllm_config.model_config.hf_text_config.to_dict())
            pages.use(Codes(self._namespace, rotation, self._config.chain))
        self._pages = pages
        transfers = Transfers(pages, self._namespace, self.tally, self._config.load_deadline_ms / 1e3)
        self._transfers = transfers
        self._blender = self._make_blender(layers, caches, pages, page_tokens)
        if self._config.async_load:
            self._loader = Loader(lambda job, after, stop: transfers.load(self._load_link, job, after, stop))
        if isinstance(pages, DevicePages):
            self._saver = Saver(pages, self._store, self.tally)
            self._ahead_link = Link(lambda: self._open_client("ahead", LOAD_TIMEOUT_S), self._breaker, self.tally)
        self._breaker.start(START_WAIT_S)
        if self._blender is not None and self._config.blend_gate:
            self._blender.report(self._load_link)

    def _importer(self) -> Any:
        """How loads reach the daemon's memory of this rank's GPU; None where the cache lies elsewhere."""
        return importer(self._pages.device) if isinstance(self._pages, DevicePages) else None

    def _make_blender(
        self, layers: list[PageViews], caches: dict[str, Any], pages: Pages, page_tokens: int
    ) -> Blender | None:
        """What blends and captures, where pages are of a known order; with the model if the gate may let it blend."""
        if pages.layout != CANONICAL or self._namespace is None:
            if self._config.blend_gate:
                raise ConfigError("blend_gate: the order of tokens in this backend's pages is not known.", _REMEDY)
            return None
        deadline_s = self._config.load_deadline_ms / 1e3
        if not self._config.blend_gate:
            rows = Rows(layers, [], pages, page_tokens)
            return Blender(rows, self._namespace, self.tally, deadline_s)
        if self._namespace.pp_size > 1:
            raise ConfigError("blend_gate: pipelines of several ranks are not blended.", _REMEDY)
        config = self._vllm_config.model_config.hf_text_config.to_dict()
        rows = Rows(layers, self._writes(caches), pages, page_tokens)
        model = EngineModel(find_model(), movable(config))
        if model.layers != len(layers):
            raise ConfigError(f"blend_gate: {len(layers)} layers keep KV, {model.layers} are the model's.", _REMEDY)
        gate = Gate(self._config.blend_gate)
        return Blender(rows, self._namespace, self.tally, deadline_s, model, gate)

    def _writes(self, caches: dict[str, Any]) -> list[tuple[WriteOp, torch.Tensor]]:
        """Each layer's own write operation and its cache, in the order of `_learn`."""
        context = self._vllm_config.compilation_config.static_forward_context
        out: list[tuple[WriteOp, torch.Tensor]] = []
        seen: set[tuple[int, Any]] = set()
        for name, registered in caches.items():
            layer = context.get(name)
            cache, write = layer_cache(layer, registered), write_op(layer)
            if write is not None and (cache.data_ptr(), cache.stride()) not in seen:
                seen.add((cache.data_ptr(), cache.stride()))
                out.append((write, cache))
        return out

    def _learn(self, caches: dict[str, Any]) -> tuple[list[PageViews], int]:
        context = self._vllm_config.compilation_config.static_forward_context
        producer = f"{_version()}/{self._spec.dtype}"
        layers: list[PageViews] = []
        seen: set[tuple[int, Any]] = set()
        page_tokens = self._spec.block_size
        for name, registered in caches.items():
            if not isinstance(registered, torch.Tensor):
                raise ConfigError(f"vllm: layer {name} keeps a cache that is not one tensor.", _REMEDY)
            layer = context.get(name)
            cache = layer_cache(layer, registered)
            if (cache.data_ptr(), cache.stride()) in seen:
                continue  # layers that share their KV with an earlier one
            seen.add((cache.data_ptr(), cache.stride()))
            if cache.shape[0] % self._num_blocks:
                raise ConfigError(
                    f"vllm: the cache of layer {name} has an unknown shape {tuple(cache.shape)}.", _REMEDY
                )
            page_tokens = self._spec.block_size * self._num_blocks // cache.shape[0]
            kind = type(getattr(layer, "impl", None)).__qualname__
            views = learn(cache, write_op(layer), self._spec.num_kv_heads, self._spec.head_size, f"{producer}/{kind}")
            layers.append(views)
        if not layers:
            raise ConfigError("vllm: this rank keeps no KV.", _REMEDY)
        return layers, page_tokens

    def handshake(self) -> Handshake | None:
        """This rank's namespace, for the scheduler. Asked for when the engine has warmed up."""
        if self._namespace is None or self._pages is None:
            return None
        self._pin_ahead()
        return Handshake(self._namespace, self._pages.stored_nbytes(self._block_tokens))

    # -- each step -----------------------------------------------------------------------------------------------------

    def begin(self, meta: ConnectorMeta) -> None:
        """A step begins, and nothing of it has been given to the device: see to blocks that are still being stored."""
        if self._saver is not None:
            self._saver.guard(meta.fresh)
        self._pin_ahead()

    def _pin_ahead(self) -> None:
        """Pin the daemon's memory in the background, once the engine has captured its CUDA graphs.

        While a graph is captured no thread may register memory: the capture fails, and the engine with it.
        """
        if self._ahead is None and self._ahead_link is not None and isinstance(self._pages, DevicePages):
            self._ahead = Ahead(self._ahead_link, self._pages.device)

    def start_loads(self, meta: ConnectorMeta) -> None:
        """Hand the step's loads to the loader, or do them at once."""
        for job in meta.loads:
            self._start_load(job)
        for blend in meta.blends:
            self._blend(blend)
        if meta.blends or any(not job.is_async for job in meta.loads):
            self._report.steps[meta.step] = self._report.steps.get(meta.step, 0) + 1

    def _start_load(self, job: LoadJob) -> None:
        try:
            if self._pages is None or self._transfers is None:
                raise RuntimeError("a load was asked for before the caches were registered")
            job.begun = time.monotonic()
            after = self._pages.mark()
            if self._loader is not None and job.is_async:
                self._loader.submit(job, after)
                return
            self._failed |= self._transfers.load(self._load_link, job, after)
        except Exception:  # whatever happened, the engine recomputes
            report_defect("starting a load")
            self._failed |= set(job.engine_ids)

    def _blend(self, job: BlendJob) -> None:
        """Put a prompt together from chunks, after the step's loads and before its forward pass."""
        try:
            transfers, blender = self._transfers, self._blender
            if transfers is None or blender is None:
                raise RuntimeError("a prompt was to be blended before the caches were registered")
            after = self._pages.mark() if self._pages is not None else None
            load = lambda exact: transfers.load(self._load_link, exact, after)  # noqa: E731
            self._failed |= blender.blend(self._load_link, job, load)
        except Exception:  # whatever happened, the engine computes
            report_defect("blending")
            self.tally.add("blend_failures")
            self._failed |= set(job.table[job.begin // self._spec.block_size :])

    def save(self, meta: ConnectorMeta) -> None:
        """Store the step's full blocks. On the CPU they are copied before this returns; on a device, later."""
        begun = time.monotonic()
        self._save(meta)
        self._capture(meta)
        if meta.timed:
            self._report.timed[meta.step] = time.monotonic() - begun

    def _save(self, meta: ConnectorMeta) -> None:
        if not meta.saves or self._transfers is None:
            return
        if not self._breaker.allow():
            blocks = sum(len(job.blocks) for job in meta.saves)
            self.tally.add("skipped_save")
            self.tally.add("save_unreachable", blocks)
        elif self._saver is not None:
            self._saver.submit(meta.saves)
        else:
            self._transfers.save(self._save_link, meta.saves)

    def _capture(self, meta: ConnectorMeta) -> None:
        if self._blender is not None and self._breaker.allow():
            for job in meta.captures:
                try:
                    self._blender.capture(self._save_link, job)
                except Exception:
                    report_defect("capturing a chunk")

    def _store(self, scope: Scope, blocks: Sequence[SaveBlock], fill: Fill) -> None:
        if self._transfers is not None and self._namespace is not None:
            self._transfers.store(self._save_link, request_namespace(self._namespace, scope), blocks, fill)

    def take_finished(self, meta: ConnectorMeta | None) -> set[str]:
        """Requests whose asynchronous loads have ended."""
        if self._blender is not None:
            blended_s = self._blender.settle()
            if blended_s and meta is not None and meta.timed:
                self._report.blended[meta.step] = blended_s
        if self._loader is None:
            return set()
        wait_s = IDLE_WAIT_S if meta is not None and meta.idle else 0.0
        finished, failed = self._loader.take(wait_s)
        self._failed |= failed
        return finished

    def take_failed(self) -> set[int]:
        """Engine blocks that were promised and could not be loaded."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> Report | None:
        """Which steps' synchronous loads are through, and which timed steps have ended."""
        if not self._report.steps and not self._report.timed:
            return None
        report, self._report = self._report, Report()
        return report

    def close(self) -> None:
        """End threads and connections."""
        self._breaker.close()
        self._end_threads()
        self._load_link.close()
        self._save_link.close()

    def _end_threads(self) -> None:
        for thread in (self._loader, self._saver, self._ahead):
            if thread is not None:
                thread.close()
        self._loader = self._saver = self._ahead = None
        self._ahead_link = None


_REMEDY = "Run this model without the connector."


def _pages(layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int) -> Pages:
    """The implementation for the device that the cache lies on."""
    device = layers[0].sides[0].device
    if device.type == "cpu":
        return HostPages(layers, block_tokens, engine_block, page_tokens)
    if device.type == "cuda":
        return DevicePages(layers, block_tokens, engine_block, page_tokens)
    raise ConfigError(f"vllm: a cache on {device.type!r} is not supported.", "Supported are cpu and cuda.")


def _version() -> str:
    import vllm

    return f"vllm-{vllm.__version__}"
