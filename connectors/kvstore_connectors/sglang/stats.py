"""What the backend counted, in the shapes that SGLang reports."""

from __future__ import annotations

import threading
from typing import Any

COUNTERS: dict[str, str] = {
    "lookups": "Pages asked for.",
    "hits": "Pages found, as part of a prefix.",
    "loaded_pages": "Pages copied into the host pool.",
    "loaded_bytes": "Bytes copied into the host pool.",
    "load_seconds": "Time spent on loads, waiting included.",
    "load_missing": "Loads that ended at a page that was gone or damaged.",
    "load_expired": "Leases that ran out or were lost before the copy was finished.",
    "load_wrong_size": "Pages refused because their size is not that of this pool's pages.",
    "saved_pages": "Pages stored.",
    "saved_bytes": "Bytes stored.",
    "save_seconds": "Time spent on saves.",
    "save_exists": "Pages offered that were there already.",
    "save_dropped": "Pages that the daemon had no room for.",
    "refused_pools": "Calls for pools that are not supported, answered with a miss.",
    "weights_changed": "Calls answered with a miss since the weights were changed at run time.",
    "outages": "Times the daemon was lost.",
    "skipped_lookup": "Lookups skipped while the daemon was not to be had.",
    "skipped_load": "Loads skipped while the daemon was not to be had.",
    "skipped_save": "Saves skipped while the daemon was not to be had.",
    "failed_lookup": "Lookups that ended in an error.",
    "failed_load": "Loads that ended in an error.",
    "failed_save": "Saves that ended in an error.",
}
"""Every counter, with its meaning. What is not here is not exported."""

_made: dict[str, Any] = {}
_lock = threading.Lock()


def publish(counts: dict[str, float]) -> None:
    """Add to ``sglang:kvstore_*_total``, which SGLang's own endpoint serves together with its metrics."""
    from prometheus_client import Counter

    with _lock:
        if not _made:
            _made.update({name: Counter(f"sglang:kvstore_{name}", text) for name, text in COUNTERS.items()})
    for name, amount in counts.items():
        if name in _made:
            _made[name].inc(amount)


class Samples:
    """Pages and speed of single calls, as SGLang's storage metrics want them."""

    KEEP = 1024

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads: list[tuple[int, float]] = []
        self._saves: list[tuple[int, float]] = []

    def load(self, pages: int, nbytes: int, seconds: float) -> None:
        """Note one load."""
        self._note(self._loads, pages, nbytes, seconds)

    def save(self, pages: int, nbytes: int, seconds: float) -> None:
        """Note one save."""
        self._note(self._saves, pages, nbytes, seconds)

    def drain(self) -> Any:
        """SGLang's record of everything since the last call."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            loads, self._loads = self._loads, []
            saves, self._saves = self._saves, []
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in loads],
            prefetch_bandwidth=[speed for _, speed in loads],
            backup_pgs=[pages for pages, _ in saves],
            backup_bandwidth=[speed for _, speed in saves],
        )

    def _note(self, kept: list[tuple[int, float]], pages: int, nbytes: int, seconds: float) -> None:
        with self._lock:
            if pages and len(kept) < self.KEEP:
                kept.append((pages, nbytes / 1e9 / max(seconds, 1e-9)))
