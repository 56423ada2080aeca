"""One action out of several chunks, in rollouts: smoother, for each robot by itself, and refused where it cannot be."""

from collections.abc import Sequence

import numpy as np
import pytest
from toy_world import ToyWorld, Walker

from openvla_lightning.evaluation.control import Control
from openvla_lightning.evaluation.plan import plan_episodes
from openvla_lightning.evaluation.played import jerk
from openvla_lightning.evaluation.rollout import rollout
from openvla_lightning.report.results import Episode
from openvla_lightning.types import Observation


class Shaky(Walker):
    """Knows the way, and says it in chunks of four, each with a tremor of its own."""

    def act_chunk(self, observations: Sequence[Observation]) -> np.ndarray:
        """Actions [B, 4, 7]."""
        pictures = [seen.images["primary"] for seen in observations]
        actions = self.act(pictures, [seen.instruction for seen in observations])
        tremor = np.array([(-1) ** int(picture.sum() // 255) * 0.05 for picture in pictures])
        actions[:, 2] = tremor * (-1) ** (len(self.batches))
        return np.repeat(actions[:, None], 4, axis=1)


def play(ensemble: str | None, num_envs: int = 4, **options: int) -> list[Episode]:
    tasks = list(ToyWorld().tasks.values())
    return rollout(
        Shaky(),
        ToyWorld,
        lambda known: plan_episodes(tasks, 2, 0),
        num_envs=num_envs,
        num_workers=1,
        control=Control(ensemble=ensemble, execute=1 if ensemble is None else None, **options),
    )


def test_an_ensemble_is_smoother_and_still_arrives() -> None:
    plain, *smooth = play(None), play("temporal", ensemble_horizon=4), play("adaptive", ensemble_horizon=4)
    assert all(episode.success for episode in plain)
    for episodes in smooth:
        assert all(episode.success for episode in episodes)
        assert np.mean([e.jerk for e in episodes]) < 0.8 * np.mean([e.jerk for e in plain])


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="choose adaptive, temporal or null"):
        Control(ensemble="mean")
    with pytest.raises(ValueError, match=r"needs eval\.control=blocking"):
        Control("realtime", ensemble="temporal")
    for ensemble, horizon in (("temporal", 0), (None, 4)):
        with pytest.raises(ValueError, match=f"ensemble_horizon={horizon}: at least 1"):
            Control(ensemble=ensemble, ensemble_horizon=horizon)
    with pytest.raises(ValueError, match="give horizon=4 at most"):
        play("adaptive")
    assert "ensemble" not in Control().to_dict()
    assert Control(ensemble="adaptive").to_dict()["ensemble"] == "adaptive"


def test_jerk_is_nothing_for_even_motion_and_grows_with_shaking() -> None:
    even = [np.array([0.1 * step, 0.0, step % 2]) for step in range(10)]  # the gripper's number does not count
    assert jerk(even) == pytest.approx(0.0)
    shaking = [np.array([0.1 * step + 0.5 * (step % 2), 0.0, 1.0]) for step in range(10)]
    assert jerk(shaking) == pytest.approx(1.0)
    assert jerk(even[:2]) is None
