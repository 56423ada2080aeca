"""One function per recording format: raw trajectory -> standardised trajectory, as in the released code.

To add a dataset: write the function, register it with its cameras and proprioception, name it in a mixture
(conf/data/mix). Datasets that share a function differ only in the arguments of `register`. Quirks of the released code
that change numbers are kept, and a docstring names them.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from openvla_lightning.data.oxe import gripper
from openvla_lightning.data.oxe.leaves import leaf_at, put_at
from openvla_lightning.data.oxe.registry import cut, register
from openvla_lightning.data.oxe.rotations import euler_from_quaternion
from openvla_lightning.data.oxe.spec import Trajectory

OXE = "gsutil -m cp -r gs://gresearch/robotics/{name} {root}"
BRIDGE = "https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds/ (rename bridge_dataset to bridge_orig)"
LIBERO = "hf download openvla/modified_libero_rlds --repo-type dataset --local-dir {root}"
LIBERO_SCRIPTED = "python -m openvla_lightning.libero_demonstrations {root}/{name}/1.0.0"
TABLETOP = "python -m openvla_lightning.demonstrations"
OWN = "not public; RLDS folders of your own recordings"

EEF = ("EEF_state", None, "gripper_state")
LOWER_EEF = ("eef_state", None, "gripper_state")
NO_STATE = (None,) * 8
STILL = 1e-4
"""Norm of an end effector's step (metres and radians together) below which it stands still, as in LIBERO's filter."""


# Building blocks of the functions.


def observe(trajectory: Trajectory, **leaves: np.ndarray) -> Trajectory:
    """Add leaves under `observation`."""
    return trajectory | {"observation": trajectory["observation"] | leaves}


def act(trajectory: Trajectory, *columns: np.ndarray) -> Trajectory:
    """Set the action to the concatenation of `columns`."""
    return trajectory | {"action": side_by_side(*columns)}


def side_by_side(*columns: np.ndarray) -> np.ndarray:
    """Concatenate columns [T] or [T, n]."""
    return np.concatenate([column[:, None] if column.ndim == 1 else column for column in columns], axis=1)


def zeros(like: np.ndarray, columns: int) -> np.ndarray:
    """Columns of zeros, with as many steps as `like`."""
    return np.zeros((len(like), columns), like.dtype)


def with_gripper(action: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert the last column of actions [T, D]."""
    return side_by_side(action[:, :-1], convert(action[:, -1]))


def clip(command: np.ndarray) -> np.ndarray:
    """Keep a gripper command within 0..1."""
    return np.clip(command, 0, 1)


def clip_and_invert(command: np.ndarray) -> np.ndarray:
    """Convert a command whose 1 means closed to 1 = open."""
    return gripper.invert(clip(command))


def first_column(command: np.ndarray) -> np.ndarray:
    """A gripper command [T], stored as [T] or [T, 1]."""
    return command if command.ndim == 1 else command[:, 0]


def told(trajectory: Trajectory) -> Trajectory:
    """Take the instruction from the observation."""
    return trajectory | {"language_instruction": trajectory["observation"]["natural_language_instruction"]}


def reached_poses(trajectory: Trajectory) -> Trajectory:
    """Replace commanded by reached movement (the state's difference to the next step); drop the last step."""
    state = trajectory["observation"]["state"][:, :6]
    action = side_by_side(state[1:] - state[:-1], trajectory["action"][:-1, -1])
    return cut(trajectory, slice(None, -1)) | {"action": action}


def state_of_end_effector(trajectory: Trajectory) -> Trajectory:
    """The state is a pose [T, 6] with the gripper last."""
    state = trajectory["observation"]["state"]
    return observe(trajectory, eef_state=state[:, :6], gripper_state=state[:, -1:])


def quaternion_action(trajectory: Trajectory, convert: Callable[[np.ndarray], np.ndarray]) -> Trajectory:
    """Actions are a position, a quaternion and the gripper."""
    action = trajectory["action"]
    return act(trajectory, action[:, :3], euler_from_quaternion(action[:, 3:7]), convert(action[:, -1]))


