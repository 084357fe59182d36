"""Where the Gaussians start: a ball, a file, or an object that Shap-E makes from the prompt.

Every source gives a coloured point cloud, from which :func:`from_points` makes Gaussians; only a
ply file that already holds Gaussians is taken as it is. All randomness comes from the seed in the
configuration, never from the global generators, so that the choice of a source does not change
the cameras or the noise of the run.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from scipy.spatial import cKDTree

import threestudio
from threestudio.utils.config import parse_structured
from threestudio.utils.typing import *

from .mesh_file import read_mesh
from .neighbours import neighbour_scale
from .ply import read_ply

INIT_TYPES = ("ball", "file", "shap-e", "none")
SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))
AXES = {
    sign + axis: (1.0 if sign == "+" else -1.0) * np.eye(3)[i]
    for i, axis in enumerate("xyz")
    for sign in "+-"
}


@dataclass
class Points:
    """A coloured point cloud: ``xyz`` (N, 3) in world units, ``rgb`` (N, 3) in 0..1."""

    xyz: np.ndarray
    rgb: np.ndarray


def axes_rotation(front: str, up: str) -> np.ndarray:
    """The rotation (3, 3) that turns ``front`` to +x (azimuth 0, where the cameras see the front)
    and ``up`` to +z. Both are '+x', '-x', '+y', '-y', '+z' or '-z'.

    Its rows are front, up x front and up, hence R @ front = e_x and R @ up = e_z.
    """
    for name, value in (("front", front), ("up", up)):
        if value not in AXES:
            raise ValueError(f"{name}='{value}' is not an axis: use one of {', '.join(AXES)}")
    f, u = AXES[front], AXES[up]
    if abs(f @ u) > 0.5:
        raise ValueError(f"front='{front}' and up='{up}' are the same axis")
    return np.stack([f, np.cross(u, f), u])


def from_points(
    points: Points,
    opacity: float,
    scale: float,
    sh_degree: int,
    device: Any = "cpu",
    knn_backend: str = "auto",
) -> Dict[str, Tensor]:
    """Round Gaussians on a point cloud.

    Returns ``means`` (N, 3), ``scales`` (N, 3) = log(scale * rms distance to 3 neighbours),
    ``quats`` (N, 4) = identity, wxyz, ``opacities`` (N,) = logit(opacity), ``sh0`` (N, 1, 3) =
    (rgb - 1/2) / SH_C0 and, for ``sh_degree`` > 0, ``shN`` (N, (sh_degree+1)^2 - 1, 3) = 0, all on
    the CPU. ``device`` and ``knn_backend``: where and how :func:`neighbour_scale` is computed.
    """
    if not 0.0 < opacity < 1.0:
        raise ValueError(f"init_opacity={opacity} must lie strictly between 0 and 1")
    if not scale > 0.0:
        raise ValueError(f"init_scale={scale} must be positive")
    n = len(points.xyz)
    if not (np.abs(points.xyz) <= np.finfo(np.float32).max).all():
        raise ValueError("the initial points are not finite in float32")
    size = neighbour_scale(points.xyz, torch.device(device), knn_backend)
    size = torch.from_numpy(size * scale).float()
    params = {
        "means": torch.from_numpy(points.xyz).float(),
        "scales": size.log()[:, None].repeat(1, 3),
        "quats": torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1),
        "opacities": torch.logit(torch.full((n,), float(opacity))),
        "sh0": (torch.from_numpy(points.rgb).float()[:, None] - 0.5) / SH_C0,
    }
    if sh_degree > 0:
        params["shN"] = torch.zeros(n, (sh_degree + 1) ** 2 - 1, 3)
    if not all(value.isfinite().all() for value in params.values()):
        raise ValueError("the initial points are too far from each other for float32")
    return params


@dataclass
class BallInit:
    """Uniformly filled ball of random colours."""

    n_points: Annotated[int, "[4, 1e8]"] = 4096
    radius: Annotated[float, "(0, 1e6]"] = 0.6  # world units

    def points(self, rng: np.random.Generator) -> Points:
        if self.n_points < 4 or not self.radius > 0:
            raise ValueError(
                f"ball.n_points={self.n_points} must be at least 4 and "
                f"ball.radius={self.radius} positive"
            )
        direction = rng.normal(size=(self.n_points, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        # the volume inside r grows with r^3, so r ~ U^(1/3)
        r = self.radius * rng.random((self.n_points, 1)) ** (1 / 3)
        return Points(direction * r, rng.random((self.n_points, 3)))


@dataclass
class FileInit:
    """A mesh (obj, ply, glb, gltf, off or stl), a coloured point cloud, or a 3DGS ply."""

    path: str = ""
    n_points: Annotated[int, "[4, 1e8]"] = 20000  # points drawn on the surface of a mesh
    # above 0: centre the file and scale it to this bounding radius
    radius: Annotated[float, "[0, 1e6]"] = 0.0
    # the file's axes that shall face azimuth 0, and point up
    front: Annotated[str, tuple(AXES)] = "+x"
    up: Annotated[str, tuple(AXES)] = "+z"

    def load(self, rng: np.random.Generator) -> Union[Points, Dict[str, Tensor]]:
        """The points, or the Gaussians of a 3DGS ply."""
        if not self.path:
            raise ValueError("init_type=file needs system.geometry.file.path=<mesh or ply>")
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"system.geometry.file.path: no file '{path}'")
        content = read_ply(path) if path.suffix.lower() == ".ply" else None
        if content is not None and "means" in content:
            if self.radius or (self.front, self.up) != ("+x", "+z"):
                raise ValueError(
                    f"'{path}' holds Gaussians, which are taken as they are: remove "
                    "system.geometry.file.radius, front and up"
                )
            return content
        if content is not None and "faces" not in content:
            points = Points(content["xyz"], content["rgb"])
        else:
            points = sample_mesh(path, self.n_points, rng)
        xyz = points.xyz @ axes_rotation(self.front, self.up).T
        if self.radius > 0:
            xyz = xyz - (xyz.min(0) + xyz.max(0)) / 2
            extent = np.linalg.norm(xyz, axis=1).max()
            if extent == 0:
                raise ValueError(f"'{path}': all points are the same, nothing to scale")
            xyz = xyz * (self.radius / extent)
        return Points(xyz, points.rgb)


def one_color(material) -> Float[np.ndarray, "4"]:
    """The colour 0..255 of a material without a picture. glTF's ``baseColorFactor`` is linear, and
    white if it is not there (its specification, 3.9.2); colours of other formats are as shown."""
    if not hasattr(material, "baseColorFactor"):
        return np.asarray(material.main_color)
    factor = material.baseColorFactor
    linear = np.ones(4) if factor is None else np.asarray(factor, float) / 255
    curve = 1.055 * linear ** (1 / 2.4) - 0.055
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, curve)


def colors_of(mesh, path: Path) -> Float[np.ndarray, "V 3"]:
    """Colours 0..1 of a mesh's vertices: its own, its texture's, or its material's one colour; mid
    grey without any, and, with a warning, where they cannot be read."""
    grey = np.full((len(mesh.vertices), 3), 0.5)
    if not mesh.visual.defined:
        return grey
    try:
        if mesh.visual.kind != "texture":
            colors = mesh.visual.vertex_colors
        else:
            material = mesh.visual.material
            images = (getattr(material, name, None) for name in ("image", "baseColorTexture"))
            pictured = mesh.visual.uv is not None and any(image is not None for image in images)
            colors = mesh.visual.to_color().vertex_colors if pictured else one_color(material)
        colors = np.atleast_2d(np.asarray(colors, dtype=np.float64))[:, :3] / 255.0
        return np.broadcast_to(colors, grey.shape).copy()
    except Exception as error:  # of many kinds: a material has what its file says
        threestudio.warn(f"the colours of '{path}' cannot be read ({error}): it is grey")
        return grey


def sample_mesh(path: Path, n_points: int, rng: np.random.Generator) -> Points:
    """``n_points`` uniform on the surface of a mesh, with its interpolated vertex colours (mid
    grey if it has none)."""
    import trimesh

    mesh = read_mesh(path)
    if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0 or mesh.area == 0:
        raise ValueError(f"'{path}' holds no triangles")
    if not np.isfinite(mesh.vertices).all() or not np.isfinite(mesh.area):
        raise ValueError(f"'{path}' has vertices that are not finite, or too far away")
    if n_points < 4:
        raise ValueError(f"system.geometry.file.n_points={n_points} must be at least 4")
    vertex_rgb = colors_of(mesh, path)
    faces = mesh.faces[rng.choice(len(mesh.faces), n_points, p=mesh.area_faces / mesh.area)]
    # uniform barycentric coordinates: fold the unit square onto the triangle
    ab = rng.random((n_points, 2))
    ab = np.where(ab.sum(1, keepdims=True) > 1, 1 - ab, ab)
    weights = np.concatenate([1 - ab.sum(1, keepdims=True), ab], axis=1)[..., None]
    return Points((mesh.vertices[faces] * weights).sum(1), (vertex_rgb[faces] * weights).sum(1))


def refuse_foreign_parts(index: Dict[str, Any]) -> None:
    """Raise ValueError if a ``model_index.json`` names a pipeline or parts of its own, which
    diffusers may import, from the folder or from wherever Python finds the name."""
    if index.get("_class_name") != "ShapEPipeline":
        raise ValueError(f"model_index.json names the pipeline {index.get('_class_name')!r}")
    for part, value in index.items():
        library = value[0] if isinstance(value, (list, tuple)) and value else "diffusers"
        if library not in ("diffusers", "transformers", "shap_e"):
            raise ValueError(f"model_index.json takes {part} from {library!r}")


def refuse_out_of_reach(name: str) -> None:
    """Raise ConnectionError at once for a hub id that can be had from nowhere: diffusers would try
    for half a minute."""
    from ..guidance.cards import out_of_reach

    why = out_of_reach(name) if name.count("/") == 1 and not Path(name).is_dir() else ""
    if why:
        raise ConnectionError(why)


@contextlib.contextmanager
def data_only():
    """Within this, ``torch.load`` reads tensors and never runs code, whoever calls it and whatever
    their default (that of diffusers 0.19 does not protect)."""
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": True})
    try:
        yield
    finally:
        torch.load = load


def grow_points(
    points: Points, n_candidates: int, distance: float, color_noise: float, rng: np.random.Generator
) -> Points:
    """Thicken a cloud as GaussianDreamer (arXiv:2310.08529) does.

    Of ``n_candidates`` uniform points in the bounding box those nearer than ``distance`` to a
    point are kept, with the nearest point's colour plus uniform noise in [0, ``color_noise``) per
    channel, clipped to 1. They come before the original points.
    """
    lo, hi = points.xyz.min(0), points.xyz.max(0)
    candidates = rng.uniform(lo, hi, (n_candidates, 3))
    # cKDTree returns infinite distances and an index out of range beyond the bound
    found, nearest = cKDTree(points.xyz).query(candidates, distance_upper_bound=distance)
    near = found < distance
    rgb = points.rgb[nearest[near]] + rng.uniform(0, color_noise, (int(near.sum()), 3))
    return Points(
        np.concatenate([candidates[near], points.xyz]),
        np.concatenate([rgb.clip(0, 1), points.rgb]),
    )


@dataclass
class ShapEInit:
    """The surface of the object that Shap-E (arXiv:2305.02463) makes from the prompt."""

    prompt: str = ""
    pretrained_model_name_or_path: str = "openai/shap-e"
    guidance_scale: Annotated[float, "[0, 1e6]"] = 15.0
    num_steps: Annotated[int, "[1, 10000]"] = 64
    vertex_stride: Annotated[int, "[1, 1e6]"] = 4  # every 4th vertex of the mesh
    # candidates of grow_points; 0: do not grow
    growth_points: Annotated[int, "[0, 1e9]"] = 1_000_000
    growth_distance: Annotated[float, "[0, 1e6]"] = 0.01  # in Shap-E's unit cube
    color_noise: Annotated[float, "[0, 1e3]"] = 0.2
    scale: Annotated[float, "(0, 1e6]"] = 1.6  # world units per unit of Shap-E
    # the side that Shap-E's objects turn to the viewer
    front: Annotated[str, tuple(AXES)] = "-y"
    up: Annotated[str, tuple(AXES)] = "+z"

    def points(self, rng: np.random.Generator, device: torch.device) -> Points:
        if not self.prompt.strip() or self.prompt.startswith("lib:"):
            raise ValueError(
                "Shap-E needs the prompt in words: set system.geometry.shap_e.prompt="
                f"'...' (it is '{self.prompt}')"
            )
        points = self.sample(int(rng.integers(2**31)), device)
        points = Points(points.xyz[:: self.vertex_stride], points.rgb[:: self.vertex_stride])
        if self.growth_points > 0:
            points = grow_points(
                points, self.growth_points, self.growth_distance, self.color_noise, rng
            )
        rotation = axes_rotation(self.front, self.up)
        return Points(points.xyz @ rotation.T * self.scale, points.rgb)

    def sample(self, seed: int, device: torch.device) -> Points:
        """The vertices of the mesh, in Shap-E's own axes."""
        try:
            from diffusers import ShapEPipeline

            name = self.pretrained_model_name_or_path
            refuse_out_of_reach(name)
            refuse_foreign_parts(ShapEPipeline.load_config(name))
            with data_only():  # not all weights of Shap-E on the hub are safetensors
                pipe = ShapEPipeline.from_pretrained(
                    name, torch_dtype=torch.float16 if device.type == "cuda" else torch.float32
                ).to(device)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"Shap-E's weights '{self.pretrained_model_name_or_path}' cannot be had "
                f"({type(error).__name__}: {reason[0] if reason else ''}): download them, or "
                "start from a ball with system.geometry.init_type=ball; on a CPU, or to try it "
                "out, add --config configs/pocket.yaml, which needs no download"
            ) from error
        mesh = pipe(
            self.prompt,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="mesh",
        ).images[0]
        rgb = torch.stack([mesh.vertex_channels[c] for c in "RGB"], dim=-1)
        xyz = mesh.verts.detach().cpu().double().numpy()
        if len(xyz) == 0:
            raise ValueError(f"Shap-E found no surface for '{self.prompt}': try another seed")
        return Points(xyz, rgb.detach().cpu().double().numpy().clip(0, 1))


