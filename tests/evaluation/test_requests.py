"""Whose mistake it is: what a user asked for is answered in a line, a fault of the code keeps its traceback."""

import errno
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from toy_world import Incomplete, ToyWorld, Walker

from openvla_lightning.checkpoint.format import Description
from openvla_lightning.checkpoint.training import Training
from openvla_lightning.config import CONF, ConfigError
from openvla_lightning.env.libero import Libero
from openvla_lightning.env.simpler import Simpler
from openvla_lightning.env.tabletop import Tabletop
from openvla_lightning.evaluation.scoring import UNUSABLE, evaluate
from openvla_lightning.run.evaluate import EVALUATIONS, check_shown, key_to_predict
from openvla_lightning.run.evaluate import evaluate as run
from openvla_lightning.types import Observation


class Faulty(Walker):
    """A policy with a bug in it."""

    def act_chunk(self, observations: Any) -> Any:
        """Fail as a bug would."""
        raise {"KeyError": KeyError("bins"), "ValueError": ValueError("bug")}[self.kind]

    kind = "KeyError"


@pytest.mark.parametrize("kind", ["KeyError", "ValueError"])
def test_a_fault_of_the_code_does_not_read_like_a_user_s_mistake(kind: str, tmp_path: Path) -> None:
    policy = Faulty()
    policy.kind = kind
    with pytest.raises((KeyError, ValueError)) as error:
        evaluate(policy, ToyWorld, tmp_path / kind, episodes_per_task=1, num_envs=2, num_workers=1)
    assert not isinstance(error.value, UNUSABLE)


class Needy(Walker):
    """A policy that looks through a camera which the world has not."""

    def check(self, observation: Observation) -> None:
        """Say what is missing."""
        raise ValueError(f"there is no image wrist, but {', '.join(observation.images)}")


def test_a_world_that_does_not_show_what_the_policy_needs_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UNUSABLE, match="there is no image wrist, but primary"):
        evaluate(Needy(), ToyWorld, tmp_path, episodes_per_task=1, num_envs=2, num_workers=1)


def described(**processor: Any) -> Description:
    actions: dict[str, Any] = {"q01": [-1.0], "q99": [1.0]}
    stats = {"plain": {"action": actions}, "relative": {"action": actions | {"relative_to": [0]}}}
    return Description(Path("oft"), Training(), (), {}, stats, processor=processor)


@pytest.mark.parametrize(
    ("world", "processor", "key", "message"),
    [
        (partial(Libero, "libero_goal"), {"cameras": ["primary", "wrist"], "proprio": True}, "plain",
         r"needs image, wrist_image, proprio, and the world shows no wrist_image, proprio, but image: "
         r"say env.views=\[primary,wrist\] env.proprio=true"),
        (partial(Libero, suite="libero_goal"), {}, "relative", r"shows no proprio, but image: say .* env.proprio=true"),
        (partial(Libero, "libero_goal", views=["wrist"]), {"camera": "primary"}, "plain", "no image, but wrist_image"),
        (partial(Tabletop, image_size=64), {"cameras": ["wrist"]}, "plain", "no wrist_image, but image, proprio$"),
        (partial(Simpler, "widowx"), {"proprio": True}, "plain", "no proprio, but image$"),
    ],
)  # fmt: skip
def test_views_that_a_world_does_not_show_are_named_before_it_is_built(
    world: Any, processor: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shown(described(**processor), key, None, world)


def test_a_world_that_shows_what_is_needed_or_does_not_say_is_not_refused() -> None:
    both = partial(Libero, "libero_goal", views=["wrist", "primary"], proprio=True)
    check_shown(described(cameras=["primary", "wrist"], proprio=True), "relative", None, both)
    check_shown(described(cameras=["primary", "wrist"]), "plain", ["primary"], partial(Libero, "libero_goal"))
    check_shown(described(cameras=["wrist"]), "plain", None, ToyWorld)
    with Tabletop(wrist_camera=True) as env:
        assert set(Tabletop.keys_of(wrist_camera=True)) == set(env.observation_space)


@pytest.mark.parametrize(
    ("norm_stats", "names", "key"),
    [
        ({"new": {}, "old": {}}, ["absent", "old", "new"], "old"),
        ({"new": {}, "old": {}}, ["absent"], None),
        ({"new": {"latest": True}, "old": {}}, ["old"], None),
        ({"new": {}}, ["old"], None),
    ],
)
def test_held_out_steps_need_no_key_if_the_policy_knows_their_dataset(
    norm_stats: dict[str, Any], names: list[str], key: str | None
) -> None:
    assert key_to_predict(norm_stats, names) == key


def test_held_out_steps_of_two_datasets_are_predicted_as_the_first_command_of_the_pages_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Description(
        Path("two"), Training(), (), {}, {"tabletop_finetune": {}, "tabletop_pretrain": {}}, processor={}
    )
    monkeypatch.setattr("openvla_lightning.run.evaluate.describe", lambda path: known)
    keys: list[str | None] = []
    monkeypatch.setitem(EVALUATIONS, "held_out", lambda cfg, *_: keys.append(cfg.policy.unnorm_key))
    for chosen in ([], ["env.dataset=tabletop_finetune"], ["unnorm_key=tabletop_finetune"]):
        with initialize_config_dir(CONF, version_base="1.3"):
            run(compose("evaluate", ["env=offline", "ckpt_path=two", f"paths.output_dir={tmp_path}", *chosen]))
    assert keys == ["tabletop_pretrain", "tabletop_finetune", "tabletop_finetune"]


def test_what_cannot_be_asked_for_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UNUSABLE, match="no task, family or task set"):
        evaluate(Walker(), ToyWorld, tmp_path, tasks=["fly"], num_envs=2, num_workers=1)
    with pytest.raises(UNUSABLE, match=r"tasks=\[\] chooses no task; there are: all, "):
        evaluate(Walker(), ToyWorld, tmp_path, tasks=[], num_envs=2, num_workers=1)
    with pytest.raises(UNUSABLE, match=r"eval\.control"):
        evaluate(Walker(), ToyWorld, tmp_path, control="slow", num_envs=2, num_workers=1)


def test_what_a_world_leaves_out_is_kept_with_its_results(tmp_path: Path) -> None:
    """Found from the arguments, before a world is built."""
    found = evaluate(Walker(), partial(Incomplete, 99), tmp_path, episodes_per_task=1, num_envs=2, num_workers=1)
    note = "2 of 6 corners are left out, with fail_at=99"
    assert found.notes == [note]
    assert note in (tmp_path / "report.md").read_text()


def test_a_full_disk_is_a_line_that_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a/video.mp4")

    monkeypatch.setitem(EVALUATIONS, "rollouts", full)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("evaluate", ["ckpt_path=null", f"paths.output_dir={tmp_path}"])
    with pytest.raises(SystemExit, match=f"error: a/video.mp4: No space left .* paths.output_dir='{tmp_path}' goes on"):
        run(cfg)


def test_a_folder_that_cannot_be_written_is_refused_before_the_world_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("evaluate", ["ckpt_path=null", f"paths.output_dir={tmp_path}/file"])
    with pytest.raises(SystemExit, match=f"error: paths.output_dir={tmp_path}/file: nothing can be written there"):
        run(cfg)
