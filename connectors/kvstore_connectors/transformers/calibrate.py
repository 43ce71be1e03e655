"""Fit a basis to a model, and measure what chains of codecs cost it: bytes, time, and the next-token distribution.

The reference is the same model on the same KV as raw blocks, so a chain that loses nothing scores exactly 0.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from kvstore.codecs import BlockSpec, Chain, Context
from kvstore.codecs.basis import Basis
from kvstore.codecs.fit import Moments
from kvstore.errors import CannotEncode, InvalidParams
from kvstore_connectors.transformers.probe import Probe
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.frames import Frames, has_kernels
from kvstore_gpu.jobs import Part

SINKS = 4
FINEST = 0.0005
"""Finest step that a basis is made for, in its own units."""


def nobody(line: str) -> None:
    """Who is told of progress if nobody asks."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A context and what follows it in the text.

    Attributes
    ----------
    kind : str
        Where it is from.
    tokens, following : list of int
    """

    kind: str
    tokens: list[int]
    following: list[int]


def cut(
    texts: Mapping[str, Sequence[Sequence[int]]], per_kind: int, lengths: tuple[int, int], following: int, seed: int
) -> list[Sample]:
    """Cut contexts out of tokenized texts, by kind; short texts are joined.

    Raises
    ------
    InvalidParams
        A kind has fewer tokens than one context.
    """
    found = []
    for kind, documents in texts.items():
        rng = random.Random(f"{seed}/{kind}")
        if sum(map(len, documents)) < lengths[1] + following:
            raise InvalidParams(
                f"the texts of kind {kind!r} have fewer than {lengths[1] + following} tokens.",
                "Give more of them, or ask for shorter contexts.",
            )
        for _ in range(per_kind):
            count = rng.randint(*lengths)
            tokens: list[int] = []
            order = rng.sample(range(len(documents)), len(documents))
            while len(tokens) < count + following:
                document = documents[order.pop()]
                start = rng.randrange(max(1, len(document) - count - following))
                tokens += document[start : start + count + following]
            found.append(Sample(kind, tokens[:count], tokens[count : count + following]))
    return found


def fit(
    probe: Probe,
    samples: Sequence[Sample],
    forms: Sequence[tuple[int, bool]],
    *,
    model: str,
    revision: str,
    draws: int = 2,
    told: Callable[[str], None] = nobody,
) -> list[Basis]:
    """Bases of a model, one for each form (layers of a group, keys and values together).

    Parameters
    ----------
    probe : Probe
    samples : sequence of Sample
        Calibration texts; none of them may be used for a verdict later.
    forms : sequence of (int, bool)
    model, revision : str
        Whose bases they are.
    draws : int
        Gradients a context.
    told : callable
        Is given a line after each context.
    """
    shape = probe.shape
    sums = [
        Moments(shape.layers, shape.kv_heads, shape.head_dim, span, joint=joint, device=probe.device)
        for span, joint in forms
    ]
    for number, sample in enumerate(samples):
        block = probe.prefill(sample.tokens)
        rows = probe.before_rope(block)[:, :, SINKS:]
        for draw in range(draws):
            slopes = probe.before_rope(probe.slopes(block, sample.following, 1000 * number + draw))[:, :, SINKS:]
            for one in sums:
                one.add(rows, slopes)
        told(f"basis: {number + 1} of {len(samples)} contexts")
    return [one.basis(rotary=probe.rotary.digest, model=model, revision=revision, finest=FINEST) for one in sums]


@dataclass(slots=True)
class Coded:
    """A context's KV, encoded and decoded again, block by block."""

    block: torch.Tensor
    raw: int
    stored: int
    encode_s: float
    decode_s: float


