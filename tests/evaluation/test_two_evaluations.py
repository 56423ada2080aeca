"""Two processes that evaluate into one folder, or record into one dataset, at the same time."""

import subprocess
import sys

import numpy as np
import pytest
from reserving import reserved_by_another
from test_recording import read
from test_scoring import play

from openvla_lightning.data.source.lerobot.recorder import Recorder, Taken
from openvla_lightning.env.base import RequestError
from openvla_lightning.runtime import files


def test_a_second_evaluation_of_a_folder_is_refused_while_the_first_one_runs(tmp_path, monkeypatch):
    """Otherwise the first one, when it is interrupted, writes its part over the results of the second one."""
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with (
        reserved_by_another(tmp_path / "run", "evaluating") as process,
        pytest.raises(RequestError, match=f"process {process} on .* is evaluating in {tmp_path}/run"),
    ):
        play(tmp_path / "run")
    assert play(tmp_path / "run", episodes_per_task=1, self_test=False).complete


RECORDS = """
import sys, time
from pathlib import Path
from openvla_lightning.data.source.lerobot import recorder
folder, first = Path(sys.argv[1]), sys.argv[2] == "first"
delete, write_json, read = recorder.delete, recorder.write_json, recorder._Kept.__call__
def meet(own, other):  # not for long, because the other process may have to wait for this one
    (folder / own).touch()
    until = time.monotonic() + 1.5
    while not (folder / other).exists() and time.monotonic() < until:
        time.sleep(0.01)
def delete_together(path):
    meet(*(("one decided", "two decided") if first else ("two decided", "one writes")))
    delete(path)
def write_after(*arguments):
    (folder / ("one deleted" if first else "two deleted")).touch()
    write_json(*arguments)
def read_slowly(self, number):
    if first: meet("one writes", "two deleted")
    return read(self, number)
recorder.delete, recorder.write_json, recorder._Kept.__call__ = delete_together, write_after, read_slowly
recorder.Recorder(folder / "data").write(progress=False)
"""


def test_two_processes_that_write_a_recording_at_once_leave_it_whole(tmp_path):
    """As the last two shards of an evaluation do, and two servers that stop together."""
    pictures = {"primary": [np.full((64, 64, 3), 40 * step, np.uint8) for step in range(5)]}
    for name in ("a", "b"):
        Recorder(tmp_path / "data").add(name, Taken(pictures, np.ones((5, 7), np.float32), "lift", 10))
    command = [sys.executable, "-c", RECORDS, str(tmp_path)]
    running = [subprocess.Popen([*command, name]) for name in ("first", "second")]
    assert [process.wait(120) for process in running] == [0, 0]
    assert not list((tmp_path / "data").glob(".*"))
    assert [columns["action"].shape for columns, _ in read(tmp_path / "data")[1]] == [(5, 7)] * 2
