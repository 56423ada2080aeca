"""The paper's LIBERO protocol, number by number: nothing here needs the simulator."""

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
"""Actions after which an episode has failed, by suite; the settling steps come on top."""

CAMERA, RENDER_SIZE = "agentview", 256
CONTROL_HZ = 20
SETTLING_STEPS = 10
"""No-op actions before the policy sees anything: objects fall onto the table in the first steps."""

NO_OP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""LIBERO's own units: no motion, the gripper open."""

REFERENCE_VERSIONS = {"mujoco": "3.1.0", "robosuite": "1.4.0"}
"""Versions whose results a policy's published figures are usually compared with. One policy succeeded in 98.1 % of the
episodes with MuJoCo 3.1.0 and in 91 % with 3.9.0."""

_STEEP = (0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349)
_LOW = (0.6182166934013367, 0.3432307541370392, 0.3432314395904541, 0.6182177066802979)
CAMERAS = {
    "libero_tabletop_manipulation": ((0.6586131746834771, 0.0, 1.6103500240372423), _STEEP),
    "libero_kitchen_tabletop_manipulation": ((0.6586131746834771, 0.0, 1.6103500240372423), _STEEP),
    "libero_study_tabletop_manipulation": ((0.4586131746834771, 0.0, 1.6103500240372423), _STEEP),
    "libero_living_room_tabletop_manipulation": ((0.6065773716836134, 0.0, 0.96), _LOW),
    "libero_floor_manipulation": ((0.8965773716836134, 5.216182733499864e-07, 0.65), _LOW),
}
"""Position (m) and orientation (w, x, y, z) of the camera in each kind of scene: those of the training data."""


def to_simulator(action: NDArray[np.float64]) -> NDArray[np.float64]:
    """An action [7] in the dataset's units -> LIBERO's: the gripper from 1 open, 0 closed to -1 open, 1 closed."""
    robot = np.array(action, np.float64)
    robot[6] = -np.sign(2 * robot[6] - 1)
    return robot


def to_dataset(robot: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `to_simulator`, for recorded demonstrations, as the data pipeline standardises them."""
    action = np.array(robot, np.float64)
    action[6] = 1 - np.clip(action[6], 0, 1)
    return action


def picture(rendered: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """What the simulator rendered, as the policy saw it in training: uint8 [size, size, 3].

    Turned by 180 degrees (the training data is), through one JPEG (the training data went through one), resized by
    Lanczos-3.
    """
    encoded = io.BytesIO()  # by Pillow: its coefficients are those of the released code, simplejpeg's are others
    Image.fromarray(np.ascontiguousarray(rendered[::-1, ::-1])).save(encoded, "JPEG", quality=95, subsampling="4:2:0")
    return resize(decode(encoded.getvalue()), size)
