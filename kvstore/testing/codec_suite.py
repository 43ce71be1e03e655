"""The contract of a codec chain as tests. A codec's test file subclasses `CodecSuite` and says how to make the chain.

    class TestMyCodec(CodecSuite):
        chain = "mycodec(bits=5)|zstd"

        def context(self, spec: BlockSpec) -> Context:
            return Context(bases={...})

Blocks are drawn from fixed seeds, with outliers in some channels as real keys have them.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch
import xxhash

from kvstore.codecs import BlockSpec, Chain, Context, parse, read
from kvstore.errors import CannotDecode, CannotEncode, CodecError, CorruptBlock

SPECS = (
    BlockSpec(3, 64, 2, 16),
    BlockSpec(2, 37, 3, 8, "float16", position=5),
    BlockSpec(1, 1, 1, 8, "float32"),
    BlockSpec(4, 130, 1, 24, "bfloat16", position=256),
    BlockSpec(2, 3, 2, 16, "float32", position=2),
)
"""Whole and partial groups, one token, sinks inside and outside, three dtypes."""
EMPTY = BlockSpec(2, 0, 2, 16)
_ROUNDING = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-18}


def block_of(spec: BlockSpec, seed: int = 0) -> torch.Tensor:
    """A block of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(spec.shape, generator=generator)
    values[:, 0] *= 1 + 10 * (torch.rand(spec.shape[3:], generator=generator) > 0.9)
    values[:, 0] += torch.randn(spec.shape[3:], generator=generator)
    return values.to(spec.torch_dtype)


