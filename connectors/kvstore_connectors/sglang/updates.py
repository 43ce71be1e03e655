"""What SGLang runs with now, and whether its weights were changed since.

SGLang tells a storage backend nothing of an update of weights, and its own record of one is a version that who updates
may leave out. So the one method that every way of updating goes through is listened to, in the process it happens in.
"""

from __future__ import annotations

import functools
from typing import Any

from kvstore.errors import ConfigError

_updates = 0


def arguments() -> tuple[dict[str, Any], dict[str, Any]] | None:
    """SGLang's arguments as it resolved them at start, and as they are now; None outside of an engine."""
    from sglang.srt.runtime_context import get_context, get_server_args

    try:
        started = get_server_args().resolved_dict()
    except ValueError:  # SGLang's way to say that there are none
        return None
    return started, get_context().resolved_server_args_dict()


def weights_in_use() -> tuple[str, ...]:
    """What is known of the weights that are loaded now, quickly; equal as long as they were not changed."""
    from sglang.srt.runtime_context import get_model, get_server_args, get_serving

    try:
        get_server_args()
    except ValueError:
        return (str(_updates),)
    model = get_model()
    return str(_updates), str(model.model_path), str(model.load_format), str(get_serving().weight_version)


def watch_weights() -> None:
    """Begin to count updates of weights. May be called again.

    Raises
    ------
    ConfigError
        If this SGLang has no such method.
    """
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Updater

    told = getattr(Updater, "_observe_weight_load", None)
    if told is None:
        raise ConfigError(
            "sglang: in this version it could not be noticed if the weights were changed at run time.",
            "docs/sglang.md names the versions that are supported.",
        )
    if not hasattr(told, "counts_for_kvstore"):
        Updater._observe_weight_load = _counting(told)


def _counting(told: Any) -> Any:
    @functools.wraps(told)
    def observe(*args: Any, **kwargs: Any) -> Any:
        global _updates
        _updates += 1
        return told(*args, **kwargs)

    observe.counts_for_kvstore = True  # type: ignore[attr-defined]
    return observe
