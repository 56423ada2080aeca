"""Offscreen rendering of a MuJoCo world, with any OpenGL that this machine has."""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np


def _import_mujoco() -> ModuleType:
    # MuJoCo 3.3 loads the renderer in MUJOCO_GL during its import; if that is missing, it fails with an
    # AttributeError in PyOpenGL. `make_context` loads the renderer instead, and says what to install.
    chosen = os.environ.pop("MUJOCO_GL", None)
    try:
        return import_module("mujoco")
    finally:
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen


mujoco = _import_mujoco()

_BACKENDS = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa", "glfw": "mujoco.glfw", "cgl": "mujoco.cgl"}


def _candidates() -> list[str]:
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen in _BACKENDS:
        return [chosen]
    if chosen:
        raise RuntimeError(
            f"MUJOCO_GL is {chosen!r}; it can be egl, osmesa, glfw or, on macOS, cgl. Unset it to let us choose."
        )
    return ["cgl", "glfw"] if sys.platform == "darwin" else ["egl", "osmesa"]


def _forget_pyopengl() -> None:
    # PyOpenGL binds itself to one platform at import; after a failed attempt it must be imported again.
    os.environ.pop("PYOPENGL_PLATFORM", None)
    for name in [n for n in sys.modules if n == "OpenGL" or n.startswith(("OpenGL.", "mujoco.egl", "mujoco.osmesa"))]:
        del sys.modules[name]


def make_context(width: int, height: int) -> Any:
    """Return a current OpenGL context: on Linux EGL, else OSMesa, or the one that MUJOCO_GL names.

    Raises:
        RuntimeError: no renderer works; the message names the packages to install.
    """
    reasons = []
    for backend in _candidates():
        try:
            module: ModuleType = import_module(_BACKENDS[backend])
            context = module.GLContext(width, height)
            context.make_current()
        except Exception as error:  # a missing library causes one of many exceptions
            reasons.append(f"{backend}: {error or type(error).__name__}")
            _forget_pyopengl()
        else:
            return context
    raise RuntimeError(
        "MuJoCo cannot draw pictures on this machine: install a software renderer, on Debian or Ubuntu with "
        "`apt-get install libegl1 libgl1-mesa-dri` or `apt-get install libosmesa6` "
        f"({'; '.join(' '.join(reason.split()) for reason in reasons)})"
    )


class Renderer:
    """Draws square pictures of one model.

    Costly effects (shadows, reflections, sky, haze, multisampling) are off. Pictures are rendered at twice the size and
    averaged, so that even a small picture shows positions to a fraction of a pixel.

    Args:
        model: `mujoco.MjModel`.
        size: side of the pictures in pixels.
    """

    def __init__(self, model: Any, size: int) -> None:
        drawn = 2 * size  # each pixel is the mean of four
        self._context = make_context(drawn, drawn)
        self._model = model
        self._options = mujoco.MjvOption()
        self._scene = mujoco.MjvScene(model, maxgeom=100)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION,
                     mujoco.mjtRndFlag.mjRND_SKYBOX, mujoco.mjtRndFlag.mjRND_HAZE):  # fmt: skip
            self._scene.flags[flag] = False
        self._gpu = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gpu)
        self._area = mujoco.MjrRect(0, 0, drawn, drawn)
        self._pixels = np.empty((drawn, drawn, 3), np.uint8)

    def render(self, data: Any, camera: str) -> np.ndarray:
        """Return a camera's picture of a `mujoco.MjData`: uint8 [size, size, 3], RGB."""
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = self._model.camera(camera).id
        self._context.make_current()
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )  # fmt: skip
        mujoco.mjr_render(self._area, self._scene, self._gpu)
        mujoco.mjr_readPixels(self._pixels, None, self._area, self._gpu)
        pixels = self._pixels[::-1].astype(np.uint16)
        rows = pixels[::2] + pixels[1::2]  # whole arrays: ten times as fast as `sum` over an axis of two
        return ((rows[:, ::2] + rows[:, 1::2]) // 4).astype(np.uint8)

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._context is not None:
            self._gpu.free()
            self._context.free()
            self._context = None
