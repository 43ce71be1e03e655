"""Every chain of codecs passes the shipped suite."""

from __future__ import annotations

import pytest
import torch

from kvstore.codecs import BlockSpec, Context
from kvstore.rope import Rotary
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
    "raw|seal",
    "prerope|kv4|zstd|seal",
)


@pytest.fixture(params=CHAINS, autouse=True)
def name(request: pytest.FixtureRequest) -> None:
    if request.instance is not None:
        request.instance.chain = request.param


class TestChains(CodecSuite):
    @property
    def drift(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """mikv cuts the codes of a finer quantizer off, which moves the ends of a group."""
        return 1.2 if "mikv" in self.chain else 0.7

    def context(self, spec: BlockSpec) -> Context:
        return Context(
            rotary=Rotary(tuple(10_000.0 ** (-i / spec.head_dim) for i in range(0, spec.head_dim, 2))),
            importance=torch.rand(spec.tokens, generator=torch.Generator().manual_seed(3)),
            keys={"default": b"\x07" * 32},
            identity=b"block",
        )
