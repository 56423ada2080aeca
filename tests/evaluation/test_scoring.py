"""A whole evaluation: episodes, files, videos, interruption; in a toy world and in the real one."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from expert_world import ExpertDriven
from rich.console import Console
from toy_world import Suspect, ToyWorld, Unlucky, Walker

from openvla_lightning.env.simpler import Simpler
from openvla_lightning.env.workers import BuildError, WorkerError
from openvla_lightning.evaluation.scoring import SelfTestError, evaluate, select_tasks
from openvla_lightning.report.results import Results

QUIET = Console(quiet=True)
TASKS = ToyWorld().tasks


class Colourblind(Walker):
    """Takes red for green: fails half of the family `top`."""

    provenance = {"path": "runs/x.ckpt", "sha256": "abc", "unnorm_key": "toy"}  # noqa: RUF012

    def act(self, image, instruction):
        return super().act(image, [words.replace("red", "green") for words in instruction])


def test_an_evaluation_leaves_results_report_chart_and_videos(tmp_path):
    config = {"episodes_per_task": 3}
    options = {"episodes_per_task": 3, "num_envs": 4, "num_workers": 2, "label": "mine", "save_videos": 2}
    # the policy is loaded when the world is up
    found = evaluate(Colourblind, ToyWorld, tmp_path, config=config, console=QUIET, **options)
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
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.json",
        "episodes.jsonl",
        "report.md",
        "report.html",
        "success.png",
        "videos",
    }


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
        found.pop("timing")
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


def test_a_simulator_that_is_not_installed_is_one_sentence(tmp_path, capfd):
    with pytest.raises(BuildError, match=r"^env=simpler_\* needs SimplerEnv"):
        play(tmp_path, world=functools.partial(Simpler, "widowx"), num_workers=3)
    assert "Traceback" not in capfd.readouterr().err


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
    with pytest.raises(SelfTestError, match="action x"):  # this world does not do what it is told
        evaluate(Still(), led, tmp_path / "expert", num_workers=1, console=QUIET, **chosen)
    chosen["self_test"] = False
    found = evaluate(Still(), led, tmp_path / "expert", num_workers=2, console=QUIET, **chosen)
    assert found.overall.rate == 1.0
    assert found.env == "expertdriven"
    again = evaluate(Still(), led, tmp_path / "again", num_workers=1, console=QUIET, **chosen)
    assert again.episodes == found.episodes
    idle = functools.partial(ExpertDriven.__base__, max_episode_steps=10, **world)
    chosen["self_test"] = True
    still = evaluate(Still(), idle, tmp_path / "idle", num_workers=2, console=QUIET, **chosen)
    assert still.overall.rate == 0.0
    assert {check["name"] for check in still.self_test} >= {"renders", "orientation", "scripted episode"}
    assert still.versions["renderer"] != "automatic", "what really drew"
    assert Path(tmp_path / "expert" / "videos").is_dir()


def play(folder, policy=None, world=ToyWorld, **kwargs):
    given = {"num_envs": 4, "num_workers": 1, "save_videos": 0, "console": QUIET, "episodes_per_task": 3, **kwargs}
    return evaluate(policy or Walker(), world, folder, **given)


def test_a_killed_evaluation_goes_on_with_what_is_missing(tmp_path):
    whole = play(tmp_path / "whole")
    code = """
import os, signal, sys
if __name__ == "__main__":  # a worker imports this file
    sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
    from test_scoring import Walker, play
    class Killed(Walker):
        def act(self, image, instruction):
            if len(self.batches) == 25:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().act(image, instruction)
    play(sys.argv[2], Killed())
