"""Rollouts of a real Gymnasium world in real worker processes."""

import dataclasses
import functools
import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_world import AlwaysDeadly, Deadly, Fragile, Hanging, Lost, OnceFragile, ToyWorld, Walker

from openvla_lightning.env import workers
from openvla_lightning.env.base import EVALUATION_SEEDS, RequestError
from openvla_lightning.env.workers import WorkerError
from openvla_lightning.evaluation.plan import plan_episodes, shuffle_instructions
from openvla_lightning.evaluation.rollout import rollout
from openvla_lightning.evaluation.timing import Stopwatch

TASKS = list(ToyWorld().tasks.values())


def planned(episodes_per_task: int, **kwargs):
    return lambda tasks: plan_episodes(tasks.values(), episodes_per_task, **kwargs)


def test_a_policy_that_knows_the_way_arrives():
    episodes = rollout(Walker(), ToyWorld, planned(3), num_envs=4, num_workers=2)
    assert [e.task for e in episodes] == [task.name for task in TASKS] * 3
    assert all(e.success and 1 <= e.length < ToyWorld.max_episode_steps for e in episodes)
    assert {e.instruction for e in episodes if e.task == "go_red"} == {"go to the red corner"}


def test_where_the_seconds_went_is_told():
    stopwatch = Stopwatch()
    assert stopwatch.summary(0) == {}
    episodes = rollout(Walker(), ToyWorld, planned(3), num_envs=4, num_workers=2, stopwatch=stopwatch)
    assert stopwatch.processes == 2
    assert stopwatch.actions == sum(episode.length for episode in episodes)
    told = stopwatch.summary(len(episodes))
    assert 0 < told["policy_share"] + told["waiting_share"] <= 1
    assert 0 < told["simulator_share"] <= 1
    assert told["actions_per_call"] >= 1


def test_shuffled_instructions_lead_to_the_wrong_corner():
    episodes = rollout(Walker(), ToyWorld, planned(3, instructions="shuffled"), num_envs=6, num_workers=1)
    assert not any(e.success for e in episodes)
    assert {e.length for e in episodes} == {ToyWorld.max_episode_steps}
    own = {task.name: task.instruction for task in TASKS}
    assert all(e.instruction != own[e.task] for e in episodes)
    assert sorted(e.instruction for e in episodes) == sorted(3 * list(own.values()))


class Rounding(Walker):
    """Its actions depend, slightly, on who shares the batch: as a real model's do."""

    def act(self, image, instruction):
        return super().act(image, instruction) + 1e-3 * np.mean(image) + 1e-3 * len(image)


def test_results_do_not_depend_on_the_number_of_workers():
    one, two, three = (rollout(Rounding(), ToyWorld, planned(4), num_envs=5, num_workers=n) for n in (1, 2, 3))
    assert one == two == three
    assert rollout(Rounding(), ToyWorld, planned(4, seed=1), num_envs=5) != one


@pytest.mark.parametrize("num_envs", [1, 2, 3, 40])
def test_any_number_of_environments_plays_every_episode_once(num_envs):
    walker = Walker()
    episodes = rollout(walker, ToyWorld, planned(2), num_envs=num_envs, num_workers=2)
    assert [e.seed for e in episodes] == [plan.seed for plan in plan_episodes(TASKS, 2)]
    assert sum(walker.batches) == sum(e.length for e in episodes)


