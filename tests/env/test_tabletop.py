import subprocess
import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from openvla_lightning.env.base import EVALUATION_SEEDS
from openvla_lightning.env.tabletop import EMBODIMENTS, TRAINING_SEEDS, Tabletop, expert
from openvla_lightning.env.tabletop.scene import OBJECTS, PLATES

FULL = {"objects": tuple(OBJECTS), "plates": tuple(PLATES), "objects_per_scene": 4}
STILL = np.zeros(7)


@pytest.fixture(scope="module")
def demo():
    env = Tabletop()
    yield env
    env.close()


@pytest.fixture(scope="module")
def full():
    env = Tabletop(**FULL, max_episode_steps=80)
    yield env
    env.close()


def play(env, seed, task, policy=expert):
    _, info = env.reset(seed=seed, options={"task": task})
    done, steps = False, 0
    while not done:
        _, reward, terminated, truncated, info = env.step(policy(env))
        done, steps = terminated or truncated, steps + 1
    return info["success"], reward, steps


def test_gymnasium_agrees_that_it_is_an_environment():
    check_env(Tabletop(image_size=32, wrist_camera=True), skip_render_check=True)


@pytest.mark.parametrize("family", ["touch", "push", "lift", "put"])
def test_the_expert_succeeds(full, family):
    tasks = [task.name for task in full.tasks.values() if task.family == family]
    results = [play(full, seed, tasks[seed % len(tasks)])[0] for seed in range(40)]
    assert np.mean(results) >= 0.975


def test_every_task_of_the_demo_world_can_be_done_by_both_robots():
    for embodiment in EMBODIMENTS:
        env = Tabletop(embodiment=embodiment, image_size=32)
        outcomes = {name: play(env, 5, name) for name in env.tasks}
        env.close()
        assert all(success and reward == 1.0 for success, reward, _ in outcomes.values()), outcomes


def test_the_expert_takes_over_from_anywhere(demo):
    random = np.random.default_rng(0)
    for seed, task in enumerate(demo.tasks):
        demo.reset(seed=seed, options={"task": task})
        ended = False
        for _ in range(6):
            ended = ended or any(demo.step(demo.action_space.low + random.random(7) * np.ptp(
                [demo.action_space.low, demo.action_space.high], axis=0))[2:4])  # fmt: skip
        if ended:
            continue
        for _ in range(40):
            *_, terminated, _, info = demo.step(expert(demo))
            if terminated:
                break
        assert info["success"], task


def test_an_episode_depends_on_seed_and_task_alone(demo):
    def pictures():
        seen, info = demo.reset(seed=3, options={"task": "lift_green_cube"})
        frames = [seen["image"]]
        for _ in range(4):
            frames.append(demo.step(expert(demo))[0]["image"])
        return np.stack(frames), info["instruction"]

    first, said = pictures()
    play(demo, 99, "put_red_cube_on_white_plate")
    again, said_again = pictures()
    assert said == said_again
    np.testing.assert_array_equal(first, again)
    other, _ = demo.reset(seed=4, options={"task": "lift_green_cube"})
    assert np.abs(first[0].astype(int) - other["image"]).max() > 100


def test_the_layout_does_not_give_the_task_away(demo):
    pictures = [demo.reset(seed=6, options={"task": task})[0]["image"] for task in demo.tasks]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_a_tidy_table_keeps_its_order_and_an_untidy_one_does_not():
    def orders(tidy):
        env = Tabletop(image_size=32, plates=[], tidy=tidy)
        found = set()
        for seed in range(12):
            env.reset(seed=seed, options={"task": "lift_red_cube"})
            found.add(tuple(thing.name for thing in sorted(env.objects, key=lambda thing: env.position(thing)[1])))
        env.close()
        return found

    assert orders(True) == {("red cube", "green cube", "blue cube")}
    assert len(orders(False)) >= 4


def test_the_picture_shows_what_moves(demo):
    before, _ = demo.reset(seed=1, options={"task": "touch_blue_cube"})
    after, *_ = demo.step(demo.action_space.high)
    changed = (np.abs(before["image"].astype(int) - after["image"]).max(-1) > 30).mean()
    assert 0.005 < changed < 0.5
    assert before["image"].std() > 20


def test_sixteen_instructions_and_more(full):
    instructions = {task.instruction for task in full.tasks.values()}
    assert len(instructions) == len(full.tasks) >= 16
    assert {task.family for task in full.tasks.values()} == {"touch", "push", "lift", "put"}
    assert all(len(set(task.variants)) >= 3 for task in full.tasks.values())
    said = {full.reset(seed=s, options={"task": "lift_red_cube"})[1]["instruction"] for s in range(20)}
    assert said == set(full.tasks["lift_red_cube"].variants)


def test_nobody_is_told_the_same_thing_for_two_tasks(full):
    said = [variant for task in full.tasks.values() for variant in task.variants]
    assert len(said) == len(set(said))


