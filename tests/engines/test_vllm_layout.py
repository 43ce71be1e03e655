"""Page layouts are learned from the write operation, and blocks come out and go in as what they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvstore.errors import ConfigError
from kvstore_connectors.vllm.layout import CANONICAL, learn, same_layout
from kvstore_connectors.vllm.pages import HostPages, consecutive

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def packed_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """As most backends do it: channels hold K, then V."""
    tokens = cache.shape[2]
    for row, slot in enumerate(slots.tolist()):
        cache[slot // tokens, :, slot % tokens] = torch.cat([key[row], value[row]], dim=-1)


def transposed_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """As the CPU backend does it: a page is K as [dim, token], then V as [token, dim]."""
    blocks, heads, tokens, channels = cache.shape
    dim = channels // 2
    pages = cache.view(blocks, heads, tokens * channels)
    for row, slot in enumerate(slots.tolist()):
        block, token = divmod(slot, tokens)
        pages[block, :, : tokens * dim].view(heads, dim, tokens)[:, :, token] = key[row]
        pages[block, :, tokens * dim :].view(heads, tokens, dim)[:, token] = value[row]


def tiled_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """A permutation that no strides describe: the elements of a page in reverse order of their bits' sum."""
    blocks, heads, tokens, channels = cache.shape
    pages = cache.view(blocks, heads, tokens * channels)
    order = sorted(range(tokens * channels), key=lambda i: (i.bit_count(), i))
    for row, slot in enumerate(slots.tolist()):
        block, token = divmod(slot, tokens)
        both = torch.cat([key[row], value[row]], dim=-1)
        for channel in range(channels):
            pages[block, :, order[token * channels + channel]] = both[:, channel]


def lossy_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Two tokens share a place: nothing to be learned."""
    packed_write(key, value, cache, slots // 2 * 2)


def broken_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """An operation that can not be called like this."""
    raise TypeError


def make_cache(order: str, blocks: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[block, head, token, 2 * dim] over memory in another order, as vLLM registers it."""
    sizes = {"B": blocks, "H": heads, "N": tokens, "C": 2 * dim}
    memory = torch.zeros([sizes[axis] for axis in order], dtype=dtype)
    return memory.permute([order.index(axis) for axis in "BHNC"])


CASES = [
    ("BHNC", packed_write, 3, 32, 64, torch.bfloat16),
    ("BNHC", packed_write, 3, 16, 64, torch.float32),
    ("BHNC", transposed_write, 3, 32, 64, torch.float32),
    ("BHNC", transposed_write, 2, 64, 128, torch.bfloat16),
    ("BNHC", packed_write, 1, 16, 256, torch.bfloat16),
    ("BHNC", transposed_write, 1, 256, 288, torch.float16),
]


