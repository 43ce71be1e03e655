"""What a daemon that has started says: where it listens and what it may use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvstore import __version__
from kvstore.daemon import Daemon
from kvstore.units import format_size


def banner(daemon: Daemon) -> str:
    """Where it listens and what it may use."""
    s = daemon.loaded.settings
    arena = daemon.chain.host.arena
    pages = "huge pages" if arena.huge else "4 KiB pages"
    lines = [
        f"kvstore {__version__} is ready ({time.monotonic() - daemon.started:.2f} s)",
        f"  socket   {s.listen.socket}",
    ]
    if s.listen.tcp:
        lines.append(f"  tcp      {s.listen.tcp}  (with a token)")
    blocks = f"{format_size(arena.capacity)} for blocks, the rest for their index"
    lines.append(f"  memory   up to {format_size(s.host.bytes)} in shared memory ({pages}): {blocks}")
    if (gpu := daemon.service.gpu) is not None:
        lines.append(f"  gpu      {format_size(gpu.tier.pool.capacity)} of {gpu.name}, for copies of hot blocks")
    elif daemon.gpu_off:
        lines.append(f"  gpu      off: {daemon.gpu_off}")
    for tier in daemon.chain.below:
        state, usage = tier.describe_state(), tier.usage()
        size, found = format_size(usage.capacity), f"{usage.blocks} blocks found"
        lines.append(f"  {tier.name:<8} up to {size} {place_of(state)}, {found}")
    if not daemon.chain.below:
        full = "auto" in daemon.loaded.origins["disk.bytes"]
        why = f" (no free space around {s.disk.path})" if full else ""
        lines.append(f"  disk     off: what memory cannot hold is forgotten{why}")
    lines.append(f"  status   {daemon.url or 'off'}")
    lines.append('  vLLM     --kv-transfer-config \'{"kv_connector":"KVStoreConnector","kv_role":"kv_both",')
    lines.append('             "kv_load_failure_policy":"recompute"}\'')
    lines.append("Ctrl-C to stop.")
    return "\n".join(lines)


def place_of(state: Mapping[str, Any]) -> str:
    """Where a tier keeps its blocks, in words."""
    if "path" in state:
        how = "direct I/O" if state.get("direct_io", True) else f"buffered I/O: {state.get('direct_io_reason')}"
        return f"in {state['path']} ({how})"
    return "for all its daemons" if state.get("connected") else f"not reached yet ({state.get('last_error')})"
