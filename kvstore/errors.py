"""Every error kvstore raises, with a code that is the same in Python, on the wire, over HTTP and in the docs.

    KVStoreError                      KV000
    ├── ConfigError                   KV100  a setting has a value that breaks its rule
    ├── ProtocolError                 KV200  a frame or message that the protocol does not allow
    │   ├── FrameTooLarge             KV201
    │   ├── UnknownMethod             KV202
    │   ├── InvalidParams             KV203
    │   ├── VersionMismatch           KV204
    │   └── HandshakeRequired         KV205
    ├── AccessError                   KV300  the peer may not do this
    │   ├── AuthenticationFailed      KV301
    │   ├── UnknownNamespace          KV302
    │   └── ForeignHandle             KV303  a lease, reservation or slab of somebody else, or of nobody
    ├── RequestError                  KV400  well-formed, but cannot be served as asked
    │   ├── LeaseExpired              KV401
    │   ├── LimitExceeded             KV402
    │   ├── ShuttingDown              KV403
    │   ├── QuotaRefused              KV404  a rule about quotas that cannot be kept, or its file is bad
    │   └── FidelityRefused           KV405  a lossy namespace whose profile is not here, or of another model
    ├── Unavailable                   KV500  the daemon cannot be reached
    │   ├── ConnectionLost            KV501
    │   ├── DeadlineExceeded          KV502
    │   └── DeviceUnavailable         KV503  a CUDA device, or what drives it, is not there
    ├── StorageError                  KV600  a tier cannot do its work
    │   ├── CorruptBlock              KV601
    │   ├── TierDown                  KV602
    │   ├── DirectoryUnusable         KV603
    │   └── CodecError                KV610  a codec cannot do its work
    │       ├── CannotEncode          KV611
    │       └── CannotDecode          KV612
    └── InternalError                 KV900  a defect of ours; the message names what failed

What a cache is expected to say (absent, dropped, throttled) is a value (`kvstore.types`), never an exception.
"""

from __future__ import annotations

from typing import ClassVar


class KVStoreError(Exception):
    """Base of all errors.

    Parameters
    ----------
    cause : str
        One line: what is wrong, with the field, the value and the rule where there is one.
    remedy : str
        One line: what the reader can do about it. Defaults to the remedy of the class.
    """

    code: ClassVar[str] = "KV000"
    default_remedy: ClassVar[str] = "See docs/errors.md."
    http_status: ClassVar[int] = 500

    def __init__(self, cause: str, remedy: str | None = None) -> None:
        self.cause = cause
        self.remedy = remedy if remedy is not None else self.default_remedy
        super().__init__(f"[{self.code}] {cause} {self.remedy}".rstrip())


class ConfigError(KVStoreError):
    """A setting has a value that breaks its rule."""

    code = "KV100"
    default_remedy = "`kvstore config show` lists every setting, its value and where it came from."
    http_status = 400


class ProtocolError(KVStoreError):
    """A frame or message that the protocol does not allow. The connection that sent it is closed."""

    code = "KV200"
    default_remedy = "Client and daemon may be of different versions: compare `kvstore version` on both sides."
    http_status = 400


class FrameTooLarge(ProtocolError):
    """A frame announces more bytes than the limit."""

    code = "KV201"
    default_remedy = "Send fewer keys per request; `hello` tells the limits."


class UnknownMethod(ProtocolError):
    """A request names a verb that does not exist."""

    code = "KV202"


class InvalidParams(ProtocolError):
    """A request's parameters have a wrong type, an unknown field or a value out of range."""

    code = "KV203"
    default_remedy = "docs/protocol.md says what each request takes."


class VersionMismatch(ProtocolError):
    """Client and daemon share no protocol version."""

    code = "KV204"
    default_remedy = "Install the same kvstore release on both sides."


class HandshakeRequired(ProtocolError):
    """A verb was called before `hello`."""

    code = "KV205"
    default_remedy = "Call `hello` first."


class AccessError(KVStoreError):
    """The peer may not do this."""

    code = "KV300"
    default_remedy = "Connect as the user that runs the daemon, or ask its operator for access."
    http_status = 403


class AuthenticationFailed(AccessError):
    """No token, or a wrong one, on a connection that needs one."""

    code = "KV301"
    default_remedy = "Pass the daemon's token (KVSTORE_CLIENT_TOKEN, or `token=`)."
    http_status = 401


class UnknownNamespace(AccessError):
    """A verb names a namespace that was never introduced to this daemon in this trust domain."""

    code = "KV302"
    default_remedy = "Introduce the namespace with `hello` and repeat the call."


