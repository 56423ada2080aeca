"""Time as the device spends it."""

import time
from typing import Any

import torch


class Clock:
    """Marks points in time without waiting for the device, which works through its queue behind the host.

    Args:
        on_gpu: time the current CUDA stream; otherwise this process.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def mark(self) -> Any:
        """This point in the device's work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks; waits until the device has come to the second."""
        if not self.on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
