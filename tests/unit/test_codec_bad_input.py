"""What strangers write and what is missing: numbers that are none, groups and planes that do not fit, bases of others,
bombs. A typed error, a miss, nothing allocated beyond what is declared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import xxhash
import zstandard
from codec_kit import BASIS, CONTEXT, PCA, SPEC, made_basis, opened, packed, rotary

from kvstore import Namespace
from kvstore.codecs import BlockSpec, parse, read
from kvstore.codecs.basis import Part, load_basis, read_basis
from kvstore.encoding import Encoding, form_of, pages
from kvstore.errors import CannotDecode, CannotEncode, CodecError, ConfigError, CorruptBlock
from kvstore.keys import namespace_digest
from kvstore.ladder import Ladder
from kvstore.profile import Profile, Profiles, Rung, load_profile, save_profile
from kvstore.rope import Rotary
from kvstore.testing.codec_suite import block_of, resign
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockHeader, BlockId, Hit, Miss, Scope, Stored

# -- numbers that are none ---------------------------------------------------------------------------------------------

ONE = BlockSpec(1, 64, 2, 16)
TWO = BlockSpec(2, 64, 2, 16)
KEPT = 2 * 4 * 32 * 2
"""Bytes of the sinks of one layer."""
KEYS, VALUES = 2 * 32, 2 * 60 * 2
"""Bytes of the lows of one layer's keys (one group), and of its values."""
HALVES = [np.float16(value).tobytes() for value in (float("nan"), float("inf"), -float("inf"))]
WIDE = [
    torch.tensor(value).to(torch.bfloat16).view(torch.int16).numpy().tobytes() for value in (float("nan"), float("inf"))
]
NEGATIVE = np.float16(-1).tobytes()
FIELDS = {
    "a sink of kv4": ("kv4", ONE, 0, WIDE),
    "a low of keys": ("kv4", ONE, KEPT, HALVES),
    "a scale of keys": ("kv4", ONE, KEPT + KEYS, [*HALVES, NEGATIVE]),
    "a low of values": ("kv4", ONE, KEPT + 2 * KEYS, HALVES),
    "a scale of values": ("kv4", ONE, KEPT + 2 * KEYS + VALUES, [*HALVES, NEGATIVE]),
    "a scale of mikv": ("mikv", ONE, KEPT + KEYS, [*HALVES, NEGATIVE]),
    "an exponent of fp8": ("fp8", ONE, 0, [b"\x00", b"\xf7", b"\xff"]),
    "a code of fp8": ("fp8", ONE, 2 * 64 * 2, [b"\x7f", b"\xff"]),
    "a factor of lowrank": ("lowrank(rank=50)", ONE, KEPT, WIDE),
    "a scale of lowrank's values": ("lowrank(rank=50)", ONE, KEPT + 2 * 16 * (60 + 32) + VALUES, [*HALVES, NEGATIVE]),
    "a length of minicache": ("minicache(layers=2,start=0)", TWO, 8, [*HALVES, NEGATIVE]),
    "a sink of pca": (PCA.removesuffix("|zstd"), SPEC, 0, WIDE),
}  # fmt: skip


@pytest.mark.parametrize("what", FIELDS)
def test_numbers_that_are_none_are_found(what: str) -> None:
    chain, spec, at, bad = FIELDS[what]
    good = packed(chain, spec=spec)
    start = int(read(good).offsets[0, 0])
    assert torch.isfinite(opened(chain, good, spec)).all()
    for number in bad:
        data = good.copy()
        data[start + at : start + at + len(number)] = np.frombuffer(number, np.uint8)
        resign(data)
        with pytest.raises(CorruptBlock):
            opened(chain, data, spec)


