"""The gate: nothing is blended on a model before a probe has measured there what it costs in quality.

A verdict is a small JSON file that `kvstore build --probe` writes. It names the model it was measured on; on another
one, or with more reuse than was measured, it does not count.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from kvstore.errors import ConfigError
from kvstore.types import Namespace

REMEDY = "Measure it with `kvstore build DOCS --model MODEL --probe FILE`, and give FILE as `blend_gate`."

MAX_BYTES = 1 << 20

LOOK_S = 1.0
"""How often the file is looked at, while prompts ask to be blended."""


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
    reach : int, optional
        Layers in which the model reads chunks, as `blend.reach` measures them.
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
    reach: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the thresholds are kept."""
        return self.prompts > 0 and self.kl <= self.most_kl and self.top1 >= self.least_top1


class Gate:
    """A verdict's file, looked at again when it changes: a probe opens the gate of an engine that runs.

    Parameters
    ----------
    path : str
        The file; it may come later.

    Raises
    ------
    ConfigError
        If there is a file and it is no verdict.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp = 0
        self._look_at = 0.0
        self._verdict: Verdict | None = None
        self._reason = f"there is no verdict at {path}"
        if Path(path).exists():
            self._verdict = read_verdict(path)

    def why_closed(self, namespace: Namespace, share: float) -> str:
        """Why this model may not be blended now; empty if it may."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        return self._reason if self._verdict is None else why_closed(self._verdict, namespace, share)

    @property
    def reach(self) -> int | None:
        """That of the verdict that `why_closed` went by."""
        return None if self._verdict is None else self._verdict.reach

    def verdict(self) -> Verdict | None:
        """What the file says now; None if there is none, or it is no verdict."""
        self._look()
        return self._verdict

    def _look(self) -> None:
        try:
            stamp = Path(self._path).stat().st_mtime_ns
            if stamp != self._stamp:
                self._verdict, self._stamp = read_verdict(self._path), stamp
        except OSError:
            self._verdict, self._stamp, self._reason = None, 0, f"there is no verdict at {self._path}"
        except ConfigError as error:
            self._verdict, self._reason = None, error.cause


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