def moved(trajectory: Trajectory, convert: Callable[[np.ndarray], np.ndarray]) -> Trajectory:
    """Actions are `world_vector`, `rotation_delta` and a converted `gripper_closedness_action`."""
    action = trajectory["action"]
    grip = convert(first_column(action["gripper_closedness_action"]))
    return told(act(trajectory, action["world_vector"], action["rotation_delta"], grip))


def opened(trajectory: Trajectory) -> Trajectory:
    """Actions are `world_vector`, `rotation_delta` and a boolean `open_gripper`."""
    action = trajectory["action"]
    grip = first_column(action["open_gripper"]).astype(np.float32)
    return told(act(trajectory, action["world_vector"], action["rotation_delta"], grip))


def cameras(primary: str | None, secondary: str | None = None, wrist: str | None = None) -> dict[str, str | None]:
    """Role -> key of the stored image."""
    return {"primary": primary, "secondary": secondary, "wrist": wrist}


# RT-X and the rest of the released mixtures.


@register(
    "fractal20220817_data",
    cameras=cameras("image"),
    state=("base_pose_tool_reached", "gripper_closed"),
    control_hz=3,
    where=OXE,
)
@register(
    "nyu_door_opening_surprising_effectiveness",
    cameras=cameras(None, wrist="image"),
    state=NO_STATE,
    control_hz=3,
    where=OXE,
)
def rt_1(trajectory: Trajectory) -> Trajectory:
    """RT-1: gripper events."""
    return moved(trajectory, gripper.from_relative)


@register(
    "kuka",
    cameras=cameras("image"),
    state=("clip_function_input/base_pose_tool_reached", "gripper_closed"),
    control_hz=10,
    where=OXE,
)
def kuka(trajectory: Trajectory) -> Trajectory:
    """QT-Opt: as RT-1; proprioception is stored as compressed bytes."""
    trajectory = rt_1(trajectory)
    for path, columns in (("clip_function_input/base_pose_tool_reached", 7), ("gripper_closed", 1)):
        path = f"observation/{path}"
        trajectory = put_at(trajectory, path, inflate(leaf_at(trajectory, path), columns))
    return trajectory


def inflate(packed: np.ndarray, columns: int) -> np.ndarray:
    """zlib-compressed little-endian float32 [T] -> [T, columns]."""
    rows = [np.frombuffer(zlib.decompress(row), "<f4") for row in packed]
    return np.stack(rows).reshape(len(rows), columns).astype(np.float32) if rows else np.zeros((0, columns), np.float32)


@register(
    "bridge_oxe",
    cameras=cameras("image", "image_1"),
    state=EEF,
    drop_first=True,
    control_hz=5,
    noop_threshold=STILL,
    where=OXE.replace("{name}", "bridge"),
)
def bridge_oxe(trajectory: Trajectory) -> Trajectory:
    """Bridge as first published in Open X-Embodiment: the gripper is a boolean already."""
    return bridge_state(reached_poses(opened(trajectory)))


@register(
    "bridge_orig",
    "bridge_dataset",
    cameras=cameras("image_0", "image_1"),
    state=EEF,
    drop_first=True,
    control_hz=5,
    noop_threshold=STILL,
    where=BRIDGE,
)
def bridge(trajectory: Trajectory) -> Trajectory:
    """Bridge V2: movement is what the robot reached."""
    return bridge_state(
        reached_poses(trajectory | {"action": with_gripper(trajectory["action"], gripper.binarise)}),
    )


def bridge_state(trajectory: Trajectory) -> Trajectory:
    """Pose and gripper of Bridge's state."""
    state = trajectory["observation"]["state"]
    return observe(trajectory, EEF_state=state[:, :6], gripper_state=state[:, -1:])


