"""Another process that reserves a folder."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys, time
from openvla_lightning.runtime.files import reserve
with reserve(sys.argv[1], sys.argv[2]):
    print("reserved", flush=True)
    time.sleep(60)
"""


@contextmanager
def reserved_by_another(folder: Path, what: str) -> Iterator[int]:
    """Inside this context, a process with the number that it yields has reserved `folder`; it is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(folder), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        try:
            yield process.pid
        finally:
            process.kill()
