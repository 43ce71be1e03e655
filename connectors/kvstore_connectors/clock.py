"""Moments on the host, or on a device where work ends later than the call that asks for it."""

from __future__ import annotations

import time

import torch


class Moment:
    """Now on the host; on a CUDA device the end of what its current stream has been given so far.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.event = None
        self._at = 0.0
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self._at = time.monotonic()

    def until(self, later: Moment) -> float:
        """Seconds to a later moment, which has passed."""
        if self.event is not None and later.event is not None:
            return self.event.elapsed_time(later.event) / 1e3
        return later._at - self._at
