"""Chunks of actions, several views, the state and earlier pictures in rollouts of a real world."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_world import CORNERS, SIZE, Seeing, Walker

from openvla_lightning.evaluation.control import Control, ask, observed
from openvla_lightning.evaluation.plan import plan_episodes
from openvla_lightning.evaluation.rollout import rollout
from openvla_lightning.evaluation.scoring import evaluate
from openvla_lightning.types import Observation


class ChunkWalker(Walker):
    """Gives the next four steps of the way at a time, from where the robot says it is."""

    chunk, history = 4, 1

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Observation] = []

    def act(self, image: Sequence[np.ndarray], instruction: Sequence[str]) -> np.ndarray:
        raise AssertionError("chunks are asked for")

    def act_chunk(self, observations: Sequence[Observation]) -> np.ndarray:
        """Actions [B, 4, 7]."""
        self.batches.append(len(observations))
        self.asked += observations
        actions = np.zeros((len(observations), self.chunk, 7))
        for row, seen in enumerate(observations):
            assert seen.proprio is not None
            left = np.array(CORNERS[seen.instruction.split()[3]]) - seen.proprio[:2]
            for step in range(self.chunk):
                actions[row, step, :2] = np.clip(left, -0.1, 0.1)
                left = left - actions[row, step, :2]
        return actions


def planned(tasks: Any) -> Any:
    return plan_episodes(tasks.values(), 2)


@pytest.mark.parametrize(("execute", "executed"), [(None, 4), (1, 1), (3, 3)])
def test_as_many_actions_of_a_chunk_are_executed_as_asked(execute: int | None, executed: int) -> None:
    walker = ChunkWalker()
    episodes = rollout(walker, Seeing, planned, num_envs=3, num_workers=2, control=Control(execute=execute))
    assert all(episode.success for episode in episodes)
    steps = [int(seen.proprio[2]) for seen in walker.asked if seen.proprio is not None]
    assert {step % executed for step in steps} == {0}, "between two questions so many actions pass"
    assert len(steps) == sum(-(-episode.length // executed) for episode in episodes)


def test_results_say_how_many_actions_a_call_gave(tmp_path: Path) -> None:
    slots = {"num_envs": 2, "num_workers": 1, "episodes_per_task": 1}  # in two groups: one robot a call
    for execute, executed in ((None, 4), (3, 3)):
        results = evaluate(ChunkWalker(), Seeing, tmp_path / str(executed), execute=execute, **slots)  # type: ignore[arg-type]
        assert results.timing["actions_per_call"] == executed
        assert results.timing["seconds_per_call"] > 0


def test_chunks_play_the_same_whatever_the_number_of_workers() -> None:
    one, two = (rollout(ChunkWalker(), Seeing, planned, num_envs=3, num_workers=n) for n in (1, 2))
    assert one == two


def test_what_a_world_shows_arrives_as_views_and_state_and_nothing_else() -> None:
    walker = ChunkWalker()
    rollout(walker, Seeing, planned, num_envs=2, num_workers=1)
    for seen in walker.asked:
        assert list(seen.images) == ["primary", "wrist"]
        np.testing.assert_array_equal(seen.images["wrist"], seen.images["primary"][::-1])
        assert seen.proprio is not None
        assert seen.proprio.shape == (3,)


def test_history_is_of_steps_and_begins_with_the_first_picture() -> None:
    walker = ChunkWalker()
    walker.history = 3
    rollout(walker, Seeing, planned, num_envs=1, num_workers=1, control=Control(execute=2))
    for seen in walker.asked:
        assert list(seen.images)[::2] == ["primary", "primary@-1", "primary@-2"]
        assert seen.proprio is not None
        if seen.proprio[2] == 0:
            assert (seen.images["primary"] == seen.images["primary@-2"]).all()
        else:  # the pictures of the last steps, not of the last questions
            places = [np.argwhere(seen.images[view][..., 0])[0] for view in ("primary", "primary@-1", "primary@-2")]
            moved = [np.abs(a - b).max() for a, b in pairwise(places)]
            assert max(moved) <= 0.2 * SIZE


def test_in_real_time_the_last_chunk_is_executed_while_the_policy_thinks() -> None:
    walker = ChunkWalker()
    control = Control("realtime", rate_hz=10.0, latency=0.6)  # six steps from a picture to its actions
    episodes = rollout(walker, Seeing, planned, num_envs=1, num_workers=1, control=control)
    steps = [int(seen.proprio[2]) for seen in walker.asked if seen.proprio is not None]
    assert {0, 6, 12} <= set(steps) <= {0, 6, 12, 18}, "four actions, and two steps of waiting"
    assert {episode.length for episode in episodes} <= set(range(7, 21))


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"eval\.execute=5, but the policy gives 4 action"):
        rollout(ChunkWalker(), Seeing, planned, num_envs=1, num_workers=1, control=Control(execute=5))
    with pytest.raises(ValueError, match=r"eval\.execute=0"):
        Control(execute=0)

    class Flat:
        def act_chunk(self, observations: Sequence[Observation]) -> np.ndarray:
            return np.zeros((len(observations), 7))

    with pytest.raises(ValueError, match=r"actions \[B, T, D\], the policy gave shape \[1, 7\]"):
        ask(Flat(), [Observation({}, "lift")])  # type: ignore[arg-type]


def test_views_have_the_names_of_their_keys() -> None:
    now, before = ({"image": np.full((1, 1, 3), n), "left_wrist_image": np.full((1, 1, 3), -n)} for n in (2, 1))
    seen = observed(now, "lift", [before])
    assert {view: int(image[0, 0, 0]) for view, image in seen.images.items()} == {
        "primary": 2,
        "left_wrist": -2,
        "primary@-1": 1,
        "left_wrist@-1": -1,
    }
    assert seen.proprio is None
