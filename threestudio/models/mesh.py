"""Triangle meshes with what is derived from them, computed when first read."""

import numpy as np
import torch
import torch.nn.functional as F

import threestudio
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.ops import dot
from threestudio.utils.typing import *


class Mesh:
    """Vertices ``v_pos`` (Nv, 3) and triangles ``t_pos_idx`` (Nf, 3), counter-clockwise seen from
    outside, on any device. Texture coordinates have vertices of their own (``v_tex`` (Nt, 2),
    ``t_tex_idx`` (Nf, 3)), as seams need; their v points down the image. ``extras`` holds anything
    else by name. Derived values are kept: make a new mesh when the vertices change.
    """

    def __init__(
        self, v_pos: Float[Tensor, "Nv 3"], t_pos_idx: Integer[Tensor, "Nf 3"], **kwargs
    ) -> None:
        self.v_pos = v_pos
        self.t_pos_idx = t_pos_idx
        self._v_nrm: Optional[Float[Tensor, "Nv 3"]] = None
        self._v_tng: Optional[Float[Tensor, "Nv 3"]] = None
        self._v_tex: Optional[Float[Tensor, "Nt 2"]] = None
        self._t_tex_idx: Optional[Integer[Tensor, "Nf 3"]] = None
        self._v_rgb: Optional[Float[Tensor, "Nv 3"]] = None
        self._edges: Optional[Integer[Tensor, "Ne 2"]] = None
        self.extras: Dict[str, Any] = {}
        for name, value in kwargs.items():
            self.add_extra(name, value)

    def add_extra(self, name: str, value: Any) -> None:
        self.extras[name] = value

    @property
    def requires_grad(self) -> bool:
        return self.v_pos.requires_grad

    # -- parts -----------------------------------------------------------------------------------

    def remove_outlier(self, outlier_n_faces_threshold: Union[int, float]) -> "Mesh":
        """The mesh without its small connected parts: those with fewer faces than the threshold,
        an int, or than that fraction of the faces of the largest part, a float.

        Vertices keep their order, ``extras`` and vertex colours are passed on, texture coordinates
        are not. A mesh that gradients flow through is returned as it is. Raises UserError if no
        part is large enough.
        """
        if self.requires_grad:
            threestudio.debug("The mesh is differentiable: outliers are not removed")
            return self
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        faces = self.t_pos_idx.cpu().numpy()
        starts, ends = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
        shape = (len(self.v_pos), len(self.v_pos))
        _, part = connected_components(coo_matrix((np.ones(len(starts)), (starts, ends)), shape))
        part = part[faces[:, 0]]
        sizes = np.bincount(part)
        threshold = outlier_n_faces_threshold
        if isinstance(threshold, float):
            threshold = threshold * sizes.max()
        kept = sizes[part] >= threshold
        if not kept.any():
            raise UserError(
                f"isosurface_outlier_n_faces_threshold={outlier_n_faces_threshold} removes all of "
                f"the mesh, whose largest part has {sizes.max()} faces: lower it"
            )
        if kept.all():
            return self
        faces = self.t_pos_idx[torch.from_numpy(kept).to(self.t_pos_idx.device)]
        vertices, faces_of_kept = torch.unique(faces, return_inverse=True)
        mesh = Mesh(self.v_pos[vertices], faces_of_kept, **self.extras)
        if self._v_rgb is not None:
            mesh.set_vertex_color(self._v_rgb[vertices])
        return mesh

    def simplified(self, most: int) -> "Mesh":
        """The mesh with about ``most`` triangles or fewer, by the quadric error metric of
        ``fast_simplification``, without colours and texture coordinates, and with the normals of
        this one at its nearest vertices; itself where it has no more, or where ``most`` is 0."""
        if not 0 < most < len(self.t_pos_idx):
            return self
        import fast_simplification
        from scipy.spatial import cKDTree

        arrays = self.v_pos.detach().cpu().float().numpy(), self.t_pos_idx.cpu().numpy()
        points, faces = fast_simplification.simplify(*arrays, target_count=most)[:2]
        # corners that fell together leave triangles without an area, and vertices without a normal
        a, b, c = points[faces].astype(np.float64).transpose(1, 0, 2)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
        solid = area > 1e-9 * np.ptp(points, axis=0).max() ** 2
        used, faces = np.unique(faces[solid], return_inverse=True)
        positions = torch.from_numpy(points[used]).to(self.v_pos)
        mesh = Mesh(positions, torch.from_numpy(faces.reshape(-1, 3)).to(self.t_pos_idx))
        _, nearest = cKDTree(arrays[0]).query(points[used])
        mesh._v_nrm = self.v_nrm[torch.from_numpy(nearest).to(self.v_nrm.device)]
        return mesh

    # -- normals and tangents --------------------------------------------------------------------

    def _corners(self, values: Tensor, indices: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        return tuple(values[indices[:, i].long()] for i in range(3))

    def _sum_at_vertices(self, per_face: Float[Tensor, "Nf 3"]) -> Float[Tensor, "Nv 3"]:
        total = torch.zeros_like(self.v_pos)
        for i in range(3):
            total = total.index_add(0, self.t_pos_idx[:, i].long(), per_face)
        return total

    @property
    def v_nrm(self) -> Float[Tensor, "Nv 3"]:
        """Unit vertex normals: the mean of the faces' normals, weighted by area. (0, 0, 1) where
        that is zero."""
        if self._v_nrm is None:
            a, b, c = self._corners(self.v_pos, self.t_pos_idx)
            total = self._sum_at_vertices(torch.linalg.cross(b - a, c - a))
            up = total.new_tensor([0.0, 0.0, 1.0])
            total = torch.where(dot(total, total) > 1e-24, total, up)
            self._v_nrm = F.normalize(total, dim=-1)
        return self._v_nrm

    @property
    def v_tng(self) -> Float[Tensor, "Nv 3"]:
        """Unit vertex tangents along u, orthogonal to the normals. Per face, with edges e1, e2 and
        their texture differences (u1, v1), (u2, v2): T = (v2 e1 - v1 e2) / (u1 v2 - u2 v1)
        (E. Lengyel, Mathematics for 3D Game Programming and Computer Graphics, section 7.8)."""
        if self._v_tng is None:
            a, b, c = self._corners(self.v_pos, self.t_pos_idx)
            ta, tb, tc = self._corners(self.v_tex, self.t_tex_idx)
            (u1, v1), (u2, v2) = (tb - ta).split(1, dim=-1), (tc - ta).split(1, dim=-1)
            area = u1 * v2 - u2 * v1
            tangent = ((b - a) * v2 - (c - a) * v1) * area.sign()
            tangent = self._sum_at_vertices(F.normalize(tangent, dim=-1, eps=1e-20))
            tangent = tangent - dot(tangent, self.v_nrm) * self.v_nrm
            self._v_tng = F.normalize(tangent, dim=-1)
        return self._v_tng

    # -- texture coordinates and colours ---------------------------------------------------------

    @property
    def v_tex(self) -> Float[Tensor, "Nt 2"]:
        if self._v_tex is None:
            self.unwrap_uv()
        return self._v_tex

    @property
    def t_tex_idx(self) -> Integer[Tensor, "Nf 3"]:
        if self._t_tex_idx is None:
            self.unwrap_uv()
        return self._t_tex_idx

    def unwrap_uv(
        self,
        xatlas_chart_options: Optional[dict] = None,
        xatlas_pack_options: Optional[dict] = None,
    ) -> None:
        """Set ``v_tex`` and ``t_tex_idx`` to an atlas of charts in [0, 1]^2 that do not overlap,
        by xatlas, whose ``ChartOptions`` and ``PackOptions`` are given by name. Raises UserError
        for an option that xatlas does not have."""
        import xatlas

        chart = _with_options(xatlas.ChartOptions(), xatlas_chart_options, "xatlas_chart_options")
        pack = _with_options(xatlas.PackOptions(), xatlas_pack_options, "xatlas_pack_options")
        atlas = xatlas.Atlas()
        atlas.add_mesh(
            self.v_pos.detach().cpu().float().numpy(), self.t_pos_idx.cpu().numpy().astype("uint32")
        )
        threestudio.info(f"Unwrapping {len(self.t_pos_idx)} triangles with xatlas ...")
        atlas.generate(chart_options=chart, pack_options=pack)
        if atlas.atlas_count > 1:
            raise UserError(
                f"the charts fill {atlas.atlas_count} images: lower texels_per_unit in "
                "xatlas_pack_options, or leave it out"
            )
        _, indices, uvs = atlas.get_mesh(0)  # the triangles in our order
        device = self.v_pos.device
        self._v_tex = torch.from_numpy(np.asarray(uvs)).to(device, self.v_pos.dtype)
        indices = np.asarray(indices).astype(np.int64).reshape(-1, 3)
        self._t_tex_idx = torch.from_numpy(indices).to(device)
        self._v_tng = None

    @property
    def v_rgb(self) -> Optional[Float[Tensor, "Nv 3"]]:
        """Vertex colours, 0..1; None until they are set."""
        return self._v_rgb

    def set_vertex_color(self, v_rgb: Float[Tensor, "Nv 3"]) -> None:
        if v_rgb.shape != self.v_pos.shape:
            raise ValueError(
                f"vertex colours must be {tuple(self.v_pos.shape)}, not {tuple(v_rgb.shape)}"
            )
        self._v_rgb = v_rgb

    # -- regularisers ----------------------------------------------------------------------------

    @property
    def edges(self) -> Integer[Tensor, "Ne 2"]:
        """Each edge once, the smaller index first."""
        if self._edges is None:
            pairs = torch.cat([self.t_pos_idx[:, [i, (i + 1) % 3]] for i in range(3)])
            self._edges = torch.unique(pairs.sort(dim=1).values, dim=0)
        return self._edges

    def normal_consistency(self) -> Float[Tensor, ""]:
        """Mean of 1 - cos(angle between the vertex normals at the ends of an edge)."""
        a, b = self.v_nrm[self.edges.long()].unbind(dim=1)
        return (1 - F.cosine_similarity(a, b, dim=-1)).mean()

    def laplacian(self) -> Float[Tensor, ""]:
        """Mean over the vertices of |sum over neighbours j of (v_i - v_j)|, the norm of the uniform
        (combinatorial) Laplacian D - A."""
        a, b = self.edges.long().unbind(dim=1)
        along = self.v_pos[a] - self.v_pos[b]
        total = torch.zeros_like(self.v_pos).index_add(0, a, along).index_add(0, b, -along)
        return total.norm(dim=-1).mean()


def _with_options(target: Any, options: Optional[dict], where: str) -> Any:
    known = [n for n in dir(target) if not n.startswith("_")]
    for name, value in (options or {}).items():
        if name not in known:
            hint = nearest(name, known) or f"; it has {', '.join(known)}"
            raise UserError(f"xatlas has no option {name!r} ({where}){hint}")
        try:
            setattr(target, name, value)
        except TypeError:
            raise UserError(
                f"{where}.{name}={value!r} is not of the type of its default, "
                f"{getattr(target, name)!r}"
            ) from None
    return target
