"""`kvstore plan`: in which order to run a file of prompts, and which prefixes to keep meanwhile. Needs no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import Json
from kvstore.errors import InvalidParams
from kvstore.keys import is_digest, prefix_keys
from kvstore.plan import Plan, plan
from kvstore.types import Namespace

MAX_LINE_BYTES = 64 << 20
_SHOWN = 20


class _Prompt(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int] = []
    keys: list[str] = []
    output: int = 0


_line = msgspec.json.Decoder(list[int] | _Prompt)


def make_plan(
    file: Annotated[Path, Parameter(help="One prompt a line, as JSON: token ids, or an object (docs/plan.md).")],
    /,
    *,
    block_tokens: Annotated[int, Parameter(help="Tokens in a block.")] = 256,
    json: Json = False,
) -> None:
    """Order a batch of prompts so that each common prefix is computed once and kept for as short as possible."""
    if block_tokens <= 0:
        raise InvalidParams(f"--block-tokens: {block_tokens} is not positive.", "")
    namespace = Namespace(model="plan", block_tokens=block_tokens)  # which one makes no difference to what is shared
    prompts: list[list[bytes]] = []
    outputs: list[int] = []
    for number, prompt in enumerate(_read(file), 1):
        prompts.append(_keys(prompt, number, namespace))
        outputs.append(prompt.output)
    made = plan(prompts, outputs if any(outputs) else None)
    if json:
        out.print_json(_as_json(made))
    else:
        _print(made)


def _read(file: Path) -> list[_Prompt]:
    prompts: list[_Prompt] = []
    number = 0
    try:
        with file.open("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InvalidParams(f"{file}: line {number} is longer than {MAX_LINE_BYTES} bytes.", "")
                found = _line.decode(line)
                prompts.append(_Prompt(tokens=found) if isinstance(found, list) else found)
    except OSError as error:
        raise InvalidParams(f"{file}: {error.strerror or error}.", "") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{file}: line {number}: {error}.", "docs/plan.md tells what a line holds.") from None
    return prompts


def _keys(prompt: _Prompt, number: int, namespace: Namespace) -> list[bytes]:
    if prompt.keys and prompt.tokens:
        raise InvalidParams(f"line {number}: it has tokens and keys; give one of them.", "")
    try:
        keys = [bytes.fromhex(key) for key in prompt.keys]
    except ValueError:
        raise InvalidParams(f"line {number}: a key is not hexadecimal.", "") from None
    if not all(map(is_digest, keys)):
        raise InvalidParams(f"line {number}: a key does not have 64 digits.", "")
    try:
        return keys or prefix_keys(namespace, prompt.tokens)
    except InvalidParams as error:
        raise InvalidParams(f"line {number}: {error.cause}", "") from None


def _as_json(made: Plan) -> dict[str, object]:
    return {
        "blocks": made.blocks,
        "distinct": made.distinct,
        "peak": made.peak,
        "groups": [{"first": g.first, "count": g.count, "common": g.common} for g in made.groups],
        "steps": [
            {"prompt": s.prompt, "shared": s.shared, "pin": len(s.begins), "unpin": len(s.ends)} for s in made.steps
        ],
    }


def _print(made: Plan) -> None:
    from rich.table import Table

    console = out.console()
    saved = 100 * (1 - made.distinct / made.blocks) if made.blocks else 0.0
    console.print(f"{len(made.steps):,} prompts in {len(made.groups):,} groups, {made.blocks:,} blocks.")
    console.print(f"{made.distinct:,} have to be computed ({saved:.1f} % are shared); at most {made.peak:,} pinned.")
    table = Table("group", "prompts", "common blocks", "order", box=None)
    for number, group in enumerate(made.groups[:_SHOWN]):
        order = made.order[group.first : group.first + group.count]
        listed = " ".join(map(str, order[:12])) + (" …" if len(order) > 12 else "")
        table.add_row(str(number), str(group.count), str(group.common), listed)
    console.print(table)
    if len(made.groups) > _SHOWN:
        console.print(f"… and {len(made.groups) - _SHOWN:,} more groups; --json shows all.")
