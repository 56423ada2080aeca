"""The table, the arm and all objects, as one MuJoCo model.

Lengths are in metres, angles in radians. The camera faces the robot: +x points towards the viewer, +y to the right of
the picture, +z up, and the table top is z = 0.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.86, 0.08, 0.08),
    "green": (0.08, 0.62, 0.14),
    "blue": (0.08, 0.22, 0.90),
    "yellow": (0.98, 0.82, 0.05),
    "purple": (0.52, 0.20, 0.66),
    "white": (1.0, 1.0, 1.0),
}

TABLE_X, TABLE_Y = (-0.12, 0.12), (-0.17, 0.17)
"""Ranges of x and y in which objects are placed."""

REACH = np.array([[-0.20, -0.25, 0.012], [0.20, 0.25, 0.26]])
"""The box in which the fingertips stay."""

FINGER_OPEN = 0.04
"""Distance of each finger from the middle of the open gripper."""

TIMESTEP = 0.005


@dataclass(frozen=True, slots=True)
class Thing:
    """One object or plate: its colour, shape, radius (half the width of a cube) and height."""

    colour: str
    shape: str
    radius: float
    height: float

    @property
    def name(self) -> str:
        """The words in an instruction, for example `red cube`."""
        return f"{self.colour} {self.shape}"

    @property
    def body(self) -> str:
        """The name of the MuJoCo body."""
        return f"{self.colour}_{self.shape}"


def _cube(colour: str) -> Thing:
    return Thing(colour, "cube", 0.022, 0.044)


def _can(colour: str) -> Thing:
    return Thing(colour, "can", 0.021, 0.056)


OBJECTS = {
    thing.name: thing
    for thing in (_cube("red"), _cube("green"), _cube("blue"), _can("yellow"), _can("red"), _can("blue"))
}
PLATES = {
    thing.name: thing for thing in (Thing("purple", "plate", 0.055, 0.008), Thing("white", "plate", 0.055, 0.008))
}


def _rgba(colour: str) -> str:
    return " ".join(map(str, COLOURS[colour])) + " 1"


def _object(thing: Thing) -> str:
    half = thing.height / 2
    size = f"{thing.radius} {thing.radius} {half}" if thing.shape == "cube" else f"{thing.radius} {half}"
    shape = "box" if thing.shape == "cube" else "cylinder"
    return f"""
    <body name="{thing.body}" pos="0 0 {half}">
      <freejoint/>
      <geom name="{thing.body}" type="{shape}" size="{size}" rgba="{_rgba(thing.colour)}" mass="0.06" class="object"/>
    </body>"""


def _plate(thing: Thing) -> str:
    half = thing.height / 2
    return f"""
    <body name="{thing.body}" pos="0 0 {half}">
      <geom type="cylinder" size="{thing.radius} {half}" rgba="{_rgba(thing.colour)}" class="object"/>
    </body>"""


def _finger(name: str, side: int) -> str:
    return f"""
      <body name="{name}" pos="0 {0.006 * side} 0">
        <joint name="{name}" type="slide" axis="0 {side} 0" range="0 {FINGER_OPEN}" damping="2" armature="0.02"/>
        <geom name="{name}" type="box" pos="0 0 0.032" size="0.012 0.006 0.032" rgba="0.95 0.45 0.05 1" mass="0.03"
              friction="2 0.05 0.001" class="object"/>
      </body>"""


def mjcf() -> str:
    """Return the MJCF of the whole world: hand, arm, and every object and plate of the catalogue."""
    axes = {"x": "1 0 0", "y": "0 1 0", "z": "0 0 1"}
    slides = "".join(
        f'<joint name="{a}" type="slide" axis="{v}" range="{lo - 0.02} {hi + 0.02}" armature="0.2"/>'
        for (a, v), lo, hi in zip(axes.items(), REACH[0], REACH[1], strict=True)
    )
    hinges = "".join(
        f'<joint name="{n}" type="hinge" axis="{axes[a]}" armature="0.01"/>'
        for n, a in (("yaw", "z"), ("pitch", "y"), ("roll", "x"))
    )
    motors = "".join(f'<position name="{a}" joint="{a}" kp="1500" dampratio="1"/>' for a in "xyz") + "".join(
        f'<position name="{a}" joint="{a}" kp="40" dampratio="1"/>' for a in ("roll", "pitch", "yaw")
    )
    return f"""
<mujoco model="tabletop">
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <compiler angle="radian" autolimits="true"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <quality offsamples="0" shadowsize="0"/>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0 0 0"/>
    <map znear="0.05" zfar="10"/>
  </visual>
  <default>
    <geom contype="0" conaffinity="0"/>
    <default class="object"><geom contype="1" conaffinity="1" condim="4" friction="1 0.02 0.001"/></default>
  </default>
  <worldbody>
    <light directional="true" pos="0 0 2" dir="-0.3 0.2 -1" diffuse="0.35 0.35 0.35" specular="0 0 0"
           castshadow="false"/>
    <camera name="agent" pos="0.473 0 0.755" xyaxes="0 1 0 -0.819 0 0.574" fovy="33"/>
    <geom name="table" type="box" pos="0 0 -0.05" size="0.7 0.8 0.05" rgba="0.80 0.76 0.70 1" class="object"/>
    <geom type="cylinder" pos="-0.42 0 0.10" size="0.05 0.10" rgba="0.25 0.25 0.28 1"/>
    <body name="upper_arm" mocap="true"><geom type="capsule" size="0.028 0.16" rgba="0.45 0.47 0.50 1"/></body>
    <body name="forearm" mocap="true"><geom type="capsule" size="0.022 0.16" rgba="0.60 0.62 0.65 1"/></body>
    <body name="drop_point" mocap="true"><geom type="cylinder" size="0.013 0.0006" rgba="0.02 0.02 0.02 1"/></body>
    <body name="hand" gravcomp="1">
      {slides}{hinges}
      <geom name="palm" type="box" pos="0 0 0.080" size="0.016 0.050 0.014" rgba="0.12 0.12 0.14 1" mass="0.3"
            class="object"/>
      <geom type="cylinder" pos="0 0 0.115" size="0.018 0.025" rgba="0.12 0.12 0.14 1" mass="0.1"/>
      <camera name="wrist" pos="0.06 0 0.10" xyaxes="0 1 0 -0.9 0 0.35" fovy="70"/>
      <site name="tip" pos="0 0 0" size="0.001" rgba="0 0 0 0"/>
      {_finger("left_finger", -1)}{_finger("right_finger", 1)}
    </body>
    {"".join(map(_object, OBJECTS.values()))}
    {"".join(map(_plate, PLATES.values()))}
  </worldbody>
  <equality><joint joint1="left_finger" joint2="right_finger" polycoef="0 1 0 0 0" solref="0.01 1"/></equality>
  <contact><exclude body1="left_finger" body2="right_finger"/></contact>
  <actuator>
    {motors}
    <position name="gripper" joint="right_finger" kp="400" kv="14" forcerange="-14 14" ctrlrange="0 {FINGER_OPEN}"/>
  </actuator>
</mujoco>"""
