"""Coded blocks to pages and back: the bytes of the codec on the CPU, and what it decodes from them."""

from __future__ import annotations

import gpu_kit as kit
import numpy as np
import pytest
import torch

from kvstore.codecs import parse
from kvstore.codecs.base import Context
from kvstore.codecs.fp8 import FP8
from kvstore.codecs.kv4 import KV4
from kvstore.codecs.prerope import PreRope
from kvstore.errors import CannotEncode, InvalidParams
from kvstore.rope import rotary
from kvstore_gpu import coded, fp8, hadamard, kv4
from kvstore_gpu.jobs import Part

TOKENS, PAGES = 16, 8
ROTARIES = {
    "neox": {"rope_theta": 500000.0, "head_dim": 64},
    "interleaved": {"rope_theta": 10000.0, "head_dim": 64, "rope_interleave": True},
    "partial": {"rope_theta": 10000.0, "head_dim": 64, "partial_rotary_factor": 0.5},
    "no positions in layer 1": {"rope_theta": 10000.0, "head_dim": 64, "no_rope_layers": [1, 0, 1]},
}


def wild(cache) -> None:
    """Contents as KV has them: channels of very different size, an outlier, tokens that are constant."""
    for layer in cache.views:
        for view in layer:
            size = torch.logspace(-2, 1.3, cache.dim, device=view.device)[torch.randperm(cache.dim)]
            view.copy_((torch.randn(view.shape, device=view.device) * size).to(view.dtype))
            view[2] = 0
            view[3, 5] = 1.5


def encoded(cache, coder, spec, steps, context):
    """A block that the codec made on the CPU from pages 0 to 7, and where its parts are."""
    places = coded.offsets(coder, spec, start=64)
    data = torch.zeros(64 + coded.nbytes(coder, spec), dtype=torch.uint8)
    coded.encode(
        kit.copy_of(cache), [Part(data, list(range(PAGES)))], spec, steps, coder, places, context, lambda unit: True
    )
    return data, places


def test_fp8_says_what_it_cannot_say(device) -> None:
    coder = FP8()
    for value in (float("nan"), float("inf"), 3.2e38):
        cache = kit.cache(device=device)
        spec = coded.spec_of(cache, TOKENS)
        made = kit.poisoned(coded.nbytes(coder, spec), device)
        assert kit.pack(fp8, cache, [Part(made, [0])], spec, coder, coded.offsets(coder, spec)).tolist() == [0]
        cache.views[1][1][0, 3, 2, 50] = value
        assert kit.pack(fp8, cache, [Part(made, [0])], spec, coder, coded.offsets(coder, spec)).tolist() == [1]


@pytest.mark.parametrize("layout", ["nhd", "side by side"])
@pytest.mark.parametrize("scale", ["head", "token"])
@pytest.mark.parametrize(("heads", "dim"), [(4, 64), (8, 128), (3, 80)])
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_fp8_is_the_codec_byte_for_byte_both_ways(layout, scale, heads, dim, dtype, device) -> None:
    cache, back = (kit.cache(layout, heads=heads, dim=dim, dtype=dtype, device=device) for _ in range(2))
    wild(cache)
    coder, spec = FP8(scale), coded.spec_of(cache, PAGES * TOKENS)
    data, places = encoded(cache, coder, spec, (), Context())
    mine = torch.zeros_like(data).to(device)
    kit.pack(fp8, cache, [Part(mine, list(range(PAGES)))], spec, coder, places)
    assert torch.equal(mine.cpu(), data)

    want = kit.copy_of(back)
    part = Part(data, [12, 0, 7], first=2)
    coded.decode(want, [part], spec, (), coder, places, range(3), Context())
    kit.unpack(fp8, back, [Part(mine, part.pages, 2)], spec, coder, places)
    assert kit.same(back, want)