@register(
    "taco_play",
    cameras=cameras("rgb_static", wrist="rgb_gripper"),
    state=("state_eef", None, "state_gripper"),
    control_hz=15,
    where=OXE,
)
def taco_play(trajectory: Trajectory) -> Trajectory:
    """TACO Play. As released: the gripper is clipped but not inverted, its state is a joint (index 7, not 6)."""
    robot, action = trajectory["observation"]["robot_obs"], trajectory["action"]["rel_actions_world"]
    trajectory = observe(trajectory, state_eef=robot[:, :6], state_gripper=robot[:, 7:8])
    return told(act(trajectory, action[:, :6], clip(action[:, -1])))


@register(
    "jaco_play",
    cameras=cameras("image", wrist="image_wrist"),
    state=("state_eef", None, "state_gripper"),
    control_hz=10,
    where=OXE,
)
def jaco_play(trajectory: Trajectory) -> Trajectory:
    """Jaco Play: nothing is turned."""
    action, pose = trajectory["action"], trajectory["observation"]["end_effector_cartesian_pos"]
    trajectory = observe(trajectory, state_eef=pose[:, :6], state_gripper=pose[:, -1:])
    grip = gripper.from_relative(first_column(action["gripper_closedness_action"]))
    return told(act(trajectory, action["world_vector"], zeros(action["world_vector"], 3), grip))


@register(
    "berkeley_cable_routing",
    cameras=cameras("image", "top_image", "wrist45_image"),
    state=("robot_state", None),
    control_hz=10,
    where=OXE,
)
def berkeley_cable_routing(trajectory: Trajectory) -> Trajectory:
    """Cable routing: the gripper never moves."""
    action = trajectory["action"]
    return told(act(trajectory, action["world_vector"], action["rotation_delta"], zeros(action["world_vector"], 1)))


@register("roboturk", cameras=cameras("front_rgb"), state=NO_STATE, control_hz=10, where=OXE)
@register(
    "viola",
    cameras=cameras("agentview_rgb", wrist="eye_in_hand_rgb"),
    state=("joint_states", "gripper_states"),
    control_hz=20,
    where=OXE,
)
def closing_command(trajectory: Trajectory) -> Trajectory:
    """RoboTurk and VIOLA: 1 closes the gripper."""
    return moved(trajectory, clip_and_invert)


@register(
    "berkeley_autolab_ur5",
    cameras=cameras("image", wrist="hand_image"),
    state=("state",),
    control_hz=5,
    where=OXE,
)
def berkeley_autolab_ur5(trajectory: Trajectory) -> Trajectory:
    """Berkeley's UR5: gripper events."""
    seen = {key: leaf for key, leaf in trajectory["observation"].items() if key != "image_with_depth"}
    seen["state"] = seen["robot_state"][:, 6:14]
    if "image_with_depth" in trajectory["observation"]:
        seen["depth"] = trajectory["observation"]["image_with_depth"]
    return moved(trajectory | {"observation": seen}, gripper.from_relative)


@register("toto", cameras=cameras("image"), state=("state", None), control_hz=30, where=OXE)
def toto(trajectory: Trajectory) -> Trajectory:
    """TOTO: the gripper is a boolean already."""
    return opened(trajectory)


@register(
    "language_table",
    cameras=cameras("rgb"),
    state=("effector_translation", *(None,) * 6),
    control_hz=10,
    where=OXE,
)
def language_table(trajectory: Trajectory) -> Trajectory:
    """Language-Table: movement in a plane; the instruction is stored as code points, padded with zeros."""
    action = trajectory["action"]
    words = [code_points(row) for row in trajectory["observation"]["instruction"]]
    trajectory = act(trajectory, action, zeros(action, 4), zeros(action, 1) + 1)
    return trajectory | {"language_instruction": np.array(words, object)}


def code_points(row: np.ndarray) -> bytes:
    """The text before the first zero, as UTF-8; what is no character becomes the replacement character."""
    text = "".join(chr(c) if 0 <= c < 0x110000 and not 0xD800 <= c < 0xE000 else "\ufffd" for c in row.tolist())
    return text.partition("\0")[0].encode()


