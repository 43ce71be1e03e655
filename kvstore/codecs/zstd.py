"""zstd: entropy coding of each part (RFC 8878). A part starts with one byte: 1 if it is compressed, 0 if it would
not shrink.

So no part grows by more than that byte, and the bound is known before; the size is known once the part is encoded.

Level 1, the default, hardly looks for repetitions: bytes of numbers have few, and looking takes longer than the entropy
coding that all is gained by. On KV of a model it makes exact blocks and ``pca`` smaller than zstd's own level 1 does
(``bench/codecs.py``). Any frame of zstd's can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import zstandard

from kvstore.codecs.base import Bytes, ByteStep, Context
from kvstore.errors import CannotEncode, CorruptBlock

_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7,
    target_length=0, write_content_size=True, write_checksum=False,
)  # fmt: skip
"""The smallest table of places and the longest least repetition: runs are found, and little else."""


@dataclass(frozen=True)
class Zstd(ByteStep):
    """Compress each part.

    Attributes
    ----------
    level : int
        1 to 19: how much repetitions are looked for.
    """

    level: int = 1
    name: ClassVar[str] = "zstd"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise CannotEncode(f"zstd has no level {self.level} here (1 to 19).")

    def _compressor(self) -> zstandard.ZstdCompressor:
        if self.level == 1:
            return zstandard.ZstdCompressor(compression_params=_ENTROPY)
        return zstandard.ZstdCompressor(level=self.level, write_checksum=False)

    def bound(self, nbytes: int) -> int:
        return nbytes + 1

    def encode(self, data: Bytes, label: bytes, context: Context) -> Bytes:
        del label, context
        packed = self._compressor().compress(data.data)
        if len(packed) < data.size:
            return np.frombuffer(b"\x01" + packed, np.uint8)
        return np.concatenate([np.zeros(1, np.uint8), data])

    def decode(self, data: Bytes, nbytes: int, label: bytes, context: Context) -> Bytes:
        del label, context
        if not data.size or data[0] > 1:
            raise CorruptBlock("a part does not say whether it is compressed.")
        body = data[1:]
        if not data[0]:
            return body
        try:
            if zstandard.frame_content_size(body.data) != nbytes:
                raise CorruptBlock(f"a compressed part does not hold {nbytes} bytes.")
            return np.frombuffer(zstandard.ZstdDecompressor().decompress(body.data), np.uint8)
        except zstandard.ZstdError as error:
            raise CorruptBlock(f"a compressed part cannot be read: {error}.") from None