@pytest.mark.parametrize("chain", ["prerope|kv4", "prerope|mikv", "prerope|lowrank(rank=50)", "prerope|fp8"])
def test_numbers_that_turning_makes_too_large_are_found(chain: str) -> None:
    spec = dataclasses.replace(ONE, position=1)  # at position 0 keys are not turned
    data = packed(chain, spec=spec)
    start = int(read(data).offsets[0, 0])
    if "fp8" in chain:
        scales, codes = 2 * 64 * 2, 2 * 64 * 2 * 16
        data[start : start + scales], data[start + scales : start + scales + codes] = 246, 0x7E
    else:
        most = torch.full((2, 3, 32), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
        data[start : start + 2 * most.numel()] = most.view(torch.uint8).view(-1).numpy()
    resign(data)
    with pytest.raises(CorruptBlock, match="range"):
        opened(chain, data, spec)


# -- groups and planes that do not fit ---------------------------------------------------------------------------------


def renamed(data: np.ndarray, old: str, new: str) -> np.ndarray:
    """The same block, said to be of another chain by a header with a right checksum."""
    found = np.frombuffer(data.tobytes().replace(old.encode(), new.encode(), 1), np.uint8).copy()
    assert len(old) == len(new)
    resign(found, parts=False)
    return found


@pytest.mark.parametrize(
    ("chain", "old", "new"),
    [("kv4", "group=64", "group=32"), ("mikv", "group=64", "group=16"), ("kv4(k=8,v=8)", "k=8,v=8", "k=8,v=4"),
     ("mikv", "share=25", "share=75"), ("kv4", "sinks=4", "sinks=0"), ("fp8", "scale=head", "scale=x...")],
)  # fmt: skip
def test_a_header_that_names_other_groups_or_bits_is_refused(chain: str, old: str, new: str) -> None:
    data = renamed(packed(chain), old, new)
    with pytest.raises((CorruptBlock, CodecError)):
        opened(read(data).chain, data)


@pytest.mark.parametrize("planes", [0, 8, 99])
def test_planes_that_are_not_there_cannot_be_asked_for(planes: int) -> None:
    with pytest.raises(CannotDecode, match="planes"):
        opened("kv4(k=8,v=8)", packed("kv4(k=8,v=8)"), planes=planes)


@pytest.mark.parametrize("chain", ["kv4(k=8,v=8)", "mikv", PCA])
def test_planes_cut_off_in_their_middle_are_not_read(chain: str) -> None:
    data = packed(chain)
    frame = read(data)
    for planes in range(1, frame.planes):
        end = (frame.nbytes(planes) + frame.nbytes(planes + 1)) // 2
        assert torch.isfinite(opened(chain, data[:end], planes=planes)).all()
        if end < frame.nbytes(planes + 1):
            with pytest.raises(CorruptBlock, match="cut off"):
                opened(chain, data[:end], planes=planes + 1)


# -- bases -------------------------------------------------------------------------------------------------------------


def resealed(change: Callable[[dict], object], arrays: Callable[[bytes], bytes] = lambda data: data) -> bytes:
    """The basis with another header, or other arrays, and a digest that is right."""
    data = BASIS.to_bytes()
    length = struct.unpack_from("<I", data, 4)[0]
    header = msgspec.json.decode(data[8 : 8 + length])
    change(header)
    text = msgspec.json.encode(header)
    body = b"KVB1" + struct.pack("<I", len(text)) + text + arrays(data[8 + length : -32])
    return body + hashlib.sha256(body).digest()


def nothing(header: dict) -> None:
    del header


def test_a_basis_comes_back() -> None:
    assert resealed(nothing) == BASIS.to_bytes()
    assert read_basis(BASIS.to_bytes()).digest == BASIS.digest


@pytest.mark.parametrize(
    "data",
    [
        b"", b"KVB1", b"KVB2" + BASIS.to_bytes()[4:], BASIS.to_bytes()[:-1], BASIS.to_bytes() + b"x",
        resealed(lambda header: header.update(layers=1 << 30)),
        resealed(lambda header: header.update(span=0)),
        resealed(lambda header: header.update(kv_heads=1)),
        resealed(lambda header: header.update(kinds=["v"])),
        resealed(lambda header: header.update(ranks=header["ranks"][:1])),
        resealed(lambda header: header.update(ranks=[[1 << 40], [1]])),
        resealed(lambda header: header.update(ranks=[[0], [1]])),
        resealed(lambda header: header.update(more="x")),
        resealed(lambda header: header.pop("rotary")),
        resealed(nothing, lambda arrays: arrays[:-2]),
        resealed(nothing, lambda arrays: arrays + bytes(64)),
        resealed(nothing, lambda arrays: arrays[:4] + np.float32(np.nan).tobytes() + arrays[8:]),
        resealed(nothing, lambda arrays: arrays[:-2] + np.float16(np.inf).tobytes()),
    ],
)  # fmt: skip
def test_what_is_no_basis(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CannotDecode):
        read_basis(data)
    (tmp_path / "a.basis").write_bytes(data)
    with pytest.raises(CannotDecode):
        load_basis(tmp_path / "a.basis")


def test_a_basis_whose_products_are_no_numbers_is_refused() -> None:
    part = BASIS.groups[0][0]
    at = 4 * (
        len(part.mean) + len(part.spread)
    )  # the largest of the first column; of all columns and rows, then the rest
    first = at + 2 * 4 * len(part.spread)

    def huge(arrays: bytes) -> bytes:
        column, half = np.float32(3e38).tobytes(), np.float16(60_000).tobytes()
        return arrays[:at] + column + arrays[at + 4 : first] + half + arrays[first + 2 :]

    with pytest.raises(CannotDecode, match="finite"):
        read_basis(resealed(nothing, huge))


def test_a_basis_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.basis").write_bytes(BASIS.to_bytes())
    monkeypatch.setattr("kvstore.codecs.basis.MAX_BYTES", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(CannotDecode, match="larger"):
        load_basis(tmp_path / "a.basis")


OTHER_HEADS = made_basis(BlockSpec(4, 64, 1, 32))
OTHER_NUMBERS = dataclasses.replace(
    BASIS,
    groups=tuple(tuple(Part(p.mean + 1, p.forward, p.inverse, p.spread) for p in g) for g in BASIS.groups),
    _bytes=[],
)
OTHER_ROTATION = made_basis(turned=Rotary(tuple(0.5**i for i in range(8))))
FEWER_LAYERS = made_basis(BlockSpec(2, 64, 2, 16))


@pytest.mark.parametrize("there", [None, OTHER_HEADS, OTHER_NUMBERS, OTHER_ROTATION, FEWER_LAYERS, "no basis"])
def test_a_basis_that_is_missing_or_of_another_model(there: object) -> None:
    data = packed(PCA)
    context = dataclasses.replace(CONTEXT, bases={} if there is None else {BASIS.digest: there})
    with pytest.raises(CannotDecode):
        opened(PCA, data, context=context)
    if there not in (OTHER_NUMBERS, OTHER_ROTATION):
        with pytest.raises(CannotEncode):
            packed(PCA, context=context)


# -- profiles ----------------------------------------------------------------------------------------------------------

LOSSY = Namespace(model="m", revision="1", dtype="bfloat16", layers=4, kv_heads=2, head_dim=16, layout="lkthd1",
                  block_tokens=64, fidelity="lossy:small")  # fmt: skip
EXACT = msgspec.structs.replace(LOSSY, fidelity="exact")
PROFILE = Profile(
    name="small", model="m", revision="1", layers=4, kv_heads=2, head_dim=16, frequencies=list(rotary(16).frequencies),
    basis=BASIS.digest, rungs=[Rung(PCA, 0, 0.001, 0.001, 0.99, 0.0, 4.0, 1.0, 1.0)],
)  # fmt: skip


def test_a_profile_needs_the_basis_of_its_model(tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path, BASIS)
    assert len(Profiles(tmp_path)) == 1
    file = tmp_path / f"{BASIS.digest}.basis"
    for other in (made_basis(model="x"), OTHER_HEADS, OTHER_NUMBERS, OTHER_ROTATION):
        file.write_bytes(other.to_bytes())
        with pytest.raises(ConfigError, match="another model"):
            Profiles(tmp_path)
    file.write_bytes(BASIS.to_bytes()[:-1])
    with pytest.raises(ConfigError, match="digest"):
        Profiles(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match="calibrate"):
        Profiles(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"version": 2}, "version"), ({"kl": 1}, "unknown"), ({"least_top1": 2}, "<= 1"), ({"name": "../x"}, "name")],
)
def test_what_is_no_profile(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = save_profile(PROFILE, tmp_path, BASIS)
    fields = msgspec.json.decode(path.read_bytes()) | change
    path.write_bytes(msgspec.json.encode(fields))
    with pytest.raises(ConfigError, match=says):
        load_profile(path)


def test_a_profile_with_a_chain_that_is_unknown_or_too_large_to_be_one(tmp_path: Path) -> None:
    path = save_profile(PROFILE, tmp_path, BASIS)
    path.write_bytes(path.read_bytes().replace(b"prerope|pca", b"prerope|hyper"))
    with pytest.raises(ConfigError, match="not known"):
        load_profile(path)
    path.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ConfigError, match="too large"):
        load_profile(path)