@register(
    "columbia_cairlab_pusht_real",
    cameras=cameras("image", wrist="wrist_image"),
    state=("robot_state", *(None,) * 6),
    control_hz=10,
    where=OXE,
)
def pusht(trajectory: Trajectory) -> Trajectory:
    """Push-T on a real robot: the gripper's command as it is."""
    return moved(trajectory, lambda command: command)


@register(
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("ee_position", "ee_orientation", None),
    control_hz=20,
    where=OXE,
)
def stanford_kuka(trajectory: Trajectory) -> Trajectory:
    """Stanford's Kuka: nothing is turned."""
    return position_and_gripper(without_channel(trajectory, "depth_image"), 3)


def position_and_gripper(trajectory: Trajectory, moving: int) -> Trajectory:
    """Actions are `moving` changes and the gripper; the missing changes are zeros."""
    action = trajectory["action"]
    return act(trajectory, action[:, :moving], zeros(action, 6 - moving), action[:, -1])


def without_channel(trajectory: Trajectory, *keys: str, dtype: Any = None) -> Trajectory:
    """Depth images, where they are stored, without their single channel."""
    seen = trajectory["observation"]
    depth = {key: seen[key][..., 0] for key in keys if key in seen}
    return observe(trajectory, **{key: leaf.astype(dtype) if dtype else leaf for key, leaf in depth.items()})


@register("nyu_rot_dataset_converted_externally_to_rlds", cameras=cameras("image"), state=LOWER_EEF, where=OXE)
def nyu_rot(trajectory: Trajectory) -> Trajectory:
    """NYU ROT: the first seven numbers are the action."""
    trajectory = state_of_end_effector(trajectory)
    return trajectory | {"action": trajectory["action"][:, :7]}


@register(
    "stanford_hydra_dataset_converted_externally_to_rlds",
    cameras=cameras("image", wrist="wrist_image"),
    state=LOWER_EEF,
    control_hz=10,
    where=OXE,
)
def stanford_hydra(trajectory: Trajectory) -> Trajectory:
    """HYDRA: the gripper is inverted without clipping."""
    state = trajectory["observation"]["state"]
    pose = side_by_side(state[:, :3], state[:, 7:10])
    trajectory = observe(trajectory, eef_state=pose, gripper_state=state[:, -3:-2])
    return trajectory | {"action": with_gripper(trajectory["action"], gripper.invert)}


@register(
    "austin_buds_dataset_converted_externally_to_rlds",
    cameras=cameras("image", wrist="wrist_image"),
    state=("state",),
    control_hz=20,
    where=OXE,
)
@register(
    "utaustin_mutex",
    cameras=cameras("image", wrist="wrist_image"),
    state=("state",),
    control_hz=20,
    where=OXE,
)
def austin_buds(trajectory: Trajectory) -> Trajectory:
    """BUDS and MUTEX: 1 closes the gripper; proprioception is the first eight numbers."""
    return austin(observe(trajectory, state=trajectory["observation"]["state"][:, :8]))


@register(
    "austin_sailor_dataset_converted_externally_to_rlds",
    "austin_sirius_dataset_converted_externally_to_rlds",
    cameras=cameras("image", wrist="wrist_image"),
    state=("state",),
    control_hz=20,
    where=OXE,
)
def austin(trajectory: Trajectory) -> Trajectory:
    """Sailor and Sirius: 1 closes the gripper."""
    return trajectory | {"action": with_gripper(trajectory["action"], clip_and_invert)}


@register(
    "nyu_franka_play_dataset_converted_externally_to_rlds",
    cameras=cameras("image", "image_additional_view"),
    state=("eef_state", None, None),
    control_hz=3,
    where=OXE,
)
def nyu_franka_play(trajectory: Trajectory) -> Trajectory:
    """NYU Franka play: the gripper is clipped but not inverted, as released."""
    trajectory = without_channel(trajectory, "depth", "depth_additional_view", dtype=np.float32)
    action = trajectory["action"]
    trajectory = observe(trajectory, eef_state=trajectory["observation"]["state"][:, -6:])
    return act(trajectory, action[:, -8:-2], clip(action[:, -2]))


