"""What single codecs promise beyond the suite: bit order, sinks, seals, bombs, and text and headers of strangers."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from codec_kit import BASIS, CONTEXT, SPEC, opened, packed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore.codecs import BlockSpec, Chain, Context, hadamard, parse, processor, quant, read
from kvstore.codecs.kv4 import KV4
from kvstore.codecs.mikv import MiKV
from kvstore.errors import CannotDecode, CannotEncode, CorruptBlock
from kvstore.rope import Rotary
from kvstore.testing.codec_suite import block_of, resign

# -- quantizing -------------------------------------------------------------------------------------------------------


def test_bit_order_is_the_documented_one() -> None:
    codes = np.array([0b10, 0b01, 0b11, 0, 0, 0, 0, 0, 0b10], np.uint8)
    planes = [np.empty(2, np.uint8) for _ in range(2)]
    quant.pack(codes, 2, planes)
    assert planes[0].tolist() == [0b101, 0b1]  # the most significant bits, code i in bit i % 8 of byte i // 8
    assert planes[1].tolist() == [0b110, 0b0]
    assert np.array_equal(quant.unpack(planes, 9), codes)


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_planes_hold_any_codes(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    planes = [np.empty(quant.plane_nbytes(count), np.uint8) for _ in range(bits)]
    quant.pack(codes, bits, planes)
    for known in range(1, bits + 1):
        assert np.array_equal(quant.unpack(planes[:known], count), codes >> (bits - known))


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(-20, 12))
def test_a_quantized_value_is_at_most_half_a_step_off(bits: int, count: int, seed: int, exponent: float) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, count)).astype(np.float32)) * 2**exponent
    codes, low, scale = quant.quantize(values, bits, 1)
    for known in range(1, bits + 1):
        got = quant.dequantize(codes >> (bits - known), low, scale, bits, known)
        bound = scale.float() * 2 ** (bits - known) / 2
        assert ((got - values).abs() <= bound * (1 + 1e-3) + 1e-6 * values.abs().amax()).all()


def test_what_is_not_in_a_prefix_has_no_influence_on_it() -> None:
    block = block_of(SPEC)
    eight, four = packed("kv4(k=8,v=8)", block), packed("kv4(k=8,v=8)", block)
    cut = four[: read(four).nbytes(3)]
    assert cut.size < 0.75 * eight.size
    assert torch.equal(opened("kv4(k=8,v=8)", cut, planes=3), opened("kv4(k=8,v=8)", eight, planes=3))


def test_the_rotation_is_its_own_inverse() -> None:
    for dim in (8, 24, 64, 96, 128, 80, 5):
        values = torch.randn(7, dim)
        torch.testing.assert_close(hadamard.rotate(hadamard.rotate(values)), values)
        torch.testing.assert_close(hadamard.rotate(values).norm(dim=1), values.norm(dim=1))


@pytest.mark.parametrize("size", [1, 2, 8, 32])
@pytest.mark.parametrize("rows", [0, 1, 5, 3000])
def test_sums_are_the_same_by_integers_and_by_floats(rows: int, size: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(rows).integers(-128, 128, (rows, size), np.int8))
    expected = codes.long() @ hadamard.signs(size, torch.int64)
    ways = [hadamard.sums, hadamard.summed_as_floats]
    if rows and torch.backends.mkldnn.is_available():
        ways.append(hadamard.summed_as_integers)
    for way in ways:
        found = torch.full((rows, size), torch.nan)
        way(codes, found)
        assert torch.equal(found.long(), expected), way


@pytest.mark.parametrize(
    ("info", "integers"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n", torch.backends.mkldnn.is_available()),
        ("flags\t\t: fpu avx2 fma avx512f\n", False),
        ("Features\t: fp asimd asimddp i8mm\n", False),
        (None, False),
    ],
)
def test_sums_are_made_by_what_the_processor_does_fast(
    info: str | None, integers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    processor.flags.cache_clear()
    try:
        assert hadamard.in_integers() == integers
    finally:
        processor.flags.cache_clear()


def test_pca_decodes_to_the_same_but_for_rounding_by_float32_and_by_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = f"prerope|pca(basis={BASIS.digest},step=5000)|zstd"
    data, block, found = packed(chain), block_of(SPEC).float(), {}
    for flags in (frozenset(), frozenset({"avx512_bf16"}), frozenset({"amx_bf16"})):
        monkeypatch.setattr(processor, "flags", lambda flags=flags: flags)
        found[flags] = opened(chain, data).float()
    by_floats, *by_halves = found.values()
    lost = (by_floats - block).norm()
    for by_half in by_halves:
        assert 0 < (by_half - by_floats).norm() < 0.02 * block.norm()
        assert (by_half - block).norm() < 1.1 * lost


# -- kv4, mikv --------------------------------------------------------------------------------------------------------


def test_sinks_are_kept_as_they_are() -> None:
    block = block_of(SPEC) * 30
    for position, sinks in ((0, 4), (1, 3), (4, 0), (256, 0)):
        spec = dataclasses.replace(SPEC, position=position)
        got = opened("kv4(k=2,v=2)", packed("kv4(k=2,v=2)", block, spec), spec)
        assert torch.equal(got[:, :, :sinks], block[:, :, :sinks])
        assert not torch.equal(got[:, :, sinks], block[:, :, sinks])


def test_an_outlier_channel_of_keys_does_not_spoil_the_others() -> None:
    block = block_of(SPEC)
    plain = (opened("kv4", packed("kv4", block)) - block).float()[:, 0, :, :, :-1].norm()
    block[:, 0, :, :, -1] *= 1000
    loud = (opened("kv4", packed("kv4", block)) - block).float()[:, 0, :, :, :-1].norm()
    assert loud == plain


@pytest.mark.parametrize(("bits", "size"), [(8, 9.0), (4, 5.0), (3, 4.0), (2, 3.0)])
def test_bytes_an_element(bits: int, size: float) -> None:
    spec = BlockSpec(1, 256, 8, 128, position=256)
    nbytes = sum(KV4(bits, bits).planes(spec, 0, Context()))
    assert nbytes * 8 <= size * spec.nbytes / 2


def test_the_important_tokens_get_the_bits() -> None:
    block = block_of(SPEC)
    data = packed("mikv(hi=8,lo=2,share=25,sinks=0)", block)
    error = (opened("mikv(hi=8,lo=2,share=25,sinks=0)", data) - block).float().pow(2).sum((0, 1, 3, 4))
    assert error[-16:].mean() < error[:-16].mean() / 100


@pytest.mark.parametrize("bad", [torch.rand(63), torch.full((64,), float("nan")), torch.rand(64, 2), None])
def test_importance_must_be_one_number_a_token(bad: torch.Tensor | None) -> None:
    with pytest.raises(CannotEncode):
        packed("mikv", block_of(SPEC), context=dataclasses.replace(CONTEXT, importance=bad))


def test_a_wrong_count_of_important_tokens_is_refused() -> None:
    data = packed("mikv", block_of(SPEC))
    data[int(read(data).offsets[1, 0])] ^= 1
    resign(data)
    with pytest.raises(CorruptBlock, match="important"):
        opened("mikv", data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_scales(value: float) -> None:
    spec = dataclasses.replace(SPEC, position=9)
    data = packed("kv4", block_of(SPEC), spec)
    groups = SPEC.channels  # of one layer
    at = int(read(data).offsets[0, 0]) + 2 * groups
    data[at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    resign(data)
    with pytest.raises(CorruptBlock):
        opened("kv4", data, spec)


@pytest.mark.parametrize(
    "values",
    [{"k": 1}, {"v": 9}, {"group": 0}, {"group": 1 << 20}, {"sinks": -1}, {"sinks": 65}],
)
def test_wrong_parameters(values: dict[str, int]) -> None:
    with pytest.raises(CannotEncode):
        KV4(**values)
    text = ",".join(f"{k}={v}" for k, v in values.items())
    with pytest.raises((CannotEncode, CannotDecode)):
        parse(f"kv4({text})")


@pytest.mark.parametrize("values", [{"hi": 4, "lo": 4}, {"lo": 1}, {"hi": 9}, {"share": 101}, {"share": -1}])
def test_wrong_parameters_of_mikv(values: dict[str, int]) -> None:
    with pytest.raises(CannotEncode):
        MiKV(**values)


# -- things of the model ----------------------------------------------------------------------------------------------


def test_another_rotation_is_refused() -> None:
    data = packed("prerope|kv4", block_of(SPEC))
    other = Rotary(tuple(500_000.0 ** (-i / 16) for i in range(0, 16, 2)))
    with pytest.raises(CannotDecode):
        opened("prerope|kv4", data, context=dataclasses.replace(CONTEXT, rotary=other))
    with pytest.raises(CannotDecode):
        opened("prerope|kv4", data, context=Context())
    with pytest.raises(CannotEncode):
        packed("prerope|kv4", block_of(SPEC), context=Context())


def test_a_rotation_that_does_not_fit_the_head_is_refused() -> None:
    wide = dataclasses.replace(CONTEXT, rotary=Rotary(tuple(0.5**i for i in range(9))))
    with pytest.raises(CannotEncode):
        packed("prerope|kv4", block_of(SPEC), context=wide)


# -- seal -------------------------------------------------------------------------------------------------------------


def sealed(identity: bytes = b"me", key: bytes = b"k" * 32) -> Context:
    return Context(keys={"default": key}, identity=identity)


def test_a_sealed_block_opens_only_under_its_own_name_and_key() -> None:
    data = packed("raw|seal", block_of(SPEC), context=sealed())
    assert torch.equal(opened("raw|seal", data, context=sealed()), block_of(SPEC))
    for wrong in (sealed(b"you"), sealed(key=b"l" * 32)):
        with pytest.raises(CorruptBlock):
            opened("raw|seal", data, context=wrong)
    with pytest.raises(CannotDecode):
        opened("raw|seal", data, context=Context())
    with pytest.raises(CannotDecode):
        opened("raw|seal", data, context=sealed(key=b"short"))


def test_sealed_parts_cannot_change_places() -> None:
    spec = BlockSpec(2, 64, 64, 128)  # two units
    data = packed("raw|seal", block_of(spec), spec, sealed())
    parsed = read(data)
    (a, b), (size, _) = parsed.offsets[0], parsed.sizes[0]
    assert parsed.units == 2
    data[a : a + size], data[b : b + size] = data[b : b + size].copy(), data[a : a + size].copy()
    resign(data)
    with pytest.raises(CorruptBlock, match="does not open"):
        opened("raw|seal", data, spec, sealed())


def test_a_sealed_block_shows_nothing() -> None:
    block = torch.ones(SPEC.shape, dtype=torch.bfloat16)
    one, two = (packed("raw|seal", block, context=sealed()) for _ in range(2))
    assert block[0].view(torch.uint8).numpy().tobytes()[:64] not in one.tobytes()
    assert not np.array_equal(one[-1000:], two[-1000:])


# -- bombs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_a_bomb_is_not_unpacked(declared: bool) -> None:
    spec = BlockSpec(1, 64, 2, 16)
    data = packed("raw|zstd", torch.zeros(spec.shape, dtype=torch.bfloat16), spec)
    parsed = read(data)
    bomb = b"\x01" + zstandard.ZstdCompressor(write_content_size=declared).compress(bytes(64 << 20))
    head = data[: int(parsed.offsets[0, 0])].copy()
    assert len(bomb) < spec.nbytes
    head[len(parsed.label) : len(parsed.label) + 16] = np.frombuffer(
        struct.pack("<QQ", len(bomb), xxhash.xxh3_64_intdigest(bomb)), np.uint8
    )
    resign(head, parts=False)
    with pytest.raises(CorruptBlock):
        opened("raw|zstd", np.concatenate([head, np.frombuffer(bomb, np.uint8)]), spec)


def test_any_frame_of_zstd_is_read_and_runs_are_found() -> None:
    part = np.arange(4096, dtype=np.uint8)
    for level in (1, 3, 19):
        packed_part = np.frombuffer(b"\x01" + zstandard.ZstdCompressor(level=level).compress(part.tobytes()), np.uint8)
        assert np.array_equal(parse("raw|zstd").byte_steps[0].decode(packed_part, part.size, b"", CONTEXT), part)
    zeros = torch.zeros(SPEC.shape, dtype=torch.bfloat16)
    assert packed("raw|zstd", zeros).size < SPEC.nbytes / 50
    assert packed("lossless", block_of(SPEC)).size < SPEC.nbytes / 1.25


def test_a_shape_that_nobody_has_is_refused_before_memory_is_taken() -> None:
    for shape in ((4097, 1, 1, 1), (1, 1 << 17, 1, 1), (4096, 1 << 16, 4096, 4096), (0, 1, 1, 1), (1, -1, 1, 1)):
        with pytest.raises(CannotEncode):
            BlockSpec(*shape)


# -- text and headers of strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "|", "raw|", "|raw", "zstd", "raw|raw", "zstd|raw", "raw|prerope", "nonsense", "kv4(", "kv4(k=)", "kv4(k=x)",
     "kv4(q=4)", "kv4(k=4,k=4)", "kv4(k=4)(v=4)", "RAW", "raw\n", "kv4(k=4, v=4)", "x" * 5000, "fp8(scale=none)",
     "prerope|raw", "seal(key=../x)|raw", "raw|seal(key=a-b)", "raw|zstd(level=99)"],
)  # fmt: skip
def test_names_that_are_not_chains(text: str) -> None:
    with pytest.raises((CannotDecode, CannotEncode)):
        parse(text)


def test_a_short_name_may_stand_in_a_chain() -> None:
    assert parse("lossless|seal") == parse("byteplanes|zstd|seal")


@given(st.text("rawkv4prefp8zstd|(),=0123456789", max_size=40))
def test_any_text_is_a_chain_or_an_error(text: str) -> None:
    try:
        made = parse(text)
    except (CannotDecode, CannotEncode):
        return
    assert isinstance(made, Chain)
    assert parse(str(made)) == made


HEAD = packed("kv4", block_of(SPEC))


@settings(max_examples=300)
@given(st.binary(max_size=400))
@example(HEAD[:100].tobytes())
def test_any_bytes_are_a_frame_or_an_error(data: bytes) -> None:
    with pytest.raises((CorruptBlock, CannotDecode)):
        read(np.frombuffer(data, np.uint8))


@settings(max_examples=300)
@given(st.data())
def test_a_header_with_a_right_checksum_and_wrong_fields(data: st.DataObject) -> None:
    """Whoever writes files can make checksums: every field is drawn anew, and nothing but an error may come of it."""
    bad = HEAD.copy()
    field, offset = data.draw(st.sampled_from([("<I", 8), ("<I", 12), ("<I", 16), ("<I", 20), ("<Q", 24), ("<B", 32),
                                               ("<B", 33), ("<H", 34), ("<H", 4), ("<H", 6)]))  # fmt: skip
    most = (1 << 8 * struct.calcsize(field)) - 1
    value = data.draw(st.integers(0, most) | st.sampled_from([0, 1, most, most >> 1]))
    before = struct.unpack_from(field, bad.tobytes(), offset)[0]
    bad[offset : offset + struct.calcsize(field)] = np.frombuffer(struct.pack(field, value), np.uint8)
    chain, refs = struct.unpack_from("<HH", bad.tobytes(), 4)
    planes, units = struct.unpack_from("<BH", bad.tobytes(), 33)
    end = -(-(36 + chain + refs + 16 * planes * units + 8) // 64) * 64
    if 64 <= end <= bad.size:
        bad[end - 8 : end] = np.frombuffer(struct.pack("<Q", xxhash.xxh3_64_intdigest(bad[: end - 8].tobytes())), "u1")
    if value == before:
        return
    with pytest.raises((CorruptBlock, CannotDecode)):
        opened("kv4", bad)


# -- what nobody could read back --------------------------------------------------------------------------------------


def test_codes_of_several_layers_that_do_not_fill_their_bytes() -> None:
    spec = BlockSpec(5, 7, 3, 5, position=256)
    got = opened("kv4(k=8,v=8)", packed("kv4(k=8,v=8)", block_of(spec), spec), spec)
    assert float((got - block_of(spec)).float().abs().max()) < 0.2


@pytest.mark.parametrize("chain", ["fp8", "prerope|kv4", "prerope|mikv", "prerope|lowrank(rank=50)"])
def test_values_that_would_be_too_large_once_decoded_are_refused(chain: str) -> None:
    spec = BlockSpec(2, 9, 1, 16, "float16")
    edge = torch.full(spec.shape, 65504.0, dtype=torch.float16) * block_of(spec).sign()
    with pytest.raises(CannotEncode):
        packed(chain, edge, spec, dataclasses.replace(CONTEXT, importance=torch.arange(9.0)))
