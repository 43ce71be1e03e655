"""The two things of SGLang's that are not its own here; everything else is.

torchvision: its models of images name it when they are imported, its cache never calls it, and builds that match a
torch for the CPU are not everywhere. Its hash of pages: it is compiled when it is first used, with OpenSSL's headers;
`hashlib` takes its place. To a storage backend a hash is 64 digits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

STUBBED = "torchvision"


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != STUBBED:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to execute."""


def page_hashes(tokens: Any, prior: bytes | None = None, page_size: int | None = None) -> list[str]:
    """A chain of SHA-256 over the tokens of pages."""
    ids, step, hashes = list(tokens.token_ids), page_size or len(tokens), []
    for start in range(0, len(ids) - step + 1, step):
        prior = hashlib.sha256((prior or b"") + repr(ids[start : start + step]).encode()).digest()
        hashes.append(prior.hex())
    return hashes


def install() -> None:
    """Must run before SGLang is imported; what looks for torchvision by itself has then found none."""
    import transformers.image_utils  # noqa: F401

    if importlib.util.find_spec(STUBBED) is None:
        sys.meta_path.append(_Finder())
    from sglang.srt.mem_cache import utils

    utils.get_native_hash = page_hashes
