"""Codecs: how a block becomes fewer bytes. See docs/codecs.md.

`parse` makes a `Chain` of a name; a chain says exact sizes, encodes into a buffer and decodes into a tensor.
"""

from kvstore.codecs.base import BlockCoder, BlockSpec, BlockStep, ByteStep, Context
from kvstore.codecs.chain import Chain
from kvstore.codecs.frame import Frame, read
from kvstore.codecs.registry import STEPS, parse

__all__ = ["STEPS", "BlockCoder", "BlockSpec", "BlockStep", "ByteStep", "Chain", "Context", "Frame", "parse", "read"]
