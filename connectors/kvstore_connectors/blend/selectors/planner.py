"""The selector that fits how a prompt's chunks were captured, and selectors by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import ConfigError
from kvstore_connectors.blend.prompt import Capture
from kvstore_connectors.blend.selectors.deviation import Deviation
from kvstore_connectors.blend.selectors.external import External
from kvstore_connectors.blend.selectors.focused import Focused
from kvstore_connectors.blend.selectors.initial import Initial
from kvstore_connectors.blend.selectors.question import Question
from kvstore_connectors.blend.selectors.relay import Relay
from kvstore_connectors.blend.selectors.trail import Trail
from kvstore_connectors.blend.selectors.unseen import Unseen

if TYPE_CHECKING:
    from kvstore_connectors.blend.prompt import Prompt
    from kvstore_connectors.blend.work import Selector

GRADUAL = ((0.0, 1.5), (0.25, 1.0), (0.5, 0.75))
"""CacheBlend's gradual filtering: where it narrows, and to what multiple of the count; 1 on the average."""

LEAST_ASKED = 4
"""Tokens behind the last chunk that can tell what is asked about."""

SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Deviation("values"),
        Deviation("keys"),
        Deviation("values", GRADUAL),
        Deviation("keys", GRADUAL),
        Initial(),
        External(),
        Question(),
        Question("question-peak", "peak"),
        Trail(),
        Unseen(),
        Relay(),
        Focused(Question(), "question-focused"),
        Focused(External(), "external-focused"),
    )
}


def selector_named(name: str) -> Selector:
    """The selector of this name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name not in SELECTORS:
        raise ConfigError(f"there is no selector {name!r}", f"Choose one of {', '.join(SELECTORS)}.")
    return SELECTORS[name]


def selector_for(name: str, prompt: Prompt) -> Selector:
    """The selector of this name; ``auto`` is the planner's choice.

    Raises
    ------
    ConfigError
        If there is none.
    """
    return planner(prompt) if name == "auto" else selector_named(name)


def planner(prompt: Prompt) -> Selector:
    """`Relay`, however the chunks were captured: on answers across chunks and on natural text ahead of all others.

    Measured: docs/chunks.md. Where next to nothing is asked, nothing can be read: then external mass, if it was
    measured for all chunks, else what a token has not seen, by its position.
    """
    if len(prompt.question) >= LEAST_ASKED:
        return SELECTORS["relay"]
    repaired = [span for span in prompt.spans if span.capture is not Capture.EXACT]
    return SELECTORS["external" if all(span.external is not None for span in repaired) else "unseen"]
