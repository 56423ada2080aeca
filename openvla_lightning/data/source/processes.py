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


def end_with_parent(worker: int = 0) -> None:
    """Make this process end when the one that started it is gone, however it went.

    A killed parent would leave its workers waiting for work, or for a reader, for ever. The argument is what a torch
    DataLoader passes to its `worker_init_fn`.
    """
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        wait([parent.sentinel] if parent else [])
        os._exit(1)

    if parent:
        threading.Thread(target=follow_parent, daemon=True).start()


def _start(counter: Any) -> None:
    global _counter
    _counter = counter
    end_with_parent()
