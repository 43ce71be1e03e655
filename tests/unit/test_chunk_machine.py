"""The chunk index against the simplest thing that could be right: every offset, every chunk, token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.chunks import ChunkIndex
from kvstore.chunks.table import WINDOW
from kvstore.keys import chunk_block_keys, content_key, context_digest
from kvstore.types import BlockHeader, BlockId, ChunkInfo, Scope, TierCode

SCOPES = [Scope("uid-1", b"a" * 32), Scope("uid-1", b"b" * 32), Scope("uid-2", b"a" * 32)]
WORDS = [np.random.default_rng(n).integers(0, 9, 20, dtype=np.int32) for n in range(4)]
"""Chunks and prompts are made of few words, so that they overlap, begin alike and stand in one another."""

some_words = st.lists(st.integers(0, 3), min_size=1, max_size=5)


def text(words: list[int], extra: int = 0) -> np.ndarray:
    return np.concatenate([*(WORDS[word] for word in words), np.arange(extra, dtype=np.int32)])


class ChunkMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.gone: set[bytes] = set()
        self.index = ChunkIndex(1 << 30, self.where, most_variants=3, replaced=self.replaced, seed=5)
        self.model: dict[BlockId, tuple[bytes, bytes]] = {}
        """Tokens and context of each chunk."""

    def where(self, scope: Scope, keys: list[bytes]) -> int | None:
        return TierCode.HOST if self.gone.isdisjoint(keys) else None

    def replaced(self, scope: Scope, keys: list[bytes]) -> None:
        del self.model[BlockId(scope, keys[-1])]

    @rule(scope=st.sampled_from(SCOPES), words=some_words, extra=st.integers(0, 3), before=st.integers(0, 6))
    def store(self, scope: Scope, words: list[int], extra: int, before: int) -> None:
        tokens, context = text(words, extra), context_digest(np.arange(before, dtype=np.int32))
        content = content_key(scope.ns, tokens)
        (key,) = chunk_block_keys(content, context, 1)
        kind = "system" if before else "isolated"
        described = ChunkInfo(content=content, context=context, tokens=tokens.tobytes(), position=before, capture=kind)
        self.model[BlockId(scope, key)] = tokens.tobytes(), context
        self.gone.discard(key)
        self.index.stored(BlockId(scope, key), BlockHeader(tokens=tokens.tobytes(), chunk=described))

    @rule(data=st.data(), known=st.booleans())
    def leave(self, data: st.DataObject, known: bool) -> None:
        block = data.draw(st.sampled_from(list(self.model))) if known and self.model else BlockId(SCOPES[0], b"?" * 32)
        self.model.pop(block, None)
        self.index.removed(block)

    @rule(data=st.data())
    def lose_a_block(self, data: st.DataObject) -> None:
        if self.model:
            self.gone.add(data.draw(st.sampled_from(list(self.model))).key)

    @rule(scope=st.sampled_from(SCOPES), words=st.lists(st.integers(0, 3), max_size=9), cut=st.integers(0, 30))
    def search(self, scope: Scope, words: list[int], cut: int) -> None:
        prompt = text([*words, 0])[cut:].tobytes()
        found = self.index.match(scope, prompt, find=True)
        assert [(one.start, one.stop) for one in found] == self.expected(scope, prompt)
        for one in found:
            assert self.model[BlockId(scope, one.key)][0] == prompt[4 * one.start : 4 * one.stop]

    def expected(self, scope: Scope, prompt: bytes) -> list[tuple[int, int]]:
        mine = {
            tokens for block, (tokens, _) in self.model.items() if block.scope == scope and block.key not in self.gone
        }
        lengths = sorted({len(tokens) for tokens in mine if len(tokens) >= 4 * WINDOW}, reverse=True)
        spans, at = [], 0
        while at < len(prompt):
            length = next((n for n in lengths if prompt[at : at + n] in mine and at + n <= len(prompt)), 0)
            if length:
                spans.append((at // 4, (at + length) // 4))
            at += length or 4
        return spans

    @rule(scope=st.sampled_from(SCOPES), words=some_words, extra=st.integers(0, 3))
    def look_up(self, scope: Scope, words: list[int], extra: int) -> None:
        tokens = text(words, extra)
        raw = tokens.tobytes()
        here = any(
            block.scope == scope and known == raw and block.key not in self.gone
            for block, (known, _) in self.model.items()
        )
        assert bool(self.index.match(scope, raw, [(0, len(tokens))])) == here

    @invariant()
    def sound(self) -> None:
        assert self.index.check() == ""
        assert len(self.index) == len(self.model)


TestChunkMachine = ChunkMachine.TestCase
TestChunkMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
