"""What the processor has instructions for: a product in a type that it has to emulate takes ten times as long."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def flags() -> frozenset[str]:
    """Names of its extensions as Linux has them for x86; nothing of use elsewhere."""
    try:
        return frozenset(CPU_INFO.read_text().split())
    except OSError:
        return frozenset()
