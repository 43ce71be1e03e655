"""zstd: entropy coding of each part (RFC 8878). A part starts with one byte: 1 if it is compressed, 0 if it would
not shrink.

So no part grows by more than that byte, and the bound is known before; the size is known once the part is encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import zstandard

from kvstore.codecs.base import Bytes, ByteStep, Context
from kvstore.errors import CannotEncode, CorruptBlock


@dataclass(frozen=True)
class Zstd(ByteStep):
    """Compress each part.

    Attributes
    ----------
    level : int
        1 to 19.
    """

    level: int = 1
    name: ClassVar[str] = "zstd"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise CannotEncode(f"zstd has no level {self.level} here (1 to 19).")

    def bound(self, nbytes: int) -> int:
        return nbytes + 1

    def encode(self, data: Bytes, label: bytes, context: Context) -> Bytes:
        del label, context
        packed = zstandard.ZstdCompressor(level=self.level, write_checksum=False).compress(data.data)
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