def test_every_code_of_fp8_is_decoded_and_ties_go_to_even(device) -> None:
    cache = kit.cache(layers=1, heads=2, dim=128, dtype=torch.float32, device=device)
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    numbers[numbers.isnan() | (numbers.abs() == 448.0)] = 416.0
    between = torch.cat([numbers.sort().values.unfold(0, 2, 1).mean(1), numbers[:1]])  # halfway between neighbours
    page = torch.stack([numbers, between]).view(2, 2, 128).repeat(8, 1, 1).to(device)
    page[..., 0] = 440.0  # the scale is exactly 1
    cache.views[0][0][0], cache.views[0][1][0] = page, page
    spec, coder = coded.spec_of(cache, TOKENS), FP8("token")
    places = coded.offsets(coder, spec)
    made = kit.poisoned(coded.nbytes(coder, spec), device)
    kit.pack(fp8, cache, [Part(made, [0])], spec, coder, places)
    want = page.cpu().to(torch.float8_e4m3fn).view(torch.uint8).view(-1)
    found = made.cpu()[2 * TOKENS :].view(2, -1)
    assert torch.equal(found[0] & 0x7F, want & 0x7F)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("layout", ["nhd", "hnd", "side by side"])
@pytest.mark.parametrize("variant", ROTARIES)
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("position", [0, 4096])
@pytest.mark.parametrize(("k", "v", "known"), [(4, 4, 1), (4, 4, 2), (4, 4, 3), (8, 5, 5), (5, 8, 7)])
def test_kv4_decodes_what_the_codec_decodes(layout, variant, dtype, position, k, v, known, device) -> None:
    turning = rotary(ROTARIES[variant])
    cache, back = (kit.cache(layout, heads=3, dim=64, dtype=dtype, device=device) for _ in range(2))
    wild(cache)
    coder, context = KV4(k=k, v=v, group=24), Context(rotary=turning)
    spec = coded.spec_of(cache, PAGES * TOKENS, position)
    data, places = encoded(cache, coder, spec, (PreRope(),), context)
    want = kit.copy_of(back, dtype=torch.float32)
    pages, first = [12, 0, 7, 3], 0 if position == 0 else 4
    unit = spec.of(1)
    for layer in range(3):
        sizes = coder.planes(unit, layer, context)
        planes = [data.numpy()[at : at + n] for at, n in zip(places[:known, layer].tolist(), sizes, strict=False)]
        out = torch.empty(unit.shape)
        coder.decode(planes, unit, layer, out, context)
        out = PreRope().inverse(out, unit, layer, context).view(2, PAGES, TOKENS, 3, 64)
        for side in range(2):
            want.views[layer][side][pages] = out[side, first : first + 4]
    at = torch.arange(4 * TOKENS) + position + first * TOKENS
    kit.unpack(kv4, back, [Part(data.to(device), pages, first)], spec, coder, places[:known], turning, at.to(device))
    for mine, right in zip(back.views, want.views, strict=True):
        for side in range(2):
            # The codec decodes the values of bfloat16 blocks in bfloat16, rounding more often.
            assert kit.distance(mine[side], right[side]) < kit.ROUNDING[dtype] * (2 if side else 1)
            rest = [p for p in range(13) if p not in pages]
            assert torch.equal(mine[side][rest].cpu().float(), right[side][rest])


def test_kv4_decodes_to_other_positions(device) -> None:
    turning = rotary(ROTARIES["neox"])
    cache, here, there = (kit.cache(dim=64, dtype=torch.float32, device=device) for _ in range(3))
    coder = KV4()
    spec = coded.spec_of(cache, PAGES * TOKENS, 1024)
    data, places = encoded(cache, coder, spec, (PreRope(),), Context(rotary=turning))
    part = [Part(data.to(device), list(range(8)))]
    at = torch.arange(PAGES * TOKENS, device=device)
    kit.unpack(kv4, here, part, spec, coder, places, turning, at)
    kit.unpack(kv4, there, part, spec, coder, places, turning, at + 333)
    moved = turning.turn(here.views[1][0][:8].cpu().reshape(-1, 4, 64), turning.table(torch.tensor([333])))
    assert kit.distance(there.views[1][0][:8].reshape(-1, 4, 64), moved) < 1e-5
    assert torch.equal(there.views[1][1][:8], here.views[1][1][:8])


