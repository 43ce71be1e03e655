"""Messages as bytes and back: calls, replies and notices around their params and results.

msgpack is decoded by msgspec straight into the types of `kvstore.wire.messages`, so a hostile message is refused at its
first wrong byte, before anything is built from it; extension types are refused everywhere.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kvstore.errors import InvalidParams, KVStoreError, ProtocolError, UnknownMethod
from kvstore.patterns import in_words
from kvstore.wire.fields import Message
from kvstore.wire.messages import METHODS, NOTICES

REQUEST, REPLY, NOTICE = 0, 1, 2


class Request(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Envelope of a call."""

    kind: int
    id: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    method: str
    params: msgspec.Raw


class Answer(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Envelope of a reply. `error` is (code, cause, remedy) or nil."""

    kind: int
    id: int
    error: tuple[str, str, str] | None
    result: msgspec.Raw


class Notice(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Envelope of a notice."""

    kind: int
    method: str
    params: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_request = msgspec.msgpack.Decoder(Request)
_answer = msgspec.msgpack.Decoder(Answer)
_notice = msgspec.msgpack.Decoder(Notice)
_params = {name: msgspec.msgpack.Decoder(types[0]) for name, types in METHODS.items()}
_results = {name: msgspec.msgpack.Decoder(types[1]) for name, types in METHODS.items()}
_notices = {name: msgspec.msgpack.Decoder(kind) for name, kind in NOTICES.items()}
_NIL = msgspec.Raw(b"\xc0")


def encode_request(call_id: int, method: str, params: Message) -> bytes:
    """A call."""
    return _encoder.encode((REQUEST, call_id, method, params))


def encode_reply(call_id: int, result: Message) -> bytes:
    """An answer."""
    return _encoder.encode((REPLY, call_id, None, result))


def encode_error(call_id: int, error: KVStoreError) -> bytes:
    """An answer that carries an error."""
    return _encoder.encode((REPLY, call_id, (error.code, error.cause, error.remedy), _NIL))


def encode_notice(method: str, params: Message) -> bytes:
    """A notice."""
    return _encoder.encode((NOTICE, method, params))


def decode_request(head: bytes) -> Request | Notice:
    """Envelope of what a client sent.

    Raises
    ------
    ProtocolError
        If it is neither a call nor a notice.
    """
    # The second byte is the kind: 0x94 0x00 is a call, 0x93 0x02 a notice.
    try:
        if head[:2] == b"\x93\x02":
            return _notice.decode(head)
        request = _request.decode(head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a call or notice: {error}.") from None
    if request.kind != REQUEST:
        raise ProtocolError(f"message kind {request.kind} is not one a client may send.")
    return request


def decode_params(method: str, params: msgspec.Raw) -> Message:
    """Parameters of a verb.

    Raises
    ------
    UnknownMethod, InvalidParams
    """
    decoder = _params.get(method)
    if decoder is None:
        raise UnknownMethod(f"there is no verb {method[:40]!r}.")
    try:
        return decoder.decode(params)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{method}: {in_words(error)}.") from None


def decode_answer(head: bytes) -> Answer | Notice:
    """Envelope of what the daemon sent.

    Raises
    ------
    ProtocolError
    """
    try:
        if head[:2] == b"\x93\x02":
            return _notice.decode(head)
        answer = _answer.decode(head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a reply or notice: {error}.") from None
    if answer.kind != REPLY:
        raise ProtocolError(f"message kind {answer.kind} is not one a daemon may send.")
    return answer


def decode_result(method: str, result: msgspec.Raw) -> Message:
    """Result of a verb; raises `ProtocolError`."""
    try:
        return _results[method].decode(result)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{method}: the reply is not understood: {error}.") from None


def decode_notice(notice: Notice) -> Message:
    """Parameters of a daemon's notice; raises `ProtocolError`."""
    try:
        return _notices[notice.method].decode(notice.params)
    except (KeyError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the notice {notice.method[:40]!r} is not understood: {error}.") from None
