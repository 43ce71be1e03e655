"""A model directory as `kvstore calibrate` takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.transformers.identity import model_layout, model_namespace
from kvstore_connectors.transformers.probe import Probe
from kvstore_connectors.transformers.support import base_model, check_model
from kvstore_connectors.weights import weights_digest as weights_of_files


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


def identities(path: Path) -> list[tuple[str, str]]:
    """Name and revision of a model directory as the connectors put them into namespaces.

    First as transformers has the model when it is loaded in the data type of its files, then as vLLM names the
    directory; each with a digest of every byte, and of a sample.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    decoder, layout = check_model(base_model(model)), model_layout(model, 256)
    found = [model_namespace(model, decoder, layout, weights=weights) for weights in ("full", "sample")]
    files = [f"{weights}:{weights_of_files(path, weights == 'full')}" for weights in ("full", "sample")]
    return [*((each.model, each.revision) for each in found), *((path.resolve().name, each) for each in files)]
