"""What the builder reads: a model's directory, and documents as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from kvstore.errors import ConfigError
from kvstore.types import MAX_CHUNK_TOKENS
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.rope import movable

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""What `Llama` computes; without sliding windows."""

MAX_TEXT_BYTES = 256 << 20
_TEXTS = (".txt", ".md", ".jsonl")


def load_model(folder: Path, device: str = "cpu") -> tuple[Llama, dict[str, Any]]:
    """A model in float32, and the fields of its configuration.

    Raises
    ------
    ConfigError
        If the directory holds no model of a kind that can be built for.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ConfigError("the package safetensors is not installed.", "pip install safetensors") from None
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"build: {folder} has no readable config.json ({error}).", "Name a model's directory."
        ) from None
    kinds = config.get("architectures") or []
    if not any(kind in ARCHITECTURES for kind in kinds) or config.get("sliding_window"):
        raise ConfigError(
            f"build: a model of kind {', '.join(kinds) or 'unknown'} can not be built for.",
            f"Known are {', '.join(ARCHITECTURES)}, without sliding windows; the vLLM connector captures the others.",
        )
    movable(config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"build: {folder} has no weights in safetensors.", "Convert them, or name another directory.")
    tensors = {name: value.float() for file in files for name, value in load_file(file, device=device).items()}
    return Llama(config, tensors), config


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer (a `tokenizers.Tokenizer`).

    Raises
    ------
    ConfigError
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("the package tokenizers is not installed.", "pip install tokenizers") from None
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ConfigError(f"build: {folder} has no tokenizer.json.", "Give token ids in a .jsonl file instead.")
    return Tokenizer.from_file(str(file))


def read_documents(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    """Documents as token ids: text files, and JSON lines with ``text`` or ``tokens``; folders are searched, in order.

    Raises
    ------
    ConfigError
    """
    if path.is_dir():
        for file in sorted(one for one in path.rglob("*") if one.suffix in _TEXTS and one.is_file()):
            yield from read_documents(file, tokenizer)
        return
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"build: {path} is larger than {MAX_TEXT_BYTES >> 20} MiB.", "Split it.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"build: {path} can not be read ({error}).", "") from None
    if path.suffix != ".jsonl":
        yield _encode(text, tokenizer)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                one = msgspec.json.decode(line, type=_Line)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"build: {path}, line {number}: {error}.", 'Write {"text": …} a line.') from None
            yield one.tokens or _encode(one.text, tokenizer)


class _Line(msgspec.Struct):
    text: str = ""
    tokens: list[int] = []


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def split(tokens: list[int], most: int, breaks: frozenset[int]) -> list[list[int]]:
    """Pieces of at most so many tokens, that end behind one of the `breaks` where there is one in their second half."""
    most = min(most, MAX_CHUNK_TOKENS)
    out = []
    while len(tokens) > most:
        end = next((at for at in range(most, most // 2, -1) if tokens[at - 1] in breaks), most)
        out.append(tokens[:end])
        tokens = tokens[end:]
    return [*out, tokens] if tokens else out


def line_breaks(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a line."""
    vocabulary = tokenizer.get_vocab_size()
    return frozenset(one for one in range(vocabulary) if tokenizer.decode([one]).endswith("\n"))


def as_ids(tokens: list[int], device: str = "cpu") -> torch.Tensor:
    """Token ids as the model takes them."""
    return torch.tensor(tokens, dtype=torch.int64, device=device)