KV4 = msgspec.structs.replace(PROFILE.rungs[0], chain="prerope|kv4")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"basis": ""}, "basis"),
        ({"rungs": [msgspec.structs.replace(KV4, planes=9)]}, "9 of 3 planes"),
        ({"rungs": [msgspec.structs.replace(KV4, chain="prerope|kv4|seal")]}, "sealing key"),
        ({"rungs": [msgspec.structs.replace(KV4, chain="lossless")]}, "loses nothing"),
        ({"rungs": [KV4], "frequencies": [1.0] * 9}, "do not fit a head"),
        ({"rungs": [KV4], "frequencies": []}, "at least one"),
        ({"rungs": [KV4], "layers": 1 << 40}, "layers"),
        ({"rungs": [KV4], "kv_heads": -2}, "kv_heads"),
    ],
)  # fmt: skip
def test_a_profile_whose_rungs_cannot_encode_its_model_is_refused(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    fields = {"basis": ""} if "rungs" in change else {}
    save_profile(msgspec.structs.replace(PROFILE, **(fields | change)), tmp_path)
    with pytest.raises(ConfigError, match=says) as found:
        Profiles(tmp_path)
    assert "calibrate" in found.value.remedy


def test_an_old_copy_of_a_profile_beside_it_is_refused(tmp_path: Path) -> None:
    path = save_profile(PROFILE, tmp_path, BASIS)
    path.with_name("small.of-yesterday.json").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"holds profile 'small', which stands in small\.json"):
        Profiles(tmp_path)


