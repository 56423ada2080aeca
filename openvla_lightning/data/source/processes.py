"""Worker processes that never outlive the process that started them."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")

_counter: Any = None


def worker_pool(workers: int, counter: Any = None) -> ProcessPoolExecutor:
    """A pool of spawned processes; `counter`, a `CONTEXT.Value`, is what their `count()` advances."""
    return ProcessPoolExecutor(workers, CONTEXT, _start, (counter,))


def count() -> None:
    """Add one to the counter this worker was started with, if there is one."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += 1


def _start(counter: Any) -> None:
    global _counter
    _counter = counter
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:  # a killed parent would leave its workers waiting for the queue for ever
        wait([parent.sentinel] if parent else [])
        os._exit(1)

    if parent:
        threading.Thread(target=follow_parent, daemon=True).start()
