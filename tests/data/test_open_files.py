"""Open files are the process's: no mixture, however many datasets and files it has, runs out of them."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import made_rlds
import numpy as np
import pytest

from openvla_lightning.data.source.open_files import OpenFiles

READ = """
import resource, sys
from pathlib import Path
import numpy as np
import made_rlds
from openvla_lightning.data.source import open_files
soft, hard = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
sources = [made_rlds.source(Path(sys.argv[1]), f"set{i}") for i in range(5)]
rng = np.random.default_rng(0)
for _ in range(1500):
    source = sources[rng.integers(5)]
    assert source.encoded("primary", int(rng.integers(source.index.num_steps)))
print(open_files.budget(), len(open_files.OPEN._open))
"""


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for i in range(5):
        episodes = [made_rlds.episode(1, seed, image=lambda t: made_rlds.picture(t, 8, 8)) for seed in range(40)]
        made_rlds.write(root, episodes, name=f"set{i}", episodes_per_shard=1)
        made_rlds.source(root, f"set{i}").prepare()
    return root


@pytest.mark.parametrize(("soft", "hard", "budget"), [(160, 160, 80), (160, 4000, 2000), (160, 100_000, 4096)])
def test_five_datasets_of_forty_files_are_read_with_few_descriptors(
    many_files: Path, soft: int, hard: int, budget: int
) -> None:
    if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        hard, budget = (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[1]), min(4096, limit // 2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", READ, str(many_files), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(budget), str(min(200, budget))]


def test_what_was_not_used_for_the_longest_time_is_closed() -> None:
    closed: list[str] = []
    files = OpenFiles(3)
    for key in ("a", "b", "a", "c", "d"):
        assert files.get(key, lambda key=key: key.upper(), closed.append) == key.upper()
    assert closed == ["B"]
    files.get("heavy", lambda: "H", closed.append, weight=3)
    assert closed == ["B", "A", "C", "D"]


def test_where_others_hold_the_files_some_are_closed_and_it_is_tried_again() -> None:
    files, closed, room = OpenFiles(100), [], 5

    def opened(key: int) -> int:
        if len(files._open) >= room:
            raise OSError(errno.EMFILE, "Too many open files")
        return key

    for key in np.arange(20).tolist():
        assert files.get(key, lambda key=key: opened(key), closed.append) == key
    assert 1 <= len(files._open) <= room
    assert sorted([*closed, *files._open]) == list(range(20))
    room = 0
    with pytest.raises(OSError, match="Too many"):
        files.get("last", lambda: opened(0), closed.append)
