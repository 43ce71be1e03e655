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
from kvstore_connectors.blend.capture import Chunk, assemble
from kvstore_connectors.blend.prompt import Capture
from kvstore_connectors.blend.recompute import prefill
from kvstore_connectors.blend.selectors.planner import planner
from kvstore_connectors.blend.work import Work
from kvstore_connectors.build_model import as_ids
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
    divergences: list[float] = []
    agreed = total = 0
    for done in range(prompts):
        *picked, asked = chance.sample(usable, min(chunks_each + 1, len(usable)))
        question = as_ids(list(asked[:QUESTION_TOKENS]))
        built = builder.compute(picked)
        ready = [
            Chunk(as_ids(list(ids)), tuple(kv), len(system), Capture.SYSTEM if system else Capture.ISOLATED)
            for ids, kv in zip(picked, built, strict=True)
        ]
        prompt, cache = assemble(model, rotation, as_ids(list(system)), ready, question)
        work = Work(model, prompt, cache)
        for _ in work.repair(planner(prompt), share):
            pass
        start = int(prompt.question[0])
        blended = model.logits(work.hidden[work.rows >= start]).log_softmax(-1)
        hidden, _ = prefill(model, prompt.ids)
        full = model.logits(hidden[start:]).log_softmax(-1)
        divergences.append(float((full.exp() * (full - blended)).sum(-1).mean()))
        agreed += int((full.argmax(-1) == blended.argmax(-1)).sum())
        total += len(full)
        told(done + 1)
    return Verdict(
        model=namespace.model,
        revision=namespace.revision,
        share=share,
        selector="auto",
        prompts=prompts,
        kl=sum(divergences) / len(divergences),
        top1=agreed / total,
        most_kl=MOST_KL,
        least_top1=LEAST_TOP1,
    )