@pytest.mark.parametrize("layout", ["nhd", "hnd", "side by side"])
@pytest.mark.parametrize("variant", ROTARIES)
@pytest.mark.parametrize(("k", "v"), [(4, 4), (8, 2), (3, 5)])
@pytest.mark.parametrize("position", [0, 4096])
def test_kv4_encodes_the_bytes_of_the_codec(layout, variant, k, v, position, device) -> None:
    """All but a few codes are equal: where a value lies between two codes the last bit of a sum tells."""
    turning = rotary(ROTARIES[variant])
    cache = kit.cache(layout, heads=3, dim=64, device=device)
    wild(cache)
    coder, context = KV4(k=k, v=v, group=40), Context(rotary=turning)
    spec = coded.spec_of(cache, PAGES * TOKENS, position)
    data, places = encoded(cache, coder, spec, (PreRope(),), context)
    mine = torch.zeros_like(data).to(device)
    bad = kit.pack(kv4, cache, [Part(mine, list(range(PAGES)))], spec, coder, places, turning)
    assert not bad.cpu().any()
    different = (mine.cpu() ^ data).numpy()
    bits = int(sum(bin(int(byte)).count("1") for byte in different[different != 0]))
    assert bits <= 8e-4 * 8 * data.numel()
    found, right = (torch.empty(spec.shape) for _ in range(2))
    for block, out in ((mine.cpu(), found), (data, right)):
        for layer in range(3):
            sizes = coder.planes(spec.of(1), layer, context)
            planes = [block.numpy()[at : at + n] for at, n in zip(places[:, layer].tolist(), sizes, strict=True)]
            coder.decode(planes, spec.of(1), layer, out[layer : layer + 1], context)
    assert kit.distance(found, right) < 2e-3


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("page", [8, 9])
def test_kv4_says_which_blocks_float16_cannot_say(value, side, page, device) -> None:
    """A sink (page 8 is the first one) is kept as it is, if it is a number."""
    cache = kit.cache(device=device)
    cache.views[2][side][page, 3, 1, 7] = value
    coder, turning = KV4(), rotary(ROTARIES["neox"])
    spec = coded.spec_of(cache, 4 * TOKENS)
    places = coded.offsets(coder, spec)
    blocks = [kit.poisoned(coded.nbytes(coder, spec), device) for _ in range(3)]
    pages = ([0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7])
    parts = [Part(b, p) for b, p in zip(blocks, pages, strict=True)]
    fine = page == 8 and value == 1e6
    assert kit.pack(kv4, cache, parts, spec, coder, places, turning).tolist() == [0, int(not fine), 0]


def codec_takes(cache, chain, spec, pages, context) -> bool:
    sides = [torch.stack([side[pages].reshape(spec.shape[2:]) for side in layer]) for layer in cache.views]
    try:
        chain.encode(torch.stack(sides).cpu(), spec, np.zeros(chain.bound(spec, context), np.uint8), context)
    except CannotEncode:
        return False
    return True


@pytest.mark.parametrize("layout", ["nhd", "side by side"])
@pytest.mark.parametrize("scale", ["head", "token"])
def test_fp8_takes_of_float16_what_the_codec_takes(layout, scale, device) -> None:
    """From 63,488 on a code is decoded to 65,536."""
    chain, coder, context = parse(f"fp8(scale={scale})"), FP8(scale), Context()
    values = [57344.0, 57376.0, 63456.0, 63488.0, -63488.0, -63456.0, 65504.0, 4000.0]
    cache = kit.cache(layout, dtype=torch.float16, device=device)
    for page, value in enumerate(values):
        cache.views[1][page % 2][page, 3, 2, 5] = value
    spec = coded.spec_of(cache, TOKENS)
    blocks = [kit.poisoned(coded.nbytes(coder, spec), device) for _ in values]
    parts = [Part(block, [page]) for page, block in enumerate(blocks)]
    bad = kit.pack(fp8, cache, parts, spec, coder, coded.offsets(coder, spec)).tolist()
    assert bad == [0, 0, 0, 1, 1, 0, 1, 0]
    assert [not flag for flag in bad] == [
        codec_takes(cache, chain, spec, [page], context) for page in range(len(values))
    ]


