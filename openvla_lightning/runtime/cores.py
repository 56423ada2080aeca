"""The number of available processor cores."""

import os


def available_cores() -> int:
    """Cores that this process may use; in a container or a job, these may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
