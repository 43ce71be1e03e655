"""`kvstore version`: what is installed, and which protocol and disk format it speaks."""

from __future__ import annotations

import importlib.metadata
import platform

from kvstore import __version__
from kvstore.cli import out
from kvstore.cli.flags import Json

LIBRARIES = ("msgspec", "msgpack", "uvloop", "numpy", "xxhash", "aiohttp", "redis", "torch", "cupy-cuda13x", "vllm")


def installed(name: str) -> str | None:
    """Version of a distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def version(*, json: Json = False) -> None:
    """Show the versions of kvstore, its protocol, its disk format, Python and the libraries that matter."""
    from kvstore.disk.format import FORMAT_VERSION
    from kvstore.wire.messages import PROTOCOL_VERSION

    facts: dict[str, object] = {
        "kvstore": __version__,
        "protocol": PROTOCOL_VERSION,
        "disk format": FORMAT_VERSION,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    facts |= {name: found for name in LIBRARIES if (found := installed(name))}
    if json:
        out.print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        out.console().print(f"{name:<{width}}  {value}", markup=False)
