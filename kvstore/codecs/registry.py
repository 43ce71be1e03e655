"""Chains by name, as in ``prerope|kv4(k=4,v=4)|zstd``. A name is in each block's header: text of strangers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from kvstore.codecs.base import BlockCoder, BlockStep, ByteStep, Step
from kvstore.codecs.byteplanes import BytePlanes
from kvstore.codecs.chain import Chain
from kvstore.codecs.fp8 import FP8
from kvstore.codecs.kv4 import KV4
from kvstore.codecs.lowrank import LowRank
from kvstore.codecs.mikv import MiKV
from kvstore.codecs.minicache import MiniCache
from kvstore.codecs.pca import PCA
from kvstore.codecs.prerope import PreRope
from kvstore.codecs.raw import Raw
from kvstore.codecs.seal import Seal
from kvstore.codecs.zstd import Zstd
from kvstore.errors import CannotDecode

STEPS: Mapping[str, type[Step]] = {
    step.name: step for step in (PreRope, Raw, BytePlanes, FP8, KV4, MiKV, PCA, LowRank, MiniCache, Zstd, Seal)
}
"""Every step there is, by name."""

SHORT: Mapping[str, str] = {"lossless": "byteplanes|zstd"}
"""Names that stand for several steps."""

S = TypeVar("S", bound=Step)
_STEP = re.compile(r"([a-z][a-z0-9_]{0,31})(?:\(([a-z0-9_=,.]{0,255})\))?")


def parse(name: str) -> Chain:
    """The chain of a name.

    Raises
    ------
    CannotDecode
        A step or a parameter of it is not known, or the order is not blocks, coder, bytes.
    CannotEncode
        A parameter has a value that the step does not take.
    """
    if len(name) > 4096:
        raise CannotDecode("a chain's name is too long.")
    steps = [_step(text) for part in name.split("|") for text in SHORT.get(part, part).split("|")]
    coders = [i for i, step in enumerate(steps) if isinstance(step, BlockCoder)]
    if len(coders) != 1:
        raise CannotDecode(f"chain {name!r} has {len(coders)} block coders instead of one.")
    (at,) = coders
    before, after = _all(steps[:at], BlockStep), _all(steps[at + 1 :], ByteStep)
    coder = steps[at]
    if before is None or after is None or not isinstance(coder, BlockCoder):
        raise CannotDecode(f"chain {name!r} is not in order: block steps, one coder, byte steps.")
    return Chain(before, coder, after)


def _all(steps: list[Step], kind: type[S]) -> tuple[S, ...] | None:
    found = tuple(step for step in steps if isinstance(step, kind))
    return found if len(found) == len(steps) else None


def _step(text: str) -> Step:
    match = _STEP.fullmatch(text)
    kind = STEPS.get(match[1]) if match else None
    if match is None or kind is None:
        raise CannotDecode(f"codec {text[:60]!r} is not known.")
    known: dict[str, Any] = {f.name: f.type for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for pair in filter(None, (match[2] or "").split(",")):
        key, _, value = pair.partition("=")
        if key not in known or key in values:
            raise CannotDecode(f"{match[1]} has no parameter {key!r}.")
        try:
            values[key] = int(value) if known[key] == "int" else value
        except ValueError:
            raise CannotDecode(f"{key} of {match[1]} is not a number: {value!r}.") from None
    return kind(**values)
