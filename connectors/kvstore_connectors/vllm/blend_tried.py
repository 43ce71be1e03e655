"""Kernels of an engine are tried before they are used: versions differ in what they take, and in what they give."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("kvstore")

TOLERANCE = 0.02
"""Distance to plain torch, relative, that two kernels in bfloat16 may have; a wrong mask is far above."""

Kernel = TypeVar("Kernel")


def tried(what: str, make: Callable[[], Kernel], give: Callable[[Kernel], tuple[Tensor, Tensor]]) -> Kernel | None:
    """A kernel, if it gives what is right; None where it is not to be had, raises or gives something else.

    Parameters
    ----------
    what : str
        Its name, for the log.
    make : callable
    give : callable
        What it gives of some input, and what is right.
    """
    try:
        made = make()
        found, right = give(made)
        away = float((found.float() - right.float()).norm() / right.float().norm())
    except Exception as error:  # whatever it is, plain torch does the same
        log.info("blending: %s is not to be had here (%s).", what, error)
        return None
    if not away < TOLERANCE:
        log.warning("blending: %s is %.3f away from what is right; not used.", what, away)
        return None
    return made
