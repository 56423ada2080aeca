import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from openvla_lightning import demonstrations
from openvla_lightning.data.source.rlds.records import read
from openvla_lightning.env.base import EVALUATION_SEEDS

SMALL = {"train": 12, "val": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both datasets of the demonstration, a dozen episodes each."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for name in demonstrations.EMBEDDED:
            small = dataclasses.replace(demonstrations.DATASETS[name], **SMALL)
            patch.setitem(demonstrations.DATASETS, name, small)
        demonstrations.make(root, workers=0)
        yield root


def episodes(root, name, split="train"):
    builder = tfds.builder_from_directory(root / name / demonstrations.VERSION)
    features = builder.info.features
    decoders = {"steps": tfds.decode.SkipDecoding()}
    return [features.deserialize_example_np(record, decoders=decoders) for record in records(root, name, split)]


def records(root, name, split):
    folder = root / name / demonstrations.VERSION
    for path in sorted(folder.glob(f"*-{split}.tfrecord*")):
        for _, record in read(path):
            yield record


@pytest.mark.parametrize("name", demonstrations.EMBEDDED)
def test_episodes_succeed_and_are_in_rlds_form(written, name):
    found = episodes(written, name)
    assert len(found) == 12
    for episode in found:
        steps = episode["steps"]
        assert steps["action"].shape[1:] == (7,)
        assert steps["reward"].sum() == 1.0
        assert steps["is_first"].tolist() == [True] + [False] * (len(steps["action"]) - 1)
        assert steps["is_last"][-1]
        assert steps["is_terminal"][-1]
        assert len(set(steps["language_instruction"].tolist())) == 1
        assert set(np.unique(steps["action"][:, 6])) <= {0.0, 1.0}


def test_the_two_robots_have_different_scales(written):
    pretrain, finetune = (
        np.concatenate([e["steps"]["action"] for e in episodes(written, name)]) for name in demonstrations.EMBEDDED
    )
    assert np.quantile(finetune[:, 1], 0.99) > 5 * np.quantile(pretrain[:, 1], 0.99)


def test_some_demonstrators_stand_still_for_a_while():
    name = "tabletop_pretrain"
    plan = dataclasses.replace(demonstrations.DATASETS[name], pause=1.0, noise=0.0, detour=0.0, decoy=0.0)
    env = demonstrations.world(name)
    steps = demonstrations.demonstrate(env, plan, "lift_red_cube", seed=1)
    still = [not np.any(step["action"][:6]) for step in steps]
    kept = [a["action"][6] == b["action"][6] for a, b in zip(steps[1:], steps, strict=False)]
    assert sum(s and k for s, k in zip(still[1:], kept, strict=True)) >= 2
    restless = demonstrations.demonstrate(env, dataclasses.replace(plan, pause=0.0), "lift_red_cube", seed=1)
    assert len(restless) < len(steps)


def test_noise_is_executed_and_not_recorded():
    name = "tabletop_pretrain"
    calm = dataclasses.replace(demonstrations.DATASETS[name], pause=0.0, noise=0.0, detour=0.0, decoy=0.0)
    env = demonstrations.world(name)

    def straying(plan):
        strays = []
        for seed in range(6):
            steps = demonstrations.demonstrate(env, plan, "lift_red_cube", seed) or []
            recorded = np.array([step["action"][:3] for step in steps[:-1]]).reshape(-1, 3)
            notches = recorded / (env.embodiment.high[:3] / 6)
            np.testing.assert_allclose(notches, np.round(notches), atol=1e-4)
            moved = np.diff([step["observation"]["proprio"][:3] for step in steps], axis=0).reshape(-1, 3)
            strays += np.abs(moved - recorded).max(1).tolist()
        return np.mean(strays)

    assert straying(dataclasses.replace(calm, noise=0.3)) > 2 * straying(calm)


def test_decoys_lead_towards_other_objects_while_the_record_stays_on_the_task():
    name = "tabletop_pretrain"
    plan = dataclasses.replace(demonstrations.DATASETS[name], pause=0.0, noise=0.0, detour=0.0, decoy=1.0)
    env = demonstrations.world(name)
    env.reset(seed=4, options={"task": "touch_red_cube"})
    targets = [env.position(thing)[:2] for thing in env.objects if thing is not env.task.target]
    astray = demonstrations.lead_astray(env, plan, np.random.default_rng(0), 0.0)
    assert 3 <= len(astray) <= 6
    nearest = min(
        targets, key=lambda spot: np.linalg.norm(np.sign(spot - env.hand_position[:2]) - np.sign(astray[0][:2]))
    )
    assert np.sign(astray[0][:2]).tolist() == np.sign(nearest - env.hand_position[:2]).tolist()


def test_tasks_take_turns_in_one_scene(written):
    found = [e["episode_metadata"] for e in episodes(written, "tabletop_pretrain")]
    tasks = [task.encode() for task in demonstrations.world("tabletop_pretrain").tasks]
    assert [metadata["task"] for metadata in found] == tasks * 2
    scenes = {int(metadata["seed"]) // demonstrations.ATTEMPTS for metadata in found}
    assert scenes == {0, 1}


def test_an_episode_is_a_function_of_its_number():
    one, again = (demonstrations.episode("tabletop_finetune", "val", 3) for _ in range(2))
    assert one["episode_metadata"] == again["episode_metadata"]
    for a, b in zip(one["steps"], again["steps"], strict=True):
        np.testing.assert_array_equal(a["observation"]["image"], b["observation"]["image"])
        np.testing.assert_array_equal(a["action"], b["action"])


def test_steady_demonstrations_execute_nearly_what_they_record():
    limit = demonstrations.world("tabletop_steady").embodiment.high[:3]
    apart = {}
    for name in ("tabletop_steady", "tabletop_finetune"):
        steps = [step for i in range(6) for step in demonstrations.episode(name, "val", i)["steps"]]
        moved = np.array([step["executed_action"][:3] - step["action"][:3] for step in steps]) / limit
        apart[name] = np.abs(moved).max()
    assert apart["tabletop_steady"] < 0.8, "noise of at most a fifth of the limit, and no detour"
    assert apart["tabletop_finetune"] > 1, "a detour may lead the other way"


def test_no_two_datasets_or_evaluations_share_a_scene():
    used = []
    for plan in demonstrations.DATASETS.values():
        used.append((plan.first_seed, plan.first_seed + demonstrations.ATTEMPTS * (plan.train + plan.val)))
    used.sort()
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(used))
    assert used[-1][1] <= EVALUATION_SEEDS.start


def test_a_complete_dataset_is_left_alone(written):
    folder = written / "tabletop_pretrain" / demonstrations.VERSION
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    demonstrations.make(written, ["tabletop_pretrain"], workers=0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_unknown_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tabletop_nothing"):
        demonstrations.make(tmp_path, ["tabletop_nothing"])