def test_a_finished_environment_starts_the_next_episode_at_once():
    walker = Walker()
    rollout(walker, ToyWorld, planned(8), num_envs=8, num_workers=1)
    # A group of 4: whoever ends rests one round to reset. Without refilling, batches would shrink to the slowest.
    assert np.mean(walker.batches[: 3 * len(walker.batches) // 4]) > 3.2


def test_images_are_kept_where_asked():
    seen = {}
    rollout(
        Walker(),
        ToyWorld,
        planned(1),
        num_envs=2,
        num_workers=1,
        on_episode=lambda number, episode, kept: seen.update({episode.task: (episode, kept)}),
        keep=lambda plan: plan.task.family == "top",
    )
    assert len(seen) == 4
    for episode, kept in seen.values():
        assert (kept is not None) == (episode.family == "top")
        assert kept is None or len(kept.shown) == len(kept.actions) + 1 == episode.length + 1


def test_a_failing_environment_stops_with_its_traceback():
    with pytest.raises(WorkerError, match="the motor burnt out"):
        rollout(Walker(), functools.partial(ToyWorld, fail_at=3), planned(1), num_envs=2, num_workers=2)
    with pytest.raises(WorkerError, match="no renderer here"):
        rollout(Walker(), functools.partial(ToyWorld, broken=True), planned(1), num_envs=2, num_workers=1)


class Killer(Walker):
    """Kills a worker process after a few batches, as the kernel does when memory runs out."""

    def act(self, image, instruction):
        import multiprocessing

        if len(self.batches) == 3:
            worker = multiprocessing.active_children()[0]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        return super().act(image, instruction)


def test_a_killed_worker_is_started_again_and_its_episodes_are_played():
    killed = rollout(Killer(), ToyWorld, planned(3), num_envs=4, num_workers=2)
    assert killed == rollout(Walker(), ToyWorld, planned(3), num_envs=4, num_workers=2)


def test_an_episode_that_fails_twice_is_an_error_and_no_failure(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 3.0)
    fine = rollout(Walker(), ToyWorld, planned(3), num_envs=4)
    kinds = {Fragile: "the motor burnt out", Deadly: "died with exit code -9", Hanging: "died with exit code -9"}
    kinds |= {Lost: "the world's proprio is not finite"}
    for world, last_words in kinds.items():  # each process has two episodes at a time, and the other one is not lost
        played = rollout(Walker(), world, planned(3), num_envs=4, num_workers=2)
        assert [episode.error is not None for episode in played] == [False] * 4 + [True] + [False] * 7
        assert last_words in played[4].error
        assert not played[4].success
        assert played[:4] + played[5:] == fine[:4] + fine[5:]


def test_a_world_that_always_dies_ends_the_evaluation():
    with pytest.raises(WorkerError, match="no episode ran without an error"):
        rollout(Walker(), AlwaysDeadly, planned(3), num_envs=2, num_workers=1)


def test_an_episode_that_fails_once_is_played_again():
    played = rollout(Walker(), OnceFragile, planned(3), num_envs=2, num_workers=1)
    assert played == rollout(Walker(), ToyWorld, planned(3), num_envs=2, num_workers=1)


def test_a_policy_with_the_wrong_shape_is_named():
    class Scalar:
        def act(self, image, instruction):
            return np.zeros(7)

    with pytest.raises(ValueError, match=r"gave shape \[7\]"):
        rollout(Scalar(), ToyWorld, planned(1), num_envs=4, num_workers=1)


def test_plans_are_paired_between_policies():
    few, many = plan_episodes(TASKS[:2], 2), plan_episodes(TASKS, 5)
    assert set(few) < set(many)
    assert len({plan.seed for plan in many}) == len(many)
    assert all(plan.seed in EVALUATION_SEEDS for plan in many)
    assert {plan.seed for plan in plan_episodes(TASKS, 5, seed=1)}.isdisjoint(plan.seed for plan in many)


def test_plans_say_what_is_wrong():
    with pytest.raises(ValueError, match="choose one of own, shuffled"):
        plan_episodes(TASKS, 1, instructions="mixed")
    with pytest.raises(ValueError, match="at least two tasks"):
        plan_episodes(TASKS[:1], 3, instructions="shuffled")
    with pytest.raises(RequestError, match="seed must be at least 0, got -1"):
        plan_episodes(TASKS, 1, seed=-1)
    with pytest.raises(ValueError, match="episodes_per_task must be at least 1"):
        plan_episodes(TASKS, 0)


@given(st.lists(st.sampled_from("abcdefg"), max_size=40), st.integers(0, 10))
def test_a_shuffle_is_a_permutation_without_fixed_words(words, seed):
    most = max(map(words.count, words), default=0)
    if 2 * most > len(words):
        with pytest.raises(ValueError, match="other instructions"):
            shuffle_instructions(words, seed)
        return
    shuffled = shuffle_instructions(words, seed)
    assert sorted(shuffled) == sorted(words)
    assert all(mine != other for mine, other in zip(words, shuffled, strict=True))
    assert shuffled == shuffle_instructions(words, seed)


def test_episodes_are_plain_data():
    episode = rollout(Walker(), ToyWorld, lambda tasks: plan_episodes(tasks.values(), 1)[:1], 1, 1)[0]
    assert {type(value) for value in dataclasses.astuple(episode)} <= {str, int, bool, float, type(None)}