def code(chain: Chain, block: torch.Tensor, context: Context, block_tokens: int = 256) -> Coded:
    """Send the KV of a context through a chain as a store would, in blocks: on a GPU by the kernels there are.

    Parameters
    ----------
    chain : Chain
    block : torch.Tensor
        ``[layer][K|V][token][kv_head][dim]`` from position 0.
    context : Context
        ``importance`` is for the whole context.
    block_tokens : int
        Tokens of a block.
    """
    layers, _, tokens, heads, dim = block.shape
    if block.device.type != "cpu":
        if kernels_take(chain, block, block_tokens):
            return code_by_kernels(chain, block, context, block_tokens)
        block = block.cpu()
    out = torch.empty_like(block)
    result = Coded(out, 0, 0, 0.0, 0.0)
    for start in range(0, tokens, block_tokens):
        part = block[:, :, start : start + block_tokens].contiguous()
        spec = BlockSpec(layers, part.shape[2], heads, dim, str(block.dtype).removeprefix("torch."), start)
        here = context
        if context.importance is not None:
            here = Context(
                context.rotary, context.bases, context.keys, context.importance[start : start + block_tokens]
            )
        buffer = np.empty(chain.bound(spec, here), np.uint8)
        began = time.thread_time()
        size = chain.encode(part, spec, buffer, here)
        middle = time.thread_time()
        got = torch.empty_like(part)
        chain.decode(buffer[:size], spec, got, here)
        result.decode_s += time.thread_time() - middle
        result.encode_s += middle - began
        result.raw += spec.nbytes
        result.stored += size
        out[:, :, start : start + block_tokens] = got
    return result


def kernels_take(chain: Chain, block: torch.Tensor, block_tokens: int) -> bool:
    """Whether kernels encode and decode such a block: whole blocks, and heads of 8 to 256, a power of two."""
    tokens, dim = block.shape[2], block.shape[4]
    return has_kernels(chain) and tokens % block_tokens == 0 and 8 <= dim <= 256 and dim & (dim - 1) == 0


