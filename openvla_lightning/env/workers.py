"""Environments in worker processes, driven in batches by slot number.

Why not `gymnasium.vector.AsyncVectorEnv`: it keeps one process per environment and steps all of them in lockstep; here
a few processes hold many environments, two groups of them overlap with the policy, and each slot starts its own task.
"""

import multiprocessing
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import numpy as np

from openvla_lightning.env.base import EnvFactory, RolloutEnv, Task


class WorkerError(RuntimeError):
    """An environment failed in its worker process; the message carries the worker's traceback."""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin an episode."""

    task: str
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a slot answers to a `Start` or an action.

    Attributes:
        image: uint8 [H, W, 3], what the policy sees next.
        done: the episode is over; the next command must be a `Start`.
        success: as judged so far.
        instruction: the episode's own words, in the answer to a `Start`.
    """

    image: np.ndarray
    done: bool = False
    success: bool = False
    instruction: str = ""


Command = Start | np.ndarray


class EnvWorkers:
    """`num_slots` environments over `num_workers` processes; a context manager.

    Slot i lives in process i mod `num_workers`, whatever is asked of it, so results cannot depend on the number of
    processes. Commands to one process are answered in order.

    Args:
        make_env: picklable; called once per slot, in the worker.
        num_slots: environments in all.
        num_workers: processes; never more than slots.

    Raises:
        WorkerError: when an environment cannot be built, with the worker's traceback.
    """

    def __init__(self, make_env: EnvFactory, num_slots: int, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads and CUDA
        self._connections: list[Connection] = []
        self._processes = []
        try:
            for index in range(min(num_workers, num_slots)):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, make_env), daemon=True, name=f"env-{index}")
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
            first, *_ = [self._receive(connection) for connection in self._connections]
        except BaseException:
            self.close()
            raise
        self.tasks: Mapping[str, Task] = first[0]
        self.max_episode_steps: int = first[1]

    def send(self, commands: Mapping[int, Command]) -> None:
        """Give slots their next command; `receive` with the same slots collects the answers."""
        for connection, part in self._split(commands):
            try:
                connection.send({slot: commands[slot] for slot in part})
            except OSError:
                while True:  # its last words, behind answers not yet read, say more than a broken pipe
                    self._receive(connection)

    def receive(self, slots: Mapping[int, Command]) -> dict[int, Outcome]:
        """Answers to the oldest `send`, which must have been for these slots; in slot order."""
        outcomes: dict[int, Outcome] = {}
        for connection, _ in self._split(slots):
            outcomes |= self._receive(connection)
        return dict(sorted(outcomes.items()))

    def _split(self, commands: Mapping[int, Command]) -> list[tuple[Connection, list[int]]]:
        count = len(self._connections)
        parts = [(self._connections[i], [slot for slot in commands if slot % count == i]) for i in range(count)]
        return [(connection, slots) for connection, slots in parts if slots]

    def _receive(self, connection: Connection) -> dict:
        try:
            answer = connection.recv()
        except (EOFError, OSError):
            process = self._processes[self._connections.index(connection)]
            process.join(5)
            raise WorkerError(
                f"environment process {process.name} died with exit code {process.exitcode}; "
                "if it was killed for memory, use fewer environments (num_envs=...)"
            ) from None
        if isinstance(answer, str):
            raise WorkerError(f"in an environment process:\n{answer}")
        return answer

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()  # a worker that waits for a command sees the end and leaves
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(connection: Connection, make_env: EnvFactory) -> None:
    """Body of a worker process: answer commands until the other end closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    envs: dict[int, RolloutEnv] = {}
    spare: RolloutEnv | None = None
    try:
        spare = make_env()
        connection.send((dict(spare.tasks), spare.max_episode_steps))
        while True:
            answers = {}
            for slot, command in connection.recv().items():
                if slot not in envs:
                    envs[slot], spare = spare or make_env(), None
                answers[slot] = _obey(envs[slot], command)
            connection.send(answers)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception:
        connection.send(traceback.format_exc())
    finally:
        for env in [*envs.values(), *([spare] if spare else [])]:
            env.close()


def _obey(env: RolloutEnv, command: Command) -> Outcome:
    if isinstance(command, Start):
        try:
            observation, info = env.reset(seed=command.seed, options={"task": command.task})
        except Exception as error:
            error.add_note(f"while starting task {command.task!r} with seed {command.seed}")
            raise
        return Outcome(observation["image"], instruction=info["instruction"])
    observation, _, terminated, truncated, info = env.step(command)
    return Outcome(observation["image"], done=bool(terminated or truncated), success=bool(info["success"]))
