"""Prompts, answers, and what of them is stored, for tests of the cache of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from kit import Daemon, numbers

from kvstore.keys import prefix_keys
from kvstore_connectors.transformers import KVStoreCache

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BLOCK = 32
SMALL = 16
TEXT = (
    "The lighthouse keeper wrote a letter every evening. He described the ships that had passed, the colour of the sea "
    "and the birds that rested on the rail. Nobody answered, but he kept a copy of each letter in a wooden box. "
)
QUESTION = "\nQuestion: what did the keeper keep in the wooden box?\nAnswer:"


def connected(kv: KVStoreCache, wait_s: float = 10.0) -> KVStoreCache:
    """Wait until a connector has met its daemon (again)."""
    deadline = time.monotonic() + wait_s
    while not kv._breaker.allow():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return kv


def prompt(count: int, seed: int = 0) -> Any:
    """Token ids [1, count]."""
    return torch.tensor([numbers(count, seed)])


def run(generate: Callable[..., Any], ids: Any, count: int = 6, **options: Any) -> tuple[list[int], Any]:
    """Greedy tokens, and the logits [token, vocabulary] they were chosen by."""
    out = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


def stored(kv: KVStoreCache, daemon: Daemon, ids: Any) -> int:
    """Blocks that a prompt begins with, in the store."""
    keys = prefix_keys(kv.namespace, ids.reshape(-1).numpy())
    with daemon.client() as client:
        return len(client.lookup(keys, namespace=kv.namespace))