@register(
    "maniskill_dataset_converted_externally_to_rlds",
    cameras=cameras("image", wrist="wrist_image"),
    state=("tcp_pose", "gripper_state"),
    control_hz=20,
    where=OXE,
)
def maniskill(trajectory: Trajectory) -> Trajectory:
    """ManiSkill: actions are in form."""
    return observe(trajectory, gripper_state=trajectory["observation"]["state"][:, 7:8])


@register(
    "furniture_bench_dataset_converted_externally_to_rlds",
    cameras=cameras("image", wrist="wrist_image"),
    state=("state",),
    control_hz=10,
    where=OXE,
)
def furniture_bench(trajectory: Trajectory) -> Trajectory:
    """FurnitureBench: rotations are quaternions, 1 closes the gripper."""
    state = trajectory["observation"]["state"]
    trajectory = observe(trajectory, state=side_by_side(state[:, :7], state[:, -1]))
    return quaternion_action(trajectory, clip_and_invert)


@register(
    "cmu_franka_exploration_dataset_converted_externally_to_rlds",
    cameras=cameras("highres_image"),
    state=NO_STATE,
    control_hz=10,
    where=OXE,
)
@register(
    "imperialcollege_sawyer_wrist_cam",
    cameras=cameras("image", wrist="wrist_image"),
    state=(*(None,) * 7, "state"),
    control_hz=10,
    where=OXE,
)
def without_terminate(trajectory: Trajectory) -> Trajectory:
    """The last of eight numbers says that the episode ends; it goes."""
    return trajectory | {"action": trajectory["action"][:, :-1]}


@register(
    "ucsd_kitchen_dataset_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("joint_state", None),
    control_hz=2,
    where=OXE,
)
def ucsd_kitchen(trajectory: Trajectory) -> Trajectory:
    """UCSD kitchen: the gripper's command as it is."""
    return without_terminate(observe(trajectory, joint_state=trajectory["observation"]["state"][:, :7]))


@register(
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=LOWER_EEF,
    control_hz=3,
    where=OXE,
)
def ucsd_pick_and_place(trajectory: Trajectory) -> Trajectory:
    """UCSD pick and place: nothing is turned."""
    return position_and_gripper(state_of_end_effector(trajectory), 3)


@register(
    "bc_z",
    cameras=cameras("image"),
    state=("present/xyz", "present/axis_angle", None, "present/sensed_close"),
    control_hz=10,
    where=OXE,
)
def bc_z(trajectory: Trajectory) -> Trajectory:
    """BC-Z: the first of ten stored future actions; 1 closes the gripper."""
    position, rotation, closing = (
        leaf_at(trajectory["action"], f"future/{key}")
        for key in ("xyz_residual", "axis_angle_residual", "target_close")
    )
    grip = gripper.invert(closing[:, :1].astype(np.float32))
    return told(act(trajectory, position[:, :3], rotation[:, :3], grip))


@register(
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds",
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=LOWER_EEF,
    control_hz=10,
    where=OXE,
)
def utokyo_pr2(trajectory: Trajectory) -> Trajectory:
    """Tokyo's PR2: seven numbers and whether the episode ends."""
    return without_terminate(state_of_end_effector(trajectory))


