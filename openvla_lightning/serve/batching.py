"""Batching of requests from many robots: those that arrive while the model works form the next batch."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.reading import Question
from openvla_lightning.types import Observation

log = logging.getLogger(__name__)
Act = Callable[[list[Observation], list[str | None]], np.ndarray]


@dataclass
class _Waiting:
    question: Question
    until: float
    answer: "Future[np.ndarray]" = field(default_factory=Future)


class Batcher:
    """A thread that runs the model, and a queue of limited length in front of it.

    Args:
        act: observations, unnorm_keys -> chunks of actions [B, T, D], as `Policy.act_chunk`.
        max_batch: largest number of requests in a batch.
        max_wait: seconds to wait for more requests; 0 takes those that came while the model worked.
        max_queue: largest number of waiting requests.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        act: Act,
        max_batch: int = 16,
        max_wait: float = 0.0,
        max_queue: int = 256,
        on_batch: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._act, self._max_batch, self._max_wait, self._on_batch = act, max_batch, max_wait, on_batch
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(max_queue)
        self._closing = False
        self._lock = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="policy", daemon=True)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the thread answers requests."""
        return self._worker.is_alive() and not self._closing

    def waiting(self) -> int:
        """Number of waiting requests."""
        return self._queue.qsize()

    def submit(self, question: Question, until: float) -> "Future[np.ndarray]":
        """Queue a request.

        Args:
            question: the request.
            until: deadline on `time.monotonic`'s clock.

        Returns:
            A future of the actions, float64 [T, D]. It raises Refused: 504 after the deadline, 422 when the policy
            cannot act on the request, 500 when the policy fails.

        Raises:
            Refused: 503, when too many requests wait or the server stops.
        """
        waiting = _Waiting(question, until)
        with self._lock:  # no request is queued after closing
            if self._closing:
                raise Refused(503, "stopping", "the server is stopping; ask again when it is back")
            try:
                self._queue.put_nowait(waiting)
            except queue.Full:
                raise Refused(503, "queue_full", f"{self._queue.maxsize} requests wait already; ask later") from None
        return waiting.answer

    def close(self) -> None:
        """Accept no more requests; queued ones are still answered."""
        with self._lock:
            self._closing = True

    def join(self) -> None:
        """Close, and return when all requests are answered."""
        self.close()
        self._queue.put(None)
        self._worker.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, more_until = [first], time.monotonic() + self._max_wait
            while len(batch) < self._max_batch:
                patience = more_until - time.monotonic()
                try:
                    further = self._queue.get(timeout=patience) if patience > 0 else self._queue.get_nowait()
                except queue.Empty:
                    break
                if further is None:
                    self._queue.put(None)
                    break
                batch.append(further)
            self._answer([waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()])

    def _answer(self, batch: list[_Waiting]) -> None:
        now = time.monotonic()
        for waiting in batch:
            if waiting.until <= now:
                waiting.answer.set_exception(stale())
        batch = [waiting for waiting in batch if waiting.until > now]
        if not batch:
            return
        self._on_batch(len(batch))
        questions = [waiting.question for waiting in batch]
        try:
            actions = self._act([q.observation for q in questions], [q.unnorm_key for q in questions])
            if len(actions) != len(batch):
                raise RuntimeError(f"{len(actions)} actions for {len(batch)} questions")
        except Exception as error:
            if len(batch) > 1:  # one request may be faulty, or their actions differ in width
                for waiting in batch:
                    self._answer([waiting])
            else:
                batch[0].answer.set_exception(_refusal(error))
            return
        for waiting, action in zip(batch, actions, strict=True):
            if np.isfinite(action).all():
                waiting.answer.set_result(np.asarray(action, np.float64))
            else:
                waiting.answer.set_exception(Refused(500, "not_finite", "the policy's action is not a number"))


def stale() -> Refused:
    """The answer to a request whose deadline has passed."""
    return Refused(504, "stale", "the deadline passed before there was an action; send a new image")


def _refusal(error: Exception) -> Refused:
    if isinstance(error, ValueError | TypeError | KeyError):
        return Refused(422, "cannot_act", str(error.args[0] if error.args else error)[:500])
    log.error("The policy failed", exc_info=error)
    return Refused(500, "internal", "the policy failed; the server's log says why")
