"""seal: AES-256-GCM over each part, last in a chain. What is stored says nothing, and cannot be changed or moved
unnoticed.

A sealed part is a random nonce of 12 bytes, the ciphertext, a tag of 16 bytes. The additional data is the block's
identity, the header before the directory (chain, shape, position) and the part's place, so a part of another block,
or another part of this one, does not open.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstore.codecs.base import Bytes, ByteStep, Context, need
from kvstore.errors import CannotDecode, CannotEncode, CorruptBlock

NONCE, TAG = 12, 16


@dataclass(frozen=True)
class Seal(ByteStep):
    """Encrypt each part.

    Attributes
    ----------
    key : str
        Id of the key in the context; 32 bytes.
    """

    key: str = "default"
    name: ClassVar[str] = "seal"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]{1,64}", self.key):
            raise CannotEncode(f"a key id is of letters, digits and underscores, not {self.key!r}.")

    def _cipher(self, context: Context, *, encoding: bool) -> AESGCM:
        key = need(context.keys.get(self.key), f"the sealing key {self.key!r}", encoding=encoding)
        if len(key) != 32:
            raise (CannotEncode if encoding else CannotDecode)(f"the sealing key {self.key!r} is not of 32 bytes.")
        return AESGCM(key)

    def bound(self, nbytes: int) -> int:
        return nbytes + NONCE + TAG

    def encode(self, data: Bytes, label: bytes, context: Context) -> Bytes:
        nonce = os.urandom(NONCE)
        cipher = self._cipher(context, encoding=True)
        return np.frombuffer(nonce + cipher.encrypt(nonce, data.tobytes(), context.identity + label), np.uint8)

    def decode(self, data: Bytes, nbytes: int, label: bytes, context: Context) -> Bytes:
        cipher = self._cipher(context, encoding=False)
        if not NONCE + TAG <= data.size <= self.bound(nbytes):
            raise CorruptBlock("a sealed part has a wrong size.")
        try:
            opened = cipher.decrypt(data[:NONCE].tobytes(), data[NONCE:].tobytes(), context.identity + label)
        except InvalidTag:
            raise CorruptBlock("a sealed part does not open: another key, another block, or changed bytes.") from None
        return np.frombuffer(opened, np.uint8)