@register(
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds",
    cameras=cameras("image", "image2", "hand_image"),
    state=("end_effector_pose", None, None),
    control_hz=10,
    where=OXE,
)
@register(
    "dlr_sara_pour_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("state", None, None),
    control_hz=10,
    where=OXE,
)
@register(
    "berkeley_mvp_converted_externally_to_rlds",
    cameras=cameras(None, wrist="hand_image"),
    state=("pose", "gripper"),
    encoding="joint_pos",
    where=OXE,
)
@register(
    "berkeley_rpt_converted_externally_to_rlds",
    cameras=cameras(None, wrist="hand_image"),
    state=("joint_pos", "gripper"),
    encoding="joint_pos",
    where=OXE,
)
@register(
    "tabletop_pretrain",
    "tabletop_finetune",
    "tabletop_steady",
    "tabletop_full",
    cameras=cameras("image"),
    state=("proprio",),
    noop_threshold=STILL,
    where=TABLETOP,
)
def in_form(trajectory: Trajectory) -> Trajectory:
    """Recorded as it is needed."""
    return trajectory


@register(
    "utokyo_xarm_bimanual_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("pose_r", None, None),
    control_hz=10,
    where=OXE,
)
def utokyo_xarm_bimanual(trajectory: Trajectory) -> Trajectory:
    """Two arms, of which the right one is used."""
    return trajectory | {"action": trajectory["action"][:, -7:]}


@register("robo_net", cameras=cameras("image", "image1"), state=LOWER_EEF, control_hz=1, where=OXE)
def robo_net(trajectory: Trajectory) -> Trajectory:
    """RoboNet: turns about one axis."""
    return turning_once(trajectory, trajectory["observation"]["state"])


@register("stanford_mask_vit_converted_externally_to_rlds", cameras=cameras("image"), state=LOWER_EEF, where=OXE)
def stanford_mask_vit(trajectory: Trajectory) -> Trajectory:
    """MaskViT: as RoboNet, its pose under another name."""
    return turning_once(trajectory, trajectory["observation"]["end_effector_pose"])


def turning_once(trajectory: Trajectory, pose: np.ndarray) -> Trajectory:
    """Position, one angle and the gripper."""
    state = side_by_side(pose[:, :4], zeros(pose, 2))
    return position_and_gripper(observe(trajectory, eef_state=state, gripper_state=pose[:, -1:]), 4)


@register(
    "kaist_nonprehensile_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("state", None),
    control_hz=10,
    where=OXE,
)
def kaist_nonprehensile(trajectory: Trajectory) -> Trajectory:
    """KAIST: no gripper; proprioception is the last seven numbers."""
    action = trajectory["action"]
    trajectory = observe(trajectory, state=trajectory["observation"]["state"][:, -7:])
    return act(trajectory, action[:, :6], zeros(action, 1))


@register(
    "tokyo_u_lsmo_converted_externally_to_rlds", cameras=cameras("image"), state=LOWER_EEF, control_hz=10, where=OXE
)
@register(
    "stanford_robocook_converted_externally_to_rlds",
    cameras=cameras("image_1", "image_2"),
    state=LOWER_EEF,
    control_hz=5,
    where=OXE,
)
def robocook(trajectory: Trajectory) -> Trajectory:
    """RoboCook and LSMO: actions are in form."""
    return state_of_end_effector(trajectory)


@register(
    "dlr_sara_grid_clamp_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("state", None, None),
    control_hz=10,
    where=OXE,
)
def dlr_sara_grid_clamp(trajectory: Trajectory) -> Trajectory:
    """DLR's SARA: proprioception is the first six numbers."""
    return observe(trajectory, state=trajectory["observation"]["state"][:, :6])


@register(
    "dlr_edan_shared_control_converted_externally_to_rlds",
    cameras=cameras("image"),
    state=("state", None),
    control_hz=5,
    where=OXE,
)
def dlr_edan(trajectory: Trajectory) -> Trajectory:
    """DLR's EDAN: the gripper is inverted without clipping."""
    return trajectory | {"action": with_gripper(trajectory["action"], gripper.invert)}


@register(
    "asu_table_top_converted_externally_to_rlds", cameras=cameras("image"), state=LOWER_EEF, control_hz=12.5, where=OXE
)
def asu_table_top(trajectory: Trajectory) -> Trajectory:
    """ASU: the pose is among the ground truth."""
    pose = trajectory["ground_truth_states"]["EE"]
    return observe(trajectory, eef_state=pose, gripper_state=trajectory["observation"]["state"][:, -1:])


