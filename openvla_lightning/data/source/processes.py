"""Worker processes that never outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvla_lightning.runtime.progress import Bar  # imports rich, which loader workers do not need

CONTEXT = multiprocessing.get_context("spawn")
PARALLEL_FROM = 256 * 2**20
"""Size of a dataset, in bytes, from which several processes index it."""
KEPT_FROM = 2.0
"""Seconds after which a pass starts to store its results, file by file, in case it is interrupted."""

_counter: Any = None
_failed: Any = None


def worker_pool(workers: int, counter: Any = None, failed: Any = None) -> ProcessPoolExecutor:
    """A pool of spawned processes; `count()` in them advances `counter`, a `CONTEXT.Value`, until `failed` is set."""
    return ProcessPoolExecutor(workers, CONTEXT, _start, (counter, failed))


def run_jobs(work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int, bar: "Bar", done: int) -> None:
    """Call `work(*job, count)` for each job in a pool, and advance `bar` from `done` as the workers count.

    Raises:
        Exception: the first error of a job; the others do not begin, or end when they count next.
    """
    counter, failed = CONTEXT.Value("q", done), CONTEXT.Event()
    with worker_pool(workers, counter, failed) as pool:
        pending = {pool.submit(_unless_failed, work, *job, count) for job in jobs}
        try:
            while pending:
                finished, pending = futures.wait(pending, timeout=0.2)
                bar.update(counter.value)
                for future in finished:
                    future.result()
        except BaseException:
            failed.set()  # a pool cannot cancel what its processes have begun or hold ready
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def count() -> None:
    """Add one to the counter this worker was started with, if there is one.

    Raises:
        CancelledError: another job of `run_jobs` has failed.
    """
    _heed_failure()
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += 1


def begin_loading(worker: int) -> None:
    """Prepare a process of a torch DataLoader, which passes its number: it ends with its parent, not before.

    Schedulers send SIGTERM to all processes of a job, and terminals Ctrl-C. The parent still finishes its step and
    writes a checkpoint then, and torch raises an error in it as soon as a worker has ended.
    """
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Make this process end when its parent has ended for any reason; otherwise it would wait for ever."""
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        wait([parent.sentinel] if parent else [])
        os._exit(1)

    if parent:
        threading.Thread(target=follow_parent, daemon=True).start()


def _unless_failed(work: Callable[..., Any], *arguments: Any) -> Any:
    _heed_failure()
    return work(*arguments)


def _heed_failure() -> None:
    if _failed is not None and _failed.is_set():
        raise futures.CancelledError


def _start(counter: Any, failed: Any) -> None:
    global _counter, _failed
    _counter, _failed = counter, failed
    end_with_parent()
