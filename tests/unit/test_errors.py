"""The error tree: what its picture, its codes and its docs say is what the classes are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvstore import errors
from kvstore.cli import docs
from kvstore.errors import BY_CODE, KVStoreError, from_wire

DOCS = Path(__file__).parents[2] / "docs"
LINE = re.compile(r"^(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?P<code>KV\d{3})", re.MULTILINE)


def test_the_picture_shows_every_class_with_its_code_and_its_parent() -> None:
    drawn: dict[str, tuple[str, str | None]] = {}
    above: list[str] = []
    for found in LINE.finditer((errors.__doc__ or "").replace("\n    ", "\n")):
        depth = len(found["indent"]) // 4
        del above[depth:]
        drawn[found["name"]] = (found["code"], above[-1] if above else None)
        above.append(found["name"])
    real = {
        kind.__name__: (code, None if kind is KVStoreError else kind.__mro__[1].__name__)
        for code, kind in BY_CODE.items()
    }
    assert drawn == real


def test_codes_are_stable() -> None:
    """A code once given is never given to another error. This list only grows."""
    assert {code: kind.__name__ for code, kind in BY_CODE.items()} == {
        "KV000": "KVStoreError",
        "KV100": "ConfigError",
        "KV200": "ProtocolError",
        "KV201": "FrameTooLarge",
        "KV202": "UnknownMethod",
        "KV203": "InvalidParams",
        "KV204": "VersionMismatch",
        "KV205": "HandshakeRequired",
        "KV300": "AccessError",
        "KV301": "AuthenticationFailed",
        "KV302": "UnknownNamespace",
        "KV303": "ForeignHandle",
        "KV400": "RequestError",
        "KV401": "LeaseExpired",
        "KV402": "LimitExceeded",
        "KV403": "ShuttingDown",
        "KV404": "QuotaRefused",
        "KV405": "FidelityRefused",
        "KV500": "Unavailable",
        "KV501": "ConnectionLost",
        "KV502": "DeadlineExceeded",
        "KV503": "DeviceUnavailable",
        "KV600": "StorageError",
        "KV601": "CorruptBlock",
        "KV602": "TierDown",
        "KV603": "DirectoryUnusable",
        "KV610": "CodecError",
        "KV611": "CannotEncode",
        "KV612": "CannotDecode",
        "KV900": "InternalError",
    }


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_each_error_says_code_cause_and_remedy_and_survives_the_wire(kind: type[KVStoreError]) -> None:
    error = kind("a cause.")
    assert str(error) == f"[{kind.code}] a cause. {kind.default_remedy}"
    assert kind.default_remedy.endswith((".", ")"))
    assert 400 <= kind.http_status < 600
    back = from_wire(error.code, error.cause, error.remedy)
    assert type(back) is kind
    assert (back.cause, back.remedy) == (error.cause, error.remedy)


def test_a_remedy_of_ones_own_replaces_the_one_of_the_class() -> None:
    assert str(KVStoreError("a cause.", "Do this.")) == "[KV000] a cause. Do this."
    assert str(KVStoreError("a cause.", "")) == "[KV000] a cause."


def test_a_code_of_a_newer_daemon_is_still_an_error() -> None:
    assert type(from_wire("KV999", "new.", "")) is KVStoreError


@pytest.mark.parametrize("name", docs.PAGES)
def test_pages_made_from_code_are_current(name: str) -> None:
    """Run `python -m kvstore.cli.docs` if this fails."""
    assert (DOCS / name).read_text("utf-8") == docs.PAGES[name]()


@pytest.mark.parametrize("code", BY_CODE)
def test_each_code_is_in_the_docs(code: str) -> None:
    assert f"| {code} |" in (DOCS / "errors.md").read_text("utf-8")