def test_seeds_of_training_and_evaluation_are_apart():
    assert TRAINING_SEEDS.stop <= EVALUATION_SEEDS.start


def test_touching_the_wrong_thing_is_a_failure(demo):
    demo.reset(seed=2, options={"task": "touch_red_cube"})
    wrong = demo.tasks["touch_blue_cube"]
    right = demo.task
    for _ in range(30):
        demo.task = wrong
        action = expert(demo)
        demo.task = right
        *_, terminated, _, info = demo.step(action)
        if terminated:
            break
    assert terminated
    assert not info["success"]


def test_idling_ends_at_the_limit_without_success():
    env = Tabletop(image_size=32, max_episode_steps=5)
    assert play(env, 0, "lift_red_cube", lambda _: STILL) == (False, 0.0, 5)
    env.close()


def test_actions_are_clipped_to_the_limit(demo):
    demo.reset(seed=0, options={"task": "touch_red_cube"})
    start = demo.hand_position
    demo.step(np.array([0, 5.0, 0, 0, 0, 0, 1]))
    assert np.abs(demo.hand_position - start).max() < 0.04


def test_robots_differ_in_units_limits_and_time():
    metric, relative = EMBODIMENTS["metric"], EMBODIMENTS["relative"]
    assert relative.high[0] > 10 * metric.high[0]
    for embodiment in (metric, relative):
        action = np.array([0.01, -0.02, 0.005, 0.05, 0, -0.05, 1.0])
        np.testing.assert_allclose(embodiment.to_metric(embodiment.from_metric(action)), action)


def test_world_arguments_are_checked():
    with pytest.raises(ValueError, match="red sofa"):
        Tabletop(objects=["red sofa"])
    with pytest.raises(ValueError, match="fold_"):
        Tabletop(tasks=["fold_*"])
    with pytest.raises(ValueError, match="metric"):
        Tabletop(embodiment="imperial")
    with pytest.raises(ValueError, match="objects and plates per scene"):
        Tabletop(objects_per_scene=9)


def test_an_unknown_task_and_a_bad_action_are_refused(demo):
    with pytest.raises(ValueError, match="juggle"):
        demo.reset(seed=0, options={"task": "juggle"})
    demo.reset(seed=0)
    with pytest.raises(ValueError, match="seven finite numbers"):
        demo.step(np.full(7, np.nan))


@pytest.mark.parametrize("backend", ["directx", "osmesa"])
def test_a_machine_that_cannot_draw_is_told_what_to_install(backend, tmp_path):
    script = """
import ctypes.util, sys
ctypes.util.find_library = lambda name: None
sys.modules["mujoco.osmesa"] = None
from openvla_lightning.env.tabletop import Tabletop
Tabletop().reset(seed=0)
"""
    found = subprocess.run([sys.executable, "-c", script], env={"MUJOCO_GL": backend, "PATH": ""}, capture_output=True)
    said = found.stderr.decode().strip().splitlines()[-1]
    assert said.startswith("RuntimeError")
    assert ("libosmesa6" in said and "libegl1" in said) if backend == "osmesa" else "MUJOCO_GL" in said


@pytest.mark.parametrize("task", ["lift_red_cube", "push_red_cube_left", "put_red_cube_on_white_plate"])
def test_partial_credit_grows_to_one(task):
    env = Tabletop(image_size=32)
    env.reset(seed=11, options={"task": task})
    credit = [0.0]
    for _ in range(env.max_episode_steps):
        *_, done, _, info = env.step(expert(env))
        credit.append(info["progress"])
        if done:
            break
    assert credit[-1] == 1.0
    assert all(0 <= share <= 1 for share in credit)
    assert any(0.1 < share < 0.95 for share in credit)


def test_waiting_finishes_the_last_action_and_then_stays():
    env = Tabletop(image_size=32)
    env.reset(seed=3, options={"task": "lift_red_cube"})
    before = env.hand_position
    env.step(np.array([0.03, 0, 0, 0, 0, 0, 1.0]))
    places = [env.hand_position]
    for _ in range(4):
        env.wait()
        places.append(env.hand_position)
    assert abs(places[-1][0] - before[0]) > 0.02
    assert np.abs(places[-1] - places[-2]).max() < 1e-3
    assert env.control_hz == pytest.approx(10)
    assert Tabletop(embodiment="relative").control_hz == pytest.approx(12.5)


@pytest.mark.parametrize("embodiment", ["metric", "relative"])
def test_the_world_passes_its_own_test_and_a_flipped_one_does_not(embodiment):
    class Flipped(Tabletop):
        def _picture(self, camera):
            return super()._picture(camera)[::-1]

    class Mirrored(Tabletop):
        def _picture(self, camera):
            return super()._picture(camera)[:, ::-1]

    for world, wrong in ((Tabletop, []), (Flipped, ["orientation"]), (Mirrored, ["orientation"])):
        checks = world(embodiment=embodiment, tidy=True).self_test()
        assert [check.name for check in checks if not check.ok] == wrong
        assert len(checks) == 6
