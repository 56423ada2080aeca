"""Positions and sizes of objects, from the simulator's model, as points on their collision surfaces."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

SPACING = 0.02
"""Distance between points on boxes, m."""

_BOX, _CYLINDER, _CAPSULE, _MESH = 6, 5, 3, 7
_AROUND = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)


class Geometry:
    """The scene of one reset of `Libero`.

    Args:
        simulator: LIBERO's own environment, after its reset.
    """

    def __init__(self, simulator: Any) -> None:
        self.domain = simulator.env
        self.model, self.data = self.domain.sim.model._model, self.domain.sim.data._data
        self._local: dict[int, Points] = {}

    def position(self, name: str) -> Points:
        """The origin of an object, a fixture, or a region [3], m."""
        if name in self.domain.obj_body_id:
            return self.data.xpos[self.domain.obj_body_id[name]].copy()
        return self.data.site_xpos[self.domain.sim.model.site_name2id(name)].copy()

    def points(self, name: str) -> Points:
        """Points on the collision surfaces of an object or fixture [N, 3], m."""
        geoms = self._geoms(self.domain.obj_body_id[name])
        return self.surface(geoms) if geoms else self.position(name)[None]

    def joint(self, name: str) -> int | None:
        """The joint by which a fixture, or a region of one, moves relative to the world; None if it does not move."""
        if name in self.domain.obj_body_id:
            joints = [j for j in self.domain.get_object(name).joints if "free" not in j]
            return self.domain.sim.model.joint_name2id(joints[0]) if joints else None
        body = int(self.model.site_bodyid[self.domain.sim.model.site_name2id(name)])
        while body and not self.model.body_jntnum[body]:
            body = int(self.model.body_parentid[body])
        return int(self.model.body_jntadr[body]) if body else None

    def moved_by(self, joint: int) -> Points:
        """Points of the bodies that a joint moves [N, 3], m."""
        return self.surface(self._geoms(int(self.model.jnt_bodyid[joint])))

    def angle(self, joint: int) -> float:
        """Position of a joint, rad or m."""
        return float(self.data.qpos[self.model.jnt_qposadr[joint]])

    def half_height(self, site: str) -> float:
        """Half the height of a region, m."""
        matrix = self.data.site_xmat[self.domain.sim.model.site_name2id(site)].reshape(3, 3)
        return float(np.abs(matrix @ np.asarray(self.domain.object_sites_dict[site].size))[2])

    def surface(self, geoms: Iterable[int]) -> Points:
        """Points of the geoms [N, 3], m."""
        return np.concatenate(
            [
                self._points(geom) @ self.data.geom_xmat[geom].reshape(3, 3).T + self.data.geom_xpos[geom]
                for geom in geoms
            ]
        )

    def _geoms(self, root: int) -> list[int]:
        """Collision geoms of a body and of all its descendants."""
        bodies = {root}
        for body in range(root + 1, self.model.nbody):  # parents come before children
            if self.model.body_parentid[body] in bodies:
                bodies.add(body)
        geoms = range(self.model.ngeom)
        return [g for g in geoms if self.model.geom_bodyid[g] in bodies and self._touches(g)]

    def _touches(self, geom: int) -> bool:
        return bool(self.model.geom_contype[geom] or self.model.geom_conaffinity[geom])

    def _points(self, geom: int) -> Points:
        if geom not in self._local:
            self._local[geom] = self._measure(geom)
        return self._local[geom]

    def _measure(self, geom: int) -> Points:
        kind, size = self.model.geom_type[geom], self.model.geom_size[geom]
        if kind == _MESH:
            mesh = self.model.geom_dataid[geom]
            first = self.model.mesh_vertadr[mesh]
            return self.model.mesh_vert[first : first + self.model.mesh_vertnum[mesh]].astype(np.float64)
        if kind in (_CYLINDER, _CAPSULE):
            circle = np.stack([np.cos(_AROUND), np.sin(_AROUND)], 1) * size[0]
            ends = (-1, 1) if kind == _CYLINDER else (-1, 0, 1)
            return np.concatenate([np.c_[circle, np.full(len(circle), end * size[1])] for end in ends])
        if kind == _BOX:
            grid = [np.linspace(-1, 1, max(2, int(np.ceil(2 * half / SPACING)) + 1)) for half in size]
            return np.stack(np.meshgrid(*grid), -1).reshape(-1, 3) * size
        return _CORNERS * size[0]  # a sphere
