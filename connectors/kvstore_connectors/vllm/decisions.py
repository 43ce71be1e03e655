"""Load, blend or recompute in vLLM: what its scheduler sees of steps and loads, and the choice for each request.

A step takes from when it was planned, or from when the one before it ended if that was later (steps may be planned
ahead), to when its output is back. A load takes from when the engine took it up to when all ranks have it. What a blend
takes its worker says: it computes as it is begun, and that may be before the output of an earlier step is looked at.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, KeysView, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.types import TierCode
from kvstore_connectors.base import Tally, log
from kvstore_connectors.choice import MARGIN, Blend, Blending, Choice, Loads, Prefill, Speeds, choose, find_out

PROBE_S = 10.0
"""A tier that is not worth loading from is looked at this often, lest its estimate stay what it was for ever: a block
is brought up from a lower one, and from memory one request is loaded all the same, within a deadline."""

SOONEST_PROBE_S, PROBE_SHARE = 1.0, 0.2
"""A lower tier that nobody else reads is looked at sooner, if that takes no more of its time than this share."""

TRY_AGAIN = 16
"""One of so many prompts that would come later if blended is blended all the same, to see whether it still is so."""

MAX_STEPS = 64
"""Steps that are timed at once; an engine plans a few ahead, and one that was not reported is not waited for."""


@dataclass(slots=True)
class Open:
    """A request on its way to its first token."""

    choice: Choice
    tiers: list[TierCode]
    began: float
    ahead_s: float = 0.0
    loading: bool = False
    spoiled: bool = False


@dataclass(slots=True)
class Step:
    """A step under way.

    Attributes
    ----------
    planned : float
        When.
    spans : list of (int, int)
        First position and number of tokens that it computes of each request.
    pure : bool
        Nothing but computing takes its time.
    first : list of str
        Requests whose first token it brings.
    blend : Blend or None
        What is blended in it, before it computes.
    """

    planned: float
    spans: list[tuple[int, int]]
    pure: bool
    first: list[str]
    blend: Blend | None


class Decisions:
    """The measurements and the choices.

    Parameters
    ----------
    tally : Tally
        Counts choices, forecasts and regret.
    block_tokens : int
        Tokens in a kvstore block.
    chunk : int
        Tokens that the engine computes in one step at most.
    always : bool
        Load whatever is there, and blend whatever can be, as a user may ask for.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        tally: Tally,
        block_tokens: int,
        chunk: int,
        *,
        always: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_bytes = 0
        self.prefill = Prefill(chunk)
        self.loads = Loads()
        self.blending = Blending()
        self._tally = tally
        self._block_tokens = block_tokens
        self._always = always
        self._clock = clock
        self._open: dict[str, Open] = {}
        self._steps: dict[int, Step] = {}
        self._not_blended = 0
        self._idle: deque[int] = deque(maxlen=MAX_STEPS)
        self._last_output = 0.0
        self._probed = self._from_memory = -math.inf
        """When a lower tier was last looked at, and when something was last loaded from memory."""

    @property
    def waiting(self) -> KeysView[str]:
        """Requests on their way to a first token that something was decided about."""
        return self._open.keys()

    # -- the choice ----------------------------------------------------------------------------------------------------

    def choose(self, tiers: Sequence[TierCode], speeds: Speeds, n_local: int, n_tokens: int) -> Choice:
        """Split the matched blocks of a prompt of `n_tokens`, of which the engine has the first `n_local`."""
        if self._always:
            return Choice(len(tiers), len(tiers))
        ahead_s = self._ahead_s()
        load_s = self.loads.seconds(tiers, speeds, self.block_bytes, ahead_s)
        measured = all(tier in speeds for tier in set(tiers) - {TierCode.HOST})
        compute_s = None
        if self.prefill.known:
            first = n_local // self._block_tokens
            starts = (first + np.arange(len(tiers) + 1)) * self._block_tokens
            compute_s = self.prefill.seconds(np.clip(starts, n_local, n_tokens - 1), n_tokens)
        choice = choose(load_s, compute_s, measured=measured)
        in_memory = next((at for at, tier in enumerate(tiers) if tier != TierCode.HOST), len(tiers))
        due = self._clock() - self._from_memory >= PROBE_S
        if due and in_memory and not choice.blocks and compute_s is not None and not ahead_s:
            return find_out(compute_s, in_memory)
        return choice

    def blend_pays(self, blend: Blend, n_tokens: int) -> bool:
        """Whether a prompt of `n_tokens` has its first token sooner if it is blended; now and then so to find out."""
        if self._always or not self.prefill.known or not self.blending.known:
            return True
        computed_s, rest_s = self.prefill.seconds(np.array([blend.exact, blend.end]), n_tokens)
        if self.blending.seconds(blend, self._computing_s(blend)) + rest_s <= computed_s * (1 - MARGIN):
            return True
        self._not_blended += 1
        if self._not_blended % TRY_AGAIN == 0:
            return True
        self._tally.add("blend_slower")
        return False

    def _computing_s(self, blend: Blend) -> float:
        """What the tokens that a blend computes take the engine."""
        whole_s = self.prefill.seconds(np.array([blend.exact]), blend.end)[0]
        return float(whole_s) * blend.computed / (blend.end - blend.exact)

    def _ahead_s(self) -> float:
        """What is left, by forecast, of loads under way: they are done one after the other."""
        now = self._clock()
        ahead = [one.began + (one.choice.load_s or 0.0) - now for one in self._open.values() if one.loading]
        return max([0.0, *ahead])

    def wants_probe(self, choice: Choice, tiers: Sequence[TierCode], speeds: Speeds) -> int | None:
        """The first matched block that is left in a lower tier, if it is time to see how fast that is now."""
        now = self._clock()
        place = next((i for i in range(choice.blocks, len(tiers)) if tiers[i] != TierCode.HOST), None)
        if self._always or place is None or now - self._probed < self._probe_s(speeds.get(tiers[place])):
            return None
        self._probed = now
        return place

    def _probe_s(self, speed: tuple[float, float, float] | None) -> float:
        """How long ago a tier of this speed has to have been looked at."""
        if speed is None or speed[0] > 0:  # never read, or at it
            return PROBE_S
        _, block_s, byte_s = speed
        return min(max((block_s + byte_s * self.block_bytes) / PROBE_SHARE, SOONEST_PROBE_S), PROBE_S)

    def taken(self, name: str, choice: Choice, tiers: Sequence[TierCode], loading: bool) -> None:
        """The engine goes by a choice."""
        now, ahead_s = self._clock(), self._ahead_s()
        self._open[name] = Open(choice, list(tiers), now, ahead_s, loading)
        if TierCode.HOST in tiers[: choice.blocks]:
            self._from_memory = now
        kind = "recompute" if not choice.blocks else "load" if choice.blocks == choice.matched else "part"
        self._tally.add(f"choice_{kind}")
        self._tally.add("chosen_recompute_tokens", (choice.matched - choice.blocks) * self._block_tokens)

    # -- what became of it ---------------------------------------------------------------------------------------------

    def load_failed(self, name: str, blocks: int) -> None:
        """Of a load only so many blocks came."""
        one = self._open.get(name)
        if one is not None and one.loading:
            one.spoiled = True
            seconds = self._clock() - one.began - one.ahead_s
            wanted = one.tiers[: one.choice.blocks]
            if one.choice.load_s is not None and wanted:
                came = wanted[: blocks + 1]  # with the one that did not: it is what was waited for
                forecast = (one.choice.load_s - one.ahead_s) * len(came) / len(wanted)
                self.loads.learn(came, forecast, seconds, at_least=True)

    def blend_failed(self) -> None:
        """What was to be blended is computed, so no step under way says what blending takes."""
        for step in self._steps.values():
            step.blend = None

    def loads_ended(self, names: Sequence[str]) -> None:
        """Loads beside the batch have ended, well or not."""
        for name in names:
            one = self._open.get(name)
            if one is None or not one.loading:
                continue
            one.loading = False
            seconds = self._clock() - one.began
            self._tally.add("load_actual_seconds", seconds)
            self._tally.add("load_forecast_seconds", one.choice.load_s or 0.0)
            if not one.spoiled and seconds > one.ahead_s:  # else nothing but that what was ahead took less than thought
                forecast = (one.choice.load_s or 0.0) - one.ahead_s
                self.loads.learn(one.tiers[: one.choice.blocks], forecast, seconds - one.ahead_s)

    def planned(
        self, step: int, spans: Mapping[str, tuple[int, int, int]], pure: bool, blend: Blend | None = None
    ) -> bool:
        """A step was planned: of each request (first position, tokens, tokens of its prompt). Whether to time it.

        A step is `pure` if nothing but computing takes its time. With `blend`, only that does besides.
        """
        first = [name for name, (start, count, total) in spans.items() if start < total <= start + count]
        prefills = any(count > 1 for _, count, _ in spans.values())
        if not prefills and blend is None and not any(name in self._open for name in first):
            return False
        if blend is not None:
            for before in self._steps.values():  # whose output may be looked at when this one is through
                before.pure = False
        computed = [(start, count) for start, count, _ in spans.values()]
        self._steps[step] = Step(self._clock(), computed, pure, first, blend)
        if len(self._steps) > MAX_STEPS:
            del self._steps[min(self._steps)]
        return True

    def idle(self, step: int) -> None:
        """A step was planned that computes nothing: its output says nothing of when the engine was free."""
        self._idle.append(step)

    def output(self, timed: Mapping[int, float], blended: Mapping[int, float]) -> None:
        """A step's output is back.

        Parameters
        ----------
        timed : dict
            Of those that are timed, the seconds that the connector itself took of them.
        blended : dict
            Of those that blended, the seconds from then until the device was through the step.
        """
        now = self._clock()
        if not timed and self._idle:
            self._idle.popleft()
            return
        for number, beside_s in timed.items():
            step = self._steps.pop(number, None)
            for old in [other for other in self._steps if other < number]:
                del self._steps[old]  # never reported: the step failed
            while self._idle and self._idle[0] < number:
                self._idle.popleft()
            if step is None:
                continue
            seconds = now - max(step.planned, self._last_output)
            if step.pure:
                self.prefill.learn(step.spans, seconds - beside_s)
            if step.blend is not None and number in blended and self.prefill.known:
                own_s = blended[number] - self.prefill.step_seconds(step.spans)
                self.blending.learn(step.blend, self._computing_s(step.blend), own_s)
            for name in step.first:
                self._first_token(name, now - beside_s)
        self._last_output = now

    def _first_token(self, name: str, now: float) -> None:
        one = self._open.pop(name, None)
        if one is None or one.choice.other_s is None:
            return
        took = now - one.began
        if one.choice.total_s is not None:
            self._tally.add("first_token_forecast_seconds", one.choice.total_s)
            self._tally.add("first_token_actual_seconds", took)
        self._tally.add("regret_seconds", max(took - one.choice.other_s, 0.0))
        self._tally.add("gained_seconds", max(one.choice.other_s - took, 0.0))
        log.debug("%s: %s, first token after %.3f s", name, one.choice, took)

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._open.pop(name, None)
