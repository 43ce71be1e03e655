"""`kvstore explain`: which blocks of a prompt are where, and why the rest is not here."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kvstore.cli import out, spaces
from kvstore.cli.flags import Address, ConfigFile, Json
from kvstore.cli.status import fetch, resolve
from kvstore.errors import ConfigError, InvalidParams
from kvstore.keys import prefix_keys
from kvstore.sightings import places
from kvstore.units import format_duration, format_size

MAX_BYTES = 64 << 20

WHY = {
    "never_stored": "never stored here, or gone for long",
    "evicted": "evicted to make room",
    "expired": "unused for as long as its quota rule allows",
    "dropped": "dropped by somebody",
    "corrupt": "damaged, and put aside",
    "lost": "its medium no longer had it",
}


def explain(
    prompt: Annotated[str, Parameter(help="File with token ids or keys, `-` for stdin, or the ids themselves.")],
    /,
    *,
    namespace: spaces.Digest = "",
    model: spaces.Model = "",
    tokenizer: Annotated[
        str, Parameter(help="Take the prompt as text, and this tokenizer.json, or the directory it lies in, for it.")
    ] = "",
    json: Json = False,
    address: Address = None,
    config: ConfigFile = None,
) -> int:
    """Look up each block of a prompt: in which tiers it is, whether an engine can use it, and why it missed.

    Exits with 1 if not every block can be used.
    """
    from kvstore.client import KVStoreClient, operator

    text = _read(prompt)
    target = resolve(address, config)
    space = spaces.choose(fetch(target), namespace, model)
    keys = _keys(text, space, tokenizer)
    with KVStoreClient(target) as client:
        blocks = operator.explain(client, bytes.fromhex(space["digest"]), keys)
    usable = sum(bool(block["tiers"]) and block["reachable"] for block in blocks)
    if json:
        out.print_json({"namespace": space["digest"], "usable": usable, "blocks": blocks})
    else:
        _print(space, blocks, usable)
    return int(usable < len(blocks))


def _read(prompt: str) -> str:
    """What was given: a file's text, stdin's, or the argument itself."""
    try:
        if prompt == "-":
            return sys.stdin.read(MAX_BYTES)
        if _is_file(prompt):
            with Path(prompt).open(encoding="utf-8") as file:
                return file.read(MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{prompt}: {error}.", "Name a text file.") from None
    return prompt


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return False


def _keys(text: str, space: Mapping[str, Any], tokenizer: str) -> list[bytes]:
    if tokenizer:
        return _cut(_tokens(text, tokenizer), space)
    words = re.findall(r"[0-9A-Za-z-]+", text)
    if words and all(len(word) == 64 for word in words):
        try:
            return [bytes.fromhex(word) for word in words]
        except ValueError:
            raise InvalidParams("prompt: a key is not hexadecimal.", "A key has 64 hexadecimal digits.") from None
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise InvalidParams(
            "prompt: neither token ids nor keys.", "Give numbers, keys of 64 digits, or text with --tokenizer."
        )
    return _cut([int(word) for word in words], space)


def _cut(tokens: Sequence[int], space: Mapping[str, Any]) -> list[bytes]:
    named = spaces.fields(space)
    if named is None:
        raise InvalidParams(
            "the daemon does not know all fields of this namespace, so tokens cannot be cut into blocks.",
            "Let an engine introduce it, or give keys.",
        )
    keys = prefix_keys(named, tokens)
    if not keys:
        raise InvalidParams(f"prompt: {len(tokens)} tokens are less than one block of {named.block_tokens}.", "")
    return keys


def _tokens(text: str, tokenizer: str) -> list[int]:
    file = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    if not file.is_file():
        raise InvalidParams(f"--tokenizer: {file} is not a file.", "Name the tokenizer.json of the model.")
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("--tokenizer: the tokenizers library is not here.", "pip install tokenizers") from None
    try:
        return list(Tokenizer.from_file(str(file)).encode(text).ids)
    except Exception as error:  # the library raises nothing more special
        raise InvalidParams(f"--tokenizer: {file}: {str(error)[:200]}", "It must be a tokenizer.json.") from None


def _print(space: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]], usable: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("Block", "Key", "Where", "Bytes", "Usable", "Why", box=None, pad_edge=False, header_style="bold")
    for index, block in enumerate(blocks):
        here = bool(block["tiers"])
        good = here and block["reachable"]
        use = Text("yes", "green") if good else Text("behind a hole" if here else "no", "yellow" if here else "red")
        size = format_size(block["bytes"]) if here else "-"
        where = places(block["tiers"], block.get("chains", {}))
        table.add_row(str(index), block["key"][:16], out.clean(where), size, use, Text(out.clean(why(block)), "dim"))
    out.console().print(table)
    name = out.clean(space.get("model") or "unnamed")
    verdict = f"{usable:,} of {len(blocks):,} blocks can be used in {name} ({space['digest'][:12]})."
    out.console().print(Text(verdict, "bold green" if usable == len(blocks) else "bold yellow"))


def why(block: Mapping[str, Any]) -> str:
    """One line about a block: what holds it, or why it is nowhere."""
    if block["reason"]:
        reason = WHY.get(block["reason"], f"offered, and not taken: {block['reason'].replace('_', ' ')}")
        left = f" from {block['left']}" if block["left"] and block["reason"] == "evicted" else ""
        ago = "" if block["gone_s"] is None else f", {format_duration(int(block['gone_s']))} ago"
        return f"{reason}{left}{ago}"
    facts = ["in memory for " + format_duration(int(block["age_s"]))] if block["age_s"] is not None else []
    facts += [f"read by {block['readers']}"] if block["readers"] else []
    facts += ["pinned"] if block["pinned"] else []
    facts += ["not yet below"] if block["waiting"] else []
    facts += [f"ends a chunk ({block['chunk']})"] if block["chunk"] else []
    return ", ".join(facts)
