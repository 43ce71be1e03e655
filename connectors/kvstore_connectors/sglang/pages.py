"""Pages of SGLang's host pool as NumPy views: what is stored is read from them, what is loaded is written into them.

A page's bytes are stored in the order in which the host pool keeps them, which is also the order of SGLang's own flat
pages. So both of SGLang's interfaces store the same bytes, and the layout is part of the namespace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError, InvalidParams

Bytes = NDArray[np.uint8]

_WITHOUT = "Run this model without --hicache-storage-backend, or with one of SGLang's own."
_DTYPES = ("float16", "bfloat16", "float32", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")

_TOKEN_AXIS = {
    ("mha", "layer_first"): 2,
    ("mha", "page_first"): 1,
    ("mla", "layer_first"): 1,
    ("mla", "page_first"): 0,
}
"""Axis of the buffer that counts tokens, for layouts that have one."""

_PAGE_AXIS = {
    ("mha", "page_first_direct"): 1,
    ("mha", "page_head"): 1,
    ("mha", "page_unified"): 0,
    ("mla", "page_first_direct"): 0,
    ("mla", "page_unified"): 0,
}
"""Axis of the buffer that counts pages, for layouts that have one."""


class HostPages:
    """The pages of one host pool.

    Parameters
    ----------
    pool : sglang.srt.mem_cache.pool_host.HostKVCache
        Of multi-head attention or MLA; anything else is refused.

    Attributes
    ----------
    kind : str
        ``mha`` or ``mla``.
    layout : str
        SGLang's name of the layout.
    tokens : int
        Tokens in a page.
    dtype : str
        Type of the elements, as it is kept: an 8-bit float may be ``uint8``.
    layers, heads, head_dim : int
        Of this rank; with MLA one head, as wide as the latent.
    nbytes : int
        Bytes of a page.

    Raises
    ------
    ConfigError
        If pages of this pool can not be stored, or would not be the whole truth about a prefix.
    """

    def __init__(self, pool: Any) -> None:
        self.kind = _kind(pool)
        self.layout = str(pool.layout)
        self.tokens = int(pool.page_size)
        self.dtype = str(pool.dtype).removeprefix("torch.")
        self.layers = int(pool.layer_num)
        self.heads, self.head_dim = (
            (1, int(pool.kv_cache_dim)) if self.kind == "mla" else (int(pool.head_num), int(pool.head_dim))
        )
        self._pool = pool
        self._check(pool)
        whole = self._whole()
        self._pages = int(pool.page_num)
        per_token = self._slot in _TOKEN_AXIS
        self._axis = _TOKEN_AXIS[self._slot] if per_token else _PAGE_AXIS[self._slot]
        self._step = self.tokens if per_token else 1
        if whole.shape[self._axis] != self._pages * self._step or whole.size % self._pages:
            raise ConfigError(
                f"sglang: the host pool has the shape {whole.shape}, which is not that of the layout {self.layout!r}.",
                _WITHOUT,
            )
        self.nbytes = whole.size // self._pages

    @property
    def shape(self) -> str:
        """Everything about the bytes of a page that the layout's name does not say."""
        pool = self._pool
        dims = [n for axis, n in enumerate(pool.kv_buffer.shape) if axis != self._axis]
        return f"{'x'.join(map(str, dims))}+{pool.start_layer}:{pool.end_layer}"

    def page(self, start: int) -> Bytes:
        """The page that begins at a token of the pool, as it lies there: a view, not always contiguous.

        Raises
        ------
        InvalidParams
            If no page begins there.
        """
        number, rest = divmod(start, self.tokens)
        if rest or not 0 <= number < self._pages:
            raise InvalidParams(f"host_indices: no page of {self.tokens} tokens begins at {start}.", "")
        place = slice(number * self._step, (number + 1) * self._step)
        return self._whole()[(slice(None),) * self._axis + (place,)]

    def pages(self, host_indices: Any, count: int) -> list[Bytes]:
        """Pages that a call of SGLang names: the index of each of their tokens.

        Raises
        ------
        InvalidParams
            If these are not that many whole pages.
        """
        indices = host_indices.detach().cpu().numpy()
        if indices.size != count * self.tokens:
            raise InvalidParams(f"host_indices: {indices.size} tokens for {count} pages of {self.tokens}.", "")
        indices = indices.reshape(count, self.tokens)
        if (indices != indices[:, :1] + np.arange(self.tokens)).any():
            raise InvalidParams("host_indices: the tokens of a page do not lie one after the other.", "")
        return [self.page(int(start)) for start in indices[:, 0]]

    def flat(self, tensor: Any) -> Bytes:
        """Bytes of one of SGLang's flat pages, in place.

        Raises
        ------
        InvalidParams
            If it is not the memory of one page of this pool.
        """
        import torch

        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise InvalidParams("page: it is no contiguous tensor in host memory.", "")
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        if data.size != self.nbytes or tensor.dtype != self._pool.dtype:
            raise InvalidParams(f"page: {data.size} bytes of {tensor.dtype}, a page has {self.nbytes}.", "")
        return data

    def empty(self) -> Any:
        """A new flat page."""
        import torch

        return torch.empty(self.nbytes // self._pool.dtype.itemsize, dtype=self._pool.dtype)

    @property
    def _slot(self) -> tuple[str, str]:
        return self.kind, self.layout

    def _whole(self) -> Bytes:
        # Taken anew each time: SGLang gives the buffer up at the end, and nothing may be written there then.
        import torch

        return self._pool.kv_buffer.view(torch.uint8).numpy()

    def _check(self, pool: Any) -> None:
        import torch

        if self._slot not in _TOKEN_AXIS and self._slot not in _PAGE_AXIS:
            raise ConfigError(f"sglang: the layout {self.layout!r} of {self.kind} is not supported.", _WITHOUT)
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"sglang: a KV cache of type {self.dtype} is not supported.",
                "Start SGLang with --kv-cache-dtype auto or fp8_e4m3.",
            )
        if getattr(pool, "dcp_size", 1) != 1 or getattr(pool, "_layer_shard_enabled", False):
            raise ConfigError("sglang: ranks that hold parts of a page's tokens or layers are not supported.", _WITHOUT)
        if any(getattr(info, "scales", None) is not None for info in getattr(pool, "_buffer_infos", ())):
            raise ConfigError("sglang: KV with scales of its own is not supported.", _WITHOUT)
        buffer = pool.kv_buffer
        if not isinstance(buffer, torch.Tensor) or buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ConfigError("sglang: this rank has no host pool in memory that could be read.", _WITHOUT)


def copy_out(page: Bytes, into: Sequence[Bytes]) -> None:
    """Copy a page into memory of the daemon, which nearly always is one piece."""
    if len(into) == 1:
        np.copyto(into[0].reshape(page.shape), page)
        return
    whole, position = np.ascontiguousarray(page).reshape(-1), 0
    for part in into:
        np.copyto(part, whole[position : position + part.size])
        position += part.size


def copy_in(page: Bytes, parts: Sequence[Bytes]) -> None:
    """Copy a stored page to its place."""
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    np.copyto(page, data.reshape(page.shape))


def _kind(pool: Any) -> str:
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    # Exactly these: what is derived from them keeps more than its one buffer.
    if type(pool) is MHATokenToKVPoolHost:
        return "mha"
    if type(pool) is MLATokenToKVPoolHost:
        return "mla"
    raise ConfigError(
        f"sglang: a host pool of kind {type(pool).__name__} is not supported; only plain multi-head attention and MLA "
        "are.",
        _WITHOUT,
    )
