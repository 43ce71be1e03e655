"""The probe that opens the gate: what blending costs on this model and these documents, against full prefill.

Prompts are made of the documents that were built: the system prompt, some chunks in random order, and the beginning of
another chunk as what is asked, over whose tokens the next-token distributions are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend.capture import Chunk
from kvstore_connectors.blend.prompt import Capture
from kvstore_connectors.blend.reach import REACHED, reach_of
from kvstore_connectors.blend.selectors.planner import planner
from kvstore_connectors.blend.trial import Outcome, Sample, Trial, reference
from kvstore_connectors.vllm.blend_gate import Verdict

if TYPE_CHECKING:
    from kvstore.rope import Rotary
    from kvstore.types import Namespace
    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.build import Builder

MOST_KL, LEAST_TOP1 = 0.1, 0.9
QUESTION_TOKENS = 48


@torch.inference_mode()
def probe(
    model: Model,
    rotation: Rotary,
    builder: Builder,
    namespace: Namespace,
    system: Sequence[int],
    chunks: Sequence[Sequence[int]],
    *,
    share: float = 0.15,
    prompts: int = 8,
    chunks_each: int = 4,
    seed: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> Verdict:
    """Measure, and say whether the thresholds are kept.

    Raises
    ------
    ConfigError
        If there are too few documents.
    """
    usable = [chunk for chunk in chunks if len(chunk) >= QUESTION_TOKENS]
    if len(usable) < 3:
        raise ConfigError(
            f"probe: {len(usable)} chunks of {QUESTION_TOKENS} tokens are too few.", "Give at least three documents."
        )
    chance = random.Random(seed)
    lead, capture = builder.ids(system), Capture.SYSTEM if system else Capture.ISOLATED
    outcomes: list[Outcome] = []
    drawn = [chance.sample(usable, min(chunks_each + 1, len(usable))) for _ in range(prompts)]
    samples = [
        Sample("documents", lead, tuple(map(builder.ids, picked)), builder.ids(asked[:QUESTION_TOKENS]), lead[:0])
        for *picked, asked in drawn
    ]
    reach = reach_of(model, samples[:REACHED])
    for done, (sample, (*picked, _)) in enumerate(zip(samples, drawn, strict=True)):
        kv = builder.compute(picked)
        ready = [Chunk(one, tuple(of), len(system), capture) for one, of in zip(sample.chunks, kv, strict=True)]
        trial = Trial(model, rotation, sample, ready, reference(model, sample).logits, reach)
        outcomes.append(trial.repair(planner(trial.prompt), share))
        told(done + 1)
    return Verdict(
        model=namespace.model,
        revision=namespace.revision,
        share=share,
        selector="auto",
        prompts=prompts,
        kl=sum(one.kl for one in outcomes) / len(outcomes),
        top1=sum(one.hit for one in outcomes) / len(outcomes),
        most_kl=MOST_KL,
        least_top1=LEAST_TOP1,
        reach=reach,
    )
