"""What blending costs a model in quality and saves it in time, for each selector, way of capturing, and share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend.intervals import bootstrap
from kvstore_connectors.blend.prompt import Capture
from kvstore_connectors.blend.reach import REACHED, reach_of
from kvstore_connectors.blend.selectors.planner import planner, selector_named
from kvstore_connectors.blend.trial import Outcome, Reference, Sample, Trial, captures, likelihood, reference

if TYPE_CHECKING:
    from kvstore.rope import Rotary
    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import Prompt
    from kvstore_connectors.blend.work import Selector

NONE, AUTO = "none", "auto"
"""No repair at all, and the planner's choice."""
DEFAULT = (NONE, AUTO, "question", "question-peak", "trail", "initial", "external", "v-deviation")
"""Selectors that are compared unless others are named."""
CAPTURES = ("isolated", "system", "live")
SHARES = (0.05, 0.15, 0.3)


@dataclass(frozen=True, slots=True)
class Row:
    """A selector at a share, over all prompts whose chunks were captured in one way; intervals are 95 %, over prompts.

    Attributes
    ----------
    capture, selector : str
    share : float
        Of the reused tokens, that was asked to be computed again.
    computed : float
        What was computed of them, choosing included.
    prompts : int
    kl : float
        Mean divergence of the next-token distribution from full prefill's, nats a token.
    top1 : float
        Share of tokens whose first choice is that of full prefill.
    nll : float
        Rise of the negative log-likelihood of the true text, nats a token.
    saved : float
        Share of full prefill's time that was not spent. Loading is not counted.
    """

    capture: str
    selector: str
    share: float
    computed: float
    prompts: int
    kl: float
    kl_interval: tuple[float, float]
    top1: float
    top1_interval: tuple[float, float]
    nll: float
    nll_interval: tuple[float, float]
    saved: float
    saved_interval: tuple[float, float]


class _Seen(NamedTuple):
    """An outcome, with what full prefill of the same prompt gave."""

    outcome: Outcome
    rise: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured.

    Attributes
    ----------
    prompts : int
    kinds : list of str
        Of text.
    prompt_tokens : int
        Tokens of a prompt, about.
    prefill_seconds, nll : float
        Means of full prefill.
    reach : int
        Layers in which the model reads chunks.
    rows : list of Row
        By capture, selector, share.
    """

    prompts: int
    kinds: list[str]
    prompt_tokens: int
    prefill_seconds: float
    nll: float
    reach: int
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    model: Model,
    rotation: Rotary,
    samples: Sequence[Sample],
    *,
    selectors: Sequence[str] = DEFAULT,
    kinds: Sequence[str] = CAPTURES,
    shares: Sequence[float] = SHARES,
    told: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Blend every prompt in every way and compare with full prefill.

    Parameters
    ----------
    model : Model
    rotation : Rotary
        Of the model.
    samples : sequence of Sample
        Natural text, without answers.
    selectors : sequence of str
        Names; `NONE` and `AUTO` are known besides those of `selectors.planner`.
    kinds : sequence of str
        How chunks are captured: words of `Capture`.
    shares : sequence of float
        Shares of the reused tokens to compute again.
    told : callable
        Called with the number of prompts that are done.

    Raises
    ------
    ConfigError
        If there is no prompt, a share is not between 0 and 1, or there is no selector of a name.
    """
    if not samples or not all(0 <= share <= 1 for share in shares):
        raise ConfigError("eval: there is no prompt, or a share is not between 0 and 1.", "")
    for name in set(selectors) - {NONE, AUTO}:
        selector_named(name)
    reach = reach_of(model, samples[:REACHED])
    seen: defaultdict[tuple[str, str, float], list[_Seen]] = defaultdict(list)
    references: list[Reference] = []
    likelihoods: list[float] = []
    for done, sample in enumerate(samples, 1):
        if done == 1:
            reference(model, sample)  # the first pass of a process is slower
        full = reference(model, sample)
        references.append(full)
        likelihoods.append(likelihood(full.logits, sample.question))
        made = captures(model, sample, [Capture(kind) for kind in kinds])
        for kind in kinds:
            trial = Trial(model, rotation, sample, made[Capture(kind)], full.logits, reach)
            for name, selector, share in _ways(selectors, shares, trial.prompt):
                outcome = trial.repair(selector, share)
                rise = (outcome.nll or 0.0) - likelihoods[-1]
                seen[kind, name, share].append(_Seen(outcome, rise, full.seconds))
        told(done)
    return Evaluation(
        prompts=len(samples),
        kinds=sorted({sample.kind for sample in samples}),
        prompt_tokens=len(samples[0].system) + sum(map(len, samples[0].chunks)) + len(samples[0].question),
        prefill_seconds=_mean([one.seconds for one in references]),
        nll=_mean(likelihoods),
        reach=reach,
        rows=[_row(*key, found) for key, found in seen.items()],
    )


def least_shares(rows: Sequence[Row], most_kl: float) -> list[Row]:
    """For each way of capturing and selector, the row of the least share that keeps a quality target.

    Parameters
    ----------
    rows : sequence of Row
    most_kl : float
        What the upper end of the interval of the divergence may be.

    Returns
    -------
    list of Row
        None of a selector that keeps it at no share that was measured; cheapest first.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.share):
        if row.kl_interval[1] <= most_kl:
            found.setdefault((row.capture, row.selector), row)
    return sorted(found.values(), key=lambda row: (row.capture, row.computed))


def _ways(names: Sequence[str], shares: Sequence[float], prompt: Prompt) -> Iterator[tuple[str, Selector, float]]:
    """Selectors that can serve a prompt, each with its shares."""
    measured = all(span.external is not None for span in prompt.spans if span.capture is not Capture.EXACT)
    for name in names:
        if name == NONE:
            yield name, selector_named("initial"), 0.0  # of a share of nothing any selector chooses nothing
        elif not name.startswith("external") or measured:
            for share in shares:
                yield name, planner(prompt) if name == AUTO else selector_named(name), share


def _row(kind: str, name: str, share: float, seen: Sequence[_Seen]) -> Row:
    outcomes = [one.outcome for one in seen]
    kl, top1, rise = [one.kl for one in outcomes], [one.hit for one in outcomes], [one.rise for one in seen]
    saved = [1 - one.outcome.seconds / one.seconds for one in seen]
    return Row(
        capture=kind, selector=name, share=share, computed=_mean([one.cost for one in outcomes]), prompts=len(seen),
        kl=_mean(kl), kl_interval=bootstrap(kl), top1=_mean(top1), top1_interval=bootstrap(top1),
        nll=_mean(rise), nll_interval=bootstrap(rise), saved=_mean(saved), saved_interval=bootstrap(saved),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
