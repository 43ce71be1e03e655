"""Every chain of codecs passes the shipped suite."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from codec_kit import made_basis, rotary

from kvstore.codecs import BlockSpec, Context
from kvstore.testing.codec_suite import CodecSuite

CHAINS = (
    "raw",
    "raw|zstd",
    "lossless",
    "byteplanes|zstd(level=9)",
    "fp8",
    "fp8(scale=token)|zstd",
    "prerope|fp8",
    "kv4",
    "kv4(k=2,v=2,group=32)",
    "kv4(k=4,v=3,group=128)",
    "kv4(k=8,v=8,group=32,sinks=0)",
    "kv4(k=3,v=4)|zstd",
    "prerope|kv4",
    "prerope|kv4(k=8,v=8)",
    "mikv",
    "mikv(hi=4,lo=2,share=50)",
    "mikv(share=0)",
    "prerope|mikv(share=100)|zstd",
    "prerope|lowrank(rank=100)",
    "prerope|lowrank(rank=40,v=4)|zstd",
    "prerope|minicache(layers=3,start=0)",
    "minicache(layers=4,start=50,bits=4,kept=20)",
    "raw|seal",
    "prerope|kv4|zstd|seal",
)


BASES = [made_basis(BlockSpec(3, 400, 2, 16), joint=joint, seeds=2) for joint in (True, False)]


class TestChains(CodecSuite):
    @pytest.fixture(params=CHAINS, autouse=True)
    def name(self, request: pytest.FixtureRequest) -> None:
        self.chain = request.param

    @property
    def drift(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Cutting codes off moves the ends of a group, and merged vectors have other angles: both wander."""
        return 1.2 if "mikv" in self.chain or "minicache" in self.chain else 0.7

    def context(self, spec: BlockSpec) -> Context:
        return Context(
            rotary=rotary(spec.head_dim),
            importance=torch.rand(spec.tokens, generator=torch.Generator().manual_seed(3)),
            keys={"default": b"\x07" * 32},
            identity=b"block",
        )


class TestPCA(CodecSuite):
    specs: ClassVar[tuple[BlockSpec, ...]] = (  # pyright: ignore[reportIncompatibleVariableOverride]
        BlockSpec(3, 64, 2, 16),
        BlockSpec(3, 37, 2, 16, "float16", position=2),
        BlockSpec(3, 1, 2, 16, "float32", position=256),
        BlockSpec(3, 3, 2, 16),
    )
    empty = BlockSpec(3, 0, 2, 16)

    @pytest.fixture(params=[(0, 50), (0, 5000), (1, 300)], autouse=True)
    def name(self, request: pytest.FixtureRequest) -> None:
        which, step = request.param
        self.chain = f"prerope|pca(basis={BASES[which].digest},step={step})|zstd"

    def context(self, spec: BlockSpec) -> Context:
        return Context(rotary=rotary(spec.head_dim), bases={basis.digest: basis for basis in BASES})
