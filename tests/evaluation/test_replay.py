"""Demonstrations come again when their actions are driven through the world they were recorded in."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from openvla_lightning import demonstrations
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.env.recorded import RecordedEpisode, Replay
from openvla_lightning.env.tabletop import Tabletop
from openvla_lightning.evaluation.open_loop import StageError
from openvla_lightning.evaluation.replay import check_replay

WORLD = {"objects": ["red cube", "green cube", "blue cube"], "plates": [], "tidy": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for name in demonstrations.EMBEDDED:
            small = dataclasses.replace(demonstrations.DATASETS[name], train=6, val=6)
            patch.setitem(demonstrations.DATASETS, name, small)
        demonstrations.make(root, workers=0)
        yield root


def replay(data: Path, dataset: str = "tabletop_pretrain", **world: Any) -> Replay:
    tasks = {"tabletop_pretrain": ["pretraining"], "tabletop_finetune": ["new"]}[dataset]
    build = partial(Tabletop, **{**WORLD, "tasks": tasks, **world})
    return Replay(build, partial(RLDS, data, workers=0), dataset, num_episodes=6)


@pytest.mark.parametrize(
    ("dataset", "embodiment"), [("tabletop_pretrain", "metric"), ("tabletop_finetune", "relative")]
)
def test_recorded_episodes_come_again(data: Path, tmp_path: Path, dataset: str, embodiment: str) -> None:
    env, shown = replay(data, dataset, embodiment=embodiment), StringIO()
    env.num_episodes = 20
    found = check_replay(env, tmp_path, Console(file=shown))
    assert "6 of 6 episodes (100%)" in shown.getvalue(), "of those that there are, not of those asked for"
    assert found["success"] == 1.0
    assert found["success_through_tokens"] >= 0.8
    page = (tmp_path / "replay.md").read_text()
    assert "motion | yes" in page
    assert "![Episodes as recorded and as replayed](replay.png)" in page
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


class UpsideDown(Tabletop):
    """Pictures the wrong way up, as a simulator's camera may give them."""

    def _picture(self, camera: str) -> Any:
        return super()._picture(camera)[::-1]


class Swapped(Tabletop):
    """A gripper that opens when it should close."""

    def step(self, action: Any) -> Any:
        action = action.copy()
        action[6] = 1 - action[6]
        return super().step(action)


@pytest.mark.parametrize(
    ("world", "options", "stage"),
    [
        (UpsideDown, {}, "first picture"),
        (Swapped, {}, "motion"),
        (Tabletop, {"embodiment": "relative"}, "motion"),
        (Tabletop, {"image_size": 64}, "first picture"),
    ],
)
def test_the_stage_that_differs_is_named(
    data: Path, tmp_path: Path, world: type[Tabletop], options: dict[str, Any], stage: str
) -> None:
    env = replay(data)
    env.world = partial(world, **{**WORLD, "tasks": ["pretraining"], **options})
    with pytest.raises(StageError, match=stage):
        check_replay(env, tmp_path)


def test_episodes_that_do_not_say_where_they_began_are_refused() -> None:
    with pytest.raises(ValueError, match=r"episode_metadata/task, seed.*open_loop"):
        RecordedEpisode({"steps": {}}, bytes, Path("bridge"))  # type: ignore[arg-type]
    about = {"task": b"lift", "seed": 1}
    with pytest.raises(ValueError, match="earlier version"):
        RecordedEpisode({"episode_metadata": about, "steps": {}}, bytes, Path("data/tabletop/1.0.0"))  # type: ignore[arg-type]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tabletop_pretrain"):
        check_replay(replay(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="num_episodes"):
        Replay(Tabletop, partial(RLDS, tmp_path), "tabletop_pretrain", num_episodes=0)


class Closed(Tabletop):
    """Counts how often it was closed."""

    times = 0

    def close(self) -> None:
        Closed.times += 1
        super().close()


def test_an_unknown_split_lists_the_known_ones_and_leaves_no_world_open(data: Path, tmp_path: Path) -> None:
    env = replay(data)
    env.split, env.world = "test", Closed
    with pytest.raises(ValueError, match=r"no split 'test'; it has train, val|no split 'test'; it has val, train"):
        check_replay(env, tmp_path)
    assert Closed.times == 1
