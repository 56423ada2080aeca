"""How many processor cores there are to work with."""

import os


def available_cores() -> int:
    """Cores this process may use, which in a container or a job is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
