"""Pages to blocks and back: every byte in its place, nothing else touched, whatever the layout."""

from __future__ import annotations

import gpu_kit as kit
import numpy as np
import pytest
import torch

from kvstore.errors import InvalidParams
from kvstore.rope import rotary
from kvstore_gpu import host, paged, rope, rows
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import Part

PAGES = 4


def parts_of(cache: PagedCache, device: str, make=kit.poisoned) -> list[Part]:
    """A whole block, part of one from its middle, and one page."""
    nbytes = cache.block_nbytes(PAGES)
    blocks = [make(nbytes, device) for _ in range(3)]
    return [Part(blocks[0], [7, 2, 11, 0]), Part(blocks[1], [5, 6], first=1), Part(blocks[2], [12], first=3)]


def expected(cache: PagedCache, part: Part) -> torch.Tensor:
    """What a gather makes of a poisoned block, by plain indexing."""
    size = cache.sample.element_size()
    shape = (cache.layers, cache.sides, PAGES, cache.page_tokens, cache.heads, cache.dim * size)
    out = kit.poisoned(cache.block_nbytes(PAGES), "cpu").view(shape)
    for layer, sides in enumerate(cache.views):
        for side, view in enumerate(sides):
            for place, page in enumerate(part.pages, part.first):
                out[layer, side, place] = view[page].cpu().contiguous().view(torch.uint8)
    return out.view(-1)


