"""The scripts as processes of their own that need not import everything again: forks of this one."""

import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import peft.tuners.lora  # noqa: F401  what adapters import late

import openvla_lightning.run.fit  # noqa: F401  what takes long to import

ROOT = Path(__file__).parents[1]


def start(script: str, log: Path, *overrides: str) -> BaseProcess:
    """Start `python <script> <overrides>`, or a module with `python -m`; what it prints goes to the file `log`."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(script, log, overrides))
    process.start()
    return process


def finish(script: str, log: Path, *overrides: str, fails: bool = False) -> str:
    """Run `python <script> <overrides>` to its end and return what it printed."""
    process = start(script, log, *overrides)
    process.join(timeout=240)
    assert process.exitcode == int(fails), log.read_text()
    return log.read_text()


def kill_after(found: Callable[[], object], script: str, log: Path, *overrides: str, delay: float = 0.0) -> None:
    """Start `python <script> <overrides>`, and kill it `delay` seconds after `found` gives something."""
    process = start(script, log, *overrides)
    deadline = time.monotonic() + 200
    while not found():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, f"waited for too long:\n{log.read_text()}"
        time.sleep(0.02)
    time.sleep(delay)
    process.kill()
    process.join()


def _run(script: str, log: Path, overrides: tuple[str, ...]) -> None:
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = [script, *overrides]
    try:
        (runpy.run_path if script.endswith(".py") else runpy.run_module)(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
