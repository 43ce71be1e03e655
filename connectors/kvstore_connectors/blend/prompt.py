"""A prompt made of chunks whose KV is cached, and that KV as it stands while it is repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvstore.errors import ConfigError
from kvstore_gpu import select

if TYPE_CHECKING:
    from torch import Tensor


SINKS = 2
"""Tokens at the beginning of a chunk that draw attention for want of others, if it was captured isolated."""


class Capture(Enum):
    """In which context the KV of a chunk was computed."""

    ISOLATED = "isolated"
    SYSTEM = "system"
    LIVE = "live"
    EXACT = "exact"
    """In the very context it stands in now, at the same positions: there is nothing to repair."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``stop`` of a prompt, taken from a cached chunk.

    Attributes
    ----------
    start, stop : int
        Half-open range of positions in the prompt.
    capture : Capture
        In which context the chunk was computed.
    external : Tensor, optional
        Attention mass ``[stop - start]`` that each token put on other chunks when it was captured (Cache-Craft's w_i).
    """

    start: int
    stop: int
    capture: Capture
    external: Tensor | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids and what of them is cached; what lies in no span and behind the exact prefix is computed always.

    Attributes
    ----------
    ids : Tensor
        Token ids ``[n]``, int64.
    spans : tuple of Span
        Cached chunks, in prompt order.
    exact : int
        Leading tokens whose KV is there and exact; they are read, never computed.

    Raises
    ------
    ConfigError
        If spans overlap, are empty, leave the prompt or reach into the exact prefix, or nothing is left to compute.
    """

    ids: Tensor
    spans: tuple[Span, ...]
    exact: int = 0

    def __post_init__(self) -> None:
        end = self.exact
        for span in self.spans:
            if not end <= span.start < span.stop <= len(self.ids):
                raise ConfigError(
                    f"span {span.start}..{span.stop} is empty, overlaps what is before it, or leaves the prompt",
                    "Name spans in prompt order, each a half-open range of token positions.",
                )
            if span.external is not None and span.external.shape != (span.stop - span.start,):
                raise ConfigError("external mass needs one value a token of its span", "Capture the chunk again.")
            end = span.stop
        if self.exact < 0 or end >= len(self.ids):
            raise ConfigError(
                f"{end} of {len(self.ids)} tokens are cached: the last one has to be computed",
                "Leave at least the last token of a prompt out of its spans.",
            )

    @cached_property
    def host_chunk_of(self) -> Tensor:
        """`chunk_of` in host memory: masks are made there, where they cost no launch and no wait for each span."""
        return self._painted(np.arange(len(self.spans)), -1)

    @cached_property
    def chunk_of(self) -> Tensor:
        """Index of the span that holds each position ``[n]``; -1 in none."""
        return brought(self.host_chunk_of, self.ids.device)

    @cached_property
    def host_repairable(self) -> Tensor:
        """`repairable` in host memory."""
        return self._painted(np.array([span.capture is not Capture.EXACT for span in self.spans], np.bool_), False)

    def _painted(self, spans: np.ndarray, outside: int) -> Tensor:
        """A value for each position ``[n]``: its span's, or that of no span."""
        edges = [0, *(edge for span in self.spans for edge in (span.start, span.stop)), len(self.ids)]
        values = np.full(len(edges) - 1, outside, spans.dtype)
        values[1::2] = spans
        return torch.from_numpy(values.repeat(np.diff(edges)))

    @cached_property
    def repairable(self) -> Tensor:
        """Mask ``[n]`` of the cached tokens whose KV may differ from what full prefill computes."""
        return brought(self.host_repairable, self.ids.device)

    @cached_property
    def false_sinks(self) -> Tensor:
        """Positions, in host memory, of tokens that drew attention because next to nothing stood before them, where now
        something does."""
        isolated = [span for span in self.spans if span.capture is Capture.ISOLATED and span.start]
        places = [place for span in isolated for place in range(span.start, min(span.start + SINKS, span.stop))]
        return torch.tensor(places, dtype=torch.int64)

    @cached_property
    def missing(self) -> Tensor:
        """Sorted positions of the tokens without any KV."""
        absent = self.host_chunk_of < 0
        absent[: self.exact] = False
        return brought(absent.nonzero()[:, 0], self.ids.device)

    @cached_property
    def question(self) -> Tensor:
        """Positions behind the last span: what is asked about the chunks."""
        start = self.spans[-1].stop if self.spans else self.exact
        return torch.arange(start, len(self.ids), device=self.ids.device)

    @cached_property
    def reused(self) -> int:
        """Number of tokens in spans; shares of recomputation are shares of this."""
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class LayerKV:
    """Keys, turned for the positions of this prompt, and values of one layer: ``[n, kv_heads, dim]`` each."""

    keys: Tensor
    values: Tensor


Cache = Sequence[LayerKV]
"""All layers of a prompt; rows of repaired tokens are written in place."""


def brought(made: Tensor, device: torch.device) -> Tensor:
    """A small tensor made in host memory, on a device: from pinned memory, since any other waits for the device."""
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def fetched(value: Tensor) -> Callable[[], Tensor]:
    """A tensor, on its way to the host: the call waits for it, and for nothing that was asked for meanwhile."""
    if value.device.type != "cuda":
        return lambda: value
    here = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    here.copy_(value, non_blocking=True)
    came = torch.cuda.Event()
    came.record(torch.cuda.current_stream(value.device))

    def wait() -> Tensor:
        came.synchronize()
        return here

    return wait


def top(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores above minus infinity, sorted; among equals the lower position wins.

    The order is the same on every device and every tensor parallel rank that holds the same scores.
    """
    chosen = select.top(scores.float().contiguous(), min(max(0, count), len(scores))).long()
    return chosen[scores[chosen] > -torch.inf]