@pytest.mark.parametrize("layout", kit.LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(16, 4, 64), (16, 8, 128), (7, 3, 20), (1, 1, 8), (256, 2, 128), (16, 3, 33)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_blocks_hold_their_pages_and_pages_get_them_back(layout, tokens, heads, dim, dtype, device) -> None:
    cache = kit.cache(layout, tokens=tokens, heads=heads, dim=dim, dtype=dtype, device=device)
    parts = parts_of(cache, device)
    paged.gather(cache, parts, PAGES)
    for part in parts:
        assert torch.equal(part.block.cpu(), expected(cache, part))

    other = kit.cache(layout, tokens=tokens, heads=heads, dim=dim, dtype=dtype, device=device)
    before = kit.copy_of(other)
    paged.scatter(other, parts, PAGES)
    for part in parts:
        for layer, sides in enumerate(before.views):
            for side, view in enumerate(sides):
                view[list(part.pages)] = cache.views[layer][side][list(part.pages)].cpu()
    assert kit.same(other, before)


@pytest.mark.parametrize("max_blocks", [1, 5])
def test_few_thread_blocks_and_some_layers_only(max_blocks, device) -> None:
    cache = kit.cache("side by side", device=device)
    parts = parts_of(cache, device)
    paged.gather(cache, parts, PAGES, layers=range(1, 2), max_blocks=max_blocks)
    layer = cache.block_nbytes(PAGES) // cache.layers
    for part in parts:
        whole = expected(cache, part)
        assert torch.equal(part.block.cpu()[layer : 2 * layer], whole[layer : 2 * layer])
        assert (part.block.cpu()[:layer] == 0xA5).all()
        assert (part.block.cpu()[2 * layer :] == 0xA5).all()


def test_whole_pages_of_any_shape(device) -> None:
    raw = [torch.randn(9, 3, 5, 2, 8, device=device).to(torch.float16) for _ in range(2)]
    cache = PagedCache.of([[one] for one in raw])
    part = Part(kit.poisoned(cache.block_nbytes(2), device), [8, 1])
    paged.gather(cache, [part], 2)
    want = torch.stack([one[[8, 1]] for one in raw]).cpu().contiguous().view(-1).view(torch.uint8)
    assert torch.equal(part.block.cpu(), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_straight_to_and_from_registered_host_memory(layout) -> None:
    cache = kit.cache(layout, dim=128, device="cuda")
    nbytes = cache.block_nbytes(PAGES)
    slab = np.zeros(4 * nbytes, np.uint8)
    view = torch.from_numpy(slab[nbytes : 2 * nbytes])
    with pytest.raises(InvalidParams, match="register"):
        paged.gather(cache, [Part(view, [1, 2, 3, 4])], PAGES)
    assert all(len(piece) for piece in host.reach(slab[5:9], cache.device))
    list(host.ahead(slab, cache.device))
    paged.gather(cache, [Part(view, [1, 2, 3, 4])], PAGES)
    torch.cuda.synchronize()
    assert torch.equal(view, expected(cache, Part(view, [1, 2, 3, 4])))
    other = kit.cache(layout, dim=128, device="cuda")
    paged.scatter(other, [Part(view, [0, 9, 5, 6])], PAGES)
    for mine, yours in zip(other.views, cache.views, strict=True):
        for side in range(2):
            assert torch.equal(mine[side][[0, 9, 5, 6]], yours[side][[1, 2, 3, 4]])
    known = host.registered()[0]
    del view, slab
    assert host.registered()[0] == known - 1


def test_what_does_not_fit_is_refused(device) -> None:
    cache = kit.cache(device=device)
    good = kit.poisoned(cache.block_nbytes(PAGES), device)
    for part in (
        Part(good, [13]),
        Part(good, [-1]),
        Part(good, [1, 2], first=3),
        Part(good, [1], first=-1),
        Part(good[1:], [1]),
        Part(good.view(torch.int8), [1]),
    ):
        with pytest.raises(InvalidParams):
            paged.gather(cache, [part], PAGES)
    with pytest.raises(InvalidParams):
        paged.gather(cache, [Part(good, [1])], PAGES, layers=range(2, 4))
    with pytest.raises(InvalidParams):
        PagedCache.of([[cache.views[0][0]], [cache.views[0][1].float()]])
    with pytest.raises(InvalidParams):
        PagedCache.of([[cache.views[0][0].transpose(2, 3)]])
    paged.gather(cache, [], PAGES)
    paged.gather(cache, [Part(good, [])], PAGES)


# -- turned on the way -------------------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {"rope_theta": 10000.0, "head_dim": 64},
    "linear": {"rope_theta": 10000.0, "head_dim": 64, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 500000.0,
        "head_dim": 128,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {
        "rope_theta": 10000.0,
        "head_dim": 64,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    },
    "partial": {"rope_theta": 10000.0, "head_dim": 80, "partial_rotary_factor": 0.4},
    "interleaved": {"rope_theta": 10000.0, "head_dim": 64, "rope_interleave": True},
    "interleaved, partial": {
        "rope_theta": 10000.0, "head_dim": 96, "rope_interleave": True, "partial_rotary_factor": 0.5,
    },
    "no multiple of eight": {"rope_theta": 10000.0, "head_dim": 20},
}  # fmt: skip


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("layout", ["nhd", "hnd", "side by side"])
def test_keys_are_turned_to_their_positions(variant, dtype, layout, device) -> None:
    turning = rotary(CONFIGS[variant])
    dim = CONFIGS[variant]["head_dim"]
    cache = kit.cache(layout, heads=3, dim=dim, dtype=dtype, device=device, tokens=8)
    nbytes = cache.block_nbytes(PAGES)
    parts = [Part(kit.block(nbytes, device), [3, 1, 12, 8]), Part(kit.block(nbytes, device), [5, 6], first=2)]
    if dtype != torch.bfloat16:
        for part in parts:
            part.block.copy_(torch.randn(nbytes // dtype.itemsize, device=device).to(dtype).view(torch.uint8))
    positions = torch.randint(0, 120_000, (6 * 8,))
    exact = kit.copy_of(cache, dtype=torch.float64)
    cos, sin = _exact_table(turning, positions)
    _turn_by_hand(exact, parts, cache, cos, sin, turning.interleaved)
    rope.scatter(cache, parts, PAGES, rope.Turn.of(turning, positions.to(device)))
    for mine, right in zip(cache.views, exact.views, strict=True):
        assert kit.distance(mine[0], right[0]) < kit.ROUNDING[dtype]
        assert torch.equal(mine[1].cpu().double(), right[1])


def _exact_table(turning, positions):
    angles = positions.double()[:, None] * torch.tensor(turning.frequencies, dtype=torch.float64)
    return angles.cos(), angles.sin()


def _turn_by_hand(exact, parts, cache, cos, sin, interleaved) -> None:
    """Pair by pair, as the paper has it."""
    row, pairs = 0, cos.shape[1]
    shape = (cache.layers, 2, PAGES, cache.page_tokens, cache.heads, cache.dim)
    for part in parts:
        data = part.block.cpu().view(cache.dtype).view(shape).double()
        for place, page in enumerate(part.pages, part.first):
            c, s = (t[row : row + cache.page_tokens, None, :] for t in (cos, sin))
            row += cache.page_tokens
            for layer in range(cache.layers):
                keys = data[layer, 0, place].clone()
                for i in range(pairs):
                    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
                    x, y = data[layer, 0, place, ..., a], data[layer, 0, place, ..., b]
                    keys[..., a] = x * c[..., i] - y * s[..., i]
                    keys[..., b] = y * c[..., i] + x * s[..., i]
                exact.views[layer][0][page] = keys
                exact.views[layer][1][page] = data[layer, 1, place]


@pytest.mark.parametrize("interleaved", [False, True])
def test_no_distance_changes_no_bit_and_layers_without_positions_are_copied(interleaved, device) -> None:
    cache, plain = (kit.cache(device=device) for _ in range(2))
    part = Part(kit.block(cache.block_nbytes(PAGES), device), [3, 1, 12, 8])
    turning = rotary({"head_dim": 64, "rope_interleave": interleaved, "no_rope_layers": [1, 0, 1]})
    paged.scatter(plain, [part], PAGES)
    rope.scatter(cache, [part], PAGES, rope.Turn.of(turning, torch.zeros(1, dtype=torch.int64, device=device)))
    for page in part.pages:
        for layer in range(3):
            assert torch.equal(cache.views[layer][0][page], plain.views[layer][0][page])
    rope.scatter(cache, [part], PAGES, rope.Turn.of(turning, torch.full((1,), 77, device=device)))
    assert torch.equal(cache.views[1][0][3], plain.views[1][0][3])
    assert not torch.equal(cache.views[0][0][3], plain.views[0][0][3])


def test_turns_that_do_not_fit_are_refused(device) -> None:
    cache = kit.cache(device=device)
    part = Part(kit.block(cache.block_nbytes(PAGES), device), [3, 1])
    turning = rotary({"head_dim": 64})
    for count in (2, 31, 33):
        with pytest.raises(InvalidParams):
            rope.scatter(
                cache, [part], PAGES, rope.Turn.of(turning, torch.zeros(count, dtype=torch.int64, device=device))
            )
    wide = rope.Turn.of(rotary({"head_dim": 128}), torch.zeros(1, dtype=torch.int64, device=device))
    with pytest.raises(InvalidParams):
        rope.scatter(cache, [part], PAGES, wide)


# -- rows of tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", kit.LAYOUTS)
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 64), (3, 18)])
def test_rows_go_to_their_slots_and_come_back(layout, heads, dim, device) -> None:
    view = kit.views(layout, 11, 16, heads, dim, torch.bfloat16, device)[0]
    slots = torch.randperm(11 * 16)[:57]
    slots[5], slots[9] = -1, 11 * 16
    fresh = torch.randn(57, heads, dim).to(torch.bfloat16)
    want = view.cpu().clone()
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < 11 * 16:
            want[slot // 16, slot % 16] = fresh[row]
    rows.scatter(view, fresh.to(device), slots.to(device))
    assert torch.equal(view.cpu(), want)
    back = torch.full_like(fresh, 9.0).to(device)
    rows.gather(view, back, slots.to(device))
    fresh[5] = fresh[9] = 9.0
    assert torch.equal(back.cpu(), fresh)


def test_rows_that_do_not_fit_are_refused(device) -> None:
    view = kit.views("nhd", 5, 16, 2, 64, torch.bfloat16, device)[0]
    slots = torch.zeros(3, dtype=torch.int64, device=device)
    for wrong in (
        torch.zeros(3, 2, 65, dtype=torch.bfloat16, device=device),
        torch.zeros(3, 2, 64, device=device),
        torch.zeros(3, 64, 2, dtype=torch.bfloat16, device=device).transpose(1, 2),
    ):
        with pytest.raises(InvalidParams):
            rows.scatter(view, wrong, slots)
    with pytest.raises(InvalidParams):
        rows.scatter(view, torch.zeros(3, 2, 64, dtype=torch.bfloat16, device=device), slots.int())
