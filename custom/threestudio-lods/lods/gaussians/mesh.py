"""Triangles with colours at their vertices."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Mesh:
    """``vertices`` (V, 3) in world units, ``faces`` (F, 3) of their indices, counterclockwise seen
    from outside, and shown colours ``rgb`` (V, 3) in 0..1, once they are known."""

    vertices: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]
    rgb: Float[Tensor, "V 3"] | None = None

    def normals(self) -> Float[Tensor, "V 3"]:
        """Unit vectors outward: the mean of the faces' normals, weighted by area; (0, 0, 1) where
        that is zero."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        faces = torch.linalg.cross(b - a, c - a)
        total = torch.zeros_like(self.vertices)
        for i in range(3):
            total.index_add_(0, self.faces[:, i], faces)
        up = total.new_tensor([0.0, 0.0, 1.0])
        known = (total * total).sum(-1, keepdim=True) > 1e-24
        return F.normalize(torch.where(known, total, up), dim=-1)

    def without_crumbs(self, share: float) -> "Mesh":
        """The mesh without its connected parts of less than ``share`` times the faces of the
        largest. Vertices keep their order; ``self`` where nothing is to be left out."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        faces, size = self.faces.cpu().numpy(), len(self.vertices)
        edges = (np.ones(faces.size), (faces.ravel(), np.roll(faces, -1, axis=1).ravel()))
        _, part = connected_components(coo_matrix(edges, (size, size)))
        part = part[faces[:, 0]]
        counts = np.bincount(part)
        kept = counts[part] >= share * counts.max()
        if kept.all():
            return self
        faces = self.faces[torch.from_numpy(kept).to(self.faces.device)]
        used, faces = torch.unique(faces, return_inverse=True)
        return Mesh(self.vertices[used], faces, None if self.rgb is None else self.rgb[used])

    def write(self, path) -> None:
        """A glb file, turned so that y points up, as glTF wants it, and +x faces +z. Raises
        ``ValueError`` for another ending, and for a mesh without colours."""
        from lods.gaussians.mesh_file import write_mesh

        if Path(path).suffix.lower() != ".glb":
            raise ValueError(f"'{path}': a mesh is written as glb, so end the name in .glb")
        if self.rgb is None:
            raise ValueError("the mesh has no colours: set its rgb")
        turned = (x[:, [1, 2, 0]] for x in (self.vertices, self.normals()))
        vertices, normals = turned
        write_mesh(path, vertices, self.faces, self.rgb, normals)
