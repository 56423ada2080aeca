"""The numbers of the paper's LIBERO protocol. This module does not need the simulator."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openvla_lightning.data.images import decode, resize

STEP_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Actions after which an episode has failed, by suite, without the settling steps."""

PERTURBATIONS = ("lan", "object", "swap", "task")
REWORDED = ("lan", "task")
"""LIBERO-PRO's perturbations of a suite, and those with new instructions."""

VIEWS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}
"""Our names of the views -> LIBERO's camera names."""
CAMERA, RENDER_SIZE = VIEWS["primary"], 256
CONTROL_HZ = 20
SETTLING_STEPS = 10
"""No-op actions before the policy's first picture, because objects fall onto the table in the first steps."""

NO_OP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""A no-op in LIBERO's own units: no motion, the gripper open."""

REFERENCE_VERSIONS = {"mujoco": "3.3.2", "robosuite": "1.4.0"}
"""Versions for comparable results. With MuJoCo 3.1.0 (used for older published figures), 3.3.2 and 3.3.7, objects come
to rest in the same places (within 1e-5 mm). From 3.3.3 on, LIBERO-Object's floor is darker than in the training data,
and from 3.4.0 on, some initial states are unstable (see `BROKEN`)."""

BROKEN = {
    "3.3.3": "draws the floor of libero_object darker than in the training data (mean red of a picture 111, not 145)",
    "3.4.0": (
        "breaks initial states. libero_spatial: the bowl slides off the ramekin in "
        "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate. libero_10: groceries are thrown into the air "
        "and still fall when the episode begins in "
        "LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket, "
        "LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket and "
        "LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket"
    ),
}
"""MuJoCo's version -> the fault that it and all later versions have with LIBERO."""

RAMEKIN_TASK = "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate"
RAMEKIN_BOWL, RAMEKIN = "akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"
SEATED = 0.025
"""Largest distance (m) of the bowl from the ramekin's centre: it is 0.0145 when seated, and 0.037 on the rim."""

STILL = 0.05
"""Largest speed (m/s) of any object at the policy's first picture."""

_STEEP = (0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349)
_LOW = (0.6182166934013367, 0.3432307541370392, 0.3432314395904541, 0.6182177066802979)
CAMERAS = {
    "libero_tabletop_manipulation": ((0.6586131746834771, 0.0, 1.6103500240372423), _STEEP),
    "libero_kitchen_tabletop_manipulation": ((0.6586131746834771, 0.0, 1.6103500240372423), _STEEP),
    "libero_study_tabletop_manipulation": ((0.4586131746834771, 0.0, 1.6103500240372423), _STEEP),
    "libero_living_room_tabletop_manipulation": ((0.6065773716836134, 0.0, 0.96), _LOW),
    "libero_floor_manipulation": ((0.8965773716836134, 5.216182733499864e-07, 0.65), _LOW),
}
"""Position (m) and orientation (w, x, y, z) of the camera in each kind of scene, as in the training data."""


def to_simulator(action: NDArray[np.float64]) -> NDArray[np.float64]:
    """An action [7] in the dataset's units -> LIBERO's: the gripper from 1 open, 0 closed to -1 open, 1 closed."""
    robot = np.array(action, np.float64)
    robot[6] = -np.sign(2 * robot[6] - 1)
    return robot


def to_dataset(robot: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `to_simulator`, for recorded demonstrations, as in the data pipeline's standardisation."""
    action = np.array(robot, np.float64)
    action[6] = 1 - np.clip(action[6], 0, 1)
    return action


def picture(rendered: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The simulator's picture with the processing of the training data: uint8 [size, size, 3].

    It is rotated by 180 degrees, encoded and decoded as JPEG, and resized by Lanczos-3.
    """
    encoded = io.BytesIO()  # Pillow's coefficients are those of the released code, simplejpeg's are not
    Image.fromarray(np.ascontiguousarray(rendered[::-1, ::-1])).save(encoded, "JPEG", quality=95, subsampling="4:2:0")
    return resize(decode(encoded.getvalue()), size)


def version_notes(mujoco: str) -> list[str]:
    """Notes for results with this version of MuJoCo: the tasks that it breaks."""
    found = _numbers(mujoco)
    done = [what for since, what in BROKEN.items() if found >= _numbers(since)]
    return [f"MuJoCo {mujoco} {what} (pip install 'mujoco>=3.3,<3.3.3')" for what in done]


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]