# -- in a tier ---------------------------------------------------------------------------------------------------------


def bomb(declared: int | None) -> bytes:
    """64 MiB of zeros, compressed, said to be of another size in the header of the frame, or of none."""
    data = zstandard.ZstdCompressor(write_content_size=declared is not None).compress(bytes(64 << 20))
    if declared is None:
        return data
    assert struct.pack("<I", 64 << 20) in data[:12]
    return data.replace(struct.pack("<I", 64 << 20), struct.pack("<I", declared), 1)


def with_part(data: np.ndarray, part: bytes) -> np.ndarray:
    """A block of one part, whose part is another."""
    frame = read(data)
    assert (frame.planes, frame.units) == (1, 1)
    head = data[: int(frame.offsets[0, 0])].copy()
    entry = struct.pack("<QQ", len(part), xxhash.xxh3_64_intdigest(part))
    head[len(frame.label) : len(frame.label) + 16] = np.frombuffer(entry, np.uint8)
    resign(head, parts=False)
    return np.concatenate([head, np.frombuffer(part, np.uint8)])


@pytest.mark.parametrize("declared", [None, 64 << 20, SPEC.nbytes])
def test_a_bomb_takes_no_more_memory_than_its_block(declared: int | None) -> None:
    data = with_part(packed("raw|zstd"), b"\x01" + bomb(declared))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlock):
            opened("raw|zstd", data)
        assert tracemalloc.get_traced_memory()[1] < 8 * SPEC.nbytes
    finally:
        tracemalloc.stop()


def whole(fill: np.ndarray, namespace: Namespace) -> memoryview:
    """A payload as a tier keeps it: an even number of bytes, no whole tokens."""
    form = form_of(namespace)
    assert form is not None
    view = pages(form.marked(fill.size, by_engine=False))
    view[: fill.size] = fill.tobytes()
    return view


BAD: dict[str, Callable[[], np.ndarray]] = {
    "a basis that is not here": lambda: renamed(packed(PCA), BASIS.digest, "0" * 32),
    "a codec to come": lambda: renamed(packed("kv4"), "kv4(", "kv5("),
    "a group of nothing": lambda: renamed(packed("kv4"), "group=64", "group=00"),
    "another group": lambda: renamed(packed("kv4"), "group=64", "group=32"),
    "no plane at all": lambda: packed("kv4(k=8,v=8)")[: int(read(packed("kv4(k=8,v=8)")).offsets[0, 0]) + 100],
    "a header cut off": lambda: packed("kv4")[:50],
    "another shape": lambda: packed("kv4", spec=dataclasses.replace(SPEC, tokens=32)),
    "a bomb": lambda: with_part(packed("raw|zstd"), b"\x01" + bomb(SPEC.nbytes)),
    "noise": lambda: np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
async def test_a_tier_makes_a_miss_of_it_and_drops_it(tmp_path: Path, what: str) -> None:
    save_profile(PROFILE, tmp_path / "profiles", BASIS)
    scope = Scope("u0", namespace_digest(LOSSY))
    disk = DiskTier(tmp_path / "disk", 8 << 20)
    tier = Ladder(disk, {scope: LOSSY}.get, profiles=Profiles(tmp_path / "profiles"))
    await tier.start()
    block, header = BlockId(scope, bytes(32)), BlockHeader()
    payload = whole(BAD[what](), LOSSY)
    assert isinstance(await disk.put(block, header, [payload], payload.nbytes), Stored)
    assert tier.size(block) == SPEC.nbytes
    into = pages(SPEC.nbytes)
    assert isinstance(await tier.get(block, [into]), Miss)
    assert tier.size(block) is None
    assert disk.counters.corrupt + tier.undecodable == 1
    good = as_raw()
    assert isinstance(await tier.put(block, header, [good], good.nbytes), Stored)
    assert isinstance(await tier.get(block, [into]), Hit)
    await tier.close()


def as_raw() -> memoryview:
    view = pages(SPEC.nbytes)
    view[:] = block_of(SPEC).view(-1).view(torch.uint8).numpy().tobytes()
    return view


def test_what_is_cut_to_no_plane_or_named_as_no_rung_is_not_kept(tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path, BASIS)
    encoding, form = Encoding("raw", Profiles(tmp_path)), form_of(LOSSY)
    assert form is not None
    for name in ("another group", "a basis that is not here", "no plane at all", "noise"):
        with pytest.raises((CorruptBlock, CodecError)):
            encoding.kept(form, BlockHeader(), whole(BAD[name](), LOSSY))
    found = encoding.encode(form, BlockHeader(), [as_raw()], parse(PCA))
    assert found is not None
    assert encoding.kept(form, BlockHeader(), found.data).rung == 0
