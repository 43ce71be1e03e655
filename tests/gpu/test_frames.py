"""Whole encoded blocks: what kernels and host make together is what the codec writes, and is read back as it reads."""

from __future__ import annotations

import gpu_kit as kit
import numpy as np
import pytest
import torch

from kvstore.codecs import parse, read
from kvstore.codecs.base import Context
from kvstore.errors import ConfigError
from kvstore.rope import rotary
from kvstore_gpu import coded
from kvstore_gpu.frames import Frames, has_kernels
from kvstore_gpu.jobs import Part

TOKENS, PAGES = 16, 8
BLOCK = TOKENS * PAGES
TURNING = rotary({"rope_theta": 500000.0, "head_dim": 64})
TABLES = [(0, [0, 1, 2, 3, 4, 5, 6, 7]), (BLOCK, [9, 8, 1, 0, 12, 11, 2, 7]), (40 * BLOCK, [3, 3, 3, 5, 4, 6, 7, 8])]


def on(device: str, data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data.copy()).to(device)


def codec_writes(cache, chain, context, position: int, pages: list[int]) -> np.ndarray:
    spec = coded.spec_of(cache, BLOCK, position)
    sides = [[side[pages].reshape(BLOCK, cache.heads, cache.dim) for side in layer] for layer in cache.views]
    block = torch.stack([torch.stack(layer) for layer in sides]).cpu().contiguous()
    out = np.zeros(chain.bound(spec, context), np.uint8)
    assert chain.encode(block, spec, out, context) == out.size
    return out


@pytest.mark.parametrize("text", ["fp8", "prerope|kv4", "prerope|kv4(k=8,v=4)"])
@pytest.mark.parametrize("layout", ["nhd", "side by side"])
def test_frames_are_the_codecs_byte_for_byte_both_ways(text, layout, device) -> None:
    chain, context = parse(text), Context(rotary=TURNING)
    cache, back = (kit.cache(layout, heads=4, dim=64, device=device) for _ in range(2))
    stream = torch.cuda.current_stream() if device == "cuda" else None
    frames = Frames(cache, chain, BLOCK, context)
    blocks = [kit.poisoned(frames.nbytes(position) + 1, device) for position, _ in TABLES]
    parts = [Part(block, pages, 0, at) for block, (at, pages) in zip(blocks, TABLES, strict=True)]
    assert frames.pack(parts, stream).tolist() == [0, 0, 0]
    landed = []
    for block, (position, pages) in zip(blocks, TABLES, strict=True):
        data = block.cpu().numpy()
        frames.seal(data, position)
        frame, written = read(data), codec_writes(cache, chain, context, position, pages)
        first = int(frame.offsets[0, 0])
        wrong = (data[first:-1] != written[first:]).mean()
        # A device's cosine differs from the CPU's in the last bit now and then, and a code by one.
        assert wrong <= (1e-4 if device == "cuda" and chain.blocks else 0.0)
        assert wrong or np.array_equal(data[:-1], written)
        assert data[-1] == 0
        for plane, unit in np.ndindex(frame.sizes.shape):
            frame.part(data, plane, unit)
        landed.append(data)
    reading = Frames(back, chain, BLOCK, context)
    parts = [Part(on(device, landed[1]), [4, 2, 7], 3, BLOCK), Part(on(device, landed[0]), [0, 1], 0, 0)]
    reading.unpack(parts, stream)
    for index, first, pages in ((1, 3, [4, 2, 7]), (0, 0, [0, 1])):
        spec = coded.spec_of(cache, BLOCK, TABLES[index][0])
        out = torch.empty(spec.shape, dtype=spec.torch_dtype)
        chain.decode(landed[index], spec, out, context)
        paged = out.view(spec.layers, 2, PAGES, TOKENS, 4, 64)[:, :, first : first + len(pages)]
        for layer in range(spec.layers):
            for side in range(2):
                found = back.views[layer][side][pages].cpu()
                assert kit.distance(found, paged[layer, side]) < 2 * kit.ROUNDING[torch.bfloat16]


def test_a_block_that_was_cut_to_its_first_planes_is_read_with_those(device) -> None:
    chain, context = parse("prerope|kv4"), Context(rotary=TURNING)
    cache, back = (kit.cache(heads=4, dim=64, device=device) for _ in range(2))
    stream = torch.cuda.current_stream() if device == "cuda" else None
    whole = codec_writes(cache, chain, context, BLOCK, TABLES[1][1])
    frame = read(whole)
    cut = whole[: frame.nbytes(1)]
    full = on(device, whole)
    parts = [Part(full, [0, 1, 2, 3], 0, BLOCK), Part(on(device, cut), [4, 5, 6, 7], 4, BLOCK)]
    Frames(back, chain, BLOCK, context).unpack(parts, stream)
    for planes, first, pages in ((None, 0, [0, 1, 2, 3]), (1, 4, [4, 5, 6, 7])):
        spec = coded.spec_of(cache, BLOCK, BLOCK)
        out = torch.empty(spec.shape, dtype=spec.torch_dtype)
        chain.decode(whole, spec, out, context, planes=planes)
        wanted = out.view(spec.layers, 2, PAGES, TOKENS, 4, 64)[:, :, first : first + 4]
        found = torch.stack([torch.stack([side[pages] for side in layer]) for layer in back.views])
        assert kit.distance(found, wanted) < 2 * kit.ROUNDING[torch.bfloat16]


def test_chains_without_kernels_are_refused() -> None:
    assert not has_kernels(parse("prerope|kv4|zstd"))
    assert not has_kernels(parse("kv4"))
    with pytest.raises(ConfigError, match="no kernels"):
        Frames(kit.cache(), parse("lossless"), BLOCK, Context())
