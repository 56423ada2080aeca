"""Many robots, one model: whoever waits while the model works is acted on together afterwards."""

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
    """A thread that has the model to itself, and a bounded queue in front of it.

    Args:
        act: observations, unnorm_keys -> chunks of actions [B, T, D], as `Policy.act_chunk`.
        max_batch: questions acted on together.
        max_wait: seconds to wait for more of them; 0 takes what came while the model worked.
        max_queue: questions that may wait.
        on_batch: told the size of each batch.
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
        """Whether questions are answered."""
        return self._worker.is_alive() and not self._closing

    def waiting(self) -> int:
        """How many questions wait."""
        return self._queue.qsize()

    def submit(self, question: Question, until: float) -> "Future[np.ndarray]":
        """Queue a question.

        Args:
            question: what is asked.
            until: on `time.monotonic`'s clock; later nobody acts on it any more.

        Returns:
            The future actions, float64 [T, D]. It raises Refused: 504 when stale, 422 when the policy cannot act on it,
            500 when the policy fails.

        Raises:
            Refused: 503, when too many wait or the server stops.
        """
        waiting = _Waiting(question, until)
        with self._lock:  # nothing is queued behind the end
            if self._closing:
                raise Refused(503, "stopping", "the server is stopping; ask again when it is back")
            try:
                self._queue.put_nowait(waiting)
            except queue.Full:
                raise Refused(503, "queue_full", f"{self._queue.maxsize} requests wait already; ask later") from None
        return waiting.answer

    def close(self) -> None:
        """Take no more; what is queued is still answered."""
        with self._lock:
            self._closing = True

    def join(self) -> None:
        """Close, and return when everything is answered."""
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
        asked = [waiting.question for waiting in batch]
        try:
            actions = self._act([q.observation for q in asked], [q.unnorm_key for q in asked])
            if len(actions) != len(batch):
                raise RuntimeError(f"{len(actions)} actions for {len(batch)} questions")
        except Exception as error:
            if len(batch) > 1:  # one of them may be at fault, or their actions differ in width
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
    """The answer to who waited too long."""
    return Refused(504, "stale", "the deadline passed before there was an action; send a new image")


def _refusal(error: Exception) -> Refused:
    if isinstance(error, ValueError | TypeError | KeyError):
        return Refused(422, "cannot_act", str(error.args[0] if error.args else error)[:500])
    log.error("The policy failed", exc_info=error)
    return Refused(500, "internal", "the policy failed; the server's log says why")
