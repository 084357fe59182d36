"""A mesh that a density is to fill roughly (Latent-NeRF's sketch shapes, arXiv:2211.07600)."""

import math
from pathlib import Path

import numpy as np
import torch

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

PAIRS = 2**21  # of a point and a triangle, at a time
# y up and the front on +z, as in most .obj files, to z up and the front on +x
TO_Z_UP = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def ce_pq_loss(p: Tensor, q: Tensor, weight: Optional[Tensor] = None) -> Float[Tensor, ""]:
    """Sum of the cross entropies of Bernoulli(p) and Bernoulli(q), q clamped to 0.01..0.99,
    optionally weighted."""
    q = q.clamp(0.01, 0.99)
    entropy = -(p.view_as(q) * torch.log(q) + (1 - p.view_as(q)) * torch.log(1 - q))
    return (entropy if weight is None else entropy * weight).sum()


class MeshOBJ:
    """Vertices `v` (V, 3) and triangles `f` (F, 3), arrays, and how points lie to them."""

    def __init__(self, v, f) -> None:
        self.v = np.ascontiguousarray(v, dtype=np.float64)
        self.f = np.ascontiguousarray(f, dtype=np.int64)

    def normalize_mesh(self, target_scale: float = 0.5) -> "MeshOBJ":
        """The mean of the vertices in the origin, the farthest of them `target_scale` away."""
        v = self.v - self.v.mean(0)
        return MeshOBJ(v / np.linalg.norm(v, axis=1).max() * target_scale, self.f)

    def winding_number(self, query: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N"]:
        """How often the surface goes around each point: 1 inside of a closed mesh, 0 outside, and
        in between where it has holes (Jacobson et al. 2013, from the solid angles of its triangles
        by Van Oosterom and Strackee 1983)."""

        def angles(points: Float[Tensor, "N 3"], corners: Float[Tensor, "F 3 3"]):
            a, b, c = (corners[None] - points[:, None, None]).unbind(2)
            la, lb, lc = (x.norm(dim=-1) for x in (a, b, c))
            volume = (a * torch.linalg.cross(b, c)).sum(-1)
            base = la * lb * lc
            base = base + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
            return torch.atan2(volume, base).sum(1) / (2 * math.pi)

        return self._of_points(query, angles)

    def gaussian_weighted_distance(
        self, query: Float[Tensor, "*N 3"], sigma: float
    ) -> Float[Tensor, "*N"]:
        """exp(-d^2 / (2 sigma^2)), d the distance to the surface: 1 on it."""
        squared = self._of_points(query, _squared_distances)
        return torch.exp(-squared / (2 * sigma**2))

    def _of_points(self, query: Float[Tensor, "*N 3"], function: Callable) -> Float[Tensor, "*N"]:
        points = query.detach().reshape(-1, 3)
        corners = torch.from_numpy(self.v[self.f]).to(points)
        found = [function(part, corners) for part in points.split(max(PAIRS // len(self.f), 1))]
        return torch.cat([points.new_zeros(0), *found]).reshape(query.shape[:-1])


def _squared_distances(points: Float[Tensor, "N 3"], corners: Float[Tensor, "F 3 3"]):
    """To the nearest point of any triangle: on an edge, or straight below in the plane."""
    squared = []
    for i in range(3):
        start, along = corners[:, i], corners[:, (i + 1) % 3] - corners[:, i]
        to = points[:, None] - start
        part = (to * along).sum(-1) / along.square().sum(-1).clamp(min=1e-20)
        squared.append((to - part.clamp(0, 1)[..., None] * along).square().sum(-1))
    u, v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = torch.linalg.cross(u, v)
    size = normal.square().sum(-1).clamp(min=1e-20)
    to = points[:, None] - corners[:, 0]
    s = (torch.linalg.cross(to, v.expand_as(to)) * normal).sum(-1) / size
    t = (torch.linalg.cross(u.expand_as(to), to) * normal).sum(-1) / size
    plane = (to * normal).sum(-1).square() / size
    above = (s >= 0) & (t >= 0) & (s + t <= 1)
    squared.append(torch.where(above, plane, torch.inf))
    return torch.stack(squared).amin(0).amin(-1)


class ShapeLoss(torch.nn.Module):
    """Cross entropy between the density and the inside of a mesh:

        sum over points of (1 - exp(-d^2 / (2 p^2))) CE(1 - exp(-delta sigma), inside)

    so that the surface itself stays free; p is ``proximal_surface``, sigma the density at a point,
    d its distance to the mesh, inside whether the winding number is above 1/2. `guide_shape` is the
    path of a mesh (.obj and what else trimesh reads), y up, which is turned to z up and scaled into
    the ball of ``mesh_scale``.
    """

    mesh_scale, proximal_surface, delta = 0.7, 0.3, 0.2

    def __init__(self, guide_shape: str) -> None:
        super().__init__()
        self.shape_path = guide_shape
        mesh = _read(guide_shape).normalize_mesh(self.mesh_scale)
        self.sketchshape = MeshOBJ(mesh.v @ TO_Z_UP.T, mesh.f)

    def forward(
        self, xyzs: Float[Tensor, "N 3"], sigmas: Float[Tensor, "N 1"]
    ) -> Float[Tensor, ""]:
        inside = (self.sketchshape.winding_number(xyzs) > 0.5).to(sigmas)
        weight = 1 - self.sketchshape.gaussian_weighted_distance(xyzs, self.proximal_surface)
        occupancy = (1 - torch.exp(-self.delta * sigmas.view(-1))).clamp(0, 1.1)
        return ce_pq_loss(occupancy, inside, weight)


def _read(path: str) -> MeshOBJ:
    import trimesh

    kind = Path(path).suffix.lstrip(".").lower()
    try:
        with open(path, "rb") as file:  # without its name, so that nothing beside it is opened
            mesh = trimesh.load(file, file_type=kind, force="mesh", skip_materials=True)
        if len(mesh.faces) == 0:
            raise ValueError("it has no triangles")
    except OSError as error:
        raise UserError(f"the guide shape {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # of many kinds, by format
        detail = " ".join(str(error).split())[:160]
        raise UserError(f"the guide shape {path} is no mesh that can be read: {detail}") from None
    return MeshOBJ(mesh.vertices, mesh.faces)