"""
    script = tmp_path / "killed.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script, str(Path(__file__).parent), str(tmp_path / "part")])
    assert done.returncode == -9
    journal = tmp_path / "part" / "episodes.jsonl"
    finished = len(journal.read_text().splitlines()) - 1
    assert 0 < finished < 12
    journal.write_text(journal.read_text() + '{"task": "go_r')  # as a kill in the middle of a line would leave it
    walker = Walker()
    resumed = play(tmp_path / "part", walker)
    assert resumed.episodes == whole.episodes
    assert resumed.complete
    assert sum(walker.batches) < sum(e.length for e in whole.episodes)

    longer = play(tmp_path / "part", episodes_per_task=4)
    assert longer.overall.episodes == 16
    assert longer.episodes[:12] == whole.episodes


def test_episodes_of_another_checkpoint_are_not_mixed_in(tmp_path):
    play(tmp_path)
    with pytest.raises(ValueError, match=r"another evaluation: checkpoint, unnorm_key differ .*paths.output_dir"):
        play(tmp_path, Colourblind())
    with pytest.raises(ValueError, match="control differ"):
        play(tmp_path, control="realtime", latency=0.1)


class Deaf(Walker):
    """Always goes to the red corner."""

    def act(self, image, instruction):
        return super().act(image, ["go to the red corner"] * len(image))


def test_auto_stops_each_task_at_a_narrow_interval(tmp_path):
    found = play(tmp_path, Deaf(), episodes_per_task="auto", interval_width=0.25)
    for rate in found.tasks.values():
        low, high = rate.interval
        assert high - low <= 0.25
        assert 10 <= rate.episodes < 20  # certain tasks need few; a batch may overshoot
    for wrong in ("some", 0):
        with pytest.raises(ValueError, match="episodes_per_task"):
            play(tmp_path / "x", episodes_per_task=wrong)


def test_errors_are_counted_and_neither_successes_nor_failures(tmp_path):
    found = play(tmp_path, world=Unlucky, num_workers=1)
    assert (found.overall.episodes, found.overall.successes, found.overall.errors) == (9, 9, 3)
    assert "| errors |" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="env differ"):
        play(tmp_path)
    with pytest.raises(WorkerError, match=r"no episode ran without an error; the last one:[^$]*out of red"):
        play(tmp_path / "red", world=Unlucky, tasks="go_red", episodes_per_task=1)


def test_a_world_that_is_not_as_it_should_be_is_not_scored(tmp_path):
    def load():
        raise AssertionError("loaded")

    with pytest.raises(SelfTestError, match=r"action x: moved 0 cm.*eval\.self_test=false"):
        evaluate(load, Suspect, tmp_path, num_workers=1, console=QUIET)
    found = play(tmp_path, world=Suspect, self_test=False, episodes_per_task=1)
    assert found.overall.rate == 1
    assert "reference results were made with 1.0" in (tmp_path / "report.md").read_text()


def test_in_real_time_a_slow_policy_succeeds_less(tmp_path):
    rates = []
    for latency in (0.0, 0.3, 1.2):
        found = play(tmp_path / str(latency), control="realtime", latency=latency, episodes_per_task=3)
        assert found.control["delay"] == round(10 * latency)
        assert max(e.length for e in found.episodes) <= ToyWorld.max_episode_steps
        rates.append(found.overall.rate)
    blocking = play(tmp_path / "blocking", episodes_per_task=3)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == blocking.overall.rate == 1.0
    assert rates[-1] == 0.0


def test_latency_is_measured_when_none_is_given(tmp_path):
    class Slow(Walker):
        def act(self, image, instruction):
            if image[0].shape != (32, 32, 3):  # the measurement
                time.sleep(0.2)
                return np.zeros((1, 7))
            return super().act(image, instruction)

    found = play(tmp_path, Slow(), control="realtime", rate_hz=5)
    assert found.control["measured"]
    assert found.control["latency"] >= 0.2
    assert found.row.startswith("policy, 5 Hz, 0.2")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"control": "fast"}, "choose one of blocking, realtime"),
        ({"rate_hz": 5}, "need eval.control=realtime"),
        ({"control": "realtime", "rate_hz": 0}, "must be positive"),
        ({"control": "realtime", "latency": -1}, "at least 0 seconds"),
    ],
)
def test_control_options_that_cannot_be_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        play(tmp_path, **wrong)
