"""docs/protocol.md out of the message types, so that it can not say anything else than the code does."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator

from msgspec import NODEFAULT, Meta, structs

from kvstore.types import DropReason, Gone, MissReason, Namespace, TierCode
from kvstore.wire import frame
from kvstore.wire import messages as m
from kvstore.wire.server import HANDSHAKE_S, MAX_CALLS

_INTRO = f"""\
# Protocol

<!-- Made by `python -m kvstore.cli.docs`; change the code, not this page. -->

Version {m.PROTOCOL_VERSION}. For whoever writes a client in another language; the Python client is `kvstore/client`.

## Connections

The daemon listens on a Unix socket (mode 0600 in a private directory; the kernel says which user is calling) and, if
told to, on TCP, where the first call has to carry the token. A connection that has not said `hello` after
{HANDSHAKE_S:g} s is closed. Leases and reservations belong to their connection and end with it.

## Frames

```text
| head length: u32 LE | payload length: u32 LE | head: msgpack | payload: raw bytes |
```

A head has at most {frame.MAX_HEAD_BYTES} bytes. Payloads exist only on TCP, in `fill` requests and `fetch` replies;
on a Unix socket a block's bytes never travel in frames. A head is one of

```text
[0, id, method, params]       call; ids from 1 up, at most {MAX_CALLS} waiting ones at once
[1, id, error, result]        reply; error is nil or [code, cause, remedy], see errors.md
[2, method, params]           notice: no reply
```

Params and results are arrays in the order below; trailing fields with a default may be left out of a request. Unknown
methods and wrong, missing or surplus fields are answered with a typed error. What is not a frame or not a message at
all is answered under id 0, and the connection is closed. Replies may come in any order.

## Shared memory

Beside the main socket stands one with `.fd` appended to its path. Send it the session token from `hello` (16 bytes)
and a slab id (u64 LE); it answers with the slab's size (u64 LE) and the descriptor attached (SCM_RIGHTS), or with 0
if the slab is not of your trust domain. Map it shared, read and write. Slab ids are never used twice under one
`boot`.

After reading a leased block, check that the lease has not expired, counted from when you *sent* the request, and that
the connection is still open; only then use what you read.

## Keys

`ns` is the namespace digest: sha256 over `kvstore/namespace/1`, then for each field of the namespace below, in order,
its name and its value (numbers in decimal), each preceded by its length as u64 LE. A prefix key is sha256(key of the
block before | token ids as int32 LE), the first one's predecessor being sha256(`kvstore/prefix/1` | ns). On
this wire the daemon computes no keys; it only compares them.

## Events

Nothing is pushed: a subscriber asks with `events`, again and again, and waits in the daemon for something to happen.
The first question leaves everything empty and is answered with `reset` and the first page of a snapshot; from then on
each question carries `boot`, `after` and `snapshot` of the answer before. See events.md.
"""


def protocol_page() -> str:
    """The page."""
    lines = [_INTRO]
    lines += ["### Fields of a namespace", "", *_fields(Namespace), ""]
    lines += ["## Verbs", ""]
    for name, (params, result) in m.METHODS.items():
        lines += [f"### {name}", "", _doc(params), "", *_fields(params), ""]
        if structs.fields(result):
            lines += [f"Answer `{result.__name__}`: {_doc(result)}", "", *_fields(result), ""]
    lines += ["## Notices", ""]
    for name, params in m.NOTICES.items():
        lines += [f"### {name}", "", _doc(params), "", *_fields(params), ""]
    lines += ["## Parts", ""]
    for part in (m.Grant, m.Refusal, m.Place, m.Offer, m.Room, m.NoRoom, m.Outcome, m.Verdict, m.Event):
        lines += [f"### {part.__name__}", "", _doc(part), "", *_fields(part), ""]
    lines += ["## Values", "", "Tiers: " + ", ".join(f"{code.value} {code.name.lower()}" for code in TierCode) + "."]
    lines += ["", "Reasons of a miss: " + ", ".join(f"`{reason}`" for reason in MissReason) + "."]
    lines += ["", "Reasons of a drop: " + ", ".join(f"`{reason}`" for reason in DropReason) + "."]
    lines += ["", "Reasons of a removal: " + ", ".join(f"`{reason}`" for reason in Gone) + "."]
    return "\n".join(lines) + "\n"


def _doc(kind: type) -> str:
    text = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def _fields(kind: type) -> Iterator[str]:
    fields = structs.fields(kind)
    if not fields:
        yield "No fields."
        return
    yield "| field | type | default |"
    yield "|---|---|---|"
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in fields:
        default = "" if field.default is NODEFAULT else f"`{field.default!r}`"
        yield f"| {field.name} | {_type(hints[field.name])} | {default} |"


def _type(hint: object) -> str:
    """A type in words: its name, what it holds, its limits."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return _type(args[0]) + "".join(_limits(meta) for meta in args[1:] if isinstance(meta, Meta))
    if typing.get_origin(hint) in (list, tuple):
        inner = ", ".join(_type(arg) for arg in args if arg is not Ellipsis)
        return f"{'list' if typing.get_origin(hint) is list else 'tuple'} of ({inner})"
    if typing.get_origin(hint) is dict:
        return "map"
    if args:
        return " or ".join("nil" if arg is type(None) else _type(arg) for arg in args)
    return getattr(hint, "__name__", str(hint))


def _limits(meta: Meta) -> str:
    if meta.min_length is not None and meta.min_length == meta.max_length:
        return f" of {meta.max_length}"
    if meta.max_length is not None:
        return f", at most {meta.max_length}"
    if meta.le is not None:
        return f", {meta.ge:g} to {meta.le:g}" if isinstance(meta.le, float) else f", {meta.ge} to {meta.le}"
    return ""
