"""Prompts of natural text: a stretch of a text cut into chunks, and what follows it as the question.

The chunks stand in their own order, so that each needs those before it as much as text ever does.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError
from kvstore_connectors.blend.trial import Sample
from kvstore_connectors.build_model import as_ids

if TYPE_CHECKING:
    from torch import Tensor

MAX_CHARACTERS = 1 << 20
"""Read of each kind of text."""

SYSTEM = "Continue the text.\n\n"


@dataclass(frozen=True)
class Shape:
    """How prompts are cut.

    Attributes
    ----------
    chunks, chunk_tokens, question_tokens : int
    """

    chunks: int = 6
    chunk_tokens: int = 128
    question_tokens: int = 48

    @property
    def tokens(self) -> int:
        """Tokens of text in a prompt."""
        return self.chunks * self.chunk_tokens + self.question_tokens


def builtin_texts() -> dict[str, str]:
    """Texts that every machine with Python has: its language reference, and modules of its library."""
    import argparse
    import difflib
    import heapq
    import shutil
    import textwrap
    from pydoc_data.topics import topics

    code = "\n".join(map(inspect.getsource, (argparse, difflib, heapq, shutil, textwrap)))
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    return {"reference": reference[:MAX_CHARACTERS], "code": code[:MAX_CHARACTERS]}


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Text of files, and of all files in folders; each path is one kind, named by it.

    Raises
    ------
    ConfigError
        If a path holds no file that can be read as text.
    """
    found: dict[str, str] = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        parts, room = [], MAX_CHARACTERS
        for file in files:
            try:
                with file.open(encoding="utf-8") as text:
                    parts.append(text.read(room))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--texts: {file} can not be read as text ({error}).", "Leave it out.") from None
            room -= len(parts[-1])
            if room <= 0:
                break
        if not parts:
            raise ConfigError(f"--texts: there is no file at {path}.", "Name text files, or folders of them.")
        found[str(path)] = "\n\n".join(parts)
    return found


def cut(
    texts: Mapping[str, str],
    encode: Callable[[str], list[int]],
    count: int,
    *,
    shape: Shape,
    system: str = SYSTEM,
    seed: int = 0,
    device: str = "cpu",
) -> list[Sample]:
    """Prompts at random places of texts, kinds in turn.

    Parameters
    ----------
    texts : mapping of str to str
        By kind.
    encode : callable
        Token ids of a text, without special tokens.
    count : int
        Prompts.
    seed : int
        The same seed gives the same prompts.

    Raises
    ------
    ConfigError
        If a text is too short for one prompt, or the shape is of nothing.
    """
    if min(count, shape.chunks, shape.chunk_tokens) < 1 or shape.question_tokens < 2:
        raise ConfigError(
            "eval: there must be a prompt, a chunk, a token in it, and two tokens behind it at least.", ""
        )
    ids = {kind: as_ids(encode(text), device) for kind, text in texts.items()}
    for kind, tokens in ids.items():
        if len(tokens) < shape.tokens:
            raise ConfigError(
                f"--texts: {kind} has {len(tokens)} tokens where a prompt has {shape.tokens}.",
                "Give longer texts, or fewer and shorter chunks.",
            )
    front = as_ids(encode(system), device)
    chance = {kind: random.Random(f"{kind} {seed}") for kind in ids}
    kinds = list(ids)
    return [_sample(kind, ids[kind], front, shape, chance[kind]) for kind in (kinds * count)[:count]]


def _sample(kind: str, ids: Tensor, system: Tensor, shape: Shape, chance: random.Random) -> Sample:
    size, end = shape.chunk_tokens, shape.chunks * shape.chunk_tokens
    text = ids[(at := chance.randrange(len(ids) - shape.tokens + 1)) : at + shape.tokens]
    chunks = tuple(text[start : start + size] for start in range(0, end, size))

    def elsewhere() -> Tensor:
        start = chance.randrange(len(ids) - size + 1)
        return ids[start : start + size]

    return Sample(kind, system, chunks, text[end:], ids[:0], tuple((elsewhere(), elsewhere()) for _ in chunks))