@pytest.mark.parametrize("variant", ROTARIES)
@pytest.mark.parametrize("position", [0, 4096])
@pytest.mark.parametrize("side", [0, 1])
def test_kv4_takes_of_float16_only_what_stays_a_number_however_few_planes_there_are(
    variant, position, side, device
) -> None:
    """And nothing that the codec does not take; far from the end of the type it takes all."""
    chain, coder, context = parse("prerope|kv4"), KV4(), Context(rotary=rotary(ROTARIES[variant]))
    rows = [(64.0, 1, 0), (4096.0, 1, 0), (6000.0, 1, 1), (40000.0, 1, 0), (60000.0, 1, 1), (60000.0, 0, 1),
            (65504.0, 0, 0), (65504.0, 1, 0)]  # fmt: skip
    cache = kit.cache(dtype=torch.float16, device=device)
    for page, (value, token, whole) in enumerate(rows):
        cache.views[1][side][page, 8 * token : 8 * token + (16 if whole else 1), 2, slice(None) if whole else 5] = value
    spec = coded.spec_of(cache, TOKENS, position)
    places = coded.offsets(coder, spec)
    blocks = [kit.poisoned(coded.nbytes(coder, spec), device) for _ in rows]
    parts = [Part(block, [page]) for page, block in enumerate(blocks)]
    bad = kit.pack(kv4, cache, parts, spec, coder, places, context.rotary).tolist()
    assert bad[:2] == [0, 0]
    back = kit.cache(dtype=torch.float16, device=device)
    at = torch.arange(TOKENS, device=device) + position
    for page, part in enumerate(parts):
        if bad[page]:
            continue
        assert codec_takes(cache, chain, spec, [page], context)
        for known in range(1, len(places) + 1):
            kit.unpack(kv4, back, [part], spec, coder, places[:known], context.rotary, at)
            assert all(bool(torch.isfinite(view[page]).all()) for layer in back.views for view in layer)
    assert bad[6:] == ([1, 1] if side == 0 or position else [0, 1])


def test_coded_blocks_that_do_not_fit_are_refused(device) -> None:
    cache = kit.cache(dim=64, device=device)
    coder, turning = KV4(), rotary(ROTARIES["neox"])
    spec = coded.spec_of(cache, PAGES * TOKENS)
    places = coded.offsets(coder, spec)
    data = kit.poisoned(coded.nbytes(coder, spec), device)
    at = torch.arange(TOKENS, device=device)
    wrong = [
        {"parts": [Part(data[:-16], [1])]},
        {"places": places - 4},
        {"places": places + 2},
        {"places": places[:, :2]},
        {"positions": at[:-1]},
        {"parts": [Part(data, [13])]},
        {"parts": [Part(data, [1], first=8)]},
        {"spec": coded.spec_of(kit.cache(dim=128), PAGES * TOKENS)},
        {"rotary": rotary({"head_dim": 128})},
        {"rotary": rotary({"head_dim": 24})},
        {"cache": kit.cache(dim=20, device=device)},
    ]
    good = {
        "cache": cache,
        "parts": [Part(data, [1])],
        "spec": spec,
        "coder": coder,
        "places": places,
        "rotary": turning,
        "positions": at,
    }
    for change in wrong:
        with pytest.raises(InvalidParams):
            kv4.unpacking(**{**good, **change})


@pytest.mark.parametrize("dim", [8, 64, 96, 128, 80, 256])
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_hadamard_is_the_matrix_and_its_own_inverse(dim, dtype, device) -> None:
    values = torch.randn(37, 5, dim, device=device).to(dtype)
    size = min(dim & -dim, 32)
    matrix = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]).double()
    want = (values.double().cpu().view(37, 5, -1, size) @ (matrix / size**0.5)).view(values.shape)
    found = hadamard.rotate(values)
    assert kit.distance(found, want) < kit.ROUNDING[dtype]
    assert hadamard.rotate(found, out=found) is found
    assert kit.distance(found, values) < 2 * kit.ROUNDING[dtype]


def test_hadamard_refuses_what_it_has_no_matrix_for(device) -> None:
    with pytest.raises(InvalidParams):
        hadamard.rotate(torch.zeros(3, 20, device=device))
