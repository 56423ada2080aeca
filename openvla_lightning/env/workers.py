"""Environments in worker processes, commanded in batches by slot number.

`gymnasium.vector.AsyncVectorEnv` is not used, because it has one process per environment and steps all of them in
lockstep. Here a few processes hold many environments, two groups of them overlap with the policy, and each slot starts
its own task.
"""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from types import TracebackType
from typing import Any, Self

from openvla_lightning.env.base import Check, EnvFactory, RequestError, RolloutEnv, Task
from openvla_lightning.env.commands import Command, Outcome, obey


class WorkerError(RuntimeError):
    """An environment failed in its worker process; the message contains the worker's traceback."""


class BuildError(WorkerError):
    """An environment could not be built."""


_SELF_TEST = "self-test"
PATIENCE = 600.0
"""Seconds in which a process must answer; a process that hangs longer is killed."""


class EnvWorkers:
    """`num_slots` environments over `num_workers` processes; a context manager.

    Slot i is always in process i mod `num_workers`, so results do not depend on the number of processes. A process
    answers its commands in order. A process that dies is started again; its running episodes are answered with an
    error.

    Args:
        make_env: picklable; called once per slot, in the worker.
        num_slots: number of environments.
        num_workers: processes; never more than slots.

    Raises:
        BuildError: an environment cannot be built; the message says what is missing, or has the worker's traceback.
    """

    def __init__(self, make_env: EnvFactory, num_slots: int, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads and CUDA
        self._workers: list[_Worker] = []
        try:
            for index in range(min(num_workers, num_slots)):
                self._workers.append(_Worker(context, make_env, f"env-{index}"))
            for worker in self._workers:
                worker.greet()
        except BaseException:
            self.close()
            raise
        self.tasks: Mapping[str, Task] = self._workers[0].tasks
        self.max_episode_steps = self._workers[0].max_episode_steps
        self.control_hz = self._workers[0].control_hz

    def self_test(self) -> tuple[list[Check], str | None]:
        """Results of one environment's self-test (none if it has no self-test), and the name of its renderer.

        Raises:
            WorkerError: when the test itself fails.
        """
        return self._workers[0].self_test()

    def send(self, commands: Mapping[int, Command]) -> None:
        """Send slots their next commands; `receive` with the same slots collects the answers."""
        for worker, part in self._split(commands):
            worker.send({slot: commands[slot] for slot in part})

    def receive(self, slots: Mapping[int, Command]) -> dict[int, Outcome]:
        """Answers to the oldest `send`, which must have been for these slots; in slot order.

        Raises:
            WorkerError: when a process died and cannot be started again.
        """
        outcomes: dict[int, Outcome] = {}
        for worker, _ in self._split(slots):
            outcomes |= worker.receive()
        return dict(sorted(outcomes.items()))

    def alone(self, slot: int, running: Iterable[int]) -> bool:
        """Whether no other slot of `running` is in this slot's process."""
        count = len(self._workers)
        return not any(other != slot and other % count == slot % count for other in running)

    @property
    def deaths(self) -> int:
        """How often a process has died."""
        return sum(worker.deaths for worker in self._workers)

    def _split(self, commands: Mapping[int, Command]) -> list[tuple["_Worker", list[int]]]:
        count = len(self._workers)
        parts = [(self._workers[i], [slot for slot in commands if slot % count == i]) for i in range(count)]
        return [(worker, slots) for worker, slots in parts if slots]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()  # a worker that waits for a command then ends
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, context: SpawnContext, make_env: EnvFactory, name: str) -> None:
        self._context, self._make_env, self._name = context, make_env, name
        self._pending: deque[list[int]] = deque()
        self._lost, self._reason, self.deaths = 0, "", 0
        self._start()

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self.process = self._context.Process(target=_serve, args=(theirs, self._make_env), daemon=True, name=self._name)
        self.process.start()
        theirs.close()

    def greet(self) -> None:
        """Wait until the worker has built its first environment."""
        self.tasks, self.max_episode_steps, self.control_hz = self._answer(BuildError)

    def self_test(self) -> tuple[list[Check], str | None]:
        self.connection.send(_SELF_TEST)
        return self._answer(WorkerError)

    def _answer(self, error_type: type[WorkerError]) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise error_type(self._obituary()) from None
        if isinstance(answer, str):
            raise error_type(answer)
        return answer

    def send(self, commands: dict[int, Command]) -> None:
        self._pending.append(list(commands))
        with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is read
            self.connection.send(commands)

    def receive(self) -> dict[int, Outcome]:
        slots = self._pending.popleft()
        if self._lost:
            self._lost -= 1
            return self._lost_in(slots)
        try:
            if not self.connection.poll(PATIENCE):
                self.process.kill()
            return self.connection.recv()
        except (EOFError, OSError):
            self._reason = self._obituary()
            self.deaths += 1
            self._lost = len(self._pending)  # commands that the dead worker did not answer
            self._start()
            self.greet()
            return self._lost_in(slots)

    def _lost_in(self, slots: list[int]) -> dict[int, Outcome]:
        return {slot: Outcome(None, error=self._reason, died=True) for slot in slots}

    def _obituary(self) -> str:
        self.process.join(5)
        return (
            f"environment process {self._name} died with exit code {self.process.exitcode}; "
            "if it was killed for memory, use fewer environments (num_envs=...)"
        )

    def end(self) -> None:
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, make_env: EnvFactory) -> None:
    """Main function of a worker process: answer commands until the connection closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    envs: dict[int, RolloutEnv] = {}
    spare: list[RolloutEnv] = []
    try:
        spare.append(make_env())
        connection.send((dict(spare[0].tasks), spare[0].max_episode_steps, spare[0].control_hz))
        while True:
            message = connection.recv()
            if message == _SELF_TEST:
                test = getattr(spare[0], "self_test", list)
                connection.send((test(), _renderer()))
                continue
            answers = {}
            for slot, command in message.items():
                started = time.perf_counter()
                try:
                    if slot not in envs:
                        envs[slot] = spare.pop() if spare else make_env()
                    outcome = obey(envs[slot], command)
                    answers[slot] = replace(outcome, seconds=time.perf_counter() - started)
                except Exception:
                    answers[slot] = Outcome(None, error=traceback.format_exc())
                    _discard(envs.pop(slot, None))
            connection.send(answers)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        # For these errors, the message is enough: it says what to install, to fetch, or to ask for instead.
        said = isinstance(error, ImportError | FileNotFoundError | RequestError)
        words = str(error) if said else f"in an environment process:\n{traceback.format_exc()}"
        with contextlib.suppress(OSError):  # the parent may have closed after another worker's error
            connection.send(words)
    finally:
        for env in [*envs.values(), *spare]:
            _discard(env)


def _renderer() -> str | None:
    """The renderer, such as `egl, llvmpipe (LLVM 15.0.6, 256 bits)`; None if OpenGL was not used."""
    if "OpenGL" not in sys.modules:
        return None
    from OpenGL import GL

    with contextlib.suppress(Exception):  # the kind of error depends on the driver
        name = GL.glGetString(GL.GL_RENDERER)
        return f"{os.environ.get('PYOPENGL_PLATFORM', 'automatic')}, {name.decode()}"
    return None


def _discard(env: RolloutEnv | None) -> None:
    try:
        if env is not None:
            env.close()
    except Exception:  # it is broken already, and the first error is reported
        traceback.print_exc()
