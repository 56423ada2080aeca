"""The kept observations and actions of an episode, for a video or a dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openvla_lightning.data.source.lerobot.recorder import Taken
from openvla_lightning.evaluation.control import observed
from openvla_lightning.report.results import Episode


@dataclass(frozen=True, slots=True)
class Played:
    """The kept data of an episode of T actions: observations [T + 1], the actions, and the control rate."""

    shown: Sequence[Mapping[str, np.ndarray]]
    actions: Sequence[np.ndarray]
    rate_hz: float


def taken(episode: Episode, played: Played) -> Taken:
    """An episode in the form of a recorded dataset: the observation before each action, with a policy's view names."""
    before = [observed(shown, episode.instruction, ()) for shown in played.shown[:-1]]
    pictures = {view: [seen.images[view] for seen in before] for view in before[0].images} if before else {}
    felt = [seen.proprio for seen in before if seen.proprio is not None]
    state = np.stack(felt) if felt else None
    return Taken(pictures, np.array(played.actions), episode.instruction, played.rate_hz, state, episode.success)


def jerk(actions: Sequence[np.ndarray]) -> float | None:
    """Jerk of the motion: the mean norm of the second difference of actions [D], without the gripper (the last number).

    Actions are changes of the pose, so their second difference is the pose's third one. It is in the world's units, and
    compares policies in one world. None for fewer than three actions.
    """
    if len(actions) < 3:
        return None
    changes = np.diff(np.stack(actions)[:, :-1], n=2, axis=0)
    return float(np.linalg.norm(changes, axis=1).mean())
