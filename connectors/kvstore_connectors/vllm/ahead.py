"""The daemon's memory pinned before a block in it is needed: beside the start of an engine, and as it grows.

Pinning takes 0.1 to 0.3 s a gigabyte. Whoever loads first would wait for it, and whoever launches a kernel meanwhile
waits for each window of it (`kvstore_gpu.host`). So it is done in the background, no more than half of the time.
"""

from __future__ import annotations

import threading
import time

import torch

from kvstore.errors import DeviceUnavailable
from kvstore_connectors.base import Link, log
from kvstore_gpu import host

LOOK_S = 0.5
"""Time between looks for new slabs."""


class Ahead:
    """A thread that pins the daemon's slabs.

    Parameters
    ----------
    link : Link
        Its own, for this thread.
    device : torch.device
        The engine's.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self._device = link, device
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kvstore-ahead", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the window it is at."""
        self._stopped.set()
        self._thread.join(timeout=2.0)
        self._link.close()

    def _serve(self) -> None:
        try:
            while not self._stopped.wait(LOOK_S):
                self._look()
        except DeviceUnavailable as error:  # blocks elsewhere are told one by one
            log.warning("the daemon's memory is not pinned ahead: %s %s", error.cause, error.remedy)

    def _look(self) -> None:
        for slab in self._link.run("ahead", lambda client: client.map_all()) or []:
            begun = time.monotonic()
            for _ in host.ahead(slab, self._device):
                if self._stopped.wait(time.monotonic() - begun):
                    return
                begun = time.monotonic()
