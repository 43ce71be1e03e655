"""A model directory as `kvstore calibrate` takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.transformers.identity import weights_digest
from kvstore_connectors.transformers.probe import Probe


def load(path: Path, device: str) -> tuple[Probe, Callable[[str], list[int]]]:
    """A model in float32, so that nothing but the codec differs, and its tokenizer.

    Raises
    ------
    ConfigError
        The directory holds no such model, or the device is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(device)
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}", "Name a model directory and a device.") from None
    return Probe(model), lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


def revision_of(model: Any) -> str:
    """Digest of a model's weights as they are in memory."""
    return f"weights:{weights_digest(model.get_decoder(), 'full')}"