@register(
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
    cameras=cameras("image", wrist="wrist_image"),
    state=("joint_state", "gripper_state"),
    control_hz=20,
    where=OXE,
)
def iamlab_cmu_pickup_insert(trajectory: Trajectory) -> Trajectory:
    """IAMLab: rotations are quaternions, the gripper's command as it is."""
    state = trajectory["observation"]["state"]
    trajectory = observe(trajectory, joint_state=state[:, :7], gripper_state=state[:, 7:8])
    action = trajectory["action"]
    return act(trajectory, action[:, :3], euler_from_quaternion(action[:, 3:7]), action[:, 7:8])


@register("uiuc_d3field", cameras=cameras("image_1", "image_2"), state=NO_STATE, control_hz=1, where=OXE)
def uiuc_d3field(trajectory: Trajectory) -> Trajectory:
    """D3Fields: positions alone."""
    return act(trajectory, trajectory["action"], zeros(trajectory["action"], 4))


@register(
    "berkeley_fanuc_manipulation",
    cameras=cameras("image", wrist="wrist_image"),
    state=("joint_state", None, "gripper_state"),
    control_hz=10,
    where=OXE,
)
def berkeley_fanuc(trajectory: Trajectory) -> Trajectory:
    """Berkeley's Fanuc: the gripper's command is its state, inverted."""
    state = trajectory["observation"]["state"]
    trajectory = observe(trajectory, joint_state=state[:, :6], gripper_state=state[:, 6:7])
    return act(trajectory, trajectory["action"], gripper.invert(state[:, 6:7]))


@register(
    "cmu_playing_with_food",
    cameras=cameras("image", wrist="finger_vision_1"),
    state=("state", None, None),
    control_hz=10,
    where=OXE,
)
def cmu_playing_with_food(trajectory: Trajectory) -> Trajectory:
    """CMU's food: rotations are quaternions."""
    return quaternion_action(trajectory, lambda command: command)


@register("cmu_play_fusion", cameras=cameras("image"), state=("state",), control_hz=5, where=OXE)
def cmu_play_fusion(trajectory: Trajectory) -> Trajectory:
    """PlayFusion: the first three and the last four numbers."""
    return act(trajectory, trajectory["action"][:, :3], trajectory["action"][:, -4:])


@register("cmu_stretch", cameras=cameras("image"), state=LOWER_EEF, control_hz=10, where=OXE)
def cmu_stretch(trajectory: Trajectory) -> Trajectory:
    """CMU's Stretch: the gripper's command as it is."""
    state = trajectory["observation"]["state"]
    pose = side_by_side(state[:, :3], zeros(state, 3))
    return without_terminate(observe(trajectory, eef_state=pose, gripper_state=state[:, -1:]))


@register(
    "berkeley_gnm_recon",
    "berkeley_gnm_cory_hall",
    "berkeley_gnm_sac_son",
    cameras=cameras(None, wrist="image"),
    state=("state", None, None),
    where=OXE,
)
def berkeley_gnm(trajectory: Trajectory) -> Trajectory:
    """GNM: driving, in a plane."""
    seen, action = trajectory["observation"], trajectory["action"]
    state = side_by_side(seen["position"], zeros(seen["position"], 3), seen["yaw"])
    return act(observe(trajectory, state=state), action, zeros(action, 5))


@register(
    "droid",
    cameras=cameras("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"),
    state=("proprio",),
    swap=("primary", "secondary"),
    zero_filter=True,
    control_hz=15,
    noop_threshold=STILL,
    where="gsutil -m cp -r gs://gresearch/robotics/droid {root}",
)
@register(
    "droid_wipe",
    cameras=cameras("exterior_image_2_left", wrist="wrist_image_left"),
    state=("proprio",),
    control_hz=15,
    noop_threshold=STILL,
    where=OWN,
)
def droid(trajectory: Trajectory) -> Trajectory:
    """DROID and Franka-DROID: velocities in the base's frame."""
    action, seen = trajectory["action_dict"], trajectory["observation"]
    proprio = side_by_side(seen["cartesian_position"], seen["gripper_position"])
    trajectory = observe(trajectory, proprio=proprio)
    return act(trajectory, action["cartesian_velocity"][:, :6], gripper.invert(action["gripper_position"]))