class CodecSuite:
    """What every chain keeps to."""

    chain: str
    specs: tuple[BlockSpec, ...] = SPECS
    empty: BlockSpec = EMPTY
    drift: float = 0.7
    """What a second trip may add, as a share of what the first one lost."""

    def context(self, spec: BlockSpec) -> Context:
        """What the steps need for such blocks."""
        del spec
        return Context()

    def made(self) -> Chain:
        """The chain."""
        return parse(self.chain)

    def packed(self, block: torch.Tensor, spec: BlockSpec, context: Context | None = None) -> np.ndarray:
        """A block, encoded."""
        context = context or self.context(spec)
        chain = self.made()
        out = np.full(chain.bound(spec, context) + 16, 0xA5, np.uint8)
        used = chain.encode(block, spec, out, context)
        assert used <= chain.bound(spec, context)
        assert (out[chain.bound(spec, context) :] == 0xA5).all(), "written past the bound"
        return out[:used].copy()

    def opened(self, data: np.ndarray, spec: BlockSpec, context: Context | None = None, **how: int) -> torch.Tensor:
        """An encoded block, decoded into memory that held something else."""
        out = torch.full(spec.shape, float("nan")).to(spec.torch_dtype)
        self.made().decode(data, spec, out, context or self.context(spec), **how)  # pyright: ignore[reportArgumentType]
        return out

    def all_planes(self, spec: BlockSpec) -> list[int]:
        """The numbers of planes that such a block can be read from."""
        coder = self.made().coder
        count = read(self.packed(block_of(spec), spec)).planes
        return list(range(coder.required() or count, count + 1))

    # -- round trip ---------------------------------------------------------------------------------------------------

    def test_the_name_says_everything(self) -> None:
        assert parse(str(self.made())) == self.made()

    def test_round_trip(self) -> None:
        for spec in self.specs:
            block = block_of(spec)
            kept = block.clone()
            got = self.opened(self.packed(block, spec), spec)
            assert torch.equal(block, kept), "encoding changed its input"
            assert torch.isfinite(got).all()
            if not self.made().lossy:
                assert torch.equal(got.view(torch.uint8), block.view(torch.uint8))

    def test_the_same_block_takes_the_same_bytes(self) -> None:
        if any(step.name == "seal" for step in self.made().steps):
            pytest.skip("sealed parts have a nonce")
        for spec in self.specs:
            assert np.array_equal(self.packed(block_of(spec), spec), self.packed(block_of(spec), spec))

    def test_an_exact_size_is_exact(self) -> None:
        if not self.made().exact_size:
            pytest.skip("known once encoded")
        for spec in self.specs:
            assert self.packed(block_of(spec), spec).size == self.made().bound(spec, self.context(spec))

    def test_what_was_decoded_encodes_to_nearly_itself(self) -> None:
        """What is stored again and again does not wander off."""
        for spec in self.specs:
            first = self.opened(self.packed(block_of(spec), spec), spec)
            second = self.opened(self.packed(first, spec), spec).float()
            lost = (first.float() - block_of(spec).float()).norm()
            rounding = _ROUNDING[spec.dtype] * first.float().norm()
            assert (second - first.float()).norm() <= self.drift * lost + rounding

    def test_the_declared_error_holds(self) -> None:
        chain = self.made()
        for spec in self.specs:
            block, context = block_of(spec), self.context(spec)
            data = self.packed(block, spec)
            for planes in self.all_planes(spec):
                got = self.opened(data, spec, planes=planes)
                bound = chain.tolerance(block, spec, context, planes=planes)
                if bound is None:
                    continue
                rounding = _ROUNDING[spec.dtype] * (block.float().abs() + bound + block.float().abs().amax())
                slack = rounding if chain.lossy else torch.zeros(())
                assert ((got.float() - block.float()).abs() <= bound + slack).all()

    def test_more_planes_are_not_worse(self) -> None:
        spec = self.specs[0]
        data = self.packed(block_of(spec), spec)
        errors = [
            float((self.opened(data, spec, planes=planes).float() - block_of(spec).float()).norm())
            for planes in self.all_planes(spec)
        ]
        assert errors == sorted(errors, reverse=True)

    def test_a_prefix_of_the_bytes_is_enough_for_its_planes(self) -> None:
        for spec in self.specs:
            data = self.packed(block_of(spec), spec)
            for planes in self.all_planes(spec):
                cut = data[: read(data).nbytes(planes)]
                assert torch.equal(self.opened(cut, spec, planes=planes), self.opened(data, spec, planes=planes))
                with pytest.raises(CorruptBlock):
                    self.opened(cut[:-1], spec, planes=planes)

    def test_layers_can_be_read_alone(self) -> None:
        spec = self.specs[0]
        context, chain = self.context(spec), self.made()
        data = self.packed(block_of(spec), spec)
        whole = self.opened(data, spec)
        span = chain.coder.span(spec, context)
        for first in range(0, spec.layers, span):
            part = range(first, min(first + span, spec.layers))
            out = torch.empty(spec.of(len(part)).shape, dtype=spec.torch_dtype)
            chain.decode(data, spec, out, context, layers=part)
            assert torch.equal(out, whole[first : part.stop])
        if span > 1:
            with pytest.raises(CannotDecode):
                chain.decode(
                    data, spec, torch.empty(spec.of(1).shape, dtype=spec.torch_dtype), context, layers=range(1)
                )

    # -- odd blocks ---------------------------------------------------------------------------------------------------

    def test_no_tokens(self) -> None:
        assert self.opened(self.packed(block_of(self.empty), self.empty), self.empty).numel() == 0

    @pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 2.0**-20])
    def test_constant_blocks(self, value: float) -> None:
        for spec in self.specs:
            block = torch.full(spec.shape, value).to(spec.torch_dtype)
            got = self.opened(self.packed(block, spec), spec)
            bound = self.made().tolerance(block, spec, self.context(spec))
            assert torch.isfinite(got).all()
            if bound is not None:
                assert ((got.float() - block.float()).abs() <= bound + 0.03 * abs(value)).all()

    def test_values_that_are_not_finite(self) -> None:
        for spec in self.specs:
            for bad in (float("nan"), float("inf"), float("-inf")):
                block = block_of(spec)
                block[0, 1, -1, 0, 3] = bad
                if self.made().coder.native:
                    got = self.opened(self.packed(block, spec), spec)
                    assert torch.equal(got.view(torch.uint8), block.view(torch.uint8))
                else:
                    with pytest.raises(CannotEncode):
                        self.packed(block, spec)

    def test_enormous_values_are_kept_or_refused(self) -> None:
        spec = self.specs[0]
        block = block_of(spec)
        block[:, :, 5] = 3e38
        try:
            data = self.packed(block, spec)
        except CannotEncode:
            return
        assert torch.isfinite(self.opened(data, spec)).all()

    def test_a_block_of_another_shape_is_refused(self) -> None:
        spec = self.specs[0]
        with pytest.raises(CannotEncode):
            self.packed(block_of(dataclasses.replace(spec, tokens=spec.tokens + 1)), spec, self.context(spec))
        with pytest.raises(CannotEncode):
            self.packed(block_of(spec).to(torch.float64), spec)
        with pytest.raises(CannotEncode):
            self.made().encode(block_of(spec), spec, np.empty(10, np.uint8), self.context(spec))

    # -- bytes of strangers -------------------------------------------------------------------------------------------

    def test_another_block_is_expected(self) -> None:
        spec = self.specs[0]
        data = self.packed(block_of(spec), spec)
        for other in (
            dataclasses.replace(spec, position=spec.position + 1),
            dataclasses.replace(spec, layers=spec.layers - 1),
            dataclasses.replace(spec, dtype="float16"),
        ):
            with pytest.raises(CodecError):
                self.opened(data, other, self.context(spec))

    def test_every_cut_is_noticed(self) -> None:
        spec = self.specs[1]
        data = self.packed(block_of(spec), spec)
        for end in [*range(min(600, data.size)), *range(0, data.size, 97)]:
            with pytest.raises((CorruptBlock, CannotDecode)):
                self.opened(data[:end], spec)

    def test_every_flipped_bit_is_noticed(self) -> None:
        spec = self.specs[1]
        data = self.packed(block_of(spec), spec)
        rng = np.random.default_rng(0)
        for at in [*range(min(500, data.size)), *rng.integers(0, data.size, 200)]:
            bad = data.copy()
            bad[at] ^= 1 << int(rng.integers(8))
            with pytest.raises((CorruptBlock, CannotDecode)):
                self.opened(bad, spec)

    def test_rewritten_parts_never_crash(self) -> None:
        """Bytes that somebody wrote who can make checksums: a typed error or finite numbers, nothing else."""
        spec = self.specs[0]
        data = self.packed(block_of(spec), spec)
        rng = np.random.default_rng(1)
        exact = self.made().coder.native
        for turn in range(60):
            bad = data.copy()
            parsed = read(bad)
            plane, unit = int(rng.integers(parsed.planes)), int(rng.integers(parsed.units))
            at, size = int(parsed.offsets[plane, unit]), int(parsed.sizes[plane, unit])
            if not size:
                continue
            where = at + rng.integers(0, size, max(1, size // 50 if turn % 2 else size))
            bad[where] = rng.integers(0, 256, where.size) if turn % 3 else 0xFF
            resign(bad)
            try:
                got = self.opened(bad, spec)
            except (CorruptBlock, CannotDecode):
                continue
            assert exact or torch.isfinite(got).all()

    def test_a_directory_that_promises_too_much_is_refused(self) -> None:
        spec = self.specs[0]
        data = self.packed(block_of(spec), spec)
        parsed = read(data)
        for size in (0, 1 << 20, 1 << 40, (1 << 63) + 5):
            bad = data.copy()
            bad[len(parsed.label) : len(parsed.label) + 8] = np.frombuffer(struct.pack("<Q", size), np.uint8)
            resign(bad, parts=False)
            with pytest.raises((CorruptBlock, CannotDecode)):
                self.opened(bad, spec)


def resign(data: np.ndarray, *, parts: bool = True) -> None:
    """Make the checksums of changed parts, and of the header, right again, in place."""
    try:
        parsed = read(data)
        start = len(parsed.label)
        if parts:
            entries = data[start : start + 16 * parsed.units * parsed.planes].view("<u8").reshape(-1, 2)
            for index, (at, size) in enumerate(zip(parsed.offsets.ravel(), parsed.sizes.ravel(), strict=True)):
                entries[index, 1] = xxhash.xxh3_64_intdigest(data[int(at) : int(at + size)].tobytes())
    except (CodecError, CorruptBlock):
        pass
    chain, refs = struct.unpack_from("<HH", data.tobytes(), 4)
    planes, units = struct.unpack_from("<BH", data.tobytes(), 33)
    end = -(-(36 + chain + refs + 16 * planes * units + 8) // 64) * 64
    data[end - 8 : end] = np.frombuffer(
        struct.pack("<Q", xxhash.xxh3_64_intdigest(data[: end - 8].tobytes())), np.uint8
    )
