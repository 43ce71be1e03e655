"""Hooks on a model's decoder, by which caches learn what goes through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from kvstore.errors import ConfigError, InvalidParams
from kvstore_connectors.base import shielded
from kvstore_connectors.transformers.prefix import PrefixCache


def watch(decoder: Any, keeper: Callable[[], Any]) -> list[Any]:
    """Let the caches of a keeper see what goes through the decoder; the handles that end it.

    The hooks hold the keeper weakly: a model must not keep every connector alive that it ever had.
    """
    names = list(inspect.signature(decoder.forward).parameters)
    if "past_key_values" not in names:
        raise ConfigError(f"transformers: {type(decoder).__name__} takes no past_key_values.", "")

    def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def mine(module: Any, inputs: dict[str, Any]) -> PrefixCache | None:
        past, owner = inputs.get("past_key_values"), keeper()
        # A copy of a model comes with copies of its hooks, but is not the model that the KV is stored for.
        if owner is None or module is not owner.decoder or not isinstance(past, PrefixCache):
            return None
        return past if past.keeper is owner else None

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = inputs_of(args, kwargs)
        past = mine(module, inputs)
        if (owner := keeper()) is not None and owner.watch is not None and module is owner.decoder:
            owner.watch.look(past)
        if past is not None:
            _report_all_but_misuse(lambda: past.before_forward(inputs, module.training))

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        past = mine(module, inputs_of(args, kwargs))
        if past is not None:
            _report_all_but_misuse(past.after_forward)

    return [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]


def _report_all_but_misuse(work: Callable[[], None]) -> None:
    """Run a hook; a defect of ours is written down, KV of another prompt ends the call."""
    misuse: list[InvalidParams] = []

    @shielded()
    def run() -> None:
        try:
            work()
        except InvalidParams as error:
            misuse.append(error)

    run()
    if misuse:
        raise misuse[0]