def initial_gaussians(cfg: Any, device: torch.device) -> Dict[str, Tensor]:
    """The Gaussians that the geometry's configuration asks for; see :func:`from_points` for the
    keys. ``init_type`` 'none' gives none at all (a checkpoint or a file fills them in)."""
    # all three blocks are parsed, so that a misspelt key is found whichever source is chosen
    ball = parse_structured(BallInit, cfg.ball)
    file = parse_structured(FileInit, cfg.file)
    shap_e = parse_structured(ShapEInit, cfg.shap_e)
    rng = np.random.default_rng(cfg.init_seed)
    if cfg.init_type == "none":
        source = None
    elif cfg.init_type == "ball":
        source = BallInit(**ball).points(rng)
    elif cfg.init_type == "file":
        source = FileInit(**file).load(rng)
    elif cfg.init_type == "shap-e":
        source = ShapEInit(**shap_e).points(rng, device)
    else:
        raise ValueError(
            f"system.geometry.init_type='{cfg.init_type}' is unknown: "
            "use ball, file, shap-e or none"
        )
    if source is None:
        n_rest = (cfg.sh_degree + 1) ** 2 - 1
        empty = {"means": (0, 3), "scales": (0, 3), "quats": (0, 4), "opacities": (0,)}
        empty |= {"sh0": (0, 1, 3)} | ({"shN": (0, n_rest, 3)} if n_rest else {})
        return {name: torch.zeros(shape) for name, shape in empty.items()}
    if isinstance(source, Points):
        return from_points(
            source, cfg.init_opacity, cfg.init_scale, cfg.sh_degree, device, cfg.knn_backend
        )
    return source