class ForeignHandle(AccessError):
    """A lease, reservation or slab that does not belong to this connection."""

    code = "KV303"
    default_remedy = "Handles end with the connection they were given to; ask for a new one."


class RequestError(KVStoreError):
    """A well-formed request that cannot be served as asked."""

    code = "KV400"
    http_status = 409


class LeaseExpired(RequestError):
    """A lease or reservation was used after its time."""

    code = "KV401"
    default_remedy = "Ask for a longer `ttl_s`, or finish sooner; treat the blocks as missed."


class LimitExceeded(RequestError):
    """A request or connection goes over a limit of the daemon."""

    code = "KV402"
    default_remedy = "Split the request, release what is no longer used, or raise the limit in the daemon's settings."
    http_status = 429


class ShuttingDown(RequestError):
    """The daemon is draining and takes no new work."""

    code = "KV403"
    default_remedy = "Continue without the cache; reconnect when the daemon is back."
    http_status = 503


class QuotaRefused(RequestError):
    """A rule about quotas is not well written, promises more than there is, or its file cannot be read or written."""

    code = "KV404"
    default_remedy = "docs/quotas.md tells how rules are written."
    http_status = 400


class FidelityRefused(RequestError):
    """A namespace asks for a fidelity that the daemon has no profile for, or one of another model or revision."""

    code = "KV405"
    default_remedy = "Run `kvstore calibrate` on this model and name its folder in codecs.profiles, or use `exact`."


class Unavailable(KVStoreError):
    """The daemon cannot be reached."""

    code = "KV500"
    default_remedy = "Is it running? `kvstore status` tells; `kvstore serve` starts it."
    http_status = 503


class ConnectionLost(Unavailable):
    """The connection to the daemon ended, with all leases and reservations on it."""

    code = "KV501"


class DeadlineExceeded(Unavailable):
    """The daemon did not answer in the time the caller gave."""

    code = "KV502"
    default_remedy = "Continue without the cache; raise the timeout if the daemon is merely busy."


class DeviceUnavailable(Unavailable):
    """A CUDA device, its driver or CuPy is not there, or it refused what was asked of it."""

    code = "KV503"
    default_remedy = "`nvidia-smi` shows the devices; the engine goes on without what needs them."


class StorageError(KVStoreError):
    """A tier cannot do its work."""

    code = "KV600"


class CorruptBlock(StorageError):
    """Stored bytes are not what was stored: header, identity, length or checksum is wrong."""

    code = "KV601"
    default_remedy = "The block was quarantined and counts as a miss; `kvstore check` walks the whole tier."


class TierDown(StorageError):
    """A tier does not answer, or answers with errors, and is not being asked for a while."""

    code = "KV602"
    default_remedy = "`kvstore status` tells since when and why; the tier is tried again by itself."
    http_status = 503


class DirectoryUnusable(StorageError):
    """The disk tier's directory cannot be used: not ours, not writable, foreign, or in use by another daemon."""

    code = "KV603"
    default_remedy = "Choose another directory with --disk-path, or switch the tier off with --disk-bytes 0."


class CodecError(StorageError):
    """A codec cannot do its work. The block is kept as it is, or counts as a miss."""

    code = "KV610"
    default_remedy = "docs/codecs.md tells what each codec needs."


class CannotEncode(CodecError):
    """A block or chain of codecs that cannot be encoded: shape, values, or something of the model that is missing."""

    code = "KV611"
    default_remedy = "Use a chain that fits (docs/codecs.md); `raw` and `lossless` take any block."


class CannotDecode(CodecError):
    """Encoded bytes that need what is not here: a codec, a basis, a key, a rotation."""

    code = "KV612"
    default_remedy = "The block counts as a miss; docs/codecs.md tells what each codec needs."


class InternalError(KVStoreError):
    """A defect of kvstore. The daemon logs the traceback; the peer gets the sentence."""

    code = "KV900"
    default_remedy = "Please report it with the daemon's log."


def _tree(cls: type[KVStoreError]) -> dict[str, type[KVStoreError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


BY_CODE: dict[str, type[KVStoreError]] = _tree(KVStoreError)
"""Error class of each code; an unknown code (a newer daemon) is raised as `KVStoreError`."""


def from_wire(code: str, cause: str, remedy: str) -> KVStoreError:
    """Rebuild an error that travelled as (code, cause, remedy)."""
    return BY_CODE.get(code, KVStoreError)(cause, remedy)
