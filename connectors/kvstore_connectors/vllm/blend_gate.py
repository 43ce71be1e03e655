"""The gate: nothing is blended on a model before a probe has measured there what it costs in quality.

A verdict is a small JSON file that `kvstore build --probe` writes. It names the model it was measured on; on another
one, or with more reuse than was measured, it does not count.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvstore.errors import ConfigError
from kvstore.types import Namespace

REMEDY = "Measure it with `kvstore build DOCS --model MODEL --probe FILE`, and give FILE as `blend_gate`."

MAX_BYTES = 1 << 20


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe measured.

    Attributes
    ----------
    model, revision : str
        As in the engine's namespace.
    share : float
        Share of reused tokens that was computed again.
    selector : str
    prompts : int
        How many were compared with full prefill.
    kl : float
        Mean divergence of the next-token distribution from that of full prefill, in nats.
    top1 : float
        Share of tokens whose first choice is the same.
    most_kl, least_top1 : float
        Thresholds.
    """

    model: str
    revision: str
    share: float
    selector: str
    prompts: int
    kl: float
    top1: float
    most_kl: float
    least_top1: float

    @property
    def passed(self) -> bool:
        """Whether the thresholds are kept."""
        return self.prompts > 0 and self.kl <= self.most_kl and self.top1 >= self.least_top1


def read_verdict(path: str) -> Verdict:
    """A verdict from its file.

    Raises
    ------
    ConfigError
    """
    try:
        file = Path(path)
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"blend_gate: {path} is too large to be a verdict.", REMEDY)
        return msgspec.json.decode(file.read_bytes(), type=Verdict)
    except OSError as error:
        raise ConfigError(f"blend_gate: {path} can not be read ({error.strerror}).", REMEDY) from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"blend_gate: {path} is no verdict ({error}).", REMEDY) from None


def why_closed(verdict: Verdict, namespace: Namespace, share: float) -> str:
    """Why this model may not be blended; empty if it may."""
    if (verdict.model, verdict.revision) != (namespace.model, namespace.revision):
        return f"the verdict is of model {verdict.model} ({verdict.revision}), this is {namespace.model}"
    if not verdict.passed:
        return f"the probe failed: KL {verdict.kl:.3f} (at most {verdict.most_kl}), top-1 {verdict.top1:.3f}"
    if share < verdict.share:
        return f"a share of {share} was asked for; measured was {verdict.share}"
    return ""
