"""One prompt, blended in one way after the other and each time compared with full prefill: what all figures rest on."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.capture import Chunk, assemble, capture
from kvstore_connectors.blend.prompt import Capture, LayerKV
from kvstore_connectors.blend.recompute import Pass, prefill
from kvstore_connectors.blend.work import Work
from kvstore_connectors.build_pack import pack

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore.rope import Rotary
    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import Cache
    from kvstore_connectors.blend.work import Selector


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt, in parts.

    Attributes
    ----------
    kind : str
        What sort of text it is.
    system, question : Tensor
        In front of the chunks, and behind them.
    chunks : tuple of Tensor
    answer : Tensor
        What full prefill should answer; empty if the question is the text that follows the chunks.
    others : tuple of tuple of Tensor
        What stood before each chunk when it was captured from a prompt that was served; empty if none was.
    """

    kind: str
    system: Tensor
    chunks: tuple[Tensor, ...]
    question: Tensor
    answer: Tensor
    others: tuple[tuple[Tensor, ...], ...] = ()


@dataclass(frozen=True)
class Reference:
    """Full prefill of a sample.

    Attributes
    ----------
    logits : Tensor
        ``[n, vocabulary]``, at the question's tokens; at those of the answer if there is one.
    seconds : float
        It took so long.
    """

    logits: Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a blended prompt.

    Attributes
    ----------
    kl : float
        Mean divergence of the next-token distributions from those of full prefill, nats a token; before an answer, of
        its first token only.
    hit : float
        Share of these tokens with the same first choice; 1 or 0 for an answer that greedy decoding gives or not.
    nll : float or None
        Negative log-likelihood of the question's tokens, nats a token.
    cost : float
        Work beyond computing what has no KV, choosing included, as a share of computing all reused tokens.
    seconds : float
        Time that the repair took; loading is not part of it.
    """

    kl: float
    hit: float
    nll: float | None
    cost: float
    seconds: float = 0.0


def reference(model: Model, sample: Sample) -> Reference:
    """Full prefill, timed; the answer is read behind it."""
    begun = time.perf_counter()
    asked = torch.cat([sample.question, sample.answer[:-1]])
    hidden, _ = prefill(model, torch.cat([sample.system, *sample.chunks, asked]))
    logits = model.logits(hidden[-(len(sample.answer) or len(sample.question)) :])
    return Reference(logits, time.perf_counter() - begun)


def captures(
    model: Model, sample: Sample, kinds: Collection[Capture] = (Capture.ISOLATED, Capture.SYSTEM, Capture.LIVE)
) -> dict[Capture, list[Chunk]]:
    """The sample's chunks as each of these ways of capturing leaves them; live only if it says what stood before."""
    found: dict[Capture, list[Chunk]] = {}
    lead = pack(model, [sample.system])[1] if len(sample.system) and Capture.SYSTEM in kinds else []
    for kind, front in ((Capture.ISOLATED, []), (Capture.SYSTEM, lead)):
        if kind in kinds:
            kv, first = pack(model, sample.chunks, front)[0], len(sample.system) if front else 0
            found[kind] = [Chunk(ids, tuple(one), first, kind) for ids, one in zip(sample.chunks, kv, strict=True)]
    if sample.others and Capture.LIVE in kinds:
        pairs = zip(sample.chunks, sample.others, strict=True)
        found[Capture.LIVE] = [capture(model, ids, sample.system, before) for ids, before in pairs]
    return found


class Trial:
    """A sample whose chunks were captured in one way.

    Parameters
    ----------
    model : Model
    rotation : Rotary
        Of the model, to move chunks by.
    sample : Sample
    chunks : list of Chunk
        Those of the sample, as `captures` gives them.
    full : Tensor
        Logits of `reference`.
    reach : int, optional
        Of the model, as `blend.reach` measures it.
    """

    def __init__(
        self,
        model: Model,
        rotation: Rotary,
        sample: Sample,
        chunks: list[Chunk],
        full: Tensor,
        reach: int | None = None,
    ) -> None:
        self.model, self.sample, self.full, self.reach = model, sample, full, reach
        room = max(0, len(sample.answer) - 1)
        self.prompt, self.cache = assemble(model, rotation, sample.system, chunks, sample.question, room)
        self.ids = torch.cat([self.prompt.ids, sample.answer[:-1]])

    def copy(self) -> list[LayerKV]:
        """The cache before any repair."""
        return [LayerKV(held.keys.clone(), held.values.clone()) for held in self.cache]

    def repair(self, selector: Selector, share: float) -> Outcome:
        """Repair a copy of the cache, and compare."""
        cache = self.copy()
        begun = time.perf_counter()
        work = Work(self.model, self.prompt, cache, reach=self.reach)
        for _ in work.repair(selector, share):
            pass
        seconds = time.perf_counter() - begun
        return self.verdict(work.hidden, self._follow(cache), work.cost, seconds)

    def verdict(self, hidden: Tensor, follow: Tensor | None, cost: float, seconds: float = 0.0) -> Outcome:
        """Compare hidden states of the question, and of the answer behind it, with full prefill."""
        if len(self.sample.answer):
            logits = self.model.logits(hidden[-1:] if follow is None else torch.cat([hidden[-1:], follow]))
            hit = float(greedy(logits, self.sample.answer))
            return Outcome(divergence(self.full[:1], logits[:1]), hit, None, cost, seconds)
        logits = self.model.logits(hidden[-len(self.sample.question) :])
        agree = float((logits.argmax(-1) == self.full.argmax(-1)).float().mean())
        return Outcome(divergence(self.full, logits), agree, likelihood(logits, self.sample.question), cost, seconds)

    def _follow(self, cache: Cache) -> Tensor | None:
        if len(self.sample.answer) < 2:
            return None
        behind = torch.arange(len(self.prompt.ids), len(self.ids), device=self.ids.device)
        return Pass(self.model, self.ids, cache, behind).run().hidden


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the distributions of logits `q` from those of `p`, nats a row."""
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def likelihood(logits: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of tokens but the first, under the logits of those before them, nats a token."""
    return float(-logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None]).mean())


def greedy(logits: Tensor, answer: Tensor) -> bool:
    """Whether greedy decoding gives the answer: it does if each token is the best one behind those before it."""
    return bool((logits.argmax(-1) == answer).all())