@register(
    "fmb_dataset",
    cameras=cameras("image_side_1", "image_side_2", "image_wrist_1"),
    state=("proprio",),
    control_hz=10,
    where=OXE.replace("{name}", "fmb"),
)
def fmb(trajectory: Trajectory) -> Trajectory:
    """FMB: actions are in form."""
    seen = trajectory["observation"]
    return observe(trajectory, proprio=side_by_side(seen["eef_pose"], seen["state_gripper_pose"]))


@register("dobbe", cameras=cameras("wrist_image"), state=("proprio",), control_hz=3.75, where=OXE)
def dobbe(trajectory: Trajectory) -> Trajectory:
    """Dobb-E: actions are in form."""
    return observe(trajectory, proprio=trajectory["observation"]["state"])


@register(
    "roboset",
    cameras=cameras("image_left", "image_right", "image_wrist"),
    state=("proprio",),
    encoding="joint_pos",
    where=OXE,
)
def roboset(trajectory: Trajectory) -> Trajectory:
    """RoboSet: joint positions, 1 closes the gripper."""
    return austin(dobbe(trajectory))


@register(
    "rh20t",
    cameras=cameras("image_front", "image_side_right", "image_wrist"),
    state=("proprio",),
    where="https://rh20t.github.io (to be converted to RLDS)",
)
def rh20t(trajectory: Trajectory) -> Trajectory:
    """RH20T: the gripper's command as it is."""
    action, seen = trajectory["action"], trajectory["observation"]
    trajectory = observe(trajectory, proprio=side_by_side(seen["tcp_base"], seen["gripper_width"]))
    return act(trajectory, action["tcp_base"], action["gripper"])


# The paper's fine-tuning.


@register(
    "libero_spatial_scripted",
    "libero_object_scripted",
    "libero_goal_scripted",
    "libero_10_scripted",
    cameras=cameras("image", wrist="wrist_image"),
    state=EEF,
    control_hz=20,
    noop_threshold=STILL,
    where=LIBERO_SCRIPTED,
)
@register(
    "libero_spatial_no_noops",
    "libero_object_no_noops",
    "libero_goal_no_noops",
    "libero_10_no_noops",
    cameras=cameras("image", wrist="wrist_image"),
    state=EEF,
    control_hz=20,
    noop_threshold=STILL,
    where=LIBERO,
)
def libero(trajectory: Trajectory) -> Trajectory:
    """LIBERO, regenerated without no-ops: the gripper command -1 (open) .. +1 (closed) becomes 1 .. 0."""
    state = trajectory["observation"]["state"]
    return austin(observe(trajectory, EEF_state=state[:, :6], gripper_state=state[:, -2:]))


@register(
    "tdroid_carrot_in_bowl",
    "tdroid_pour_corn_in_pot",
    "tdroid_flip_pot_upright",
    "tdroid_move_object_onto_plate",
    "tdroid_knock_object_over",
    "tdroid_cover_object_with_towel",
    cameras=cameras("static_image"),
    state=EEF,
    control_hz=5,
    noop_threshold=STILL,
    where=OWN,
)
def tdroid(trajectory: Trajectory) -> Trajectory:
    """Franka-Tabletop of the paper's fine-tuning experiments."""
    seen = trajectory["observation"]
    return observe(
        trajectory | {"action": with_gripper(trajectory["action"], gripper.binarise)},
        EEF_state=seen["cartesian_position"][:, :6],
        gripper_state=seen["gripper_position"][:, -1:],
    )