@pytest.mark.parametrize(("order", "write", "heads", "tokens", "dim", "dtype"), CASES)
def test_views_show_what_was_written(
    order: str, write: Write, heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> None:
    cache = make_cache(order, 4, heads, tokens, dim, dtype)
    views = learn(cache, write, heads, dim, "test")
    assert views.layout == CANONICAL
    assert not cache.any()  # learning leaves no trace
    key, value = torch.randn(2, tokens, heads, dim).to(dtype)
    write(key, value, cache, torch.arange(2 * tokens, 3 * tokens))
    assert torch.equal(views.sides[0][2], key)
    assert torch.equal(views.sides[1][2], value)
    assert not views.sides[0][1].any()


def test_tiles_are_kept_whole_under_a_name_of_their_own() -> None:
    cache = make_cache("BHNC", 3, 2, 8, 16, torch.float32)
    views = learn(cache, tiled_write, 2, 16, "test")
    assert views.layout.startswith("vllm-page1:")
    assert views.sides[0].shape == cache.shape
    other = learn(cache, tiled_write, 2, 16, "another-version")
    assert other.layout != views.layout
    assert learn(cache, None, 2, 16, "test").layout != views.layout
    for write in (lossy_write, broken_write):
        assert learn(cache, write, 2, 16, "test").layout != CANONICAL


def test_layers_have_to_be_alike() -> None:
    one = learn(make_cache("BHNC", 3, 2, 8, 16, torch.float32), packed_write, 2, 16, "test")
    two = learn(make_cache("BHNC", 3, 2, 8, 32, torch.float32), packed_write, 2, 32, "test")
    with pytest.raises(ConfigError, match="different ways"):
        same_layout([one, two])


@pytest.mark.parametrize("write", [packed_write, transposed_write, tiled_write])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_out_and_in(write: Write, dtype: torch.dtype) -> None:
    """4 engine blocks of 8 tokens make a block; blocks come out in canonical order, and parts go in elsewhere."""
    layers, heads, tokens, dim = 3, 2, 8, 16
    caches = [make_cache("BHNC", 12, heads, tokens, dim, dtype) for _ in range(layers)]
    views = [learn(cache, write, heads, dim, "test") for cache in caches]
    pages = HostPages(views, 32, tokens, tokens)
    table = [7, 8, 2, 5]
    keys, values = torch.randn(2, layers, 32, heads, dim).to(dtype)
    slots = torch.tensor([block * tokens + i for block in table for i in range(tokens)])
    for layer, cache in enumerate(caches):
        write(keys[layer], values[layer], cache, slots)
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save(table, stored)
    if pages.layout == CANONICAL:
        order = torch.stack([keys, values], dim=1)  # [layer, K|V, token, head, dim]
        assert torch.equal(torch.from_numpy(stored).view(dtype).view(order.shape), order)
        room = torch.full((layers, 2, 40, heads, dim), torch.nan, dtype=dtype)
        pages.read(table[:3], room)
        assert torch.equal(room[:, :, :24], order[:, :, :24])
        assert room[:, :, 24:].isnan().all()

    before = [cache.clone() for cache in caches]
    pages.load(stored, 1, [10, 0, 1])  # the last three quarters, into other blocks
    for cache, was in zip(caches, before, strict=True):
        for source, target in ((8, 10), (2, 0), (5, 1)):
            assert torch.equal(cache[target], was[source])
        untouched = [i for i in range(12) if i not in (10, 0, 1)]
        assert torch.equal(cache[untouched], was[untouched])


def test_kernels_with_smaller_pages_than_the_engine() -> None:
    """The engine's blocks of 16 tokens are two pages of the kernels'."""
    cache = make_cache("BHNC", 8, 1, 8, 16, torch.float32)
    views = learn(cache, packed_write, 1, 16, "test")
    pages = HostPages([views], 32, 16, 8)
    key, value = torch.randn(2, 32, 1, 16)
    packed_write(key, value, cache, torch.tensor([*range(48, 64), *range(16)]))  # engine blocks 3 and 0
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save([3, 0], stored)
    assert torch.equal(torch.from_numpy(stored).view(torch.float32).view(2, 32, 1, 16), torch.stack([key, value]))


def test_block_sizes_have_to_fit() -> None:
    views = learn(make_cache("BHNC", 3, 2, 8, 16, torch.float32), packed_write, 2, 16, "test")
    with pytest.raises(ConfigError, match="block_tokens"):
        HostPages([views], 20, 8, 8)


def test_runs_of_ids() -> None:
    assert list(consecutive([3, 4, 5, 9, 1, 2, 1])) == [(0, 3, 3), (3, 9, 1), (4, 1, 2), (6, 1, 1)]
    assert list(consecutive([])) == []


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_cpu_backend(block_size: int, dtype: torch.dtype) -> None:
    """The write operation of the CPU engine itself, without an engine around it."""
    from types import SimpleNamespace

    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    heads, dim = 3, 64
    try:
        isa = _get_attn_isa(dtype, block_size, dim)
    except TypeError:
        pytest.skip("this vLLM chooses its CPU kernels in another way")
    impl = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto", isa=isa)
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        CPUAttentionBackendImpl.do_kv_cache_update(impl, layer, key, value, cache, slots)  # type: ignore[arg-type]

    cache = make_cache("BHNC", 4, heads, block_size, dim, dtype)
    views = learn(cache, write, heads, dim, "test")
    key, value = torch.randn(2, block_size, heads, dim).to(dtype)
    write(key, value, cache, torch.arange(block_size, 2 * block_size))
    if views.layout == CANONICAL:  # with AMX pages are tiles, and kept whole
        assert torch.equal(views.sides[0][1], key)
        assert torch.equal(views.sides[1][1], value)
    else:
        assert isa not in ("vec", "vec16")