def code_by_kernels(chain: Chain, block: torch.Tensor, context: Context, block_tokens: int) -> Coded:
    """As `code`, where the block lies, by the kernels that a GPU engine stores and loads with; times are the device's.

    Raises
    ------
    CannotEncode
        A block has values that the chain cannot say.
    """
    out, count = torch.empty_like(block), block.shape[2] // block_tokens
    there, back = (
        Frames(PagedCache.of([[side.unflatten(0, (count, block_tokens)) for side in layer] for layer in whole]), chain,
               block_tokens, context)
        for whole in (block.contiguous(), out)
    )  # fmt: skip
    starts = [number * block_tokens for number in range(count)]
    frames = [torch.empty(there.nbytes(start), dtype=torch.uint8, device=block.device) for start in starts]
    parts = [Part(frame, [start // block_tokens], position=start) for frame, start in zip(frames, starts, strict=True)]
    stream = torch.cuda.current_stream(block.device) if block.is_cuda else None
    encode_s, bad = _timed(lambda: there.pack(parts, stream), stream)
    if bool(bad.any()):
        raise CannotEncode(f"{chain}: a block has values that it cannot say.")
    decode_s, _ = _timed(lambda: back.unpack(parts, stream), stream)
    return Coded(out, block.nbytes, sum(frame.numel() for frame in frames), encode_s, decode_s)


def _timed(work: Callable[[], Any], stream: torch.cuda.Stream | None) -> tuple[float, Any]:
    """Seconds on the device, and what came of it; done twice, since kernels are compiled when they are first needed."""
    found = work()
    if stream is None:
        began = time.thread_time()
        found = work()
        return time.thread_time() - began, found
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    found = work()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, found


@dataclass(slots=True)
class Cost:
    """What a chain costs, over some contexts.

    Attributes
    ----------
    kl, top1, nll : list of float
        By context: mean Kullback-Leibler divergence (nats a token) from the distribution with raw KV; share of tokens
        whose most likely successor is the same; negative log-likelihood of the true continuation.
    raw, stored : int
        Bytes.
    encode_s, decode_s : float
        Seconds of processor time; of the device, where kernels did it.
    """

    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    raw: int = 0
    stored: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller than raw."""
        return self.raw / max(self.stored, 1)

    def summary(self, exact: Cost | None = None) -> dict[str, float]:
        """Means with half widths of 95 % confidence intervals over contexts, the ratio, GiB of raw KV a second.

        With the cost of raw blocks, ``nll`` is the rise above theirs, context by context.
        """
        gib = self.raw / 2**30
        nll = self.nll if exact is None else [own - raw for own, raw in zip(self.nll, exact.nll, strict=True)]
        return {
            "kl": mean(self.kl),
            "kl_interval": half_width(self.kl),
            "kl_worst": max(self.kl),
            "top1": mean(self.top1),
            "top1_interval": half_width(self.top1),
            "nll": mean(nll),
            "nll_interval": half_width(nll),
            "ratio": self.ratio,
            "encode_gib_s": gib / self.encode_s if self.encode_s else 0.0,
            "decode_gib_s": gib / self.decode_s if self.decode_s else 0.0,
            "contexts": len(self.kl),
        }


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean; without bounds for a single value."""
    return 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


class Reference:
    """A context with its raw KV and what the model makes of it.

    Parameters
    ----------
    probe : Probe
    sample : Sample
    dtype : torch.dtype
        Of the stored blocks.
    """

    def __init__(self, probe: Probe, sample: Sample, dtype: torch.dtype = torch.bfloat16) -> None:
        self.probe, self.sample = probe, sample
        self.block = probe.prefill(sample.tokens).to(dtype)
        self.logs = self._logs(self.block)

    def _logs(self, block: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.probe.logits(block, self.sample.following).log_softmax(-1)

    def judge(self, logs: torch.Tensor, cost: Cost) -> None:
        """Add what some log-probabilities differ by to a cost."""
        kl = (self.logs.exp() * (self.logs - logs)).sum(-1)
        cost.kl.append(max(0.0, float(kl.mean())))
        cost.top1.append(float((logs.argmax(-1) == self.logs.argmax(-1)).float().mean()))
        true = torch.tensor(self.sample.following[1:], device=logs.device)[:, None]
        cost.nll.append(-float(logs[:-1].gather(1, true).mean()))

    def add(self, coded: Coded, cost: Cost) -> None:
        """Judge a coded context."""
        self.judge(self._logs(coded.block.to(self.probe.device)), cost)
        cost.raw += coded.raw
        cost.stored += coded.stored
        cost.encode_s += coded.encode_s
        cost.decode_s += coded.decode_s


def measure(
    references: Sequence[Reference],
    chains: Mapping[str, Chain],
    context: Context,
    *,
    importance: Callable[[Reference], torch.Tensor] | None = None,
    threads: int = 1,
    block_tokens: int = 256,
    told: Callable[[str], None] = nobody,
) -> dict[str, Cost]:
    """Costs of chains over contexts, by the chains' labels.

    Parameters
    ----------
    references : sequence of Reference
    chains : mapping of str to Chain
    context : Context
        What the chains need; ``importance`` is filled in for each context if a source of it is given.
    importance : callable, optional
        One number a token of a context.
    threads : int
        Chains coded at a time; one thread of torch each.
    block_tokens : int
        Tokens of a block.
    told : callable
        Is given a line after each context.
    """
    costs = {label: Cost() for label in chains}
    own = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for number, one in enumerate(references, 1):
                held = one.block.cpu()
                weights = importance(one).cpu() if importance is not None else None
                here = Context(context.rotary, context.bases, context.keys, weights)
                jobs = {
                    label: pool.submit(
                        code,
                        chain,
                        one.block if kernels_take(chain, one.block, block_tokens) else held,
                        here,
                        block_tokens,
                    )
                    for label, chain in chains.items()
                }
                for label, job in jobs.items():
                    one.add(job.result(), costs[label])
                told(f"chains: {number} of {len(references)} contexts")
    finally:
        torch.set_num_threads(own)
    return costs
