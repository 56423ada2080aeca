"""A whole evaluation: episodes, files, videos, interruption; in a toy world and in the real one."""

import functools
import json
from pathlib import Path

import av
import numpy as np
import pytest
from expert_world import ExpertDriven
from rich.console import Console
from toy_world import ToyWorld, Walker

from openvla_lightning.env.workers import WorkerError
from openvla_lightning.evaluation import evaluate, select_tasks
from openvla_lightning.results import Results

QUIET = Console(quiet=True)
TASKS = ToyWorld().tasks


class Colourblind(Walker):
    """Takes red for green: fails half of the family `top`."""

    provenance = {"path": "runs/x.ckpt", "sha256": "abc", "unnorm_key": "toy"}  # noqa: RUF012

    def act(self, image, instruction):
        return super().act(image, [words.replace("red", "green") for words in instruction])


def test_an_evaluation_leaves_results_report_chart_and_videos(tmp_path):
    config = {"episodes_per_task": 3}
    found = evaluate(
        Colourblind,  # loaded when the world is up
        ToyWorld,
        tmp_path,
        episodes_per_task=3,
        num_envs=4,
        num_workers=2,
        label="mine",
        config=config,
        save_videos=2,
        console=QUIET,
    )
    assert (found.overall.successes, found.overall.episodes) == (9, 12)
    assert found.tasks["go_red"].successes == 0
    assert found.families["top"].successes == 3
    assert found.complete
    assert (found.env, found.task_set, found.label) == ("toyworld", "all", "mine")

    saved = Results.load(tmp_path)
    assert saved == found
    assert saved.config == config
    assert saved.checkpoint["sha256"] == "abc"
    assert {"torch", "mujoco", "python"} <= set(saved.versions)
    videos = [e for e in saved.episodes if e.video]
    kinds = sorted((e.family, e.success) for e in videos)
    assert kinds == [("bottom", True)] * 2 + [("top", False)] * 2 + [("top", True)] * 2
    for episode in videos:
        with av.open(str(tmp_path / episode.video)) as container:
            assert sum(1 for _ in container.decode(video=0)) == episode.length + 1
    assert len(list((tmp_path / "videos").iterdir())) == len(videos)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.md", "success.png", "videos"}


def test_no_videos_when_none_are_wanted_and_names_for_some_of_the_tasks(tmp_path):
    chosen = {"tasks": ["top", "go_blue"], "task_set": "toys"}
    found = evaluate(
        Walker(), ToyWorld, tmp_path, episodes_per_task=1, num_workers=1, save_videos=0, console=QUIET, **chosen
    )
    assert not (tmp_path / "videos").exists()
    assert (found.task_set, found.overall.episodes) == ("toys: top, go_blue", 3)


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    for workers in (1, 3):
        evaluate(Colourblind(), ToyWorld, tmp_path / str(workers), num_envs=6, num_workers=workers, console=QUIET)
    one, three = (json.loads((tmp_path / n / "results.json").read_text()) for n in "13")
    for found in (one, three):
        found.pop("wall_seconds")
    assert one == three


class Impatient(Walker):
    """The user presses Ctrl-C after a while."""

    def act(self, image, instruction):
        if len(self.batches) == 25:
            raise KeyboardInterrupt
        return super().act(image, instruction)


def test_an_interrupted_evaluation_keeps_what_had_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Impatient(), ToyWorld, tmp_path, episodes_per_task=8, num_envs=4, num_workers=1, console=QUIET)
    saved = Results.load(tmp_path)
    assert not saved.complete
    assert 0 < len(saved.episodes) < 32
    assert "(interrupted)" in (tmp_path / "report.md").read_text()


def test_a_world_that_fails_at_once_leaves_no_empty_report(tmp_path):
    with pytest.raises(WorkerError, match="no renderer here"):
        evaluate(Walker(), functools.partial(ToyWorld, broken=True), tmp_path, num_workers=1, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_tasks_are_chosen_by_name_family_or_set():
    assert list(TASKS.values()) == select_tasks(TASKS, "all") == select_tasks(TASKS, ["corners"])
    assert [t.name for t in select_tasks(TASKS, "top")] == ["go_red", "go_green"]
    assert [t.name for t in select_tasks(TASKS, ["go_blue", "top"])] == ["go_red", "go_green", "go_blue"]
    with pytest.raises(
        ValueError, match=r"'go_bleu' \(did you mean 'go_blue'\?\); there are: all, corners, top, go_red"
    ):
        select_tasks(TASKS, ["go_bleu", "top"])


def test_unknown_tasks_stop_before_the_policy_is_loaded(tmp_path):
    def load():
        raise AssertionError("loaded")

    with pytest.raises(ValueError, match="no task, family or task set is called 'left'"):
        evaluate(load, ToyWorld, tmp_path, tasks=["left"], num_workers=1, console=QUIET)


def test_the_progress_bar_shows_rate_and_success(tmp_path):
    console = Console(record=True, width=200, force_terminal=True)
    evaluate(Walker(), ToyWorld, tmp_path, episodes_per_task=2, num_workers=1, console=console)
    shown = console.export_text()
    assert "policy" in shown
    assert "8/8" in shown
    assert "episodes/s" in shown
    assert "100 % success" in shown


class Still:
    """Does nothing."""

    def act(self, image, instruction):
        assert all(picture.dtype == np.uint8 and picture.shape == (64, 64, 3) for picture in image)
        return np.zeros((len(image), 7))


def test_the_expert_succeeds_in_the_tabletop_world_and_idling_does_not(tmp_path):
    world = {"image_size": 64, "objects_per_scene": 2, "plates_per_scene": 1}
    chosen = {"tasks": ["touch_red_cube", "lift_red_cube"], "episodes_per_task": 4, "num_envs": 4}
    led = functools.partial(ExpertDriven, **world)
    found = evaluate(Still(), led, tmp_path / "expert", num_workers=2, console=QUIET, **chosen)
    assert found.overall.rate == 1.0
    assert found.env == "expertdriven"
    again = evaluate(Still(), led, tmp_path / "again", num_workers=1, console=QUIET, **chosen)
    assert again.episodes == found.episodes
    idle = functools.partial(ExpertDriven.__base__, max_episode_steps=10, **world)
    assert evaluate(Still(), idle, tmp_path / "idle", num_workers=2, console=QUIET, **chosen).overall.rate == 0.0
    assert Path(tmp_path / "expert" / "videos").is_dir()
