"""One function per dataset: raw trajectory -> standardised trajectory, as the released code does it.

To add one: write the function, register it with its cameras and proprioception, name it in a mixture (conf/data/mix).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from openvla_lightning.data.oxe import gripper
from openvla_lightning.data.oxe.registry import Trajectory, announce, register

OXE = "gsutil -m cp -r gs://gresearch/robotics/{name} {root}"
BRIDGE = "https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds/ (rename bridge_dataset to bridge_orig)"
LIBERO = "hf download openvla/modified_libero_rlds --repo-type dataset --local-dir {root}"
TABLETOP = "python -m openvla_lightning.demonstrations"
POS_EULER = ("EEF_state", None, "gripper_state")


def cut(trajectory: Trajectory, steps: slice) -> Trajectory:
    """Slice every leaf along time, but for the trajectory's own metadata."""

    def sliced(node: Any) -> Any:
        return {key: sliced(child) for key, child in node.items()} if isinstance(node, dict) else node[steps]

    return {key: node if key == "traj_metadata" else sliced(node) for key, node in trajectory.items()}


def observe(trajectory: Trajectory, **leaves: np.ndarray) -> Trajectory:
    """Add leaves under `observation`."""
    return trajectory | {"observation": trajectory["observation"] | leaves}


def reached_poses(trajectory: Trajectory) -> Trajectory:
    """Replace commanded by reached movement (the state's difference to the next step), dropping the last step."""
    state = trajectory["observation"]["state"][:, :6]
    action = np.concatenate([state[1:] - state[:-1], trajectory["action"][:-1, -1:]], axis=1)
    return cut(trajectory, slice(None, -1)) | {"action": action}


def with_gripper(action: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert the last column of actions [T, D]."""
    return np.concatenate([action[:, :-1], convert(action[:, -1])[:, None]], axis=1)


@register(
    "bridge_orig",
    "bridge_dataset",
    cameras={"primary": "image_0", "secondary": "image_1", "wrist": None},
    state=POS_EULER,
    where=BRIDGE,
)
def bridge(trajectory: Trajectory) -> Trajectory:
    """Bridge V2: the first step is a no-op and goes; movement is what the robot reached."""
    trajectory = cut(trajectory, slice(1, None))
    state = trajectory["observation"]["state"]
    trajectory = trajectory | {"action": with_gripper(trajectory["action"], gripper.binarise)}
    return reached_poses(observe(trajectory, EEF_state=state[:, :6], gripper_state=state[:, -1:]))


@register(
    "libero_spatial_no_noops",
    "libero_object_no_noops",
    "libero_goal_no_noops",
    "libero_10_no_noops",
    cameras={"primary": "image", "secondary": None, "wrist": "wrist_image"},
    state=POS_EULER,
    where=LIBERO,
)
def libero(trajectory: Trajectory) -> Trajectory:
    """LIBERO, regenerated without no-ops: the gripper command -1 (open) .. +1 (closed) becomes 1 .. 0."""
    state = trajectory["observation"]["state"]
    action = with_gripper(trajectory["action"], lambda command: gripper.invert(np.clip(command, 0, 1)))
    return observe(trajectory | {"action": action}, EEF_state=state[:, :6], gripper_state=state[:, -2:])


@register(
    "tdroid_carrot_in_bowl",
    "tdroid_pour_corn_in_pot",
    "tdroid_flip_pot_upright",
    "tdroid_move_object_onto_plate",
    "tdroid_knock_object_over",
    "tdroid_cover_object_with_towel",
    cameras={"primary": "static_image", "secondary": None, "wrist": None},
    state=POS_EULER,
    where="not public; RLDS folders of your own recordings",
)
def tdroid(trajectory: Trajectory) -> Trajectory:
    """Franka-Tabletop of the paper's fine-tuning experiments."""
    seen = trajectory["observation"]
    return observe(
        trajectory | {"action": with_gripper(trajectory["action"], gripper.binarise)},
        EEF_state=seen["cartesian_position"][:, :6],
        gripper_state=seen["gripper_position"][:, -1:],
    )


@register(
    "dobbe",
    cameras={"primary": "wrist_image", "secondary": None, "wrist": None},
    state=("proprio",),
    where=OXE,
)
def dobbe(trajectory: Trajectory) -> Trajectory:
    """Dobb-E: the actions are in form already."""
    return observe(trajectory, proprio=trajectory["observation"]["state"])


@register(
    "tabletop_pretrain",
    "tabletop_finetune",
    "tabletop_full",
    cameras={"primary": "image", "secondary": None, "wrist": None},
    state=("proprio",),
    noop_threshold=1e-4,
    where=TABLETOP,
)
def tabletop(trajectory: Trajectory) -> Trajectory:
    """The embedded world writes its demonstrations in form."""
    return trajectory


announce(
    [
        "austin_buds_dataset_converted_externally_to_rlds",
        "austin_sailor_dataset_converted_externally_to_rlds",
        "austin_sirius_dataset_converted_externally_to_rlds",
        "bc_z",
        "berkeley_autolab_ur5",
        "berkeley_cable_routing",
        "berkeley_fanuc_manipulation",
        "berkeley_rpt_converted_externally_to_rlds",
        "cmu_franka_exploration_dataset_converted_externally_to_rlds",
        "kaist_nonprehensile_converted_externally_to_rlds",
        "cmu_play_fusion",
        "cmu_stretch",
        "dlr_edan_shared_control_converted_externally_to_rlds",
        "droid",
        "droid_wipe",
        "fmb_dataset",
        "fractal20220817_data",
        "furniture_bench_dataset_converted_externally_to_rlds",
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        "jaco_play",
        "kuka",
        "language_table",
        "maniskill_dataset_converted_externally_to_rlds",
        "nyu_franka_play_dataset_converted_externally_to_rlds",
        "roboturk",
        "stanford_hydra_dataset_converted_externally_to_rlds",
        "stanford_robocook_converted_externally_to_rlds",
        "taco_play",
        "toto",
        "ucsd_kitchen_dataset_converted_externally_to_rlds",
        "utaustin_mutex",
        "viola",
    ]
)
