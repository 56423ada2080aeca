"""Timing on the device."""

import time
from typing import Any

import torch


class Clock:
    """Marks points in time without waiting for the device, which works asynchronously.

    Args:
        on_gpu: measure the time of the current CUDA stream; otherwise of this process.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def mark(self) -> Any:
        """A mark at the present point of the device's work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two marks; waits until the device has reached the second one."""
        if not self.on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
